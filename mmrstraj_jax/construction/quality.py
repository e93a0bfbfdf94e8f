"""The paper's four scores, 1 to 10 (section 3.2.1), as far as they can be computed.

readability and clarity come from the pixels, trajectory density from the trip, traffic structure from all
trips that cross the window: where many directions and places of a window are driven, there is a network to
see. The paper's experts scored by eye: a file of people's scores replaces the computed ones.
"""

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from mmrstraj_jax.construction import geodesy
from mmrstraj_jax.construction.tiles import Window
from mmrstraj_jax.construction.trajectories import Trajectory

AXES = ("readability", "clarity", "density", "structure")
_BLOCK = 16  # pixels of the blocks that cloud and haze are judged in


@dataclass(frozen=True)
class Measures:
    """Of one image, all 0 to 1 unless said otherwise."""

    contrast: float  # 2nd to 98th percentile of luma
    blur: float  # how little a further blur would change (Crete et al. 2007): 0.2 is sharp, 0.7 is not
    flat: float  # share of the most frequent colour, in 32 steps a channel: blank tiles
    cloud: float  # share of blocks that are bright and colourless throughout
    haze: float  # median of the blocks' darkest value in any channel (dark channel, He et al. 2009)


def measure(image: UInt8[np.ndarray, "H W 3"]) -> Measures:
    """Blur, haze, blank and cloud of an image."""
    rgb = image.astype(np.float32) / 255
    luma = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    low, high = np.percentile(luma, (2, 98))
    codes = (image >> 3).astype(np.int32) @ np.array([1024, 32, 1])
    flat = np.bincount(codes.ravel()).max() / codes.size
    darkest, saturation = _blocks(rgb.min(2)).min(1), _blocks(rgb.max(2) - rgb.min(2)).mean(1)
    cloud = (_blocks(luma).min(1) > 0.72) & (saturation < 0.12)
    return Measures(
        contrast=float(high - low),
        blur=max(_blur(luma), _blur(luma.T)),
        flat=float(flat),
        cloud=float(cloud.mean()),
        haze=float(np.median(darkest)),
    )


def _blur(luma: Float[np.ndarray, "H W"], taps: int = 9) -> float:
    """Share of the differences down the columns that survive a box blur along them."""
    if luma.shape[0] <= taps + 1:
        return 1.0
    total = np.cumsum(np.pad(luma, ((1, 0), (0, 0))), axis=0, dtype=np.float64)
    blurred = (total[taps:] - total[:-taps]) / taps
    margin = taps // 2
    before = np.abs(np.diff(luma[margin : margin + len(blurred)], axis=0))
    after = np.abs(np.diff(blurred, axis=0))
    lost = np.maximum(before - after, 0).sum()
    return float(1 - lost / before.sum()) if before.sum() > 0 else 1.0


def _blocks(values: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "N P"]:
    side = min(_BLOCK, *values.shape)
    rows, columns = values.shape[0] // side, values.shape[1] // side
    cut = values[: rows * side, : columns * side].reshape(rows, side, columns, side)
    return cut.transpose(0, 2, 1, 3).reshape(rows * columns, side * side)


def _score(value: float, at: tuple[float, ...], score: tuple[float, ...]) -> float:
    return round(float(np.interp(value, at, score)), 2)


def image_scores(found: Measures) -> dict[str, float]:
    """readability and clarity."""
    visible = (1 - found.cloud) * float(np.interp(found.haze, (0.35, 0.7), (1.0, 0.2)))
    readable = _score(found.contrast, (0.05, 0.25, 0.5), (1, 6, 10))
    return {
        "readability": round(
            1 + (readable - 1) * visible * float(np.interp(found.flat, (0.5, 0.95), (1, 0))), 2
        ),
        "clarity": _score(found.blur, (0.3, 0.5, 0.75), (10, 6, 1)),
    }


