"""Samples of the city: images with captions, questions, truth and labels; written as LLaVA-OneVision files.

`samples` yields them in memory, `write_sample` writes PNG images and one JSON file, `ensure_sample` makes
the embedded training and evaluation sample once and keeps it in the user's cache.
"""

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.synthcity import captions, traffic, vocabulary
from mmrstraj_jax.synthcity.city import City, make_city
from mmrstraj_jax.synthcity.labels import Labels, labels
from mmrstraj_jax.synthcity.palette import make_look
from mmrstraj_jax.synthcity.questions import GENERAL, Balancer, Question, drills
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.render import render
from mmrstraj_jax.synthcity.truth import Truth, truth_of
from mmrstraj_jax.synthcity.window import View, Window, view, window_centers

VERSION = "4"  # of everything that changes a pixel or a word; part of the cache's folder name
# A split's number is part of every city's seed, so no two splits share a city.
SPLITS = {"base": 1, "stage1": 2, "stage2": 3, "eval_base": 4, "eval_stage1": 5, "eval_stage2": 6, "bench": 7}
KINDS = ("base", "general", "traffic", "eval_general", "eval_traffic")
WINDOWS_PER_CITY = 12
REHEARSAL = 0.2  # share of general images in traffic training data
QUESTIONS = {"base": 10, "traffic": 10}  # at most, of an image; else 6
# Share of the images with a caption or a description, else half. A description weighs as much in the loss as
# all of an image's questions and says mostly what every description says.
TEXT_SHARE = {"traffic": 0.2}
TEXT_ROWS = 0.25  # text-only rows per image in base training data
# (width, height) in pixels -> weight; metres a pixel
SHAPES = {(224, 224): 0.7, (112, 112): 0.1, (336, 224): 0.1, (224, 336): 0.1}
_GSD = {(224, 224): (0.43, 0.54), (112, 112): (0.43, 0.54), (336, 224): (0.42, 0.5), (224, 336): (0.42, 0.5)}
_CENTERS = {
    "residential": 4.0, "apartments": 1.5, "commercial": 2.0, "industrial": 2.6, "park": 1.4, "sports": 1.6,
    "farmland": 1.3, "harbor": 2.2, "water": 1.6, "roundabout": 0.9, "overpass": 1.0, "crossroads": 1.0,
    "T-junction": 0.8, "dead end": 0.9, "motorway": 1.0, "arterial": 1.2,
    "airport": 1.8, "interchange": 0.9,
}  # fmt: skip
_ROAD_CENTERS = (
    "roundabout",
    "overpass",
    "crossroads",
    "T-junction",
    "dead end",
    "motorway",
    "arterial",
    "interchange",
)
_HOURS = (3, 6, 8, 8, 12, 12, 15, 17, 17, 19, 21, 22)


@dataclass(frozen=True)
class Sample:
    """One image and all that is known of it."""

    id: str
    image: UInt8[np.ndarray, "H W 3"]
    classes: UInt8[np.ndarray, "H W"]
    view: View
    truth: Truth

    def labels(self, side: int = 8) -> Labels:
        """Dense labels on a side x side grid."""
        return labels(self.view, self.truth, self.classes, side)


def city_seed(split: str, seed: int, index: int) -> int:
    """The seed of city `index` of a split: no two (split, seed, index) share one."""
    return ((SPLITS[split] << 24) + seed << 24) + index


def samples(
    split: str, seed: int, num: int, domain: str, kind: str = "general", square: bool = False, start: int = 0
) -> Iterator[Sample]:
    """Yields `num` samples from number `start` on; sample k is the same whatever `start` and `num`.

    domain: "A", "B", or "AB" for cities of both in turn. kind "traffic" looks at roads more often. square:
    224 x 224 only. Raises UserError for an unknown split or domain.
    """
    if split not in SPLITS:
        raise UserError(f"synthcity split {split!r}: expected one of {', '.join(SPLITS)}")
    if not 0 <= seed < 1 << 24:
        raise UserError(f"synthcity seed {seed}: expected 0 to {(1 << 24) - 1}")
    if domain not in ("A", "B", "AB"):
        raise UserError(f"synthcity domain {domain!r}: expected 'A', 'B' or 'AB'")
    city = None
    for k in range(start, start + num):
        index = k // WINDOWS_PER_CITY
        here = domain[index % len(domain)]
        if city is None or city.seed != city_seed(split, seed, index):
            city = make_city(city_seed(split, seed, index), object_scale=0.88 if here == "B" else 1.0)
        yield _sample(city, split, k, here, "traffic" in kind, square)


