"""The numbers of the paper's Figure 3 and Table 1, for any data set.

Definitions. An utterance is a question or an answer; a turn is a question with its answer; a caption is the
first answer of a dialogue about an image, or in a set of captions each reference. A token is a word, a number
or a punctuation mark (or, with a tokenizer, an id of the model's). Tokens and sentences are counted over all
utterances: only so the paper's 47,798 sentences in 4,929 x 1.7 turns are 2.86 "per response".
"""

import functools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mmrstraj_jax.construction.files import read_lines
from mmrstraj_jax.data import records
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import readers

_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|\w+(?:['’-]\w+)*|[^\w\s]")
# A stop ends a sentence before white space or the end, a line break ends it anyway; an abbreviation, an
# initial and the number of a list item do not.
_END = re.compile(r"(?:(?<=[.!?…])[\"'”’)\]]*\s+|[。！？]+|\n+)")
_NO_END = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|approx|ca|cf|fig|st|dr|mr|mrs)|\b[A-Z]|^\s*\d+)\.$", re.IGNORECASE
)
_NUMBER = re.compile(r"\bno\.$", re.IGNORECASE)  # "No. 5"; before anything but a digit it is an answer

# ---- counting ----


def words(text: str) -> int:
    """Tokens of a text: words (with their hyphens and apostrophes), numbers, punctuation marks."""
    return len(_TOKEN.findall(text))


def sentences(text: str) -> int:
    """Sentences of a text, those without a word left out; "3.5 m", "e.g. a", "1. Roads" do not end one."""
    count, begin = 0, 0
    cuts = [(match.start(), match.end(), match[0]) for match in _END.finditer(text)] + [
        (len(text), len(text), "\n")
    ]
    for start, end, mark in cuts:
        piece = text[begin:start]
        short = _NO_END.search(piece) or (_NUMBER.search(piece) and text[end : end + 1].isdigit())
        if "\n" not in mark and short:
            continue
        count += bool(re.search(r"\w", piece))
        begin = end
    return count


def density(values: Sequence[float], at: Float[np.ndarray, " G"]) -> Float[np.ndarray, " G"]:
    """Gaussian kernel density of whole numbers, with Scott's bandwidth n^(-1/5) s, at least half a unit."""
    unique, weight = np.unique(np.asarray(values, np.float64), return_counts=True)
    width = bandwidth(values)
    z = (np.asarray(at)[:, None] - unique) / width
    return np.exp(-0.5 * z * z) @ weight / (weight.sum() * width * np.sqrt(2 * np.pi))


def bandwidth(values: Sequence[float]) -> float:
    """Scott 1992 for one dimension."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return max(spread * len(values) ** -0.2, 0.5)


# ---- data sets ----


@dataclass(frozen=True)
class Dialogue:
    """A row. `questions` is empty where a set has captions only."""

    id: str
    image: str  # its path, or its hash where the row holds it; "" in a row without an image
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    expert: bool | None = None  # written or corrected by people in every turn; None: the set does not say
    about: dict[str, Any] = field(default_factory=dict)  # region, zoom, score, imagery, as far as known


def load(path: Path) -> list[Dialogue]:
    """The dialogues of a file, in its order.

    Args:
      path: LLaVA-OneVision JSON, JSON Lines or array_record; RSICap's captions.json; RSIEval's
        annotations.json; a Karpathy file (UCM, Sydney, RSICD, RSITMD). `provenance.jsonl` and the images'
        records beside a file that the build wrote are read too.
    Raises:
      UserError: unreadable, none of these, or no dialogue in it.
    """
    head = _object(path)
    if head is None:
        found = list(_rows(path))
    elif "images" in head:
        splits = dict.fromkeys(row.get("split") for row in head["images"] if isinstance(row, dict))
        items = [item for split in splits for item in readers.karpathy(path, str(split))]
        found = [
            Dialogue(f"{i.id}#{n}", str(i.images[0]), (), (c,))
            for i in items
            for n, c in enumerate(i.references)
        ]
    else:
        rows = head.get("annotations")
        rsicap = (
            bool(rows) and isinstance(rows, list) and isinstance(rows[0], dict) and "text_output" in rows[0]
        )
        items = readers.rsicap(path) if rsicap else readers.rsieval_captions(path)
        found = [
            Dialogue(i.id, str(i.images[0]), (i.question,) if i.question else (), i.references) for i in items
        ]
    if not found:
        raise UserError(f"{path}: no dialogue in it; expected rows with conversations, or captions")
    return found


def _object(path: Path) -> dict | None:
    """The JSON object that a file is, or None where it holds rows."""
    try:
        if path.is_dir() or ".array_record" in path.name:
            return None
        with path.open("rb") as file:
            if not file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
                return None
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a data set") from None
    except ValueError:
        return None  # JSON Lines
    return value if "conversations" not in value else None


def _rows(path: Path) -> Iterator[Dialogue]:
    made = {}
    provenance = path.parent / "provenance.jsonl"
    if provenance.is_file():
        made = {row["id"]: row for row in read_lines(provenance)}
    found = records.load(str(path), on_bad="error", check_files=False)
    for row in found.rows:
        turns = [turn["value"].replace("<image>", "").strip() for turn in row.conversations]
        image = row.images[0] if row.images else ""
        image = str(Path(row.root) / image) if image and not row.blobs else image
        source = made.get(row.id)
        about = {k: source[k] for k in ("region", "zoom", "score") if k in source} if source else {}
        yield Dialogue(
            row.id,
            image,
            tuple(turns[0::2]),
            tuple(turns[1::2]),
            None if source is None else _by_people(source["turns"]),
            _recorded(image) | about,
        )


def _by_people(turns: Sequence[dict]) -> bool:
    """Captions are given, not an annotation of this set; every other turn must be a person's."""
    own = [turn for turn in turns if turn["by"] != "caption"]
    return bool(own) and all(turn.get("edited_by") or not turn["by"].startswith("model:") for turn in own)


