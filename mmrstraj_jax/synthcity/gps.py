"""What GPS receivers make of trips: fixes with noise, drift, gaps and wrong positions; defects are noted."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mmrstraj_jax.synthcity.city import City
from mmrstraj_jax.synthcity.geo import to_lonlat
from mmrstraj_jax.synthcity.geometry import offset
from mmrstraj_jax.synthcity.trips import Trips
from mmrstraj_jax.synthcity.vehicles import lane_offsets

NOISE = 2.5  # metres, standard deviation of a good fix, once quick and once slow
# Chance of a trip to have each defect
DEFECTS = {
    "wrong": 0.15,  # one or two single fixes, 300 m to 3 km off
    "null": 0.04,  # a fix at 0, 0
    "poor": 0.10,  # one to four fixes in a row, some 80 m off, which the receiver's accuracy admits
    "duplicate": 0.05,  # a time stamp twice
    "reordered": 0.05,  # two neighbours in the wrong order
    "gap": 0.10,  # no fix for 60 to 120 s
    "drift": 0.06,  # parked with the receiver on: 6 to 10 minutes of fixes that wander some 20 m about
}


@dataclass(frozen=True)
class Fixes:
    """N fixes of a trip as a receiver stored them, and where the vehicle really was."""

    time: Float[np.ndarray, " N"]  # seconds since midnight of the trip's day
    lat: Float[np.ndarray, " N"]
    lon: Float[np.ndarray, " N"]
    accuracy: Float[np.ndarray, " N"]  # metres, as the receiver states it
    true_xy: Float[np.ndarray, "N 2"]  # metres in the city
    defects: dict[str, list[int]]  # defect -> fixes that have it (of a gap: the first fix behind it)


def to_degrees(city: City, xy: Float[np.ndarray, "N 2"]) -> tuple[np.ndarray, np.ndarray]:
    """(lat, lon) of metres in the city."""
    lon, lat = np.array([to_lonlat(city, x, y) for x, y in xy.tolist()]).T
    return lat, lon


class Receiver:
    """Turns trips into fixes. The fixes of a trip depend on (city, seed, trip, interval, defects) alone.

    defects: which of DEFECTS may occur.
    """

    def __init__(self, trips: Trips, seed: int, defects: tuple[str, ...] = tuple(DEFECTS)):
        self.trips, self.seed, self.defects = trips, seed, defects
        self.lines = [_lane(trips, edge) for edge in range(len(trips.network.road))]

    def path(self, trip: int) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, "P 2"]]:
        """(seconds since midnight, metres in the city) of the corners of a trip's path."""
        edges, enter = self.trips.edges[trip], self.trips.enter[trip]
        times, points = [], []
        for edge, start, end in zip(edges.tolist(), enter[:-1].tolist(), enter[1:].tolist(), strict=True):
            share, line = self.lines[edge]
            times.append(start + share * (end - start))
            points.append(line)
        return np.concatenate(times), np.concatenate(points)

    def fixes(self, trip: int, interval: float) -> Fixes:
        """The fixes of trip number `trip`, one every `interval` seconds."""
        key = (self.trips.city.seed, 22, self.seed, trip)
        draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key))).random
        times, points = self.path(trip)
        found = {name for name, u in zip(DEFECTS, draw(len(DEFECTS)), strict=True) if u < DEFECTS[name]}
        found &= set(self.defects)
        end = times[-1] + ((360 + 240 * draw()) if "drift" in found else 0.0)
        t = np.arange(times[0], end, interval)
        true = np.stack([np.interp(t, times, points[:, k]) for k in (0, 1)], 1)
        slow = _wander(draw, t - t[0], 30.0, NOISE)
        seen = true + slow + NOISE * _normal(draw, len(t))
        accuracy = np.round(4 + 8 * draw(len(t)), 1)
        return _damaged(self.trips.city, found, interval, t, true, seen, accuracy, times[-1], draw)


