"""Cleaning of trips: every fix that goes has a reason and is counted; nothing is smoothed or moved.

Defaults are those of the common libraries (movingpandas, trackintel, scikit-mobility) and of Li et al. 2008
for stay points; they fit fixes every 1 to 30 s. For sparse sets (T-Drive: 177 s) raise the gap limits.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from mmrstraj_jax.construction import geodesy, tiles
from mmrstraj_jax.construction.ranges import check, is_box
from mmrstraj_jax.construction.trajectories import Report, Trajectory
from mmrstraj_jax.errors import UserError


@dataclass(frozen=True)
class Cleaning:
    """Limits, in metres, seconds, metres per second and degrees."""

    max_accuracy: float = 50.0
    max_speed: float = 50.0
    max_motorcycle_speed: float = 33.0  # of trips with the mode motorcycle, where it is the lower one
    short_run: int = 3  # fixes that impossible speeds cut off at both sides are wrong, if so few
    spike_speed: float = 15.0
    spike_turn: float = 150.0
    gap_seconds: float = 300.0
    gap_metres: float = 1000.0
    stay_radius: float = 100.0
    stay_seconds: float = 300.0
    drift_ratio: float = 5.0  # path over displacement of a stay that is only GPS noise
    drift_speed: float = 0.5
    min_points: int = 10
    min_length: float = 500.0
    min_duration: float = 60.0
    box: tuple[float, ...] = ()  # west, south, east, north of the city; empty: everywhere

    def __post_init__(self):
        limits = sorted(vars(self).keys() - {"box", "min_points", "spike_turn"})
        check(self, 0, math.inf, *limits, key="--cleaning.")
        check(self, 0, 180, "spike_turn", key="--cleaning.")
        check(self, 1, math.inf, "min_points", key="--cleaning.")
        if self.box and not is_box(self.box):
            raise UserError(f"--cleaning.box {self.box}: expected west, south, east, north in degrees")


def clean(trip: Trajectory, limits: Cleaning, report: Report) -> list[Trajectory]:
    """The good parts of a trip (none, one or several; ids "id", or "id~0", "id~1"), in time order.

    Counts into `report.points` and `.trips` under: invalid position, off the map (beyond 85.05 degrees),
    outside the box, poor accuracy, duplicate timestamp, impossible speed, spike, drift, stay point, too few
    points, too short, too brief; into `.remarks`: reordered, split at a gap, split at an impossible speed.
    """
    where = f"{trip.source}: {trip.id}"
    report.points_in += len(trip)
    trip = _valid(trip, limits, report, where)
    trip = _ordered(trip, report, where)
    trip, breaks = _possible(trip, limits, report, where)
    trip, breaks = _unspiked(trip, breaks, limits, report, where)
    parts = []
    for part in _split(trip, breaks, limits, report):
        part = _without_stays(part, limits, report, where)
        reason = _too_small(part, limits)
        if reason:
            report.drop_trip(reason, len(part), where)
        else:
            parts.append(part)
    report.points_out += sum(map(len, parts))
    if len(parts) < 2:
        return parts
    return [part.take(slice(None), id=f"{trip.id}~{number}") for number, part in enumerate(parts)]


def _keep(
    trip: Trajectory, mask: Bool[np.ndarray, " N"], reason: str, report: Report, where: str
) -> Trajectory:
    if mask.all():
        return trip
    report.drop(reason, int((~mask).sum()), f"{where}, fix {int(np.argmin(mask))}")
    return trip.take(mask)


def _valid(trip: Trajectory, limits: Cleaning, report: Report, where: str) -> Trajectory:
    good = np.isfinite(trip.time) & (np.abs(trip.lat) <= 90) & (np.abs(trip.lon) <= 180)
    good &= (trip.lat != 0) | (trip.lon != 0)  # the null island of receivers without a fix
    trip = _keep(trip, good, "invalid position", report, where)
    trip = _keep(trip, tiles.on_map(trip.lat), "off the map", report, where)
    if limits.box:
        west, south, east, north = limits.box
        wide = 360.0 if east - west >= 360 else (east - west) % 360
        inside = (trip.lat >= south) & (trip.lat <= north) & ((trip.lon - west) % 360 <= wide)
        trip = _keep(trip, inside, "outside the box", report, where)
    if trip.accuracy is not None:
        # NaN: the source says nothing of this fix
        trip = _keep(trip, ~(trip.accuracy > limits.max_accuracy), "poor accuracy", report, where)
    return trip


def _ordered(trip: Trajectory, report: Report, where: str) -> Trajectory:
    order = np.argsort(trip.time, kind="stable")
    moved = int((np.diff(trip.time) < 0).sum())
    if moved:
        report.remarks["reordered"] += moved
        trip = trip.take(order)
    first = np.concatenate([[True], np.diff(trip.time) > 0])[: len(trip)]
    return _keep(trip, first, "duplicate timestamp", report, where)


def _speeds(trip: Trajectory) -> np.ndarray:
    return geodesy.steps(trip.lat, trip.lon) / np.diff(trip.time)


def _possible(trip: Trajectory, limits: Cleaning, report: Report, where: str):
    """Drops short runs between impossible speeds; (trip, [N-1] where to split: jumps between long runs).

    Dropping whichever fix comes second would, after one bad first fix, drop the good ones behind it.
    """
    fastest = limits.max_speed
    if trip.mode == "motorcycle":
        fastest = min(fastest, limits.max_motorcycle_speed)
    while len(trip) > 1:
        jumps = _speeds(trip) > fastest
        if not jumps.any():
            break
        run = np.concatenate([[0], np.cumsum(jumps)])
        sizes = np.bincount(run)
        smallest = sizes.min()
        if smallest > limits.short_run or smallest == sizes.max():
            return trip, jumps
        # the smallest first, and of neighbours one: what is left may belong together without them
        wrong = sizes == smallest
        wrong[1:] &= ~wrong[:-1]
        trip = _keep(trip, ~wrong[run], "impossible speed", report, where)
    return trip, np.zeros(max(len(trip) - 1, 0), bool)


def _unspiked(trip: Trajectory, breaks, limits: Cleaning, report: Report, where: str):
    """Drops fixes that are reached and left at speed in nearly opposite directions."""
    while len(trip) > 2:
        xy = geodesy.to_metres(trip.lat, trip.lon)
        step = np.diff(xy, axis=0)
        fast = (_speeds(trip) > limits.spike_speed) & ~breaks
        cross = step[:-1, 0] * step[1:, 1] - step[:-1, 1] * step[1:, 0]
        turn = np.degrees(np.abs(np.arctan2(cross, (step[:-1] * step[1:]).sum(1))))
        spike = fast[:-1] & fast[1:] & (turn > limits.spike_turn)
        # of neighbours only the first: the second may be innocent without it
        spike[1:] &= ~spike[:-1]
        if not spike.any():
            break
        keep = np.concatenate([[True], ~spike, [True]])
        trip = _keep(trip, keep, "spike", report, where)
        # an inner fix has two edges without a break: the edge that replaces them has none
        breaks = breaks[keep[1:]]
    return trip, breaks


def _split(trip: Trajectory, breaks, limits: Cleaning, report: Report) -> list[Trajectory]:
    if not len(trip):
        return []
    far = geodesy.steps(trip.lat, trip.lon) > limits.gap_metres
    gaps = ((np.diff(trip.time) > limits.gap_seconds) | far) & ~breaks
    for reason, edges in (("split at a gap", gaps), ("split at an impossible speed", breaks)):
        if edges.any():
            report.remarks[reason] += int(edges.sum())
    ends = np.flatnonzero(gaps | breaks) + 1
    bounds = [0, *ends.tolist(), len(trip)]
    return [trip.take(slice(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]


def stays(trip: Trajectory, radius: float, seconds: float) -> list[tuple[int, int]]:
    """Stay points (Li et al. 2008) as (first, last) fix: within `radius` m of the first for `seconds`."""
    xy = geodesy.to_metres(trip.lat, trip.lon)
    found, start = [], 0
    while start < len(trip) - 1:
        end, block = start + 1, 64
        while end < len(trip):
            near = np.hypot(*(xy[end : end + block] - xy[start]).T) <= radius
            inside = len(near) if near.all() else int(np.argmin(near))
            end += inside
            if inside < len(near):
                break
            block *= 2
        if trip.time[end - 1] - trip.time[start] >= seconds:
            found.append((start, end - 1))
            start = end
        else:
            start += 1
    return found


def _without_stays(trip: Trajectory, limits: Cleaning, report: Report, where: str) -> Trajectory:
    """Keeps the first and the last fix of a stay: where it was and how long."""
    reasons = np.zeros(len(trip), int)
    for first, last in stays(trip, limits.stay_radius, limits.stay_seconds):
        lat, lon = trip.lat[first : last + 1], trip.lon[first : last + 1]
        path = geodesy.steps(lat, lon).sum()
        net = float(geodesy.distance(lat[0], lon[0], lat[-1], lon[-1]))
        slow = net / (trip.time[last] - trip.time[first]) < limits.drift_speed
        drift = slow and path > limits.drift_ratio * max(net, 1.0)
        reasons[first + 1 : last] = 1 if drift else 2
    for code, reason in ((1, "drift"), (2, "stay point")):
        report.drop(reason, int((reasons == code).sum()), where)
    return trip.take(reasons == 0)


def _too_small(trip: Trajectory, limits: Cleaning) -> str:
    if len(trip) < limits.min_points:
        return "too few points"
    if trip.length < limits.min_length:
        return "too short"
    return "too brief" if trip.duration < limits.min_duration else ""
