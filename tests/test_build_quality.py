"""Scores, rejection, duplicates and the split by place, on defects planted one by one."""

import json
import shutil

import build_case
import numpy as np
import pytest
from PIL import Image, ImageFilter

from mmrstraj_jax import build, jsonl
from mmrstraj_jax.construction import quality, rsi_traffic, selection
from mmrstraj_jax.construction.files import sha256
from mmrstraj_jax.construction.tiles import Window, tile_at, window_at
from mmrstraj_jax.construction.trajectories import Trajectory
from mmrstraj_jax.errors import UserError

WINDOW = window_at(1.3, 103.8, 18, 128)


def picture(side=128):
    across, down = np.meshgrid(np.arange(side), np.arange(side))
    return build_case.pixel(across, down)


def blurred(radius):
    return np.asarray(Image.fromarray(picture()).filter(ImageFilter.GaussianBlur(radius)))


def hazy(share):
    return np.asarray(
        Image.blend(Image.fromarray(picture()), Image.new("RGB", (128, 128), (225, 225, 225)), share)
    )


def test_scores_fall_with_blur_and_haze():
    clarity = [
        quality.image_scores(quality.measure(image))["clarity"] for image in map(blurred, (0, 1, 2, 4))
    ]
    assert clarity == sorted(clarity, reverse=True) and clarity[0] > 8 and clarity[-1] < 2
    readability = [quality.image_scores(quality.measure(hazy(s)))["readability"] for s in (0, 0.4, 0.8)]
    assert readability == sorted(readability, reverse=True) and readability[0] > 7 and readability[-1] < 2
    assert quality.measure(np.full((64, 64, 3), 240, np.uint8)).flat == 1.0
    cloud = picture().copy()
    cloud[:, :64] = 235
    assert 0.45 < quality.measure(cloud).cloud < 0.55
    for image in (picture(), blurred(4), hazy(0.9), np.zeros((5, 300, 3), np.uint8)):
        assert all(1 <= value <= 10 for value in quality.image_scores(quality.measure(image)).values())


def trip(east, north):
    """Fixes at metres from the window's middle, one a second."""
    lat = 1.3 + np.asarray(north) / 111_195
    lon = 103.8 + np.asarray(east) / (111_195 * np.cos(np.radians(1.3)))
    return Trajectory("t", np.arange(len(lat)) * 1.0, lat, lon)


def test_density_and_structure_grow_with_what_is_driven():
    line, zeros = np.linspace(-38, 38, 40), np.zeros(40)
    one = quality.crossing(trip(line, zeros), WINDOW)
    two = one + quality.crossing(trip(zeros, line), WINDOW)
    assert abs(one.sum() - 76) < 3 and (one.sum((0, 1)) > 0).sum() == 1
    nothing = np.zeros((8, 8, 4))
    scores = [quality.density_score(network, WINDOW) for network in (nothing, one, two, 20 * one)]
    assert scores == sorted(scores) and scores[0] == 1 and 4.5 < scores[1] <= 5 and scores[3] == 10
    structure = [quality.structure_score(network) for network in (nothing, one, two)]
    assert structure == sorted(structure) and structure[0] == 1 and structure[2] >= structure[1] + 1
    assert quality.structure_score(20 * one) == structure[1]  # more of the same road is no network


def test_drift_and_noise_are_told_from_a_drive():
    rng = np.random.default_rng(0)
    line = np.linspace(-30, 30, 40)
    assert quality.wanders(trip(line, np.sin(line / 8) * 10), WINDOW) == ""
    there_and_back = np.concatenate([line, line[::-1]])
    assert quality.wanders(trip(there_and_back, np.zeros(80)), WINDOW) == ""
    assert quality.wanders(trip(rng.normal(0, 4, 200), rng.normal(0, 4, 200)), WINDOW) == "drift"
    assert quality.wanders(trip(line + rng.normal(0, 6, 40), rng.normal(0, 6, 40)), WINDOW) == "noise"
    assert quality.wanders(trip(line[:5], line[:5]), WINDOW) == ""  # too few fixes to tell


