"""A window of the city: which things, grounds and roads are in it. Rendering, truth and labels all read
this."""

from dataclasses import dataclass

from mmrstraj_jax.synthcity import vehicles
from mmrstraj_jax.synthcity.blocks import content
from mmrstraj_jax.synthcity.city import CELLS, Block, City, Node, Road
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


def window_centers(city: City) -> dict[str, list[tuple[float, float]]]:
    """Centres of blocks, junctions and roads by kind, where a window stays inside the built city."""
    if "places" not in city.cache:
        places: dict[str, list] = {}
        side, outer = CELLS + 1, CELLS - 1
        for block in city.blocks:
            i0, j0, i1, j1 = block.cells
            if min(i0, j0) > 0 and max(i1, j1) <= outer:
                (ax, ay), (bx, by), (cx, cy), (dx, dy) = block.corners
                for i in range(i1 - i0):  # one place for each cell of the lattice
                    for j in range(j1 - j0):
                        u, v = (i + 0.5) / (i1 - i0), (j + 0.5) / (j1 - j0)
                        x = (ax * (1 - u) + bx * u) * (1 - v) + (dx * (1 - u) + cx * u) * v
                        y = (ay * (1 - u) + by * u) * (1 - v) + (dy * (1 - u) + cy * u) * v
                        places.setdefault(block.use, []).append((x, y))
        for node in city.nodes[: side**2]:
            i, j = divmod(node.id, side)
            if 1 < i < outer and 1 < j < outer:
                kind = "interchange" if node.id == city.interchange else node.kind
                places.setdefault(kind, []).append((node.x, node.y))
        inner = {i * side + j for i in range(2, outer) for j in range(2, outer)}
        for node in city.nodes[side**2 :]:
            if any(node.id == r.end and r.start in inner for r in city.roads):
                places.setdefault(node.kind, []).append((node.x, node.y))
        for road in city.roads:
            if road.cls in ("motorway", "arterial") and road.start in inner and road.end in inner:
                places.setdefault(road.cls, []).append(road.points[len(road.points) // 2])
        city.cache["places"] = places
    return city.cache["places"]
