"""One self-contained HTML page (and Markdown) for several models.

Our rows stand beside the paper's (published.py) with a denominator in every cell that is ours.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrstraj_jax.evaluation import published
from mmrstraj_jax.evaluation.compare import Result, compare, forgetting
from mmrstraj_jax.evaluation.grids import Grid, captions_grids, percent, questions_grid
from mmrstraj_jax.evaluation.tasks import TASKS

PANELS = 6  # images shown with what every model said about them
_MARKS = {"correct": "✓", "wrong": "✗", "undecided": "?"}
_PUBLISHED_METRIC = {"meteor": "meteor15", "cider": "cider_d"}  # the paper's column -> our nearest metric


def beside_paper(results: Sequence[Result], task: str) -> Grid | None:
    """Our rows under the paper's, in its columns; None for a task that is in none of its tables."""
    table = published.TABLES.get(task)
    if table is None:
        return None
    rows = [
        [f"{name} (paper)", *("-" if v is None else f"{v:.2f}" for v in row)]
        for name, row in table.rows.items()
    ]
    for result in results:
        if "questions" in result.scores:
            by_type = {row["type"]: row for row in result.scores["questions"]["types"]}
            cells = [by_type.get(column) for column in table.columns]
            rows.append(
                [
                    result.name,
                    *(f"{percent(c['accuracy'], 2)} ({_denominator(c)})" if c else "-" for c in cells),
                ]
            )
        else:
            for source, name in ((None, result.name), ("constant", "constant caption")):
                part = result.scores["captions"].get("caption")
                if part is None:  # descriptions alone, of which the paper's table says nothing
                    rows.append([f"{name} (n 0)", *("-" for _ in table.columns)])
                    continue
                metrics = (part["baselines"][source] if source else part)["metrics"]
                cells = [metrics.get(_PUBLISHED_METRIC.get(column, column)) for column in table.columns]
                rows.append([f"{name} (n {part['n']})", *(percent(v, 2) for v in cells)])
    notes = [
        "Ours: METEOR is 1.5, CIDEr is CIDEr-D, x 100. The paper states neither versions nor denominators.",
        *table.notes,
    ]
    return Grid(f"Table {table.number} of the paper: {table.title}", ["method", *table.columns], rows, notes)


def _denominator(row: dict[str, Any]) -> str:
    """What the accuracy is of: the decided answers, and of how many."""
    decided = row["n"] - row["undecided"]
    return f"n {row['n']}" if decided == row["n"] else f"n {decided} of {row['n']}"


