"""Figures 2 and 3 and Table 1 of the paper as PNG, JSON and one HTML page without outside references.

    python -m mmrstraj_jax.build statistics NAME=FILE ... --out DIR

    --tokenizer DIR        a token is an id of that model's tokenizer; else a word, number or punctuation mark
    --descriptions FILE    JSON, region to text: the last column of Table 1

Several data sets are measured one by one and together, as the paper does with its two.
"""

import base64
import html
import io
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mmrstraj_jax.construction.files import dump, write_atomic
from mmrstraj_jax.construction.statistics import (
    PAPER,
    Dialogue,
    Statistics,
    bandwidth,
    density,
    load,
    measure,
    regions,
    typical,
    words,
)
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.settings import take_option

TOGETHER = "together"
LABELS = {
    "images": "Images",
    "dialogues": "Dialogues or captions",
    "turns": "Turns",
    "tokens": "Tokens",
    "sentences": "Sentences",
    "sentences_per_utterance": "Sentences per utterance",
    "tokens_per_caption": "Tokens per caption",
    "sentences_per_caption": "Sentences per caption",
    "longest_caption_sentences": "Sentences of the longest caption",
    "turns_per_image": "Turns per image",
    "expert_rows": "Rows annotated by people",
    "expert_share": "Share annotated by people",
}
_THUMBNAIL = 384  # pixels
_PANEL_CHARACTERS = 900  # of a text in the PNG of Figure 2; the HTML holds all of it


def command(args: list[str]) -> None:
    """The subcommand. Raises UserError: bad words, unreadable data sets."""
    out, args = take_option(args, "--out")
    tokenizer, args = take_option(args, "--tokenizer")
    described, args = take_option(args, "--descriptions")
    if out is None or not args or any(word.startswith("--") for word in args):
        raise UserError(
            "statistics: expected NAME=FILE ... --out DIR [--tokenizer DIR] [--descriptions FILE], "
            f"found {' '.join(args) or 'no data set'}"
        )
    sets: dict[str, list[Dialogue]] = {}
    for word in args:
        name, sign, file = word.partition("=")
        if not (name and sign and file) or name in (*sets, TOGETHER):
            raise UserError(f"statistics {word}: expected NAME=FILE, each name once")
        sets[name] = load(Path(file))
    write(Path(out), sets, _counter(tokenizer), _descriptions(described))
    print(f"statistics: {Path(out) / 'statistics.html'}", file=sys.stderr)


def _counter(folder: str | None) -> Callable[[str], int]:
    if folder is None:
        return words
    from mmrstraj_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    return lambda text: len(tokenizer.encode(text))


