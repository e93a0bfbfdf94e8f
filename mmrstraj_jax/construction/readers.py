"""Readers of published trajectory formats, each to `Trajectory`; facts and licences in the data cards.

A broken file or a missing column raises; a broken row is counted in the report with its file and line.
Files are read in sorted order. Times end as UTC seconds: `utc_offset` (hours) is the clock of a source that
names no zone.
"""

import dataclasses
import itertools
import json
import xml.etree.ElementTree as ElementTree
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrstraj_jax.construction import geodesy
from mmrstraj_jax.construction.rows import lines_of, rows_of, seconds
from mmrstraj_jax.construction.trajectories import Report, Trajectory
from mmrstraj_jax.errors import UserError

FIELDS = ("id", "user", "mode", "time", "lat", "lon", "accuracy")
GRAB_COLUMNS = {
    "id": "trj_id",
    "mode": "driving_mode",
    "time": "pingtimestamp",
    "lat": "rawlat",
    "lon": "rawlng",
    "accuracy": "accuracy",
}
WORLDTRACE_COLUMNS = {"time": "time", "lat": "latitude", "lon": "longitude"}
GENERIC_COLUMNS = {name: name for name in ("id", "time", "lat", "lon")}


def read(
    path: str | Path,
    format: str,
    report: Report,
    *,
    columns: Mapping[str, str] | None = None,
    utc_offset: float | None = None,
    datum: str = "wgs84",
) -> Iterator[Trajectory]:
    """Trips of a file, or of every file of the format below a folder.

    Args:
      format: geolife, grab, porto, tdrive, gotrack, gpx, worldtrace or csv.
      report: counts dropped rows under "malformed row", "no time" and "missing data".
      columns: csv only: {field: column name} with time, lat, lon and, where there are any, id, user,
        mode, accuracy; default: id, time, lat and lon are called so. Without id a file is a trip.
      utc_offset: hours local times are ahead of UTC; None: the format's (T-Drive 8, go_track -3, else 0).
      datum: "gcj02" turns Chinese map positions into WGS-84. GeoLife and T-Drive are WGS-84 already.
    Raises:
      UserError: unknown format, nothing to read, a file that is not of the format, a missing column, parquet
        without pyarrow.
    """
    if format not in READERS:
        raise UserError(f"trajectory format {format!r}: expected one of {', '.join(READERS)}")
    if datum not in ("wgs84", "gcj02"):
        raise UserError(f"datum {datum!r}: expected wgs84 or gcj02")
    if columns is not None and format != "csv":
        raise UserError(f"columns: a column map goes with the format csv, not with {format}")
    suffixes, own_offset, reader = READERS[format]
    offset = 3600 * (own_offset if utc_offset is None else utc_offset)
    files = _files(Path(path), suffixes, format)
    stems = Counter(file.stem for file in files)
    used: set[str] = set()
    folders: dict[Path, list[Path]] = {}
    for file in files:
        # Grab's export cuts trips into parts: a folder of them is read as one
        folders.setdefault(file.parent if format == "grab" else file, []).append(file)
    for parts in folders.values():
        file, given = parts[0], parts if format == "grab" else parts[0]
        for trip in reader(given, report, offset) if columns is None else _csv(file, report, offset, columns):
            if datum == "gcj02":
                lat, lon = geodesy.gcj02_to_wgs84(trip.lat, trip.lon)
                trip = dataclasses.replace(trip, lat=lat, lon=lon)
            id = trip.id
            if format == "grab" and len(folders) > 1:
                id = f"{file.parent.relative_to(path).as_posix()}/{id}"
            elif format not in ("grab", "geolife") and stems[file.stem] > 1:
                id = _apart(id, file, Path(path))
            elif format == "csv" and len(files) > 1 and id != file.stem:
                id = f"{file.stem}/{id}"  # ids are unique inside a file only
            if format in ("porto", "tdrive") and len(files) > 1:
                # a set cut into parts, or a file for each day: the same id comes in several of them
                id = _apart(id, file, Path(path)) if id in used else id
                used.add(id)
            yield trip if id == trip.id else trip.take(slice(None), id=id)


def _apart(id: str, file: Path, root: Path) -> str:
    """A trip's id by its file's place below the folder: other files have the same name."""
    place, stem = file.relative_to(root).with_suffix("").as_posix(), file.stem
    if id == stem or id.startswith(f"{stem}/"):
        return place + id.removeprefix(stem)
    return f"{place}/{id}"


