"""The size of every row, known before training: views, tokens, supervised tokens.

Built from image headers and token counts, without decoding, and cached under a hash of everything it depends
on. It is what lets the schedule choose the bucket of every step in advance, and what finds bad rows before a
GPU is held.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import tqdm
from jaxtyping import Int

from mmrstraj_jax.config import AnyResConfig
from mmrstraj_jax.data import anyres, cache, chat, images
from mmrstraj_jax.data.collate import Shape, Sizes, check_supervision, row_shape
from mmrstraj_jax.data.records import Problem, Records, Row, Rows, Source
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.errors import UserError

LAYOUT = 1  # raise when the template, the masks or the columns change
CHECKED = 4096  # rows, evenly spread, whose images are compared with those of the cache at every start
LOOKED_AT = 1 << 20  # bytes of each of these images that a resume compares, with its size
CHUNK = 512  # rows measured by one thread at a time
_COLUMNS = len(Shape._fields)


@dataclass(frozen=True)
class Index:
    """Rows that can be trained on, and their exact shapes in the same order."""

    rows: Sequence[Row]
    shapes: Int[np.ndarray, "rows 5"]  # columns are Shape's fields
    problems: list[Problem]
    sources: list[Source]
    fingerprint: str  # of rows, tokenizer, template and policy; equal on all hosts of a run
    pixels: str  # of the image files of the CHECKED rows

    def __reduce__(self):
        kept = (self.problems, self.sources, self.fingerprint, self.pixels)
        return _index_again, (self.rows, cache.handle(self.shapes), *kept)

    def shape(self, row: int) -> Shape:
        return Shape.of(self.shapes[row])

    def report(self) -> str:
        """Quantiles for the log: length and supervised tokens a row, views in all."""
        lengths, supervised = (np.percentile(self.shapes[:, at], (50, 95, 100)).astype(int) for at in (1, 2))
        return (
            f"{len(self.rows)} rows, {int(self.shapes[:, 0].sum())} views; tokens a row: "
            f"median {lengths[0]}, 95 % {lengths[1]}, longest {lengths[2]}; "
            f"supervised: median {supervised[0]}, longest {supervised[2]}"
        )


def _index_again(rows, shapes, *kept) -> Index:
    return Index(rows, cache.reopen(shapes), *kept)


class Reader(NamedTuple):
    """What turns a row into tokens and views."""

    tokenizer: Tokenizer
    policy: AnyResConfig
    mask: str
    image_policy: images.ImagePolicy

    def settings(self) -> str:
        return repr((LAYOUT, self.tokenizer.fingerprint, *self[1:]))


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
    verify: bool = False,
    threads: int = 8,
) -> Index:
    """Measures every row and drops (or, with on_bad="error", refuses) those that cannot be trained on.

    With `verify` every image is decoded: slow, but it finds what the loader would stop at (a flipped bit).
    Raises UserError when no row is left.
    """
    rows, reader = records.rows, Reader(tokenizer, policy, mask, image_policy)
    size_of = _decoded_size if verify else images.size
    name = f"{'verified' if verify else 'index'}-{_key(rows, reader)}"
    kept = cache.read(cache_dir, name)
    if kept is not None and not (
        "pixels" in kept[1] and _still_bad(rows, reader, size_of, kept[1]["reasons"])
    ):
        kept = None
    if kept is None:
        shapes, said = _measure_all(rows, reader, size_of, threads)
        said["pixels"] = _pixels(rows, threads)
        shapes = cache.write(cache_dir, name, shapes, said)
    else:
        shapes, said = kept
    reasons = {int(at): reason for at, reason in said["reasons"].items()} | _misfits(shapes, sizes)
    if reasons and on_bad == "error":
        at = min(reasons)
        raise UserError(f"{rows[at].where}: {reasons[at]}")
    if len(reasons) == len(rows):
        raise UserError(f"no row can be used; {rows[0].where}: {reasons[0]}" if reasons else "no rows")
    bad = sorted(reasons)
    problems, sources = records.problems, records.sources
    if bad:
        places = [rows[at] for at in bad]
        problems = problems + [
            Problem(row.source, row.line, reasons[at]) for row, at in zip(places, bad, strict=True)
        ]
        keep = np.ones(len(rows), bool)
        keep[bad] = False
        sources, numbers = _kept_sources(sources, keep), np.flatnonzero(keep)
        rows = rows.take(numbers) if isinstance(rows, Rows) else [rows[at] for at in numbers]
        shapes = np.asarray(shapes[numbers])
    fingerprint = hashlib.sha256(said["content"].encode() + shapes.tobytes()).hexdigest()
    return Index(rows, shapes, problems, sources, fingerprint, said["pixels"])


def _misfits(shapes: Int[np.ndarray, "rows 5"], sizes: Sizes) -> dict[int, str]:
    """Why a row of these shapes cannot travel in any bucket. A shape of zeros belongs to a bad row."""
    reasons = {}
    for at in np.flatnonzero((shapes[:, 1] > sizes.max_length) | (shapes[:, 0] > sizes.view_buckets[-1])):
        try:
            sizes.round(Shape.of(shapes[at]))
        except UserError as error:
            reasons[int(at)] = str(error)
    return reasons


def _decoded_size(file: images.Source, policy: images.ImagePolicy) -> tuple[int, int]:
    return images.load(file, policy).size


def _measure_all(
    rows: Sequence[Row], reader: Reader, size_of: Callable, threads: int
) -> tuple[np.ndarray, dict]:
    """(shapes, zeros for bad rows; reasons of the bad ones and the hash of all content)."""
    content = hashlib.sha256(reader.settings().encode())
    shapes = np.zeros((len(rows), _COLUMNS), np.int32)
    reasons: dict[str, str] = {}
    cached = functools.lru_cache(maxsize=1 << 16)(size_of)  # many rows may share an image

    def once(file: images.Source, policy: images.ImagePolicy) -> tuple[int, int]:
        # the key of a row's own image would be the image: 65,536 of them stay in memory
        return (size_of if isinstance(file, bytes) else cached)(file, policy)

    def chunk(begin: int) -> tuple[int, list[Shape | str], bytes]:
        found, said = [], []
        for row in _some(rows, begin):
            found.append(_measure(row, reader, once))
            said.append(_content(row))
        return begin, found, b"".join(said)

    quiet = None if len(rows) > 20_000 else True
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm.tqdm(total=len(rows), unit="row", desc="measuring rows", disable=quiet, leave=False) as bar,
    ):
        for begin, found, said in pool.map(chunk, range(0, len(rows), CHUNK)):
            content.update(said)
            for at, one in enumerate(found, begin):
                if isinstance(one, str):
                    reasons[str(at)] = one
                else:
                    shapes[at] = one
            bar.update(len(found))
    return shapes, {"reasons": reasons, "content": content.hexdigest()}


def _some(rows: Sequence[Row], begin: int) -> Iterator[Row]:
    return (rows[at] for at in range(begin, min(begin + CHUNK, len(rows))))


def _content(row: Row) -> bytes:
    return json.dumps([row.id, row.images, row.videos, row.conversations]).encode()


def _measure(row: Row, reader: Reader, size_of: Callable) -> Shape | str:
    """The row's shape, or why it has none."""
    try:
        found = [size_of(file, reader.image_policy) for file in row.image_files()]
        plans = anyres.plan_row(found, len(found) if row.kind == "video" else 0, reader.policy)
        encoded = chat.encode_spans(row.conversations, reader.tokenizer, row.kind)
        labels = chat.labels_of(encoded, reader.tokenizer, reader.mask)
        length = len(encoded.ids) + sum(plan.num_tokens - 1 for plan in plans)
        check_supervision(int(encoded.answer.sum()))
        return row_shape(plans, length, labels)
    except UserError as error:
        return str(error)


