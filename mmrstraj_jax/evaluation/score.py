"""From predictions to scores.json: captions by metric, answers by rule (and judge), baselines beside both."""

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import captions, readers, stats, traffic, vqa
from mmrstraj_jax.evaluation.judge import Judge
from mmrstraj_jax.evaluation.readers import Item
from mmrstraj_jax.evaluation.tasks import TEXTS, Task

CONTROLS = 24  # decided answers that a judge is tried on, half of them correct


def score(
    task: Task,
    items: Sequence[Item],
    predictions: Mapping[str, str],
    *,
    train: Sequence[Item] = (),
    judge: Judge | None = None,
    meteor: str | None = "meteor15",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(scores, one row per item: verdict and rule, or the caption's own metrics).

    train: items whose references the caption baselines are taken from; without them from the evaluated
    references themselves, and named so.
    """
    texts = [item for item in items if item.type in TEXTS]
    questions = [item for item in items if item.type not in TEXTS]
    scores: dict[str, Any] = {"task": task.name, "n": len(items)}
    rows: list[dict[str, Any]] = []
    if texts:
        said = predictions
        if task.structured:
            scores["semantics"] = traffic.semantics([predictions[item.id] for item in texts])
            said = {item.id: traffic.spoken(predictions[item.id]) for item in texts}
        scores["captions"], found = _captions(task, texts, said, train, meteor)
        rows += found
    if questions:
        scores["questions"], found = _questions(task, questions, predictions, judge)
        rows += found
    return scores, rows


# ---- captions ----


def _captions(task, items, predictions, train, meteor) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    groups = {kind: [i for i in items if i.type == kind] for kind in dict.fromkeys(i.type for i in items)}
    if task.name == "levir-cc":
        groups["changed"] = [i for i in items if i.meta.get("changed")]
        groups["unchanged"] = [i for i in items if i.meta.get("changed") is False]
    result, rows = {}, []
    for name, group in groups.items():
        if not group:
            continue
        references = {item.id: item.references for item in group}
        done = captions.score(references, {i: predictions[i] for i in references}, meteor=meteor)
        entry = {
            "n": done.n,
            "metrics": done.metrics,
            "references_per_item": done.references_per_item,
            "mean_length": done.mean_length,
            "mean_reference_length": done.mean_reference_length,
            "tokenizer": done.tokenizer,
            "document_frequencies": done.document_frequencies,
            "notes": done.notes,
            "baselines": _baselines(group, [i for i in train if i.type == name] or list(train), meteor),
        }
        if task.name == "levir-cc" and "meteor15" in done.metrics:
            parts = [done.metrics[m] for m in ("bleu4", "meteor15", "rouge_l", "cider_d")]
            entry["metrics"]["s_m"] = sum(parts) / 4  # S*m of RSICC, raw like the others
        if name == "description" or task.structured or task.name == "traffic-semantics":
            pairs = [(predictions[item.id], item.references[0]) for item in group]
            entry["traffic"] = traffic.table(pairs)
        result[name] = entry
        if name in TEXTS:
            for at, ident in enumerate(done.ids):
                rows.append({"id": ident, "type": name} | {m: v[at] for m, v in done.per_item.items()})
    return result, rows


def _baselines(items: Sequence[Item], train: Sequence[Item], meteor: str | None) -> dict[str, Any]:
    """One constant caption, and the nearest training image's caption where the images are there."""
    references = {item.id: item.references for item in items}
    pool = list(train) or list(items)
    source = "training captions" if train else "the evaluated references themselves (chosen in hindsight)"
    constant = captions.constant_caption([item.references for item in pool])
    done = captions.score(references, dict.fromkeys(references, constant), meteor=meteor)
    found = {"constant": {"caption": constant, "from": source, "metrics": done.metrics}}
    if train and all(p.is_file() for item in (*train, *items) for p in item.images):
        nearest = captions.nearest_captions([i.references for i in train], _features(train), _features(items))
        done = captions.score(references, dict(zip(references, nearest, strict=True)), meteor=meteor)
        features = "8 x 8 colour thumbnails"
        found["nearest"] = {"features": features, "from": "training captions", "metrics": done.metrics}
    return found


def _features(items: Sequence[Item]) -> np.ndarray:
    """[items, dim]: what a picture looks like from far away; no network involved."""
    from PIL import Image

    rows = []
    for item in items:
        thumbs = []
        for path in item.images:
            try:
                with Image.open(path) as image:
                    image.draft("RGB", (64, 64))
                    small = image.convert("RGB").resize((8, 8), Image.Resampling.BOX)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise UserError(
                    f"{path}: cannot be read as an image ({error}); restore it, or remove it: the "
                    "nearest-caption baseline is then left out"
                ) from None
            thumbs.append(np.asarray(small, np.float32))
        rows.append(np.concatenate(thumbs).ravel() - 127.5)
    return np.stack(rows)


# ---- questions ----


def _questions(task, items, predictions, judge) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    exact = task.scorer.startswith("rsvqa")
    same = {item.id: _same(task, item) for item in items}
    known = frozenset(map(vqa.plain, task.closed))

    def verdicts(answers: Mapping[str, str]) -> dict[str, vqa.Verdict]:
        if exact:
            return {item.id: _exact(task, item, same[item.id], answers[item.id]) for item in items}
        return {i.id: _by_rule(i, answers[i.id], known) for i in items}

    by_rule = verdicts(predictions)
    final = {name: verdict.value for name, verdict in by_rule.items()}
    rows = [
        {"id": i.id, "type": i.type, "verdict": final[i.id], "rule": by_rule[i.id].rule, "judge": None}
        for i in items
    ]
    result: dict[str, Any] = {"scorer": "exact match in Lobry's bins" if exact else "rules"}
    if judge is not None and not exact:
        result["judge"] = _ask_judge(judge, items, predictions, by_rule, final, rows)
        result["scorer"] = "rules" if "untried" in result["judge"] else "rules, then judge"
    majority, blind = (
        {name: v.value for name, v in verdicts(answers).items()}
        for answers in (stats.majority_answers(items, same), stats.blind_answers(items, same))
    )
    table = stats.table(items, final, majority, blind)
    result |= {
        "types": [dataclasses.asdict(row) for row in table.rows],
        "micro": dataclasses.asdict(table.micro),
        "macro": table.macro,
        "macro_types": table.macro_types,
        "rules": dict(Counter(f"{v.rule}: {v.value}" for v in by_rule.values()).most_common()),
    }
    if exact:
        result["unparsed"] = sum(v.rule == "unparsed" for v in by_rule.values())
        part = [i for i in items if not i.meta.get("numeric", i.type in ("count", "area"))]
        result["non_numeric"] = dataclasses.asdict(
            stats.row("non-numeric (micro)", [final[i.id] for i in part], [majority[i.id] for i in part],
                      [blind[i.id] for i in part])
        )  # fmt: skip
        only = stats.table(part, final)  # big_vision's acc_avg_nonum, GeoChat's "Avg"
        result |= {"non_numeric_macro": only.macro, "non_numeric_types": only.macro_types}
    return result, rows


def _by_rule(item: Item, answer: str, known: frozenset[str]) -> vqa.Verdict:
    """Of several references the best one counts: correct by any, wrong by all, else undecided."""
    found = [vqa.judge(item.type, item.question or "", r, answer, known) for r in item.references]
    return min(found, key=lambda verdict: ("correct", "undecided", "wrong").index(verdict.value))


def _same(task: Task, item: Item) -> str:
    """What makes two references equal; in RSVQA the bin, which a predictions file need not hold.

    Raises UserError: a reference without a bin.
    """
    if not task.scorer.startswith("rsvqa"):
        return vqa.plain(item.references[0])
    found = readers.rsvqa_bin(item.references[0], item.type, task.scorer.removeprefix("rsvqa-"))
    if not found:
        raise UserError(
            f"{item.id}: reference {item.references[0]!r} of type {item.type!r}: expected a number or a bin "
            f"of {task.title}; correct the row"
        )
    return found


def _exact(task: Task, item: Item, reference: str, answer: str) -> vqa.Verdict:
    """Lobry's exact match: what cannot be read is no match, and stays in the denominator."""
    read = readers.rsvqa_bin(answer, item.type, task.scorer.removeprefix("rsvqa-"))
    if not read:  # empty, or no number where one is asked for
        return vqa.Verdict("wrong", "unparsed")
    return vqa.Verdict("correct" if read == reference else "wrong", "exact")


def _ask_judge(judge, items, predictions, by_rule, final, rows) -> dict[str, Any]:
    """Fills what the rules left open, in place; a decided verdict is never touched."""
    decided = {value: [i for i in items if by_rule[i.id].value == value] for value in ("correct", "wrong")}
    draw = random.Random(0)
    controls = []
    for value, group in decided.items():
        for item in draw.sample(group, min(CONTROLS // 2, len(group))):
            controls.append((item.question or "", _true(item), predictions[item.id], value))
    about = {"model": judge.model, "cache": str(Path(judge.cache).name)}
    if lacking := [value for value, group in decided.items() if not group]:
        why = f"the rules decided no {' and no '.join(lacking)} answer to try it on"
        return about | {"untried": why, "asked": 0, "replies": {}}
    agreed, asked = judge.check(controls)
    count: Counter = Counter()
    for item, row in zip(items, rows, strict=True):
        if final[item.id] != "undecided":
            continue
        reply = judge.verdict(item.question or "", _true(item), predictions[item.id])
        row["judge"] = reply.value
        count[reply.value] += 1
        if reply.value in ("correct", "wrong"):
            final[item.id] = row["verdict"] = reply.value
        else:
            row["judge_why"] = reply.why
    return about | {
        "controls": {"agreed_with_rules": agreed, "asked": asked, "believed": bool(judge.trusted)}
        | (
            {"unparsed": sum(judge.failures.values()), "why": why} if (why := judge.commonest_failure) else {}
        ),
        "asked": sum(count.values()),
        "replies": dict(count),
    }


def _true(item: Item) -> str:
    return " / ".join(item.references)


def unit(row: Mapping[str, Any]) -> float:
    """One item's score for a paired comparison: 1 or 0 for an answer (undecided 0), ROUGE_L for a text."""
    return float(row["verdict"] == "correct") if "verdict" in row else float(row["rouge_l"])
