"""Colours, light and weather of an image: the two domains, the seasons of the first, and the panchromatic
sensor."""

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
}  # fmt: skip
_AUTUMN: dict[str, RGB] = {
    "tree": (132, 96, 42),
    "lawn": (122, 130, 66),
    "grass": (128, 128, 74),
    "crop1": (142, 124, 66),
}
_SPRING: dict[str, RGB] = {
    "tree": (72, 118, 50),
    "lawn": (112, 144, 82),
    "grass": (120, 148, 80),
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


def mottle(size: int = 256) -> np.ndarray:
    """A periodic texture [size, size] float32 of mean 0 and standard deviation about 1: noise on four scales.

    It is tied to world coordinates by the renderer, so neighbouring windows carry the same ground.
    """
    generator = Stream(20240607).generator
    total = np.zeros((size, size), np.float32)
    for step, weight in ((1, 0.55), (2, 0.5), (8, 0.55), (32, 0.6)):
        coarse = generator.random((size // step, size // step), np.float32) - 0.5
        grown = np.kron(coarse, np.ones((step, step), np.float32))
        for axis in (0, 1):  # a box blur as wide as the step takes the blocks away, wrapping round
            grown = np.mean([np.roll(grown, k, axis) for k in range(step)], axis=0, dtype=np.float32)
        total += weight * grown / max(float(grown.std()), 1e-6)
    return total / total.std()
