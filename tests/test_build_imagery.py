"""The steps that make trips and windows: sources, regions, anchors, extents, resume, what has no imagery."""

import errno
import json
import shutil

import build_case
import numpy as np
import pytest
from PIL import Image

from mmrstraj_jax import build, jsonl
from mmrstraj_jax.construction import candidates, providers, tiles, windows
from mmrstraj_jax.construction.download import Downloader
from mmrstraj_jax.errors import UserError

SOURCE = ("--title", "Test tiles", "--attribution", "(c) nobody", "--licence", "CC0-1.0")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    build_case.write_world(root, trips=8)
    build.main(["trajectories", "--out", str(root / "city"), "--source", f"csv:{root}/trips.csv"])
    return root


def imagery(world, out, *words):
    options = ["--out", str(out), "--provider", "folder", "--tiles", str(world / "tiles"), *SOURCE, *words]
    (out / "trajectories").parent.mkdir(parents=True, exist_ok=True)
    if not (out / "trajectories").exists():
        (out / "trajectories").symlink_to(world / "city" / "trajectories")
    return build.main(["imagery", *options])


def records(out):
    return [json.loads(line) for line in (out / "imagery" / "images.jsonl").open()]


def test_windows_are_the_maps_pixels_around_a_fix_of_the_trip(world, tmp_path):
    trips = {trip.id: trip for trip in candidates.load(world / "city" / "trajectories")}
    ends = np.array([(trip.lat[-1], trip.lon[-1]) for trip in trips.values()]).T
    build_case.write_tiles(tmp_path / "ends", *ends)
    words = ("--tiles", str(tmp_path / "ends"), "--zooms", "18", "--size", "200", "--anchor", "destination")
    imagery(world, tmp_path, *words)
    found = records(tmp_path)
    assert len(found) == len(trips) == 8
    for record in found:
        window, trip = tiles.Window(**record["window"]), trips[record["trip"]]
        across, down = np.meshgrid(
            window.left + np.arange(window.width), window.top + np.arange(window.height)
        )
        image = np.asarray(Image.open(tmp_path / "imagery" / "images" / record["image"]))
        assert np.array_equal(image, build_case.pixel(across, down))
        x, y = window.pixels(trip.lat[-1], trip.lon[-1])
        assert abs(x - 100) <= 0.5 and abs(y - 100) <= 0.5 and record["anchor"]["index"] == len(trip) - 1
        assert record["track"]["points"] == int(window.contains(trip.lat, trip.lon).sum()) > 3
        beside = json.loads(
            (tmp_path / "imagery" / "images" / record["image"]).with_suffix(".json").read_bytes()
        )
        assert beside == record and beside["provider"]["attribution"] == "(c) nobody"


def test_a_killed_step_goes_on_and_gives_the_same(world, tmp_path, monkeypatch):
    words = ("--zooms", "18", "--size", "128")
    imagery(world, tmp_path / "straight", *words)
    asked = []
    real = providers.TileFolder.image

    def dies(self, window):
        asked.append(window)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(self, window)

    monkeypatch.setattr(providers.TileFolder, "image", dies)
    with pytest.raises(UserError, match="imagery: interrupted; the same command goes on"):
        imagery(world, tmp_path / "city", *words)
    (tmp_path / "city" / "imagery" / "images" / records(tmp_path / "straight")[0]["image"]).write_bytes(
        b"torn"
    )
    imagery(world, tmp_path / "city", *words)
    assert len(asked) == 8 + 2  # the one under way, and the torn one
    same = build_case.files(tmp_path / "city" / "imagery")
    assert same == build_case.files(tmp_path / "straight" / "imagery")


def test_what_has_no_imagery_is_counted_and_extents_hold_the_trip(world, tmp_path):
    with pytest.raises(UserError, match="no image for any trip.*no imagery"):
        imagery(world, tmp_path / "a", "--zooms", "19")
    for path in (tmp_path / "a").rglob("*"):
        assert path.suffix != ".png"
    # the extent of one trip, with its corners, as one image
    one = ["trajectories", "--out", str(tmp_path / "b"), "--source", f"csv:{world}/trips.csv", "--total", "1"]
    build.main(one)
    (trip,) = candidates.load(tmp_path / "b" / "trajectories")
    window = tiles.window_over(trip.lat, trip.lon, 18)
    for x, y, _, _ in window.tiles():
        path = tmp_path / "wide" / "18" / str(x) / f"{y}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        across, down = np.meshgrid(np.arange(256) + x * 256, np.arange(256) + y * 256)
        Image.fromarray(build_case.pixel(across, down)).save(path)
    options = ["--tiles", str(tmp_path / "wide"), "--zooms", "18", "--extent", "--draw-track"]
    imagery(world, tmp_path / "b", *options)
    (record,) = records(tmp_path / "b")
    assert tiles.Window(**record["window"]) == window and window.contains(trip.lat, trip.lon).all()
    assert record["track"]["share_of_trip"] == 1 and record["track_drawn"]
    image = np.asarray(Image.open(tmp_path / "b" / "imagery" / "images" / record["image"]))
    x, y = window.pixels(trip.lat, trip.lon)
    assert (image[y.astype(int), x.astype(int)] == [255, 40, 40]).all(1).mean() > 0.9