def _descriptions(path: str | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--descriptions {path}: {error}; expected JSON {{region: text}}") from None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise UserError(f"--descriptions {path}: expected JSON {{region: text}}")
    return value


def write(
    folder: Path,
    sets: Mapping[str, Sequence[Dialogue]],
    tokens: Callable[[str], int] = words,
    descriptions: Mapping[str, str] | None = None,
) -> None:
    """Writes statistics.json, figure3.png, figure2.png and statistics.html."""
    measured = {name: measure(rows, tokens) for name, rows in sets.items()}
    everything = [row for rows in sets.values() for row in rows]
    if len(sets) > 1:
        measured[TOGETHER] = measure(everything, tokens)
    table = regions(everything, dict(descriptions or {}))
    shown = {name: typical(rows) for name, rows in sets.items()}
    token = "words, numbers and punctuation marks" if tokens is words else "ids of the tokenizer"
    report = {
        "token": token,
        "indicators": {name: found.indicators for name, found in measured.items()},
        "paper": PAPER,
        "captions": {
            name: {"tokens": _histogram(found.tokens), "sentences": _histogram(found.sentences)}
            for name, found in measured.items()
        },
        "regions": table,
        "panel": {name: {"id": row.id, "image": row.image} for name, row in shown.items()},
    }
    figure3, figure2 = plot(measured, token), panel(shown)
    page = _page(measured, table, shown, figure3, token)
    for name, body in {
        "statistics.json": dump(report),
        "figure3.png": figure3,
        "figure2.png": figure2,
        "statistics.html": page.encode(),
    }.items():
        write_atomic(folder / name, body)


def _histogram(values: Sequence[int]) -> dict[str, object]:
    value, count = np.unique(values, return_counts=True)
    return {
        "bandwidth": bandwidth(values),
        "counts": dict(zip(map(str, value.tolist()), count.tolist(), strict=True)),
    }


def _cells(measured: Mapping[str, Statistics]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of indicators, the paper's own last."""
    rows = [
        [
            label,
            *(_number(key, found.indicators[key]) for found in measured.values()),
            _number(key, PAPER.get(key)),
        ]
        for key, label in LABELS.items()
    ]
    return ["", *measured, "paper"], rows


def _number(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "expert_share":
        return f"{100 * value:.2f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


# ---- PNG ----


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def plot(measured: Mapping[str, Statistics], token: str) -> bytes:
    """Figure 3: (a) density of caption length, (b) of sentences per caption, (c) the indicators."""
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    header, rows = _cells(measured)
    figure = Figure(figsize=(12.5 + 0.9 * len(measured), 4.2), layout="constrained")
    grid = figure.add_gridspec(1, 3, width_ratios=[1, 1, 0.55 + 0.25 * len(measured)])
    for column, (kind, label) in enumerate(
        (("tokens", "tokens per caption"), ("sentences", "sentences per caption"))
    ):
        axes = figure.add_subplot(grid[column])
        for name, found in measured.items():
            values = getattr(found, kind)
            reach = 4 * bandwidth(values)
            at = np.linspace(min(values) - reach, max(values) + reach, 512)
            joint = name == TOGETHER
            curve = density(values, at)
            axes.plot(at, curve, color="black" if joint else None, lw=2 if joint else 1.4, label=name)
            if len(measured) == 1 or joint:
                step = max(1, round(bandwidth(values)))
                edges = np.arange(min(values) - 0.5, max(values) + 0.5 + step, step)
                axes.hist(values, edges, density=True, color="0.85", zorder=0)
        axes.set_xlim(left=0)
        axes.set(xlabel=label, ylabel="density", title=f"({'ab'[column]})")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    axes = figure.add_subplot(grid[2])
    axes.set_axis_off()
    axes.set_title("(c)")
    shown = axes.table(rows, colLabels=header, loc="center", cellLoc="right", edges="horizontal")
    shown.auto_set_font_size(False)
    shown.set_fontsize(7.5)
    shown.auto_set_column_width(list(range(len(header))))
    shown.scale(1, 1.35)
    for (_, at), cell in shown.get_celld().items():
        cell.set_text_props(ha="left" if at == 0 else "right")
    figure.supxlabel(f"A token: {token}. An utterance: a question or an answer.", fontsize=7)
    return _png(figure)


def panel(shown: Mapping[str, Dialogue]) -> bytes:
    """Figure 2: a dialogue of each data set under its image, side by side."""
    from matplotlib.figure import Figure

    texts = {
        name: "\n\n".join("\n".join(map(_wrapped, turn)) for turn in _said(row))
        for name, row in shown.items()
    }
    lines = max(text.count("\n") + 1 for text in texts.values())
    height = 3.2 + 0.165 * lines
    figure = Figure(figsize=(3.4 * len(shown), height))
    for column, (name, row) in enumerate(shown.items()):
        left, width = (column + 0.03) / len(shown), 0.94 / len(shown)
        axes = figure.add_axes((left, 1 - 3.0 / height, width, 2.7 / height))
        axes.set_axis_off()
        axes.set_title(name, fontsize=10, weight="bold")
        if Path(row.image).is_file():
            axes.imshow(_thumbnail(row.image))
        figure.text(left, 1 - 3.1 / height, texts[name], fontsize=7.5, va="top", family="monospace")
    return _png(figure)


def _said(row: Dialogue) -> list[list[str]]:
    """The texts of every turn."""
    if not row.questions:
        return [[answer] for answer in row.answers]
    return [[f"Q: {q}", f"A: {a}"] for q, a in zip(row.questions, row.answers, strict=True)]


def _wrapped(text: str) -> str:
    # a dollar sign would begin a formula
    text = textwrap.shorten(" ".join(text.split()), _PANEL_CHARACTERS, placeholder=" ...").replace("$", r"\$")
    return textwrap.fill(text, 52)


def _thumbnail(path: str) -> Image.Image:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return small


# ---- HTML ----

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
.panel { display: flex; gap: 1.5em; align-items: flex-start; overflow-x: auto }
.panel div { flex: 1; min-width: 220px }
img { max-width: 100% }
small { color: #666 }
"""


def _inline(body: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(body).decode()}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _page(
    measured: Mapping[str, Statistics],
    table: Sequence[dict],
    shown: Mapping[str, Dialogue],
    figure3: bytes,
    token: str,
) -> str:
    rows = [
        [
            row["region"],
            ", ".join(row["imagery"]) or "-",
            f"{row['images']:,}",
            ", ".join(f"{zoom}: {count:,}" for zoom, count in row["zooms"].items()) or "-",
            "-" if row["score"] is None else f"{row['score']:.2f}",
            row["description"],
        ]
        for row in table
    ]
    columns = []
    for name, row in shown.items():
        picture = ""
        if Path(row.image).is_file():
            buffer = io.BytesIO()
            _thumbnail(row.image).save(buffer, "PNG")
            picture = f"<img src='{_inline(buffer.getvalue())}' alt='{html.escape(row.id)}'>"
        turns = ("<br>".join(map(html.escape, turn)) for turn in _said(row))
        said = "".join(f"<p>{turn}</p>" for turn in turns)
        columns.append(f"<div><h3>{html.escape(name)}</h3>{picture}{said}</div>")
    header = ["Region", "Imagery", "Images", "By zoom", "Average score", "Description"]
    return f"""<!doctype html><html lang=en><meta charset=utf-8><title>Data set statistics</title>
<style>{_STYLE}</style>
<h1>Data set statistics</h1>
<h2>Lengths of captions</h2><img src='{_inline(figure3)}' alt='densities of caption length'>
<h2>Indicators</h2>{_table(*_cells(measured))}
<small>A token: {html.escape(token)}. An utterance: a question or an answer. A caption: the first answer of a
dialogue about an image. The paper's share of experts is of RSI-Traffic alone.</small>
<h2>Regions</h2>{_table(header, rows)}
<h2>Side by side</h2><div class=panel>{"".join(columns)}</div></html>
"""