def _sample(city: City, split: str, k: int, domain: str, roads: bool, square: bool) -> Sample:
    stream = Stream(city.seed, 7, k)
    shape = (224, 224) if square else stream.weighted(SHAPES)
    window = _window(city, stream, shape, roads)
    look = make_look(stream, domain)
    seen = view(window)
    drawn = render(seen, look, stream)
    return Sample(f"{split}-{k:06d}", drawn.image, drawn.classes, seen, truth_of(seen, look, drawn.classes))


def _window(city: City, s: Stream, shape: tuple[int, int], roads: bool) -> Window:
    """A window centred near a block or junction of a drawn kind that the city has, away from the city's
    edge."""
    gsd = s.uniform(*_GSD[shape])
    edge = window_centers(city)
    weights = {k: w * (2.5 if roads and k in _ROAD_CENTERS else 1.0) for k, w in _CENTERS.items()}
    while True:
        kind = s.weighted(weights)
        places = edge.get(kind)
        if places:
            break
        del weights[kind]
    x, y = s.choice(places)
    # Far enough off centre that every cell of the 3x3 grid gets its share of what was looked for.
    wide, high = shape[0] * gsd, shape[1] * gsd
    x, y = x + s.uniform(-0.36, 0.36) * wide, y + s.uniform(-0.36, 0.36) * high
    return Window(city, x, y, shape, gsd, s.choice(_HOURS))


def general_questions(
    truth: Truth, s: Stream, balancer: Balancer, limit: int, with_drills: bool
) -> list[Question]:
    """Up to `limit` balanced questions, one of each type in turn."""
    by_type = [s.shuffled(list(make(truth, s))) for make in GENERAL]
    if with_drills:
        by_type.append(s.shuffled(list(drills(truth, s))))
    return _in_turn(by_type, s, balancer, limit)


def traffic_questions(facts: dict, s: Stream, balancer: Balancer, limit: int) -> list[Question]:
    """Up to `limit` balanced traffic questions on traffic.facts_of, one of each type in turn."""
    by_type: dict[str, list] = {}
    for q in s.shuffled(list(traffic.questions(facts, s))):
        by_type.setdefault(q.type, []).append(q)
    return _in_turn(list(by_type.values()), s, balancer, limit)


def _in_turn(by_type: list[list[Question]], s: Stream, balancer: Balancer, limit: int) -> list[Question]:
    chosen: list[Question] = []
    queues = [q for q in s.shuffled(by_type) if q]
    while queues and len(chosen) < limit:
        for queue in list(queues):
            while queue and len(chosen) < limit:
                question = queue.pop()
                if balancer.accepts(question):
                    chosen.append(question)
                    break
            if not queue:
                queues.remove(queue)
    return chosen


def conversation(turns: list[tuple[str, str]], with_image: bool = True) -> list[dict[str, str]]:
    """LLaVA-OneVision turns; the first human turn opens with the image."""
    result = []
    for k, (question, answer) in enumerate(turns):
        mark = "<image>\n" if with_image and k == 0 else ""
        result += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return result


def training_turns(
    sample: Sample, s: Stream, kind: str, balancer: Balancer, limit: int
) -> list[tuple[str, str]]:
    """The turns of one training row: questions in random order, often with the caption at the front."""
    truth = sample.truth
    if kind == "traffic" and not s.chance(REHEARSAL):
        facts = traffic.facts_of(truth, sample.view)
        turns = [(q.question, q.answer) for q in traffic_questions(facts, s, balancer, limit)]
        text = (s.choice(traffic.PROMPTS), traffic.describe(facts, s))
    else:
        found = general_questions(truth, s, balancer, limit, with_drills=kind == "base")
        turns = [(q.question, q.answer) for q in found]
        text = (s.choice(captions.PROMPTS), captions.caption(truth, s))
    turns = s.shuffled(turns)
    if not turns or s.chance(TEXT_SHARE.get(kind, 0.5)):
        turns.insert(0 if s.chance(0.7) else len(turns), text)
    return turns


def training_rows(sample: Sample, s: Stream, kind: str, balancer: Balancer, limit: int) -> Iterator[dict]:
    """The row of one sample, and with kind "base" now and then a text-only row that teaches traffic words."""
    turns = training_turns(sample, s, kind, balancer, limit)
    yield {"id": sample.id, "image": f"images/{sample.id}.png", "conversations": conversation(turns)}
    if kind == "base" and s.chance(TEXT_ROWS):
        yield {
            "id": f"{sample.id}-text",
            "conversations": conversation(vocabulary.text_row(s), with_image=False),
        }


