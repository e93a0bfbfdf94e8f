"""Vehicles on the roads: moving ones by road class and hour, parked ones at the kerbs of local roads."""

import math

from mmrstraj_jax.synthcity.city import ROAD_CLASSES, City, Road
from mmrstraj_jax.synthcity.geometry import along
from mmrstraj_jax.synthcity.parts import CAR_LENGTH, CAR_WIDTH, CARS, Thing
from mmrstraj_jax.synthcity.rand import Stream

# Share of the peak's traffic by hour of the day: two peaks, a quiet night.
HOUR_LEVEL = (
    0.06, 0.04, 0.03, 0.04, 0.08, 0.2, 0.5, 0.9, 1.0, 0.7, 0.5, 0.45,
    0.5, 0.45, 0.45, 0.55, 0.8, 1.0, 0.95, 0.6, 0.4, 0.3, 0.2, 0.1,
)  # fmt: skip
# Chance that a 9 m slot of a lane is taken at the peak.
_TAKEN = {"motorway": 0.34, "arterial": 0.36, "collector": 0.26, "local": 0.06, "ramp": 0.2}
_KERB = 0.05  # chance that a 7 m kerb slot of a local road holds a parked car


def lane_offsets(cls: str) -> list[float]:
    """Metres right of the centre line of each lane of one direction (right-hand traffic)."""
    return {
        "motorway": [3.4, 7.0, 10.6],
        "arterial": [2.0, 5.5],
        "collector": [2.3],
        "local": [1.5],
        "ramp": [0.0],
    }[cls]


def on_road(city: City, road: Road, hour: int) -> list[Thing]:
    """Cars of one road at one hour, from (city seed, road id, hour) alone."""
    key = ("road", road.id, hour)
    if key not in city.cache:
        city.cache[key] = _moving(city, road, hour) + _parked(city, road)
    return city.cache[key]


def _ends(city: City, road: Road) -> tuple[float, float]:
    """Arc lengths between which a vehicle stands on this road alone, clear of both junctions."""
    reach = []
    for node in (city.nodes[road.start], city.nodes[road.end]):
        through = node.kind in ("overpass", "bend", "merge") and node.radius <= road.width / 2
        # Nothing is drawn under the deck of an overpass.
        bare = 12.0 if node.kind == "overpass" else 3.0
        reach.append(bare if through and road.cls == "motorway" else node.radius + 5.0)
    return reach[0], road.length - reach[1]


def _moving(city: City, road: Road, hour: int) -> list[Thing]:
    s = Stream(city.seed, 3, road.id, hour)
    start, end = _ends(city, road)
    slots = int((end - start) / 9.0)
    taken = _TAKEN[road.cls] * HOUR_LEVEL[hour]
    cars = []
    for direction in (1,) if road.cls == "ramp" else (1, -1):
        for shift in lane_offsets(road.cls):
            for k in range(slots):
                if s.chance(taken):
                    at = start + (k + 0.5) * (end - start) / slots + s.uniform(-1.2, 1.2)
                    cars.append(_car(city, road, at, shift, direction, s, "moving"))
    return cars


def _parked(city: City, road: Road) -> list[Thing]:
    if road.cls != "local" or road.bridge:
        return []
    s = Stream(city.seed, 4, road.id)
    start, end = _ends(city, road)
    slots = int((end - start - 4) / 7.0)
    busy = _KERB * s.choice((0.0, 1.0, 2.5))
    shift = ROAD_CLASSES["local"].width / 2 - CAR_WIDTH / 2 - 0.1
    return [
        _car(city, road, start + 2 + (k + 0.5) * 7.0, shift, direction, s, "parked")
        for direction in (1, -1)
        for k in range(slots)
        if s.chance(busy)
    ]


def _car(city: City, road: Road, at: float, shift: float, direction: int, s: Stream, tag: str) -> Thing:
    x, y, angle = along(road.points, at)
    if direction < 0:
        angle += math.pi
    x, y = x + math.sin(angle) * shift, y - math.cos(angle) * shift
    size = city.object_scale
    return Thing("car", x, y, angle, CAR_LENGTH * size, CAR_WIDTH * size, s.weighted(CARS), tag)
