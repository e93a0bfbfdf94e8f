"""Dense labels of a view for tower pre-training: per-patch class shares, object counts, road metres."""

import itertools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from mmrstraj_jax.synthcity.canvas import CLASSES
from mmrstraj_jax.synthcity.city import SPECS
from mmrstraj_jax.synthcity.truth import BUILDINGS, Truth
from mmrstraj_jax.synthcity.window import View

OBJECTS = ("building", "house", "pool", "car", "tank", "ship", "tree", "field", "airplane", "moving car")
KINDS = (*OBJECTS, "junction", *SPECS)
_STEP = 2.5  # metres between the points that stand for a road's centre line
_UNIT = 10.0  # metres of road that count as one


class Labels(NamedTuple):
    shares: Float[np.ndarray, "side side C"]  # of each patch's pixels, by class of canvas.CLASSES
    counts: Float[np.ndarray, "side side K"]  # by kind of KINDS: centres of objects and junctions, and tens
    # of metres of centre line of each road class


def labels(view: View, truth: Truth, classes: np.ndarray, side: int = 8) -> Labels:
    """Labels on a side x side grid over the whole image (which the base view squeezes to a square).

    classes: uint8 [H, W] of the renderer. An object counts where its centre is, whether or not it is near the
    image border.
    """
    h, w = classes.shape
    rows, columns = np.arange(h) * side // h, np.arange(w) * side // w
    patch = rows[:, None] * side + columns[None, :]
    flat = np.bincount((patch * len(CLASSES) + classes).ravel(), minlength=side * side * len(CLASSES))
    shares = flat.reshape(side, side, len(CLASSES)).astype(np.float32)
    shares /= shares.sum(-1, keepdims=True)
    counts = np.zeros((side, side, len(KINDS)), np.float32)
    for item in truth.items:
        names = {item.kind, f"{item.tag} {item.kind}", "building" if item.kind in BUILDINGS else item.kind}
        for kind in names & set(OBJECTS):
            _add(counts, item.u, item.v, kind)
    x0, y0, x1, y1 = view.window.bounds
    for node in view.nodes:
        if node.kind not in ("bend", "overpass", "merge"):
            _add(counts, (node.x - x0) / (x1 - x0), (y1 - node.y) / (y1 - y0), "junction")
    for road in view.roads:
        for (ax, ay), (bx, by) in itertools.pairwise(road.points):
            length = math.hypot(bx - ax, by - ay)
            steps = max(1, round(length / _STEP))
            for k in range(steps):
                t = (k + 0.5) / steps
                u, v = (ax + (bx - ax) * t - x0) / (x1 - x0), (y1 - ay - (by - ay) * t) / (y1 - y0)
                _add(counts, u, v, road.cls, length / steps / _UNIT)
    return Labels(shares, counts)


def _add(counts: np.ndarray, u: float, v: float, kind: str, amount: float = 1.0) -> None:
    side = counts.shape[0]
    if 0 <= u < 1 and 0 <= v < 1:
        counts[int(v * side), int(u * side), KINDS.index(kind)] += amount
