"""What stands in a block: buildings, pools, tanks, trees, parked cars, ships, and the ground below them.

A block is laid out in its own frame: origin at its centre, axis a along its first side. `Frame.inner` is the
rectangle left for building once roads, pavements and roundabouts have taken their share, so nothing placed
inside it can stand on a road.
"""

import math
from typing import NamedTuple

from mmrstraj_jax.synthcity.city import CELLS, Block, City, Point
from mmrstraj_jax.synthcity.geometry import rectangle
from mmrstraj_jax.synthcity.rand import Stream

PAVEMENT = 2.0  # metres beside every road


class Thing(NamedTuple):
    """One object. kind: house, apartment, shop, warehouse, tank, pool, car, tree, ship. Metres, radians."""

    kind: str
    x: float
    y: float
    angle: float
    length: float  # along angle; diameter of round things
    width: float
    color: str
    tag: str  # roof shape, "parked" / "moving", tree variant


class Ground(NamedTuple):
    """One ground polygon. material: lawn, parking, yard, paved, crop, quay, path, stall (a line)."""

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
        self.stream, self.scale, self.block = stream, city.object_scale, block
        q = block.corners
        self.cx, self.cy = math.fsum(p[0] for p in q) / 4, math.fsum(p[1] for p in q) / 4
        dx, dy = (q[1][0] + q[2][0] - q[0][0] - q[3][0]), (q[1][1] + q[2][1] - q[0][1] - q[3][1])
        self.angle = math.atan2(dy, dx)
        self.cos, self.sin = math.cos(self.angle), math.sin(self.angle)
        self.things: list[Thing] = []
        self.grounds: list[Ground] = []
        outline = [self.local(*p) for p in block.outline]
        part = len(outline) // 4
        sides = [
            outline[k * part : (k + 1) * part] + [outline[(k + 1) * part % len(outline)]] for k in range(4)
        ]
        keep = [(c + PAVEMENT) if c else 1.0 for c in block.clearance]
        self.b0 = max(p[1] for p in sides[0]) + keep[0]
        self.a1 = min(p[0] for p in sides[1]) - keep[1]
        self.b1 = min(p[1] for p in sides[2]) - keep[2]
        self.a0 = max(p[0] for p in sides[3]) + keep[3]
        i, j = divmod(block.id, CELLS)
        wheels = [
            city.nodes[a * (CELLS + 1) + b] for a, b in ((i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1))
        ]
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


def content(city: City, block: Block) -> Content:
    """Everything in a block, made from (city seed, block id) on first use and kept."""
    key = ("block", block.id)
    if key not in city.cache:
        frame = Frame(city, block, Stream(city.seed, 2, block.id))
        if frame.a1 - frame.a0 > 14 and frame.b1 - frame.b0 > 14:
            _FILL[block.use](frame)
        city.cache[key] = Content(tuple(frame.things), tuple(frame.grounds))
    return city.cache[key]


def _residential(f: Frame) -> None:
    s = f.stream
    depth = min((f.b1 - f.b0) / 2, 38.0)
    pools = s.choice((0.08, 0.35, 0.6))
    theme = s.weighted(ROOFS)
    for front, sign in ((f.b0, 1.0), (f.b1, -1.0)):
        count = max(int((f.a1 - f.a0) / f.block.lot), 1)
        lot = (f.a1 - f.a0) / count
        for k in range(count):
            a = f.a0 + (k + 0.5) * lot
            tone = s.uniform()
            f.ground("lawn", a, front + sign * depth / 2, lot - 0.8, depth, tone)
            if s.chance(0.14):
                f.trees(
                    s.integer(1, 3),
                    a - lot / 2,
                    front + min(sign * depth, 0),
                    a + lot / 2,
                    front + max(sign * depth, 0),
                    [],
                )
                continue
            length, width = s.uniform(10.5, min(15.5, lot - 3.0)), s.uniform(8.5, 11.0)
            yard = s.uniform(3.0, 6.0)
            b = front + sign * (yard + width / 2)
            color = theme if s.chance(0.6) else s.weighted(ROOFS)
            if not f.put("house", a, b, length, width, color, s.choice(("gable", "hip"))):
                continue
            taken = [(a, b, length, width)]
            f.ground("path", a - length / 2 + 1.6, front + sign * yard / 2, 2.6, yard, 0.5)
            back = depth - yard - width
            if back > 9.5 and s.chance(pools):
                pl, pw = s.uniform(7.0, 10.5), s.uniform(5.0, 6.2)
                pa = a + s.uniform(-1, 1) * max(lot / 2 - pl / 2 - 1.8, 0.0)
                pb = front + sign * (yard + width + back / 2)
                if f.put("pool", pa, pb, pl, pw, "blue", s.choice(("square", "round"))):
                    taken.append((pa, pb, pl + 3, pw + 3))
            low, high = sorted((front, front + sign * depth))
            f.trees(s.integer(0, 3), a - lot / 2, low, a + lot / 2, high, taken)


