"""Trips of a city as trajectory files of the published formats, and beside them what is true of each trip.

    python -m mmrstraj_jax.synthcity.traces --format porto --trips 5000 --out traces/

Formats: GeoLife 1.3 (a folder of PLT files and labels.txt per user), Grab-Posisi (one CSV or parquet file)
and the Porto taxi CSV. truth.jsonl has one row a trip: its id as the readers report it, the roads it drove
with the second at which it entered each, and the fixes that carry a defect.
"""

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from mmrstraj_jax.errors import UserError, run_command
from mmrstraj_jax.synthcity import trips
from mmrstraj_jax.synthcity.city import City, make_city
from mmrstraj_jax.synthcity.gps import Fixes, Receiver
from mmrstraj_jax.synthcity.network import network_of

DAY = datetime(2025, 3, 3, tzinfo=UTC)  # a Monday
TRIPS_A_USER = 25
GRAB = (
    "trj_id", "driving_mode", "osname", "pingtimestamp", "rawlat", "rawlng", "speed", "bearing", "accuracy",
)  # fmt: skip
PORTO = (
    "TRIP_ID", "CALL_TYPE", "ORIGIN_CALL", "ORIGIN_STAND", "TAXI_ID", "TIMESTAMP", "DAY_TYPE", "MISSING_DATA",
    "POLYLINE",
)  # fmt: skip
_EPOCH = datetime(1899, 12, 30, tzinfo=UTC)  # of GeoLife's day numbers
_HEADER = (
    "Geolife trajectory\nWGS 84\nAltitude is in Feet\nReserved 3\n"
    "0,2,255,My Track,0,0,2,8421376\n0\n"
)  # fmt: skip


