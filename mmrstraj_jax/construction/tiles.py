"""Web Mercator XYZ tiles: exact windows of world pixels, never resampled.

A world pixel is counted from the north-west corner (180 W, 85.05 N), x to the east, y to the south; at zoom z
the world is 256 * 2^z pixels wide. A window is a rectangle of whole world pixels, so windows and tiles of one
zoom share one grid: cutting and stitching move no pixel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from mmrstraj_jax.construction.geodesy import middle, wrap
from mmrstraj_jax.errors import UserError

TILE = 256
MAX_LATITUDE = 85.051128779806604  # atan(sinh(pi)): where the map is square
MERCATOR_RADIUS = 6_378_137.0  # of EPSG:3857
MAX_ZOOM = 24
MAX_SIDE = 16_384  # pixels of a stitched window


class OffTheMap(UserError):
    """A position or window beyond 85.05 degrees, where Web Mercator ends."""


def on_map(lat):
    """Mask of the latitudes that Web Mercator shows; 85.05112878 as it is often printed is one."""
    return np.abs(lat) <= MAX_LATITUDE + 1e-6


def world_pixel(lat, lon, zoom: int, tile: int = TILE):
    """World pixel (x, y) of degrees, as floats; arrays broadcast. Raises OffTheMap: beyond 85.05 degrees."""
    lat, lon = np.asarray(lat, np.float64), np.asarray(lon, np.float64)
    if not on_map(lat).all() or not np.isfinite(lon).all():
        raise OffTheMap(
            f"latitude {lat!r:.60}: expected degrees within +-{MAX_LATITUDE:.4f}, the Web Mercator map"
        )
    _check_zoom(zoom)
    size = tile * 2.0**zoom
    sine = np.sin(np.radians(lat))
    y = 0.5 - np.log((1 + sine) / (1 - sine)) / (4 * np.pi)
    return (wrap(lon) / 360 + 0.5) * size, np.clip(y, 0.0, 1.0) * size


def degrees(x, y, zoom: int, tile: int = TILE):
    """(lat, lon) of a world pixel; the inverse of `world_pixel`, longitude in [-180, 180)."""
    size = tile * 2.0**zoom
    lat = np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * np.asarray(y) / size))))
    return lat, wrap(np.asarray(x) / size * 360 - 180)


def tile_at(lat, lon, zoom: int):
    """Tile (x, y) that holds the degrees, as int64; 180 E is the last column's edge, 180 W the first's."""
    x, y = world_pixel(lat, lon, zoom, tile=1)
    last = 2**zoom - 1
    # mercantile's epsilon: a tile's own corner must fall into it in spite of rounding
    columns = np.floor(x + 1e-14 * 2**zoom).astype(np.int64)
    columns = np.where(np.equal(lon, 180.0), last, columns)
    return np.clip(columns, 0, last), np.clip(np.floor(y + 1e-14 * 2**zoom).astype(np.int64), 0, last)


def ground_resolution(lat, zoom: int, tile: int = TILE):
    """Metres on the ground along one pixel at this latitude."""
    return 2 * np.pi * MERCATOR_RADIUS * np.cos(np.radians(lat)) / (tile * 2.0**zoom)


def _check_zoom(zoom: int) -> None:
    if not 0 <= zoom <= MAX_ZOOM:
        raise UserError(f"zoom {zoom}: expected 0 to {MAX_ZOOM}")


@dataclass(frozen=True)
class Window:
    """`width` x `height` world pixels from (left, top) on. `left` may reach over the antimeridian."""

    zoom: int
    left: int
    top: int
    width: int = 512
    height: int = 512

    def __post_init__(self):
        _check_zoom(self.zoom)
        size = TILE * 2**self.zoom
        if not (0 < self.width <= min(MAX_SIDE, size) and 0 < self.height <= MAX_SIDE):
            raise UserError(
                f"window of {self.width} x {self.height} px, zoom {self.zoom}: expected at most {MAX_SIDE}, "
                f"and no more than the world; use a lower zoom or several anchors"
            )
        if self.top < 0 or self.top + self.height > size:
            raise OffTheMap(
                f"window at zoom {self.zoom}: rows {self.top} to {self.top + self.height} leave the map"
            )

    @property
    def center(self) -> tuple[float, float]:
        """(lat, lon) of the middle."""
        lat, lon = degrees(self.left + self.width / 2, self.top + self.height / 2, self.zoom)
        return float(lat), float(lon)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east, north in degrees; west > east where the window crosses the antimeridian.

        East is 180, not -180, where it ends there.
        """
        north, west = degrees(self.left, self.top, self.zoom)
        south, east = degrees(self.left + self.width, self.top + self.height, self.zoom)
        return float(west), float(south), 180.0 if east == -180.0 else float(east), float(north)

    @property
    def gsd(self) -> float:
        """Ground metres a pixel, at the middle."""
        return float(ground_resolution(self.center[0], self.zoom))

    @property
    def transform(self) -> tuple[float, float, float, float, float, float]:
        """GDAL's geotransform in EPSG:3857 metres: (west, pixel, 0, north, 0, -pixel)."""
        pixel = 2 * math.pi * MERCATOR_RADIUS / (TILE * 2**self.zoom)
        edge = math.pi * MERCATOR_RADIUS
        return self.left * pixel - edge, pixel, 0.0, edge - self.top * pixel, 0.0, -pixel

    def pixels(self, lat, lon):
        """Image coordinates (x, y) of degrees, floats; outside [0, width) or [0, height) off the window."""
        size = TILE * 2**self.zoom
        x, y = world_pixel(lat, lon, self.zoom)
        # the copy of the world nearest to the window's middle
        offset = (x - self.left - self.width / 2 + size / 2) % size - size / 2
        return offset + self.width / 2, y - self.top

    def contains(self, lat, lon):
        """Mask of the points inside."""
        x, y = self.pixels(lat, lon)
        return (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)

    def tiles(self) -> list[tuple[int, int, int, int]]:
        """(tile x, tile y, left, top) of every tile that covers the window, with its place in the image."""
        count = 2**self.zoom
        columns = range(self.left // TILE, (self.left + self.width - 1) // TILE + 1)
        rows = range(self.top // TILE, (self.top + self.height - 1) // TILE + 1)
        return [(x % count, y, x * TILE - self.left, y * TILE - self.top) for y in rows for x in columns]


def window_at(lat: float, lon: float, zoom: int, size: int = 512) -> Window:
    """The `size` x `size` window whose middle is nearest to a point."""
    x, y = world_pixel(lat, lon, zoom)
    left, top = (math.floor(float(at) - size / 2 + 0.5) for at in (x, y))
    return Window(zoom, left, top, size, size)


def window_over(lat, lon, zoom: int, margin: int = 32) -> Window:
    """The smallest window over all points with `margin` pixels around. Raises UserError: above MAX_SIDE."""
    lat, lon = np.asarray(lat, np.float64), np.asarray(lon, np.float64)
    size = TILE * 2**zoom
    x, y = world_pixel(lat, lon, zoom)
    middle_x, _ = world_pixel(*middle(lat, lon), zoom)
    x = (x - middle_x + size / 2) % size - size / 2 + middle_x
    left, right = math.floor(x.min()) - margin, math.floor(x.max()) + 1 + margin
    top = max(math.floor(y.min()) - margin, 0)
    return Window(zoom, left, top, right - left, min(math.floor(y.max()) + 1 + margin, size) - top)


def stitch(
    window: Window, tile: Callable[[int, int, int], UInt8[np.ndarray, "256 256 3"]]
) -> UInt8[np.ndarray, "H W 3"]:
    """The window's pixels from its tiles, copied and never resampled.

    Args:
      tile: (zoom, x, y) -> pixels.
    Raises:
      UserError: a tile of another size (512 px tiles need a provider that says so).
    """
    image = np.zeros((window.height, window.width, 3), np.uint8)
    for x, y, left, top in window.tiles():
        pixels = tile(window.zoom, x, y)
        if pixels.shape != (TILE, TILE, 3) or pixels.dtype != np.uint8:
            raise UserError(f"tile {window.zoom}/{x}/{y}: {pixels.shape}, expected {TILE} x {TILE} RGB")
        a, b = max(left, 0), min(left + TILE, window.width)
        c, d = max(top, 0), min(top + TILE, window.height)
        image[c:d, a:b] = pixels[c - top : d - top, a - left : b - left]
    return image
