"""Caption metrics equal to pycocoevalcap's: BLEU-1..4, METEOR 1.5, ROUGE_L, CIDEr-D, and two baselines.

BLEU is pycocoevalcap's own scorer. ROUGE_L and CIDEr-D are computed here: the first because its quadratic
Python loop takes seconds on captions of RSIEval's length, the second because its document frequencies must be
free to come from a file (idf from the evaluated subset makes scores of subsets incomparable). Scores are raw,
CIDEr-D on its own scale of 0 to 10; papers print them times 100.
"""

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float
from pycocoevalcap.bleu.bleu import Bleu

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import java, ptb

METRICS = ("bleu1", "bleu2", "bleu3", "bleu4", "meteor15", "rouge_l", "cider_d")
_CIDER_SIGMA = 6.0  # CIDEr-D's length penalty, in words
_ROUGE_BETA = 1.2  # coco-caption's weight of recall


@dataclass(frozen=True)
class CaptionScores:
    """What a table needs to print a row and its reader to believe it."""

    metrics: dict[str, float]  # raw, in METRICS' order; a metric that failed is absent and named in `notes`
    per_item: dict[str, list[float]]  # the same metrics of each item, in the order of `ids`
    ids: list[str]
    references_per_item: tuple[int, float, int]  # least, mean, most
    mean_length: float  # tokens a prediction
    mean_reference_length: float
    tokenizer: str  # "ptb-corenlp-3.4.1" (Java) or "ptb-python"
    document_frequencies: str  # "evaluated references" or the name of the frozen ones
    notes: list[str] = field(default_factory=list)

    @property
    def n(self) -> int:
        return len(self.ids)


# ---- tokens ----


def tokenize(captions: Sequence[str], tokenizer: str) -> list[str]:
    """Each caption's PTB tokens joined by a space; `tokenizer` is java.PTB_NAME or "ptb-python"."""
    if tokenizer == java.PTB_NAME:
        return java.ptb_tokenize(list(captions))
    if tokenizer != "ptb-python":
        raise UserError(f"tokenizer {tokenizer!r}: expected {java.PTB_NAME} or ptb-python")
    known = {caption: ptb.tokenize(caption) for caption in dict.fromkeys(captions)}
    return [known[caption] for caption in captions]


# ---- ROUGE_L ----


