"""Rows to fixed-shape micro-batches. Everything integer that the device needs is computed here, in NumPy.

Legend: B rows, V views a row, S view side in pixels, L tokens, K supervised positions, Hc x Wc canvas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from mmrstraj_jax.config import AnyResConfig, Config
from mmrstraj_jax.data import anyres, chat, images
from mmrstraj_jax.data.anyres import Plan
from mmrstraj_jax.data.records import Row
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.mmrstraj import Inputs

SUPERVISED_MULTIPLE = 32


class Shape(NamedTuple):
    """What one row needs, or what every row of a bucket has room for. A bucket is one compiled program."""

    views: int
    length: int
    supervised: int  # K
    canvas: int  # side of the square canvas of resized maps; 0: none
    reduced: bool  # some view is reduced, so the batch carries view_scale

    @classmethod
    def of(cls, values: Int[np.ndarray, " 5"]) -> "Shape":
        """From a row of an index."""
        views, length, supervised, canvas, reduced = values.tolist()
        return cls(views, length, supervised, canvas, bool(reduced))

    def join(self, other: "Shape") -> "Shape":
        """The smallest shape with room for both."""
        return Shape(*map(max, self, other))

    def fits(self, other: "Shape") -> bool:
        """Whether a row of this shape can travel in a bucket of the other."""
        return all(mine <= theirs for mine, theirs in zip(self, other, strict=True))


@dataclass(frozen=True)
class Sizes:
    """The few sizes that shapes are rounded up to; `Sizes.of(config)` for training."""

    view_buckets: tuple[int, ...]
    length_multiple: int
    max_length: int

    @classmethod
    def of(cls, config: Config) -> "Sizes":
        return cls(tuple(sorted(config.view_buckets)), config.length_multiple, config.max_length)

    def round(self, shape: Shape) -> Shape:
        """The bucket of a row. Raises UserError when the row is too long or has too many views."""
        if shape.length > self.max_length:
            raise UserError(
                f"{shape.length} tokens, more than max_length {self.max_length}; shorten it or raise "
                "max_length (rows are never cut: the answer would go first)"
            )
        views = next((size for size in self.view_buckets if size >= shape.views), None)
        if views is None:
            raise UserError(f"{shape.views} views, more than the largest of view_buckets {self.view_buckets}")
        length = min(_geometric(shape.length, self.length_multiple), self.max_length)
        supervised = _geometric(shape.supervised, SUPERVISED_MULTIPLE, steps=1) if shape.supervised else 0
        return shape._replace(views=views, length=length, supervised=supervised)


def _geometric(size: int, multiple: int, steps: int = 4) -> int:
    """The next multiple out of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: `steps` sizes an octave."""
    count = -(-size // multiple)
    step = 1
    while count > 2 * steps * step:
        step *= 2
    return -(-count // step) * step * multiple


@dataclass(frozen=True)
class Example:
    """One row, ready to be batched. Visual slots are expanded; nothing in it depends on the bucket."""

    id: str
    input_ids: Int[np.ndarray, " n"]  # pad at visual positions
    views: UInt8[np.ndarray, "v S S 3"]
    plans: tuple[Plan, ...]
    starts: tuple[int, ...]  # where each plan's tokens begin
    labels: Int[np.ndarray, " n"] | None = None  # chat.IGNORE where unsupervised
    answer: Bool[np.ndarray, " n"] | None = None
    segments: tuple[int, ...] = ()  # tokens of each sample of a pack

    @property
    def shape(self) -> Shape:
        return row_shape(self.plans, len(self.input_ids), self.labels)


def row_shape(plans: Sequence[Plan], length: int, labels: np.ndarray | int | None) -> Shape:
    """Shape of a row of `length` tokens in all; labels (or how many targets they hold) may be missing."""
    # The first token has no predecessor to predict it.
    supervised = int((labels[1:] != chat.IGNORE).sum()) if isinstance(labels, np.ndarray) else labels or 0
    return Shape(
        views=sum(plan.num_views for plan in plans),
        length=length,
        supervised=supervised,
        canvas=max((plan.canvas_side for plan in plans), default=0),
        reduced=any(plan.view_scale is not None for plan in plans),
    )


def expand(
    ids: Int[np.ndarray, " n"], slots: Sequence[int], plans: Sequence[Plan], pad_id: int
) -> tuple[np.ndarray, tuple[int, ...], np.ndarray]:
    """Makes room for the visual tokens, in training rows and in prompts.

    Args:
      ids: with one token at each visual slot.
      slots: their positions, in order; as many as plans.
    Returns (ids with pad at visual positions, start of each slot, the source position of every token: a
    visual token counts as its slot).
    """
    assert len(slots) == len(plans), (slots, plans)
    slots = np.asarray(slots, int)
    counts = np.ones(len(ids), np.int64)
    counts[slots] = [plan.num_tokens for plan in plans]
    source = np.repeat(np.arange(len(ids)), counts)
    begins = np.cumsum(counts) - counts
    expanded = ids.astype(np.int32)
    expanded[slots] = pad_id
    return expanded[source], tuple(begins[slots].tolist()), source


def example(
    row: Row,
    tokenizer: Tokenizer,
    policy: AnyResConfig,
    *,
    mask: str = "original",
    image_policy: images.ImagePolicy = images.DEFAULT,
) -> Example:
    """Reads, plans and tokenises one training row.

    Raises:
      UserError: naming the row; an unreadable image, slots that do not match, or nothing to learn from.
        Rows are never truncated: Sizes.round refuses one that is too long.
    """
    try:
        pixels, plans = row_views(row, policy, image_policy)
        encoded = chat.encode_spans(row.conversations, tokenizer, row.kind)
        slots = np.flatnonzero(encoded.ids == tokenizer.image_id)
        if len(slots) != len(plans):
            raise UserError(f"{len(slots)} <image> slots for {len(plans)} images; expected one slot each")
        ids, starts, source = expand(encoded.ids, slots, plans, tokenizer.pad_id)
        labels = chat.labels_of(encoded, tokenizer, mask)[source]
        check_supervision(int(encoded.answer.sum()))
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    return Example(row.id, ids, pixels, tuple(plans), starts, labels, encoded.answer[source])


def check_supervision(answer_tokens: int) -> None:
    """Raises UserError for a row that must not reach the loss."""
    if not answer_tokens:
        raise UserError("no supervised token; expected at least one answer")


def row_views(
    row: Row, policy: AnyResConfig, image_policy: images.ImagePolicy = images.DEFAULT
) -> tuple[UInt8[np.ndarray, "v S S 3"], list[Plan]]:
    """Decoded views of a row and their plans."""
    return views_of(
        [images.load(file, image_policy) for file in row.image_files()], policy, video=row.kind == "video"
    )


def views_of(
    pictures: Sequence, policy: AnyResConfig, video: bool = False
) -> tuple[UInt8[np.ndarray, "v S S 3"], list[Plan]]:
    """Views and plans of the RGB images of one row (PIL); with `video` they are its frames."""
    plans = anyres.plan_row([picture.size for picture in pictures], len(pictures) if video else 0, policy)
    size = policy.view_size
    if video:
        return images.views(pictures, plans[0], size), plans
    parts = [images.views(picture, plan, size) for picture, plan in zip(pictures, plans, strict=True)]
    return np.concatenate(parts) if parts else np.zeros((0, size, size, 3), np.uint8), plans


def join(samples: Sequence[Example]) -> Example:
    """Several samples as one row, one after the other; none of them sees another (Inputs.segment_ids)."""
    segments = tuple(len(sample.input_ids) for sample in samples)
    begins = np.cumsum(segments) - segments
    labels = np.concatenate([sample.labels for sample in samples])
    labels[begins] = chat.IGNORE  # predicted from the last token of another sample
    return Example(
        id=", ".join(sample.id for sample in samples),
        input_ids=np.concatenate([sample.input_ids for sample in samples]),
        views=np.concatenate([sample.views for sample in samples]),
        plans=tuple(plan for sample in samples for plan in sample.plans),
        starts=tuple(
            int(begin) + start
            for begin, sample in zip(begins, samples, strict=True)
            for start in sample.starts
        ),
        labels=labels,
        answer=np.concatenate([sample.answer for sample in samples]),
        segments=segments,
    )


class Batch(TypedDict):
    """One micro-batch for the train step; all NumPy."""

    inputs: Inputs
    positions: Int[np.ndarray, "B K"]  # the token BEFORE each supervised one: it predicts the target
    targets: Int[np.ndarray, "B K"]
    weights: Float[np.ndarray, "B K"]  # 1, or 0 for padding
    answer: Bool[np.ndarray, "B K"]  # targets of the clean mask


def model_inputs(
    examples: Sequence[Example | None],
    bucket: Shape,
    view_size: int,
    pad_id: int,
    sample_index: Sequence[int] | None = None,
    *,
    packed: bool = False,
) -> Inputs:
    """Inputs of the model, right padded to the bucket. None makes a padding row of one pad token.

    With `packed` they carry segment ids (from 1; 0 is padding) and positions that restart in each segment.
    """
    rows, canvas = len(examples), (bucket.canvas, bucket.canvas)
    input_ids = np.full((rows, bucket.length), pad_id, np.int32)
    pixels = np.zeros((rows, bucket.views, view_size, view_size, 3), np.uint8)
    visual_index = np.full((rows, bucket.length), -1, np.int32)
    lengths = np.ones(rows, np.int32)
    view_scale = np.ones((rows, bucket.views), np.float32) if bucket.reduced else None
    canvas_index = np.zeros((rows, *canvas), np.int32) if bucket.canvas else None
    canvas_scale = np.ones((rows, 2), np.float32) if bucket.canvas else None
    segment_ids, positions = (np.zeros((2, rows, bucket.length), np.int32)) if packed else (None, None)
    for at, item in enumerate(examples):
        if item is None:
            continue
        assert packed or not item.segments, item.id
        assert item.shape._replace(supervised=0).fits(bucket), (item.id, item.shape, bucket)
        lengths[at] = len(item.input_ids)
        input_ids[at, : lengths[at]] = item.input_ids
        pixels[at, : len(item.views)] = item.views
        offset = 0
        for plan, start in zip(item.plans, item.starts, strict=True):
            visual_index[at, start : start + plan.num_tokens] = plan.index(offset, bucket.views, canvas)
            if plan.view_scale is not None:
                view_scale[at, offset : offset + plan.num_views] = plan.view_scale
            if plan.resize:
                canvas_index[at] = plan.canvas_index(offset, canvas)
                (height, width), (new_height, new_width) = plan.resize
                canvas_scale[at] = new_height / height, new_width / width
            offset += plan.num_views
        if packed:
            parts = item.segments or (len(item.input_ids),)
            segment_ids[at, : lengths[at]] = np.repeat(np.arange(1, len(parts) + 1), parts)
            positions[at, : lengths[at]] = np.concatenate([np.arange(part) for part in parts])
    order = None if sample_index is None else np.asarray(sample_index, np.int32)
    return Inputs(
        input_ids,
        pixels,
        visual_index,
        lengths,
        view_scale,
        canvas_index,
        canvas_scale,
        order,
        segment_ids,
        positions,
    )


def batch(
    examples: Sequence[Example | None],
    bucket: Shape,
    pad_id: int,
    view_size: int,
    sample_index: Sequence[int] | None = None,
    *,
    packed: bool = False,
) -> Batch:
    """A training micro-batch in the shape of its bucket; None rows weigh nothing.

    With `packed` the rows may come from `join`.

    Raises UserError for a row with nothing supervised: a mean over no token would be NaN.
    """
    rows, count = len(examples), bucket.supervised
    positions, targets = np.zeros((rows, count), np.int32), np.zeros((rows, count), np.int32)
    weights, answer = np.zeros((rows, count), np.float32), np.zeros((rows, count), bool)
    for at, item in enumerate(examples):
        if item is None:
            continue
        where = np.flatnonzero(item.labels[1:] != chat.IGNORE)
        if not len(where):
            raise UserError(f"row {item.id}: no supervised token; expected at least one answer")
        assert len(where) <= count, (item.id, len(where), bucket)
        positions[at, : len(where)] = where
        targets[at, : len(where)] = item.labels[where + 1]
        weights[at, : len(where)] = 1.0
        answer[at, : len(where)] = item.answer[where + 1]
    order = np.arange(rows) if sample_index is None else sample_index
    inputs = model_inputs(examples, bucket, view_size, pad_id, order, packed=packed)
    return Batch(inputs=inputs, positions=positions, targets=targets, weights=weights, answer=answer)
