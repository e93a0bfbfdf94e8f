"""A sheet of twelve labelled windows: what SynthCity looks like.

python -m mmrstraj_jax.synthcity.sheet --out docs/images/synthcity_sheet.jpg
"""

import argparse
import dataclasses
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmrstraj_jax.errors import run_command
from mmrstraj_jax.synthcity.city import City, make_city
from mmrstraj_jax.synthcity.palette import make_look
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.render import render
from mmrstraj_jax.synthcity.window import Window, view, window_centers

SIDE = 384  # pixels of a window
TITLE = 26  # pixels of its title
CITIES = 12  # searched for each window's best place
# title, kind of place, objects of which the window shows as many as there are, metres a pixel, domain, gray
PANELS = (
    ("houses with pools", "residential", ("house", "pool"), 0.32, "A", False),
    ("apartments", "apartments", ("apartment",), 0.38, "A", False),
    ("shops with parked cars", "commercial", ("car",), 0.3, "A", False),
    ("storage tanks", "industrial", ("tank",), 0.4, "A", False),
    ("harbor with ships", "harbor", ("ship",), 0.42, "A", False),
    ("airport", "airport", ("airplane",), 0.55, "A", False),
    ("motorway interchange", "interchange", ("car",), 0.5, "A", False),
    ("roundabout", "roundabout", ("house", "tree"), 0.32, "A", False),
    ("sports fields", "sports", ("field", "tree"), 0.42, "A", False),
    ("farmland", "farmland", ("house",), 0.42, "A", False),
    ("dry season, haze (domain B)", "residential", ("house", "pool", "car"), 0.34, "B", False),
    ("panchromatic", "overpass", ("car", "house"), 0.4, "A", True),
)


def best_window(place: str, kinds: tuple[str, ...], gsd: float, cities: list[City]) -> Window:
    """The window centred on a place of that kind that holds most objects, the sum of each kind's number
    capped at 12."""

    def holds(window: Window) -> int:
        x0, y0, x1, y1 = window.bounds
        inside = [t.kind for t in view(window).things if x0 < t.x < x1 and y0 < t.y < y1]
        return sum(min(inside.count(kind), 12 if len(kinds) > 1 else 200) for kind in kinds)

    centers = ((city, xy) for city in cities for xy in window_centers(city).get(place, []))
    return max((Window(city, *xy, (SIDE, SIDE), gsd, 9) for city, xy in centers), key=holds)


def sheet() -> Image.Image:
    """Draws the sheet: four columns, three rows."""
    cities = [make_city(seed) for seed in range(1, CITIES + 1)]
    image = Image.new("RGB", (4 * (SIDE + 6) + 6, 3 * (SIDE + TITLE + 6) + 6), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(17)
    for k, (title, place, kinds, gsd, domain, gray) in enumerate(PANELS):
        window, s = best_window(place, kinds, gsd, cities), Stream(k, 41)
        look = dataclasses.replace(make_look(s, domain, pan_share=float(gray)), noise=3.0)
        x, y = 6 + k % 4 * (SIDE + 6), 6 + k // 4 * (SIDE + TITLE + 6)
        pen.text((x + 2, y + 2), title, "black", font)
        image.paste(Image.fromarray(render(view(window), look, s).image), (x, y + TITLE))
    return image


def main(argv: list[str] | None = None) -> int:
    """Writes the sheet; the file's suffix names its format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("synthcity_sheet.jpg"))
    out = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet().save(out, quality=82)
    print(out)
    return 0


if __name__ == "__main__":
    run_command(main)