def _files(path: Path, suffixes: tuple[str, ...], format: str) -> list[Path]:
    if path.is_file():
        return [path]
    # .PLT and .GPX too, as some receivers and old file systems write them; not ._NAME.plt, which macOS puts
    # beside each file on foreign disks and into archives
    files = (file for file in path.rglob("[!.]*") if file.name.lower().endswith(suffixes))
    found = sorted(file for file in files if file.is_file())
    if not found:
        problem = (
            "no such file or folder" if not path.exists() else f"no {' or '.join(suffixes)} file below it"
        )
        raise UserError(f"{path}: {problem}; expected {format} trajectories")
    return found


class _Trips:
    """Fixes collected per trip, in the order in which trips first appear; rows of trips may be mixed."""

    def __init__(self, source: Path):
        self.source = str(source)  # of the fixes added next
        self.fixes: dict[str, tuple[array, ...]] = {}
        self.about: dict[str, dict[str, Any]] = {}

    def add(self, id: str, line: int, time: float, lat: float, lon: float, accuracy=np.nan, **about) -> None:
        if id not in self.fixes:
            self.fixes[id] = tuple(array("d") for _ in range(4))
            self.about[id] = {"line": line, "source": self.source, **about}
        for values, value in zip(self.fixes[id], (time, lat, lon, accuracy), strict=True):
            values.append(value)

    def __iter__(self) -> Iterator[Trajectory]:
        for id, fixes in self.fixes.items():
            time, lat, lon, accuracy = (np.array(values) for values in fixes)
            known = None if np.isnan(accuracy).all() else accuracy
            yield Trajectory(id, time, lat, lon, accuracy=known, **self.about[id])


def _add_rows(
    trips: _Trips, rows: Iterable[tuple[int, Mapping]], columns: Mapping, report: Report, offset: float
):
    """Rows as mappings of column name -> value; a row that does not parse is counted."""
    name = {field: columns.get(field) for field in FIELDS}
    stem = Path(trips.source).stem
    for line, row in rows:
        try:
            time = seconds(row[name["time"]], offset)
            lat, lon = float(row[name["lat"]]), float(row[name["lon"]])
            accuracy = row[name["accuracy"]] if name["accuracy"] else None
            accuracy = np.nan if accuracy in (None, "") else float(accuracy)
            id = str(row[name["id"]]).strip() if name["id"] else stem
            if not id or row[name["id"] or name["time"]] is None:
                raise ValueError("no id")
        except (TypeError, ValueError):
            report.drop("malformed row", 1, f"{trips.source}: line {line}")
            continue
        about = {field: str(row[name[field]] or "").strip() for field in ("user", "mode") if name[field]}
        trips.add(id, line, time, lat, lon, accuracy, **about)


def _csv(path: Path, report: Report, offset: float, columns: Mapping[str, str]) -> Iterable[Trajectory]:
    wrong = sorted(set(columns) - set(FIELDS)) or sorted({"time", "lat", "lon"} - set(columns))
    if wrong:
        raise UserError(
            f"columns: {', '.join(wrong)}; expected time, lat, lon and of {', '.join(FIELDS)} any"
        )
    trips = _Trips(path)
    _add_rows(trips, rows_of(path, columns.values()), columns, report, offset)
    return trips


