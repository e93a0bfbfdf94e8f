"""From items and a model to a folder of scores: what `evaluate` and its studies share.

The folder holds predictions.jsonl, items.jsonl and scores.json (docs/evaluation.md).
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from mmrstraj_jax import __version__, jsonl
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import predict, score
from mmrstraj_jax.evaluation.judge import Judge
from mmrstraj_jax.evaluation.readers import Item
from mmrstraj_jax.evaluation.tasks import Task
from mmrstraj_jax.inference.options import DecodeOptions


class Source(NamedTuple):
    """Who answers: one of run, weights and model (with base_url)."""

    run: str | None = None
    weights: str | None = None
    model: str | None = None
    base_url: str | None = None
    dtype: str | None = None
    batch_size: int = 8


class Answerer(NamedTuple):
    """A model made ready for one task."""

    ask: predict.Ask
    source: dict[str, Any]
    decode: dict[str, Any]


class Scoring(NamedTuple):
    """How predictions are scored."""

    meteor: str | None = "meteor15"
    judge: Judge | None = None
    train: Sequence[Item] = ()  # the caption baselines are taken from it


def answerer(source: Source, task: Task, decode: DecodeOptions) -> Answerer:
    """Loads the model, or addresses the server. Raises UserError: no such model."""
    if source.run is not None and not Path(source.run, "base.json").is_file():
        raise UserError(
            f"--run {source.run}: not a run directory of training; weights are named by --weights"
        )
    who = predict.source_of(source.run, source.weights, source.model, source.base_url)
    if source.model is not None:
        ask = predict.remote(source.model, source.base_url, task, decode, workers=source.batch_size)
    else:
        from mmrstraj_jax.api import load  # JAX takes seconds: typing errors must not wait for it

        model = load(source.run or source.weights, dtype=source.dtype, batch_size=source.batch_size)
        who["anyres"] = dataclasses.asdict(model.anyres)
        ask = predict.local(model, task, decode)
    return Answerer(ask, who, predict.settings(decode))


def evaluate(
    task: Task,
    items: Sequence[Item],
    out: Path,
    model: Answerer,
    scoring: Scoring,
    protocol: dict[str, Any],
    place: predict.Place = predict.ALONE,
) -> dict[str, Any] | None:
    """Answers every item (going on where out/predictions.jsonl ends), scores them; what scores.json holds.

    None in a process that is not the first: process 0 scores what all have answered.
    """
    path = out / "predictions.jsonl"
    if not predict.run(task, items, path, model.ask, model.decode, model.source, place):
        return None
    protocol = protocol | {"source": model.source, "prompt": task.ask, "decode": model.decode}
    return score_file(task, items, path, out, scoring, protocol, complete=True)


def score_file(
    task: Task,
    items: Sequence[Item],
    path: Path,
    out: Path,
    scoring: Scoring,
    protocol: dict[str, Any],
    *,
    complete: bool,
) -> dict[str, Any]:
    """Scores predictions.jsonl-like `path` into `out`.

    protocol: without prompt and decode, those are what the rows say, since nobody else knows.
    complete: predictions of other items are an error too. Raises UserError: an item without a prediction.
    """
    rows = predict.load(path)
    if complete:
        predict.check_complete(items, rows, path)
    elif missing := [item.id for item in items if item.id not in rows]:
        raise UserError(f"{path}: no prediction for {missing[0]}")
    answers = {item.id: predict.answer_of(rows[item.id]["prediction"]) for item in items}
    scores, per_item = score.score(
        task, items, answers, train=scoring.train, judge=scoring.judge, meteor=scoring.meteor
    )
    out.mkdir(parents=True, exist_ok=True)
    known = {item.id: item for item in items}
    per_item = [row | _told(known[row["id"]], rows[row["id"]]) for row in per_item]
    (out / "items.jsonl").write_text("".join(map(jsonl.dump, per_item)), encoding="utf-8")
    told = {key: _common([rows[item.id].get(key) for item in items], path) for key in ("prompt", "decode")}
    fixed = {"dataset": predict.fingerprint(items), "versions": versions()}
    scores = {"protocol": told | protocol | fixed} | scores
    temporary = out / "scores.json.tmp"
    temporary.write_text(json.dumps(scores, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(out / "scores.json")
    return scores


def _told(item: Item, row: dict[str, Any]) -> dict[str, Any]:
    """What stands beside a verdict: predictions of other tools hold no more than id and prediction."""
    said = {"prediction": row["prediction"], "references": list(item.references)}
    return {"question": item.question, "image": predict.image_of(item)} | said


def _common(values: Sequence[Any], path: Path) -> Any:
    """The value that all rows share."""
    kinds = {json.dumps(value, sort_keys=True) for value in values}
    return values[0] if len(kinds) == 1 else f"{len(kinds)} different ones, see {path.name}"


def versions() -> dict[str, str]:
    """What computed the numbers: the package, pycocoevalcap, and the very code of this folder."""
    here = Path(__file__).parent
    code = b"".join(path.read_bytes() for path in sorted(here.rglob("*.py")))
    return {
        "mmrstraj_jax": __version__,
        "pycocoevalcap": version("pycocoevalcap"),
        "evaluation_code": hashlib.sha256(code).hexdigest()[:12],
    }