def _lcs(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by Hyyro's bit-parallel rule (one big-integer row for each
    word).
    """
    masks: dict[str, int] = {}
    for i, word in enumerate(a):
        masks[word] = masks.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        hit = row & masks.get(word, 0)
        row = (row + hit | row - hit) & full
    return len(a) - row.bit_count()


def rouge_l(references: Sequence[str], prediction: str) -> float:
    """LCS F-measure from the best precision and the best recall over tokenised references, 0 to 1."""
    words = prediction.split(" ")
    refs = [reference.split(" ") for reference in references]
    common = [_lcs(ref, words) for ref in refs]
    precision = max(common) / len(words)
    recall = max(c / len(ref) for c, ref in zip(common, refs, strict=True))
    if not precision or not recall:
        return 0.0
    beta2 = _ROUGE_BETA**2
    return (1 + beta2) * precision * recall / (recall + beta2 * precision)


# ---- CIDEr-D ----


def _ngrams(tokens: str) -> list[Counter]:
    words = tokens.split()
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, 5)]


@dataclass(frozen=True)
class DocumentFrequencies:
    """In how many images' references each n-gram (1 to 4 words) occurs: the idf of CIDEr-D, to be frozen in a
    file.
    """

    name: str
    num_images: int
    counts: Mapping[tuple[str, ...], int]

    @staticmethod
    def of(references: Iterable[Sequence[str]], name: str = "evaluated references") -> "DocumentFrequencies":
        """From the tokenised references of each image."""
        counts: Counter = Counter()
        num_images = 0
        for refs in references:
            counts.update({ngram for ref in dict.fromkeys(refs) for of_n in _ngrams(ref) for ngram in of_n})
            num_images += 1
        return DocumentFrequencies(name, num_images, counts)

    def save(self, path: str | Path) -> None:
        """Writes gzipped JSON {name, num_images, counts: {"words of the n-gram": images}}."""
        counts = {" ".join(ngram): count for ngram, count in sorted(self.counts.items())}
        data = {"name": self.name, "num_images": self.num_images, "counts": counts}
        # mtime 0: the same frequencies are the same bytes
        Path(path).write_bytes(gzip.compress(json.dumps(data, ensure_ascii=False).encode(), mtime=0))

    @staticmethod
    def load(path: str | Path) -> "DocumentFrequencies":
        """Reads what `save` wrote. Raises UserError: missing, or another file."""
        try:
            data = json.loads(gzip.decompress(Path(path).read_bytes()))
            counts = {tuple(ngram.split(" ")): int(count) for ngram, count in data["counts"].items()}
            return DocumentFrequencies(str(data["name"]), int(data["num_images"]), counts)
        except OSError as error:  # gzip's BadGzipFile too
            raise UserError(f"{path}: cannot be read as document frequencies ({error})") from None
        except (EOFError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: expected the document frequencies that CIDEr-D wrote") from None


def cider_d(
    references: Sequence[Sequence[str]], predictions: Sequence[str], frequencies: DocumentFrequencies
) -> list[float]:
    """CIDEr-D of each item, 0 to 10, from tokenised text (Vedantam et al. 2015, with clipping and length
    penalty).
    """
    log_images = math.log(frequencies.num_images)
    idf: dict[tuple[str, ...], float] = {}
    vectors: dict[str, tuple[list[dict], list[float], int]] = {}  # RSICD repeats 1.7 references an image

    def vector(tokens: str) -> tuple[list[dict], list[float], int]:
        if tokens not in vectors:
            weights = []
            for counts in _ngrams(tokens):
                for ngram in counts:
                    if ngram not in idf:
                        idf[ngram] = log_images - math.log(max(1.0, frequencies.counts.get(ngram, 0)))
                weights.append({ngram: count * idf[ngram] for ngram, count in counts.items()})
            norms = [math.sqrt(sum(w * w for w in of_n.values())) for of_n in weights]
            # the reference code takes the number of bigrams for the length
            vectors[tokens] = weights, norms, max(0, len(tokens.split()) - 1)
        return vectors[tokens]

    scores = []
    for refs, prediction in zip(references, predictions, strict=True):
        weights, norms, length = vector(prediction)
        total = 0.0
        for ref in refs:
            ref_weights, ref_norms, ref_length = vector(ref)
            penalty = math.exp(-((length - ref_length) ** 2) / (2 * _CIDER_SIGMA**2))
            for mine, theirs, norm, ref_norm in zip(weights, ref_weights, norms, ref_norms, strict=True):
                dot = sum(min(w, theirs[g]) * theirs[g] for g, w in mine.items() if g in theirs)
                total += penalty * (dot / (norm * ref_norm) if norm and ref_norm else dot)
        scores.append(10.0 * total / (4 * len(refs)))
    return scores


# ---- all of them ----


def score(
    references: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    *,
    meteor: str | None = "meteor15",
    frequencies: DocumentFrequencies | None = None,
    tokenizer: str | None = None,
) -> CaptionScores:
    """Scores one caption for each item against its references.

    `meteor` is "meteor15" (Java), "meteor_nltk" (another metric: METEOR 2005 of the package nltk, near
    ROUGE_L in size) or None. When METEOR cannot run, the rest still comes and `notes` has one line that says
    why. `frequencies` freezes CIDEr-D's idf. `tokenizer` defaults to PTBTokenizer where Java is there, else
    our own; so too, with a line in `notes`, where Java is there and fails.

    Raises UserError: no items, other ids on one side, an item without references, a broken tokeniser.
    """
    ids = list(references)
    _check(references, predictions, meteor)
    wanted = tokenizer or (java.PTB_NAME if java.available() else "ptb-python")
    notes = []
    with ExitStack() as stack:
        process = None
        if meteor == "meteor15":
            try:
                process = stack.enter_context(java.Meteor())  # loads while the others are computed
            except java.JavaError as error:
                notes.append(f"meteor15 was not computed: {error}")
        for used in (wanted, "ptb-python"):
            try:
                refs = _tokenize_references([references[i] for i in ids], used)
                hyps = tokenize([predictions[i] for i in ids], used)
                break
            except java.JavaError as error:
                if tokenizer is not None:
                    raise UserError(f"{error}; or score with the tokenizer ptb-python") from None
                notes.append(f"tokens are ptb-python's: {error}")

        frequencies = frequencies or DocumentFrequencies.of(refs)
        if frequencies.num_images == 1:
            notes.append("cider_d is 0 by definition: its document frequencies come from a single image")
        metrics, per_item = _bleu(refs, hyps)
        per_item["rouge_l"] = [rouge_l(r, h) for r, h in zip(refs, hyps, strict=True)]
        per_item["cider_d"] = cider_d(refs, hyps, frequencies)
        for name in ("rouge_l", "cider_d"):
            metrics[name] = float(np.mean(per_item[name]))
        if meteor == "meteor_nltk":
            per_item[meteor] = _meteor_nltk(refs, hyps)
            metrics[meteor] = float(np.mean(per_item[meteor]))
        if process is not None:
            try:
                metrics["meteor15"], per_item["meteor15"] = process.score(refs, hyps)
            except java.JavaError as error:
                notes.append(f"meteor15 was not computed: {error}")

    counts = [len(r) for r in refs]
    empty = sum(not hyp for hyp in hyps)
    if empty:
        notes.append(f"{empty} of {len(ids)} predictions have no word and count as 0")
    order = [name for name in (*METRICS, "meteor_nltk") if name in metrics]
    return CaptionScores(
        metrics={name: metrics[name] for name in order},
        per_item={name: per_item[name] for name in order},
        ids=ids,
        references_per_item=(min(counts), float(np.mean(counts)), max(counts)),
        mean_length=float(np.mean([len(hyp.split()) for hyp in hyps])),
        mean_reference_length=float(np.mean([len(ref.split()) for r in refs for ref in r])),
        tokenizer=used,
        document_frequencies=frequencies.name,
        notes=notes,
    )


def _check(
    references: Mapping[str, Sequence[str]], predictions: Mapping[str, str], meteor: str | None
) -> None:
    if meteor not in ("meteor15", "meteor_nltk", None):
        raise UserError(f"meteor {meteor!r}: expected meteor15, meteor_nltk or none")
    if not references:
        raise UserError("no captions to score")
    for side, extra in (
        ("no prediction for", references.keys() - predictions.keys()),
        ("no references for", predictions.keys() - references.keys()),
        ("no references for", {i for i, refs in references.items() if isinstance(refs, str) or not refs}),
    ):
        if extra:
            names = ", ".join(sorted(map(str, extra))[:3])
            raise UserError(f"{side} {len(extra)} of {len(references)} items, such as {names}")


def _tokenize_references(references: list[Sequence[str]], tokenizer: str) -> list[list[str]]:
    flat = iter(tokenize([caption for refs in references for caption in refs], tokenizer))
    return [[next(flat) for _ in refs] for refs in references]


def _bleu(refs: list[list[str]], hyps: list[str]) -> tuple[dict[str, float], dict[str, list[float]]]:
    gts = dict(enumerate(refs))
    total, items = Bleu(4).compute_score(gts, {i: [hyp] for i, hyp in enumerate(hyps)}, verbose=0)
    return (
        {f"bleu{n}": float(value) for n, value in enumerate(total, 1)},
        {f"bleu{n}": [float(v) for v in values] for n, values in enumerate(items, 1)},
    )


def require_nltk() -> None:
    """Raises UserError where meteor_nltk cannot run: the package nltk, or WordNet, is missing."""
    _meteor_nltk([["a road"]], ["a road"])


def _meteor_nltk(refs: list[list[str]], hyps: list[str]) -> list[float]:
    try:
        from nltk.translate.meteor_score import meteor_score

        return [
            float(meteor_score([ref.split() for ref in r], h.split()))
            for r, h in zip(refs, hyps, strict=True)
        ]
    except ModuleNotFoundError:
        raise UserError("meteor_nltk needs the package nltk: pip install nltk") from None
    except LookupError:
        raise UserError("meteor_nltk needs WordNet: python -m nltk.downloader wordnet") from None


# ---- baselines ----


def constant_caption(references: Iterable[Sequence[str]]) -> str:
    """The one caption of a pool (best the training set's references) that is nearest to all of its images.

    Of the 30 captions nearest the pool's mean tf-idf vector, the one with the best mean ROUGE_L over at most
    500 images, evenly drawn. Deterministic. What a model adds is what it scores above this, on every metric.
    """
    pool = [list(refs) for refs in references]
    if not any(pool):
        raise UserError("the constant-caption baseline needs a pool of captions; the pool is empty")
    tokens = [[ptb.tokenize(caption) for caption in refs] for refs in pool]
    frequencies = DocumentFrequencies.of(tokens)
    text = {
        t: caption for refs, ts in zip(pool, tokens, strict=True) for caption, t in zip(refs, ts, strict=True)
    }

    def vector(caption: str) -> dict[tuple[str, ...], float]:
        counts = {g: c for of_n in _ngrams(caption)[:2] for g, c in of_n.items()}
        # + 1: a word of every image says what a typical caption is, which plain idf would weigh with 0
        raw = {
            g: c * (1 + math.log(frequencies.num_images / frequencies.counts[g])) for g, c in counts.items()
        }
        norm = math.sqrt(sum(w * w for w in raw.values())) or 1.0
        return {g: w / norm for g, w in raw.items()}

    vectors = {caption: vector(caption) for caption in text}
    mean: Counter = Counter()
    for refs in tokens:
        for caption in refs:
            for ngram, weight in vectors[caption].items():
                mean[ngram] += weight
    ranked = sorted(text, key=lambda c: -sum(w * mean[g] for g, w in vectors[c].items()))[:30]
    images = [refs for refs in tokens if refs]
    drawn = [images[i * len(images) // min(500, len(images))] for i in range(min(500, len(images)))]
    return text[max(ranked, key=lambda caption: sum(rouge_l(refs, caption) for refs in drawn))]


def nearest_captions(
    pool: Sequence[Sequence[str]],
    pool_features: Float[np.ndarray, "pool dim"],
    features: Float[np.ndarray, "items dim"],
) -> list[str]:
    """For each item, the first reference of the pool's image with the most similar features (cosine).

    The features are the caller's: of the vision tower, or colour histograms. Ties go to the earlier image.
    """
    if (
        len(pool) != len(pool_features)
        or pool_features.ndim != 2
        or features.shape[1:] != pool_features.shape[1:]
    ):
        raise UserError(
            f"nearest-caption baseline: {len(pool)} images with features of shape {pool_features.shape} "
            f"against {features.shape}: expected one row of the same width each"
        )

    def unit(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    return [pool[i][0] for i in np.argmax(unit(features) @ unit(pool_features).T, axis=1)]
