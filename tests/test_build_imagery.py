"""The steps that make trips and windows: sources, regions, anchors, extents, resume, what has no imagery."""

import json

import build_case
import numpy as np
import pytest
from PIL import Image

from mmrstraj_jax import build
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
    for words, message in (
        (["--source", source, "--regions", "A=1:2:3"], "NAME=WEST:SOUTH:EAST:NORTH"),
        (["--source", source, "--quotas", "Singapore=99"], "99 trips asked for, 8 available"),
        (["--source", source, "--cleaning.min-length", "1e6"], "no usable trip; dropped"),
    ):
        with pytest.raises(UserError, match=message):
            run("e" + message[:3], *words)


def test_anchors_along_the_path_give_several_windows(world, tmp_path):
    trip = next(candidates.load(world / "city" / "trajectories"))
    dropped = {}
    config = windows.Imagery(provider="synthcity", anchor="along", step=200.0, zooms=(18, 19))
    found = list(windows._windows(trip, config, dropped))
    assert len({name for name, _, _ in found}) == len(found) == 2 * (int(trip.length // 200) + 1)
