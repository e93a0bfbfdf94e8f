"""Draws roads: carriageways, kerbs, wear, lane markings, crossings, roundabouts, decks and bridges."""

import itertools
import math

from mmrstraj_jax.synthcity.canvas import Canvas
from mmrstraj_jax.synthcity.city import SPECS, Road
from mmrstraj_jax.synthcity.geometry import along, cut, offset, rectangle
from mmrstraj_jax.synthcity.palette import grain, shade
from mmrstraj_jax.synthcity.vehicles import lane_offsets
from mmrstraj_jax.synthcity.window import View

_NAMES = {"collector": "asphalt", "arterial": "asphalt", "ramp": "motorway"}


def draw_roads(canvas: Canvas, view: View) -> None:
    """All roads of a view, lower classes below higher ones."""
    m = canvas.materials
    roads = sorted(view.roads, key=lambda r: (SPECS[r.cls].rank, r.cls != "ramp"))
    nodes = [n for n in view.nodes if n.radius > 0]
    for road in roads:
        if road.bridge:
            continue
        verge = m["bank"] if _on_bank(view, road) else m["grass"]
        canvas.line(road.points, road.width + 8.0, verge)
        for x, y in (road.points[0], road.points[-1]):  # no gap where two roads meet at an angle
            canvas.disc(x, y, road.width / 2 + 4.0, verge)
    for road in roads:
        edge = m["concrete" if road.bridge else "pavement"]
        if road.cls != "ramp":
            canvas.line(road.points, road.width + (2.4 if road.bridge else 3.2), edge, "ground")
    for node in nodes:
        if node.kind not in ("overpass", "merge"):
            canvas.disc(node.x, node.y, node.radius + 1.6, m["pavement"], "ground")
    for road in roads:
        _carriageway(canvas, road)
    for node in nodes:
        color = m["asphalt" if node.radius > 4.9 else "local"]
        if node.kind == "overpass":
            continue
        if node.kind == "merge" or (node.radius > 12.9 and node.kind == "bend"):
            color = m["motorway"]
        canvas.disc(node.x, node.y, node.radius, color, "road")
    for road in roads:
        _wear(canvas, view, road)
    for road in roads:
        _markings(canvas, view, road)
        if road.bridge:
            for side in (road.width / 2 + 0.7, -road.width / 2 - 0.7):
                canvas.line(offset(road.points, side), 0.7, m["marking"])
    _crossings(canvas, view)


def bridge_shadow(canvas: Canvas, road: Road) -> None:
    """The shadow of a bridge's deck on the water."""
    dx, dy = canvas.shift(4.0)
    half = road.width / 2 + 1.2
    for side in (half, -half):
        edge = offset(road.points, side)
        moved = [(x + dx, y + dy) for x, y in edge]
        outward = offset(road.points, side + math.copysign(1.0, side))[0]
        if (outward[0] - edge[0][0]) * dx + (outward[1] - edge[0][1]) * dy > 0:  # the side away from the sun
            canvas.shadow_pen.polygon(canvas.pixels([*edge, *reversed(moved)], canvas.fine), fill=255)


def _on_bank(view: View, road: Road) -> bool:
    return any(
        block.use in ("water", "harbor")
        and road.points[0] in block.outline
        and road.points[-1] in block.outline
        for block in view.blocks
    )


def _color(canvas: Canvas, road: Road):
    return canvas.materials[_NAMES.get(road.cls, road.cls)]


def _carriageway(canvas: Canvas, road: Road) -> None:
    canvas.line(road.points, road.width, _color(canvas, road), "road")


def _wear(canvas: Canvas, view: View, road: Road) -> None:
    """Wheels darken the middle of each lane; here and there a patch was laid anew."""
    color = _color(canvas, road)
    start, end = _free(view, road, 0.5)
    middle = cut(road.points, start, end)
    if len(middle) < 2:
        return
    if road.cls != "local":
        for shift in lane_offsets(road.cls):
            for side in (shift,) if road.cls == "ramp" else (shift, -shift):
                canvas.line(offset(middle, side), 1.7, shade(color, 0.935))
    for k in range(int((end - start) / 26)):
        pick = grain(road.id, k)
        if pick < 0.4:
            x, y, angle = along(road.points, start + (k + pick / 0.4) * 26)
            side = (grain(road.id, k, 1) - 0.5) * (road.width - 4)
            patch = rectangle(
                x - math.sin(angle) * side, y + math.cos(angle) * side, 3 + 22 * pick, 2.6, angle
            )
            canvas.polygon(patch, shade(color, 0.9 if pick < 0.25 else 1.07))


