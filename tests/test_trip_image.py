"""From a trip to its description: the window, the track, the scale, the GeoTIFF and the command."""

import dataclasses
import json
from pathlib import Path

import build_case
import numpy as np
import pytest
from PIL import Image

from mmrstraj_jax import generate
from mmrstraj_jax.construction import geotiff, ground, tiles, trip_image, windows
from mmrstraj_jax.construction.download import Downloader
from mmrstraj_jax.construction.trajectories import Anchor, Trajectory
from mmrstraj_jax.construction.trip_image import TripImage
from mmrstraj_jax.errors import UserError

LAT, LON = build_case.LAT, build_case.LON
HEAD = "Geolife trajectory\nWGS 84\nAltitude is in Feet\nReserved 3\n0,2,255,My Track,0,0,2,8421376\n0\n"


def write_plt(path: Path, lat, lon) -> Path:
    rows = [
        f"{a:.6f},{o:.6f},0,-777,39744.1,2008-10-23,02:{at // 60:02d}:{at % 60:02d}\n"
        for at, (a, o) in enumerate(zip(lat, lon, strict=True))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEAD + "".join(rows), newline="\r\n")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A drive of 700 m to the east that slows down at its end; one fix at 0, 0 and one 3 km off."""
    root = tmp_path_factory.mktemp("trip")
    lon = LON + np.concatenate([np.arange(60) * 11.0, 660 + np.arange(40) * 2.0]) / 111_195
    lat = np.full(len(lon), LAT)
    build_case.write_tiles(root / "tiles", lat, lon)
    lat[20], lon[20] = 0.0, 0.0
    lat[30] += 0.03
    write_plt(root / "003" / "Trajectory" / "trip.plt", lat, lon)
    return root


def settings(world, **changes) -> TripImage:
    terms = {"title": "Test tiles", "attribution": "(c) nobody", "licence": "CC0-1.0"}
    return TripImage(provider="folder", tiles=str(world / "tiles"), size=256, **terms | changes)


def made(world, tmp_path, **changes):
    path = tmp_path / "trip.png"
    record = trip_image.write(path, world / "003/Trajectory/trip.plt", settings(world, **changes))
    record = json.loads(json.dumps(record))  # tuples are lists in JSON
    assert record == json.loads(path.with_suffix(".json").read_text())
    return np.asarray(Image.open(path)), record


def map_pixels(window):
    x, y = np.meshgrid(np.arange(window["width"]), np.arange(window["height"]))
    return build_case.pixel(x + window["left"], y + window["top"])


def test_the_densest_window_pixel_for_pixel(world, tmp_path):
    image, record = made(world, tmp_path)
    assert np.array_equal(image, map_pixels(record["window"]))
    window = tiles.Window(**record["window"])
    assert window.contains(LAT, LON + 700 / 111_195)  # where the trip is slow
    assert not window.contains(LAT, LON)
    assert record["fixes"]["dropped"]["invalid position"] == 1 and record["fixes"]["used"] == 98
    assert record["shift_pixels"] < 0.01 and record["crs"] == "EPSG:3857"
    assert record["provider"]["attribution"] == "(c) nobody"


def test_the_extent_holds_all_but_wrong_fixes(world, tmp_path):
    image, record = made(world, tmp_path, extent=True, margin=10)
    window = tiles.Window(**record["window"])
    x, y = window.pixels(LAT, LON + np.array([0, 738]) / 111_195)
    assert x[0] == pytest.approx(10, abs=1.5) and x[1] == pytest.approx(window.width - 10, abs=1.5)
    assert window.height <= 22
    assert np.array_equal(image, map_pixels(record["window"]))


def test_an_extent_that_the_model_would_refuse_is_refused_before_it_is_loaded(world, tmp_path):
    at = np.arange(30)
    path = write_plt(tmp_path / "long.plt", LAT + at * 2e-3, LON + at * 2e-3)
    with pytest.raises(UserError, match="extent of .* at zoom 18: expected at most 89478485 in all"):
        trip_image.write(tmp_path / "o.png", path, settings(world, extent=True))


def test_the_track_is_drawn_where_the_trip_went(world, tmp_path):
    plain, _ = made(world, tmp_path)
    drawn, record = made(world, tmp_path, draw_track=True)
    y, x = np.nonzero((plain != drawn).any(-1))
    window = tiles.Window(**record["window"])
    row = window.pixels(LAT, LON)[1]
    assert record["track_drawn"] and len(x) > 100 and np.abs(y - row).max() <= 2.5


def test_one_of_several_trips_is_named(world, tmp_path):
    rows = [f"{name},{1000 + at},{LAT},{LON + at / 1e4:.5f}" for name in "ab" for at in range(20)]
    path = tmp_path / "trips.csv"
    path.write_text("id,time,lat,lon\n" + "\n".join(rows) + "\n")
    config = settings(world, format="csv")
    with pytest.raises(UserError, match=r"2 trips \(a, b\); expected one; name it with --trip"):
        trip_image.write(tmp_path / "o.png", path, config)
    with pytest.raises(UserError, match="none is 'c'"):
        trip_image.write(tmp_path / "o.png", path, dataclasses.replace(config, trip="c"))
    with pytest.raises(UserError, match="--columns time: expected FIELD=COLUMN"):
        trip_image.write(tmp_path / "o.png", path, dataclasses.replace(config, columns=("time",)))
    record = trip_image.write(tmp_path / "o.png", path, dataclasses.replace(config, trip="b"))
    assert record["trip"] == "b" and record["fixes"]["read"] == 20


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("size", -5, "--size -5: expected 1 to 16384"),
        ("size", 0, "--size 0: expected 1 to 16384"),
        ("margin", -1, "--margin -1: expected 0 to 16384"),
        ("zoom", 30, "--zoom 30: expected 0 to 24"),
        ("interval", -1.0, "--interval -1.0: expected 0 or more"),
    ],
)
def test_numbers_out_of_range_are_named(name, value, message):
    with pytest.raises(UserError, match=message):
        TripImage(**{name: value})


def test_a_trip_without_good_fixes_says_what_was_dropped(world, tmp_path):
    path = write_plt(tmp_path / "null.plt", np.zeros(9), np.zeros(9))
    with pytest.raises(UserError, match="no usable fix of trip .*'invalid position': 9"):
        trip_image.write(tmp_path / "o.png", path, settings(world))


# ---- one scale ----


def test_windows_of_512_pixels_need_no_correction():
    for lat in (0.0, 34.05, 60.0, -80.0):
        for zoom in (17, 18, 19):
            assert ground.shift(tiles.window_at(lat, 10.0, zoom)) < 0.02


def test_a_tall_extent_comes_to_one_scale():
    x, y = tiles.world_pixel(60.0, 10.0, 15)
    window = tiles.Window(15, int(x), int(y), 301, 4000)  # 9.6 km
    assert 1.0 < ground.shift(window) < 2.0
    lines = np.arange(4000)
    image = np.stack([lines % 251, lines // 251, lines * 0], -1).astype(np.uint8)
    image = np.repeat(image[:, None], 301, 1)
    image[..., 2] = np.abs(np.arange(301) - 150)[None]  # pixels from the middle column
    result, place = ground.one_scale(image, window)
    west, gsd, _, north, _, down = place["transform"]
    assert gsd == -down == window.gsd and place["crs"].startswith("+proj=sinu +lon_0=10.")
    for row in (0, 700, len(result) // 2, len(result) - 1):
        latitude = np.degrees((north + (row + 0.5) * down) / tiles.MERCATOR_RADIUS)
        source = tiles.world_pixel(latitude, 10.0, 15)[1] - window.top - 0.5
        found = result[row, 0, 0] + 251.0 * result[row, 0, 1]
        if 0 < source < 3999 and source % 251 < 249:  # between two counts of 251 bytes blend
            assert abs(found - source) <= 0.51
        # a metre is as many pixels in every row
        longitude = west / (tiles.MERCATOR_RADIUS * np.cos(np.radians(latitude)))
        edge = np.degrees(abs(longitude)) / 360 * 256 * 2**15
        assert abs(float(result[row, 0, 2]) - min(edge, 150)) <= 1.0
    middle = len(result) // 2
    assert np.array_equal(result[middle, :, 2], image[0, :, 2])
    assert (
        abs(len(result) * window.gsd - 6378137 * np.radians(window.bounds[3] - window.bounds[1])) < window.gsd
    )


def test_the_record_of_a_corrected_extent(world, tmp_path, monkeypatch):
    monkeypatch.setattr(ground, "LARGEST_SHIFT", -1.0)
    image, record = made(world, tmp_path, extent=True)
    assert record["crs"].startswith("+proj=sinu") and record["corrected_from"] == "EPSG:3857"
    assert image.shape[1] == record["window"]["width"]
    assert record["sha256"] == trip_image.sha256(tmp_path / "trip.png")


# ---- GeoTIFF ----


def test_the_geotiff_has_no_track(world, tmp_path):
    image, record = made(world, tmp_path, geotiff=True, draw_track=True)
    with Image.open(tmp_path / "trip.tif") as file:
        assert np.array_equal(np.asarray(file), map_pixels(record["window"]))
    assert not np.array_equal(image, map_pixels(record["window"]))


def test_geotiff_tags(world, tmp_path):
    image, record = made(world, tmp_path, geotiff=True)
    with Image.open(tmp_path / "trip.tif") as file:
        assert np.array_equal(np.asarray(file), image)
        scale, tie, keys = (file.tag_v2[tag] for tag in (33550, 33922, 34735))
    west, pixel, _, north, _, _ = record["transform"]
    assert scale == (pixel, pixel, 0.0) and tie == (0.0, 0.0, 0.0, west, north, 0.0)
    assert keys[:4] == (1, 1, 1, 4)
    entries = {keys[at]: keys[at + 1 : at + 4] for at in range(4, len(keys), 4)}
    assert list(entries) == sorted(entries)  # the standard asks for ascending keys
    assert entries == {1024: (0, 1, 1), 1025: (0, 1, 1), 3072: (0, 1, 3857), 3076: (0, 1, 9001)}
    try:
        import rasterio
    except ImportError:  # an extra: GDAL's own reading of the tags is compared where it is installed
        pass
    else:
        with rasterio.open(tmp_path / "trip.tif") as file:
            assert file.crs == "EPSG:3857" and file.transform.to_gdal() == tuple(record["transform"])
    with pytest.raises(UserError, match="expected 256 x 256 RGB"):
        geotiff.write(tmp_path / "a.tif", image[1:], tiles.Window(**record["window"]))


def test_the_build_writes_one_beside_each_image(world, tmp_path):
    provider = trip_image.provider_of(settings(world), Downloader(None))
    lat, lon = np.full(9, LAT), LON + np.arange(9) / 1e4
    trip = Trajectory("a", np.arange(9.0), lat, lon)
    window = tiles.window_at(LAT, LON + 4e-4, 18, 64)
    config = windows.Imagery(geotiff=True, draw_track=True)
    windows._image(tmp_path / "a.png", provider, trip, window, Anchor(LAT, LON, 4, "centroid"), config)
    with Image.open(tmp_path / "a.tif") as file:  # without the track
        assert np.array_equal(np.asarray(file), map_pixels(dataclasses.asdict(window)))


# ---- the command ----


class Stub:
    """Says what it was asked."""

    def generate(self, messages, images, stream, **decode):
        answer = f"{len(images)} image of {Image.open(images[0]).size}"
        stream(answer)
        return answer


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setattr("mmrstraj_jax.api.load", lambda *_, **__: Stub())


TERMS = ["--title", "T", "--attribution", "A", "--licence", "L"]


def test_from_a_trip_to_a_description(world, tmp_path, loaded, capsys):
    trip = write_plt(tmp_path / "a.plt", 45 + np.arange(30) * 1e-4, np.full(30, 8.0))
    words = ["--weights", "w", "--trajectory", str(trip), "--out", str(tmp_path / "out")]
    words += ["--provider", "synthcity", "--zoom", "17", "--size", "128", "--draw-track", "--geotiff"]
    assert generate.main(words) == 0
    printed = capsys.readouterr()
    assert printed.out == "1 image of (128, 128)\n" and "30 of 30 fixes used" in printed.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a.png",
        "a.json",
        "a.tif",
        "a.answer.json",
    }
    answer = json.loads((tmp_path / "out/a.answer.json").read_text())
    assert answer["image"] == "a.png" and answer["decode"]["temperature"] == 0.0
    assert [turn["text"] for turn in answer["turns"]] == [generate.TRIP_PROMPT, "1 image of (128, 128)"]
    pixels = np.asarray(Image.open(tmp_path / "out/a.png")).astype(int)
    assert (np.abs(pixels - (255, 40, 40)).sum(-1) == 0).sum() > 100 and pixels.std() > 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trajectory", "a.plt"], "--trajectory FILE and --out DIR"),
        (["--zoom", "17", "--prompt", "Q"], "--zoom: goes with --trajectory FILE"),
        (["--trajectory", "a.plt", "--out", "o", "--image", "b.png"], "expected one of these"),
        (["--trajectory", "no.plt", "--out", "o", "--provider", "synthcity"], "no.plt: no such file"),
        (["--trajectory", __file__, "--out", "o"], "expected --format, one of geolife"),
        (["--trajectory", __file__, "--format", "geolife", "--out", "o"], "expected 'Geolife trajectory'"),
    ],
)
def test_wrong_words_are_named(loaded, words, message):
    with pytest.raises(UserError, match=message) as error:
        generate.main(["--weights", "w", *words])
    assert "\n" not in str(error.value)


def test_an_unknown_provider_or_missing_imagery(world, tmp_path, loaded):
    trip = str(world / "003/Trajectory/trip.plt")
    words = ["--weights", "w", "--trajectory", trip, "--out", str(tmp_path / "o")]
    with pytest.raises(UserError, match="--provider '': expected one of folder"):
        generate.main(words)
    with pytest.raises(UserError, match="the window needs this tile"):
        more = ["--provider", "folder", "--tiles", str(world / "tiles"), *TERMS, "--zoom", "19"]
        generate.main([*words, *more])
    assert not (tmp_path / "o").exists()


def test_every_option_has_a_help():
    assert trip_image.HELP.keys() == {field.name for field in dataclasses.fields(TripImage)}
