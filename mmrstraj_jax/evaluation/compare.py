"""Two models on the same items: what one gained on the other, and what it forgot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmrstraj_jax import jsonl
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import predict, stats
from mmrstraj_jax.evaluation.grids import Grid, percent
from mmrstraj_jax.evaluation.score import unit
from mmrstraj_jax.evaluation.tasks import TASKS, TEXTS


class Result(NamedTuple):
    """One folder that `evaluate` wrote."""

    name: str
    scores: dict[str, Any]
    items: dict[str, dict[str, Any]]
    predictions: dict[str, dict[str, Any]]


def read_result(folder: Path, name: str | None = None) -> Result:
    """Raises UserError: the folder lacks scores.json or items.jsonl."""
    try:
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'scores.json'}: {error}; expected a folder that evaluate wrote") from None
    if not isinstance(scores, dict) or scores.get("task") not in TASKS:
        raise UserError(
            f"{folder / 'scores.json'}: names no task of ours; expected a folder that evaluate wrote"
        )
    path, items = folder / "items.jsonl", {}
    for number, row in enumerate(jsonl.read(path, log=False), 1):
        texts = all(isinstance(row.get(key), str) for key in ("id", "type"))
        if not texts or not ("verdict" in row or isinstance(row.get("rouge_l"), float)):
            raise UserError(
                f"{path}: line {number}: expected id, type and verdict or rouge_l; run evaluate again"
            )
        items[row["id"]] = row
    path = folder / "predictions.jsonl"
    found = {name: row for name, row in items.items() if isinstance(row.get("prediction"), str)}
    if not found and path.is_file():  # items.jsonl of an older version
        found = predict.load(path)
    return Result(name or str(folder), scores, items, found)


def _same_items(a: Result, b: Result) -> None:
    if a.scores["task"] != b.scores["task"] or a.items.keys() != b.items.keys():
        raise UserError(f"{a.name} and {b.name} are not scores of the same items")


def paired(a: Result, b: Result, ids: Sequence[str]) -> stats.Comparison:
    """B minus A on these items: accuracy of questions (undecided as wrong), ROUGE_L of texts."""
    return stats.paired_bootstrap(*(np.array([unit(r.items[i]) for i in ids]) for r in (a, b)))


def compare(a: Result, b: Result) -> Grid:
    """B minus A on the same items: accuracy for questions (undecided as wrong), ROUGE_L for texts."""
    _same_items(a, b)
    groups: dict[str, list[str]] = {}
    for name, row in a.items.items():
        groups.setdefault(row["type"], []).append(name)
    questions = [i for i, row in a.items.items() if "verdict" in row]
    if questions:
        groups["all questions (micro)"] = questions
    rows = []
    for kind, ids in groups.items():
        c = paired(a, b, ids)
        rows.append([
            f"{kind} ({'ROUGE_L' if kind in TEXTS else 'accuracy'})", str(c.n),
            percent(c.mean_a), percent(c.mean_b),
            f"{100 * c.difference:+.1f}", f"{100 * c.low:+.1f} to {100 * c.high:+.1f}", f"{c.p:.4f}",
        ])  # fmt: skip
    notes = [
        f"A = {a.name}, B = {b.name}. 95 % interval and p from 10,000 paired bootstrap draws of the items.",
        "Undecided answers count as wrong. With many types some p below 0.05 are expected by chance.",
    ]
    return Grid(
        f"{TASKS[a.scores['task']].title}: B minus A", ["", "n", "A", "B", "B - A", "95 %", "p"], rows, notes
    )


def forgetting(before: Result, after: Result) -> Grid:
    """What a later stage lost and gained of an earlier one's right answers, the largest loss first.

    Raises UserError: scores of different items, or without questions.
    """
    _same_items(before, after)
    groups: dict[str, list[str]] = {}
    for name, row in before.items.items():
        if "verdict" in row:
            groups.setdefault(row["type"], []).append(name)
    if not groups:
        raise UserError(f"forgetting: {before.name} holds no questions")
    rows = []
    for kind, ids in [*groups.items(), ("all questions (micro)", sum(groups.values(), []))]:
        old, new = (np.array([unit(r.items[i]) for i in ids]) for r in (before, after))
        c = stats.paired_bootstrap(old, new)
        lost, gained = int(((old == 1) & (new == 0)).sum()), int(((old == 0) & (new == 1)).sum())
        kept = percent(1 - lost / old.sum()) if old.sum() else "-"
        interval = f"{100 * c.low:+.1f} to {100 * c.high:+.1f}"
        rows.append((c.difference, [kind, str(c.n), percent(c.mean_a), percent(c.mean_b), str(lost),
                                    str(gained), kept, f"{100 * c.difference:+.1f}", interval]))  # fmt: skip
    rows[:-1] = sorted(rows[:-1], key=lambda row: row[0])
    notes = [
        "lost: right before and not after; gained: the other way round; kept: share of the answers that were "
        "right before and still are. 95 % interval from 10,000 paired bootstrap draws of the items."
    ]
    columns = ["type", "n", "before", "after", "lost", "gained", "kept, %", "difference", "95 %"]
    title = f"{TASKS[before.scores['task']].title}: what {after.name} forgot of {before.name}"
    return Grid(title, columns, [row for _, row in rows], notes)