def test_large_extents_reach_the_scores_and_larger_ones_are_counted(tmp_path, monkeypatch):
    """Larger than what a server may send at a time, and than what training takes."""
    rows = [f"t,{1_500_000_000 + at * 10},{1.3 + at * 8e-4:.7f},{103.8 + at * 8e-4:.7f}" for at in range(36)]
    (tmp_path / "trips.csv").write_text("id,time,lat,lon\n" + "\n".join(rows) + "\n")
    build.main(["trajectories", "--out", str(tmp_path), "--source", f"csv:{tmp_path}/trips.csv"])
    monkeypatch.setattr(providers.TileFolder, "image", lambda self, window: textured(window))
    imagery(tmp_path, tmp_path, "--zooms", "18", "19", "--extent", "--tiles", str(tmp_path))
    (record,) = records(tmp_path)
    assert 4096**2 < record["window"]["width"] * record["window"]["height"] and record["window"]["zoom"] == 18
    counts = json.loads((tmp_path / "imagery" / "manifest.json").read_bytes())["counts"]
    assert counts["dropped"] == {"extent too large": 1}
    assert "expected at most 89478485 in all" in counts["first"]["extent too large"]
    build.main(["quality", "--out", str(tmp_path), "--min-score", "1", "--max-cloud", "1"])


def textured(window):
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    return np.tile(noise, (window.height // 256 + 1, window.width // 256 + 1, 1))[
        : window.height, : window.width
    ]


def test_synthcity_is_a_provider(tmp_path):
    provider = providers.provider_of(
        providers.ProviderSettings(provider="synthcity", city="3:1.3:103.8"), Downloader(None)
    )
    window = tiles.window_at(1.3, 103.8, 18, 96)
    image = provider.image(window)
    assert image.shape == (96, 96, 3) and image.std() > 5
    moved = tiles.Window(18, window.left + 32, window.top + 16, 64, 80)
    assert np.array_equal(provider.image(moved), image[16:, 32:])
    assert provider.source.licence and provider.source.attribution
    with pytest.raises(UserError, match="SEED:LAT:LON"):
        providers.provider_of(providers.ProviderSettings(provider="synthcity", city="x"), Downloader(None))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--provider", "bing"], "expected one of folder, xyz, google, earthengine, stac, synthcity"),
        (["--provider", "folder"], "--tiles: expected with"),
        (["--provider", "folder", "--tiles", ".", "--title", "x", "--attribution", "y"], "--licence"),
        (["--provider", "folder", "--tiles", "absent", *SOURCE], "no such folder"),
        (
            ["--provider", "xyz", "--tiles", "https://h/{z}/{x}/{y}?apikey=abc", *SOURCE],
            "would end up in files",
        ),
        (["--provider", "xyz", "--tiles", "https://h/{z}/{x}.png", *SOURCE], "expected {z}, {x}, {y}"),
        (["--provider", "synthcity", "--anchor", "middle"], "--anchor middle"),
    ],
)
def test_mistakes_are_one_line(world, words, message, tmp_path):
    with pytest.raises(UserError) as caught:
        build.main(["imagery", "--out", str(world / "city"), *words])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (world / "city" / "imagery" / "images").exists()


