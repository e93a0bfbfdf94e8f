"""Traffic semantics (paper sections 4.1 and 5.4) made measurable: what a description claims, and if it holds.

A description is read into facts of the paper's four themes. Against a reference whose facts are known
(SynthCity's descriptions are made from truth) every fact is right, contradicted or missing, and whatever the
description claims beyond the reference is counted as unsupported.
"""

import json
import math
import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mmrstraj_jax.evaluation import stats
from mmrstraj_jax.evaluation.readers import Item
from mmrstraj_jax.evaluation.rules import choices, numbers, places
from mmrstraj_jax.evaluation.rules.lexicon import GROUPS
from mmrstraj_jax.evaluation.rules.text import NEGATORS, answer_clauses, find

# fact -> the paper's theme
THEMES = {
    "class": "road structure", "lanes": "road structure", "direction": "road structure",
    "junction": "road structure", "junctions": "road structure", "busiest": "bottlenecks",
    "level": "flow density", "vehicles": "flow density", "zone": "functional zoning",
}  # fmt: skip
STRUCTURED = (
    "List what this image says about traffic as semantic units. Reply with a JSON array and nothing else; "
    'each element is {"kind": one of "road structure", "bottlenecks", "flow density", "functional zoning", '
    '"text": the finding, "place": where in the image, "evidence": what can be seen that supports it}.'
)
_CLASSES = ("motorway", "arterial", "collector", "local")
_LEVELS = ("light", "moderate", "heavy")
_JUNCTIONS = ("crossroad", "t junction", "roundabout", "dead end", "overpass")
_ZONES = ("residential", "apartment", "commercial", "industrial", "park", "farmland", "harbor", "airport")


class Unit(NamedTuple):
    """One semantic unit s_i of S = {s_i} (paper section 4.1)."""

    kind: str
    text: str
    place: str
    evidence: str


def select(items: Sequence[Item], num: int, seed: int = 0) -> list[Item]:
    """Items whose image shows roads or traffic by their words, drawn with a seed, in the set's order."""
    word = re.compile(
        r"\b(roads?|streets?|highways?|motorways?|intersections?|traffic|vehicles?|cars?|bridges?)\b"
    )
    fit = [n for n, item in enumerate(items) if any(word.search(text.lower()) for text in item.references)]
    return [items[n] for n in sorted(random.Random(seed).sample(fit, min(num, len(fit))))]


def units(text: str) -> list[Unit] | None:
    """The units of an answer to STRUCTURED; None unless it is exactly the array that was asked for."""
    body = text.strip()
    if body.startswith("```") and body.endswith("```"):
        body = body[3:-3].removeprefix("json").strip()
    try:
        rows = json.loads(body)
    except (ValueError, RecursionError):  # "[[[[..." of a model that goes round in circles
        return None
    if not isinstance(rows, list):
        return None
    kinds, found = set(THEMES.values()), []
    for row in rows:
        if not isinstance(row, dict) or set(row) != set(Unit._fields):
            return None
        if not all(isinstance(value, str) for value in row.values()) or row["kind"] not in kinds:
            return None
        found.append(Unit(**row))
    return found


def spoken(text: str) -> str:
    """What the units of a structured answer say; nothing where the answer is not the array asked for."""
    return " ".join(f"{unit.text.rstrip('.')} ({unit.place})." for unit in units(text) or ())


def semantics(answers: Sequence[str]) -> dict[str, Any]:
    """How structured answers are built: parsed of n, units by kind, and how many name place and evidence."""
    found = [units(answer) for answer in answers]
    flat = [unit for part in found if part for unit in part]
    return {
        "n": len(found),
        "parsed": sum(part is not None for part in found),
        "units": {kind: sum(unit.kind == kind for unit in flat) for kind in dict.fromkeys(THEMES.values())},
        "with_place": sum(bool(unit.place.strip()) for unit in flat),
        "with_evidence": sum(bool(unit.evidence.strip()) for unit in flat),
    }


def _group(word: str) -> int:
    return next(n for n, group in enumerate(GROUPS) if tuple(word.split()) in group)


def facts(text: str) -> dict[str, Any]:
    """What a description claims, by the names of THEMES; nothing where it claims nothing or both."""
    found: dict[str, set] = {}

    def add(name: str, value: Any) -> None:
        found.setdefault(name, set()).add(value)

    names = {
        _group(word): (kind, word)
        for kind, words in (("class", _CLASSES), ("junction", _JUNCTIONS), ("zone", _ZONES))
        for word in words
    }
    for words in answer_clauses(text):
        said = set(words)
        for group, denied in choices.concepts([words]):
            kind, word = names.get(group, (None, None))
            # a park beside the road is no zone that it serves
            if (
                kind
                and not denied
                and (kind != "zone" or said & {"zone", "area", "district", "serve", "serves"})
            ):
                add(kind, word)
        for name, subjects in (
            ("lanes", ("lane",)),
            ("junctions", ("junction",)),
            ("vehicles", ("car", "vehicle")),
        ):
            for subject in subjects:
                if (
                    find(words, (subject,))
                    and "t" not in said
                    and (amount := numbers.read([words], [subject]))
                ):
                    if amount.exact and math.isfinite(amount.low):  # not 400 digits
                        add(name, int(amount.low))
        if said & {"traffic", "flow", "density", "congestion"} and not said & NEGATORS:
            for level in _LEVELS:
                if level in said:
                    add("level", level)
        if said & {"busiest"} and (cells := places.read_cells([words], [])):
            add("busiest", frozenset(cells))
        elif axes := places.read_axes(" ".join(words)):
            add("direction", frozenset(axes))
    return {name: values.pop() for name, values in found.items() if len(values) == 1}


def check(prediction: str, reference: str) -> dict[str, str]:
    """fact -> "right", "contradicted", "missing" or "unsupported" (claimed, and not in the reference)."""
    claimed, known = facts(prediction), facts(reference)
    result = {}
    for name in THEMES:
        if name in known:
            same = name in claimed and _same(name, claimed[name], known[name])
            result[name] = "right" if same else "contradicted" if name in claimed else "missing"
        elif name in claimed:
            result[name] = "unsupported"
    return result


def _same(name: str, claimed: Any, known: Any) -> bool:
    if name == "direction":
        return places.judge_axes(set(known), set(claimed)) == "correct"
    return claimed == known


def table(pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """(prediction, reference) pairs -> counts per theme, with right / known and its Wilson interval."""
    count = {
        theme: dict.fromkeys(("right", "contradicted", "missing", "unsupported"), 0)
        for theme in THEMES.values()
    }
    for prediction, reference in pairs:
        for name, value in check(prediction, reference).items():
            count[THEMES[name]][value] += 1
    result: dict[str, dict[str, Any]] = {}
    for theme, values in count.items():
        known = values["right"] + values["contradicted"] + values["missing"]
        low, high = stats.wilson(values["right"], known)
        share = values["right"] / known if known else None
        result[theme] = {"known": known, **values, "share_right": share, "low": low, "high": high}
    return result
