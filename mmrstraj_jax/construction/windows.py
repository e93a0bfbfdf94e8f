"""Step `imagery`: an image and its record for every anchor of every trip, at every zoom.

An image that is there with its record is not asked for again, so a killed run goes on where it was.
"""

import hashlib
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmrstraj_jax.config import ImagePolicy
from mmrstraj_jax.construction import candidates, geodesy, geotiff, imagery, tiles
from mmrstraj_jax.construction.download import Downloader
from mmrstraj_jax.construction.files import dump, lines_writer, sha256
from mmrstraj_jax.construction.manifest import Step, finished
from mmrstraj_jax.construction.providers import ProviderSettings, provider_of
from mmrstraj_jax.construction.ranges import check
from mmrstraj_jax.construction.trajectories import ANCHORS, Anchor, Trajectory, anchors
from mmrstraj_jax.errors import UserError

INDEX = "images.jsonl"
MAX_PIXELS = ImagePolicy.max_pixels  # of an extent: training takes no larger image
# of a record: what this step and those after it read
_RECORD = {"id", "image", "sha256", "window", "gsd_metres", "trip", "region", "track", "anchor", "provider"}


@dataclass(frozen=True)
class Imagery(ProviderSettings):
    """Settings of the step: the provider's, and which windows."""

    zooms: tuple[int, ...] = (18, 19)
    size: int = 512
    anchor: str = "centroid"
    step: float = 250.0  # metres between anchors "along" the path
    extent: bool = False  # the trip's whole extent instead of windows of `size`
    margin: int = 32  # pixels around an extent
    draw_track: bool = False
    geotiff: bool = False  # beside each PNG, the provider's pixels
    interval: float = field(default=0.2, metadata={"run": True})  # least seconds between two requests
    cache: str = field(default="", metadata={"run": True})  # folder of downloaded tiles; none: not kept

    def __post_init__(self):
        check(self, 0, tiles.MAX_ZOOM, "zooms")
        check(self, 1, tiles.MAX_SIDE, "size")
        check(self, 0, tiles.MAX_SIDE, "margin")
        check(self, 1, math.inf, "step")
        check(self, 0, math.inf, "interval")


def run(folder: Path, trips: Path, config: Imagery) -> None:
    """Writes images/ID.png with ID.json beside it, and images.jsonl.

    Windows without imagery, with a damaged tile or off the map are dropped and counted, with the first of
    each; a failing server ends the run, which then goes on where it was.

    Raises UserError: bad settings, no finished step `trajectories`, a failing provider, no image at all.
    """
    if config.anchor not in ANCHORS or not config.zooms:
        raise UserError(f"--anchor {config.anchor}: expected one of {', '.join(ANCHORS)}, and some --zooms")
    finished(trips, "trajectories")
    downloader = Downloader(Path(config.cache) if config.cache else None, interval=config.interval)
    provider = provider_of(config, downloader)
    with Step(folder, "imagery", config, {"trips": trips / candidates.TRIPS}) as step:
        if step.done:
            return
        records, dropped = [], Dropped()
        for trip in tqdm(candidates.load(trips), "imagery", unit=" trips", disable=None):
            for name, window, anchor in _windows(trip, config, dropped):
                try:
                    records.append(
                        _image(folder / "images" / f"{name}.png", provider, trip, window, anchor, config)
                    )
                except imagery.DamagedImage as error:
                    tqdm.write(f"{name} is left out: {error}", sys.stderr)
                    dropped.count("damaged tile", trip, error)
                except imagery.NoImagery as error:
                    dropped.count("no imagery", trip, error)
                except tiles.OffTheMap as error:
                    dropped.count("off the map", trip, error)
        if not records:
            raise UserError(f"--provider {config.provider}: no image for any trip; {dropped}")
        with lines_writer(folder / INDEX) as write:
            for record in records:
                write(record)
        zooms = Counter(
            f"{record['region'] or 'elsewhere'}, zoom {record['window']['zoom']}" for record in records
        )
        counts = {"images": dict(sorted(zooms.items())), "dropped": dict(sorted(dropped.reasons.items()))}
        counts |= {"first": dict(sorted(dropped.first.items()))}
        images = [folder / "images" / record["image"] for record in records]
        step.finish(counts, [folder / INDEX, *images, *(path.with_suffix(".json") for path in images)])


