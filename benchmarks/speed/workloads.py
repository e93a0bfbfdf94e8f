"""What both sides run: sizes, items, and weights and inputs drawn by name. NumPy only.

Weights are cut from one block of noise at an offset given by the tensor's name, so both sides draw the same
numbers in their own process, at any size, without a file. Names are `mmrstraj_jax.training.state`'s, a layer
number inserted: vision_tower.layers.3.mlp.fc1.weight.
"""

import functools
import math
import zlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from mmrstraj_jax.config import MODEL_PRESETS, ModelConfig

RANK, ALPHA = 8, 16.0
LEARNING_RATE = 1e-4
DECODE_TOKENS = 32  # of one timed decode: inference.decoding.CHUNK
ANSWER = 8  # tokens of a whole answer of wins.py
_NOISE = 1_048_573  # prime, so that no two rows of a matrix are the same


@dataclass(frozen=True)
class Sizes:
    """Tokens and targets of the items at one model size."""

    text: int  # text tokens of a training row
    supervised: int  # of these, targets
    prefill: int  # tokens of a prompt
    context: int  # tokens in the cache when decoding begins


SIZES = {
    "tiny": Sizes(text=16, supervised=8, prefill=64, context=24),
    "mini": Sizes(text=100, supervised=64, prefill=1024, context=128),
    "0.5b": Sizes(text=100, supervised=64, prefill=2100, context=128),
    "7b": Sizes(text=100, supervised=64, prefill=2100, context=128),
}
KINDS = ("vision", "prefill", "decode", "train")
STREAM = (1, 1, 2, 5)  # views of the rows of wins.py's stream
VIEWS, BATCHES, REMATS = (1, 5, 10), (1, 4, 16), ("block", "dots", "none")


@dataclass(frozen=True)
class Item:
    """One line of a table. `name` is e.g. vision-5, prefill, decode-4, train-block."""

    kind: str
    size: str
    dtype: str
    batch: int = 1
    views: int = 0
    remat: str = "none"

    @property
    def name(self) -> str:
        detail = {"vision": self.views, "decode": self.batch, "train": self.remat}.get(self.kind)
        return self.kind if detail is None else f"{self.kind}-{detail}"

    @property
    def model(self) -> ModelConfig:
        return MODEL_PRESETS[self.size]

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.size]

    @property
    def reduced_side(self) -> int:
        """Tokens per side of a view after reduction: the paper's budget of 2,000 tokens over the views."""
        side = self.model.vision.grid_side
        budget = 2000 * side**2 / 27**2
        return side if self.views == 1 else min(side, math.isqrt(int(budget / self.views)))

    @property
    def length(self) -> int:
        """Tokens of one row: views one after the other, a newline, text; or the prompt."""
        if self.kind in ("train", "stream"):
            return self.views * self.reduced_side**2 + 1 + self.sizes.text
        return self.sizes.prefill if self.kind == "prefill" else self.sizes.context


def probe(large: bool, gpu: bool) -> tuple[int, int, int]:
    """(matrix side, bytes copied, calls timed together) that measure a machine's limits."""
    if not large:
        return 256, 2**23, 1
    # A GPU does one product of side 4,096 faster than the host asks for the next.
    return (8192, 2**31, 10) if gpu else (4096, 2**29, 1)


def items(size: str, dtype: str, what: list[str], views: int, batch: int) -> list[Item]:
    """Every item of the named kinds; views and batch are the training row's."""
    found = []
    for kind in what:
        if kind == "vision":
            found += [Item(kind, size, dtype, views=number) for number in VIEWS]
        elif kind == "decode":
            found += [Item(kind, size, dtype, batch=rows) for rows in BATCHES]
        elif kind == "train":
            found += [Item(kind, size, dtype, batch, views, remat) for remat in REMATS]
        else:
            found.append(Item(kind, size, dtype))
    return found


# ---- numbers ----


@functools.cache
def _noise() -> Float[np.ndarray, " N"]:
    return np.random.default_rng(0).standard_normal(_NOISE, dtype=np.float32)


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.resize(np.roll(_noise(), zlib.crc32(name.encode()) % _NOISE), shape)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of one layer by its name, float32: activations stay of size 1 through all layers.

    Values are cut to what bfloat16 holds, so every dtype computes with the same weights.
    """
    drawn = _weight(name, shape)
    drawn.view(np.uint32)[...] &= 0xFFFF0000
    return drawn


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    last = name.rsplit(".", 1)[-1]
    if last == "lora_B":
        return 0.01 * _draw(name, shape)
    if "norm" in name:
        return 1 + 0.1 * _draw(name, shape) if last == "weight" else 0.1 * _draw(name, shape)
    if last == "bias":
        return 0.1 * _draw(name, shape)
    return _draw(name, shape) * math.prod(shape[1:] or shape) ** -0.5


@dataclass(frozen=True)
class Row:
    """A training batch; visual tokens come first in every row."""

    pixels: UInt8[np.ndarray, "B V S S 3"]
    input_ids: Int[np.ndarray, "B L"]  # anything at visual positions
    visual_index: Int[np.ndarray, "B L"]  # into view tokens (at full stride) and the newline; -1: text
    positions: Int[np.ndarray, "B K"]  # the token before each target
    targets: Int[np.ndarray, "B K"]


def pixels(item: Item) -> UInt8[np.ndarray, "B V S S 3"]:
    side = item.model.vision.image_size
    shape = (item.batch, item.views, side, side, 3)
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def token_ids(item: Item) -> Int[np.ndarray, "B L"]:
    shape = (item.batch, item.length)
    return np.random.default_rng(2).integers(0, item.model.text.vocab_size, shape).astype(np.int32)


def row(item: Item) -> Row:
    side, reduced = item.model.vision.grid_side, item.reduced_side
    cells = (np.arange(reduced) * side)[:, None] + np.arange(reduced)
    visual = (np.arange(item.views)[:, None] * side**2 + cells.reshape(-1)).reshape(-1)
    index = np.full((item.batch, item.length), -1, np.int32)
    index[:, : len(visual)] = visual
    index[:, len(visual)] = item.views * side**2  # the newline
    ids, count = token_ids(item), item.sizes.supervised
    positions = np.broadcast_to(np.arange(item.length - count - 1, item.length - 1), (item.batch, count))
    return Row(pixels(item), ids, index, positions.astype(np.int32), ids[:, -count:])
