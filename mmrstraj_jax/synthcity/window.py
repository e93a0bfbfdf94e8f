"""A window of the city: which things, grounds and roads are in it. Rendering, truth and labels all read
this."""

from dataclasses import dataclass

from mmrstraj_jax.synthcity import vehicles
from mmrstraj_jax.synthcity.blocks import content
from mmrstraj_jax.synthcity.city import Block, City, Node, Road
from mmrstraj_jax.synthcity.parts import Ground, Thing


@dataclass(frozen=True)
class Window:
    """A north-up rectangle of the city at one hour, drawn at `gsd` metres a pixel."""

    city: City
    x: float  # centre, metres
    y: float
    pixels: tuple[int, int]  # width, height
    gsd: float
    hour: int

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in metres."""
        return self.pixels[0] * self.gsd, self.pixels[1] * self.gsd

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in metres; y1 is the north edge, the top of the image."""
        w, h = self.size
        return self.x - w / 2, self.y - h / 2, self.x + w / 2, self.y + h / 2


@dataclass(frozen=True)
class View:
    """What a window holds, objects whose shadow or edge reaches into it included."""

    window: Window
    blocks: list[Block]
    roads: list[Road]
    nodes: list[Node]
    grounds: list[Ground]
    things: list[Thing]


EDGE = 20.0  # metres beside a road's centre line or a block's outline that are drawn with it
SHADOW = 13.0  # metres that the longest shadow reaches
NODE = 30.0  # metres around a junction within which anything is drawn because of it


def view(window: Window) -> View:
    """Collects the part of the city that a window can show."""
    city = window.city
    x0, y0, x1, y1 = window.bounds
    m = EDGE
    blocks = city.blocks_near(x0 - m, y0 - m, x1 + m, y1 + m)
    roads = city.roads_near(x0 - m, y0 - m, x1 + m, y1 + m)
    grounds: list[Ground] = []
    found: list[Thing] = []
    for block in blocks:
        inside = content(city, block)
        grounds.extend(inside.grounds)
        found.extend(inside.things)
    for road in roads:
        found.extend(vehicles.on_road(city, road, window.hour))
    things = []
    for t in found:
        m = (t.length + t.width) / 2 + SHADOW
        if x0 - m < t.x < x1 + m and y0 - m < t.y < y1 + m:
            things.append(t)
    m = NODE
    nodes = [n for n in city.nodes if x0 - m < n.x < x1 + m and y0 - m < n.y < y1 + m]
    return View(window, blocks, roads, nodes, grounds, things)