def _damaged(city: City, found: set[str], interval, t, true, seen, accuracy, arrival, draw) -> Fixes:
    """Puts the drawn defects in; each takes fixes that no other has, or is left out of a trip too short."""
    n = len(t)
    parked = t > arrival
    taken = parked.copy()
    taken[[0, n - 1]] = True
    marks: dict[str, list[int]] = {}

    def place(size: int) -> np.ndarray | None:
        """A free run of fixes with a free neighbour at each side."""
        start = 1 + int(draw() * max(n - size - 1, 1))
        if start + size >= n or taken[max(start - 1, 1) : min(start + size + 1, n - 1)].any():
            return None
        taken[start : start + size] = True
        return np.arange(start, start + size)

    if "drift" in found and parked.any():
        seen[parked] = seen[parked] + _wander(draw, t[parked] - arrival, 20.0, 20.0)
        marks["drift"] = np.flatnonzero(parked).tolist()
    keep = np.ones(n, bool)
    if "gap" in found:
        run = place(max(int((60 + 60 * draw()) / interval), 1))
        if run is not None:
            keep[run] = False
            taken[run[-1] + 1] = True
            marks["gap"] = [int(run[-1]) + 1]
    for _ in range(1 + (draw() < 0.3)) if "wrong" in found else ():
        run = place(1)
        if run is not None:
            angle, far = 2 * math.pi * draw(), 300 * 10 ** draw()
            seen[run] += far * np.array([math.cos(angle), math.sin(angle)])
            marks.setdefault("wrong", []).append(int(run[0]))
    if "poor" in found:
        run = place(1 + int(4 * draw()))
        if run is not None:
            seen[run] += 80.0 * _normal(draw, len(run))
            accuracy[run] = np.round(60 + 90 * draw(len(run)), 1)
            marks["poor"] = run.tolist()
    lat, lon = to_degrees(city, seen)
    run = place(1) if "null" in found else None
    if run is not None:
        lat[run], lon[run] = 0.0, 0.0
        marks["null"] = run.tolist()
    time = t.copy()
    run = place(1) if "duplicate" in found else None
    if run is not None:
        time[run] = time[run - 1]
        marks["duplicate"] = run.tolist()
    order = np.arange(n)
    run = place(2) if "reordered" in found else None
    if run is not None:
        order[run] = run[::-1]
        marks["reordered"] = run.tolist()
    order = order[keep[order]]
    now = np.full(n, -1)
    now[order] = np.arange(len(order))
    defects = {name: sorted(int(now[i]) for i in places) for name, places in marks.items()}
    return Fixes(time[order], lat[order], lon[order], accuracy[order], true[order], defects)


def _lane(trips: Trips, edge: int) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, "P 2"]]:
    """(share of the edge's time, metres) along the driven lane of an edge; a slip road is one point."""
    network = trips.network
    if network.road[edge] < 0:
        return np.array([0.0]), network.xy[network.tail[edge]][None]
    road = trips.city.roads[network.road[edge]]
    points = road.points if network.forward[edge] else road.points[::-1]
    line = np.array(offset(points, lane_offsets(road.cls)[0]))
    walked = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    return walked / walked[-1], line


def _wander(draw, t: Float[np.ndarray, " N"], period: float, size: float) -> Float[np.ndarray, "N 2"]:
    """A slow walk: a new point of standard deviation `size` every `period` seconds, straight in between."""
    knots = size * _normal(draw, int(t[-1] / period) + 2)
    return np.stack([np.interp(t / period, np.arange(len(knots)), knots[:, k]) for k in (0, 1)], 1)


def _normal(draw, num: int) -> Float[np.ndarray, "N 2"]:
    """Standard normal pairs from uniform draws (Box and Muller 1958), the same with every NumPy."""
    u = draw((2, num))
    radius, angle = np.sqrt(-2 * np.log1p(-u[0])), 2 * np.pi * u[1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
