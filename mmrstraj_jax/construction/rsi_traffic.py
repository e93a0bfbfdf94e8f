"""Step `rsi-traffic`: Algorithm 2 of the paper, images to two-turn conversations about their traffic."""

import functools
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrstraj_jax import jsonl
from mmrstraj_jax.construction import dataset, prompts, selection, windows
from mmrstraj_jax.construction.calls import Conversation
from mmrstraj_jax.construction.dataset import Look, ModelSettings, Sample, by_model, seeded
from mmrstraj_jax.construction.files import read_lines
from mmrstraj_jax.construction.manifest import Step, finished
from mmrstraj_jax.construction.ranges import check
from mmrstraj_jax.construction.request import ImageFile
from mmrstraj_jax.errors import UserError


@dataclass(frozen=True)
class Traffic(ModelSettings):
    """Settings of the step."""

    basic: float = 0.8  # of Algorithm 2; the paper's text says 0.7
    style: float = 0.2
    second: float = 0.75
    gsd: bool = False  # the first question states the metres a pixel
    context: str = ""  # JSON Lines of {id, NAME: text, ...}: place or road names that the model is told

    def __post_init__(self):
        super().__post_init__()
        check(self, 0, 1, "basic", "style", "second")

    @property
    def ratios(self) -> prompts.Ratios:
        return prompts.Ratios(basic=self.basic, style=self.style, traffic_second=self.second)


def run(folder: Path, imagery: Path, quality: Path, config: Traffic, look: Look = Look()) -> None:  # noqa: B008
    """Writes rsi_traffic.json and its companions (dataset.py).

    Raises UserError: bad settings, unfinished steps, or whatever ends a run of calls (llm.Client.run).
    """
    ratios = config.ratios
    finished(imagery, "imagery")
    finished(quality, "quality", images=imagery / windows.INDEX)
    inputs = {"images": quality / selection.SCORES}
    inputs |= {"context": Path(config.context)} if config.context else {}
    context = _context(Path(config.context)) if config.context else {}
    if context and not any(row["id"] in context for row in read_lines(quality / selection.SCORES)):
        raise UserError(
            f"--context {config.context}: none of its ids is an image's; expected those of scores.jsonl"
        )
    starts = [
        functools.partial(_converse, row, imagery / "images" / row["image"], context, ratios, config)
        for row in selection.accepted(quality)
    ]
    if look:
        dataset.look_first(folder, "rsi_traffic", config, starts, look)
        return
    with Step(folder, "rsi-traffic", config, inputs) as step:
        if not step.done:
            dataset.build(step, "rsi_traffic", config, starts, Counter())


def _converse(
    row: dict[str, Any], path: Path, contexts: dict[str, dict], ratios: prompts.Ratios, config: Traffic
) -> Conversation:
    image, context = ImageFile.of(path), contexts.get(row["id"])
    draw = prompts.draw_traffic(config.seed, row["id"], ratios)
    question = draw.first
    if config.gsd:
        question += f" A pixel is {row['gsd_metres']:.2f} m wide."
    about = {name: row[name] for name in ("trip", "region", "zoom", "score")}
    sample = Sample(row["id"], path, row["split"], [], [], about, record=path.with_suffix(".json"))
    first = yield (request := seeded(prompts.traffic_first(question, image, context), config))
    if first.values is None:
        sample.problems.append({"id": row["id"], "stage": "description", "problem": first.problem})
        return sample
    description = first.values["answer"]
    sample.turns.append((question, description))
    sample.made.append(by_model(request.version, config.model, first.key, set=draw.set, style=draw.style))
    if not draw.second:
        return sample
    asked = yield (request := seeded(prompts.traffic_question(description, draw.second), config))
    if asked.values is None:
        sample.problems.append({"id": row["id"], "stage": "question", "problem": asked.problem})
        return sample
    second = asked.values["question"]
    answer = yield (request := seeded(prompts.traffic_answer(second, description, image, context), config))
    if answer.values is None:
        sample.problems.append({"id": row["id"], "stage": "answer", "problem": answer.problem})
        return sample
    sample.turns.append((second, answer.values["answer"]))
    sample.made.append(by_model(request.version, config.model, answer.key, set="T", task=draw.second))
    return sample


def _context(path: Path) -> dict[str, dict[str, str]]:
    """{image: {name: text}}; foreign text, which goes into prompts as data only."""
    found = {}
    for number, row in enumerate(jsonl.read(path, log=False), 1):
        id, values = row.pop("id", None), row
        named = all(re.fullmatch(r"[a-z_]{1,40}", name) for name in values)
        short = all(isinstance(text, str) for text in values.values()) and len(json.dumps(values)) <= 4000
        if not isinstance(id, str) or not named or not short:
            raise UserError(
                f"{path}: line {number}: expected an id, and texts named in small letters, 4000 characters"
            )
        found[id] = values
    return found
