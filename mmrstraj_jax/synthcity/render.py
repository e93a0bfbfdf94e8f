"""Draws a window as an aerial image, together with the class of every pixel.

Colours are drawn at twice the size and box-reduced; the class map is drawn at image size with the same calls.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from mmrstraj_jax.synthcity import paint
from mmrstraj_jax.synthcity.canvas import CLASSES, PAD, Canvas
from mmrstraj_jax.synthcity.palette import Look, mottle
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.roads import bridge_shadow, draw_roads
from mmrstraj_jax.synthcity.window import View

# How much of the ground's texture shows on each class: fine grain, broad patches, and how far the broad
# patches turn green to straw.
_FINE = {
    "ground": 0.06, "grass": 0.085, "tree": 0.17, "road": 0.04, "building": 0.045, "water": 0.03,
    "pool": 0.03, "tank": 0.015, "farmland": 0.08, "sports field": 0.04,
}  # fmt: skip
_BROAD = {
    "ground": 0.05, "grass": 0.06, "tree": 0.03, "road": 0.035, "water": 0.03, "farmland": 0.05,
    "sports field": 0.035,
}  # fmt: skip
_STRAW = {"grass": 0.035, "farmland": 0.025, "sports field": 0.015}
_TABLES = [np.array([by.get(c, 0.0) for c in CLASSES], np.float32) for by in (_FINE, _BROAD, _STRAW)]
_SHADE = 0.5  # share of the light that a shadow takes


class Rendered(NamedTuple):
    image: UInt8[np.ndarray, "H W 3"]
    classes: UInt8[np.ndarray, "H W"]  # index into CLASSES


def render(view: View, look: Look, noise: Stream) -> Rendered:
    """Draws a view. `noise` seeds the sensor noise only; all else follows from the city and the look."""
    canvas = Canvas(view.window, look)
    wet = [block for block in view.blocks if block.use in ("water", "harbor")]
    for block in wet:  # where no road runs along the bank; the water of the next cell covers the rest
        canvas.line([*block.outline, block.outline[0]], 7.0, look.materials["bank"], "ground")
    for block in wet:
        canvas.polygon(block.outline, look.materials["water"], "water")
    for ground in view.grounds:
        paint.ground(canvas, ground)
    draw_roads(canvas, view)
    for thing in view.things:
        paint.shadow(canvas, thing)
    for road in view.roads:
        if road.bridge:
            bridge_shadow(canvas, road)
    canvas.cut_shadows = True
    order = {"pool": 0, "field": 0, "car": 1, "ship": 1, "airplane": 1, "tank": 2, "tree": 4}
    # Ties are broken by place, so that two windows that share an object stack it alike.
    for thing in sorted(view.things, key=lambda t: (order.get(t.kind, 3), t.y, t.x)):
        paint.thing(canvas, thing)
    return _develop(canvas, view, look, noise)


def _develop(canvas: Canvas, view: View, look: Look, noise: Stream) -> Rendered:
    """Ground texture, haze, sensor noise; colour or panchromatic."""
    window = view.window
    w, h = window.pixels
    inner = slice(PAD, -PAD)
    classes = np.ascontiguousarray(np.asarray(canvas.cls)[inner, inner])
    # Channels first: whole planes times whole planes is several times faster than a broadcast over RGB.
    planes = np.asarray(canvas.rgb.reduce(2))[inner, inner].transpose(2, 0, 1).astype(np.float32, order="C")
    lit = 1.0 - np.asarray(canvas.shadow.reduce(2), np.float32)[inner, inner] * (_SHADE / 255.0)
    fine_table, broad_table, straw_table = (table.take(classes) for table in _TABLES)
    fine, broad = (
        texture.take(_texels(canvas.top, h, window.gsd, step, texture), 0).take(
            _texels(canvas.left, w, window.gsd, step, texture), 1
        )
        for texture, step in mottle()
    )
    ground = fine * fine_table
    ground += broad * broad_table
    ground += 1.0
    ground *= lit
    straw = broad * straw_table
    # The sum of two uniforms: near enough to a sensor's noise, and only `random` is used.
    grains = noise.generator.random((2, h, w), np.float32)
    grain = (grains[0] + grains[1] - 1.0) * np.float32(look.noise * 2.45) + 0.5
    skylight = (1.0 - lit) * (0.16 * (1 - look.haze))
    planes[0] *= 1.0 + straw
    planes[2] *= 1.0 - straw
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


def _texels(first: int, count: int, gsd: float, step: float, texture: np.ndarray) -> np.ndarray:
    """Row or column of a periodic texture of `step` metres under each of `count` pixels from pixel `first`
    of the city's grid on."""
    metres = (np.arange(first, first + count) + 0.5) * gsd
    return np.floor(metres / step).astype(np.int64) % len(texture)