def _apartments(f: Frame) -> None:
    s = f.stream
    rows = s.integer(1, 2) if f.b1 - f.b0 < 60 else 2
    columns = max(1, min(int((f.a1 - f.a0) / s.uniform(26, 40)), 3))
    cell_a, cell_b = (f.a1 - f.a0) / columns, (f.b1 - f.b0) / rows
    f.ground("lawn", (f.a0 + f.a1) / 2, (f.b0 + f.b1) / 2, f.a1 - f.a0, f.b1 - f.b0, s.uniform())
    color = s.weighted({"gray": 3.0, "white": 3.0, "brown": 2.0, "red": 2.0})
    upright = s.chance(0.4)
    for i in range(columns):
        for j in range(rows):
            a, b = f.a0 + (i + 0.5) * cell_a, f.b0 + (j + 0.5) * cell_b
            length, width = s.uniform(20.0, 34.0), s.uniform(12.0, 15.0)
            if upright:
                length, width = width, length
            length, width = min(length, cell_a - 6), min(width, cell_b - 6)
            if min(length, width) < 9 or s.chance(0.1):
                f.trees(3, a - cell_a / 2, b - cell_b / 2, a + cell_a / 2, b + cell_b / 2, [])
                continue
            roof = color if s.chance(0.75) else s.weighted(ROOFS)
            if not f.put("apartment", a, b, length, width, roof, "flat"):
                continue
            taken = [(a, b, length, width)]
            if cell_b - width > 18 and s.chance(0.6):
                _parking(f, a, b + width / 2 + 5.0, min(cell_a - 6, 26.0), 1, s.uniform(0, 0.7), taken)
            f.trees(s.integer(1, 4), a - cell_a / 2, b - cell_b / 2, a + cell_a / 2, b + cell_b / 2, taken)