def density_score(network: Float[np.ndarray, "8 8 4"], window: Window) -> float:
    """From `crossing` of all trips: metres driven, as sides of the window. One trip across it gives 5."""
    side = window.gsd * min(window.width, window.height)
    return _score(float(network.sum()) / side, (0, 1, 4, 16), (1, 5, 8, 10))


def structure_score(network: Float[np.ndarray, "8 8 4"]) -> float:
    """From `crossing` of all trips: places driven (up to 6) and directions among them (up to 4)."""
    if not network.any():
        return 1.0
    cells = int((network.sum(2) > 0).sum())
    share = network.sum((0, 1)) / network.sum()
    directions = int((share >= 0.1).sum())
    return round(_score(cells, (0, 24), (1, 6)) + min(directions, 4), 2)


def crossing(trip: Trajectory, window: Window) -> Float[np.ndarray, "8 8 4"]:
    """Metres that a trip drives in each of 8 x 8 cells of a window, by direction modulo 180 degrees."""
    x, y = window.pixels(trip.lat, trip.lon)
    middle_x, middle_y = (x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2
    column = np.floor(middle_x / window.width * 8).astype(int)
    row = np.floor(middle_y / window.height * 8).astype(int)
    inside = (column >= 0) & (column < 8) & (row >= 0) & (row < 8)
    sector = (np.round(np.arctan2(np.diff(y), np.diff(x)) / (np.pi / 4)).astype(int)) % 4
    found = np.zeros((8, 8, 4))
    steps = geodesy.steps(trip.lat, trip.lon)
    np.add.at(found, (row[inside], column[inside], sector[inside]), steps[inside])
    return found


# ---- drift and noise ----


def wanders(trip: Trajectory, window: Window, drift: float = 8.0, noise: float = 0.25) -> str:
    """ "drift" or "noise" where the trip's fixes in a window are no drive, else "".

    Drift: the path is `drift` times as long as the diagonal of its own box (a receiver that stands still and
    wanders). Noise: of the steps of 5 m and more, a share of `noise` turns by more than 100 degrees.
    """
    inside = window.contains(trip.lat, trip.lon)
    if inside.sum() < 8:
        return ""
    xy = geodesy.to_metres(trip.lat[inside], trip.lon[inside])
    step = np.diff(xy, axis=0)
    length = np.hypot(*step.T)
    diagonal = float(np.hypot(*np.ptp(xy, axis=0)))
    if length.sum() > drift * max(diagonal, 1.0):
        return "drift"
    step = step[length >= 5.0]
    if len(step) < 8:
        return ""
    heading = np.arctan2(step[:, 1], step[:, 0])
    turn = np.abs((np.diff(heading) + np.pi) % (2 * np.pi) - np.pi)
    return "noise" if float(np.mean(turn > np.radians(100))) > noise else ""


# ---- duplicates ----


def perceptual_hash(image: UInt8[np.ndarray, "H W 3"], side: int = 16) -> np.ndarray:
    """dHash: whether each cell of a small grey image is brighter than its left neighbour; side^2 booleans."""
    grey = Image.fromarray(image).convert("L").resize((side + 1, side), Image.Resampling.BOX)
    values = np.asarray(grey, np.int16)
    return (values[:, 1:] > values[:, :-1]).ravel()


def duplicates(hashes: np.ndarray, distance: int) -> list[int]:
    """For each image the number of the first one it repeats (at most `distance` bits apart), or -1.

    A repeated image is compared with first ones only, so chains of small steps do not merge.
    """
    signs = np.where(hashes, 1, -1).astype(np.float32)
    bank = np.empty_like(signs)  # of the first ones
    firsts: list[int] = []
    found = []
    for number, mine in enumerate(signs):
        apart = (len(mine) - bank[: len(firsts)] @ mine) / 2
        near = np.flatnonzero(apart <= distance)
        found.append(firsts[near[0]] if len(near) else -1)
        if not len(near):
            bank[len(firsts)] = mine
            firsts.append(number)
    return found


def to_dict(found: Measures) -> dict[str, float]:
    """Rounded, for a file."""
    return {name: round(value, 4) for name, value in asdict(found).items()}
