"""Draws a window as an aerial image, together with the class of every pixel.

Colours are drawn at twice the size and box-reduced; the class map is drawn at image size with the same calls.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from mmrstraj_jax.synthcity import paint
from mmrstraj_jax.synthcity.city import ROAD_CLASSES, Road
from mmrstraj_jax.synthcity.geometry import cut, offset
from mmrstraj_jax.synthcity.palette import RGB, Look, mottle
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.vehicles import lane_offsets
from mmrstraj_jax.synthcity.window import View

CLASSES = (
    "ground", "grass", "tree", "road", "building", "water", "pool", "car", "tank", "ship", "farmland",
    "sports field",
)  # fmt: skip
CLASS_ID = {name: k for k, name in enumerate(CLASSES)}
# How much of the world texture shows on each class.
_TEXTURE = np.array([0.05, 0.085, 0.12, 0.03, 0.02, 0.03, 0.02, 0.0, 0.015, 0.0, 0.07, 0.045], np.float32)
_SHADE = 0.47  # share of the light that a shadow takes
_NAMES = {"collector": "asphalt", "arterial": "asphalt"}


class Rendered(NamedTuple):
    image: UInt8[np.ndarray, "H W 3"]
    classes: UInt8[np.ndarray, "H W"]  # index into CLASSES


class Canvas:
    """Colour and class drawing surfaces that share world coordinates (metres, y north)."""

    def __init__(self, view: View, look: Look):
        window = view.window
        self.x0, _, _, self.y1 = window.bounds
        self.look, self.materials = look, look.materials
        w, h = window.pixels
        self.fine, self.coarse = 2.0 / window.gsd, 1.0 / window.gsd
        self.rgb = Image.new("RGB", (2 * w, 2 * h), self.materials["grass"])
        self.cls = Image.new("L", (w, h), CLASS_ID["grass"])
        self.shadow = Image.new("L", (2 * w, 2 * h), 0)
        self.pen, self.cls_pen = ImageDraw.Draw(self.rgb), ImageDraw.Draw(self.cls)
        self.shadow_pen = ImageDraw.Draw(self.shadow)
        # While things are painted their outlines are cut out of the shadow surface: they stand in the sun.
        self.cut_shadows = False

    def pixels(self, points, scale: float) -> list[tuple[float, float]]:
        x0, y1 = self.x0, self.y1
        return [((x - x0) * scale, (y1 - y) * scale) for x, y in points]

    def polygon(self, points, color: RGB, cls: str | None = None) -> None:
        self.pen.polygon(self.pixels(points, self.fine), fill=color)
        if self.cut_shadows and cls:
            self.shadow_pen.polygon(self.pixels(points, self.fine), fill=0)
        if cls:
            self.cls_pen.polygon(self.pixels(points, self.coarse), fill=CLASS_ID[cls])

    def line(self, points, width: float, color: RGB, cls: str | None = None) -> None:
        if len(points) < 2:
            return
        joint = "curve" if width > 3 and len(points) > 2 else None
        self.pen.line(self.pixels(points, self.fine), color, max(1, round(width * self.fine)), joint)
        if cls:
            self.cls_pen.line(
                self.pixels(points, self.coarse), CLASS_ID[cls], max(1, round(width * self.coarse)), joint
            )

    def disc(self, x: float, y: float, radius: float, color: RGB, cls: str | None = None) -> None:
        self.pen.ellipse(self._box(x, y, radius, self.fine), fill=color)
        if self.cut_shadows and cls:
            self.shadow_pen.ellipse(self._box(x, y, radius, self.fine), fill=0)
        if cls:
            self.cls_pen.ellipse(self._box(x, y, radius, self.coarse), fill=CLASS_ID[cls])

    def _box(self, x, y, radius, scale):
        cx, cy, r = (x - self.x0) * scale, (self.y1 - y) * scale, radius * scale
        return (cx - r, cy - r, cx + r, cy + r)

    def cast(self, points, height: float) -> None:
        """Adds the shadow of an upright prism: its outline, swept away from the sun."""
        dx, dy = self.shift(height)
        moved = [(x + dx, y + dy) for x, y in points]
        for k in range(len(points)):
            a, b = points[k - 1], points[k]
            side = [a, b, moved[k], moved[k - 1]]
            self.shadow_pen.polygon(self.pixels(side, self.fine), fill=255)
        self.shadow_pen.polygon(self.pixels(moved, self.fine), fill=255)

    def cast_disc(self, x: float, y: float, radius: float, height: float) -> None:
        dx, dy = self.shift(height)
        self.shadow_pen.ellipse(self._box(x + dx, y + dy, radius, self.fine), fill=255)
        self.shadow_pen.ellipse(self._box(x + dx / 2, y + dy / 2, radius, self.fine), fill=255)

    def shift(self, height: float) -> tuple[float, float]:
        reach = height * self.look.shadow
        return -math.cos(self.look.sun) * reach, -math.sin(self.look.sun) * reach


def render(view: View, look: Look, noise: Stream) -> Rendered:
    """Draws a view. `noise` seeds the sensor noise only; all else follows from the city and the look."""
    canvas = Canvas(view, look)
    _ground(canvas, view)
    _roads(canvas, view)
    for thing in view.things:
        paint.shadow(canvas, thing)
    for road in view.roads:
        if road.bridge:
            _bridge_shadow(canvas, road)
    canvas.cut_shadows = True
    order = {"pool": 0, "field": 0, "car": 1, "ship": 1, "tank": 2, "tree": 4}
    for thing in sorted(view.things, key=lambda t: order.get(t.kind, 3)):
        paint.thing(canvas, thing)
    return _develop(canvas, view, look, noise)


def _ground(canvas: Canvas, view: View) -> None:
    m = canvas.materials
    wet = [block for block in view.blocks if block.use in ("water", "harbor")]
    for block in wet:  # where no road runs along the bank; the water of the next cell covers the rest
        canvas.line([*block.outline, block.outline[0]], 7.0, m["bank"], "ground")
    for block in wet:
        canvas.polygon(block.outline, m["water"], "water")
    for ground in view.grounds:
        paint.ground(canvas, ground)


def _roads(canvas: Canvas, view: View) -> None:
    m = canvas.materials
    roads = sorted(view.roads, key=lambda r: ROAD_CLASSES[r.cls].rank)
    nodes = view.nodes
    for road in roads:
        if road.bridge:
            continue
        verge = m["bank"] if _on_bank(view, road) else m["grass"]
        canvas.line(road.points, road.width + 8.0, verge)
        for x, y in (road.points[0], road.points[-1]):  # no gap where two roads meet at an angle
            canvas.disc(x, y, road.width / 2 + 4.0, verge)
    for road in roads:
        canvas.line(
            road.points,
            road.width + (2.4 if road.bridge else 3.2),
            m["concrete" if road.bridge else "pavement"],
            "ground",
        )
    for node in nodes:
        if node.kind != "overpass":
            canvas.disc(node.x, node.y, node.radius + 1.6, m["pavement"], "ground")
    for road in roads:
        canvas.line(road.points, road.width, m[_NAMES.get(road.cls, road.cls)], "road")
    for node in nodes:
        color = m["asphalt" if node.radius > 4.9 else "local"]
        if node.kind != "overpass":
            canvas.disc(
                node.x,
                node.y,
                node.radius,
                m["motorway"] if node.radius > 12.9 and node.kind == "bend" else color,
                "road",
            )
    for road in roads:
        _markings(canvas, view, road)
        if road.bridge:
            for side in (road.width / 2 + 0.7, -road.width / 2 - 0.7):
                canvas.line(offset(road.points, side), 0.7, m["marking"])
    _crossings(canvas, view)


def _bridge_shadow(canvas: Canvas, road: Road) -> None:
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


def _markings(canvas: Canvas, view: View, road: Road) -> None:
    m, nodes = canvas.materials, view.window.city.nodes
    if road.cls == "local":
        return
    reach = [3.0 if road.cls == "motorway" else nodes[n].radius + 1.5 for n in (road.start, road.end)]
    if road.cls == "motorway":
        reach = [0.0, 0.0]
    start, end = reach[0], road.length - reach[1]
    middle = cut(road.points, start, end)
    if len(middle) < 2:
        return
    if road.cls == "motorway":
        canvas.line(middle, 2.6, m["grass"], "grass")
        for side in (1.5, -1.5, 12.6, -12.6):
            canvas.line(offset(middle, side), 0.4, m["marking"])
    elif road.cls == "arterial":
        for side in (0.35, -0.35):
            canvas.line(offset(middle, side), 0.35, m["yellow"])
    lanes = lane_offsets(road.cls)
    between = [(a + b) / 2 for a, b in itertools.pairwise(lanes)] or [0.0]
    if road.cls == "collector":
        between = [0.0]
    for shift in sorted({sign * d for d in between for sign in (1, -1)}):
        lane = offset(road.points, shift)
        at = start
        while at < end - 2:
            canvas.line(cut(lane, at, at + 3.0), 0.4, m["marking"])
            at += 7.0


def _crossings(canvas: Canvas, view: View) -> None:
    """Roundabout islands, turning circles, and the decks of overpasses."""
    m = canvas.materials
    for node in view.nodes:
        if node.kind == "roundabout":
            canvas.disc(node.x, node.y, 7.2, m["pavement"], "ground")
            canvas.disc(node.x, node.y, 6.2, m["lawn"], "grass")
        elif node.kind == "overpass":
            deck = [r for r in view.roads if node.id in (r.start, r.end) and r.cls != "motorway"]
            for road in deck:
                length = road.length
                near = (
                    cut(road.points, 0, 22)
                    if road.start == node.id
                    else cut(road.points, length - 22, length)
                )
                canvas.line(near, road.width + 2.4, m["concrete"], "ground")
            for road in deck:
                length = road.length
                near = (
                    cut(road.points, 0, 24)
                    if road.start == node.id
                    else cut(road.points, length - 24, length)
                )
                canvas.line(near, road.width, m["asphalt"], "road")
                for side in (0.35, -0.35):
                    canvas.line(offset(near, side), 0.35, m["yellow"])
            canvas.disc(node.x, node.y, 2.0, m["asphalt"], "road")


@functools.cache
def _texture() -> np.ndarray:
    return mottle()


def _develop(canvas: Canvas, view: View, look: Look, noise: Stream) -> Rendered:
    """Ground texture, haze, sensor noise; colour or panchromatic."""
    window = view.window
    x0, _, _, y1 = window.bounds
    w, h = window.pixels
    classes = np.asarray(canvas.cls)
    # Channels first: whole planes times whole planes is several times faster than a broadcast over RGB.
    planes = np.asarray(canvas.rgb.reduce(2)).transpose(2, 0, 1).astype(np.float32, order="C")
    lit = 1.0 - np.asarray(canvas.shadow.reduce(2), np.float32) * (_SHADE / 255.0)
    texture = _texture()
    columns = np.floor((x0 + (np.arange(w) + 0.5) * window.gsd) / 0.5).astype(np.int64) % texture.shape[1]
    rows = np.floor((y1 - (np.arange(h) + 0.5) * window.gsd) / 0.5).astype(np.int64) % texture.shape[0]
    ground = texture.take(rows, 0).take(columns, 1) * _TEXTURE.take(classes) + 1.0
    ground *= lit
    # The sum of two uniforms: near enough to a sensor's noise, and only `random` is used.
    grains = noise.generator.random((2, h, w), np.float32)
    grain = (grains[0] + grains[1] - 1.0) * np.float32(look.noise * 2.45) + 0.5
    skylight = (1.0 - lit) * (0.16 * (1 - look.haze))
    if look.panchromatic:
        # Not a matrix product: BLAS rounds as the processor pleases.
        planes = np.float32([0.33, 0.42, 0.25])[:, None, None] * planes
        planes = (planes[0] + planes[1] + planes[2])[None]
    for plane, gain, haze in zip(planes, look.gain, look.haze_rgb, strict=False):
        plane *= ground
        plane *= gain * (1 - look.haze)
        plane += skylight * haze
        plane += grain + haze * look.haze
    np.clip(planes, 0, 255, out=planes)
    image = np.empty((h, w, 3), np.uint8)
    image[:] = planes.transpose(1, 2, 0)
    return Rendered(image, classes)
