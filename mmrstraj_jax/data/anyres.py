"""Higher AnyRes: which grid an image gets, how many visual tokens, and where each of them comes from.

`plan` is the one function that decides this; data, model, export and memory planning all call it, so the
counts cannot disagree. Behaviour: spec of LLaVA-NeXT `llava/mm_utils.py`, `llava/model/llava_arch.py` and
Hugging Face `modeling_llava_onevision.py`; policy "tau" is the paper's formula applied to every view.

A row's visual pool, which `Plan.index` addresses: V*T view tokens (view v, cell (y, x) at v*T + y*side + x,
also after the view was reduced to s x s: its valid cells are y, x < s, at the same stride), then Hc*Wc
canvas tokens, then one newline.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mmrstraj_jax.config import AnyResConfig
from mmrstraj_jax.errors import UserError

MAX_SQUARE = 2**15  # 4 GiB as Pillow holds it


@dataclass(frozen=True, slots=True)
class Plan:
    """The visual tokens of one image (or one video).

    `kind` is "anyres" (base view plus crops), "square" (one padded view, multi-image rows) or "video" (one
    view a frame). `map_*` is the map of crop tokens in its final size, without the newline column; `top`,
    `left` is where the kept part begins in the padded map.
    """

    kind: str
    width: int  # pixels of the original image; 0 for "square" and "video", which do not depend on it
    height: int
    grid: tuple[int, int]  # crop rows, crop columns
    num_views: int
    side: int  # tokens per side of a full view
    reduced_side: int  # tokens per side after reduction; == side when nothing is reduced
    resize: tuple[tuple[int, int], tuple[int, int]] | None  # (h', w') -> (h2, w2) of the merged map
    top: int
    left: int
    map_height: int
    map_width: int
    num_tokens: int

    @property
    def view_scale(self) -> float | None:
        """Bilinear scale of every view's token map, None when the views keep their size."""
        return None if self.reduced_side == self.side else self.reduced_side / self.side

    @property
    def canvas_side(self) -> int:
        """Side of the smallest square canvas the merged map is resized on; 0 without a resize."""
        return max(self.grid) * self.side if self.resize else 0

    def index(
        self, view_offset: int, num_views: int, canvas: tuple[int, int] = (0, 0)
    ) -> Int[np.ndarray, " num_tokens"]:
        """Where each visual token lies in the row's visual pool, in sequence order.

        Args:
          view_offset: the row's view that is this image's view 0.
          num_views: V, views of the row including padding.
          canvas: (Hc, Wc) of the batch; the row's only resized image owns it.
        """
        side, tokens = self.side, self.side**2
        newline = num_views * tokens + canvas[0] * canvas[1]
        cells = (np.arange(self.reduced_side) * side)[:, None] + np.arange(self.reduced_side)
        if self.kind != "anyres":
            views = (view_offset + np.arange(self.num_views))[:, None] * tokens + cells.reshape(1, -1)
            return np.append(views.reshape(-1), newline).astype(np.int32)
        if self.resize:
            assert canvas[0] >= self.resize[0][0] and canvas[1] >= self.resize[0][1], (canvas, self.resize)
            crops = num_views * tokens + self._grid(canvas[1])
        else:
            crops = self._crop_cells(view_offset, self.map_height, self.map_width)
        packed = np.full((self.map_height, self.map_width + 1), newline, np.int32)
        packed[:, :-1] = crops
        return np.concatenate([(view_offset * tokens + cells).reshape(-1), packed.reshape(-1)]).astype(
            np.int32
        )

    def canvas_index(self, view_offset: int, canvas: tuple[int, int]) -> Int[np.ndarray, "Hc Wc"]:
        """View tokens that fill the canvas before the resize; beyond (h', w') its edge repeats."""
        assert self.resize is not None
        height, width = self.resize[0]
        cells = self._crop_cells(view_offset, height, width)
        rows = np.minimum(np.arange(canvas[0]), height - 1)
        columns = np.minimum(np.arange(canvas[1]), width - 1)
        return cells[rows[:, None], columns].astype(np.int32)

    def _grid(self, stride: int) -> np.ndarray:
        return (np.arange(self.map_height) * stride)[:, None] + np.arange(self.map_width)

    def _crop_cells(self, view_offset: int, height: int, width: int) -> np.ndarray:
        """Pool index of each cell of the kept part of the merged crop map, [height, width]."""
        size, side = self.reduced_side, self.side
        y, x = self.top + np.arange(height), self.left + np.arange(width)
        view = 1 + (y // size * self.grid[1])[:, None] + x // size
        return (view_offset + view) * side**2 + (y % size * side)[:, None] + x % size


def resolve_policy(policy: AnyResConfig | str) -> AnyResConfig:
    """A policy by name stands for its 384 px, patch 14 defaults."""
    return AnyResConfig(policy=policy) if isinstance(policy, str) else policy


@functools.lru_cache(maxsize=1 << 16)
def select_best_resolution(
    width: int, height: int, pinpoints: tuple[tuple[int, int], ...]
) -> tuple[int, int]:
    """(height, width) of the candidate that keeps most of the image's pixels, the least wasteful of those."""
    best, best_effective, best_waste = None, 0, math.inf
    for candidate_height, candidate_width in pinpoints:
        scale = min(candidate_width / width, candidate_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = candidate_width * candidate_height - effective
        if effective > best_effective or (effective == best_effective and waste < best_waste):
            best, best_effective, best_waste = (candidate_height, candidate_width), effective, waste
    assert best is not None, "no grid pinpoints"
    return best


def unpad(
    width: int, height: int, map_height: int, map_width: int, rounding: str
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the part of a padded map that shows the image; either may be 0 (legal).

    "hf" rounds to 7 decimals before truncating, "original" does not (34 of the 2.25 million sizes up to 1500
    differ).
    """
    digits = (lambda value: int(round(value, 7))) if rounding == "hf" else int
    if width / height > map_width / map_height:
        padding = (map_height - digits(height * (map_width / width))) // 2
        return padding, 0, map_height - 2 * padding, map_width
    padding = (map_width - digits(width * (map_height / height))) // 2
    return 0, padding, map_height, map_width - 2 * padding


@functools.lru_cache(maxsize=1 << 16)
def plan(width: int, height: int, policy: AnyResConfig | str) -> Plan:
    """The visual-token plan of a single-image row.

    Args:
      width, height: of the original image, in pixels (after EXIF rotation, if that is applied).
      policy: "tau" reduces every view, base included, to floor(sqrt(tau / views)) tokens a side;
        "anyres_max_N" keeps the base and resizes the merged map when it holds more than 1.21 * N full views.
    Raises:
      UserError: a side is not positive.
    """
    policy = resolve_policy(policy)
    if width < 1 or height < 1:
        raise UserError(f"image size {width}x{height}: expected at least 1x1 pixels")
    target = select_best_resolution(width, height, policy.grid_pinpoints)
    rows, columns = target[0] // policy.view_size, target[1] // policy.view_size
    num_views, side = rows * columns + 1, policy.side
    size = side
    if policy.max_num is None and side**2 * num_views > policy.tau:
        # 1e-9: sqrt(2000 / 5) must be 20, whatever the last bit of the square root
        size = max(1, math.floor(math.sqrt(policy.tau / num_views) + 1e-9))
    top, left, map_height, map_width = unpad(width, height, rows * size, columns * size, policy.rounding)
    resize = None
    if policy.max_num is not None:
        times = math.sqrt(map_height * map_width / (policy.max_num * side**2))
        if times > 1.1:  # LLaVA-NeXT's tolerance: 8,748 tokens of a 1382x1152 image stay
            resize = (map_height, map_width), (int(map_height // times), int(map_width // times))
            map_height, map_width = resize[1]
    return Plan(
        kind="anyres",
        width=width,
        height=height,
        grid=(rows, columns),
        num_views=num_views,
        side=side,
        reduced_side=size,
        resize=resize,
        top=top,
        left=left,
        map_height=map_height,
        map_width=map_width,
        num_tokens=size**2 + map_height * (map_width + 1),
    )


def plan_multi_image(policy: AnyResConfig | str) -> Plan:
    """One image of a row with several: padded to a square, one full view, one newline after it."""
    side = resolve_policy(policy).side
    return Plan("square", 0, 0, (0, 0), 1, side, side, None, 0, 0, 0, 0, side**2 + 1)


def plan_video(frames: int, policy: AnyResConfig | str) -> Plan:
    """A video: every frame one view, reduced to half its side (27 -> 14), one newline at the very end."""
    if frames < 1:
        raise UserError(f"video with {frames} frames: expected at least one")
    side = resolve_policy(policy).side
    size = math.ceil(side / 2)
    return Plan("video", 0, 0, (0, 0), frames, side, size, None, 0, 0, 0, 0, frames * size**2 + 1)


def plan_row(sizes: list[tuple[int, int]], frames: int, policy: AnyResConfig | str) -> list[Plan]:
    """The plans of one row's visual slots in order: its images ((width, height) each) or its one video."""
    if frames:
        return [plan_video(frames, policy)]
    if len(sizes) == 1:
        return [plan(*sizes[0], policy)]
    for width, height in sizes:
        if max(width, height) > MAX_SQUARE:
            raise UserError(
                f"image size {width}x{height}: one of several is padded to a square, of at most {MAX_SQUARE} "
                "pixels a side; cut it into tiles first"
            )
    return [plan_multi_image(policy) for _ in sizes]
