"""How each thing and each kind of ground is painted; `canvas` is render.Canvas."""

import math

from mmrstraj_jax.synthcity.geometry import rectangle
from mmrstraj_jax.synthcity.palette import (
    CAR_RGB,
    PLANE_RGB,
    ROOF_RGB,
    SHIP_RGB,
    TANK_RGB,
    grain,
    jitter,
    shade,
)
from mmrstraj_jax.synthcity.parts import Ground, Thing

# Height in metres, for shadows.
HEIGHT = {
    "house": 6.0,
    "apartment": 15.0,
    "shop": 7.0,
    "warehouse": 8.0,
    "tank": 9.0,
    "tree": 6.0,
    "car": 1.6,
    "ship": 5.0,
    "hangar": 9.0,
    "terminal": 11.0,
    "airplane": 4.0,
}


def corners(t: Thing):
    return rectangle(t.x, t.y, t.length, t.width, t.angle)


def shadow(canvas, t: Thing) -> None:
    """Casts the shadow of a thing."""
    if t.kind in ("tank", "tree"):
        canvas.cast_disc(t.x, t.y, t.length / 2, HEIGHT[t.kind])
    elif t.kind == "airplane":
        dx, dy = canvas.shift(HEIGHT["airplane"])
        for part in airframe(t):
            moved = [(x + dx, y + dy) for x, y in part]
            canvas.shadow_pen.polygon(canvas.pixels(moved, canvas.fine), fill=255)
    elif t.kind in HEIGHT:
        canvas.cast(hull(t) if t.kind == "ship" else corners(t), HEIGHT[t.kind])


def thing(canvas, t: Thing) -> None:
    """Paints a thing."""
    _PAINT[t.kind](canvas, t)


def _light(canvas, angle: float) -> float:
    """Brightness of a slope that faces `angle`."""
    return 1.0 + 0.25 * math.cos(angle - canvas.look.sun)


def _pitched(canvas, t: Thing) -> None:
    """A gable or hip roof: each slope as bright as it faces the sun, with ridge, eaves and chimney."""
    color = jitter(ROOF_RGB[t.color], t.x, t.y)
    a, b, c, d = corners(t)
    inset = t.width / 2 if t.tag == "hip" else 0.0
    ux, uy = math.cos(t.angle), math.sin(t.angle)
    half = max(t.length / 2 - inset, 0.5)
    r0, r1 = (t.x - ux * half, t.y - uy * half), (t.x + ux * half, t.y + uy * half)
    low, high = _light(canvas, t.angle - math.pi / 2), _light(canvas, t.angle + math.pi / 2)
    canvas.polygon([a, b, r1, r0], shade(color, low), "building")
    canvas.polygon([c, d, r0, r1], shade(color, high), "building")
    if t.tag == "hip":
        canvas.polygon([b, c, r1], shade(color, _light(canvas, t.angle)), "building")
        canvas.polygon([d, a, r0], shade(color, _light(canvas, t.angle + math.pi)), "building")
        for ridge, eave in ((r0, a), (r0, d), (r1, b), (r1, c)):
            canvas.line([ridge, eave], 0.3, shade(color, 1.18))
    canvas.line([r0, r1], 0.45, shade(color, 1.32))
    for one, two, light in ((a, b, low), (c, d, high)):
        canvas.line([one, two], 0.3, shade(color, light * 0.8))
    if t.kind in ("warehouse", "hangar"):
        _ribs(canvas, t, shade(color, 0.9))
    elif t.kind == "house":
        _chimney(canvas, t, ux, uy)


def _ribs(canvas, t: Thing, color) -> None:
    """Seams of a metal roof, across its ridge."""
    ux, uy = math.cos(t.angle), math.sin(t.angle)
    count = max(2, int(t.length / 4.5))
    for k in range(1, count):
        along = (k / count - 0.5) * t.length
        x, y = t.x + ux * along, t.y + uy * along
        side = t.width / 2 - 0.3
        canvas.line([(x - uy * side, y + ux * side), (x + uy * side, y - ux * side)], 0.3, color)


