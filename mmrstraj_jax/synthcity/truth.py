"""What is true of a window, from the geometry: objects, counts, road classes and directions, junctions, land
use.

The margin rule, used by truth and text alike. An object belongs to the image when its centre lies inside.
Where its centre is within a fifth of its size of the border it is "unsure"; outside, as long as it can still
be seen, it is a "sliver". A count is stated only when nothing of that kind is unsure, an absence only when
not even a sliver shows.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np

from mmrstraj_jax.synthcity.canvas import CLASSES
from mmrstraj_jax.synthcity.city import ROAD_CLASSES, Block, Node
from mmrstraj_jax.synthcity.geometry import clip_segment
from mmrstraj_jax.synthcity.palette import Look
from mmrstraj_jax.synthcity.window import View

BUILDINGS = ("house", "apartment", "shop", "warehouse", "hangar", "terminal")
CELL_NAMES = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
JUNCTIONS = ("crossroads", "T-junction", "roundabout", "dead end", "overpass", "interchange")
DIRECTIONS = {"north-south": 90.0, "east-west": 0.0, "diagonal": None}
# Traffic level from the number of moving vehicles in the image; text rows teach the same thresholds.
LEVELS = (("light", 0, 3), ("moderate", 4, 9), ("heavy", 10, 10_000))
_CELL_MARGIN = 0.045  # of the image side: nearer to a cell border than this, no cell is named
_ANGLE = 18.0  # degrees from an axis within which a direction is named


@dataclass(frozen=True)
class Item:
    """An object in the image. u, v: centre as shares of the image's width and height, v down."""

    kind: str
    color: str
    u: float
    v: float
    length: float
    width: float
    tag: str
    status: str  # inside, unsure, sliver
    cell: str | None  # of the 3x3 grid, None when it lies near a border between cells


@dataclass(frozen=True)
class Count:
    """Objects surely inside, possibly inside, and visible at all (inside + unsure + slivers)."""

    sure: int
    possible: int
    visible: int

    @property
    def exact(self) -> int | None:
        return self.sure if self.sure == self.possible else None


@dataclass(frozen=True)
class Truth:
    """Everything that is known of an image; None where the margin rule leaves an answer open.

    Attributes:
        items: objects with kind, color, place in the image (shares of width and height) and size (metres).
        counts: objects by kind; also "building", "moving car", "parked car".
        shares: of the image's pixels, by class of canvas.CLASSES; what stands higher hides what lies below.
        uses: zoning, as shares of the image by land use (residential, apartments, commercial, industrial,
            park, sports, farmland, water, harbor, airport, verge).
        road_lengths: metres of road centre line by class (motorway, arterial, collector, local, ramp) and
            direction (north-south, east-west, diagonal, "other" between the names).
        main_class: the highest road class that is clearly in the image.
        main_direction: its direction, when nearly all of it runs one way.
        junctions: by kind: crossroads, T-junction, roundabout, dead end, overpass, interchange.
        nodes: (kind, u, v) of the same junctions that are surely inside, with their place in the image.
        bridges: bridges over water.
        density: of buildings: sparse, medium, dense.
        scene: the land use that fills the image.
        level: of traffic, from the moving vehicles: light, moderate, heavy.
        busiest: the side with clearly more vehicles: left, right, top, bottom.
        parking: parked cars in, and stalls of, the car parks, when all of them lie inside the image.
        modality: color or panchromatic.
        sun: the corner that the sunlight comes from.
        domain: A or B.
    """

    items: tuple[Item, ...]
    counts: dict[str, Count]
    shares: dict[str, float]
    uses: dict[str, float]
    road_lengths: dict[str, dict[str, float]]
    main_class: str | None
    main_direction: str | None
    junctions: dict[str, Count]
    nodes: tuple[tuple[str, float, float], ...]
    bridges: Count
    density: str | None
    scene: str | None
    level: str | None
    busiest: str | None
    parking: tuple[int, int] | None
    modality: str
    sun: str
    domain: str

    def count(self, kind: str) -> Count:
        return self.counts.get(kind, Count(0, 0, 0))

    def inside(self, kind: str) -> list[Item]:
        """Objects of a kind (or "building") that are surely in the image."""
        kinds = BUILDINGS if kind == "building" else (kind,)
        return [i for i in self.items if i.kind in kinds and i.status == "inside"]

    def as_json(self) -> dict:
        """Plain data for the "truth" key of evaluation rows."""
        data = dataclasses.asdict(self)
        data["items"] = [
            {**i, **{k: round(i[k], 4) for k in ("u", "v", "length", "width")}} for i in data["items"]
        ]
        data["shares"] = {k: round(v, 4) for k, v in self.shares.items()}
        data["uses"] = {k: round(v, 4) for k, v in self.uses.items()}
        data["road_lengths"] = {
            c: {d: round(x, 2) for d, x in by.items()} for c, by in self.road_lengths.items()
        }
        data["nodes"] = [[kind, round(u, 4), round(v, 4)] for kind, u, v in self.nodes]
        return data