class Dropped:
    """Windows without an image: how many, by reason, and where each reason was first met."""

    def __init__(self):
        self.reasons: Counter = Counter()
        self.first: dict[str, str] = {}

    def count(self, reason: str, trip: Trajectory, why: UserError) -> None:
        self.reasons[reason] += 1
        self.first.setdefault(reason, f"trip {trip.id}: {why}")

    def __str__(self) -> str:
        return f"dropped: {dict(self.reasons)}; the first of each: {self.first}"


def _windows(trip: Trajectory, config: Imagery, dropped: Dropped):
    """(name, window, anchor) of a trip; names are safe in file systems, and the trip's own."""
    place = re.sub(r"[^a-z0-9]+", "-", trip.region.lower()).strip("-") or "trip"
    stem = f"{place}-{hashlib.sha256(trip.id.encode()).hexdigest()[:10]}"
    for zoom in config.zooms:
        if config.extent:
            try:
                window = extent(trip.lat, trip.lon, zoom, config.margin)
            except UserError as error:
                large = not isinstance(error, tiles.OffTheMap)
                dropped.count("extent too large" if large else "off the map", trip, error)
                continue
            yield f"{stem}-z{zoom}-extent", window, Anchor(*window.center, -1, "extent")
            continue
        side = config.size * float(tiles.ground_resolution(trip.lat[0], zoom))
        for number, anchor in enumerate(anchors(trip, config.anchor, step=config.step, side=side)):
            try:
                window = tiles.window_at(anchor.lat, anchor.lon, zoom, config.size)
            except tiles.OffTheMap as error:
                dropped.count("off the map", trip, error)
                continue
            yield f"{stem}-z{zoom}-{number}", window, anchor


def extent(lat, lon, zoom: int, margin: int) -> tiles.Window:
    """The window over a whole trip. Raises UserError: too large to be of use, before anything is loaded."""
    window = tiles.window_over(lat, lon, zoom, margin)
    if window.width * window.height > MAX_PIXELS:
        raise UserError(
            f"extent of {window.width} x {window.height} px at zoom {zoom}: expected at most {MAX_PIXELS} in "
            "all; use a lower zoom"
        )
    return window


def _image(
    path: Path, provider, trip: Trajectory, window: tiles.Window, anchor: Anchor, config: Imagery
) -> dict:
    about = {"id": path.stem, "trip": trip.id, "region": trip.region, "mode": trip.mode}
    about |= {"anchor": anchor._asdict(), "track": track(trip, window), "track_drawn": config.draw_track}
    known = _known(path)
    if known is not None and known["window"] == json.loads(dump(vars(window))):
        return known
    pixels = provider.image(window)
    if config.geotiff:
        geotiff.write(path.with_suffix(".tif"), pixels, window)
    if config.draw_track:
        pixels = imagery.draw_track(pixels, window, trip.lat, trip.lon)
    return json.loads(dump(imagery.save(path, pixels, window, provider.source, **about)))


def _known(path: Path) -> dict[str, Any] | None:
    """The record of a whole image, or None: an image with a damaged record is made again."""
    if not path.with_suffix(".json").is_file() or not path.is_file():
        return None
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
    except ValueError:
        return None
    if not isinstance(record, dict) or not _RECORD <= record.keys():
        return None
    return record if record["sha256"] == sha256(path) else None


def track(trip: Trajectory, window: tiles.Window) -> dict[str, Any]:
    """What of a trip lies in a window: fixes, metres, share of the trip's fixes."""
    inside = window.contains(trip.lat, trip.lon)
    both = inside[1:] & inside[:-1]
    metres = float(geodesy.steps(trip.lat, trip.lon)[both].sum())
    return {
        "points": int(inside.sum()),
        "metres": round(metres, 1),
        "share_of_trip": round(float(np.mean(inside)), 4),
    }
