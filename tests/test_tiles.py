"""Web Mercator arithmetic against mercantile and a committed list; windows cut from tiles pixel for pixel."""

import numpy as np
import pytest

from mmrstraj_jax.construction import tiles
from mmrstraj_jax.errors import UserError

GOLDEN = [  # lat, lon, zoom, tile x, tile y: by mercantile 1.2.1
    (34.05, -118.25, 18, 44964, 104674),
    (34.05, -118.25, 19, 89929, 209348),
    (1.35, 103.82, 18, 206671, 130088),
    (39.9, 116.4, 19, 431663, 198674),
    (-6.2, 106.85, 18, 208877, 135595),
    (-10.95, -37.07, 19, 208156, 278189),
    (0, 0, 1, 1, 1),
    (85.05, -180, 3, 0, 0),
    (-85.05, 179.9999, 7, 127, 127),
    (41.15, -8.61, 18, 124802, 98139),
]
# Published ground resolutions: city latitude, m/px at zoom 18 and 19, metres of 512 px
RESOLUTIONS = [
    (34.05, 0.4948, 0.2474, 253, 127),
    (1.35, 0.5970, 0.2985, 306, 153),
    (39.90, 0.4581, 0.2291, 235, 117),
    (-6.20, 0.5937, 0.2968, 304, 152),
    (-10.95, 0.5863, 0.2931, 300, 150),
]


def test_tiles_of_known_places():
    for lat, lon, zoom, x, y in GOLDEN:
        assert tuple(map(int, tiles.tile_at(lat, lon, zoom))) == (x, y), (lat, lon, zoom)


def test_tiles_equal_mercantile_on_10000_points():
    mercantile = pytest.importorskip("mercantile")
    rng = np.random.default_rng(0)
    lat, lon = rng.uniform(-85.05, 85.05, 10_000), rng.uniform(-180, 180, 10_000)
    zoom = rng.integers(0, 22, 10_000)
    for a, o, z in zip(lat.tolist(), lon.tolist(), zoom.tolist(), strict=True):
        expected = mercantile.tile(o, a, z)
        assert tiles.tile_at(a, o, z) == (expected.x, expected.y), (a, o, z)
    for a, o, z in zip(lat[:200].tolist(), lon[:200].tolist(), zoom[:200].tolist(), strict=True):
        x, y = (int(v) for v in tiles.tile_at(a, o, z))
        west, south, east, north = mercantile.bounds(x, y, z)
        assert np.allclose(tiles.degrees(x, y, z, tile=1), (north, west), atol=1e-9)
        assert tiles.tile_at((north + south) / 2, (west + east) / 2, z) == (x, y)


def test_ground_resolution_is_the_specs_table():
    for lat, at18, at19, side18, side19 in RESOLUTIONS:
        for zoom, metres, side in ((18, at18, side18), (19, at19, side19)):
            assert abs(tiles.ground_resolution(lat, zoom) - metres) < 6e-5
            assert round(512 * float(tiles.ground_resolution(lat, zoom))) == side
    assert abs(tiles.ground_resolution(0, 0) - 156543.03392804097) < 1e-6


def test_pixels_invert_and_the_map_has_an_end():
    rng = np.random.default_rng(1)
    lat, lon = rng.uniform(-85, 85, 500), rng.uniform(-180, 180, 500)
    back = tiles.degrees(*tiles.world_pixel(lat, lon, 19), 19)
    assert np.allclose(back, (lat, lon), atol=1e-10)
    for bad in (85.06, -90, np.nan):
        with pytest.raises(UserError, match="85.05"):
            tiles.world_pixel(bad, 0, 5)
    with pytest.raises(UserError, match="zoom 25"):
        tiles.world_pixel(0, 0, 25)


def world(zoom):
    """A tile server whose every world pixel differs from its neighbours, and the whole map it serves."""
    size = 256 * 2**zoom
    y, x = np.mgrid[:size, :size]
    mosaic = np.stack([x % 251, y % 241, (x * 7 + y * 13) % 256], -1).astype(np.uint8)
    return lambda z, tx, ty: mosaic[ty * 256 : ty * 256 + 256, tx * 256 : tx * 256 + 256], mosaic


