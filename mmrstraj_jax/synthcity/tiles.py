"""XYZ tiles of a city on Web Mercator, as an imagery provider would serve them.

    city = make_city(1, "suburban", lat=48.2, lon=16.37)
    image = tile(city, 18, *center_tile(city, 18), tile_look(city))
    write_tiles(city, "tiles", city_bounds(city), zooms=(17, 18))

Every pixel follows from its place alone: the ground's texture from its metres, the sensor's noise from its
tile and its number in it. So tiles join without seams, whatever order they are drawn in.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.synthcity.city import City
from mmrstraj_jax.synthcity.geo import TILE, center_pixel, metres_a_pixel, to_lonlat, to_pixel
from mmrstraj_jax.synthcity.palette import Look, make_look
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.render import render
from mmrstraj_jax.synthcity.window import Window, view

ZOOMS = (17, 18, 19)
HOUR = 11  # of the vehicles that an image shows, unless another is asked for


def tile_look(city: City, domain: str = "A", panchromatic: bool = False) -> Look:
    """The light, season and sensor of one flight over a city, from its seed."""
    return make_look(Stream(city.seed, 10), domain, pan_share=float(panchromatic))


def tile(city: City, z: int, x: int, y: int, look: Look, hour: int = HOUR) -> UInt8[np.ndarray, "256 256 3"]:
    """One tile; beyond the city's edge lies grass. Raises UserError for a zoom other than 17 to 19."""
    if z not in ZOOMS:
        raise UserError(f"synthcity tile {z}/{x}/{y}: expected a zoom of {ZOOMS[0]} to {ZOOMS[-1]}")
    gsd = metres_a_pixel(city, z)
    column, row = center_pixel(city, z)
    middle_x, middle_y = (x + 0.5) * TILE - column, row - (y + 0.5) * TILE
    window = Window(city, middle_x * gsd, middle_y * gsd, (TILE, TILE), gsd, hour)
    return render(view(window), look, Stream(city.seed, 9, z, x, y)).image


def center_tile(city: City, z: int) -> tuple[int, int]:
    """x, y of the tile that holds the city's centre."""
    column, row = center_pixel(city, z)
    return column // TILE, row // TILE


def city_bounds(city: City) -> tuple[float, float, float, float]:
    """west, south, east, north in degrees of all that the city's roads enclose."""
    xs, ys = zip(*((n.x, n.y) for n in city.nodes), strict=True)
    west, south = to_lonlat(city, min(xs), min(ys))
    east, north = to_lonlat(city, max(xs), max(ys))
    return west, south, east, north


def tiles_of(bounds: tuple[float, float, float, float], z: int) -> list[tuple[int, int]]:
    """(x, y) of every tile that meets west, south, east, north (degrees), row by row.

    Raises UserError when the bounds are not in that order.
    """
    west, south, east, north = bounds
    if not (west < east and south < north):
        raise UserError(f"synthcity bounds {bounds}: expected west < east and south < north")
    left, top = to_pixel(west, north, z)
    right, bottom = to_pixel(east, south, z)
    columns = range(int(left) // TILE, math.ceil(right / TILE))
    return [(x, y) for y in range(int(top) // TILE, math.ceil(bottom / TILE)) for x in columns]


def write_tiles(
    city: City,
    folder: str | os.PathLike,
    bounds: tuple[float, float, float, float],
    zooms: Sequence[int] = (18,),
    look: Look | None = None,
    hour: int = HOUR,
) -> int:
    """Writes folder/{z}/{x}/{y}.png for every tile that meets the bounds (west, south, east, north) and
    returns how many there are. look: tile_look(city) unless given."""
    look, number = look or tile_look(city), 0
    for z in zooms:
        for x, y in tiles_of(bounds, z):
            image = Image.fromarray(tile(city, z, x, y, look, hour))
            path = Path(folder) / str(z) / str(x) / f"{y}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, compress_level=1)
            number += 1
    return number