def cell_of(u: float, v: float, margin: float = _CELL_MARGIN) -> str | None:
    """Name of the 3x3 cell of a point given as shares of width and height, None near a border between
    cells."""
    if any(abs(c - edge) < margin for c in (u, v) for edge in (1 / 3, 2 / 3)):
        return None
    return CELL_NAMES[min(int(v * 3), 2) * 3 + min(int(u * 3), 2)]


def direction_of(dx: float, dy: float) -> str:
    """north-south, east-west or diagonal, "other" when between two of them."""
    angle = math.degrees(math.atan2(dy, dx)) % 180.0
    if min(angle, 180.0 - angle) <= _ANGLE:
        return "east-west"
    if abs(angle - 90.0) <= _ANGLE:
        return "north-south"
    return "diagonal" if min(abs(angle - 45.0), abs(angle - 135.0)) <= _ANGLE else "other"


def level_of(vehicles: int) -> str:
    """Traffic level of a number of moving vehicles in an image."""
    return next(name for name, low, high in LEVELS if low <= vehicles <= high)


def truth_of(view: View, look: Look, classes: np.ndarray) -> Truth:
    """Truth of a view. classes: the rendered class map, used for visible area shares only."""
    x0, y0, x1, y1 = view.window.bounds
    items = tuple(i for i in (_item(t, x0, y0, x1, y1) for t in view.things) if i)
    counts = {}
    for kind in sorted({i.kind for i in items}):
        counts[kind] = _count([i for i in items if i.kind == kind])
    counts["building"] = _count([i for i in items if i.kind in BUILDINGS])
    moving = [i for i in items if i.kind == "car" and i.tag == "moving"]
    counts["moving car"] = _count(moving)
    counts["parked car"] = _count([i for i in items if i.kind == "car" and i.tag == "parked"])
    share = np.bincount(classes.ravel(), minlength=len(CLASSES)) / classes.size
    shares = {name: float(share[k]) for k, name in enumerate(CLASSES)}
    uses = _uses(view)
    lengths = _road_lengths(view)
    main_class, main_direction = _main(lengths)
    met = _junctions(view)
    junctions = {kind: _count_status([s for k, _, s in met if k == kind]) for kind in JUNCTIONS}
    nodes = tuple(
        (kind, (n.x - x0) / (x1 - x0), (y1 - n.y) / (y1 - y0)) for kind, n, s in met if s == "inside"
    )
    m = counts["moving car"]
    level = level_of(m.sure) if level_of(m.sure) == level_of(m.possible) else None
    return Truth(
        items=items,
        counts=counts,
        shares=shares,
        uses=uses,
        road_lengths=lengths,
        main_class=main_class,
        main_direction=main_direction,
        junctions=junctions,
        nodes=nodes,
        bridges=_bridges(view),
        density=_density(shares, counts["building"]),
        scene=_scene(uses, counts),
        level=level,
        busiest=_busiest([i for i in items if i.kind == "car"]),
        parking=_parking(view),
        modality="panchromatic" if look.panchromatic else "color",
        sun=look.sun_corner,
        domain=look.domain,
    )


