"""Tables of scores: aligned text for a terminal, Markdown, HTML."""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

from mmrstraj_jax.evaluation.tasks import TASKS


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
    if "non_numeric_macro" in part:
        name_ = f"mean of {part['non_numeric_types']} non-numeric types (macro)"
        rows.append([name_, "", percent(part["non_numeric_macro"]), "", "", "", "", ""])
    notes = [
        f"Scored by {part['scorer']}. Accuracy is correct / (correct + wrong) with its 95 % Wilson interval; "
        "undecided answers are in neither, and count as wrong in the column floor.",
        "Baselines without the image, over all n: majority is the type's commonest answer, blind the "
        "commonest "
        "other answer to the same question.",
    ]
    if "unparsed" in part:
        notes.append(f"{part['unparsed']} answers could not be read and count as wrong.")
    if "judge" in part:
        judge = part["judge"]
        control = judge.get("controls")
        notes.append(
            f"Judge {judge['model']}: not tried and not asked, {judge['untried']}."
            if control is None
            else f"Judge {judge['model']}: agrees with the rules on {control['agreed_with_rules']} of "
            f"{control['asked']} "
            "control answers "
            f"({'believed' if control['believed'] else 'not believed: all its replies are unparsed'}); "
            f"asked about {judge['asked']}: {judge['replies']}."
            + (
                f" {control['unparsed']} controls were unparsed: {control['why']}."
                if "why" in control
                else ""
            )
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


def semantics_grid(part: dict[str, Any]) -> Grid:
    """How structured answers are built."""
    rows = [[kind, str(count)] for kind, count in part["units"].items()]
    total = sum(part["units"].values())
    notes = [
        f"{part['parsed']} of {part['n']} answers are the JSON array that was asked for; the others count as "
        f"silent. Of {total} units {part['with_place']} name a place, {part['with_evidence']} evidence."
    ]
    return Grid("Semantic units", ["kind", "units"], rows, notes)


def plain_table(scores: dict[str, Any]) -> str:
    """What the command prints."""
    grids = [semantics_grid(scores["semantics"])] if "semantics" in scores else []
    grids += captions_grids(scores) if "captions" in scores else []
    grids += [questions_grid(scores)] if "questions" in scores else []
    return "\n\n".join(grid.text() for grid in grids)