def _still_bad(rows: Sequence[Row], reader: Reader, size_of: Callable, reasons: dict[str, str]) -> bool:
    """Whether the rows that were bad still are, for the same reason: someone may have mended an image."""
    some = list(reasons.items())[:1000]
    return all(_measure(rows[int(at)], reader, size_of) == reason for at, reason in some)


def _kept_sources(sources: Sequence[Source], keep: np.ndarray) -> list[Source]:
    kept, start = [], 0
    for source in sources:
        count = int(keep[source.start : source.start + source.count].sum())
        if not count:
            raise UserError(f"{source.path}: none of its rows can be used; see the problems reported for it")
        kept.append(replace(source, start=start, count=count))
        start += count
    return kept


def _checked(rows: Sequence[Row]) -> Iterator[Row]:
    return (rows[at] for at in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), CHECKED), dtype=int)))


def _pixels(rows: Sequence[Row], threads: int) -> str:
    """Of sizes and contents: a resume sees that the same rows have other images now. Not part of
    `fingerprint`, which older runs compare.
    """

    def look(row: Row) -> list[str]:
        try:
            return [_look(file) for file in row.image_files() if not isinstance(file, bytes)]
        except (OSError, UserError) as error:  # a bad row; `problems` says why
            return [type(error).__name__]

    with ThreadPoolExecutor(threads) as pool:
        return hashlib.sha256(repr(list(pool.map(look, _checked(rows)))).encode()).hexdigest()


def _look(path: os.PathLike) -> str:
    with open(path, "rb") as file:
        return f"{os.fstat(file.fileno()).st_size} {hashlib.sha256(file.read(LOOKED_AT)).hexdigest()}"


def _key(rows: Sequence[Row], reader: Reader) -> str:
    """Of the cache on this machine. The loader meets a change that the checked rows do not show."""
    key = hashlib.sha256(reader.settings().encode())
    if isinstance(rows, Rows):
        key.update(rows.identity().encode())
    else:
        for row in rows:
            key.update(_content(row))
    for row in _checked(rows):
        for name in () if row.blobs else row.images + row.videos:
            try:
                status = os.stat(os.path.join(row.root, name))
                key.update(f"{row.root}/{name} {status.st_size} {status.st_mtime_ns}\n".encode())
            except OSError:  # _measure says what is wrong with it
                key.update(f"{name} missing\n".encode())
    return key.hexdigest()[:32]
