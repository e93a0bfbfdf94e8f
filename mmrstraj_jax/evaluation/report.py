"""Tables of scores for the terminal, and one self-contained HTML page (and Markdown) for several models.

Our rows stand beside the paper's (published.py) with a denominator in every cell that is ours.
"""

import argparse
import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from mmrstraj_jax import jsonl
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import predict, published, stats
from mmrstraj_jax.evaluation.score import unit
from mmrstraj_jax.evaluation.tasks import TASKS, TEXTS

PANELS = 6  # images shown with what every model said about them
_MARKS = {"correct": "✓", "wrong": "✗", "undecided": "?"}
_PUBLISHED_METRIC = {"meteor": "meteor15", "cider": "cider_d"}  # the paper's column -> our nearest metric


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a number out of 100; a dash where there is none."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


class Grid(NamedTuple):
    """A table of text: a heading, column names, rows, and what must be known to read it."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]

    def text(self) -> str:
        """Aligned columns for a terminal."""
        lines = [self.columns, *self.rows]
        widths = [max(len(row[i]) for row in lines) for i in range(len(self.columns))]
        out = [self.title]
        for row in lines:
            out.append(
                "  ".join(
                    c.ljust(w) if i == 0 else c.rjust(w)
                    for i, (c, w) in enumerate(zip(row, widths, strict=True))
                )
            )
        return "\n".join([*out, *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"

        rule = "|" + "|".join(["---"] + ["---:"] * (len(self.columns) - 1)) + "|"
        return "\n".join(
            [
                f"### {self.title}",
                "",
                line(self.columns),
                rule,
                *map(line, self.rows),
                "",
                *(f"- {n}" for n in self.notes),
            ]
        )

    def html(self) -> str:
        def cells(tag: str, row: Sequence[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"

        body = "".join(cells("td", row) for row in self.rows)
        notes = "".join(f"<li>{html.escape(n)}</li>" for n in self.notes)
        table = f"<table>{cells('th', self.columns)}{body}</table>"
        return f"<h3>{html.escape(self.title)}</h3>{table}<ul>{notes}</ul>"


# ---- tables of one result ----


def questions_grid(scores: dict[str, Any], name: str = "") -> Grid:
    """Accuracy of decided answers with its interval, and beside it everything that qualifies it."""
    part = scores["questions"]
    rows = []
    for row in [*part["types"], part["micro"], *([part["non_numeric"]] if "non_numeric" in part else [])]:
        interval = f"{percent(row['low'])} to {percent(row['high'])}"
        rows.append([
            row["type"], str(row["n"]), percent(row["accuracy"]), interval, str(row["undecided"]),
            percent(row["floor"]), percent(row["majority"]), percent(row["blind"]),
        ])  # fmt: skip
    rows.append(
        [f"mean of {part['macro_types']} types (macro)", "", percent(part["macro"]), "", "", "", "", ""]
    )
    notes = [
        f"Scored by {part['scorer']}. Accuracy is correct / (correct + wrong) with its 95 % Wilson interval; "
        "undecided answers are in neither, and count as wrong in the column floor.",
        "Baselines without the image, over all n: majority is the type's commonest answer, blind the "
        "commonest "
        "other answer to the same question.",
    ]
    if "judge" in part:
        judge = part["judge"]
        control = judge["controls"]
        notes.append(
            f"Judge {judge['model']}: agrees with the rules on {control['agreed_with_rules']} of "
            f"{control['asked']} "
            "control answers "
            f"({'believed' if control['believed'] else 'not believed: all its replies are unparsed'}); "
            f"asked about {judge['asked']}: {judge['replies']}."
        )
    title = f"{TASKS[scores['task']].title}: accuracy" + (f", {name}" if name else "")
    columns = ["type", "n", "accuracy", "95 %", "undecided", "floor", "majority", "blind"]
    return Grid(title, columns, rows, notes)


def captions_grids(scores: dict[str, Any], name: str = "the model") -> list[Grid]:
    """One table for each kind of text: the model, and the captions that see nothing."""
    grids = []
    for kind, part in scores["captions"].items():
        metrics = list(part["metrics"])
        rows = [[name, str(part["n"]), *(percent(part["metrics"][m]) for m in metrics)]]
        for baseline, entry in part["baselines"].items():
            rows.append(
                [f"{baseline} caption", str(part["n"]), *(percent(entry["metrics"].get(m)) for m in metrics)]
            )
        low, mean, high = part["references_per_item"]
        notes = [
            f"x 100, CIDEr-D too. References an item: {low} to {high}, mean {mean:.2f}. Mean length "
            f"{part['mean_length']:.1f} "
            f"words, references {part['mean_reference_length']:.1f}. Tokens: {part['tokenizer']}; document "
            f"frequencies: {part['document_frequencies']}.",
            *(f"{b} caption: from {e['from']}." for b, e in part["baselines"].items()),
            *part["notes"],
        ]
        grids.append(Grid(f"{TASKS[scores['task']].title}: {kind}", ["", "n", *metrics], rows, notes))
        if "traffic" in part:
            grids.append(_traffic_grid(part["traffic"]))
    return grids


def _traffic_grid(themes: dict[str, Any]) -> Grid:
    columns = ["theme", "facts known", "right", "contradicted", "missing", "unsupported", "right, %", "95 %"]
    rows = [
        [name, *(str(row[k]) for k in ("known", "right", "contradicted", "missing", "unsupported")),
         percent(row["share_right"]), f"{percent(row['low'])} to {percent(row['high'])}"]
        for name, row in themes.items()
    ]  # fmt: skip
    notes = [
        "Facts of the reference that the description states; unsupported: claimed and not in the reference."
    ]
    return Grid("Traffic semantics of the descriptions", columns, rows, notes)


def plain_table(scores: dict[str, Any]) -> str:
    """What the command prints."""
    grids = captions_grids(scores) if "captions" in scores else []
    grids += [questions_grid(scores)] if "questions" in scores else []
    return "\n\n".join(grid.text() for grid in grids)


# ---- several results ----


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
    items = {row["id"]: row for row in jsonl.read(folder / "items.jsonl")}
    path = folder / "predictions.jsonl"
    return Result(name or str(folder), scores, items, predict.load(path) if path.is_file() else {})


def compare(a: Result, b: Result) -> Grid:
    """B minus A on the same items: accuracy for questions (undecided as wrong), ROUGE_L for texts."""
    if a.scores["task"] != b.scores["task"] or a.items.keys() != b.items.keys():
        raise UserError(f"compare: {a.name} and {b.name} are not scores of the same items")
    groups: dict[str, list[str]] = {}
    for name, row in a.items.items():
        groups.setdefault(row["type"], []).append(name)
    questions = [i for i, row in a.items.items() if "verdict" in row]
    if questions:
        groups["all questions (micro)"] = questions
    rows = []
    for kind, ids in groups.items():
        values = (np.array([unit(r.items[i]) for i in ids]) for r in (a, b))
        c = stats.paired_bootstrap(*values)
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
                [result.name, *(f"{percent(c['accuracy'], 2)} (n {c['n']})" if c else "-" for c in cells)]
            )
        else:
            for source, name in ((None, result.name), ("constant", "constant caption")):
                part = result.scores["captions"]["caption"]
                metrics = (part["baselines"][source] if source else part)["metrics"]
                cells = [metrics.get(_PUBLISHED_METRIC.get(column, column)) for column in table.columns]
                rows.append([f"{name} (n {part['n']})", *(percent(v, 2) for v in cells)])
    notes = [
        "Ours: METEOR is 1.5, CIDEr is CIDEr-D, x 100. The paper states neither versions nor denominators.",
        *table.notes,
    ]
    return Grid(f"Table {table.number} of the paper: {table.title}", ["method", *table.columns], rows, notes)


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
        by_image.setdefault(image if isinstance(image, str) else str((image or [""])[0]), []).append(name)
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
            reference = " / ".join(row.get("references", []))
            asked = f"<i>{html.escape(row.get('question') or row['type'])}</i>"
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


# ---- subcommands ----


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def compare_command(args: list[str]) -> int:
    """evaluate compare A B."""
    parser = _Parser(prog="python -m mmrstraj_jax.evaluate compare", description=compare.__doc__)
    parser.add_argument("a", metavar="DIR_A", type=Path)
    parser.add_argument("b", metavar="DIR_B", type=Path)
    options = parser.parse_args(args)
    print(compare(read_result(options.a), read_result(options.b)).text())
    return 0


def report_command(args: list[str]) -> int:
    """evaluate report DIR ... --out DIR; NAME=DIR gives a result another name."""
    parser = _Parser(prog="python -m mmrstraj_jax.evaluate report", description=write.__doc__)
    parser.add_argument("results", metavar="[NAME=]DIR", nargs="+", help="folders that evaluate wrote")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    options = parser.parse_args(args)
    named = [text.partition("=")[::2] if "=" in text else (None, text) for text in options.results]
    results = [read_result(Path(folder), name) for name, folder in named]
    print(write(results, options.out))
    return 0