def _status(x, y, size, reach, x0, y0, x1, y1) -> str | None:
    """inside, unsure, sliver, or None; size sets the band around the border, reach how far the outline
    goes."""
    inside = min(x - x0, x1 - x, y - y0, y1 - y)
    band = max(0.2 * size, 0.8)
    if inside >= band:
        return "inside"
    if inside > -band:
        return "unsure"
    return "sliver" if inside > -reach - 0.5 else None


def _junctions(view: View) -> list[tuple[str, Node, str | None]]:
    """(kind, node, status) of the junctions of a view."""
    found = []
    for n in view.nodes:
        reach = max(n.radius + 2, 16.0)
        status = _status(n.x, n.y, max(2 * n.radius, 20.0), reach, *view.window.bounds)
        found.append((n.kind, n, status))
        if n.id == view.window.city.interchange:
            found.append(("interchange", n, status))
        if n.kind == "ramp" and status:
            # Where ramps meet a street looks like a crossroads or a T-junction and is neither.
            found += [("crossroads", n, "sliver"), ("T-junction", n, "sliver")]
    return [(kind, n, status) for kind, n, status in found if kind in JUNCTIONS]


def _item(t, x0, y0, x1, y1) -> Item | None:
    reach = math.hypot(t.length, t.width) / 2
    status = _status(t.x, t.y, (t.length + t.width) / 2, reach, x0, y0, x1, y1)
    if not status:
        return None
    u, v = (t.x - x0) / (x1 - x0), (y1 - t.y) / (y1 - y0)
    cell = cell_of(u, v) if status == "inside" else None
    return Item(t.kind, t.color, u, v, t.length, t.width, t.tag, status, cell)


def _count(items: list[Item]) -> Count:
    return _count_status([i.status for i in items])


def _count_status(found: list[str | None]) -> Count:
    sure, unsure, sliver = (found.count(s) for s in ("inside", "unsure", "sliver"))
    return Count(sure, sure + unsure, sure + unsure + sliver)


def _uses(view: View) -> dict[str, float]:
    """Land use on a 14x14 grid of points, each given to the block whose outline holds it."""
    x0, y0, x1, y1 = view.window.bounds
    steps = (np.arange(14) + 0.5) / 14
    x, y = np.meshgrid(x0 + steps * (x1 - x0), y0 + steps * (y1 - y0))
    shares: dict[str, float] = {}
    for block in view.blocks:
        shares[block.use] = shares.get(block.use, 0.0) + float(_holds(block, x, y).mean())
    return {use: share for use, share in shares.items() if share > 0}


