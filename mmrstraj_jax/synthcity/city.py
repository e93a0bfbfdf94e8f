"""The world: a seeded city in metres (x east, y north) around a latitude and longitude.

A lattice of streets is bent by the style (grid, radial, organic, suburban); every lattice line has a road
class, every cell a land use. What stands in a block (blocks.py) and drives on a road (vehicles.py) is made
on first use from the city's seed and the block's or road's number alone, so any window of the city can be
asked for in any order.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.synthcity.rand import Stream

Point = tuple[float, float]

STYLES = ("grid", "radial", "organic", "suburban")
CELLS = 12  # cells a side; the outermost ring is margin
ZONE = 3  # cells a side of a land-use zone


class RoadSpec(NamedTuple):
    width: float  # metres, kerb to kerb
    lanes: int
    rank: int  # 3 is the highest class


ROAD_CLASSES = {
    "motorway": RoadSpec(26.0, 6, 3),
    "arterial": RoadSpec(15.0, 4, 2),
    "collector": RoadSpec(11.0, 2, 1),
    "local": RoadSpec(9.6, 2, 0),  # two lanes and a parking strip at each kerb
}


class Road(NamedTuple):
    """One edge of the network: a polyline between two nodes."""

    id: int
    cls: str
    points: tuple[Point, ...]
    start: int
    end: int
    bridge: bool

    @property
    def width(self) -> float:
        return ROAD_CLASSES[self.cls].width

    @property
    def length(self) -> float:
        return math.fsum(math.dist(a, b) for a, b in itertools.pairwise(self.points))


class Node(NamedTuple):
    """Where roads meet. kind: crossroads, T-junction, roundabout, dead end, overpass, or bend (nothing to
    name)."""

    id: int
    x: float
    y: float
    kind: str
    radius: float  # of the paved disc, metres


class Block(NamedTuple):
    """One cell. corners run round the cell; clearance[k] is the half width of the road on side k (0:
    none)."""

    id: int
    use: str
    corners: tuple[Point, Point, Point, Point]
    outline: tuple[Point, ...]
    clearance: tuple[float, float, float, float]
    lot: float  # typical lot width of residential blocks, metres
    quay: int  # side of a harbor cell that holds the piers, else -1


@dataclass(frozen=True)
class City:
    seed: int
    style: str
    lat: float
    lon: float
    object_scale: float  # shrinks what stands in the city; the second domain uses 0.88
    roads: tuple[Road, ...]
    nodes: tuple[Node, ...]
    blocks: tuple[Block, ...]
    cache: dict = field(default_factory=dict, repr=False, compare=False)

    def blocks_near(self, x0: float, y0: float, x1: float, y1: float) -> list[Block]:
        """Blocks whose bounding box meets the rectangle (metres)."""
        return self._near("blocks", self.blocks, lambda b: b.outline, 0.0, x0, y0, x1, y1)

    def roads_near(self, x0: float, y0: float, x1: float, y1: float) -> list[Road]:
        """Roads whose bounding box, widened by their width, meets the rectangle (metres)."""
        return self._near("roads", self.roads, lambda r: r.points, 15.0, x0, y0, x1, y1)

    def _near(self, name, items, points_of, grow, x0, y0, x1, y1):
        if name not in self.cache:
            boxes = []
            for item in items:
                xs, ys = zip(*points_of(item), strict=True)
                boxes.append((min(xs) - grow, min(ys) - grow, max(xs) + grow, max(ys) + grow, item))
            self.cache[name] = boxes
        return [b[4] for b in self.cache[name] if b[0] < x1 and b[2] > x0 and b[1] < y1 and b[3] > y0]


# Chance that a local road is missing, and that a missing one leaves a dead end.
_MISSING = {"grid": 0.07, "radial": 0.09, "organic": 0.15, "suburban": 0.30}
_ZONES = {
    "urban": ["residential"] * 4
    + ["apartments"] * 2
    + ["commercial"] * 3
    + ["industrial"] * 2
    + ["park", "sports", "sports", "farmland", "farmland"],
    "suburban": ["residential"] * 6
    + ["apartments", "commercial", "commercial", "industrial", "industrial", "park", "sports"]
    + ["farmland"] * 3,
}


def make_city(
    seed: int, style: str | None = None, object_scale: float = 1.0, lat: float = 45.0, lon: float = 8.0
) -> City:
    """Builds the road network and the land use of one city; about 5 ms.

    style: one of STYLES, or None to draw one from the seed. Raises UserError for another style.
    """
    stream = Stream(seed, 1)
    drawn = stream.choice(STYLES)
    style = style or drawn
    if style not in STYLES:
        raise UserError(f"city style {style!r}: expected one of {', '.join(STYLES)}")
    return _Builder(seed, style, stream).city(object_scale, lat, lon)


class _Builder:
    """Lattice bookkeeping. Line k of axis 0 has constant u (a column line), of axis 1 constant v."""

    def __init__(self, seed: int, style: str, stream: Stream):
        self.seed, self.style, self.stream = seed, style, stream
        self.motorway = (stream.integer(0, 1), stream.integer(4, 8)) if stream.chance(0.7) else None
        # The river runs along strip k (between lines k and k + 1) of its axis, clear of the motorway line.
        strips = [2, 3, 8, 9] if self.motorway else [3, 4, 5, 6, 7, 8]
        if self.motorway:
            strips = [k for k in strips if abs(k - self.motorway[1]) > 2]
        self.river = (stream.integer(0, 1), stream.choice(strips)) if stream.chance(0.8) else None
        self.line_class = [self._classes(axis) for axis in (0, 1)]
        self.at = [self._positions(axis) for axis in (0, 1)]
        self.warp = self._warp()
        self.curves: dict = {}
        self.nodes: list[list] = []
        self.roads: list[Road] = []

    def _classes(self, axis: int) -> list[str]:
        first = self.stream.integer(0, 3)
        names = []
        for k in range(CELLS + 1):
            phase = (k - first) % 4
            collector = phase == 2 and self.stream.chance(0.85)
            names.append("arterial" if phase == 0 else "collector" if collector else "local")
        if self.motorway and self.motorway[0] == axis:
            k = self.motorway[1]
            for near in (k - 1, k + 1):
                names[near] = "local" if names[near] == "arterial" else names[near]
            names[k] = "motorway"
        return names

    def _positions(self, axis: int) -> list[float]:
        low, high = (80.0, 112.0) if self.style == "suburban" else (68.0, 100.0)
        at = [0.0]
        for k in range(CELLS):
            step = self.stream.uniform(low, high)
            if self.river == (axis, k):
                step = self.stream.uniform(85.0, 110.0)
            if "motorway" in self.line_class[axis][k : k + 2]:
                step += 14.0
            at.append(at[-1] + step)
        return at

    def _warp(self):
        """The bend of the style: lattice metres (u, v) -> world metres (x, y)."""
        s = self.stream
        width, height = self.at[0][-1], self.at[1][-1]
        if self.style == "grid":
            # Mostly along the compass or the diagonals: the directions people name.
            turn = s.weighted({0.0: 6.0, 45.0: 3.0, 20.0: 1.0}) + s.uniform(-7, 7)
        else:
            turn = s.uniform(0, 90)
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        waves = [
            (s.uniform(0.009, 0.019), s.uniform(0, 6.28), s.uniform(0.009, 0.019), s.uniform(0, 6.28))
            for _ in range(2)
        ]
        bend = {"grid": 0.0, "radial": 0.0, "organic": 13.0, "suburban": 8.0}[self.style]
        radius = 1500.0

        def warp(u: float, v: float) -> Point:
            u, v = u - width / 2, v - height / 2
            if self.style == "radial":
                angle, r = u / radius, radius + v
                u, v = r * math.sin(angle), r * math.cos(angle) - radius
            elif bend:
                du = math.fsum(math.sin(a * v + b) for a, b, _, _ in waves) * bend
                dv = math.fsum(math.sin(c * u + d) for _, _, c, d in waves) * bend
                u, v = u + du, v + dv
            return (u * cos - v * sin, u * sin + v * cos)

        return warp

    def _curve(self, i0: float, j0: float, i1: float, j1: float) -> tuple[Point, ...]:
        """The warped straight line between two lattice points, in up to 5 points."""
        key = (i0, j0, i1, j1)
        if key in self.curves:
            return self.curves[key]
        if (i1, j1, i0, j0) in self.curves:
            return self.curves[i1, j1, i0, j0][::-1]
        parts = 1 if self.style == "grid" else 4

        def at(axis, k):
            whole = int(k)
            if whole == k:
                return self.at[axis][whole]
            return self.at[axis][whole] + (k - whole) * (self.at[axis][whole + 1] - self.at[axis][whole])

        u0, v0, u1, v1 = at(0, i0), at(1, j0), at(0, i1), at(1, j1)
        self.curves[key] = tuple(
            self.warp(u0 + (u1 - u0) * t / parts, v0 + (v1 - v0) * t / parts) for t in range(parts + 1)
        )
        return self.curves[key]

    def city(self, object_scale: float, lat: float, lon: float) -> City:
        for i in range(CELLS + 1):
            for j in range(CELLS + 1):
                x, y = self.warp(self.at[0][i], self.at[1][j])
                self.nodes.append([x, y, []])
        self.edge_width: dict = {}
        for axis in (0, 1):
            for line in range(CELLS + 1):
                for k in range(CELLS):
                    self._edge(axis, line, k)
        nodes = tuple(self._node(k, *node) for k, node in enumerate(self.nodes))
        blocks = tuple(self._blocks())
        return City(self.seed, self.style, lat, lon, object_scale, tuple(self.roads), nodes, blocks)

    def _edge(self, axis: int, line: int, k: int) -> None:
        """The road along `line` of `axis` from crossing k to k + 1: built, cut to a dead end, or left out."""
        s = self.stream
        cls = self.line_class[axis][line]
        over_river = self.river == (1 - axis, k)
        bank = bool(self.river) and self.river[0] == axis and line in (self.river[1], self.river[1] + 1)
        at_motorway = bool(self.motorway) and self.motorway[0] == 1 - axis and self.motorway[1] in (k, k + 1)
        missing, stub = s.chance(_MISSING[self.style]), s.uniform()
        part = s.uniform(0.4, 0.6)
        here, there = ((line, k), (line, k + 1)) if axis == 0 else ((k, line), (k + 1, line))
        a, b = (p[0] * (CELLS + 1) + p[1] for p in (here, there))
        if over_river and cls == "local":
            return
        if at_motorway and cls not in ("arterial", "motorway"):
            return
        if cls == "local" and missing and not bank and not over_river:
            if stub < 0.5:
                middle = (line, k + part) if axis == 0 else (k + part, line)
                points = self._curve(*here, *middle)
                self.nodes.append([*points[-1], []])
                self._road(cls, points, a, len(self.nodes) - 1, False)
                self.edge_width[axis, line, k] = ROAD_CLASSES[cls].width / 2
            return
        self._road(cls, self._curve(*here, *there), a, b, over_river)
        self.edge_width[axis, line, k] = ROAD_CLASSES[cls].width / 2

    def _road(self, cls, points, start, end, bridge) -> None:
        road = Road(len(self.roads), cls, points, start, end, bridge)
        self.roads.append(road)
        self.nodes[start][2].append(cls)
        self.nodes[end][2].append(cls)

    def _node(self, index: int, x: float, y: float, classes: list[str]) -> Node:
        turn = self.stream.uniform()
        widest = max((ROAD_CLASSES[c].width for c in classes), default=0.0)
        if "motorway" in classes:
            kind = "overpass" if len(classes) > classes.count("motorway") else "bend"
        elif len(classes) >= 3:
            kind = "crossroads" if len(classes) == 4 else "T-junction"
            share = 0.18 if {"collector", "arterial"} & set(classes) else 0.05
            if turn < share:
                return Node(index, x, y, "roundabout", 15.0)
        elif len(classes) == 1:
            return Node(index, x, y, "dead end", 8.0)
        else:
            kind = "bend"
        return Node(index, x, y, kind, widest / 2)

    def _blocks(self):
        s = self.stream
        zones = s.shuffled(_ZONES["suburban" if self.style == "suburban" else "urban"])
        # Fields belong to the edge of a city: corners first.
        corners = [0, 3, 12, 15]
        for corner in corners:
            if "farmland" in zones and zones[corner] != "farmland":
                other = next((k for k, z in enumerate(zones) if z == "farmland" and k not in corners), None)
                if other is not None:
                    zones[corner], zones[other] = zones[other], zones[corner]
        lots = [s.choice((17.0, 23.0, 31.0)) for _ in zones]
        harbor = s.integer(3, 6), s.integer(0, 1)
        for i in range(CELLS):
            for j in range(CELLS):
                zone = (i // ZONE) * (CELLS // ZONE) + j // ZONE
                use, change = zones[zone], s.uniform()
                if use == "sports" and (i + j) % 2:
                    use = "park"
                elif change < 0.06 and use not in ("farmland", "industrial"):
                    use = "park" if change < 0.04 else "commercial"
                use, quay = self._water(i, j, use, *harbor)
                outline, clear = [], []
                sides = (
                    ((i, j), (i + 1, j), (1, j, i)),
                    ((i + 1, j), (i + 1, j + 1), (0, i + 1, j)),
                    ((i + 1, j + 1), (i, j + 1), (1, j + 1, i)),
                    ((i, j + 1), (i, j), (0, i, j)),
                )
                for a, b, edge in sides:
                    points = self._curve(*a, *b)
                    outline.extend(points[:-1])
                    clear.append(self.edge_width.get(edge, 0.0))
                quad = tuple(self.warp(self.at[0][a[0]], self.at[1][a[1]]) for a, _, _ in sides)
                yield Block(i * CELLS + j, use, quad, tuple(outline), tuple(clear), lots[zone], quay)

    def _water(self, i: int, j: int, use: str, start: int, bank: int) -> tuple[str, int]:
        """Turns the river's strip into water, and three of its cells with the land behind into a harbor."""
        if not self.river:
            return use, -1
        axis, strip = self.river
        across, along = (i, j) if axis == 0 else (j, i)
        in_harbor = start <= along < start + 4
        if across == strip:
            if not in_harbor:
                return "water", -1
            # Sides of a cell in order: v low, u high, v high, u low.
            return "harbor", ((3, 1) if axis == 0 else (0, 2))[bank]
        if in_harbor and across == strip + (-1, 1)[bank]:
            return "industrial", -1
        return use, -1
