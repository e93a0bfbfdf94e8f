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
from mmrstraj_jax.synthcity.geometry import Point, cut
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.sites import airport_sites, interchange_sites, ramp

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
# A ramp is one-way, between a motorway and an arterial; never an image's main road.
SPECS = {**ROAD_CLASSES, "ramp": RoadSpec(6.6, 1, 1)}


class Road(NamedTuple):
    """One edge of the network: a polyline between two nodes, driven both ways unless it is a ramp, which
    leads from start to end."""

    id: int
    cls: str
    points: tuple[Point, ...]
    start: int
    end: int
    bridge: bool

    @property
    def width(self) -> float:
        return SPECS[self.cls].width

    @property
    def length(self) -> float:
        return math.fsum(math.dist(a, b) for a, b in itertools.pairwise(self.points))


class Node(NamedTuple):
    """Where roads meet. kind: crossroads, T-junction, roundabout, dead end, overpass (a road over the
    motorway, no turn from one to the other), merge (ramps and motorway), ramp (ramps and arterial), or bend
    (nothing to name)."""

    id: int
    x: float
    y: float
    kind: str
    radius: float  # of the paved disc, metres


class Block(NamedTuple):
    """One cell of the lattice, or the many cells of an airport. corners run round it; clearance[k] is the
    half width of the widest road on side k (0: none); cells are the lattice indices i0, j0, i1, j1 of its
    corners."""

    id: int
    use: str
    corners: tuple[Point, Point, Point, Point]
    outline: tuple[Point, ...]
    clearance: tuple[float, float, float, float]
    lot: float  # typical lot width of residential blocks, metres
    quay: int  # side of a harbor cell that holds the piers, else -1
    cells: tuple[int, int, int, int]


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
    interchange: int  # the overpass node whose motorway has ramps, -1 if there is none
    cache: dict = field(default_factory=dict, repr=False, compare=False)

    def blocks_near(self, x0: float, y0: float, x1: float, y1: float) -> list[Block]:
        """Blocks whose bounding box meets the rectangle (metres)."""
        return self._near("blocks", self.blocks, lambda b: b.outline, x0, y0, x1, y1)

    def roads_near(self, x0: float, y0: float, x1: float, y1: float) -> list[Road]:
        """Roads whose centre line's bounding box meets the rectangle (metres)."""
        return self._near("roads", self.roads, lambda r: r.points, x0, y0, x1, y1)

    def _near(self, name, items, points_of, x0, y0, x1, y1):
        if name not in self.cache:
            boxes = []
            for item in items:
                xs, ys = zip(*points_of(item), strict=True)
                boxes.append((min(xs), min(ys), max(xs), max(ys), item))
            self.cache[name] = boxes
        return [b[4] for b in self.cache[name] if b[0] <= x1 and b[2] >= x0 and b[1] <= y1 and b[3] >= y0]


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

    style: one of STYLES, or None to draw one from the seed. Raises UserError: another style, a negative seed,
    or a place off the map (Web Mercator ends at 85.05 degrees).
    """
    if seed < 0 or not (abs(lat) <= 85 and abs(lon) <= 180):
        raise UserError(
            f"city of seed {seed}, lat {lat}, lon {lon}: expected a seed of 0 or more, lat -85 to 85, "
            "lon -180 to 180"
        )
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
        wanted, wide, pick = stream.chance(0.5), stream.chance(0.5), stream.uniform()
        ports = airport_sites(CELLS, wide, self.river, self.motorway)
        self.airport = ports[int(pick * len(ports))] if wanted and ports else None
        crossing = self.line_class[1 - self.motorway[0]] if self.motorway else []
        sites = interchange_sites(CELLS, self.motorway, self.river, self.airport, crossing)
        self.crossing = stream.choice(sites) if sites else None
        self.arms: dict[tuple[int, int], int] = {}  # (axis, direction) -> node where the ramps of an arm end
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
        self._ramps()
        nodes = tuple(self._node(k, *node) for k, node in enumerate(self.nodes))
        blocks = tuple(self._blocks())
        where = self.crossing
        return City(
            self.seed,
            self.style,
            lat,
            lon,
            object_scale,
            tuple(self.roads),
            nodes,
            blocks,
            where[0] * (CELLS + 1) + where[1] if where else -1,
        )

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
        port = self.airport
        if port:
            inside = (port[axis] < line < port[axis + 2], port[1 - axis] <= k < port[3 - axis])
            if all(inside):
                return
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
        self.edge_width[axis, line, k] = ROAD_CLASSES[cls].width / 2
        points = self._curve(*here, *there)
        if self.crossing in (here, there) and cls in ("motorway", "arterial"):
            self._arm(axis, cls, points, a, b, here == self.crossing)
        else:
            self._road(cls, points, a, b, over_river)

    def _arm(self, axis: int, cls: str, points, a: int, b: int, forward: bool) -> None:
        """One of the four roads at the interchange, split where its ramps begin and end."""
        length = math.fsum(math.dist(p, q) for p, q in itertools.pairwise(points))
        reach = min(64.0, 0.8 * length) if cls == "motorway" else min(36.0, 0.45 * length)
        at = reach if forward else length - reach
        first, second = cut(points, 0.0, at), cut(points, at, length)
        second[0] = first[-1]
        middle = len(self.nodes)
        self.nodes.append([*first[-1], []])
        self._road(cls, (points[0], *first[1:]), a, middle, False)
        self._road(cls, (*second[:-1], points[-1]), middle, b, False)
        self.arms[axis, 1 if forward else -1] = middle

    def _ramps(self) -> None:
        """A diamond: in each quadrant one ramp, off the motorway before the crossing or onto it after."""
        if not self.crossing:
            return
        axis = self.motorway[0]
        center = tuple(self.nodes[self.crossing[0] * (CELLS + 1) + self.crossing[1]][:2])
        lane = ROAD_CLASSES["motorway"].width / 2 - 2.4
        for direction in (1, -1):
            for side in (1, -1):
                merge, far = self.arms[axis, direction], self.arms[1 - axis, side]
                ends = tuple(self.nodes[merge][:2]), tuple(self.nodes[far][:2])
                points, entry = ramp(center, *ends, lane)
                self._road("ramp", points, *((far, merge) if entry else (merge, far)), False)

    def _road(self, cls, points, start, end, bridge) -> None:
        road = Road(len(self.roads), cls, points, start, end, bridge)
        self.roads.append(road)
        self.nodes[start][2].append(cls)
        self.nodes[end][2].append(cls)

    def _node(self, index: int, x: float, y: float, classes: list[str]) -> Node:
        turn = self.stream.uniform()
        widest = max((SPECS[c].width for c in classes), default=0.0)
        if "ramp" in classes:
            kind = "merge" if "motorway" in classes else "ramp"
        elif "motorway" in classes:
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
        port = self.airport
        for i in range(CELLS):
            for j in range(CELLS):
                zone = (i // ZONE) * (CELLS // ZONE) + j // ZONE
                use, change = zones[zone], s.uniform()
                if port and port[0] <= i < port[2] and port[1] <= j < port[3]:
                    continue
                if use == "sports" and (i + j) % 2:
                    use = "park"
                elif change < 0.06 and use not in ("farmland", "industrial"):
                    use = "park" if change < 0.04 else "commercial"
                use, quay = self._water(i, j, use, *harbor)
                if self.crossing and self.crossing[0] - i in (0, 1) and self.crossing[1] - j in (0, 1):
                    use, quay = "verge", -1
                yield self._block(i * CELLS + j, use, (i, j, i + 1, j + 1), lots[zone], quay)
        if port:
            yield self._block(CELLS**2, "airport", port, 0.0, -1)

    def _block(self, id: int, use: str, cells: tuple[int, int, int, int], lot: float, quay: int) -> Block:
        i0, j0, i1, j1 = cells
        rings = (
            [(i, j0) for i in range(i0, i1 + 1)],
            [(i1, j) for j in range(j0, j1 + 1)],
            [(i, j1) for i in range(i1, i0 - 1, -1)],
            [(i0, j) for j in range(j1, j0 - 1, -1)],
        )
        outline, clear = [], []
        for side, ring in enumerate(rings):
            widest = 0.0
            for a, b in itertools.pairwise(ring):
                outline.extend(self._curve(*a, *b)[:-1])
                edge = (1, a[1], min(a[0], b[0])) if side in (0, 2) else (0, a[0], min(a[1], b[1]))
                widest = max(widest, self.edge_width.get(edge, 0.0))
            clear.append(widest)
        quad = tuple(self.warp(self.at[0][ring[0][0]], self.at[1][ring[0][1]]) for ring in rings)
        return Block(id, use, quad, tuple(outline), tuple(clear), lot, quay, cells)

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
