"""Dense labels of a view for tower pre-training: per-patch class shares and object counts."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from mmrstraj_jax.synthcity.render import CLASSES
from mmrstraj_jax.synthcity.truth import BUILDINGS, Truth

KINDS = ("building", "house", "pool", "car", "tank", "ship", "tree", "field", "junction")


class Labels(NamedTuple):
    shares: Float[np.ndarray, "side side C"]  # of each patch's pixels, by class of render.CLASSES
    counts: Float[np.ndarray, "side side K"]  # object centres in each patch, by kind of KINDS


def labels(truth: Truth, classes: np.ndarray, junctions: list[tuple[float, float]], side: int = 8) -> Labels:
    """Labels on a side x side grid over the whole image (which the base view squeezes to a square).

    classes: uint8 [H, W] of the renderer; junctions: (u, v) of junction centres. An object counts where its
    centre is, whether or not it is near the image border.
    """
    h, w = classes.shape
    rows, columns = np.arange(h) * side // h, np.arange(w) * side // w
    patch = rows[:, None] * side + columns[None, :]
    flat = np.bincount((patch * len(CLASSES) + classes).ravel(), minlength=side * side * len(CLASSES))
    shares = flat.reshape(side, side, len(CLASSES)).astype(np.float32)
    shares /= shares.sum(-1, keepdims=True)
    counts = np.zeros((side, side, len(KINDS)), np.float32)
    for item in truth.items:
        for kind in {item.kind, "building" if item.kind in BUILDINGS else item.kind} & set(KINDS):
            _add(counts, item.u, item.v, KINDS.index(kind))
    for u, v in junctions:
        _add(counts, u, v, KINDS.index("junction"))
    return Labels(shares, counts)


def _add(counts: np.ndarray, u: float, v: float, kind: int) -> None:
    side = counts.shape[0]
    if 0 <= u < 1 and 0 <= v < 1:
        counts[int(v * side), int(u * side), kind] += 1
