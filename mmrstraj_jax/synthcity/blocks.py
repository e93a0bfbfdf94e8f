"""What stands in a built-up block: buildings, pools, tanks, trees, parked cars, and the ground below them."""

import math

from mmrstraj_jax.synthcity import places
from mmrstraj_jax.synthcity.city import Block, City
from mmrstraj_jax.synthcity.parts import (
    CAR_LENGTH,
    CAR_WIDTH,
    CARS,
    ROOFS,
    TANKS,
    Content,
    Frame,
)
from mmrstraj_jax.synthcity.rand import Stream


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
    theme, hedged = s.weighted(ROOFS), s.chance(0.5)
    for front, sign in ((f.b0, 1.0), (f.b1, -1.0)):
        count = max(int((f.a1 - f.a0) / f.block.lot), 1)
        lot = (f.a1 - f.a0) / count
        for k in range(count):
            a = f.a0 + (k + 0.5) * lot
            tone = s.uniform()
            f.ground("lawn", a, front + sign * depth / 2, lot - 0.8, depth, tone)
            if hedged and s.chance(0.7):
                f.ground("hedge", a - lot / 2, front + sign * depth * 0.62, 1.3, depth * 0.7, tone)
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
            drive = s.chance(0.45)
            yard = s.uniform(6.4, 7.6) if drive else s.uniform(3.0, 6.0)
            b = front + sign * (yard + width / 2)
            color = theme if s.chance(0.6) else s.weighted(ROOFS)
            if not f.put("house", a, b, length, width, color, s.choice(("gable", "hip"))):
                continue
            taken = [(a, b, length, width)]
            gate = a - length / 2 + 2.0
            f.ground("drive", gate, front + sign * yard / 2, 3.4 if drive else 1.8, yard, s.uniform())
            if drive:
                taken.append((gate, front + sign * yard / 2, 3.6, yard))
                if s.chance(0.3):
                    turn = math.pi / 2 + s.uniform(-0.03, 0.03)
                    spot = front + sign * (yard / 2 + 0.2)
                    f.put("car", gate, spot, CAR_LENGTH, CAR_WIDTH, s.weighted(CARS), "parked", turn)
            if s.chance(0.5):
                f.ground("slab", a + length * 0.15, b + sign * (width / 2 + 1.6), 4.4, 3.2, s.uniform())
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
                    f.ground("bund", a, b, size + 3.4, size + 3.4, s.uniform())
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


_FILL = {
    "residential": _residential,
    "apartments": _apartments,
    "commercial": _commercial,
    "industrial": _industrial,
    "park": places.park,
    "sports": places.sports,
    "farmland": places.farmland,
    "water": places.water,
    "harbor": places.harbor,
    "airport": places.airport,
    "verge": places.verge,
}
