"""What lies on open land: parks, sports grounds, fields, water, harbors, airports, land between ramps."""

import itertools
import math

from mmrstraj_jax.synthcity.parts import ROOFS, SHIPS, Frame


def park(f: Frame) -> None:
    s = f.stream
    wide, deep = f.a1 - f.a0, f.b1 - f.b0
    a, b = (f.a0 + f.a1) / 2, (f.b0 + f.b1) / 2
    f.ground("lawn", a, b, wide, deep, s.uniform())
    turn = s.choice((0.0, math.pi / 2, math.atan2(deep, wide)))
    f.ground("path", a, b, math.hypot(wide, deep) * 0.62 if turn else wide, 2.4, 0.5, turn)
    f.trees(s.choice((4, 8, 14, 26)), f.a0, f.b0, f.a1, f.b1, [])


def sports(f: Frame) -> None:
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


def farmland(f: Frame) -> None:
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


def water(f: Frame) -> None:
    s = f.stream
    if s.chance(0.35):
        length = s.uniform(14, 26)
        a, b = s.uniform(-0.2, 0.2) * (f.a1 - f.a0), s.uniform(-0.2, 0.2) * (f.b1 - f.b0)
        f.put("ship", a, b, length, length * 0.28, s.weighted(SHIPS), "hull", s.uniform(0, 6.28))


def harbor(f: Frame) -> None:
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


def verge(f: Frame) -> None:
    """The land between the ramps of an interchange: grass, and trees that keep off the roads."""
    s = f.stream
    x0, y0 = f.cx - 80, f.cy - 80
    lines = [r.points for r in f.city.roads_near(x0, y0, x0 + 160, y0 + 160) if r.cls == "ramp"]
    for _ in range(s.choice((4, 8, 14))):
        size = s.uniform(5.0, 8.5)
        a, b = s.uniform(f.a0, f.a1), s.uniform(f.b0, f.b1)
        if all(_gap(f.world(a, b), line) > size / 2 + 7.0 for line in lines):
            f.put("tree", a, b, size, size, "green", s.choice(("round", "dark", "light")))


def _gap(point, line) -> float:
    """Metres from a point to a polyline."""
    nearest = math.inf
    for (ax, ay), (bx, by) in itertools.pairwise(line):
        dx, dy = bx - ax, by - ay
        t = ((point[0] - ax) * dx + (point[1] - ay) * dy) / (dx * dx + dy * dy)
        t = min(max(t, 0.0), 1.0)
        nearest = min(nearest, math.hypot(point[0] - ax - t * dx, point[1] - ay - t * dy))
    return nearest


def airport(f: Frame) -> None:
    """A runway and a taxiway along the longer side, an apron with terminal, hangars and parked aircraft."""
    s = f.stream
    turned = f.b1 - f.b0 > f.a1 - f.a0
    a0, a1, b0, b1 = (f.b0, f.b1, f.a0, f.a1) if turned else (f.a0, f.a1, f.b0, f.b1)
    long, middle, flip = a1 - a0, (a0 + a1) / 2, s.chance(0.5)
    quarter = math.pi / 2 if turned else 0.0

    def at(a: float, b: float) -> tuple[float, float]:
        """Airport metres (a along the runway, b from its side to the terminal's) in the frame."""
        b = b1 - b if flip else b0 + b
        return (b, a) if turned else (a, b)

    def ground(material, a, b, length, width, tone=0.5):
        f.ground(material, *at(a, b), length, width, tone, quarter)

    deep = b1 - b0
    ground("lawn", middle, deep / 2, long, deep, s.uniform())
    runway, taxi, apron = 24.0, 58.0, deep - 40.0
    ground("taxiway", middle, taxi, long - 70, 11.0)
    for share in (-0.38, 0.0, 0.38):
        ground("taxiway", middle + share * (long - 70), (runway + taxi) / 2, 11.0, taxi - runway)
    wide = min(long * 0.72, 250.0)
    for share in (-0.3, 0.3):
        ground("taxiway", middle + share * wide, (taxi + apron) / 2, 11.0, apron - taxi)
    ground("apron", middle, apron, wide, 46.0)
    ground("runway", middle, runway, long - 16, 30.0)
    stands = int(wide / 42)
    terminal = s.integer(0, 1)
    for k in range(stands):
        a = middle + (k + 0.5 - stands / 2) * wide / stands
        at_gate = (k < stands * 0.65) == bool(terminal)
        if s.chance(0.75):
            size = s.uniform(27.0, 33.0) if at_gate else s.uniform(20.0, 26.0)
            nose = (math.pi if flip else 0.0) if turned else (-1 if flip else 1) * math.pi / 2
            color = s.weighted({"white": 4, "gray": 1, "red": 1, "blue": 1})
            f.put("airplane", *at(a, apron - 4.0), size, size * 0.94, color, "parked", nose)
    if s.chance(0.4):
        a = middle + s.uniform(-0.3, 0.3) * long
        size = s.uniform(27.0, 33.0)
        f.put("airplane", *at(a, runway), size, size * 0.94, "white", "runway", quarter)
    share = 0.62
    a = middle + (0.5 - share / 2) * wide * (1 if terminal == 0 else -1)
    color = s.choice(("gray", "white"))
    f.put("terminal", *at(a, deep - 9.0), wide * share - 6, 15.0, color, "flat", quarter)
    hangars = max(1, int(wide * (1 - share) / 34))
    for k in range(hangars):
        far = middle - (0.5 - (k + 0.5) / hangars * (1 - share)) * wide * (1 if terminal == 0 else -1)
        f.put("hangar", *at(far, deep - 8.5), 26.0, 16.0, s.weighted(ROOFS), "gable", quarter)