def _chimney(canvas, t: Thing, ux: float, uy: float) -> None:
    """A chimney with its shadow, and on some roofs a field of solar panels."""
    pick = grain(t.x, t.y, 3)
    along, side = (pick - 0.5) * t.length * 0.5, t.width * (0.12 if pick < 0.5 else -0.12)
    x, y = t.x + ux * along - uy * side, t.y + uy * along + ux * side
    dx, dy = canvas.shift(1.8)
    canvas.line([(x, y), (x + dx, y + dy)], 0.9, (56, 52, 50))
    canvas.polygon(rectangle(x, y, 1.0, 1.0, t.angle), (168, 150, 138))
    if grain(t.x, t.y, 5) < 0.14:
        side = -math.copysign(t.width * 0.25, side)
        spot = (t.x - uy * side, t.y + ux * side, t.length * 0.4, t.width * 0.28, t.angle)
        canvas.polygon(rectangle(*spot), (38, 48, 76))


def _flat(canvas, t: Thing) -> None:
    """A flat roof: bright parapet with its shadow, seams, plant on top."""
    color = jitter(ROOF_RGB[t.color], t.x, t.y, 0.07)
    canvas.polygon(corners(t), shade(color, 1.22), "building")
    canvas.polygon(rectangle(t.x, t.y, t.length - 1.4, t.width - 1.4, t.angle), shade(color, 0.8))
    dx, dy = canvas.shift(1.1)
    inner = (max(t.length - 2.2, 1.0), max(t.width - 2.2, 1.0), t.angle)
    canvas.polygon(rectangle(t.x + dx * 0.4, t.y + dy * 0.4, *inner), color)
    ux, uy = math.cos(t.angle), math.sin(t.angle)
    if t.length > 18:
        _ribs(canvas, t._replace(length=t.length - 2, width=t.width - 2), shade(color, 0.95))
    for k in (-0.28, 0.05, 0.3):
        side = (0.18 if k > 0 else -0.2) * (1 if grain(t.x, t.y, 7) < 0.5 else -1)
        x, y = t.x + ux * t.length * k - uy * t.width * side, t.y + uy * t.length * k + ux * t.width * side
        dx, dy = canvas.shift(1.6)
        unit = (min(4.0, t.length * 0.14), min(2.8, t.width * 0.2), t.angle)
        canvas.polygon(rectangle(x + dx, y + dy, *unit), shade(color, 0.58))
        canvas.polygon(rectangle(x, y, *unit), shade(color, 0.88))
        fan = (x, y, unit[0] * 0.4, unit[1] * 0.5, t.angle)
        canvas.polygon(rectangle(*fan), shade(color, 1.12))


def _building(canvas, t: Thing) -> None:
    if t.tag == "flat":
        _flat(canvas, t)
    else:
        _pitched(canvas, t)


def _pool(canvas, t: Thing) -> None:
    deck, water = canvas.materials["deck"], canvas.materials["pool"]
    canvas.polygon(rectangle(t.x, t.y, t.length + 2.4, t.width + 2.4, t.angle), deck, "ground")
    if t.tag == "round":
        ux, uy = math.cos(t.angle), math.sin(t.angle)
        far = (t.length - t.width) / 2
        canvas.polygon(rectangle(t.x, t.y, 2 * far, t.width, t.angle), water, "pool")
        for sign in (-1, 1):
            canvas.disc(t.x + sign * ux * far, t.y + sign * uy * far, t.width / 2, water, "pool")
    else:
        canvas.polygon(corners(t), water, "pool")
    canvas.polygon(rectangle(t.x, t.y, t.length * 0.5, t.width * 0.4, t.angle), shade(water, 1.09))


def _tree(canvas, t: Thing) -> None:
    """A crown of lobes: dark below, bright towards the sun."""
    base = shade(canvas.materials["tree"], {"round": 1.0, "dark": 0.84, "light": 1.18}[t.tag])
    r = t.length / 2
    sun = canvas.look.sun
    canvas.disc(t.x, t.y, r * 0.94, shade(base, 0.72), "tree")
    spin = grain(t.x, t.y) * 6.28
    for k in range(6):
        angle = spin + k * 1.0472
        reach = r * (0.5 + 0.12 * grain(t.x, t.y, k))
        light = 0.86 + 0.22 * math.cos(angle - sun)
        x, y = t.x + math.cos(angle) * reach, t.y + math.sin(angle) * reach
        canvas.disc(x, y, r * 0.46, shade(base, light), "tree")
    sx, sy = math.cos(sun), math.sin(sun)
    canvas.disc(t.x + sx * r * 0.12, t.y + sy * r * 0.12, r * 0.5, shade(base, 1.06))
    for k in (0, 1, 2):
        angle = sun + (k - 1) * 0.9
        x, y = t.x + math.cos(angle) * r * 0.42, t.y + math.sin(angle) * r * 0.42
        canvas.disc(x, y, r * 0.2, shade(base, 1.34))


