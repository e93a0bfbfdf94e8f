"""The size of every row, known before training: views, tokens, supervised tokens.

Built from image headers and token counts, without decoding, and cached under a hash of everything it depends
on. It is what lets the schedule choose the bucket of every step in advance, and what finds bad rows before a
GPU is held.
"""

import hashlib
import json
import logging
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from mmrstraj_jax.config import AnyResConfig
from mmrstraj_jax.data import anyres, chat, images
from mmrstraj_jax.data.collate import Shape, Sizes, check_supervision, row_shape
from mmrstraj_jax.data.records import Problem, Records, Row, Source
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.errors import UserError

LAYOUT = 1  # raise when the template, the masks or the columns change
_COLUMNS = len(Shape._fields)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Index:
    """Rows that can be trained on, and their exact shapes in the same order."""

    rows: list[Row]
    shapes: Int[np.ndarray, "rows 5"]  # columns are Shape's fields
    problems: list[Problem]
    sources: list[Source]
    fingerprint: str  # of rows, tokenizer, template and policy; equal on all hosts of a run

    def shape(self, row: int) -> Shape:
        values = self.shapes[row].tolist()
        return Shape(*values[:4], bool(values[4]))

    def report(self) -> str:
        """Quantiles for the log: length and supervised tokens a row, views in all."""
        lengths, supervised = (np.percentile(self.shapes[:, at], (50, 95, 100)).astype(int) for at in (1, 2))
        return (
            f"{len(self.rows)} rows, {int(self.shapes[:, 0].sum())} views; tokens a row: "
            f"median {lengths[0]}, 95 % {lengths[1]}, longest {lengths[2]}; "
            f"supervised: median {supervised[0]}, longest {supervised[2]}"
        )


def build_index(
    records: Records,
    tokenizer: Tokenizer,
    policy: AnyResConfig,
    sizes: Sizes,
    *,
    mask: str = "original",
    image_policy: images.ImagePolicy = images.DEFAULT,
    on_bad: str = "quarantine",
    cache_dir: str | os.PathLike | None = None,
    threads: int = 8,
) -> Index:
    """Measures every row and drops (or, with on_bad="error", refuses) those that cannot be trained on.

    Raises UserError when no row is left.
    """
    key, content = _keys(records.rows, tokenizer, policy, mask, image_policy)
    cached = _read_cache(cache_dir, key, len(records.rows))
    if cached is None:
        with ThreadPoolExecutor(threads) as pool:
            measured = list(
                pool.map(lambda row: _measure(row, tokenizer, policy, mask, image_policy), records.rows)
            )
        shapes = np.asarray(
            [found if isinstance(found, Shape) else (0,) * _COLUMNS for found in measured], np.int32
        )
        shapes = shapes.reshape(-1, _COLUMNS)
        reasons = {at: found for at, found in enumerate(measured) if isinstance(found, str)}
        _write_cache(cache_dir, key, shapes, reasons)
    else:
        shapes, reasons = cached
    for at in range(len(records.rows)):
        if at not in reasons:
            try:
                sizes.round(Shape(*shapes[at].tolist()))
            except UserError as error:
                reasons[at] = str(error)
    if reasons and on_bad == "error":
        at = min(reasons)
        raise UserError(f"{records.rows[at].where}: {reasons[at]}")
    if len(reasons) == len(records.rows):
        raise UserError(
            f"no row can be used; {records.rows[0].where}: {reasons[0]}" if reasons else "no rows"
        )
    keep = np.asarray([at not in reasons for at in range(len(records.rows))])
    problems = [
        Problem(records.rows[at].source, records.rows[at].line, reasons[at]) for at in sorted(reasons)
    ]
    return Index(
        rows=[row for row, kept in zip(records.rows, keep, strict=True) if kept],
        shapes=shapes[keep],
        problems=records.problems + problems,
        sources=_kept_sources(records.sources, keep),
        fingerprint=hashlib.sha256(content.encode() + shapes[keep].tobytes()).hexdigest(),
    )


def _measure(
    row: Row, tokenizer: Tokenizer, policy: AnyResConfig, mask: str, image_policy: images.ImagePolicy
) -> Shape | str:
    """The row's shape, or why it has none."""
    try:
        found = [images.size(path, image_policy) for path in row.image_paths()]
        plans = anyres.plan_row(found, len(found) if row.kind == "video" else 0, policy)
        encoded = chat.encode_spans(row.conversations, tokenizer, row.kind)
        labels = chat.labels_of(encoded, tokenizer, mask)
        length = len(encoded.ids) + sum(plan.num_tokens - 1 for plan in plans)
        check_supervision(int(encoded.answer.sum()), length, None)
        return row_shape(plans, length, labels)
    except UserError as error:
        return str(error)


def _kept_sources(sources: Sequence[Source], keep: np.ndarray) -> list[Source]:
    kept, start = [], 0
    for source in sources:
        count = int(keep[source.start : source.start + source.count].sum())
        if not count:
            raise UserError(f"{source.path}: none of its rows can be used; see the problems reported for it")
        kept.append(replace(source, start=start, count=count))
        start += count
    return kept


def _keys(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    policy: AnyResConfig,
    mask: str,
    image_policy: images.ImagePolicy,
) -> tuple[str, str]:
    """(key of the cache on this machine, hash of the content that all hosts must share)."""
    content = hashlib.sha256(repr((LAYOUT, tokenizer.fingerprint, policy, mask, image_policy)).encode())
    files = hashlib.sha256()
    for row in rows:
        content.update(json.dumps([row.id, row.images, row.videos, row.conversations]).encode())
        for name in row.images + row.videos:
            try:
                status = os.stat(os.path.join(row.root, name))
                files.update(f"{row.root}/{name} {status.st_size} {status.st_mtime_ns}\n".encode())
            except OSError:  # _measure says what is wrong with it
                files.update(f"{name} missing\n".encode())
    return hashlib.sha256((content.hexdigest() + files.hexdigest()).encode()).hexdigest(), content.hexdigest()


def _read_cache(
    cache_dir: str | os.PathLike | None, key: str, rows: int
) -> tuple[np.ndarray, dict[int, str]] | None:
    if cache_dir is None or not (path := pathlib.Path(cache_dir) / f"index-{key[:32]}.npz").is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            shapes = data["shapes"]
            reasons = {int(at): text for at, text in json.loads(str(data["reasons"])).items()}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("index cache %s is damaged (%s); measuring again", path, error)
        return None
    return (shapes, reasons) if shapes.shape == (rows, _COLUMNS) else None


def _write_cache(
    cache_dir: str | os.PathLike | None, key: str, shapes: np.ndarray, reasons: dict[int, str]
) -> None:
    if cache_dir is None:
        return
    folder = pathlib.Path(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz", delete=False) as file:
            np.savez(file, shapes=shapes, reasons=np.asarray(json.dumps(reasons)))
        os.replace(file.name, folder / f"index-{key[:32]}.npz")
    except OSError as error:  # a cache is only a cache
        log.warning("index cache in %s cannot be written (%s)", folder, error)