def write(folder: str | Path, format: str, city: City, num: int, seed: int = 0) -> Path:
    """Writes `num` trips of a day in a city, and truth.jsonl, into a folder; returns what a reader is given.

    format: one of FORMATS. Raises UserError: an unknown format, no trips, a negative seed, or a folder that
    is not empty.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    for name, value, least in (("trips", num, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"--{name} {value}: expected {least} or more")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: not an empty folder; name another")
    folder.mkdir(parents=True, exist_ok=True)
    day = trips.plan(city, num, seed)
    with (folder / "truth.jsonl").open("w", encoding="utf-8") as truth:

        def note(trip: int, name: str, fixes: Fixes) -> None:
            truth.write(json.dumps(_truth(day, trip, name, fixes)) + "\n")

        return FORMATS[format](folder, day, seed, note)


Note = Callable[[int, str, Fixes], None]


def _truth(day: trips.Trips, trip: int, name: str, fixes: Fixes) -> dict:
    roads = network_of(day.city).road[day.edges[trip]]
    on_road = roads >= 0
    return {
        "id": name,
        "roads": roads[on_road].tolist(),
        "enter": np.round(day.enter[trip][:-1][on_road], 1).tolist(),
        "arrive": round(float(day.enter[trip][-1]), 1),
        "fixes": len(fixes.time),
        "defects": fixes.defects,
    }


def _draws(day: trips.Trips, seed: int, purpose: int):
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((day.city.seed, purpose, seed)))).random


def _geolife(folder: Path, day: trips.Trips, seed: int, note: Note) -> Path:
    """Data/<user>/Trajectory/<start>.plt; two of three users have labels.txt. One trip is one trace."""
    receiver, draw = Receiver(day, seed), _draws(day, seed, 23)
    home = [0.0] * -(-len(day) // TRIPS_A_USER)  # when each user is back
    modes: dict[int, list[str]] = {}
    for trip in range(len(day)):
        fixes = receiver.fixes(trip, (1.0, 2.0, 5.0)[int(draw() * 3)])
        moments = [DAY + timedelta(seconds=round(t)) for t in fixes.time.tolist()]
        user = home.index(min(home))
        if home[user] > fixes.time[0]:  # all are under way: one more user
            user = len(home)
            home.append(0.0)
        home[user] = float(fixes.time.max()) + 60
        height = np.where(draw() < 0.2, -777.0, np.round(480 + 20 * draw(len(moments))))
        name = moments[0].strftime("%Y%m%d%H%M%S")
        path = folder / "Data" / f"{user:03d}" / "Trajectory" / f"{name}.plt"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = zip(fixes.lat.tolist(), fixes.lon.tolist(), height.tolist(), moments, strict=True)
        lines = (
            f"{lat:.6f},{lon:.6f},0,{feet:.0f},{(at - _EPOCH) / timedelta(days=1):.10f},"
            f"{at:%Y-%m-%d},{at:%H:%M:%S}\n"
            for lat, lon, feet, at in rows
        )
        path.write_text(_HEADER + "".join(lines), encoding="utf-8", newline="\r\n")
        if user % 3:
            mode = ("car", "taxi", "bus")[int(draw() * 3)]
            first, last = min(moments), max(moments)
            modes.setdefault(user, []).append(
                f"{first:%Y/%m/%d %H:%M:%S}\t{last:%Y/%m/%d %H:%M:%S}\t{mode}\n"
            )
        note(trip, f"{user:03d}/{name}", fixes)
    for user, lines in modes.items():
        path = folder / "Data" / f"{user:03d}" / "labels.txt"
        path.write_text("Start Time\tEnd Time\tTransportation Mode\n" + "".join(lines), encoding="utf-8")
    return folder / "Data"


def _grab_rows(day: trips.Trips, seed: int, note: Note) -> Iterator[tuple]:
    """A fix a second in the order in which they come in, so that the rows of trips are mixed."""
    receiver, draw = Receiver(day, seed), _draws(day, seed, 24)
    start = int(DAY.timestamp())
    rows = []
    for trip in range(len(day)):
        fixes = receiver.fixes(trip, 1.0)
        mode = "car" if draw() < 0.7 else "motorcycle"
        system = "android" if draw() < 0.8 else "ios"
        move = np.zeros((1, 2))
        if len(fixes.time) > 1:  # by the time between fixes: beside a gap it is more than a second
            move = np.gradient(fixes.true_xy, axis=0) / np.gradient(fixes.time)[:, None]
        speed, bearing = np.hypot(*move.T), np.degrees(np.arctan2(move[:, 0], move[:, 1])) % 360
        values = zip(
            fixes.time.round().astype(int).tolist(), fixes.lat.tolist(), fixes.lon.tolist(),
            speed.tolist(), bearing.tolist(), fixes.accuracy.tolist(), strict=True,
        )  # fmt: skip
        rows += [
            (trip, n, (str(trip), mode, system, start + t, round(lat, 7), round(lon, 7), round(v, 2),
                       round(b, 1), accuracy))
            for n, (t, lat, lon, v, b, accuracy) in enumerate(values)
        ]  # fmt: skip
        note(trip, str(trip), fixes)
    # By time of arrival: the order within a trip stays
    arrival = np.array([row[2][3] for row in rows])
    owner = np.array([row[0] for row in rows])
    for trip_rows in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(owner)) + 1):
        arrival[trip_rows] = np.maximum.accumulate(arrival[trip_rows])
    for at in np.argsort(arrival, kind="stable").tolist():
        yield rows[at][2]


def _grab_csv(folder: Path, day: trips.Trips, seed: int, note: Note) -> Path:
    with (folder / "grab.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(GRAB)
        writer.writerows(_grab_rows(day, seed, note))
    return folder / "grab.csv"


def _grab_parquet(folder: Path, day: trips.Trips, seed: int, note: Note) -> Path:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("--format grab-parquet: needs pyarrow: pip install 'mmrstraj-jax[geo]'") from None
    columns = zip(*_grab_rows(day, seed, note), strict=True)
    table = pyarrow.table({name: pyarrow.array(values) for name, values in zip(GRAB, columns, strict=True)})
    parquet.write_table(table, folder / "part-00000.snappy.parquet")
    return folder / "part-00000.snappy.parquet"


def _porto(folder: Path, day: trips.Trips, seed: int, note: Note) -> Path:
    """A fix every 15 s without its time; a trip with a gap is marked as MISSING_DATA, as in the original."""
    receiver, draw = Receiver(day, seed, ("wrong", "gap")), _draws(day, seed, 25)
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(PORTO)
        for trip in range(len(day)):
            fixes = receiver.fixes(trip, 15.0)
            taxi = 20000000 + trip % max(len(day) // TRIPS_A_USER, 1)
            start = int(DAY.timestamp()) + round(float(fixes.time[0]))
            kind, call, stand = "ABC"[int(draw() * 3)], int(draw() * 60000), int(draw() * 63) + 1
            points = zip(fixes.lon.round(6).tolist(), fixes.lat.round(6).tolist(), strict=True)
            name = f"{start}620{taxi}{trip}"
            writer.writerow(
                (name, kind, call if kind == "A" else "", stand if kind == "B" else "", taxi, start, "A",
                 str("gap" in fixes.defects), json.dumps([list(p) for p in points], separators=(",", ":")))
            )  # fmt: skip
            note(trip, name, fixes)
    return folder / "train.csv"


FORMATS = {"geolife": _geolife, "grab": _grab_csv, "grab-parquet": _grab_parquet, "porto": _porto}


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mmrstraj_jax.synthcity.traces",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", required=True, metavar="NAME", help=", ".join(FORMATS))
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--trips", type=int, default=5000, help="default 5000")
    parser.add_argument("--seed", type=int, default=0, help="of the trips")
    parser.add_argument("--city", type=int, default=0, help="seed of the city")
    parser.add_argument("--lat", type=float, default=45.0, help="where the city lies, degrees (default 45)")
    parser.add_argument("--lon", type=float, default=8.0, help="(default 8)")
    options = parser.parse_args(args)
    city = make_city(options.city, lat=options.lat, lon=options.lon)
    path = write(options.out, options.format, city, options.trips, options.seed)
    print(f"{path}: {options.trips} trips; what is true of them is in {options.out / 'truth.jsonl'}")


if __name__ == "__main__":
    run_command(main)
