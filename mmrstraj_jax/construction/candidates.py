"""Step `trajectories`: trips are read, cleaned with counts, and a stratified sample of them is kept.

Files are read twice, once to know every trip's region and stratum and once to write the chosen ones: the
candidates (the paper's 70,000) never have to fit into memory.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmrstraj_jax.construction import readers
from mmrstraj_jax.construction.cleaning import Cleaning, clean
from mmrstraj_jax.construction.files import lines_writer, read_lines
from mmrstraj_jax.construction.manifest import Step
from mmrstraj_jax.construction.ranges import check, is_box
from mmrstraj_jax.construction.trajectories import (
    REGIONS,
    Report,
    Stub,
    Trajectory,
    region_of,
    sample,
    stratum_of,
)
from mmrstraj_jax.errors import UserError

TRIPS = "trips.jsonl"


@dataclass(frozen=True)
class Trajectories:
    """Settings of the step."""

    source: tuple[str, ...] = ()  # FORMAT:PATH, several of them
    columns: tuple[str, ...] = ()  # FIELD=COLUMN for the format csv
    utc_offset: float = 0.0  # hours that local times of csv, gpx, ... are ahead of UTC; 0: the format's own
    utc: bool = False  # local times are UTC, also where the format's own clock is another (tdrive, gotrack)
    datum: str = "wgs84"  # gcj02 for Chinese map positions
    regions: tuple[str, ...] = ()  # NAME=WEST:SOUTH:EAST:NORTH; none: the regions of the paper, and Porto
    inside_only: bool = False  # drop trips outside all regions
    total: int = 5000
    quotas: tuple[str, ...] = ()  # REGION=COUNT instead of a share of the total
    equal: bool = True  # equal shares for regions and strata; otherwise in proportion
    seed: int = 0
    cleaning: Cleaning = Cleaning()

    def __post_init__(self):
        check(self, 1, math.inf, "total")
        check(self, -12, 14, "utc_offset")


def run(folder: Path, config: Trajectories) -> None:
    """Writes trips.jsonl: a row per trip with id, region, stratum, source and its fixes.

    Raises UserError: bad settings, a source that cannot be read, or no trip that is left.
    """
    sources = dict(_source(text) for text in config.source)
    if len(sources) < len(config.source):
        raise UserError(f"--source {' '.join(config.source)}: expected each path once")
    if not sources:
        raise UserError("--source: expected FORMAT:PATH, e.g. --source geolife:Data/ or csv:trips.csv")
    if config.columns and "csv" not in sources.values():
        raise UserError("--columns: goes with sources of the format csv; the others have their own")
    if config.utc and config.utc_offset:
        raise UserError(f"--utc and --utc-offset {config.utc_offset}: expected one of them")
    quotas = {}
    for name, text in pairs(config.quotas, "quotas", "REGION=COUNT").items():
        if not text.isdecimal() or not int(text):
            raise UserError(f"--quotas {name}={text}: expected REGION=COUNT, a whole number, 1 or more")
        quotas[name] = int(text)
    boxes = _boxes(config.regions)
    inputs = {f"{number}:{format}": path for number, (path, format) in enumerate(sources.items())}
    with Step(folder, "trajectories", config, inputs) as step:
        if step.done:
            return
        report = Report()
        stubs = [
            Stub(trip.id, trip.region, stratum_of(trip))
            for trip in tqdm(_trips(config, sources, boxes, report), "reading", unit=" trips", disable=None)
        ]
        if not stubs:
            dropped = (
                f"dropped: {dict(report.points)}, {dict(report.trips)}; the first of each: {report.first}"
            )
            raise UserError(f"--source: no usable trip; {dropped}")
        chosen = set(sample(stubs, config.total, config.seed, quotas=quotas or None, equal=config.equal))
        kept = Counter()
        with lines_writer(folder / TRIPS) as write:
            again = (trip for trip in _trips(config, sources, boxes, Report()) if trip.id in chosen)
            for trip in tqdm(again, "writing", total=len(chosen), unit=" trips", disable=None):
                kept[trip.region or "elsewhere"] += 1
                write(_row(trip))
        counts = {"candidates": len(stubs), "kept": dict(sorted(kept.items()))} | report.to_dict()
        step.finish(counts, [folder / TRIPS])


def load(folder: Path) -> Iterator[Trajectory]:
    """The trips of a finished step, one at a time."""
    for row in read_lines(folder / TRIPS):
        time, lat, lon = (np.array(row[name], np.float64) for name in ("time", "lat", "lon"))
        about = {name: row[name] for name in ("user", "mode", "source", "line", "region")}
        yield Trajectory(row["id"], time, lat, lon, **about)


def _row(trip: Trajectory) -> dict:
    # 1e-7 degrees are a centimetre
    fixes = {"time": trip.time.round(3), "lat": trip.lat.round(7), "lon": trip.lon.round(7)}
    about = {name: getattr(trip, name) for name in ("id", "region", "mode", "user", "source", "line")}
    measures = {"stratum": stratum_of(trip), "metres": round(trip.length, 1), "seconds": trip.duration}
    return about | measures | {name: values.tolist() for name, values in fixes.items()}


def _trips(config: Trajectories, sources: dict[Path, str], boxes, report: Report) -> Iterator[Trajectory]:
    columns = pairs(config.columns, "columns", "FIELD=COLUMN") or None
    for number, (path, format) in enumerate(sources.items()):
        found = readers.read(
            path,
            format,
            report,
            columns=columns if format == "csv" else None,
            utc_offset=0.0 if config.utc else config.utc_offset or None,
            datum=config.datum,
        )
        for trip in found:
            for part in clean(trip, config.cleaning, report):
                region = region_of(part, boxes)
                if config.inside_only and not region:
                    report.points_out -= len(part)
                    report.drop_trip("outside the regions", len(part), f"{part.source}: {part.id}")
                    continue
                # ids are unique inside a source only
                id = f"{number}/{part.id}" if len(sources) > 1 else part.id
                base = path if path.is_dir() else path.parent
                source = Path(part.source).relative_to(base).as_posix()
                yield part.take(slice(None), id=id, region=region, source=source)


def _source(text: str) -> tuple[Path, str]:
    format, colon, path = text.partition(":")
    if not colon or format not in readers.READERS:
        raise UserError(f"--source {text}: expected FORMAT:PATH, FORMAT one of {', '.join(readers.READERS)}")
    return Path(path), format


def pairs(texts: tuple[str, ...], option: str, form: str) -> dict[str, str]:
    """{name: value} of NAME=VALUE words. Raises UserError: another form, or a name twice."""
    found = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not (name and sign and value) or name in found:
            raise UserError(f"--{option} {text}: expected {form}, each name once")
        found[name] = value
    return found


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}: {text!r}, expected a number") from None


def _boxes(texts: tuple[str, ...]) -> dict[str, tuple[float, float, float, float]]:
    form = "NAME=WEST:SOUTH:EAST:NORTH"
    boxes = {}
    for name, value in pairs(texts, "regions", form).items():
        numbers = tuple(_number(part, f"--regions {name}") for part in value.split(":"))
        if not is_box(numbers):
            raise UserError(f"--regions {name}={value}: expected {form} in degrees, south below north")
        boxes[name] = numbers
    return boxes or REGIONS
