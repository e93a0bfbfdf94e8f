"""The objects and grounds a city is made of, and the frame in which a block is laid out.

A block has its own frame: origin at its centre, axis a along its first side. a0, b0, a1, b1 bound the
rectangle left for building once roads, pavements and roundabouts have taken their share, so nothing placed
inside it can stand on a road.
"""

import itertools
import math
from typing import NamedTuple

from mmrstraj_jax.synthcity.city import CELLS, Block, City, Point
from mmrstraj_jax.synthcity.geometry import rectangle
from mmrstraj_jax.synthcity.rand import Stream

PAVEMENT = 2.0  # metres beside every road


class Thing(NamedTuple):
    """One object. kind: house, apartment, shop, warehouse, hangar, terminal, tank, pool, car, tree, ship,
    airplane, field. Metres, radians."""

    kind: str
    x: float
    y: float
    angle: float
    length: float  # along angle; diameter of round things
    width: float
    color: str
    tag: str  # roof shape, "parked" / "moving", tree variant


class Ground(NamedTuple):
    """One ground polygon. material: lawn, parking, yard, paved, crop, quay, path, hedge, bund, slab,
    runway, taxiway, apron, stall (a line)."""

    material: str
    points: tuple[Point, ...]
    tone: float  # 0..1, picks the shade
    stalls: int = 0  # of a car park


class Content(NamedTuple):
    things: tuple[Thing, ...]
    grounds: tuple[Ground, ...]


ROOFS = {"red": 5.0, "brown": 3.0, "gray": 3.0, "blue": 2.0, "white": 2.0}
CARS = {"white": 3.0, "black": 2.0, "red": 3.0, "blue": 3.0, "yellow": 1.5}
TANKS = {"white": 5.0, "gray": 2.0, "brown": 2.0}
SHIPS = {"red": 3.0, "blue": 3.0, "white": 3.0, "black": 1.0}
CAR_LENGTH, CAR_WIDTH = 5.0, 2.2


class Frame:
    """A block's own coordinates and what was placed in it so far."""

    def __init__(self, city: City, block: Block, stream: Stream):
        self.city, self.block = city, block
        self.stream, self.scale = stream, city.object_scale
        q = block.corners
        self.cx, self.cy = math.fsum(p[0] for p in q) / 4, math.fsum(p[1] for p in q) / 4
        dx, dy = (q[1][0] + q[2][0] - q[0][0] - q[3][0]), (q[1][1] + q[2][1] - q[0][1] - q[3][1])
        self.angle = math.atan2(dy, dx)
        self.cos, self.sin = math.cos(self.angle), math.sin(self.angle)
        self.things: list[Thing] = []
        self.grounds: list[Ground] = []
        outline = [self.local(*p) for p in block.outline]
        ends = [block.outline.index(p) for p in q] + [len(outline)]
        sides = [outline[a:b] + [outline[b % len(outline)]] for a, b in itertools.pairwise(ends)]
        keep = [(c + PAVEMENT) if c else 1.0 for c in block.clearance]
        self.b0 = max(p[1] for p in sides[0]) + keep[0]
        self.a1 = min(p[0] for p in sides[1]) - keep[1]
        self.b1 = min(p[1] for p in sides[2]) - keep[2]
        self.a0 = max(p[0] for p in sides[3]) + keep[3]
        i0, j0, i1, j1 = block.cells
        wheels = [city.nodes[i * (CELLS + 1) + j] for i in range(i0, i1 + 1) for j in range(j0, j1 + 1)]
        self.discs = [(*self.local(n.x, n.y), n.radius + 3.0) for n in wheels if n.kind == "roundabout"]

    def local(self, x: float, y: float) -> Point:
        x, y = x - self.cx, y - self.cy
        return x * self.cos + y * self.sin, y * self.cos - x * self.sin

    def world(self, a: float, b: float) -> Point:
        return self.cx + a * self.cos - b * self.sin, self.cy + a * self.sin + b * self.cos

    def clear(self, a: float, b: float, half: float) -> bool:
        """True when a disc of radius `half` touches no roundabout."""
        return all(math.hypot(a - x, b - y) > r + half for x, y, r in self.discs)

    def put(self, kind, a, b, length, width, color, tag="", turn=0.0) -> bool:
        """Places a thing centred at (a, b) unless a roundabout is in the way; True when placed."""
        if not self.clear(a, b, max(length, width) * 0.6):
            return False
        x, y = self.world(a, b)
        s = self.scale
        self.things.append(Thing(kind, x, y, self.angle + turn, length * s, width * s, color, tag))
        return True

    def ground(self, material, a, b, length, width, tone=0.5, turn=0.0, stalls=0) -> None:
        x, y = self.world(a, b)
        corners = tuple(rectangle(x, y, length, width, self.angle + turn))
        self.grounds.append(Ground(material, corners, tone, stalls))

    def trees(self, count: int, a0, b0, a1, b1, keep_off) -> None:
        """Up to `count` trees in a rectangle, off the rectangles (a, b, length, width) of keep_off."""
        s = self.stream
        placed = []
        for _ in range(count * 3):
            if len(placed) == count or a1 - a0 < 5 or b1 - b0 < 5:
                return
            size = s.uniform(5.0, 8.5)
            a, b = s.uniform(a0 + size / 2, a1 - size / 2), s.uniform(b0 + size / 2, b1 - size / 2)
            near = (
                abs(a - x) < (lx + size) / 2 + 0.8 and abs(b - y) < (ly + size) / 2 + 0.8
                for x, y, lx, ly in keep_off
            )
            if any(near) or any(math.hypot(a - x, b - y) < (size + d) / 2 for x, y, d in placed):
                continue
            if self.put("tree", a, b, size, size, "green", s.choice(("round", "dark", "light"))):
                placed.append((a, b, size))