def _parking(f: Frame, a, b, length, rows, filled, taken) -> None:
    """A car park of `rows` double rows centred at (a, b), its stalls filled with chance `filled`."""
    s = f.stream
    stall, deep, lane = 3.2, 5.8, 6.0
    columns = int(length / stall)
    if columns < 2 or not f.clear(a, b, length / 2):
        return
    width = rows * deep + (rows // 2 + rows % 2) * lane + 1.0
    f.ground("parking", a, b, columns * stall + 1.5, width, s.uniform(), stalls=rows * columns)
    taken.append((a, b, columns * stall + 1.5, width))
    at = b - width / 2 + 0.5
    for row in range(rows):
        # Rows come in pairs around a lane: stalls, lane, stalls | stalls, lane, ...
        if row % 2 == 1 or rows == 1:
            at += lane
        center = at + deep / 2
        for k in range(columns + 1):
            f.ground("stall", a + (k - columns / 2) * stall, center, 0.3, deep)
        for k in range(columns):
            if s.chance(filled):
                turn = math.pi / 2 + s.uniform(-0.03, 0.03)
                f.put(
                    "car", a + (k + 0.5 - columns / 2) * stall, center, CAR_LENGTH, CAR_WIDTH,
                    s.weighted(CARS), "parked", turn,
                )  # fmt: skip
        at += deep


def _commercial(f: Frame) -> None:
    s = f.stream
    wide, deep = f.a1 - f.a0, f.b1 - f.b0
    f.ground("paved", (f.a0 + f.a1) / 2, (f.b0 + f.b1) / 2, wide, deep, s.uniform())
    filled = s.uniform() ** 1.7
    taken: list = []
    share = s.uniform(0.38, 0.55)
    side = s.chance(0.5)
    low, high = f.b0, f.b0 + deep * share - 3
    if side:
        low, high = f.b1 - deep * share + 3, f.b1
    count = s.integer(1, 3) if wide > 50 else 1
    for k in range(count):
        cell = wide / count
        length, width = cell - s.uniform(4, 12), (high - low) * s.uniform(0.7, 0.95)
        a, b = f.a0 + (k + 0.5) * cell, (low + high) / 2
        if min(length, width) > 8 and f.put("shop", a, b, length, width, s.weighted(ROOFS), "flat"):
            taken.append((a, b, length, width))
    low, high = (high + 3, f.b1 - 1) if not side else (f.b0 + 1, low - 3)
    rows = max(1, min(int((high - low - 1) / 9.5), s.integer(1, 4)))
    if high - low > 14:
        _parking(
            f, (f.a0 + f.a1) / 2, (low + high) / 2, min(wide - 8, s.uniform(24, 60)), rows, filled, taken
        )
    f.trees(s.integer(0, 4), f.a0, f.b0, f.a1, f.b1, taken)


def _industrial(f: Frame) -> None:
    s = f.stream
    wide, deep = f.a1 - f.a0, f.b1 - f.b0
    f.ground("yard", (f.a0 + f.a1) / 2, (f.b0 + f.b1) / 2, wide, deep, s.uniform())
    if s.chance(0.6):
        # Tank farm: a regular field of equal cells, some of them empty.
        size = s.uniform(15.0, 26.0)
        columns, rows = max(1, int(wide / (size + 5))), max(1, int(deep / (size + 5)))
        color, filled = s.weighted(TANKS), s.choice((0.25, 0.5, 0.8))
        for i in range(columns):
            for j in range(rows):
                a, b = f.a0 + (i + 0.5) * wide / columns, f.b0 + (j + 0.5) * deep / rows
                if s.chance(filled):
                    diameter = size * s.uniform(0.6, 0.95)
                    tint = color if s.chance(0.8) else s.weighted(TANKS)
                    f.put("tank", a, b, diameter, diameter, tint, "round")
                elif s.chance(0.15):
                    f.put("warehouse", a, b, size * 0.9, size * 0.7, s.weighted(ROOFS), "gable")
        return
    columns = s.integer(1, 2)
    for i in range(columns):
        cell = wide / columns
        length, width = cell - s.uniform(6, 14), deep * s.uniform(0.45, 0.72)
        a, b = f.a0 + (i + 0.5) * cell, f.b0 + deep * 0.08 + width / 2
        placed = f.put(
            "warehouse",
            a,
            b,
            length,
            width,
            s.weighted({"gray": 3, "blue": 2, "white": 2, "brown": 1}),
            "gable",
        )
        taken = [(a, b, length, width)] if placed else []
        _parking(f, a, f.b1 - 7.0, cell - 10, 1, s.uniform(0, 0.5), taken)


def _park(f: Frame) -> None:
    s = f.stream
    wide, deep = f.a1 - f.a0, f.b1 - f.b0
    a, b = (f.a0 + f.a1) / 2, (f.b0 + f.b1) / 2
    f.ground("lawn", a, b, wide, deep, s.uniform())
    turn = s.choice((0.0, math.pi / 2, math.atan2(deep, wide)))
    f.ground("path", a, b, math.hypot(wide, deep) * 0.62 if turn else wide, 2.4, 0.5, turn)
    f.trees(s.choice((4, 8, 14, 26)), f.a0, f.b0, f.a1, f.b1, [])


def _sports(f: Frame) -> None:
    s = f.stream
    wide, deep = f.a1 - f.a0, f.b1 - f.b0
    f.ground("lawn", (f.a0 + f.a1) / 2, (f.b0 + f.b1) / 2, wide, deep, s.uniform())
    count = s.integer(1, 2) if wide > 60 else 1
    taken = []
    for k in range(count):
        a, b = f.a0 + (k + 0.5) * wide / count, (f.b0 + f.b1) / 2
        length, width = wide / count - s.uniform(6, 10), deep * s.uniform(0.6, 0.8)
        turn = 0.0
        if length < width:
            length, width, turn = width, length, math.pi / 2
        width = max(min(width, length * 0.7), 16.0)
        track = count == 1 and s.chance(0.5)
        if f.put("field", a, b, length, width, "green", "track" if track else "pitch", turn):
            across = (width, length) if turn else (length, width)
            taken.append((a, b, *across))
    f.trees(s.integer(2, 8), f.a0, f.b0, f.a1, f.b1, taken)


def _farmland(f: Frame) -> None:
    s = f.stream
    wide, deep = f.a1 - f.a0, f.b1 - f.b0
    strips = s.integer(1, 3)
    upright = s.chance(0.5)
    for k in range(strips):
        if upright:
            f.ground(
                "crop",
                f.a0 + (k + 0.5) * wide / strips,
                (f.b0 + f.b1) / 2,
                wide / strips - 1.5,
                deep,
                s.uniform(),
                0.0,
            )
        else:
            f.ground(
                "crop",
                (f.a0 + f.a1) / 2,
                f.b0 + (k + 0.5) * deep / strips,
                wide,
                deep / strips - 1.5,
                s.uniform(),
            )
    if s.chance(0.4):
        f.put(
            "house",
            s.choice((f.a0 + 9, f.a1 - 9)),
            s.choice((f.b0 + 8, f.b1 - 8)),
            14,
            9.5,
            s.weighted(ROOFS),
            "gable",
        )


def _water(f: Frame) -> None:
    s = f.stream
    if s.chance(0.35):
        length = s.uniform(14, 26)
        a, b = s.uniform(-0.2, 0.2) * (f.a1 - f.a0), s.uniform(-0.2, 0.2) * (f.b1 - f.b0)
        f.put("ship", a, b, length, length * 0.28, s.weighted(SHIPS), "hull", s.uniform(0, 6.28))


def _harbor(f: Frame) -> None:
    """Piers from one bank, ships moored along them."""
    s = f.stream
    across = f.block.quay in (0, 2)  # piers run along b
    low, high = (f.a0, f.a1) if across else (f.b0, f.b1)
    start = {0: f.b0, 1: f.a1, 2: f.b1, 3: f.a0}[f.block.quay]
    sign = 1.0 if f.block.quay in (0, 3) else -1.0
    reach = min((f.b1 - f.b0) if across else (f.a1 - f.a0), 75.0) * s.uniform(0.5, 0.7)
    piers = s.integer(1, 2)
    for k in range(piers):
        at = low + (k + 0.5) * (high - low) / piers
        middle = start + sign * (reach / 2 - 4)
        a, b = (at, middle) if across else (middle, at)
        f.ground("quay", a, b, 5.0 if across else reach + 8, reach + 8 if across else 5.0)
        for side in (-1, 1):
            if s.chance(0.62):
                length = min(s.uniform(18, 32), reach)
                width = s.uniform(5.5, 7.5)
                shift, far = side * (2.5 + width / 2 + 0.6), start + sign * (reach * s.uniform(0.5, 0.75))
                a, b = (at + shift, far) if across else (far, at + shift)
                turn = (math.pi / 2 if across else 0.0) + (0.0 if s.chance(0.5) else math.pi)
                f.put("ship", a, b, length, width, s.weighted(SHIPS), "hull", turn)


_FILL = {
    "residential": _residential,
    "apartments": _apartments,
    "commercial": _commercial,
    "industrial": _industrial,
    "park": _park,
    "sports": _sports,
    "farmland": _farmland,
    "water": _water,
    "harbor": _harbor,
}
