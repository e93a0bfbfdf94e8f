"""How each thing and each kind of ground is painted; `canvas` is render.Canvas."""

import math

from mmrstraj_jax.synthcity.blocks import Ground, Thing
from mmrstraj_jax.synthcity.geometry import rectangle
from mmrstraj_jax.synthcity.palette import CAR_RGB, ROOF_RGB, SHIP_RGB, TANK_RGB, shade

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
}


def corners(t: Thing):
    return rectangle(t.x, t.y, t.length, t.width, t.angle)


def shadow(canvas, t: Thing) -> None:
    """Casts the shadow of a thing."""
    if t.kind in ("tank", "tree"):
        canvas.cast_disc(t.x, t.y, t.length / 2, HEIGHT[t.kind])
    elif t.kind in HEIGHT:
        canvas.cast(hull(t) if t.kind == "ship" else corners(t), HEIGHT[t.kind])


def thing(canvas, t: Thing) -> None:
    """Paints a thing."""
    _PAINT[t.kind](canvas, t)


def _light(canvas, angle: float) -> float:
    """Brightness of a slope that faces `angle`."""
    return 1.0 + 0.2 * math.cos(angle - canvas.look.sun)


def _pitched(canvas, t: Thing) -> None:
    """A gable or hip roof: each slope as bright as it faces the sun."""
    color = ROOF_RGB[t.color]
    a, b, c, d = corners(t)
    inset = t.width / 2 if t.tag == "hip" else 0.0
    ux, uy = math.cos(t.angle), math.sin(t.angle)
    half = max(t.length / 2 - inset, 0.5)
    r0, r1 = (t.x - ux * half, t.y - uy * half), (t.x + ux * half, t.y + uy * half)
    canvas.polygon([a, b, c, d], color, "building")
    canvas.polygon([a, b, r1, r0], shade(color, _light(canvas, t.angle - math.pi / 2)))
    canvas.polygon([c, d, r0, r1], shade(color, _light(canvas, t.angle + math.pi / 2)))
    if t.tag == "hip":
        canvas.polygon([b, c, r1], shade(color, _light(canvas, t.angle)))
        canvas.polygon([d, a, r0], shade(color, _light(canvas, t.angle + math.pi)))
    canvas.line([r0, r1], 0.4, shade(color, 1.28))


def _flat(canvas, t: Thing) -> None:
    """A flat roof: bright parapet, plant on top."""
    color = ROOF_RGB[t.color]
    canvas.polygon(corners(t), shade(color, 1.2), "building")
    canvas.polygon(rectangle(t.x, t.y, t.length - 1.6, t.width - 1.6, t.angle), color)
    ux, uy = math.cos(t.angle), math.sin(t.angle)
    for k in (-0.28, 0.05, 0.3):
        side = 0.18 if k > 0 else -0.2
        x, y = t.x + ux * t.length * k - uy * t.width * side, t.y + uy * t.length * k + ux * t.width * side
        dx, dy = canvas.shift(1.5)
        unit = (min(4.0, t.length * 0.14), min(2.8, t.width * 0.2), t.angle)
        canvas.polygon(rectangle(x + dx, y + dy, *unit), shade(color, 0.6))
        canvas.polygon(rectangle(x, y, *unit), shade(color, 0.86))


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
    base = shade(canvas.materials["tree"], {"round": 1.0, "dark": 0.84, "light": 1.18}[t.tag])
    r = t.length / 2
    sx, sy = math.cos(canvas.look.sun), math.sin(canvas.look.sun)
    canvas.disc(t.x, t.y, r, shade(base, 0.8), "tree")
    canvas.disc(t.x + sx * r * 0.15, t.y + sy * r * 0.15, r * 0.78, base)
    canvas.disc(t.x + sx * r * 0.35, t.y + sy * r * 0.35, r * 0.42, shade(base, 1.3))


def _tank(canvas, t: Thing) -> None:
    color, r = TANK_RGB[t.color], t.length / 2
    sx, sy = math.cos(canvas.look.sun), math.sin(canvas.look.sun)
    canvas.disc(t.x, t.y, r, shade(color, 0.66), "tank")
    canvas.disc(t.x + sx * 0.3, t.y + sy * 0.3, r - 0.5, color)
    canvas.disc(t.x - sx * r * 0.12, t.y - sy * r * 0.12, r * 0.7, shade(color, 0.93))
    canvas.disc(t.x, t.y, r * 0.62, shade(color, 1.06))
    canvas.line([(t.x, t.y), (t.x + r * 0.9, t.y)], 0.7, shade(color, 0.7))
    canvas.disc(t.x, t.y, 0.9, shade(color, 0.6))


def _car(canvas, t: Thing) -> None:
    color = CAR_RGB[t.color]
    canvas.polygon(corners(t), color, "car")
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
    if g.material == "stall":
        a, b, c, d = points
        canvas.line(
            [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2), ((c[0] + d[0]) / 2, (c[1] + d[1]) / 2)],
            0.35,
            m["marking"],
        )
        return
    if g.material == "crop":
        _crop(canvas, g)
        return
    cls = {"lawn": "grass"}.get(g.material, "ground")
    canvas.polygon(points, shade(m[g.material], 0.93 + 0.14 * g.tone), cls)


def _crop(canvas, g: Ground) -> None:
    """A field with furrows along its first side."""
    color = canvas.materials[f"crop{int(g.tone * 2.999)}"]
    a, b, c, d = g.points
    canvas.polygon(g.points, color, "farmland")
    rows = max(2, int(math.dist(a, d) / 2.6))
    for k in range(1, rows):
        t = k / rows
        line = [
            (a[0] + (d[0] - a[0]) * t, a[1] + (d[1] - a[1]) * t),
            (b[0] + (c[0] - b[0]) * t, b[1] + (c[1] - b[1]) * t),
        ]
        canvas.line(line, 0.6, shade(color, 0.86 if k % 2 else 1.08))


_PAINT = {
    "house": _building, "apartment": _building, "shop": _building, "warehouse": _building, "pool": _pool,
    "tree": _tree, "tank": _tank, "car": _car, "ship": _ship, "field": _field,
}  # fmt: skip
