"""Tiles: borders join at every zoom, files lie where a map client looks, the same pixels on every Python."""

import dataclasses
import hashlib
import math

import numpy as np
import pytest
from PIL import Image

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.synthcity import tiles
from mmrstraj_jax.synthcity.city import STYLES, make_city
from mmrstraj_jax.synthcity.geo import center_pixel, metres_a_pixel, to_lonlat, to_metres, to_pixel
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.render import render
from mmrstraj_jax.synthcity.window import Window, view

VIENNA = {"lat": 48.2, "lon": 16.37}


@pytest.mark.parametrize("style", STYLES)
def test_four_tiles_are_one_image(style):
    """Four tiles side by side against the same ground drawn at once, without the sensor's noise.

    Pillow rasterises in single precision, so a polygon's edge may fall on the next pixel when coordinates
    count from another corner: a few pixels in 262,144.
    """
    city = make_city(5, style, **VIENNA)
    look = dataclasses.replace(tiles.tile_look(city), noise=0.0)
    for z in tiles.ZOOMS:
        x, y = tiles.center_tile(city, z)
        rows = [[tiles.tile(city, z, x + i, y + j, look) for i in (0, 1)] for j in (0, 1)]
        joined = np.concatenate([np.concatenate(row, 1) for row in rows])
        gsd, (column, row) = metres_a_pixel(city, z), center_pixel(city, z)
        middle = ((x + 1) * 256 - column) * gsd, (row - (y + 1) * 256) * gsd
        whole = render(view(Window(city, *middle, (512, 512), gsd, tiles.HOUR)), look, Stream(0)).image
        assert (whole != joined).any(2).sum() <= 8


def test_no_step_at_borders():
    """With noise: the change from the last column of a tile to the first of the next is like any other."""
    city = make_city(6, "suburban", **VIENNA)
    look = tiles.tile_look(city)
    x, y = tiles.center_tile(city, 18)
    strip = np.concatenate([tiles.tile(city, 18, x + k, y, look) for k in range(4)], 1).astype(int)
    steps = np.abs(np.diff(strip, axis=1)).mean((0, 2))
    usual = np.delete(steps, [255, 511, 767])
    assert all(steps[k] < np.quantile(usual, 0.99) for k in (255, 511, 767))


def test_zooms_show_the_same_ground():
    """A tile of zoom 17 fits the four of zoom 18 below it, reduced to its size, better than any shift of
    them."""
    city = make_city(7, "grid", **VIENNA)
    look = dataclasses.replace(tiles.tile_look(city), noise=0.0)
    x, y = tiles.center_tile(city, 17)
    rows = [[tiles.tile(city, 18, 2 * x + i, 2 * y + j, look) for i in (0, 1)] for j in (0, 1)]
    below = np.concatenate([np.concatenate(row, 1) for row in rows]).astype(float)
    below = below.reshape(256, 2, 256, 2, 3).mean((1, 3, 4))
    above = tiles.tile(city, 17, x, y, look).astype(float).mean(2)

    def distance(dx: int, dy: int) -> float:
        return float(np.abs(above - np.roll(below, (dy, dx), (0, 1)))[8:-8, 8:-8].mean())

    here = distance(0, 0)
    assert here < 12 and all(here < distance(*d) for d in ((1, 0), (-1, 0), (0, 1), (0, -1)))


def test_places_on_the_globe():
    city = make_city(1, "grid", **VIENNA)
    for point in ((0.0, 0.0), (731.5, -402.25), (-612.0, 588.0)):
        lon, lat = to_lonlat(city, *point)
        assert np.allclose(to_metres(city, lon, lat), point, atol=1e-6)
        # Haversine distance from the centre.
        a, b, d = math.radians(city.lat), math.radians(lat), math.radians(lon - city.lon)
        h = math.sin((b - a) / 2) ** 2 + math.cos(a) * math.cos(b) * math.sin(d / 2) ** 2
        assert abs(2 * 6378137.0 * math.asin(math.sqrt(h)) - math.hypot(*point)) < 1.0
    # The formula of the slippy map: x = (lon + 180) / 360, y = (1 - asinh(tan(lat)) / pi) / 2, in tiles.
    assert [int(p) // 256 for p in to_pixel(16.37, 48.2, 18)] == [
        int((16.37 + 180) / 360 * 2**18),
        int((1 - math.asinh(math.tan(math.radians(48.2))) / math.pi) / 2 * 2**18),
    ]


def test_written_tiles(tmp_path):
    city = make_city(2, "radial", **VIENNA)
    west, south = to_lonlat(city, -60, -60)
    east, north = to_lonlat(city, 60, 60)
    number = tiles.write_tiles(city, tmp_path, (west, south, east, north), (17, 18))
    files = sorted(tmp_path.glob("*/*/*.png"))
    assert len(files) == number >= 5
    z, x, y = (int(part) for part in files[-1].relative_to(tmp_path).with_suffix("").parts)
    written = np.asarray(Image.open(files[-1]))
    assert np.array_equal(written, tiles.tile(city, z, x, y, tiles.tile_look(city)))
    gray = tiles.tile(city, z, x, y, tiles.tile_look(city, panchromatic=True))
    assert (np.ptp(gray, axis=2) == 0).all() and (np.ptp(written, axis=2) > 0).any()
    with pytest.raises(UserError, match="zoom"):
        tiles.tile(city, 16, 0, 0, tiles.tile_look(city))
    with pytest.raises(UserError, match="west < east"):
        tiles.write_tiles(city, tmp_path, (east, south, west, north))


def test_tiles_are_the_same_on_every_python():
    digest = hashlib.sha256()
    for k, style in enumerate(STYLES):
        city = make_city(k + 1, style, **VIENNA)
        for z in tiles.ZOOMS:
            digest.update(tiles.tile(city, z, *tiles.center_tile(city, z), tiles.tile_look(city)).tobytes())
    assert digest.hexdigest() == "a52686fbaba9730a24344705239231afb007ee5d47bd94389304a70c1e76f95b"
