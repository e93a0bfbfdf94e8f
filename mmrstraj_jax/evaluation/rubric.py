"""Traffic descriptions graded by theme, and preferred in pairs (paper sections 4.1 and 5.4).

Five criteria: the paper's four themes and unsupported claims. A judge must quote, word for word, what it
grades in the description, and is tried first on descriptions whose grade is known; people fill in the same
criteria in a sheet that does not tell whose description it is.
"""

import csv
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import stats
from mmrstraj_jax.evaluation.compare import Result
from mmrstraj_jax.evaluation.grids import Grid, percent
from mmrstraj_jax.evaluation.judge import UNPARSED, Judge
from mmrstraj_jax.evaluation.tasks import TEXTS
from mmrstraj_jax.evaluation.traffic import THEMES

THEME_GRADES = ("right", "partly right", "wrong", "not mentioned")
CLAIM_GRADES = ("none", "some", "many")
CRITERIA = {theme: THEME_GRADES for theme in dict.fromkeys(THEMES.values())} | {
    "unsupported claims": CLAIM_GRADES
}
CONTROLS = 6  # references that a judge is tried on; an irrelevant sentence for each beside them
_IRRELEVANT = "A cup of tea stands on a wooden table."


def _texts(result: Result) -> list[dict[str, Any]]:
    rows = [row for row in result.predictions.values() if row.get("type") in TEXTS]
    if not rows:
        raise UserError(f"{result.name}: holds no descriptions to grade")
    if bare := next((row["id"] for row in rows if not row.get("references")), None):
        raise UserError(
            f"{result.name}: {bare} has no references in predictions.jsonl, expected what is true"
        )
    return rows


def _truth(row: Mapping[str, Any]) -> str:
    return " / ".join(row["references"])


def grade(results: Sequence[Result], judge: Judge) -> tuple[Grid, list[dict[str, Any]]]:
    """Every description of every model, graded by the judge; (table, one row per description).

    Raises UserError: no descriptions.
    """
    rows = [(result.name, row) for result in results for row in _texts(result)]
    truths = list(dict.fromkeys(_truth(row) for _, row in rows))[:CONTROLS]
    themes = [name for name in CRITERIA if name != "unsupported claims"]
    known = []  # what says nothing about roads mentions no theme; the truth itself claims nothing beyond it
    for at, truth in enumerate(truths):
        known.append((themes[at % len(themes)], truth, _IRRELEVANT, "not mentioned"))
        known.append(("unsupported claims", truth, truth, "none"))
    agreed, asked = judge.check_grades(known, CRITERIA)
    graded = []
    for name, row in rows:
        found = {}
        for criterion, grades in CRITERIA.items():
            reply = judge.grade(criterion, grades, _truth(row), row["prediction"])
            found[criterion] = {"grade": reply.value, "evidence": reply.why}
        graded.append({"id": row["id"], "model": name, "grades": found})
    note = f"Judge {judge.model}: right on {agreed} of {asked} controls"
    note += "." if judge.trusted else "; not believed: all its grades are unparsed."
    if judge.failures:
        note += f" {sum(judge.failures.values())} controls were unparsed: {judge.commonest_failure}."
    flat = [(r["model"], {c: g["grade"] for c, g in r["grades"].items()}) for r in graded]
    return _grid(flat, [note]), graded


def _grid(graded: Sequence[tuple[str, Mapping[str, str]]], notes: list[str]) -> Grid:
    """Counts by model and criterion, and the share of descriptions with the best grade."""
    rows = []
    for criterion, grades in CRITERIA.items():
        for model in dict.fromkeys(name for name, _ in graded):
            count = Counter(found[criterion] for name, found in graded if name == model)
            n = sum(count[g] for g in grades)
            low, high = stats.wilson(count[grades[0]], n)
            rows.append([
                criterion, model, ", ".join(f"{g} {count[g]}" for g in grades), str(count[UNPARSED]),
                percent(count[grades[0]] / n if n else None), f"{percent(low)} to {percent(high)}",
            ])  # fmt: skip
    columns = ["criterion", "model", "grades", "unparsed", "best grade, %", "95 %"]
    return Grid("Traffic descriptions by rubric", columns, rows, notes)


# ---- people ----


def write_sheet(results: Sequence[Result], path: Path, seed: int = 0) -> Path:
    """A CSV to fill in, descriptions in random order without names; the key lies beside it, as .key.json."""
    entries = [(result.name, row) for result in results for row in _texts(result)]
    random.Random(seed).shuffle(entries)
    key, path = {}, Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        sheet = csv.writer(file)
        sheet.writerow(["entry", "image", "truth", "description", *CRITERIA])
        for number, (name, row) in enumerate(entries, 1):
            key[str(number)] = {"model": name, "id": row["id"]}
            sheet.writerow([number, row.get("image"), _truth(row), row["prediction"], *[""] * len(CRITERIA)])
    path.with_suffix(".key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    return path


def read_sheet(path: Path) -> Grid:
    """The table of a filled-in sheet. Raises UserError: a missing key, or a cell that is no grade."""
    path = Path(path)
    try:
        key = json.loads(path.with_suffix(".key.json").read_text(encoding="utf-8"))
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; expected the sheet and its .key.json beside it") from None
    graded = []
    for row in rows:
        found = {}
        for criterion, grades in CRITERIA.items():
            cell = (row.get(criterion) or "").strip().lower()
            if cell and cell not in grades:
                raise UserError(
                    f"{path}: entry {row.get('entry')}, {criterion}: {cell!r}, "
                    f"expected one of {', '.join(grades)}"
                )
            found[criterion] = cell or UNPARSED
        if row.get("entry") not in key:
            raise UserError(f"{path}: entry {row.get('entry')!r} is not in its key")
        graded.append((key[row["entry"]]["model"], found))
    return _grid(sorted(graded, key=lambda pair: pair[0]), ["Graded by people; an empty cell is unparsed."])


# ---- pairs ----


def prefer(a: Result, b: Result, judge: Judge) -> tuple[Grid, list[dict[str, Any]]]:
    """Which of two descriptions of the same image is better, asked in both orders; (table, one row an item).

    Raises UserError: the two do not describe the same items.
    """
    first, second = ({row["id"]: row for row in _texts(result)} for result in (a, b))
    if first.keys() != second.keys():
        raise UserError(f"prefer: {a.name} and {b.name} do not describe the same items")
    found = []
    for name, row in first.items():
        one, two = row["prediction"], second[name]["prediction"]
        asked = row.get("question") or "Describe this image."
        reply = judge.prefer(asked, _truth(row), one, two)
        found.append({"id": name, "preferred": reply.value, "why": reply.why})
    count = Counter(row["preferred"] for row in found)
    decided = count["first"] + count["second"]
    low, high = stats.wilson(count["first"], decided)
    counts = [str(count[k]) for k in ("first", "second", "tie", UNPARSED)]
    share = percent(count["first"] / decided if decided else None)
    row = [str(len(found)), *counts, share, f"{percent(low)} to {percent(high)}"]
    columns = ["n", a.name, b.name, "tie", "unparsed", f"{a.name} preferred, % of decided", "95 %"]
    note = f"Judge {judge.model}, both orders asked; a preference that turns with the order is unparsed."
    return Grid("Preferred descriptions", columns, [row], [note]), found