def _free(view: View, road: Road, gap: float) -> tuple[float, float]:
    """Arc lengths between the junctions at both ends of a road, `gap` metres clear of each."""
    if road.cls == "motorway":
        return 0.0, road.length
    nodes = view.window.city.nodes
    reach = [nodes[n].radius + gap for n in (road.start, road.end)]
    return reach[0], road.length - reach[1]


def _markings(canvas: Canvas, view: View, road: Road) -> None:
    m = canvas.materials
    if road.cls == "local":
        return
    start, end = _free(view, road, 1.5)
    middle = cut(road.points, start, end)
    if len(middle) < 2:
        return
    if road.cls == "ramp":
        for side in (2.7, -2.7):
            canvas.line(offset(middle, side), 0.4, m["marking"])
        return
    if road.cls == "motorway":
        canvas.line(middle, 2.6, m["grass"], "grass")
        for side in (0.25, -0.25):
            canvas.line(offset(middle, side), 0.4, m["concrete"])
        for side in (1.5, -1.5, 12.6, -12.6):
            canvas.line(offset(middle, side), 0.4, m["marking"])
    elif road.cls == "arterial":
        for side in (0.35, -0.35):
            canvas.line(offset(middle, side), 0.35, m["yellow"])
    lanes = lane_offsets(road.cls)
    between = [(a + b) / 2 for a, b in itertools.pairwise(lanes)] or [0.0]
    for shift in sorted({sign * d for d in between for sign in (1, -1)}):
        lane = offset(road.points, shift)
        at = start
        while at < end - 2:
            canvas.line(cut(lane, at, at + 3.0), 0.4, m["marking"])
            at += 7.0
    if road.cls != "motorway":
        _zebra(canvas, view, road)


def _zebra(canvas: Canvas, view: View, road: Road) -> None:
    """Stop lines and zebra crossings where a road of two lanes or more meets others."""
    nodes, white = view.window.city.nodes, canvas.materials["marking"]
    length = road.length
    for node, near in ((nodes[road.start], True), (nodes[road.end], False)):
        if node.kind not in ("crossroads", "T-junction"):
            continue
        at = node.radius + 2.4
        if at > length / 2:
            continue
        x, y, angle = along(road.points, at if near else length - at)
        sin, cos = math.sin(angle), math.cos(angle)
        count = int((road.width - 1.0) / 1.3)
        for k in range(count):
            side = (k + 0.5 - count / 2) * 1.3
            canvas.polygon(rectangle(x - sin * side, y + cos * side, 2.6, 0.62, angle), white)
        ahead, side = (2.3, road.width / 4) if near else (-2.3, -road.width / 4)
        # The stop line of the lanes that lead to the junction: with right-hand traffic, left of `near`'s way.
        x, y = x + cos * ahead - sin * side, y + sin * ahead + cos * side
        canvas.polygon(rectangle(x, y, 0.5, road.width / 2 - 0.6, angle), white)


def _crossings(canvas: Canvas, view: View) -> None:
    """Roundabout islands, and the decks of overpasses."""
    m = canvas.materials
    for node in view.nodes:
        if node.kind == "roundabout":
            canvas.disc(node.x, node.y, 7.2, m["pavement"], "ground")
            canvas.disc(node.x, node.y, 6.2, m["lawn"], "grass")
            canvas.disc(node.x, node.y, 2.6, shade(m["lawn"], 0.84))
        elif node.kind == "overpass":
            _deck(canvas, view, node)


def _deck(canvas: Canvas, view: View, node) -> None:
    m = canvas.materials
    deck = [r for r in view.roads if node.id in (r.start, r.end) and r.cls != "motorway"]

    def near(road: Road, reach: float):
        length = road.length
        start = 0.0 if road.start == node.id else length - reach
        return cut(road.points, start, start + reach)

    for road in deck:
        canvas.line(near(road, 22), road.width + 2.4, m["concrete"], "ground")
    for road in deck:
        canvas.line(near(road, 24), road.width, m["asphalt"], "road")
        for side in (0.35, -0.35):
            canvas.line(offset(near(road, 24), side), 0.35, m["yellow"])
    canvas.disc(node.x, node.y, 2.0, m["asphalt"], "road")
