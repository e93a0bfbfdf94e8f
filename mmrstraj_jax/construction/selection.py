"""Step `quality`: images are scored, unusable ones rejected with a reason, the rest split by place.

No held-out window overlaps a training one: places are map tiles of one zoom, whole places are held out, and
a training window that reaches into a held-out window is dropped.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmrstraj_jax import jsonl
from mmrstraj_jax.construction import candidates, quality, tiles, windows
from mmrstraj_jax.construction.files import lines_writer, read_lines, sha256
from mmrstraj_jax.construction.imagery import decode
from mmrstraj_jax.construction.manifest import Step, finished
from mmrstraj_jax.construction.ranges import check
from mmrstraj_jax.errors import UserError

SCORES = "scores.jsonl"
_MEASURES = "measures.jsonl"  # a row per measured image: a killed run does not measure it again
_GRID = 15  # zoom of the tiles by which windows and trips find each other


@dataclass(frozen=True)
class Quality:
    """Settings of the step. The paper's cut is unknown; the averages of its Table 1 put it at 6 or below."""

    min_score: float = 4.0  # mean of the four axes, 1 to 10
    people: str = (
        ""  # JSON Lines of {id, reviewer, readability, clarity, density, structure}: replace computed
    )
    max_cloud: float = 0.3
    max_flat: float = 0.9
    max_blur: float = 0.7
    min_points: int = 2  # fixes inside the window
    duplicate_bits: int = 8  # of 256: images that differ in at most so many are one
    test_share: float = 0.1
    val_share: float = 0.0
    place_zoom: int = 14  # of the map tiles that are held out whole: about 2 km at the equator
    seed: int = 0

    def __post_init__(self):
        check(self, 0, 10, "min_score")
        check(self, 0, 1, "max_cloud", "max_flat", "max_blur")
        check(self, 0, math.inf, "min_points")
        check(self, 0, 256, "duplicate_bits")
        check(self, 0, tiles.MAX_ZOOM, "place_zoom")
        if not (self.test_share >= 0 and self.val_share >= 0 and self.test_share + self.val_share < 1):
            raise UserError(
                f"--test-share {self.test_share}, --val-share {self.val_share}: expected 0 to below 1, "
                "also in sum"
            )


def run(folder: Path, trips: Path, imagery: Path, config: Quality) -> None:
    """Writes scores.jsonl: every image with measures, scores, and a split or the reason of its rejection.

    Raises UserError: bad settings or scores, unfinished steps, or no image that is left for training.
    """
    finished(trips, "trajectories")
    finished(imagery, "imagery", trips=trips / candidates.TRIPS)
    inputs = {"images": imagery / windows.INDEX, "trips": trips / candidates.TRIPS}
    inputs |= {"people": Path(config.people)} if config.people else {}
    with Step(folder, "quality", config, inputs) as step:
        if step.done:
            return
        records = list(read_lines(imagery / windows.INDEX))
        people = _people(Path(config.people), {r["id"] for r in records}) if config.people else {}
        measured = _measure(folder / _MEASURES, imagery, records)
        places = {record["id"]: tiles.Window(**record["window"]) for record in records}
        network, wandering = _traffic(candidates.load(trips), records, places)
        rows = [
            _row(record, places[record["id"]], measured[record["id"]], network, wandering, people)
            for record in records
        ]
        _reject(rows, measured, config)
        _split(rows, places, config)
        with lines_writer(folder / SCORES) as write:
            for row in rows:
                write(row)
        splits = Counter(row["split"] for row in rows if row["split"])
        if not splits["train"]:
            reasons = dict(Counter(row["rejected"] for row in rows))
            raise UserError(f"{folder}: no image is left for training; rejected: {reasons}")
        step.finish(_counts(rows, splits), [folder / SCORES])


