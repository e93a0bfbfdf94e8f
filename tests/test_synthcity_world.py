"""The world: interchange, airport, river and land use of many cities, from the network and the geometry."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from mmrstraj_jax.synthcity.blocks import content
from mmrstraj_jax.synthcity.city import CELLS, STYLES, make_city
from mmrstraj_jax.synthcity.truth import BUILDINGS
from mmrstraj_jax.synthcity.vehicles import on_road


@pytest.fixture(scope="module")
def cities():
    return [make_city(seed) for seed in range(24)]


def gap(point, road):
    """Metres from a point to a road's centre line, by points every half metre."""
    best = math.inf
    for (ax, ay), (bx, by) in itertools.pairwise(road.points):
        t = np.linspace(0, 1, int(math.dist((ax, ay), (bx, by)) * 2) + 2)
        best = min(best, float(np.hypot(ax + (bx - ax) * t - point[0], ay + (by - ay) * t - point[1]).min()))
    return best


def test_everything_is_somewhere(cities):
    """Over two dozen cities every style, road class, junction and land use occurs."""
    assert {c.style for c in cities} == set(STYLES)
    assert {r.cls for c in cities for r in c.roads} == {"motorway", "arterial", "collector", "local", "ramp"}
    kinds = {n.kind for c in cities for n in c.nodes}
    assert kinds >= {"crossroads", "T-junction", "roundabout", "dead end", "overpass", "merge", "ramp"}
    assert {b.use for c in cities for b in c.blocks} == {
        "residential", "apartments", "commercial", "industrial", "park", "sports", "farmland", "water",
        "harbor", "airport", "verge",
    }  # fmt: skip
    assert any(r.bridge for c in cities for r in c.roads)


def test_cells_are_covered_once(cities):
    for city in cities:
        cells = [(i, j) for b in city.blocks for i in range(*b.cells[::2]) for j in range(*b.cells[1::2])]
        assert sorted(cells) == list(itertools.product(range(CELLS), repeat=2))


def test_ramps_follow_right_hand_traffic(cities):
    """Each ramp joins or leaves the near carriageway in its driving direction, and stays off the far one."""
    found = Counter()
    for city in cities:
        ramps = [r for r in city.roads if r.cls == "ramp"]
        assert len(ramps) == (4 if city.interchange >= 0 else 0)
        motorways = [r for r in city.roads if r.cls == "motorway"]
        for ramp in ramps:
            kinds = city.nodes[ramp.start].kind, city.nodes[ramp.end].kind
            assert sorted(kinds) == ["merge", "ramp"]
            found["entry" if kinds[1] == "merge" else "exit"] += 1
            # The two points of the ramp next to the motorway, and the way it drives there.
            points = ramp.points if kinds[0] == "merge" else ramp.points[::-1]
            near, further = points[1], points[2]
            dx, dy = (b - a for a, b in zip(near, further, strict=True))
            if kinds[1] == "merge":
                dx, dy = -dx, -dy
            # The motorway's centre line lies to the left of whoever drives on the right.
            center = points[0]
            left = (center[0] - near[0]) * -dy + (center[1] - near[1]) * dx
            assert left > 0, (city.seed, kinds)
            # Beyond the first stretch no ramp runs on the motorway.
            assert all(min(gap(p, r) for r in motorways) > 10 for p in points[5:])
    assert found["entry"] == found["exit"] > 4


def test_traffic_on_ramps_drives_forward(cities):
    for city in cities:
        for ramp in (r for r in city.roads if r.cls == "ramp"):
            for car in on_road(city, ramp, 8):
                parts = itertools.pairwise(ramp.points)
                (ax, ay), (bx, by) = min(
                    parts, key=lambda ab: sum(math.dist(p, (car.x, car.y)) for p in ab) - math.dist(*ab)
                )
                assert math.cos(car.angle) * (bx - ax) + math.sin(car.angle) * (by - ay) > 0


def test_airports_lie_inside_their_roads(cities):
    """Aircraft, terminal and runway keep off every road, and aircraft off the buildings."""
    seen = Counter()
    for city in cities:
        for block in (b for b in city.blocks if b.use == "airport"):
            inside = content(city, block)
            roads = city.roads_near(*(f(p[k] for p in block.outline) for f in (min, max) for k in (0, 1)))
            planes = [t for t in inside.things if t.kind == "airplane"]
            halls = [t for t in inside.things if t.kind in ("terminal", "hangar")]
            seen.update(t.kind for t in inside.things)
            for plane in planes:
                assert min(gap((plane.x, plane.y), r) - r.width / 2 for r in roads) > plane.width / 2
                for hall in halls:
                    dx, dy = plane.x - hall.x, plane.y - hall.y
                    a = abs(dx * math.cos(hall.angle) + dy * math.sin(hall.angle)) - hall.length / 2
                    b = abs(dy * math.cos(hall.angle) - dx * math.sin(hall.angle)) - hall.width / 2
                    assert math.hypot(max(a, 0), max(b, 0)) > plane.length / 2 - 1
            for runway in (g for g in inside.grounds if g.material == "runway"):
                assert all(gap(p, r) > r.width / 2 for p in runway.points for r in roads)
    assert seen["airplane"] > 20 and seen["terminal"] > 3 and seen["hangar"] > 5


def to_outline(thing, x, y):
    """Metres from a point to the rectangle of a thing."""
    x, y = x - thing.x, y - thing.y
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    a, b = abs(x * cos + y * sin), abs(y * cos - x * sin)
    return math.hypot(max(a - thing.length / 2, 0), max(b - thing.width / 2, 0))


@pytest.mark.parametrize("style", STYLES)
def test_nothing_stands_on_a_road(style):
    city = make_city(11, style)
    for block in city.blocks:
        for thing in content(city, block).things:
            if thing.kind in (*BUILDINGS, "pool", "tank"):
                for road in city.roads_near(thing.x - 60, thing.y - 60, thing.x + 60, thing.y + 60):
                    points = [
                        (a[0] + (b[0] - a[0]) * k / 20, a[1] + (b[1] - a[1]) * k / 20)
                        for a, b in itertools.pairwise(road.points)
                        for k in range(21)
                    ]
                    free = min(to_outline(thing, *p) for p in points)
                    assert free > road.width / 2, (block.use, thing.kind, road.cls)