def test_duplicates_by_perceptual_hash():
    rng = np.random.default_rng(1)
    images = [
        np.asarray(Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((64, 64)))
        for _ in range(6)
    ]
    brighter = np.clip(images[2].astype(int) + 12, 0, 255).astype(np.uint8)
    softened = np.asarray(Image.fromarray(images[4]).filter(ImageFilter.GaussianBlur(1)))
    hashes = np.array([quality.perceptual_hash(image) for image in [*images, brighter, softened]])
    assert quality.duplicates(hashes, 20) == [-1] * 6 + [2, 4]
    assert quality.duplicates(np.zeros((0, 256), bool), 8) == []


def test_windows_of_different_zooms_overlap_or_not():
    a = window_at(1.3, 103.8, 18, 512)
    assert selection.overlap(a, window_at(1.3, 103.8, 19, 512)) and selection.overlap(
        window_at(1.3, 103.8, 19, 512), a
    )
    assert not selection.overlap(a, Window(18, a.left + 512, a.top)) and selection.overlap(
        a, Window(18, a.left + 511, a.top)
    )
    assert not selection.overlap(a, Window(18, a.left, a.top - 512))
    size = 256 * 2**18
    assert selection.overlap(Window(18, size - 100, 5000), Window(18, 0, 5000))
    assert not selection.overlap(Window(18, size - 600, 5000), Window(18, 0, 5000))


@pytest.mark.parametrize(("test_share", "val_share"), [(0.2, 0.0), (0.3, 0.2)])
def test_no_held_out_window_overlaps_a_training_one(test_share, val_share):
    """1,500 windows strewn over a few kilometres: overlaps are the rule."""
    rng = np.random.default_rng(2)
    rows, places = [], {}
    for number in range(1500):
        lat, lon = 1.3 + rng.normal(0, 0.01), 103.8 + rng.normal(0, 0.01)
        places[str(number)] = window_at(lat, lon, int(rng.integers(18, 20)), 256)
        rows.append({"id": str(number), "region": "A" if number % 2 else "B", "rejected": "", "split": ""})
    config = selection.Quality(test_share=test_share, val_share=val_share, place_zoom=16)
    selection._split(rows, places, config)
    groups = {
        split: [places[r["id"]] for r in rows if r["split"] == split] for split in ("train", "val", "test")
    }
    assert abs(len(groups["test"]) / 1500 - test_share) < 0.05 and len(groups["train"]) > 300
    assert bool(groups["val"]) == bool(val_share)
    for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
        assert not any(selection.overlap(a, b) for a in groups[one] for b in groups[other])
    assert {row["rejected"] for row in rows if not row["split"]} == {"overlaps a held-out window"}
    again = [dict(row, rejected="", split="") for row in rows][::-1]
    selection._split(again, places, config)
    assert {r["id"]: r["split"] for r in again} == {r["id"]: r["split"] for r in rows}