def accepted(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of the images that a finished step kept."""
    return (row for row in read_lines(folder / SCORES) if row["split"])


def _people(path: Path, ids: set[str]) -> dict[str, dict[str, Any]]:
    """{image: {axis: mean score, "by": reviewers}}."""
    found: dict[str, list[dict]] = defaultdict(list)
    for number, row in enumerate(jsonl.read(path, log=False), 1):
        scores = {axis: row[axis] for axis in quality.AXES if axis in row}
        good = all(type(v) in (int, float) and 1 <= v <= 10 for v in scores.values())
        if row.get("id") not in ids or not isinstance(row.get("reviewer"), str) or not scores or not good:
            raise UserError(
                f"{path}: line {number}: expected an image id, a reviewer, and scores of 1 to 10 for some "
                f"of {', '.join(quality.AXES)}"
            )
        found[row["id"]].append(scores | {"by": row["reviewer"]})
    merged = {}
    for id, given in found.items():
        axes = {axis: [scores[axis] for scores in given if axis in scores] for axis in quality.AXES}
        merged[id] = {axis: round(sum(v) / len(v), 2) for axis, v in axes.items() if v}
        merged[id]["by"] = sorted({scores["by"] for scores in given})
    return merged


def _measure(path: Path, imagery: Path, records: list[dict]) -> dict[str, dict[str, Any]]:
    with jsonl.writer(path) as file:
        known = {row["sha256"]: row for row in jsonl.read(path)}
        for record in tqdm(records, "quality", unit=" images", disable=None):
            if record["sha256"] in known:
                continue
            place = imagery / "images" / record["image"]
            if not place.is_file() or sha256(place) != record["sha256"]:
                raise UserError(f"{place}: missing or changed since it was made; build the imagery again")
            pixels = decode(place.read_bytes(), str(place), max_pixels=windows.MAX_PIXELS)
            bits = np.packbits(quality.perceptual_hash(pixels)).tobytes().hex()
            row = {"sha256": record["sha256"], "hash": bits}
            row |= {"measures": quality.to_dict(quality.measure(pixels))}
            known[record["sha256"]] = row
            jsonl.append(file, row)
    return {record["id"]: known[record["sha256"]] for record in records}


def _traffic(trips, records: list[dict], places: Mapping[str, tiles.Window]):
    """What all trips drive in each window, and whether its own trip wanders there."""
    near = defaultdict(list)
    for id, window in places.items():
        for cell in _cells(window):
            near[cell].append(id)
    own = defaultdict(list)
    for record in records:
        own[record["trip"]].append(record["id"])
    network = defaultdict(lambda: np.zeros((8, 8, 4)))
    wandering = {}
    for trip in trips:
        if not tiles.on_map(trip.lat).all():
            continue  # its imagery was dropped as "off the map"
        x, y = tiles.tile_at(trip.lat, trip.lon, _GRID)
        cells = set(zip(np.atleast_1d(x).tolist(), np.atleast_1d(y).tolist(), strict=True))
        for id in {id for cell in cells for id in near.get(cell, ())}:
            network[id] += quality.crossing(trip, places[id])
        for id in own[trip.id]:
            wandering[id] = quality.wanders(trip, places[id])
    return network, wandering


def _cells(window: tiles.Window, zoom: int = _GRID) -> set[tuple[int, int]]:
    """Map tiles of a zoom that a window touches."""
    shift = window.zoom - zoom
    # a tile of the coarser zoom is 256 * 2^shift of the window's pixels; of a finer one, less
    scale = 256 * 2.0**shift
    x = range(int(window.left // scale), int((window.left + window.width - 1) // scale) + 1)
    y = range(int(window.top // scale), int((window.top + window.height - 1) // scale) + 1)
    return {(column % 2**zoom, row) for column in x for row in y}


def _row(record: dict, window: tiles.Window, measured: dict, network, wandering, people) -> dict[str, Any]:
    found = quality.Measures(**measured["measures"])
    scores = quality.image_scores(found)
    scores["density"] = quality.density_score(network[record["id"]], window)
    scores["structure"] = quality.structure_score(network[record["id"]])
    judged = dict(people.get(record["id"], {}))
    by = judged.pop("by", [])
    scores |= judged
    row = {"id": record["id"], "image": record["image"], "trip": record["trip"], "region": record["region"]}
    row |= {"zoom": window.zoom, "gsd_metres": record["gsd_metres"], "points": record["track"]["points"]}
    row |= {"measures": measured["measures"], "scores": scores, "scored_by": by}
    mean = round(sum(scores[axis] for axis in quality.AXES) / len(quality.AXES), 2)
    return row | {"score": mean, "wanders": wandering[record["id"]], "rejected": "", "split": ""}


def _reject(rows: list[dict], measured: Mapping[str, dict], config: Quality) -> None:
    """The first reason that applies; duplicates are looked for among what is left, best scores first."""
    for row in rows:
        found = quality.Measures(**row["measures"])
        reasons = (
            ("blank", found.flat > config.max_flat),
            ("cloud", found.cloud > config.max_cloud),
            ("blurred", found.blur > config.max_blur),
            ("too few fixes inside", row["points"] < config.min_points),
            (row["wanders"], bool(row["wanders"])),
            ("low score", row["score"] < config.min_score),
        )
        row["rejected"] = next((reason for reason, applies in reasons if applies), "")
    left = sorted((row for row in rows if not row["rejected"]), key=lambda row: (-row["score"], row["id"]))
    bits = [
        np.unpackbits(np.frombuffer(bytes.fromhex(measured[row["id"]]["hash"]), np.uint8)) for row in left
    ]
    for row, first in zip(left, quality.duplicates(np.array(bits), config.duplicate_bits), strict=True):
        if first >= 0:
            row["rejected"], row["duplicate_of"] = "duplicate", left[first]["id"]


def _split(rows: list[dict], places: Mapping[str, tiles.Window], config: Quality) -> None:
    """Holds out whole places of each region until the shares are reached, the places in a seeded order."""
    groups: dict[str, dict[tuple, list[dict]]] = defaultdict(lambda: defaultdict(list))
    owner: dict[tuple, str] = {}  # a place on the border of two regions counts for one: it is held out whole
    for row in sorted(rows, key=lambda row: row["id"]):
        if not row["rejected"]:
            lat, lon = places[row["id"]].center
            x, y = tiles.tile_at(lat, lon, config.place_zoom)
            cell = (int(x), int(y))
            groups[owner.setdefault(cell, row["region"])][cell].append(row)
    for region, cells in groups.items():
        total = sum(map(len, cells.values()))
        order = sorted(cells, key=lambda c: hashlib.sha256(f"{config.seed}\0{region}\0{c}".encode()).digest())
        held = 0
        for cell in order:
            # a place is held out if that brings the share nearer to what was asked for
            middle = held + len(cells[cell]) / 2
            split = (
                "test"
                if middle <= config.test_share * total
                else "val"
                if middle <= (config.test_share + config.val_share) * total
                else "train"
            )
            held += len(cells[cell]) if split != "train" else 0
            for row in cells[cell]:
                row["split"] = split
    _separate(rows, places)


def _separate(rows: list[dict], places: Mapping[str, tiles.Window]) -> None:
    """Drops validation windows that overlap a test window, and training windows that overlap either."""
    kept: dict[tuple, list[tiles.Window]] = defaultdict(list)
    for split in ("test", "val", "train"):
        mine = [row for row in rows if row["split"] == split]
        for row in mine:
            if any(overlap(places[row["id"]], other) for other in _near(places[row["id"]], kept)):
                row["rejected"], row["split"] = "overlaps a held-out window", ""
        for row in mine:
            if row["split"] and split != "train":
                for cell in _cells(places[row["id"]]):
                    kept[cell].append(places[row["id"]])


def _near(window: tiles.Window, kept: Mapping[tuple, list[tiles.Window]]) -> Iterable[tiles.Window]:
    return (other for cell in _cells(window) for other in kept.get(cell, ()))


def overlap(one: tiles.Window, other: tiles.Window) -> bool:
    """Whether two windows of any zooms share ground."""
    fine, coarse = (one, other) if one.zoom >= other.zoom else (other, one)
    scale, world = 2 ** (fine.zoom - coarse.zoom), 256 * 2**fine.zoom
    left, width = coarse.left * scale, coarse.width * scale
    # either may reach over the antimeridian
    across = (fine.left - left) % world < width or (left - fine.left) % world < fine.width
    top = coarse.top * scale
    return across and fine.top < top + coarse.height * scale and top < fine.top + fine.height


def _counts(rows: list[dict], splits: Counter) -> dict[str, Any]:
    """As in the paper's Table 1: images and mean score of each region, and why the others went."""
    regions = {}
    for region in sorted({row["region"] for row in rows}):
        mine = [row for row in rows if row["region"] == region and row["split"]]
        zooms = Counter(f"zoom {row['zoom']}" for row in mine)
        mean = round(sum(row["score"] for row in mine) / len(mine), 2) if mine else None
        regions[region or "elsewhere"] = {"images": len(mine), "score": mean} | dict(sorted(zooms.items()))
    rejected = Counter(row["rejected"] for row in rows if row["rejected"])
    return {
        "splits": dict(sorted(splits.items())),
        "rejected": dict(sorted(rejected.items())),
        "regions": regions,
    }