def plot(results: Sequence[Result]) -> bytes | None:
    """PNG: accuracy per type with intervals for every model, and the blind baseline; None without
    questions."""
    results = [r for r in results if "questions" in r.scores]
    if not results:
        return None
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    types = [row["type"] for row in results[0].scores["questions"]["types"]]
    figure = Figure(figsize=(max(6.0, 0.9 * len(types)), 3.6), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(results)
    for number, result in enumerate(results):
        rows = {row["type"]: row for row in result.scores["questions"]["types"]}
        found = [rows[t] for t in types if t in rows]
        x = np.array([types.index(r["type"]) for r in found]) + (number - (len(results) - 1) / 2) * width
        y = np.array([100 * (r["accuracy"] or 0.0) for r in found])
        low, high = (np.array([100 * r[k] for r in found]) for k in ("low", "high"))
        errors = [np.maximum(y - low, 0), np.maximum(high - y, 0)]
        axes.bar(x, y, width, yerr=errors, capsize=2, label=result.name)
    blind = [100 * row["blind"] for row in results[0].scores["questions"]["types"]]
    axes.hlines(
        blind, np.arange(len(types)) - 0.45, np.arange(len(types)) + 0.45, "k", label="blind baseline"
    )
    labels = [f"{row['type']}\nn {row['n']}" for row in results[0].scores["questions"]["types"]]
    axes.set_xticks(range(len(types)), labels, rotation=30, fontsize=8)
    axes.set_ylabel("accuracy of decided answers, %")
    axes.set_ylim(0, 100)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def panels(results: Sequence[Result]) -> str:
    """HTML: some images, and what each model answered, with verdict marks."""
    first = results[0].predictions
    by_image: dict[str, list[str]] = {}
    for name, row in first.items():
        image = row.get("image")
        image = image[0] if isinstance(image, list) and image else image
        by_image.setdefault(image if isinstance(image, str) else "", []).append(name)
    parts = []
    images = [path for path in by_image if path and Path(path).is_file()]
    for path in images[:: max(1, len(images) // PANELS)][:PANELS]:
        lines = []
        for name in by_image[path]:
            row = first[name]
            said = []
            for result in results:
                answer = result.predictions.get(name, {}).get("prediction", "(no answer)")
                mark = _MARKS.get(result.items.get(name, {}).get("verdict", ""), "")
                said.append(f"<li>{mark} <b>{html.escape(result.name)}</b>: {html.escape(answer)}</li>")
            reference = " / ".join(map(str, row.get("references") or []))
            asked = f"<i>{html.escape(row.get('question') or row.get('type') or '')}</i>"
            lines.append(
                f"<p>{asked} <small>reference: {html.escape(reference)}</small></p><ul>{''.join(said)}</ul>"
            )
        parts.append(
            f"<div class=panel><img src='{_thumbnail(Path(path))}' alt=''><div>{''.join(lines)}</div></div>"
        )
    return "".join(parts)


def _thumbnail(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((256, 256))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


_STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse }
td, th { padding: .2em .7em; border-bottom: 1px solid #ccc; text-align: right }
td:first-child, th:first-child { text-align: left }
.plot { max-width: 100% }
.panel { display: flex; gap: 1em; margin: 1em 0; border-top: 1px solid #ccc; padding-top: 1em }
.panel img { width: 224px; height: auto; align-self: flex-start }
li { font-size: 14px }
"""


def write(results: Sequence[Result], out: Path) -> Path:
    """Writes out/report.html (everything inside it), out/report.md and a PNG per task; returns the page."""
    out.mkdir(parents=True, exist_ok=True)
    page, text = ["<h1>Evaluation</h1>"], ["# Evaluation", ""]
    for task in dict.fromkeys(r.scores["task"] for r in results):
        mine = [r for r in results if r.scores["task"] == task]
        page.append(f"<h2>{html.escape(TASKS[task].title)}</h2>")
        text += [f"## {TASKS[task].title}", ""]
        grids = [g for r in mine if "captions" in r.scores for g in captions_grids(r.scores, r.name)]
        grids += [questions_grid(r.scores, r.name) for r in mine if "questions" in r.scores]
        grids += [g for g in (beside_paper(mine, task),) if g]
        grids += [compare(mine[0], r) for r in mine[1:] if r.items.keys() == mine[0].items.keys()]
        for before, after in zip(mine, mine[1:], strict=False):
            if before.items.keys() == after.items.keys() and "questions" in after.scores:
                grids.append(forgetting(before, after))
        for grid in grids:
            page.append(grid.html())
            text += [grid.markdown(), ""]
        if image := plot(mine):
            (out / f"{task}.png").write_bytes(image)
            page.append(
                "<img class=plot alt='accuracy per type' "
                f"src='data:image/png;base64,{base64.b64encode(image).decode()}'>"
            )
            text += [f"![accuracy per type]({task}.png)", ""]
        page.append(panels(mine))
        for r in mine:
            protocol = json.dumps(r.scores.get("protocol", {}), ensure_ascii=False)
            page.append(f"<p><small>Protocol of {html.escape(r.name)}: {html.escape(protocol)}</small></p>")
            text += [f"Protocol of {r.name}: `{protocol}`", ""]
    head = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title><style>{_STYLE}</style>"
    )
    (out / "report.md").write_text("\n".join(text), encoding="utf-8")
    (out / "report.html").write_text(head + "".join(page) + "</html>\n", encoding="utf-8")
    return out / "report.html"