def test_sources_regions_and_quotas(world, tmp_path):
    def run(name, *words):
        build.main(["trajectories", "--out", str(tmp_path / name), *words])
        return json.loads((tmp_path / name / "trajectories" / "manifest.json").read_bytes())["counts"]

    source = f"csv:{world}/trips.csv"
    counts = run("a", "--source", source, "--regions", "South=103:1:104.5:1.305", "--inside-only")
    assert counts["kept"] == {"South": 4} and counts["trips"] == {"outside the regions": 4}
    assert counts["points_in"] == counts["points_out"] + sum(counts["points"].values())
    (tmp_path / "more.csv").write_text((world / "trips.csv").read_text())
    both = run("b", "--source", source, f"csv:{tmp_path}/more.csv", "--total", "10", "--seed", "3")
    assert both["candidates"] == 16 and both["kept"] == {"Singapore": 10}
    ids = [trip.id for trip in candidates.load(tmp_path / "b" / "trajectories")]
    assert len(set(ids)) == 10 and {id[0] for id in ids} == {"0", "1"}
    assert run("c", "--source", source, "--quotas", "Singapore=3")["kept"] == {"Singapore": 3}
    columns = (tmp_path / "named.csv", "when,y,x,who\n")
    body = (world / "trips.csv").read_text().splitlines()[1:81]
    columns[0].write_text(
        columns[1] + "\n".join(f"{t},{a},{o},{i}" for i, t, a, o in (r.split(",") for r in body))
    )
    found = run("d", "--source", f"csv:{columns[0]}", "--columns", "id=who", "time=when", "lat=y", "lon=x")
    assert found["kept"] == {"Singapore": 1}
    (tmp_path / "american.csv").write_text("id,time,lat,lon\n" + "a,12/31/2020 5:00 PM,1.3,103.8\n" * 2)
    for words, message in (
        (["--source", source, "--regions", "A=1:2:3"], "NAME=WEST:SOUTH:EAST:NORTH"),
        (["--source", source, "--quotas", "Singapore=99"], "99 trips asked for, 8 available"),
        (["--source", source, "--cleaning.min-length", "1e6"], "no usable trip; dropped"),
        (["--source", source, source], "expected each path once"),
        (["--source", f"csv:{tmp_path}/american.csv"], "'malformed row': 2.*'malformed row': .*csv: line 2'"),
        (["--source", f"geolife:{tmp_path}", "--columns", "time=t"], "--columns: goes with sources of the"),
    ):
        with pytest.raises(UserError, match=message):
            run("e" + message[:3], *words)