def test_a_place_on_the_border_of_two_regions_is_in_one_split():
    rows, places = [], {}
    for number in range(400):
        places[f"{number:03d}"] = window_at(1.3 + number // 20 * 0.003, 103.8 + number % 20 * 0.003, 18, 128)
        rows.append({"id": f"{number:03d}", "region": "AB"[number % 2], "rejected": "", "split": ""})
    config = selection.Quality(test_share=0.3, place_zoom=14)
    selection._split(rows, places, config)
    splits = {}
    for row in rows:
        cell = tuple(map(int, tile_at(*places[row["id"]].center, 14)))
        splits.setdefault(cell, set()).add(row["split"])
    assert len(splits) > 6 and {"train"} in splits.values() and {"test"} in splits.values()
    assert all(len(found - {""}) == 1 for found in splits.values())


def test_planted_defects_are_rejected_with_their_reason_and_people_overrule(tmp_path):
    build_case.write_world(tmp_path, trips=8)
    (tmp_path / "city.toml").write_text(build_case.config(tmp_path, "http://127.0.0.1:1").read_text())
    words = ["--out", str(tmp_path / "city"), "--config", str(tmp_path / "city.toml")]
    for step in ("trajectories", "imagery"):
        build.main([step, *words])
    index = tmp_path / "city" / "imagery" / "images.jsonl"
    records = [json.loads(line) for line in index.open()]
    folder = tmp_path / "city" / "imagery" / "images"
    rng = np.random.default_rng(3)
    defects = {
        "blank": np.full((128, 128, 3), 30, np.uint8),
        "cloud": np.clip(rng.normal(228, 9, (128, 128, 1)), 200, 255).astype(np.uint8).repeat(3, 2),
        "blurred": blurred(6),
        "duplicate": np.asarray(Image.open(folder / records[7]["image"])),
    }
    for record, image in zip(records, defects.values(), strict=False):
        Image.fromarray(image).save(folder / record["image"])
        record["sha256"] = sha256(folder / record["image"])
    index.write_text("".join(map(jsonl.dump, records)))
    out, people = tmp_path / "scored", tmp_path / "people.jsonl"
    low = dict.fromkeys(quality.AXES, 1)
    given = [{"id": records[4]["id"], "reviewer": name} | low for name in ("ann", "bo")]
    given.append({"id": records[5]["id"], "reviewer": "ann", "clarity": 3.5})
    people.write_text("".join(json.dumps(row) + "\n" for row in given))
    config = selection.Quality(people=str(people), place_zoom=16, min_score=2.0)
    selection.run(out, tmp_path / "city" / "trajectories", tmp_path / "city" / "imagery", config)
    rows = [json.loads(line) for line in (out / "scores.jsonl").open()]
    rejected = [row["rejected"] for row in rows]
    assert rejected[:3] == ["blank", "cloud", "blurred"] and rejected[4] == "low score"
    assert sorted([rejected[3], rejected[7]]) == ["", "duplicate"]
    assert rows[4]["scored_by"] == ["ann", "bo"] and rows[4]["score"] == 1
    assert (
        rows[5]["scores"]["clarity"] == 3.5 and rows[5]["scored_by"] == ["ann"] and rows[6]["scored_by"] == []
    )
    counts = json.loads((out / "manifest.json").read_bytes())["counts"]
    assert counts["rejected"]["blank"] == 1 and sum(counts["splits"].values()) == rejected.count("")
    people.write_text(json.dumps({"id": "nobody", "reviewer": "ann", "clarity": 3}) + "\n")
    with pytest.raises(UserError, match="line 1: expected an image id"):
        selection.run(
            tmp_path / "b", tmp_path / "city" / "trajectories", tmp_path / "city" / "imagery", config
        )


def test_steps_made_from_other_trips_or_images_are_refused(tmp_path):
    build_case.write_world(tmp_path, trips=8)
    words = [
        "--out",
        str(tmp_path / "city"),
        "--config",
        str(build_case.config(tmp_path, "http://127.0.0.1:1")),
    ]
    for step in ("trajectories", "imagery", "quality"):
        build.main([step, *words])
    for folder, more in (("imagery", ["--size", "100"]), ("trajectories", ["--total", "3"])):
        shutil.rmtree(tmp_path / "city" / folder)
        build.main([folder, *words, *more])
        step = "rsi-traffic" if folder == "imagery" else "quality"
        with pytest.raises(UserError, match="was made from another .*jsonl; remove .* and run"):
            build.main([step, *words])


def test_a_users_last_row_counts_without_its_line_break(tmp_path):
    people = [{"id": "a", "reviewer": "r", "clarity": 3}, {"id": "b", "reviewer": "r", "clarity": 4}]
    path = tmp_path / "people.jsonl"
    path.write_text("\n".join(map(json.dumps, people)))
    assert selection._people(path, {"a", "b"}).keys() == {"a", "b"}
    path.write_text("\n".join(json.dumps({"id": name, "road": "x"}) for name in "ab"))
    assert rsi_traffic._context(path) == {"a": {"road": "x"}, "b": {"road": "x"}}
    # a line that breaks off is no row: in a file of ours it was being written, here somebody has to look
    path.write_text('{"id": "a", "road": "x"}\n{"id": "b", "ro')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        rsi_traffic._context(path)
    assert jsonl.read(path) == [{"id": "a", "road": "x"}]