def _grab(paths: Sequence[Path], report: Report, offset: float) -> Iterable[Trajectory]:
    """Grab-Posisi: parquet parts or their CSV export, rows in no order; a trip may lie in several parts.

    A fix takes 36 bytes until all parts are read: 3 GB for the 80 million of the whole export.
    """
    trips = _Trips(paths[0])
    for path in paths:
        trips.source = str(path)
        rows = _parquet(path) if path.suffix.lower() == ".parquet" else rows_of(path, GRAB_COLUMNS.values())
        _add_rows(trips, rows, GRAB_COLUMNS, report, offset)
    return trips


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    """(number, row) with Grab's columns."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: parquet needs pyarrow: pip install 'mmrstraj-jax[geo]', or export CSV"
        ) from None
    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            missing = sorted(set(GRAB_COLUMNS.values()) - set(file.schema_arrow.names))
            if missing:
                raise UserError(f"{path}: no column {', '.join(missing)}; expected Grab-Posisi's columns")
            for batch in file.iter_batches(columns=list(GRAB_COLUMNS.values())):
                yield from enumerate(batch.to_pylist(), line + 1)
                line += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        why = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: damaged or no parquet ({why}); download or export it again") from None


def _worldtrace(path: Path, report: Report, offset: float) -> Iterable[Trajectory]:
    return _csv(path, report, offset, WORLDTRACE_COLUMNS)


def _generic(path: Path, report: Report, offset: float) -> Iterable[Trajectory]:
    return _csv(path, report, offset, GENERIC_COLUMNS)


# ---- GeoLife ----


def _labels(path: Path, report: Report, offset: float) -> list[tuple[float, float, str]]:
    """Sorted (start, end, mode) of a user's labels.txt, whose times are GMT like those of the traces."""
    spans = []
    for number, line in lines_of(path) if path.is_file() else ():
        cells = line.rstrip("\n").split("\t")
        if number == 1 or not line.strip():
            continue
        try:
            start, end, mode = cells
            spans.append((seconds(start, offset), seconds(end, offset), mode.strip()))
        except ValueError:
            report.drop_once("malformed row", f"{path}: line {number}")
    return sorted(spans)


def _modes(spans: list[tuple[float, float, str]]) -> Callable[[float], str]:
    """The mode at a time; of nested spans the inner one's, and behind its end the outer one's again."""
    starts = [start for start, _, _ in spans]
    latest = list(itertools.accumulate((end for _, end, _ in spans), max))

    def mode_at(time: float) -> str:
        at = bisect_right(starts, time) - 1
        while at >= 0 and time <= latest[at]:
            if time <= spans[at][1]:
                return spans[at][2]
            at -= 1
        return ""

    return mode_at


def _geolife(path: Path, report: Report, offset: float) -> Iterator[Trajectory]:
    """GeoLife 1.3: 6 header lines; lat, lon, 0, altitude in feet (-777: unknown; unused), days, date, time.

    A trace with several labelled modes becomes one trip for each stretch of one mode.
    """
    folder = path.absolute().parent  # "x.plt" alone has a user as well
    user_folder = folder.parent if folder.name == "Trajectory" else folder
    user = user_folder.name
    trips = _Trips(path)
    for number, line in lines_of(path):
        if number == 1 and not line.startswith("Geolife"):
            raise UserError(f"{path}: line 1 is {line.strip()[:40]!r}; expected 'Geolife trajectory'")
        if number <= 6 or not line.strip():
            continue
        try:
            lat, lon, _, _, _, date, time = line.split(",")
            trips.add(path.stem, number, seconds(f"{date} {time.strip()}", offset), float(lat), float(lon))
        except ValueError:
            report.drop("malformed row", 1, f"{path}: line {number}")
    mode_at = _modes(_labels(user_folder / "labels.txt", report, offset))
    for trip in trips:
        modes = [mode_at(time) for time in trip.time]
        cuts = [i for i in range(1, len(modes)) if modes[i] != modes[i - 1]]
        for part, (a, b) in enumerate(zip([0, *cuts], [*cuts, len(modes)], strict=True)):
            name = f"{user}/{trip.id}" + (f"#{part}" if cuts else "")
            yield trip.take(slice(a, b), id=name, user=user, mode=modes[a])


# ---- taxis ----


def _porto(path: Path, report: Report, offset: float) -> Iterator[Trajectory]:
    """Porto (ECML-PKDD 2015): one row a trip, POLYLINE a quoted JSON list of [lon, lat], one each 15 s."""
    seen = set()
    for line, row in rows_of(path, ("TRIP_ID", "TAXI_ID", "TIMESTAMP", "MISSING_DATA", "POLYLINE")):
        where = f"{path}: line {line}"
        try:
            points = np.array(json.loads(row["POLYLINE"]), np.float64)
            if points.shape != (len(points), 2) and points.shape != (0,):
                raise ValueError("not a list of [lon, lat]")
            start = seconds(row["TIMESTAMP"], offset)
        except (TypeError, ValueError):
            report.drop_trip("malformed row", 1, where)
            continue
        if row["MISSING_DATA"].strip().lower() == "true" or not len(points):
            report.drop_trip("missing data", len(points), where)
            continue
        time = start + 15.0 * np.arange(len(points))
        about = {"user": row["TAXI_ID"], "mode": "taxi", "source": str(path), "line": line}
        # the published file has some ids twice
        id = row["TRIP_ID"] if row["TRIP_ID"] not in seen else f"{row['TRIP_ID']}#{line}"
        seen.add(id)
        yield Trajectory(id, time, points[:, 1], points[:, 0], **about)


