"""Colours, light and weather of an image: the two domains, the seasons of the first, and the panchromatic
sensor."""

import functools
import math
from dataclasses import dataclass

import numpy as np

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.synthcity.rand import Stream

RGB = tuple[int, int, int]

# Materials of domain A, temperate summer.
_SUMMER: dict[str, RGB] = {
    "grass": (112, 126, 84), "lawn": (98, 126, 76), "tree": (52, 84, 48), "water": (60, 88, 106),
    "bank": (150, 146, 116),
    "asphalt": (112, 112, 114), "local": (128, 127, 126), "motorway": (96, 97, 102), "pavement": (176, 172,
    164),
    "paved": (158, 154, 148), "parking": (104, 104, 108), "yard": (168, 156, 134), "path": (188, 180, 160),
    "quay": (176, 170, 158), "crop0": (168, 158, 86), "crop1": (112, 140, 62), "crop2": (150, 122, 84),
    "pitch": (70, 146, 66), "track": (184, 92, 66), "pool": (66, 196, 226), "deck": (220, 214, 200),
    "hedge": (62, 88, 50), "bund": (150, 140, 122), "slab": (186, 178, 166), "drive": (170, 166, 158),
    "runway": (88, 89, 93), "taxiway": (112, 112, 112), "apron": (164, 162, 156),
    "marking": (236, 234, 226), "yellow": (226, 190, 64), "concrete": (190, 186, 180),
}  # fmt: skip
# Domain B, dry season: what differs.
_DRY: dict[str, RGB] = {
    "grass": (196, 172, 122), "lawn": (180, 166, 108), "tree": (104, 112, 62), "water": (96, 122, 124),
    "bank": (206, 186, 142),
    "asphalt": (142, 134, 124), "local": (164, 152, 134), "motorway": (128, 122, 116), "pavement": (206,
    190, 160),
    "paved": (198, 184, 156), "parking": (136, 128, 118), "yard": (212, 190, 146), "path": (214, 196, 156),
    "quay": (200, 188, 164), "crop0": (206, 178, 104), "crop1": (158, 158, 84), "crop2": (184, 142, 92),
    "pitch": (142, 152, 82), "track": (196, 116, 82), "pool": (88, 190, 206), "deck": (228, 214, 182),
    "hedge": (116, 118, 70), "bund": (186, 166, 130), "slab": (206, 192, 166), "drive": (190, 176, 152),
    "runway": (120, 114, 108), "taxiway": (140, 132, 122), "apron": (186, 176, 158),
}  # fmt: skip
_AUTUMN: dict[str, RGB] = {
    "tree": (132, 96, 42),
    "lawn": (122, 130, 66),
    "grass": (128, 128, 74),
    "crop1": (142, 124, 66),
}
_SPRING: dict[str, RGB] = {
    "tree": (72, 118, 50),
    "lawn": (106, 134, 80),
    "grass": (116, 137, 82),
    "crop0": (196, 188, 70),
}

# Object colours, the same words in both domains.
ROOF_RGB: dict[str, RGB] = {
    "red": (178, 76, 58), "brown": (122, 86, 62), "gray": (134, 136, 140), "blue": (72, 106, 166),
    "white": (222, 222, 218),
}  # fmt: skip
CAR_RGB: dict[str, RGB] = {
    "white": (244, 244, 244), "black": (28, 28, 32), "red": (206, 34, 34), "blue": (36, 82, 206),
    "yellow": (246, 208, 36),
}  # fmt: skip
TANK_RGB: dict[str, RGB] = {"white": (232, 232, 228), "gray": (150, 154, 160), "brown": (146, 102, 72)}
PLANE_RGB: dict[str, RGB] = {
    "white": (240, 240, 240), "gray": (196, 200, 206), "red": (200, 44, 44), "blue": (44, 84, 180),
}  # fmt: skip
SHIP_RGB: dict[str, RGB] = {
    "red": (186, 52, 44),
    "blue": (44, 84, 170),
    "white": (236, 236, 232),
    "black": (44, 46, 52),
}