def _tank(canvas, t: Thing) -> None:
    color, r = jitter(TANK_RGB[t.color], t.x, t.y, 0.05), t.length / 2
    sx, sy = math.cos(canvas.look.sun), math.sin(canvas.look.sun)
    canvas.disc(t.x, t.y, r, shade(color, 0.66), "tank")
    canvas.disc(t.x + sx * 0.3, t.y + sy * 0.3, r - 0.5, color)
    canvas.disc(t.x - sx * r * 0.12, t.y - sy * r * 0.12, r * 0.7, shade(color, 0.93))
    canvas.disc(t.x, t.y, r * 0.62, shade(color, 1.06))
    for k in range(6):
        angle = t.angle + k * math.pi / 3
        canvas.line(
            [(t.x, t.y), (t.x + math.cos(angle) * r * 0.92, t.y + math.sin(angle) * r * 0.92)],
            0.3,
            shade(color, 0.9),
        )
    canvas.line([(t.x, t.y), (t.x + r * 0.9, t.y)], 0.7, shade(color, 0.7))
    canvas.disc(t.x, t.y, 0.9, shade(color, 0.6))


def _car(canvas, t: Thing) -> None:
    color = CAR_RGB[t.color]
    canvas.polygon(corners(t), color, "car")
    if t.tag == "moving" or t.color in ("white", "yellow"):
        canvas.polygon(rectangle(t.x, t.y, t.length * 0.94, t.width * 0.5, t.angle), shade(color, 1.12))
    glass = (58, 66, 78) if t.color != "black" else (112, 120, 130)
    ux, uy = math.cos(t.angle), math.sin(t.angle)
    for k, size in ((0.16, 0.17), (-0.3, 0.12)):
        x, y = t.x + ux * t.length * k, t.y + uy * t.length * k
        canvas.polygon(rectangle(x, y, t.length * size, t.width * 0.76, t.angle), glass)


def hull(t: Thing):
    """Outline of a ship, bow along its angle."""
    ux, uy = math.cos(t.angle), math.sin(t.angle)
    h, w = t.length / 2, t.width / 2
    shape = ((-h, -0.75 * w), (-0.8 * h, -w), (0.45 * h, -w), (0.8 * h, -0.5 * w), (h, 0.0))
    shape = (*shape, (0.8 * h, 0.5 * w), (0.45 * h, w), (-0.8 * h, w), (-h, 0.75 * w))
    return [(t.x + ux * a - uy * b, t.y + uy * a + ux * b) for a, b in shape]


def _ship(canvas, t: Thing) -> None:
    color = SHIP_RGB[t.color]
    outline = hull(t)
    canvas.polygon(outline, color, "ship")
    deck = [(t.x + (x - t.x) * 0.72, t.y + (y - t.y) * 0.72) for x, y in outline]
    canvas.polygon(deck, shade(color, 1.18 if t.color != "white" else 0.9))
    ux, uy = math.cos(t.angle), math.sin(t.angle)
    house = (t.x - ux * t.length * 0.28, t.y - uy * t.length * 0.28, t.length * 0.18, t.width * 0.7, t.angle)
    canvas.polygon(rectangle(*house), (238, 238, 236))
    for k in (-0.06, 0.1, 0.24):
        hatch = (t.x + ux * t.length * k, t.y + uy * t.length * k, t.length * 0.1, t.width * 0.45, t.angle)
        canvas.polygon(rectangle(*hatch), shade(color, 0.72))


def airframe(t: Thing) -> list[list[tuple[float, float]]]:
    """Outlines of an aircraft's wings, tail and fuselage, its nose along its angle."""
    ux, uy = math.cos(t.angle), math.sin(t.angle)
    h, w, body = t.length / 2, t.width / 2, t.length * 0.055
    wings = ((0.3, 0.0), (-0.12, w), (-0.26, w), (-0.12, 0.0), (-0.26, -w), (-0.12, -w))
    fin = w * 0.38
    tail = ((-0.7, 0.0), (-0.9, fin), (-1.0, fin), (-0.92, 0.0), (-1.0, -fin), (-0.9, -fin))
    fuselage = ((1.0, 0.0), (0.93, body * 0.7), (0.78, body), (-0.5, body), (-1.0, body * 0.3))
    fuselage = (*fuselage, (-1.0, -body * 0.3), (-0.5, -body), (0.78, -body), (0.93, -body * 0.7))
    return [
        [(t.x + ux * a * h - uy * b, t.y + uy * a * h + ux * b) for a, b in shape]
        for shape in (wings, tail, fuselage)
    ]


