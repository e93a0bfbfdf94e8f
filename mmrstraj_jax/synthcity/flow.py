"""Hourly truth of a city from its trips: flow, mean speed and bottlenecks of every road and of any window."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from mmrstraj_jax.synthcity import trips
from mmrstraj_jax.synthcity.city import City, Road
from mmrstraj_jax.synthcity.geometry import clip_segment

TRIPS = 2000  # of the standard day that `of_city` looks at; each stands for DEMAND / TRIPS vehicles
BOTTLENECK = 0.6  # of the free speed: a road that is slower than this holds up its traffic
_QUIET = 3  # the hour of the free speed


@dataclass(frozen=True)
class Flow:
    """Both directions of each road together. Roads without a trip in an hour have flow 0 and speed NaN."""

    flow: Float[np.ndarray, "roads 24"]  # vehicles an hour
    speed: Float[np.ndarray, "roads 24"]  # space-mean speed, km/h: distance driven over time spent
    free: Float[np.ndarray, " roads"]  # km/h at night on an empty road, junctions included

    def relative_speeds(
        self, roads: Iterable[Road], lengths: Mapping[int, float], hour: int
    ) -> dict[str, float]:
        """Class -> free over actual travel time of the vehicles of an hour on the roads of `lengths`."""
        seconds: dict[str, list[float]] = {}
        for road in roads:
            if lengths.get(road.id) and self.flow[road.id, hour] > 0:
                driven = float(self.flow[road.id, hour]) * lengths[road.id]
                sums = seconds.setdefault(road.cls, [0.0, 0.0])
                sums[0] += driven / float(self.free[road.id])
                sums[1] += driven / float(self.speed[road.id, hour])
        return {cls: free / spent for cls, (free, spent) in seconds.items()}

    def share_of_peak(self, lengths: Mapping[int, float], hour: int) -> float:
        """Vehicle kilometres of an hour over those of the busiest hour, on the roads of `lengths`."""
        ids, metres = list(lengths), np.array(list(lengths.values()))
        driven = (self.flow[ids] * metres[:, None]).sum(0) if ids else np.zeros(24)
        return float(driven[hour] / driven.max()) if driven.max() > 0 else 0.0

    def bottlenecks(self, roads: Iterable[Road], hour: int) -> list[tuple[int, float]]:
        """(road id, share of its free speed) of the roads that hold up traffic, the worst first."""
        shares = [(r.id, float(self.speed[r.id, hour] / self.free[r.id])) for r in roads]
        return sorted(((i, s) for i, s in shares if s < BOTTLENECK), key=lambda pair: (pair[1], pair[0]))

    def peak_hour(self, road: int) -> int:
        """The hour with most vehicles on a road."""
        return int(self.flow[road].argmax())


def hourly(day: trips.Trips) -> Flow:
    """Flow and speed from the trips of one day; each counts on a road in the hour in which it enters it."""
    shape = (len(day.city.roads), 24)
    road, hour, metres, seconds = [], [], [], []
    for trip in range(len(day)):
        edges, enter = day.edges[trip], day.enter[trip]
        on_road = day.network.road[edges] >= 0
        road.append(day.network.road[edges][on_road])
        hour.append((enter[:-1][on_road] // 3600).astype(int) % 24)
        metres.append(day.network.length[edges][on_road])
        seconds.append(np.diff(enter)[on_road])
    place = np.ravel_multi_index((np.concatenate(road), np.concatenate(hour)), shape)

    def total(values=None):
        return np.bincount(place, values, shape[0] * shape[1]).reshape(shape)

    with np.errstate(invalid="ignore"):
        speed = total(np.concatenate(metres)) / total(np.concatenate(seconds)) * 3.6
    empty = day.network.seconds(_QUIET)
    free = np.zeros(shape[0])
    real = day.network.road >= 0
    # The slower direction of a road: they differ in the junction at their end
    np.maximum.at(free, day.network.road[real], (empty / day.network.length)[real])
    return Flow(total() * day.weight, speed, 3.6 / free)


def of_city(city: City) -> Flow:
    """The flow of a city's standard day, made once."""
    if "flow" not in city.cache:
        city.cache["flow"] = hourly(trips.plan(city, TRIPS))
    return city.cache["flow"]


class WindowFlow(NamedTuple):
    """Traffic inside a rectangle, hour by hour."""

    vehicle_km: Float[np.ndarray, " 24"]
    speed: Float[np.ndarray, " 24"]  # km/h of all vehicles together; NaN where nobody drives
    bottlenecks: tuple[tuple[int, ...], ...]  # ids of the roads that hold up traffic, the worst first


def of_window(city: City, bounds: tuple[float, float, float, float]) -> WindowFlow:
    """The traffic of a city's standard day inside x0, y0, x1, y1 (metres)."""
    hourly = of_city(city)
    lengths = lengths_inside(city.roads, bounds)
    roads = [city.roads[i] for i in lengths]
    km = hourly.flow[list(lengths)] * np.array(list(lengths.values()))[:, None] / 1000
    hours = np.divide(km, hourly.speed[list(lengths)], out=np.zeros_like(km), where=km > 0)
    total, spent = km.sum(0), hours.sum(0)
    speed = np.divide(total, spent, out=np.full(24, np.nan), where=spent > 0)
    worst = tuple(tuple(i for i, _ in hourly.bottlenecks(roads, hour)) for hour in range(24))
    return WindowFlow(total, speed, worst)


def lengths_inside(roads: Iterable[Road], bounds: tuple[float, float, float, float]) -> dict[int, float]:
    """Road id -> metres of its centre line inside a rectangle (x0, y0, x1, y1); roads outside are absent."""
    found = {}
    for road in roads:
        parts = (clip_segment(a, b, *bounds) for a, b in itertools.pairwise(road.points))
        length = math.fsum(math.dist(*part) for part in parts if part)
        if length:
            found[road.id] = length
    return found
