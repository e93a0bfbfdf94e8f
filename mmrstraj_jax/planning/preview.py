"""Samples as one HTML page: what the model sees of each image, and which tokens it learns from."""

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

from mmrstraj_jax.data import chat, collate
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.planning.dataset import Dataset

VIEW = 96  # pixels of a view on the page

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
h2 { font-size: 1rem; margin: 2.5rem 0 .5rem; border-top: 1px solid #ddd; padding-top: 1rem }
.facts { color: #555; font-size: .9rem }
.views { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1rem; margin: .6rem 0 }
.grid { display: grid; gap: 2px }
figure { margin: 0 } figcaption { font-size: .8rem; color: #555 }
img { display: block }
.text { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.text span { border-radius: 3px; padding: 1px 0; box-shadow: inset -1px 0 #fff }
.learn { background: #bfe6c4 } .template { background: #ffe3a3 }
.visual { background: #c9d8f8 } .ignored { color: #666 }
.key span { border-radius: 3px; padding: 1px 6px; margin-right: .6rem }
"""


def write(path: Path, found: Dataset, count: int) -> None:
    """Writes the page of `count` rows, spread over the data. Raises UserError: a row or the file."""
    loader = found.loader
    rows = np.unique(np.linspace(0, len(loader.index.rows) - 1, count).astype(int))
    body = "".join(_sample(found, int(row)) for row in rows)
    policy = loader.policy
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Training samples</title>"
        f"<style>{STYLE}</style><h1>Training samples</h1>"
        f"<p class='facts'>{len(loader.index.rows)} rows, {len(rows)} shown. AnyRes policy {policy.policy}"
        f"{f', tau {policy.tau:g}' if policy.max_num is None else ''}; views of {policy.view_size} pixels; "
        f"label mask {loader.mask}.</p><p class='key'><span class='learn'>answer, supervised</span>"
        "<span class='template'>template, supervised</span><span class='visual'>visual tokens</span>"
        f"<span class='ignored'>not supervised</span></p>{body}</html>"
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--preview {path}: {error.strerror}; name a file that can be written") from error


def _sample(found: Dataset, number: int) -> str:
    loader = found.loader
    row, shape = loader.index.rows[number], loader.index.shape(number)
    example = collate.example(
        row, loader.tokenizer, loader.policy, mask=loader.mask, image_policy=loader.image_policy
    )
    visual = sum(plan.num_tokens for plan in example.plans)
    facts = (
        f"{shape.length} tokens, {visual} of them visual; {shape.supervised} supervised; {shape.views} views"
    )
    images, at = "", 0
    for plan in example.plans:
        images += _image(plan, example.views[at : at + plan.num_views])
        at += plan.num_views
    return (
        f"<h2>{html.escape(row.id)}</h2><p class='facts'>{html.escape(row.where)}: {facts}</p>"
        f"<div class='views'>{images}</div><p class='text'>{_tokens(example, loader.tokenizer)}</p>"
    )


def _image(plan, views: np.ndarray) -> str:
    if plan.kind != "anyres":
        kept = f"{plan.reduced_side}x{plan.reduced_side} tokens a view"
        pictures = "".join(_figure(view, "") for view in views[:8])
        caption = f"<figcaption>{plan.kind}, {kept}</figcaption>"
        return f"<figure><div class='views'>{pictures}</div>{caption}</figure>"
    rows, columns = plan.grid
    base = _figure(views[0], f"base view, {plan.reduced_side}x{plan.reduced_side} tokens")
    crops = "".join(_picture(view) for view in views[1:])
    style = f"grid-template-columns:repeat({columns},{VIEW}px)"
    return (
        f"{base}<figure><div class='grid' style='{style}'>{crops}</div>"
        f"<figcaption>{plan.width}x{plan.height} px as {rows}x{columns} crops, "
        f"{plan.map_height}x{plan.map_width} tokens and a newline a row</figcaption></figure>"
    )


def _figure(view: np.ndarray, caption: str) -> str:
    return f"<figure>{_picture(view)}<figcaption>{caption}</figcaption></figure>"


def _picture(view: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(view).resize((VIEW, VIEW), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img width='{VIEW}' height='{VIEW}' alt='' src='data:image/jpeg;base64,{data}'>"


def _tokens(example: collate.Example, tokenizer: Tokenizer) -> str:
    """Every token as a coloured span, runs of visual tokens as one; bytes of one character stay together."""
    begins = dict(zip(example.starts, example.plans, strict=True))
    parts, at, length = [], 0, len(example.input_ids)
    kinds = np.where(example.labels == chat.IGNORE, "ignored", np.where(example.answer, "learn", "template"))
    while at < length:
        if at in begins:
            count = begins[at].num_tokens
            parts.append(f"<span class='visual'>{count} visual tokens</span>")
            at += count
            continue
        end = at + 1
        text = tokenizer.decode(example.input_ids[at:end].tolist(), skip_special=False)
        while "�" in text and end < length and kinds[end] == kinds[at] and end not in begins:
            end += 1
            text = tokenizer.decode(example.input_ids[at:end].tolist(), skip_special=False)
        parts.append(f"<span class='{kinds[at]}'>{html.escape(text)}</span>")
        at = end
    return "".join(parts)