def _tdrive(path: Path, report: Report, offset: float) -> Iterable[Trajectory]:
    """T-Drive: `<taxi>.txt` without header: taxi, local date and time, longitude, latitude."""
    trips = _Trips(path)
    for number, line in lines_of(path):
        try:
            taxi, time, lon, lat = line.split(",")
            fix = seconds(time, offset), float(lat), float(lon)
        except ValueError:
            if line.strip():
                report.drop("malformed row", 1, f"{path}: line {number}")
            continue
        trips.add(taxi.strip(), number, *fix, user=taxi.strip(), mode="taxi")
    return trips


def _gotrack(path: Path, report: Report, offset: float) -> Iterable[Trajectory]:
    """UCI GPS Trajectories (id 354): go_track_trackspoints.csv, modes from go_track_tracks.csv beside it.

    Aracaju's clock, UTC-3, is assumed: the set does not say.
    """
    if path.name.lower() != "go_track_trackspoints.csv":
        raise UserError(
            f"{path}: expected the name go_track_trackspoints.csv, and go_track_tracks.csv beside it"
        )
    modes, users = {}, {}
    tracks = path.with_name("go_track_tracks.csv")
    for _, row in rows_of(tracks, ("id", "id_android", "car_or_bus")):
        modes[row["id"]] = {"1": "car", "2": "bus"}.get(row["car_or_bus"], "")
        users[row["id"]] = row["id_android"] or ""
    columns = {"id": "track_id", "time": "time", "lat": "latitude", "lon": "longitude"}
    trips = _Trips(path)
    _add_rows(trips, rows_of(path, columns.values()), columns, report, offset)
    for id, about in trips.about.items():
        about.update(mode=modes.get(id, ""), user=users.get(id, ""))
    return trips


def _gpx(path: Path, report: Report, offset: float) -> Iterable[Trajectory]:
    """GPX 1.0 and 1.1: every track segment is a trip, its mode the track's <type>. Fixes need a time."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a GPX file") from None
    # a document type is never needed and is how entities grow to gigabytes
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content or content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: a document type or UTF-16; expected plain GPX in UTF-8")
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: {error}; expected a GPX file") from None
    if root.tag.rpartition("}")[2] != "gpx":
        raise UserError(f"{path}: root element {root.tag.rpartition('}')[2]!r}; expected gpx")
    trips = _Trips(path)
    segments = 0
    for track in root.iterfind("{*}trk"):
        mode = (track.findtext("{*}type") or "").strip()
        for segment in track.iterfind("{*}trkseg"):
            for number, point in enumerate(segment.iterfind("{*}trkpt"), 1):
                where = f"{path}: segment {segments}, point {number}"
                time = point.findtext("{*}time")
                if not time:
                    report.drop("no time", 1, where)
                    continue
                try:
                    fix = seconds(time, offset), float(point.get("lat", "")), float(point.get("lon", ""))
                except ValueError:
                    report.drop("malformed row", 1, where)
                    continue
                trips.add(f"{path.stem}/{segments}", 0, *fix, mode=mode)
            segments += 1
    return trips


Reader = Callable[..., Iterable[Trajectory]]  # (a file, or Grab's parts of a folder; report; offset)
READERS: dict[str, tuple[tuple[str, ...], float, Reader]] = {  # suffixes, hours ahead of UTC, reader
    "geolife": ((".plt",), 0.0, _geolife),
    "grab": ((".parquet", ".csv"), 0.0, _grab),
    "porto": ((".csv",), 0.0, _porto),
    "tdrive": ((".txt",), 8.0, _tdrive),
    "gotrack": (("go_track_trackspoints.csv",), -3.0, _gotrack),
    "gpx": ((".gpx",), 0.0, _gpx),
    "worldtrace": ((".csv",), 0.0, _worldtrace),
    "csv": ((".csv",), 0.0, _generic),
}
