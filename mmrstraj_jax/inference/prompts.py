"""One prompt with its images and videos: measured from file headers, read when its batch is due."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmrstraj_jax.config import AnyResConfig, ImagePolicy, ModelConfig
from mmrstraj_jax.data import anyres, images
from mmrstraj_jax.data.anyres import Plan
from mmrstraj_jax.data.collate import Example, Shape, Sizes, expand, model_inputs, row_shape
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.mmrstraj import Inputs

ImageLike = images.Source | images.Picture
VideoLike = Sequence[ImageLike] | UInt8[np.ndarray, "F h w 3"]


@dataclass(frozen=True)
class Request:
    """A prompt as token ids with ONE image id per image and one video id per video, and the media."""

    ids: Sequence[int]
    images: Sequence[ImageLike] = ()
    videos: Sequence[VideoLike] = ()
    max_new_tokens: int | None = None  # default: that of the DecodeOptions
    number: int | None = None  # of its random key; default: its place among the requests
    name: str = "prompt"  # in errors

    def __post_init__(self):
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"{self.name}: max_new_tokens {self.max_new_tokens}: expected 1 or more")


class _Slot(NamedTuple):
    position: int
    media: ImageLike | VideoLike
    plan: Plan


def _slots(
    request: Request, config: ModelConfig, policy: AnyResConfig, image_policy: ImagePolicy
) -> list[_Slot]:
    """Every visual slot in order, with its plan; image files are opened, not decoded (frames: not opened)."""
    ids = np.asarray(request.ids)
    marks = [number for number in (config.image_token_id, config.video_token_id) if number is not None]
    positions = np.flatnonzero(np.isin(ids, marks))
    media = {"image": list(request.images), "video": list(request.videos)}
    for video in media["video"]:
        listed = isinstance(video, Sequence) and not isinstance(video, str | bytes)
        if not listed and getattr(video, "ndim", 0) != 4:
            found = repr(video) if isinstance(video, str | os.PathLike) else type(video).__name__
            raise UserError(
                f"{request.name}: video given as {found:.80}: expected the list of its frames (paths or "
                "images) or an array uint8 [F, h, w, 3]; a film's file is not decoded"
            )
    # Training writes <image> for a video too; with nothing else to mean, either id is a video's.
    if media["video"] and not media["image"]:
        kinds = ["video"] * len(positions)
    else:
        kinds = ["image" if ids[at] == config.image_token_id else "video" for at in positions]
    for kind, found in media.items():
        number = getattr(config, f"{kind}_token_id")
        if kinds.count(kind) != len(found):
            raise UserError(
                f"{request.name}: {kinds.count(kind)} {kind} slots for {len(found)} {kind}s; "
                f"expected one {kind} id ({number}) for each"
            )
    plans = {
        "image": anyres.plan_row([images.size(image, image_policy) for image in media["image"]], 0, policy),
        "video": [anyres.plan_video(len(video), policy) for video in media["video"]],
    }
    return [
        _Slot(int(at), media[kind].pop(0), plans[kind].pop(0))
        for at, kind in zip(positions, kinds, strict=True)
    ]


def _check_ids(request: Request, config: ModelConfig) -> np.ndarray:
    ids = np.asarray(request.ids)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"{request.name}: expected a list of token ids, not empty")
    text = ids[~np.isin(ids, [n for n in (config.image_token_id, config.video_token_id) if n is not None])]
    if len(text) and not 0 <= text.min() <= text.max() < config.text.vocab_size:
        raise UserError(
            f"{request.name}: token ids {text.min()}..{text.max()}, expected 0..{config.text.vocab_size - 1}"
        )
    return ids


def measure(
    request: Request,
    config: ModelConfig,
    policy: AnyResConfig,
    image_policy: ImagePolicy = images.DEFAULT,
) -> Shape:
    """Views and tokens of a prompt (collate.Shape), from its ids and image headers.

    Raises:
        UserError: ids outside the vocabulary, slots that do not match, an unreadable image, or more
            tokens than the model has positions.
    """
    ids = _check_ids(request, config)
    plans = [slot.plan for slot in _slots(request, config, policy, image_policy)]
    length = len(ids) + sum(plan.num_tokens - 1 for plan in plans)
    limit = config.text.max_position_embeddings
    if length > limit:
        raise UserError(
            f"{request.name}: {length} tokens with its visual ones, more than the model's {limit} positions; "
            "shorten it, give smaller images, or a policy with fewer tokens"
        )
    for video in request.videos:
        for frame in video:
            images.size(frame, image_policy)
    return row_shape(plans, length, None)


def media_key(request: Request) -> tuple:
    """Equal for prompts about the same files or objects in the same order."""

    def key(item):
        if isinstance(item, images.Source):
            return os.fspath(item)
        return id(item) if isinstance(item, (Image.Image, np.ndarray)) else tuple(map(key, item))

    return tuple(map(key, request.images)), tuple(map(key, request.videos))


def read(
    request: Request,
    config: ModelConfig,
    policy: AnyResConfig,
    known: dict[tuple, np.ndarray] | None = None,
    image_policy: ImagePolicy = images.DEFAULT,
) -> Example:
    """Decodes the images of a prompt into views and expands its slots. Raises UserError as `measure`.

    Args:
        known: views by media_key; what is there is not decoded again, what is not is added.
    """
    ids, slots = _check_ids(request, config), _slots(request, config, policy, image_policy)
    known, key = {} if known is None else known, media_key(request)
    if key not in known:
        known[key] = _views(slots, policy, image_policy)
    plans = tuple(slot.plan for slot in slots)
    expanded, starts, _ = expand(ids, [slot.position for slot in slots], plans, config.pad_token_id or 0)
    return Example(id=request.name, input_ids=expanded, views=known[key], plans=plans, starts=starts)


def _views(
    slots: Sequence[_Slot], policy: AnyResConfig, image_policy: ImagePolicy
) -> UInt8[np.ndarray, "V S S 3"]:
    views = [np.zeros((0, policy.view_size, policy.view_size, 3), np.uint8)]
    for slot in slots:
        if slot.plan.kind == "video":
            pixels = [images.load(frame, image_policy) for frame in slot.media]
        else:
            pixels = images.load(slot.media, image_policy)
        views.append(images.views(pixels, slot.plan, policy.view_size))
    return np.concatenate(views)


def model_batch(
    examples: Sequence[Example | None],
    config: ModelConfig,
    policy: AnyResConfig,
    *,
    length_multiple: int,
    view_buckets: tuple[int, ...] = (),
) -> Inputs:
    """Right-padded Inputs of some prompts; no view or token that belongs to a row is affected by the padding.

    Args:
        examples: None is a row that only fills the batch up.
        length_multiple: lengths are rounded up to it, in geometric steps from 8 times on.
        view_buckets: view counts to round up to; beyond the last one, and by default, they stay exact.
    """
    shapes = [item.shape for item in examples if item is not None]
    shape = shapes[0]
    for other in shapes[1:]:
        shape = shape.join(other)
    # A text-only batch still runs the tower, on one empty view.
    shape = shape._replace(views=max(1, shape.views))
    buckets = view_buckets if shape.views <= max(view_buckets, default=0) else (shape.views,)
    sizes = Sizes(buckets, length_multiple, max_length=config.text.max_position_embeddings)
    return model_inputs(examples, sizes.round(shape), policy.view_size, config.pad_token_id or 0)


def share_views(inputs: Inputs, examples: Sequence[Example | None], devices: int) -> Inputs:
    """The same inputs with every image once on each device, where that saves tower passes.

    Rows are split evenly over the devices in order; rows whose `views` are one array (`read` with `known`)
    share them. The number of image rows is that of the batch or a half, quarter ... of it: few programs.
    """
    share = len(examples) // devices
    firsts, pool_row = [], []
    for device in range(devices):
        own, found = examples[device * share : (device + 1) * share], {}
        for at, item in enumerate(own):
            # A row that only fills the batch up reads no view
            number = 0 if item is None else found.setdefault(id(item.views), (len(found), at))[0]
            pool_row.append(number)
        firsts.append([device * share + at for _, at in found.values()] or [device * share])
    most = 1 << (max(map(len, firsts)) - 1).bit_length()
    if most >= share:
        return inputs
    order = np.concatenate([first + first[:1] * (most - len(first)) for first in firsts])
    images = {"views", "view_scale", "canvas_index", "canvas_scale"}
    kept = {
        name: value[order] for name, value in inputs._asdict().items() if name in images and value is not None
    }
    return inputs._replace(**kept, pool_row=np.asarray(pool_row, np.int32))