def _airplane(canvas, t: Thing) -> None:
    color = PLANE_RGB[t.color]
    pale = color if t.color in ("white", "gray") else PLANE_RGB["white"]
    wings, tail, fuselage = airframe(t)
    canvas.polygon(wings, shade(pale, 0.9), "airplane")
    canvas.polygon(tail, shade(color, 0.92), "airplane")
    canvas.polygon(fuselage, pale, "airplane")
    ux, uy = math.cos(t.angle), math.sin(t.angle)
    for side in (-0.3, 0.3):
        ahead, out = t.length * 0.06, t.width * side
        x, y = t.x + ux * ahead - uy * out, t.y + uy * ahead + ux * out
        engine = rectangle(x, y, t.length * 0.11, t.length * 0.05, t.angle)
        canvas.polygon(engine, shade(color, 0.72), "airplane")
    fin = [(t.x - ux * t.length * s, t.y - uy * t.length * s) for s in (0.36, 0.5)]
    canvas.line(fin, 0.7, shade(color, 0.7))
    glass = (t.x + ux * t.length * 0.46, t.y + uy * t.length * 0.46, 1.0, 1.4, t.angle)
    canvas.polygon(rectangle(*glass), (60, 66, 76))


def _field(canvas, t: Thing) -> None:
    """A sports field: white lines on green, or a running track around it."""
    m = canvas.materials
    white, ux, uy = m["marking"], math.cos(t.angle), math.sin(t.angle)
    length, width = t.length, t.width
    if t.tag == "track":
        far = (length - width) / 2
        for size, color in ((1.0, m["track"]), (0.72, m["pitch"])):
            w = width * size
            canvas.polygon(rectangle(t.x, t.y, 2 * far, w, t.angle), color, "sports field")
            for sign in (-1, 1):
                canvas.disc(t.x + sign * ux * far, t.y + sign * uy * far, w / 2, color, "sports field")
        length, width = 2 * far * 0.96, width * 0.64
    else:
        canvas.polygon(corners(t), shade(m["pitch"], 0.9), "sports field")
        for k in range(0, 8, 2):
            at = (k + 0.5) / 8 - 0.5
            stripe = (t.x + ux * length * at, t.y + uy * length * at, length / 8, width, t.angle)
            canvas.polygon(rectangle(*stripe), shade(m["pitch"], 1.06))
        length, width = length - 3, width - 3

    def at(a: float, b: float):
        return t.x + ux * length * a - uy * width * b, t.y + uy * length * a + ux * width * b

    for box in (((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)), ((-0.5, -0.25), (-0.36, -0.25),
    (-0.36, 0.25), (-0.5, 0.25)),
                ((0.5, -0.25), (0.36, -0.25), (0.36, 0.25), (0.5, 0.25))):  # fmt: skip
        canvas.line([at(*p) for p in (*box, box[0])], 0.5, white)
    canvas.line([at(0, -0.5), at(0, 0.5)], 0.5, white)
    ring = [at(0.11 * math.cos(k * 0.5236) * width / length, 0.11 * math.sin(k * 0.5236)) for k in range(13)]
    canvas.line(ring, 0.5, white)


def ground(canvas, g: Ground) -> None:
    """Paints a ground polygon."""
    m = canvas.materials
    points = g.points
    if g.material in ("stall", "hedge"):
        a, b, c, d = points
        middle = [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2), ((c[0] + d[0]) / 2, (c[1] + d[1]) / 2)]
        if g.material == "stall":
            canvas.line(middle, 0.35, m["marking"])
        else:
            dx, dy = canvas.shift(1.2)
            canvas.line([(x + dx, y + dy) for x, y in middle], 1.2, shade(m["lawn"], 0.66))
            canvas.line(middle, 1.3, m["hedge"], "grass")
        return
    if g.material == "crop":
        _crop(canvas, g)
        return
    color = shade(m[g.material], 0.93 + 0.14 * g.tone)
    canvas.polygon(points, color, {"lawn": "grass"}.get(g.material, "ground"))
    if g.material == "lawn":
        _mown(canvas, g, color)
    elif g.material in ("apron", "paved", "parking", "yard"):
        _slabs(canvas, g, shade(color, 0.95))
    elif g.material == "bund":
        canvas.line([*points, points[0]], 0.9, shade(color, 1.14))
    elif g.material in ("runway", "taxiway"):
        _runway(canvas, g)


