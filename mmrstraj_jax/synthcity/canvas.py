"""Drawing surfaces in world coordinates: colour at twice the image's size, the class of every pixel, shadows.

Points are rounded to one grid of pixels that covers the whole city, before the window's own corner is taken
off. So a polygon that crosses the border of two tiles covers the same pixels in both.
"""

import math

from PIL import Image, ImageDraw

from mmrstraj_jax.synthcity.palette import RGB, Look
from mmrstraj_jax.synthcity.window import Window

CLASSES = (
    "ground", "grass", "tree", "road", "building", "water", "pool", "car", "tank", "ship", "farmland",
    "sports field", "airplane",
)  # fmt: skip
CLASS_ID = {name: k for k, name in enumerate(CLASSES)}
PAD = 2  # pixels drawn around the image and cut off: Pillow rounds differently where it clips
_FAR = 1 << 20  # pixels; keeps every coordinate positive, so that int() rounds down


class Canvas:
    """Colour (2H x 2W), class (H x W) and shadow (2H x 2W) surfaces of one window, PAD wider on each side."""

    def __init__(self, window: Window, look: Look):
        self.look, self.materials = look, look.materials
        x0, _, _, y1 = window.bounds
        w, h = window.pixels
        self.fine, self.coarse = 2.0 / window.gsd, 1.0 / window.gsd
        # The class surface's corner is the colour surface's, halved: both show the same ground.
        self.left, self.top = round(x0 * self.coarse), round(-y1 * self.coarse)
        left, top = self.left - PAD, self.top - PAD
        self._corner = {self.fine: (2 * left, 2 * top), self.coarse: (left, top)}
        w, h = w + 2 * PAD, h + 2 * PAD
        self.rgb = Image.new("RGB", (2 * w, 2 * h), self.materials["grass"])
        self.cls = Image.new("L", (w, h), CLASS_ID["grass"])
        self.shadow = Image.new("L", (2 * w, 2 * h), 0)
        self.pen, self.cls_pen = ImageDraw.Draw(self.rgb), ImageDraw.Draw(self.cls)
        self.shadow_pen = ImageDraw.Draw(self.shadow)
        # While things are painted their outlines are cut out of the shadow surface: they stand in the sun.
        self.cut_shadows = False

    def pixels(self, points, scale: float) -> list[int]:
        """Flat x, y, x, y, ... of world points on the surface of that scale."""
        left, top = self._corner[scale]
        left, top, flat = left + _FAR, top + _FAR, []
        for x, y in points:
            flat.append(int(x * scale + _FAR) - left)
            flat.append(int(_FAR - y * scale) - top)
        return flat

    def polygon(self, points, color: RGB, cls: str | None = None) -> None:
        flat = self.pixels(points, self.fine)
        self.pen.polygon(flat, fill=color)
        if cls:
            if self.cut_shadows:
                self.shadow_pen.polygon(flat, fill=0)
            self.cls_pen.polygon(self.pixels(points, self.coarse), fill=CLASS_ID[cls])

    def line(self, points, width: float, color: RGB, cls: str | None = None) -> None:
        if len(points) < 2:
            return
        joint = "curve" if width > 3 and len(points) > 2 else None
        self.pen.line(self.pixels(points, self.fine), color, max(1, round(width * self.fine)), joint)
        if cls:
            wide = max(1, round(width * self.coarse))
            self.cls_pen.line(self.pixels(points, self.coarse), CLASS_ID[cls], wide, joint)

    def disc(self, x: float, y: float, radius: float, color: RGB, cls: str | None = None) -> None:
        box = self._box(x, y, radius, self.fine)
        self.pen.ellipse(box, fill=color)
        if cls:
            if self.cut_shadows:
                self.shadow_pen.ellipse(box, fill=0)
            self.cls_pen.ellipse(self._box(x, y, radius, self.coarse), fill=CLASS_ID[cls])

    def _box(self, x, y, radius, scale) -> list[int]:
        return self.pixels(((x - radius, y + radius), (x + radius, y - radius)), scale)

    def cast(self, points, height: float) -> None:
        """Adds the shadow of an upright prism: its outline, swept away from the sun."""
        dx, dy = self.shift(height)
        moved = [(x + dx, y + dy) for x, y in points]
        for k in range(len(points)):
            a, b = points[k - 1], points[k]
            self.shadow_pen.polygon(self.pixels((a, b, moved[k], moved[k - 1]), self.fine), fill=255)
        self.shadow_pen.polygon(self.pixels(moved, self.fine), fill=255)

    def cast_disc(self, x: float, y: float, radius: float, height: float) -> None:
        dx, dy = self.shift(height)
        for share in (1.0, 0.75, 0.5, 0.25):
            box = self._box(x + dx * share, y + dy * share, radius, self.fine)
            self.shadow_pen.ellipse(box, fill=255)

    def shift(self, height: float) -> tuple[float, float]:
        """Metres from a point to the end of the shadow of something `height` metres tall there."""
        reach = height * self.look.shadow
        return -math.cos(self.look.sun) * reach, -math.sin(self.look.sun) * reach
