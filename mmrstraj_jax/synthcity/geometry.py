"""Small plane geometry in metres, on plain floats: windows hold few things, so NumPy would only add
overhead."""

import itertools
import math

Point = tuple[float, float]


def rectangle(x: float, y: float, length: float, width: float, angle: float) -> list[Point]:
    """Corners of a rectangle centred at (x, y), its length along `angle` (radians, counter-clockwise from
    east)."""
    c, s = math.cos(angle), math.sin(angle)
    lx, ly, wx, wy = c * length / 2, s * length / 2, -s * width / 2, c * width / 2
    return [
        (x - lx - wx, y - ly - wy),
        (x + lx - wx, y + ly - wy),
        (x + lx + wx, y + ly + wy),
        (x - lx + wx, y - ly + wy),
    ]


def offset(points, distance: float) -> list[Point]:
    """A polyline moved to the right of its direction by `distance` metres (vertex normals, no mitre limit
    needed)."""
    result = []
    for k, (x, y) in enumerate(points):
        ax, ay = points[max(k - 1, 0)]
        bx, by = points[min(k + 1, len(points) - 1)]
        length = math.hypot(bx - ax, by - ay) or 1.0
        result.append((x + (by - ay) / length * distance, y - (bx - ax) / length * distance))
    return result


def bezier(a: Point, b: Point, c: Point, d: Point, parts: int) -> list[Point]:
    """A cubic Bezier curve from a to d in `parts` straight parts."""
    result = []
    for k in range(parts + 1):
        t = k / parts
        s = 1.0 - t
        weights = (s * s * s, 3 * s * s * t, 3 * s * t * t, t * t * t)
        result.append(
            tuple(
                weights[0] * a[i] + weights[1] * b[i] + weights[2] * c[i] + weights[3] * d[i] for i in (0, 1)
            )
        )
    return result


def cut(points, start: float, end: float) -> list[Point]:
    """The part of a polyline between two arc lengths (metres from its first point); empty when end <=
    start."""
    result, walked = [], 0.0
    for (ax, ay), (bx, by) in itertools.pairwise(points):
        length = math.hypot(bx - ax, by - ay)
        lo, hi = max(start - walked, 0.0), min(end - walked, length)
        if lo < hi:
            if not result:
                result.append((ax + (bx - ax) * lo / length, ay + (by - ay) * lo / length))
            result.append((ax + (bx - ax) * hi / length, ay + (by - ay) * hi / length))
        walked += length
    return result


def along(points, distance: float) -> tuple[float, float, float]:
    """(x, y, angle) at an arc length of a polyline."""
    for (ax, ay), (bx, by) in itertools.pairwise(points):
        length = math.hypot(bx - ax, by - ay)
        if distance <= length:
            t = distance / length
            return ax + (bx - ax) * t, ay + (by - ay) * t, math.atan2(by - ay, bx - ax)
        distance -= length
    return bx, by, math.atan2(by - ay, bx - ax)


def clip_segment(
    a: Point, b: Point, x0: float, y0: float, x1: float, y1: float
) -> tuple[Point, Point] | None:
    """The part of a segment inside a rectangle (Liang-Barsky), or None."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    low, high = 0.0, 1.0
    for delta, near, far in ((dx, x0 - a[0], x1 - a[0]), (dy, y0 - a[1], y1 - a[1])):
        if delta == 0:
            if near > 0 or far < 0:
                return None
            continue
        t0, t1 = near / delta, far / delta
        low, high = max(low, min(t0, t1)), min(high, max(t0, t1))
    if low >= high:
        return None
    return (a[0] + dx * low, a[1] + dy * low), (a[0] + dx * high, a[1] + dy * high)