def _between(g: Ground, t: float, along: bool):
    """The line across a quadrilateral at share t of its first side (or of its second, when along)."""
    a, b, c, d = g.points
    if along:
        a, b, c, d = b, c, d, a
    return [
        (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t),
        (d[0] + (c[0] - d[0]) * t, d[1] + (c[1] - d[1]) * t),
    ]


def _mown(canvas, g: Ground, color) -> None:
    """Mowing stripes on one lawn in three."""
    if g.tone > 0.34:
        return
    count = int(math.dist(g.points[0], g.points[1]) / 3.2)
    for k in range(1, count, 2):
        canvas.line(_between(g, (k + 0.5) / count, False), 1.6, shade(color, 1.05))


def _slabs(canvas, g: Ground, color) -> None:
    """Joints of a paved area."""
    a, b, c, _ = g.points
    for length, along in ((math.dist(a, b), False), (math.dist(b, c), True)):
        count = int(length / 9.0)
        for k in range(1, count):
            canvas.line(_between(g, k / count, along), 0.3, color)


def _runway(canvas, g: Ground) -> None:
    """Centre line, edges and thresholds of a runway; the yellow line of a taxiway."""
    m = canvas.materials
    a, b, c, d = g.points
    if math.dist(a, b) < math.dist(b, c):
        a, b, c, d = b, c, d, a
    ends = [((a[0] + d[0]) / 2, (a[1] + d[1]) / 2), ((b[0] + c[0]) / 2, (b[1] + c[1]) / 2)]
    if g.material == "taxiway":
        canvas.line(ends, 0.5, m["yellow"])
        return
    length, width = math.dist(a, b), math.dist(b, c)
    angle = math.atan2(ends[1][1] - ends[0][1], ends[1][0] - ends[0][0])
    ux, uy = math.cos(angle), math.sin(angle)
    cx, cy = (ends[0][0] + ends[1][0]) / 2, (ends[0][1] + ends[1][1]) / 2

    def bar(along: float, across: float, long: float, wide: float, color) -> None:
        x, y = cx + ux * along - uy * across, cy + uy * along + ux * across
        canvas.polygon(rectangle(x, y, long, wide, angle), color)

    for side in (-4.5, 0.0, 4.5):
        bar(0.0, side, length * 0.8, 2.4, shade(m["runway"], 0.9))
    for side in (-1, 1):
        bar(0.0, side * (width / 2 - 1.2), length, 0.7, m["marking"])
        for k in range(8):
            bar(side * (length / 2 - 11), (k - 3.5) * width / 9.5, 14.0, 1.5, m["marking"])
        for lane in (-1, 1):
            bar(side * (length / 2 - 60), lane * 5.0, 18.0, 2.6, m["marking"])
    for k in range(int((length - 70) / 26)):
        bar(-length / 2 + 48 + k * 26, 0.0, 14.0, 0.8, m["marking"])


def _crop(canvas, g: Ground) -> None:
    """A field with furrows along its first side, and the double track of a tractor now and then."""
    color = canvas.materials[f"crop{int(g.tone * 2.999)}"]
    canvas.polygon(g.points, color, "farmland")
    rows = max(2, int(math.dist(g.points[0], g.points[3]) / 2.2))
    for k in range(1, rows):
        canvas.line(_between(g, k / rows, True), 0.7, shade(color, 0.93 if k % 2 else 1.06))
        if k % 9 == 4:
            for shift in (-0.35, 0.35):
                canvas.line(_between(g, (k + shift) / rows, True), 0.5, shade(color, 0.8))


_PAINT = {
    "house": _building, "apartment": _building, "shop": _building, "warehouse": _building, "pool": _pool,
    "tree": _tree, "tank": _tank, "car": _car, "ship": _ship, 
    "hangar": _building, "terminal": _building, "airplane": _airplane, "field": _field,
}  # fmt: skip