def _holds(block: Block, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Even-odd rule: which points (arrays of one shape) lie in the block's outline."""
    ax, ay = np.array(block.outline).T[:, :, None, None]
    bx, by = np.roll(ax, -1, 0), np.roll(ay, -1, 0)
    slope = (bx - ax) / np.where(ay == by, 1.0, by - ay)  # level edges are never crossed
    crosses = ((ay > y) != (by > y)) & (x < slope * (y - ay) + ax)
    return crosses.sum(0) % 2 == 1


def _road_lengths(view: View) -> dict[str, dict[str, float]]:
    bounds = view.window.bounds
    lengths: dict[str, dict[str, float]] = {}
    for road in view.roads:
        for a, b in itertools.pairwise(road.points):
            part = clip_segment(a, b, *bounds)
            if part:
                by = lengths.setdefault(road.cls, {})
                name = direction_of(b[0] - a[0], b[1] - a[1])
                by[name] = by.get(name, 0.0) + math.dist(*part)
    return lengths


def _main(lengths) -> tuple[str | None, str | None]:
    """The highest road class with at least 40 m in the image, unless a few metres of a higher one muddle it;
    its direction when 85 % of it runs one way."""
    for cls in sorted(set(lengths) - {"ramp"}, key=lambda c: -ROAD_CLASSES[c].rank):
        total = math.fsum(lengths[cls].values())
        if total >= 40.0:
            best = max(lengths[cls], key=lambda d: lengths[cls][d])
            clear = best != "other" and lengths[cls][best] >= 0.85 * total
            return cls, best if clear else None
        if total > 4.0:
            return None, None
    return None, None


def _bridges(view: View) -> Count:
    x0, y0, x1, y1 = view.window.bounds
    found: list[str | None] = []
    for road in view.roads:
        if road.bridge:
            parts = [clip_segment(a, b, x0, y0, x1, y1) for a, b in itertools.pairwise(road.points)]
            seen = math.fsum(math.dist(*p) for p in parts if p)
            found.append("inside" if seen > 35 else "unsure" if seen > 12 else "sliver")
    return _count_status(found)


def _density(shares: dict[str, float], buildings: Count) -> str | None:
    """By the share of the image that buildings cover, with gaps between the classes."""
    share = shares["building"]
    if share < 0.055 and buildings.possible <= 4:
        return "sparse"
    if 0.075 <= share <= 0.125:
        return "medium"
    return "dense" if share >= 0.155 else None


_SCENES = {
    "residential": "residential", "apartments": "apartments", "commercial": "commercial",
    "industrial": "industrial",
    "park": "park", "sports": "sports field", "farmland": "farmland",
    "airport": "airport",
}  # fmt: skip


def _scene(uses: dict[str, float], counts: dict[str, Count]) -> str | None:
    none = Count(0, 0, 0)
    water = uses.get("water", 0.0) + uses.get("harbor", 0.0)
    ships = counts.get("ship", none)
    if water >= 0.3:
        if uses.get("harbor", 0.0) >= 0.3 and ships.sure:
            return "harbor"
        return "river" if not ships.visible and "harbor" not in uses else None
    use, share = max(uses.items(), key=lambda pair: pair[1], default=("", 0.0))
    if share < 0.58 or use not in _SCENES:
        return None
    # A block may hold nothing of what its name promises; then nobody could tell.
    proof = {
        "residential": "house",
        "apartments": "apartment",
        "commercial": "shop",
        "sports": "field",
        "park": "tree",
    }
    if use in proof and not counts.get(proof[use], none).sure:
        return None
    if use == "airport" and not any(counts.get(k, none).sure for k in ("airplane", "terminal", "hangar")):
        return None
    if use == "industrial" and not (counts.get("tank", none).sure or counts.get("warehouse", none).sure):
        return None
    return _SCENES[use]


def _busiest(cars: list[Item]) -> str | None:
    """The half of the image that holds most vehicles: at least 3 more than the other half, and 1.6 times as
    many."""
    best, name = 0.0, None
    for sides, coordinate in (
        (("left", "right"), [i.u for i in cars]),
        (("top", "bottom"), [i.v for i in cars]),
    ):
        first = sum(c < 0.5 for c in coordinate)
        second = len(coordinate) - first
        high, low = max(first, second), min(first, second)
        if high - low >= 3 and high >= 1.6 * low:
            lead = (high - low) / (high + low)
            if abs(lead - best) < 0.15 and name:
                return None
            if lead > best:
                best, name = lead, sides[0] if first > second else sides[1]
    return name


def _parking(view: View) -> tuple[int, int] | None:
    """Cars and stalls of the car parks that can be seen, when all of them lie inside the image."""
    x0, y0, x1, y1 = view.window.bounds
    lots = []
    for ground in view.grounds:
        if ground.material == "parking":
            xs, ys = zip(*ground.points, strict=True)
            if max(xs) < x0 or min(xs) > x1 or max(ys) < y0 or min(ys) > y1:
                continue
            if min(xs) < x0 or max(xs) > x1 or min(ys) < y0 or max(ys) > y1:
                return None
            lots.append(ground)
    cars = sum(
        t.tag == "parked" and any(_in_convex(lot.points, t.x, t.y) for lot in lots) for t in view.things
    )
    stalls = sum(lot.stalls for lot in lots)
    return (cars, stalls) if stalls else None


def _in_convex(points, x: float, y: float) -> bool:
    signs = [
        (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= 0
        for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True)
    ]
    return all(signs) or not any(signs)
