"""Step `review`: people judge what a model wrote, and the built set holds what they accept (section 3.2.3).

Verdicts are supported, plausible inference, unsupported, wrong; the paper's tolerance of reasonable inference
keeps the first two. An edit replaces an answer, so it keeps the turn whatever the verdict on the old text. A
verdict belongs to the text it was given on. Verdicts are appended to review/SET/verdicts.jsonl; of a
reviewer's verdicts on one answer the last counts.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from mmrstraj_jax import jsonl
from mmrstraj_jax.construction import label_studio, manifest
from mmrstraj_jax.construction.files import dump, lines_writer, read_lines, write_atomic
from mmrstraj_jax.construction.label_studio import VERDICTS
from mmrstraj_jax.construction.manifest import Step, finished
from mmrstraj_jax.construction.request import Text
from mmrstraj_jax.errors import UserError

KEPT = VERDICTS[:2]
_ROW = {"item", "text", "reviewer", "verdict", "edit"}


@dataclass(frozen=True)
class Review:
    """Settings: what to review, and which of the three things to do. Without any: show where it stands."""

    dataset: str = "rsi-traffic"  # or rsi-instruct
    tasks: str = ""  # write this file of Label Studio tasks, with the labelling set-up (.xml) beside it
    image_prefix: str = "/data/local-files/?d="  # Label Studio's address of the data set's folder
    verdicts: str = ""  # take in this file: Label Studio's JSON, or JSON Lines of our own rows
    accepted: str = ""  # build the accepted set in the folder of this name beside the data set
    reviewers: int = 1  # people who must have judged a turn
    keep_unreviewed: bool = False


def run(out: Path, config: Review) -> None:
    """Exports, imports, or builds the accepted set, in this order; prints where the review stands.

    Raises UserError: bad settings, an unfinished data set, or verdicts of another form or on unknown items.
    """
    if config.dataset not in ("rsi-traffic", "rsi-instruct") or config.reviewers < 1:
        raise UserError(
            f"--dataset {config.dataset}: expected rsi-traffic or rsi-instruct; --reviewers: 1 or more"
        )
    source = out / config.dataset
    finished(source, config.dataset)
    rows, made = load(source)
    items = {item["item"]: item for item in _items(rows, made)}
    log = out / "review" / config.dataset / "verdicts.jsonl"
    if config.verdicts:
        _take_in(Path(config.verdicts), log, items)
    verdicts = _verdicts(log, items)
    if config.tasks:
        path = Path(config.tasks)
        write_atomic(path, dump(label_studio.tasks(items.values(), verdicts, config.image_prefix)))
        write_atomic(path.with_suffix(".xml"), label_studio.CONFIG.encode())
    if config.accepted:
        _accept(out / config.accepted, source, log, config)
    print(summary(items, verdicts, config.reviewers))


def load(folder: Path) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """({file name: rows}, {id: provenance}) of a data set. Raises UserError: two rows of one id."""
    # not by the folder: tasks for Label Studio may lie there too, beside the images that they show
    outputs = manifest.load(folder / manifest.NAME)["outputs"]
    files = sorted(name for name in outputs if name.endswith(".json") and "/" not in name)
    rows = {name: _rows(folder / name) for name in files}
    for id, count in Counter(row["id"] for file in rows.values() for row in file).most_common(1):
        if count > 1:
            raise UserError(f"{folder}: {count} rows have the id {id!r}; expected one: build the set again")
    return rows, {row["id"]: row for row in read_lines(folder / "provenance.jsonl")}


def _rows(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise UserError(f"{path}: missing or damaged; restore it, or build the set again") from None


def _items(rows: Mapping[str, list[dict]], made: Mapping[str, dict]):
    """What has to be judged: every answer that a model wrote."""
    for row in (row for file in rows.values() for row in file):
        for number, turn in enumerate(made[row["id"]]["turns"]):
            if turn["by"].startswith("model:"):
                question, answer = (row["conversations"][2 * number + i]["value"] for i in (0, 1))
                item = {"item": f"{row['id']}#{number}", "text": _mark(answer), "image": row["image"]}
                yield item | {"question": question.removeprefix("<image>\n"), "answer": answer}


def _mark(answer: str) -> str:
    return hashlib.sha256(answer.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# ---- verdicts ----


def _take_in(path: Path, log: Path, items: Mapping[str, dict]) -> None:
    """Appends the verdicts of a file that are new; all of them are checked first."""
    found = list(jsonl.read(path, log=False) if path.suffix == ".jsonl" else label_studio.read(path))
    new: dict[tuple[str, str], dict] = {}
    for number, row in enumerate(found, 1):
        _check(row, f"{path}: verdict {number}")
        item = items.get(row["item"])
        if item is None or item["text"] != row["text"]:
            name = row["item"]
            raise UserError(
                f"{path}: verdict {number}: {name!r} is not in this data set, or its text changed"
            )
        new[row["item"], row["reviewer"]] = row  # of several the last one counts, as in the log
    with jsonl.writer(log) as file:
        last = {(row["item"], row["reviewer"]): row for row in jsonl.read(log)}
        for who, row in new.items():
            if last.get(who) != row:
                jsonl.append(file, row)


def _check(row: Mapping[str, Any], where: str) -> None:
    if row.keys() != _ROW or not all(isinstance(value, str) for value in row.values()):
        raise UserError(f"{where}: expected texts {', '.join(sorted(_ROW))}")
    problem = Text(6000).problem(row["edit"]) if row["edit"] else ""
    if row["verdict"] not in VERDICTS or not row["reviewer"] or problem:
        raise UserError(
            f"{where}: verdict {row['verdict']!r}, reviewer {row['reviewer']!r}, edit {problem or 'good'}; "
            f"expected a verdict of {', '.join(VERDICTS)}, a reviewer and plain text"
        )


def _verdicts(log: Path, items: Mapping[str, dict]) -> dict[str, list[dict[str, str]]]:
    """{item: the last verdict of each reviewer on its present text}, reviewers sorted."""
    last: dict[tuple[str, str], dict] = {}
    for number, row in enumerate(jsonl.read(log) if log.exists() else (), 1):
        _check(row, f"{log}: line {number}")
        if row["item"] in items and items[row["item"]]["text"] == row["text"]:
            last[row["item"], row["reviewer"]] = row
    found = defaultdict(list)
    for (item, _), row in sorted(last.items()):
        found[item].append(row)
    return found


class Decision(NamedTuple):
    """What becomes of a turn: accepted, dropped, disputed or unreviewed; and the text that replaces it."""

    state: str
    edit: str = ""


def decide(verdicts: Sequence[Mapping[str, str]], reviewers: int = 1) -> Decision:
    """By strict majority; a tie, or two different edits, is disputed and waits for another verdict."""
    if len(verdicts) < reviewers or not verdicts:
        return Decision("unreviewed")
    keep = [row for row in verdicts if row["verdict"] in KEPT or row["edit"]]
    if 2 * len(keep) <= len(verdicts):
        return Decision("disputed" if 2 * len(keep) == len(verdicts) else "dropped")
    edits = {row["edit"] for row in keep if row["edit"]}
    return Decision("disputed") if len(edits) > 1 else Decision("accepted", next(iter(edits), ""))


def kappa(pairs: Sequence[tuple[str, str]]) -> tuple[float, float | None]:
    """(observed agreement, Cohen's kappa) of two reviewers' labels; kappa is None where it is undefined
    (both gave one and the same label throughout). Cohen 1960."""
    total = len(pairs)
    observed = sum(a == b for a, b in pairs) / total
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(first[label] * second[label] for label in first) / total**2
    return observed, None if chance == 1 else (observed - chance) / (1 - chance)


def agreement(verdicts: Mapping[str, Sequence[Mapping[str, str]]]) -> list[dict[str, Any]]:
    """Of every two reviewers with common items: over the four verdicts, and over keeping or not."""
    shared: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for rows in verdicts.values():
        for a, b in combinations(rows, 2):
            shared[a["reviewer"], b["reviewer"]].append((a["verdict"], b["verdict"]))
    table = []
    for (a, b), pairs in sorted(shared.items()):
        observed, value = kappa(pairs)
        kept, kept_value = kappa([(str(x in KEPT), str(y in KEPT)) for x, y in pairs])
        row = {"reviewers": [a, b], "items": len(pairs), "agreement": observed, "kappa": value}
        table.append(row | {"agreement_kept": kept, "kappa_kept": kept_value})
    return table


def summary(items: Mapping[str, dict], verdicts: Mapping[str, list], reviewers: int) -> str:
    """Where a review stands, as text."""
    states = Counter(decide(verdicts.get(item, ()), reviewers).state for item in items)
    lines = [
        f"{len(items)} answers: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    ]
    given = Counter(row["verdict"] for rows in verdicts.values() for row in rows)
    if given:
        lines.append("verdicts: " + ", ".join(f"{given[verdict]} {verdict}" for verdict in VERDICTS))
    for row in agreement(verdicts):
        shown = "undefined" if row["kappa"] is None else f"{row['kappa']:.3f}"
        lines.append(
            f"{row['reviewers'][0]} and {row['reviewers'][1]}: {row['items']} answers in common, agreement "
            f"{row['agreement']:.3f}, Cohen's kappa {shown}"
        )
    return "\n".join(lines)


# ---- the accepted set ----


def _accept(folder: Path, source: Path, log: Path, config: Review) -> None:
    if not log.exists() and not config.keep_unreviewed:
        raise UserError(f"{log}: no verdicts yet; take some in with --verdicts, or say --keep-unreviewed")
    inputs = {"dataset": source / "manifest.json"} | ({"verdicts": log} if log.exists() else {})
    policy = _Policy(config.dataset, config.reviewers, config.keep_unreviewed)
    with Step(folder, "review", policy, inputs, "--accepted") as step:
        if step.done:
            return
        rows, made = load(source)
        verdicts = _verdicts(log, {item["item"]: item for item in _items(rows, made)})
        outputs, kept, states = [], [], Counter()
        for file, given in rows.items():
            accepted = [row for row in (_judged(row, made, verdicts, policy, states) for row in given) if row]
            for row in accepted:
                image = source / row["image"]
                for path in (image, image.with_suffix(".json")):
                    if path.is_file():
                        outputs.append(folder / path.relative_to(source))
                        write_atomic(outputs[-1], path.read_bytes())
            kept += [row["id"] for row in accepted]
            if accepted:  # a split of which nothing is left has no file, as in a set that was built
                write_atomic(folder / file, dump(accepted))
                outputs.append(folder / file)
        with lines_writer(folder / "provenance.jsonl") as write:
            for id in kept:
                write(made[id])
        outputs.append(folder / "provenance.jsonl")
        people = Counter(
            name for id in kept for turn in made[id]["turns"] for name in turn.get("reviewed_by", ())
        )
        written = sum(
            all(turn.get("edited_by") or turn["by"] == "caption" for turn in made[id]["turns"]) for id in kept
        )
        counts = {"rows": len(kept), "rows_written_by_people": written, "turns": dict(sorted(states.items()))}
        counts |= {"turns_reviewed_by": dict(sorted(people.items())), "agreement": agreement(verdicts)}
        step.finish(counts, outputs)


@dataclass(frozen=True)
class _Policy:
    dataset: str = "rsi-traffic"
    reviewers: int = 1
    keep_unreviewed: bool = False


def _judged(row: dict, made: dict[str, dict], verdicts, policy: _Policy, states: Counter) -> dict | None:
    """The row up to its first turn that is not accepted, or None; notes in `made` who judged and edited."""
    turns = []
    for number, turn in enumerate(made[row["id"]]["turns"]):
        given = verdicts.get(f"{row['id']}#{number}", [])
        state, edit = decide(given, policy.reviewers)
        if not turn["by"].startswith("model:"):
            state = "by people"
        states[state] += 1
        if state not in ("accepted", "by people") and not (state == "unreviewed" and policy.keep_unreviewed):
            break
        turn |= {"reviewed_by": [v["reviewer"] for v in given], "verdicts": [v["verdict"] for v in given]}
        if edit:
            turn["edited_by"] = [v["reviewer"] for v in given if v["edit"] == edit]
            row["conversations"][2 * number + 1]["value"] = edit
        turns.append(turn)
    made[row["id"]]["turns"] = turns
    return row | {"conversations": row["conversations"][: 2 * len(turns)]} if turns else None
