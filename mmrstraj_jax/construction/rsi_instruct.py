"""Step `rsi-instruct`: Algorithm 1 of the paper, captions to conversations with a grounded second turn."""

import functools
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mmrstraj_jax.construction import dataset, prompts
from mmrstraj_jax.construction.calls import Conversation
from mmrstraj_jax.construction.dataset import Look, ModelSettings, Sample, by_model, seeded
from mmrstraj_jax.construction.manifest import Step
from mmrstraj_jax.construction.ranges import check
from mmrstraj_jax.construction.request import Text
from mmrstraj_jax.data import records
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import readers


@dataclass(frozen=True)
class Instruct(ModelSettings):
    """Settings of the step."""

    captions: str = ""  # RSICap's captions.json (or its folder), or rows in the LLaVA-OneVision form
    images: str = ""  # folder of the images, where it is not beside the captions
    second: float = 0.7
    limit: int = 0  # of samples; 0: all
    min_words: int = 8  # a first answer of fewer words is no caption

    def __post_init__(self):
        super().__post_init__()
        check(self, 0, 1, "second")
        check(self, 0, math.inf, "limit", "min_words")


class Captioned(NamedTuple):
    """An image and its caption."""

    id: str
    image: Path
    caption: str


def run(folder: Path, config: Instruct, look: Look = Look()) -> None:  # noqa: B008 - frozen
    """Writes rsi_instruct.json and its companions (dataset.py).

    Raises UserError: bad settings or captions, or whatever ends a run of calls (llm.Client.run).
    """
    ratios = prompts.Ratios(instruct_second=config.second)
    if not config.captions:
        raise UserError("--captions: expected RSICap's captions.json, or rows in the LLaVA-OneVision form")
    dropped: Counter = Counter()
    samples = list(_captions(config, dropped))
    samples = samples[: config.limit] if config.limit else samples
    if not samples:
        raise UserError(f"{config.captions}: no usable caption; dropped: {dict(dropped)}")
    starts = [functools.partial(_converse, sample, ratios, config) for sample in samples]
    if look:
        dataset.look_first(folder, "rsi_instruct", config, starts, look)
        return
    with Step(folder, "rsi-instruct", config, {"captions": Path(config.captions)}) as step:
        if not step.done:
            dataset.build(step, "rsi_instruct", config, starts, dropped)


def _captions(config: Instruct, dropped: Counter) -> Iterator[Captioned]:
    """Captions in the file's order; short, repeated and unsafe ones are counted."""
    path = Path(config.captions)
    file = path / "captions.json" if path.is_dir() else path
    images = Path(config.images) if config.images else None
    seen, ids = set(), set()
    for sample in _rsicap(file, images) if _is_rsicap(file) else _rows(file, images, dropped):
        reason = (
            "image used before"
            if sample.image in seen
            else "id used before"  # provenance, verdicts and the answers' log know a sample by its id
            if sample.id in ids
            else "too short for a caption"
            if len(sample.caption.split()) < config.min_words
            else "control words in the caption"
            if Text(max_chars=100_000).problem(sample.caption)
            else ""
        )
        if reason:
            dropped[reason] += 1
            continue
        seen.add(sample.image)
        ids.add(sample.id)
        yield sample


def _is_rsicap(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") and isinstance(
                json.loads(file.read_bytes()).get("annotations"), list
            )
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; expected captions") from None
    except ValueError:
        return False  # JSON Lines: rows


def _rsicap(file: Path, images: Path | None) -> Iterator[Captioned]:
    items = readers.rsicap(file, images)
    readers.require_images(items)
    for item in items:
        yield Captioned(item.id, item.images[0], item.references[0])


def _rows(file: Path, images: Path | None, dropped: Counter) -> Iterator[Captioned]:
    found = records.load(str(file), images)
    for problem in found.problems:
        if problem.dropped:
            dropped["bad row"] += 1
            if dropped["bad row"] <= 20:  # as many as training shows
                print(f"left out: {problem}", file=sys.stderr)
    for row in found.rows:
        if len(row.images) != 1 or row.blobs:
            dropped["not one image in a file"] += 1
        else:
            yield Captioned(row.id, row.image_paths()[0], row.conversations[1]["value"].strip())


def _converse(source: Captioned, ratios: prompts.Ratios, config: Instruct) -> Conversation:
    draw = prompts.draw_instruct(config.seed, source.id, ratios)
    made = {"by": "caption", "question": "prompt set"}
    sample = Sample(source.id, source.image, "train", [(draw.first, source.caption)], [made], {})
    if draw.second:
        outcome = yield (request := seeded(prompts.instruct_second(source.caption, draw.second), config))
        if outcome.values is None:
            sample.problems.append({"id": source.id, "stage": "second turn", "problem": outcome.problem})
        else:
            sample.turns.append((outcome.values["question"], outcome.values["answer"]))
            sample.made.append(by_model(request.version, config.model, outcome.key, attribute=draw.second))
    return sample
