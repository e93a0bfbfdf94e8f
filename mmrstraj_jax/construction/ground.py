"""Tall images at one scale: Web Mercator's pixels shrink on the ground towards the poles.

Across a window of a few hundred metres the difference is far below a pixel, and its pixels stay as the
provider sent them. An extent of kilometres can shift by pixels; it is resampled to a sinusoidal map about its
own middle meridian, on which every row and the middle column have true length everywhere.
"""

import numpy as np
from jaxtyping import UInt8

from mmrstraj_jax.construction.geodesy import wrap
from mmrstraj_jax.construction.tiles import MERCATOR_RADIUS, Window, degrees, world_pixel

LARGEST_SHIFT = 0.5  # pixels that may be out of place before an image is resampled
_BLOCK = 256  # rows resampled at a time: the floats of a whole extent would be gigabytes


def _rows(window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Of every row of the corrected image: its source row (float, pixel centres) and radians of latitude."""
    north, south = np.radians(window.bounds[3]), np.radians(window.bounds[1])
    count = round((north - south) * MERCATOR_RADIUS / window.gsd)
    middle = np.radians(window.center[0])
    phi = middle + (count / 2 - 0.5 - np.arange(count)) * window.gsd / MERCATOR_RADIUS
    _, y = world_pixel(np.degrees(phi), 0.0, window.zoom)
    return y - window.top - 0.5, phi


def shift(window: Window) -> float:
    """Greatest distance, in pixels, between where a place is and where one scale for all would put it."""
    source, phi = _rows(window)
    ends = len(source) / 2 - window.height / 2
    down = np.abs(source + ends - np.arange(len(source))).max(initial=0.0)
    across = (
        np.abs(np.cos(np.radians(window.center[0])) / np.cos(phi) - 1).max(initial=0.0) * window.width / 2
    )
    return float(np.hypot(down, across))


def one_scale(
    image: UInt8[np.ndarray, "H W 3"], window: Window
) -> tuple[UInt8[np.ndarray, "H2 W 3"], dict[str, object]]:
    """The image at `window.gsd` metres a pixel everywhere, and its georeference.

    Bilinear; where a row is longer on the ground than the middle one, its ends are cut, where it is shorter
    they repeat. The georeference is {"crs": a PROJ string, "transform": GDAL's geotransform, metres on the
    sphere of EPSG:3857}.
    """
    source, phi = _rows(window)
    height, width = image.shape[:2]
    stretch = np.cos(np.radians(window.center[0])) / np.cos(phi)
    offset = np.arange(width) - (width - 1) / 2
    result = np.empty((len(source), width, 3), np.uint8)
    for start in range(0, len(source), _BLOCK):
        part = slice(start, start + _BLOCK)
        y = np.clip(source[part], 0, height - 1)
        x = np.clip(offset[None] * stretch[part, None] + (width - 1) / 2, 0, width - 1)
        top, left = np.minimum(y.astype(int), height - 2), np.minimum(x.astype(int), width - 2)
        down, across = (y - top)[:, None, None], (x - left)[..., None]
        rows = image[top] * (1 - down) + image[top + 1] * down
        line = np.arange(len(top))[:, None]
        value = rows[line, left] * (1 - across) + rows[line, left + 1] * across
        result[part] = np.rint(value).astype(np.uint8)
    meridian = float(wrap(degrees(window.left + window.width / 2, window.top, window.zoom)[1]))
    north = MERCATOR_RADIUS * float(phi[0]) + window.gsd / 2
    transform = (-width / 2 * window.gsd, window.gsd, 0.0, north, 0.0, -window.gsd)
    crs = f"+proj=sinu +lon_0={meridian:.9f} +R={MERCATOR_RADIUS:.0f} +units=m"
    return result, {"crs": crs, "transform": transform}