def _recorded(image: str) -> dict[str, Any]:
    """What the record beside an image says."""
    path = Path(image).with_suffix(".json") if image else None
    if path is None or not path.is_file():
        return {}
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        return {}
    parts = ("window", "provider")
    if not isinstance(record, dict) or not all(isinstance(record.get(part), dict) for part in parts):
        return {}  # another tool's file: labelled boxes, for instance
    known = {"region": record.get("region"), "zoom": record["window"].get("zoom")}
    known["imagery"] = record["provider"].get("name")
    return {name: value for name, value in known.items() if value is not None}


# ---- Figure 3 ----

PAPER = {  # Figure 3 (c) and section 3.3, RSI-Instruct and RSI-Traffic together
    "images": 4929,
    "tokens": 592765,
    "sentences": 47798,
    "sentences_per_utterance": 2.86,
    "tokens_per_caption": 67.45,
    "sentences_per_caption": 5.02,
    "turns_per_image": 1.7,
    "expert_share": 200 / 2344,  # of RSI-Traffic alone
}


@dataclass(frozen=True)
class Statistics:
    """Figure 3 of one data set."""

    indicators: dict[str, float | None]  # a row of the table each
    tokens: list[int]  # of every caption
    sentences: list[int]  # of every caption


def measure(dialogues: Sequence[Dialogue], tokens: Callable[[str], int] = words) -> Statistics:
    """The indicators of Figure 3 (c), and the lengths that (a) and (b) are densities of.

    Args:
      tokens: text -> their number.
    Raises:
      UserError: no row has an image.
    """
    tokens = functools.cache(tokens)
    utterances = [text for row in dialogues for text in (*row.questions, *row.answers) if text]
    captions = [row.answers[0] for row in dialogues if row.image]
    if not captions:
        raise UserError("statistics: no row has an image; expected captions or dialogues about images")
    caption_tokens, caption_sentences = [tokens(c) for c in captions], [sentences(c) for c in captions]
    images = len({row.image for row in dialogues if row.image})
    turns = sum(len(row.answers) for row in dialogues if row.image)
    total = sum(map(sentences, utterances))
    known = [row.expert for row in dialogues if row.expert is not None]
    indicators = {
        "images": images,
        "dialogues": len(dialogues),
        "turns": turns,
        "tokens": sum(map(tokens, utterances)),
        "sentences": total,
        "sentences_per_utterance": total / len(utterances),
        "tokens_per_caption": float(np.mean(caption_tokens)),
        "sentences_per_caption": float(np.mean(caption_sentences)),
        "longest_caption_sentences": max(caption_sentences),
        "turns_per_image": turns / images,
        "expert_rows": sum(known) if known else None,
        "expert_share": sum(known) / len(known) if known else None,
    }
    return Statistics(indicators, caption_tokens, caption_sentences)


# ---- Table 1 ----


def regions(
    dialogues: Sequence[Dialogue], descriptions: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Rows of Table 1: region, imagery, images, images by zoom, average score, people's description."""
    groups: dict[str, dict[Any, dict]] = defaultdict(dict)
    for row in dialogues:
        if row.image:
            # outside all regions, or of a set that knows none
            region = row.about.get("region", "place unknown") or "elsewhere"
            groups[region][row.image] = row.about
    table = []
    for name, images in sorted(groups.items()):
        scores = [about["score"] for about in images.values() if "score" in about]
        zooms = Counter(about["zoom"] for about in images.values() if "zoom" in about)
        table.append(
            {
                "region": name,
                "imagery": sorted({about["imagery"] for about in images.values() if "imagery" in about}),
                "images": len(images),
                "zooms": {str(zoom): count for zoom, count in sorted(zooms.items())},
                "score": round(float(np.mean(scores)), 2) if scores else None,
                "description": (descriptions or {}).get(name, ""),
            }
        )
    return table


def typical(dialogues: Sequence[Dialogue]) -> Dialogue:
    """For the panel of Figure 2: of the dialogues whose image is there, the one with the median caption."""
    about_image = [row for row in dialogues if row.image]
    seen = [row for row in about_image if Path(row.image).is_file()] or about_image
    return sorted(seen, key=lambda row: (words(row.answers[0]), row.id))[len(seen) // 2]
