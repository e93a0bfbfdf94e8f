"""From a trip to its image: one GPS trace in, the window to describe out, with its record.

The window is `size` x `size` pixels where most fixes of the trip lie, or with `extent` all of the trip
stitched together. Its pixels are the provider's own, never resampled; only an extent so tall that Web
Mercator's scale shifts it by more than half a pixel is brought to one scale (ground.py); its record says so.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmrstraj_jax.construction import geotiff, ground, imagery, readers, tiles
from mmrstraj_jax.construction.candidates import pairs
from mmrstraj_jax.construction.cleaning import Cleaning, clean
from mmrstraj_jax.construction.download import Downloader
from mmrstraj_jax.construction.files import dump, sha256, write_atomic
from mmrstraj_jax.construction.providers import ProviderSettings, provider_of
from mmrstraj_jax.construction.ranges import check
from mmrstraj_jax.construction.trajectories import Report, Trajectory, anchors
from mmrstraj_jax.construction.windows import extent, track
from mmrstraj_jax.errors import UserError

SUFFIXES = {".plt": "geolife", ".gpx": "gpx", ".parquet": "grab"}
# One trip that a user names is never too short; what is broken in it still goes.
_CLEANING = Cleaning(min_points=1, min_length=0.0, min_duration=0.0)


@dataclass(frozen=True)
class TripImage(ProviderSettings):
    """Settings: the provider's, which trip of the file, and which window of the trip."""

    format: str = ""
    columns: tuple[str, ...] = ()
    datum: str = "wgs84"
    trip: str = ""
    zoom: int = 18
    size: int = 512
    extent: bool = False
    margin: int = 32
    draw_track: bool = False
    geotiff: bool = False
    interval: float = 0.2
    cache: str = ""

    def __post_init__(self):
        check(self, 0, tiles.MAX_ZOOM, "zoom")
        check(self, 1, tiles.MAX_SIDE, "size")
        check(self, 0, tiles.MAX_SIDE, "margin")
        check(self, 0, math.inf, "interval")


HELP = {
    "provider": "synthcity, folder, xyz, google, earthengine or stac",
    "tiles": "the folder, a server's URL template, Earth Engine's asset, or the STAC API's root",
    "pattern": "of a folder's files, default {z}/{x}/{y}.png; {-y} counts rows from the south",
    "title": "name of the imagery; kept beside it, like the next four",
    "attribution": "whom the imagery is credited to",
    "licence": "on what terms it may be used",
    "terms": "URL of these terms",
    "capture_date": "when it was taken",
    "key_variable": "environment variable with the key of a template with {key}, or the token",
    "bands": "three of an Earth Engine asset; default R G B",
    "value_range": "LOW:HIGH of these bands; default 0:255",
    "collection": "of a STAC API",
    "asset": "of its items, an 8-bit RGB GeoTIFF; default visual",
    "city": "SEED:LAT:LON of synthcity, as of its trips; default 0:45:8",
    "format": "of the trip's file; default by .plt, .gpx or .parquet",
    "columns": "FIELD=COLUMN ... of the format csv",
    "datum": "gcj02 for Chinese map positions",
    "trip": "its id, where the file holds several",
    "zoom": "of Web Mercator; default 18, about half a metre a pixel",
    "size": "pixels a side of the window that holds most fixes; default 512",
    "extent": "the whole trip instead, stitched",
    "margin": "pixels around an extent; default 32",
    "draw_track": "draw the trip on the image",
    "geotiff": "a GeoTIFF beside the PNG",
    "interval": "least seconds between two requests; default 0.2",
    "cache": "folder to keep downloaded tiles in",
}


def write(path: Path, trajectory: Path, config: TripImage) -> dict:
    """Writes the trip's image (PNG), its record (JSON) and, if asked for, a GeoTIFF of the exact pixels.

    Args:
      path: of the PNG.
      trajectory: the file of the trip.
    Returns:
      the record.
    Raises:
      UserError: no such trip, no usable fix, an extent too large, imagery that is missing or fails.
    """
    report = Report()
    trip = read(trajectory, config, report)
    parts = clean(trip, _CLEANING, report)
    if not parts:
        raise UserError(f"{trajectory}: no usable fix of trip {trip.id!r}; dropped: {dict(report.points)}")
    window = window_of(parts, config)
    provider = provider_of(
        config, Downloader(Path(config.cache) if config.cache else None, interval=config.interval)
    )
    pixels = provider.image(window)
    if config.geotiff:  # before the track: the provider's exact pixels
        geotiff.write(path.with_suffix(".tif"), pixels, window)
    if config.draw_track:
        for part in parts:
            pixels = imagery.draw_track(pixels, window, part.lat, part.lon)
    about = {
        "trip": trip.id,
        "trajectory": trajectory.name,
        "mode": trip.mode,
        "fixes": {
            "read": len(trip),
            "used": sum(map(len, parts)),
            "dropped": dict(sorted(report.points.items())),
        },
        "track": [track(part, window) for part in parts],
        "track_drawn": config.draw_track,
        "shift_pixels": round(ground.shift(window), 4),
    }
    record = imagery.save(path, pixels, window, provider.source, **about)
    if about["shift_pixels"] > ground.LARGEST_SHIFT:
        record = _one_scale(path, pixels, window, record)
    return record


def _one_scale(path: Path, pixels: np.ndarray, window: tiles.Window, record: dict) -> dict:
    pixels, place = ground.one_scale(pixels, window)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
    record = record | place | {"sha256": sha256(path), "corrected_from": record["crs"]}
    write_atomic(path.with_suffix(".json"), dump(record))
    return record


def read(path: Path, config: TripImage, report: Report) -> Trajectory:
    """The trip of a file. Raises UserError: unknown format, none or several trips, no trip of that id."""
    if not path.is_file():
        raise UserError(f"--trajectory {path}: no such file")
    format = config.format or SUFFIXES.get(path.suffix.lower(), "")
    if not format:
        raise UserError(f"--trajectory {path}: expected --format, one of {', '.join(readers.READERS)}")
    columns = pairs(config.columns, "columns", "FIELD=COLUMN") or None
    trips = list(readers.read(path, format, report, columns=columns, datum=config.datum))
    named = [trip for trip in trips if config.trip in ("", trip.id)]
    if len(named) != 1:
        ids = ", ".join(trip.id for trip in trips[:5]) + (", ..." if len(trips) > 5 else "")
        wanted = f"none is {config.trip!r}" if config.trip else "expected one; name it with --trip"
        raise UserError(f"--trajectory {path}: {len(trips)} trips ({ids}); {wanted}")
    return named[0]


def window_of(parts: list[Trajectory], config: TripImage) -> tiles.Window:
    """The window of a trip in parts. Raises UserError: an extent too large for one image."""
    time, lat, lon = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("time", "lat", "lon")
    )
    if config.extent:
        return extent(lat, lon, config.zoom, config.margin)
    side = config.size * float(tiles.ground_resolution(lat[0], config.zoom))
    (anchor,) = anchors(Trajectory(parts[0].id, time, lat, lon), "densest", side=side)
    return tiles.window_at(anchor.lat, anchor.lon, config.zoom, config.size)