def test_anchors_along_the_path_give_several_windows(world, tmp_path):
    trip = next(candidates.load(world / "city" / "trajectories"))
    dropped = {}
    config = windows.Imagery(provider="synthcity", anchor="along", step=200.0, zooms=(18, 19))
    found = list(windows._windows(trip, config, dropped))
    assert len({name for name, _, _ in found}) == len(found) == 2 * (int(trip.length // 200) + 1)


def write_trips(path, *starts):
    """A drive of 900 m to the north from each place."""
    rows = ["id,time,lat,lon"]
    for number, (lat, lon) in enumerate(starts):
        rows += [f"t{number},{1_500_000_000 + at},{lat + at * 1e-4:.6f},{lon}" for at in range(80)]
    path.write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("words", [("--anchor", "destination"), ("--extent",)])
def test_one_trip_off_the_map_stops_nothing(tmp_path, words):
    # the second reaches the map's edge: its window would leave it; the third lies beyond
    write_trips(tmp_path / "trips.csv", (1.3, 103.8), (85.042, 10.0), (86.0, 10.0))
    source = ["--source", f"csv:{tmp_path}/trips.csv"]
    build.main(["trajectories", "--out", str(tmp_path), *source])
    counts = json.loads((tmp_path / "trajectories" / "manifest.json").read_bytes())["counts"]
    assert counts["points"]["off the map"] == 80 and counts["candidates"] == 2
    found = list(candidates.load(tmp_path / "trajectories"))
    for x, y in {
        (x, y) for trip in found for x, y in zip(*tiles.tile_at(trip.lat, trip.lon, 12), strict=True)
    }:
        for i, j in ((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
            tile = tmp_path / "tiles" / "12" / str(x + i) / f"{y + j}.png"
            tile.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (256, 256), (10, 20, 30)).save(tile)
    options = ["--provider", "folder", "--tiles", str(tmp_path / "tiles"), *SOURCE, "--size", "256", *words]
    build.main(["imagery", "--out", str(tmp_path), *options, "--zooms", "12"])
    counts = json.loads((tmp_path / "imagery" / "manifest.json").read_bytes())["counts"]
    if words[0] == "--extent":  # an extent is cut at the edge
        assert counts["dropped"] == {} and len(records(tmp_path)) == 2
    else:
        assert counts["dropped"] == {"off the map": 1} and "trip t1: window" in counts["first"]["off the map"]
        assert [record["trip"] for record in records(tmp_path)] == ["t0"]


def test_trips_of_an_older_build_that_reach_beyond_the_map_are_dropped(world, tmp_path):
    shutil.copytree(world / "city" / "trajectories", tmp_path / "trajectories")
    path = tmp_path / "trajectories" / "trips.jsonl"
    rows = [json.loads(line) for line in path.open()]
    rows[0]["lat"][-1] = 87.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    imagery(world, tmp_path, "--zooms", "18", "--size", "128")
    counts = json.loads((tmp_path / "imagery" / "manifest.json").read_bytes())["counts"]
    assert counts["dropped"] == {"off the map": 1} and len(records(tmp_path)) == 7
    build.main(["quality", "--out", str(tmp_path), "--place-zoom", "16", "--min-score", "2"])


@pytest.mark.parametrize("damage", [b"", b"<html>busy</html>", None])
def test_a_damaged_tile_costs_its_windows_only(world, tmp_path, damage, capsys):
    words = ("--zooms", "18", "--size", "128")
    imagery(world, tmp_path / "whole", *words)
    window = tiles.Window(**records(tmp_path / "whole")[0]["window"])
    shutil.copytree(world / "tiles", tmp_path / "tiles")
    x, y, _, _ = window.tiles()[0]
    path = tmp_path / "tiles" / "18" / str(x) / f"{y}.png"
    path.write_bytes(path.read_bytes()[:-200] if damage is None else damage)
    imagery(world, tmp_path / "harmed", *words, "--tiles", str(tmp_path / "tiles"))
    counts = json.loads((tmp_path / "harmed" / "imagery" / "manifest.json").read_bytes())["counts"]
    lost = counts["dropped"]["damaged tile"]
    assert lost >= 1 and len(records(tmp_path / "harmed")) == 8 - lost
    assert str(path) in counts["first"]["damaged tile"] and str(path) in capsys.readouterr().err


@pytest.mark.parametrize("sidecar", [b"", b"[]", b'{"sha256": "x"}', b"\xff\xfe"])
def test_a_damaged_record_is_made_again(world, tmp_path, sidecar):
    words = ("--zooms", "18", "--size", "128")
    imagery(world, tmp_path / "city", *words)
    expected = build_case.files(tmp_path / "city" / "imagery")
    folder = tmp_path / "city" / "imagery"
    path = (folder / "images" / records(tmp_path / "city")[0]["image"]).with_suffix(".json")
    # as after a kill: the manifest says unfinished
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"status": "unfinished"}))
    path.write_bytes(sidecar.replace(b"x", json.loads(path.read_bytes())["sha256"].encode()))
    imagery(world, tmp_path / "city", *words)
    assert build_case.files(folder) == expected


def test_a_temporary_file_of_the_first_write_does_not_block_the_folder(world, tmp_path):
    (tmp_path / "imagery").mkdir()
    (tmp_path / "imagery" / ".manifest.json.0badcafe").write_text("{")
    imagery(world, tmp_path, "--zooms", "18", "--size", "128")
    assert len(records(tmp_path)) == 8
    (tmp_path / "other" / "imagery").mkdir(parents=True)
    (tmp_path / "other" / "imagery" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds mine.txt"):
        imagery(world, tmp_path / "other", "--zooms", "18")


def test_a_file_system_without_locks_is_called_that(world, tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    for write in (lambda: imagery(world, tmp_path), lambda: jsonl.writer(tmp_path / "log").__enter__()):
        with pytest.raises(UserError, match="no file can be locked here .Function not implemented"):
            write()


def test_utc_can_be_said_where_the_format_has_its_own_clock(tmp_path):
    lines = [f"1,2008-02-02 15:36:{at:02d},116.{50000 + 20 * at},39.9" for at in range(60)]
    (tmp_path / "1.txt").write_text("\n".join(lines) + "\n")
    words = ["trajectories", "--source", f"tdrive:{tmp_path}/1.txt", "--cleaning.min-duration", "1"]
    times = []
    for name, more in (("a", []), ("b", ["--utc"])):
        build.main([*words, "--out", str(tmp_path / name), *more])
        (trip,) = candidates.load(tmp_path / name / "trajectories")
        times.append(trip.time[0])
    assert times[1] - times[0] == 8 * 3600
    with pytest.raises(UserError, match="--utc and --utc-offset"):
        build.main([*words, "--out", str(tmp_path / "c"), "--utc", "--utc-offset", "8"])