@dataclass(frozen=True)
class Look:
    """How one image is taken. sun: where light comes from, radians counter-clockwise from east."""

    materials: dict[str, RGB]
    sun: float
    shadow: float  # shadow length as a share of height
    haze: float
    haze_rgb: RGB
    noise: float  # standard deviation of sensor noise, 0..255
    gain: tuple[float, float, float]
    panchromatic: bool
    domain: str

    @property
    def sun_corner(self) -> str:
        """The image corner that the sunlight comes from."""
        vertical = "top" if math.sin(self.sun) > 0 else "bottom"
        return f"{vertical} {'right' if math.cos(self.sun) > 0 else 'left'}"


def make_look(stream: Stream, domain: str, pan_share: float = 0.15) -> Look:
    """Draws the look of one image of a domain: "A" temperate, "B" dry season with 20-35 % haze.

    Raises UserError for another domain.
    """
    s = stream
    if domain not in ("A", "B"):
        raise UserError(f"synthcity domain {domain!r}: expected 'A' (temperate) or 'B' (dry season)")
    sun = math.radians(s.choice((45, 135, 225, 315)) + s.uniform(-22, 22))
    pan = s.chance(pan_share)
    season = s.weighted({"summer": 6.0, "autumn": 2.0, "spring": 2.0})
    gain = tuple(s.uniform(0.93, 1.07) for _ in range(3))
    shadow, haze, noise = s.uniform(0.45, 0.8), s.uniform(), s.uniform(2.0, 5.0)
    if domain == "B":
        return Look(
            {**_SUMMER, **_DRY},
            sun,
            shadow * 0.75,
            0.20 + 0.15 * haze,
            (226, 208, 176),
            noise + 2,
            gain,
            pan,
            domain,
        )
    materials = {**_SUMMER, **{"summer": {}, "autumn": _AUTUMN, "spring": _SPRING}[season]}
    return Look(materials, sun, shadow, 0.08 * haze, (206, 216, 226), noise, gain, pan, domain)


def shade(color: RGB, factor: float) -> RGB:
    """A colour made brighter (factor > 1) or darker."""
    return tuple(min(255, max(0, int(c * factor + 0.5))) for c in color)


def grain(*key: float) -> float:
    """A number in 0..1 from whole numbers or metres: the small differences between things of one kind."""
    value = 0x9E3779B9
    for part in key:
        value = ((value ^ int(part * 16 + (1 << 24))) * 0x85EBCA6B) & 0xFFFFFFFF
        value ^= value >> 15
    return (value * 0xC2B2AE35 & 0xFFFFFFFF) / 4294967296.0


def jitter(color: RGB, x: float, y: float, spread: float = 0.09) -> RGB:
    """A colour made a little brighter or darker by where the thing stands."""
    return shade(color, 1.0 + spread * (2 * grain(x, y) - 1))


@functools.cache
def mottle() -> tuple[tuple[np.ndarray, float], tuple[np.ndarray, float]]:
    """Two periodic textures (float32, mean 0, standard deviation about 1) with the metres of a texel: fine
    grain and broad patches.

    The renderer ties them to world coordinates, so neighbouring windows carry the same ground.
    """
    generator = Stream(20240607).generator
    fine = _octaves(generator, ((1, 0.55), (2, 0.6), (4, 0.55)))
    broad = _octaves(generator, ((8, 0.45), (16, 0.6), (64, 0.6)))
    return (fine, 0.25), (broad, 0.5)


def _octaves(generator: np.random.Generator, octaves, size: int = 512) -> np.ndarray:
    """Sum of (step, weight) noises: white noise of size / step, grown by linear interpolation."""
    total = np.zeros((size, size), np.float32)
    for step, weight in octaves:
        grown = generator.random((size // step, size // step), np.float32) - np.float32(0.5)
        for axis in (0, 1):
            part = (np.arange(step, dtype=np.float32) + np.float32(0.5)) / np.float32(step)
            part = np.tile(part, size // step)
            part = part[:, None] if axis == 0 else part[None, :]
            after = np.repeat(np.roll(grown, -1, axis), step, axis)
            grown = np.repeat(grown, step, axis)
            grown = grown + (after - grown) * part
        # A uniform of width 1 has variance 1/12; linear interpolation between two leaves 2/3 of it an axis.
        spread = 1 / 12 * (4 / 9 if step > 1 else 4 / 16)
        total += np.float32(weight / math.sqrt(spread)) * grown
    return total / np.float32(math.sqrt(math.fsum(w * w for _, w in octaves)))