def evaluation_rows(sample: Sample, s: Stream, kind: str, balancer: Balancer, limit: int) -> Iterator[dict]:
    """Single-turn rows with "type" and "truth", the caption or description last."""
    if kind == "eval_traffic":
        facts = traffic.facts_of(sample.truth, sample.view)
        found = traffic_questions(facts, s, balancer, limit)
        text = (s.choice(traffic.PROMPTS), traffic.describe(facts, s), "description")
    else:
        found = general_questions(sample.truth, s, balancer, limit, with_drills=False)
        text = (s.choice(captions.PROMPTS), captions.caption(sample.truth, s), "caption")
    rows = [(q.question, q.answer, q.type, q.facts) for q in found] + [(*text, {})]
    for n, (question, answer, type_, facts) in enumerate(rows):
        yield {
            "id": f"{sample.id}-{n}",
            "image": f"images/{sample.id}.png",
            "conversations": conversation([(question, answer)]),
            "type": type_,
            "truth": {"answer": answer, **facts},
        }


def balanced(rows: list[dict]) -> list[dict]:
    """Evaluation rows without the odd one out: every yes/no question string keeps as many yes as no."""
    tally: dict[str, int] = {}
    for row in rows:
        if row["truth"]["answer"] in ("yes", "no"):
            text = row["conversations"][0]["value"]
            tally[text] = tally.get(text, 0) + (1 if row["truth"]["answer"] == "yes" else -1)
    keep = []
    for row in reversed(rows):
        text, answer = row["conversations"][0]["value"], row["truth"]["answer"]
        surplus = tally.get(text, 0)
        if answer in ("yes", "no") and surplus * (1 if answer == "yes" else -1) > 0:
            tally[text] -= int(math.copysign(1, surplus))
            continue
        keep.append(row)
    return keep[::-1]


def write_sample(
    folder: str | os.PathLike, split: str, num: int, seed: int, domain: str, kind: str, turns: int = 0
) -> Path:
    """Writes `num` images to folder/images and their rows to folder/<split>.json; returns the JSON's path.

    kind: "base" (general questions, drills, text-only traffic vocabulary), "general",
    "traffic" (a share REHEARSAL of general images),
    "eval_general", "eval_traffic" (single-turn rows with "type" and "truth",
    and folder/<split>_truth.json with the
    whole truth of each image). turns: questions per image, 0 for the kind's default. Same arguments, same
    decoded pixels and JSON. Raises UserError for an unknown split, domain or kind.
    """
    if kind not in KINDS:
        raise UserError(f"synthcity kind {kind!r}: expected one of {', '.join(KINDS)}")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    limit = turns or QUESTIONS.get(kind, 6)
    balancer, rows, truths = Balancer(), [], {}
    for sample in samples(split, seed, num, domain, kind):
        s = Stream(city_seed(split, seed, 0), 8, int(sample.id.rsplit("-", 1)[1]))
        Image.fromarray(sample.image).save(folder / "images" / f"{sample.id}.png", compress_level=1)
        if kind.startswith("eval"):
            rows += evaluation_rows(sample, s, kind, balancer, limit)
            truths[sample.id] = sample.truth.as_json()
        else:
            rows += training_rows(sample, s, kind, balancer, limit)
    if truths:
        rows = balanced(rows)
        _write_json(folder / f"{split}_truth.json", truths)
    _write_json(folder / f"{split}.json", rows)
    return folder / f"{split}.json"


def _write_json(path: Path, data) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# split -> (images, domain, kind) of the embedded sample
EMBEDDED = {
    "stage1": (320, "B", "general"),
    "stage2": (1280, "AB", "traffic"),
    "eval_stage1": (120, "B", "eval_general"),
    "eval_stage2": (120, "AB", "eval_traffic"),
}


def cache_root() -> Path:
    """$MMRSTRAJ_CACHE, else mmrstraj_jax below $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("MMRSTRAJ_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmrstraj_jax"


def ensure_sample(cache_dir: str | os.PathLike | None = None) -> dict[str, Path]:
    """Renders the embedded sample on first use (about a minute) and returns {split: JSON path}.

    The folder appears under its final name only when complete, so an interrupted or concurrent first use
    does no harm.
    """
    root = Path(cache_dir) if cache_dir else cache_root()
    folder = root / f"synthcity-{VERSION}"
    stamp = {"version": VERSION, "splits": {k: list(v) for k, v in EMBEDDED.items()}}
    paths = {split: folder / f"{split}.json" for split in EMBEDDED}
    if _stamped(folder, stamp):
        return paths
    work = root / f".synthcity-{uuid.uuid4().hex}"
    work.mkdir(parents=True)  # as open to others as the cache is, which tempfile's folders are not
    try:
        for split, (num, domain, kind) in EMBEDDED.items():
            write_sample(work, split, num, 0, domain, kind)
        _write_json(work / "stamp.json", stamp)
        if folder.exists() and not _stamped(folder, stamp):
            shutil.rmtree(folder)
        try:
            work.rename(folder)
        except OSError:
            # Another process was first; its sample is the same one.
            if not _stamped(folder, stamp):
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return paths


def _stamped(folder: Path, stamp: dict) -> bool:
    path = folder / "stamp.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == stamp