def test_a_window_is_the_mosaics_pixels():
    serve, mosaic = world(3)
    rng = np.random.default_rng(2)
    counts = set()
    for _ in range(30):
        left, top = rng.integers(0, 2048 - 512, 2).tolist()
        window = tiles.Window(3, left, top)
        counts.add(len(window.tiles()))
        assert np.array_equal(tiles.stitch(window, serve), mosaic[top : top + 512, left : left + 512])
    assert counts == {9}
    assert len(tiles.Window(3, 256, 512).tiles()) == 4
    over = tiles.Window(3, 1900, 0)  # across the antimeridian
    assert np.array_equal(tiles.stitch(over, serve), np.roll(mosaic, -1900, 1)[:512, :512])
    with pytest.raises(UserError, match="expected 256"):
        tiles.stitch(over, lambda z, x, y: np.zeros((512, 512, 3), np.uint8))


def test_window_at_is_centred_within_half_a_pixel():
    for lat, lon, zoom, _, _ in GOLDEN[:6]:
        window = tiles.window_at(lat, lon, zoom)
        x, y = window.pixels(lat, lon)
        assert abs(x - 256) <= 0.5 and abs(y - 256) <= 0.5
        assert abs(window.gsd - tiles.ground_resolution(lat, zoom)) < 1e-5
        west, south, east, north = window.bounds
        assert np.allclose(window.pixels([north, south], [west, east]), [[0, 512], [0, 512]], atol=1e-5)
        # the affine of EPSG:3857 puts the corner where its definition does
        x0, pixel, _, y0, _, _ = window.transform
        assert abs(x0 - np.radians(west) * 6378137) < 1e-3
        assert abs(y0 - 6378137 * np.log(np.tan(np.pi / 4 + np.radians(north) / 2))) < 1e-3
        assert abs(pixel * np.cos(np.radians(window.center[0])) - window.gsd) < 1e-9
    with pytest.raises(UserError, match="leave the map"):
        tiles.window_at(85.05, 0, 5)
    for size in (1, 255, 256, 511):  # an odd window's middle is that of a pixel
        for lon in np.linspace(103.8, 103.8001, 40):
            x, y = tiles.window_at(1.3, lon, 18, size).pixels(1.3, lon)
            assert abs(x - size / 2) <= 0.5 and abs(y - size / 2) <= 0.5


def test_window_over_a_trip():
    lat, lon = np.array([34.05, 34.06, 34.055]), np.array([-118.25, -118.24, -118.26])
    window = tiles.window_over(lat, lon, 18, margin=10)
    assert window.contains(lat, lon).all() and not window.contains(34.1, -118.25)
    x, y = window.pixels(lat, lon)
    assert 10 <= x.min() < 11 and 10 <= y.min() < 11 and window.width - 11 <= x.max() <= window.width - 10
    across = tiles.window_over(np.array([-17.0, -17.0]), np.array([179.999, -179.999]), 15)
    assert across.width < 200 and across.contains(-17.0, 180.0)
    assert across.bounds[0] > 179 and across.bounds[2] < -179
    with pytest.raises(UserError, match="lower zoom"):
        tiles.window_over(np.array([34.0, 35.0]), np.array([-118.0, -117.0]), 19)


def test_the_maps_edges_belong_to_it():
    # the printed limit is a hair beyond the exact one; 180 E ends the last column (as in mercantile)
    assert tuple(map(int, tiles.tile_at(85.05112878, 0, 5))) == (16, 0)
    assert tuple(map(int, tiles.tile_at([-85.05112878], [180.0], 5)[1])) == (31,)
    assert tiles.tile_at(0, [-180.0, 179.999, 180.0], 5)[0].tolist() == [0, 31, 31]
    for bad in (85.0512, -85.0512):
        with pytest.raises(tiles.OffTheMap):
            tiles.tile_at(bad, 0, 5)


def test_a_window_may_end_on_the_antimeridian_or_cross_it():
    size = 256 * 2**10
    ends = tiles.Window(10, size - 512, size // 2)
    assert ends.bounds[0] < ends.bounds[2] == 180.0 and ends.contains(-0.1, 179.9)
    starts = tiles.Window(10, 0, size // 2)
    assert starts.bounds[0] == -180.0 < starts.bounds[2] and starts.contains(-0.1, -179.9)
    crosses = tiles.window_at(-0.1, 180.0, 10)
    west, _, east, _ = crosses.bounds
    assert 179 < west < 180 and -180 < east < -179 and crosses.contains(-0.1, [179.9, 180.0, -179.9]).all()
    assert {x for x, _, _, _ in crosses.tiles()} == {1023, 0}
