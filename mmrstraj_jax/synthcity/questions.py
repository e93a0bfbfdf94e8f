"""General questions of RSIEval's types with short answers, and the drills only training uses.

Answers: "yes" / "no", digits, a cell of the 3x3 grid ("top left", "center"), a color, a direction,
a class name.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.truth import BUILDINGS, CELL_NAMES, Item, Truth
from mmrstraj_jax.synthcity.words import a, bare, plural

MAX_COUNT = 9  # larger numbers are not asked for


class Question(NamedTuple):
    type: str
    question: str
    answer: str
    group: str  # answers of one group are kept in balance
    facts: dict  # what the answer rests on, for the evaluation row's "truth"
    # Where to look for the answer: the places (u, v) of each thing that the question names. Training only.
    places: tuple[tuple[tuple[float, float], ...], ...] = ()


def places_of(*groups: list[Item]) -> tuple[tuple[tuple[float, float], ...], ...]:
    return tuple(tuple((item.u, item.v) for item in items) for items in groups)


class Balancer:
    """Keeps answers even: yes/no and groups "two:..." strictly per question string, groups "even:..."
    strictly over the group, other answers roughly per group."""

    def __init__(self):
        self.counts: dict[str, Counter] = {}

    def accepts(self, q: Question) -> bool:
        """True, and counted, when one more of this answer keeps the balance."""
        even = q.group.startswith("even:")
        two_way = even or q.answer in ("yes", "no") or q.group.startswith("two:")
        seen = self.counts.setdefault(q.question if two_way and not even else q.group, Counter())
        if two_way:
            here = seen[q.answer]
            other = sum(seen.values()) - here
            good = here <= other
        else:
            good = seen[q.answer] <= 3 + 1.5 * sum(seen.values()) / max(len(seen), 3)
        if good:
            seen[q.answer] += 1
        return good


PRESENCE = {
    "car": "object", "house": "object", "pool": "object", "tank": "object", "ship": "object",
    "tree": "object",
    "field": "object", "apartment": "object", "warehouse": "object", "airplane": "object",
    "roundabout": "junction",
    "bridge": "bridge",
    "farmland": "share", "water": "share", "building": "object",
}  # fmt: skip
QUANTITY = (
    "car", "house", "building", "pool", "tank", "ship", "tree", "parked car", "apartment", "airplane",
)  # fmt: skip
UNIQUE = (
    "car", "house", "pool", "tank", "ship", "field", "tree", "apartment", "warehouse", "shop", "airplane",
)  # fmt: skip
AREAS = {
    "buildings": "building",
    "roads": "road",
    "water": "water",
    "trees": "tree",
    "grass": "grass",
    "farmland": "farmland",
}


def seen(truth: Truth, kind: str) -> bool | None:
    """Whether a kind is in the image; None when the margin rule leaves it open."""
    how = PRESENCE[kind]
    if how == "share":
        share = truth.shares[kind]
        return True if share >= 0.03 else False if share == 0 else None
    count = {"object": truth.count(kind), "junction": truth.junctions.get(kind), "bridge": truth.bridges}[how]
    return True if count.sure else None if count.visible else False


def named(truth: Truth) -> list[tuple[str, Item]]:
    """Objects with a name that fits nothing else in sight: "storage tank", "red car", "house with the blue
    roof"."""
    result = []
    for kind in UNIQUE:
        items = [i for i in truth.items if i.kind == kind]
        if len(items) == 1 and items[0].status == "inside":
            result.append((bare(kind), items[0]))
        elif truth.modality == "color" and kind in ("car", "house", "ship", "tank"):
            colors = Counter(i.color for i in items)
            for item in items:
                if colors[item.color] == 1 and item.status == "inside":
                    text = (
                        f"house with the {item.color} roof"
                        if kind == "house"
                        else f"{item.color} {bare(kind)}"
                    )
                    result.append((text, item))
    return result


def presence(t: Truth, s: Stream) -> Iterator[Question]:
    for kind in PRESENCE:
        answer = seen(t, kind)
        if answer is not None:
            if kind in ("farmland", "water"):
                text = s.choice(("Is there any {} in the image?", "Does this image contain {}?")).format(
                    plural(kind)
                )
            else:
                text = s.choice(
                    (f"Is there {a(kind)} in the image?", f"Does this image contain {plural(kind)}?",
                     f"Are there any {plural(kind)} in the image?")
                )  # fmt: skip
            where = places_of(t.inside(kind)) if answer else ()
            facts = {"kind": kind}
            yield Question("presence", text, "yes" if answer else "no", f"presence:{kind}", facts, where)


def quantity(t: Truth, s: Stream) -> Iterator[Question]:
    for kind in QUANTITY:
        count = t.count(kind)
        if count.exact is not None and 1 <= count.exact <= MAX_COUNT and count.visible - count.exact <= 1:
            text = s.choice(
                (f"How many {plural(kind)} are there in the image?", f"What is the number of {plural(kind)}?",
                 f"How many {plural(kind)} can be seen?")
            )  # fmt: skip
            yield Question(
                "quantity", text, str(count.exact), f"quantity:{kind}", {"kind": kind, "count": count.exact}
            )


def color(t: Truth, s: Stream) -> Iterator[Question]:
    if t.modality != "color":
        return
    for kind in ("car", "house", "ship", "tank", "apartment", "shop", "warehouse"):
        roof = kind in BUILDINGS
        items = [i for i in t.items if i.kind == kind]
        facts = {"kind": kind}
        if len(items) == 1 and items[0].status == "inside":
            name = f"the roof of the {bare(kind)}" if roof else f"the {bare(kind)}"
            text = s.choice((f"What color is {name}?", f"What is the color of {name}?"))
            yield Question("color", text, items[0].color, f"color:{kind}", facts, places_of(items))
            continue
        # One of several, told apart by its cell: nothing else of the kind may touch that cell.
        for item in items:
            if item.cell and [i.cell or near_cell(i, item.cell) for i in items].count(item.cell) == 1:
                what = f"the roof of the {bare(kind)}" if roof else f"the {bare(kind)}"
                text = f"What color is {what} in the {item.cell} part of the image?"
                facts_here = {**facts, "cell": item.cell}
                yield Question("color", text, item.color, f"color:{kind}", facts_here, places_of([item]))
    roofs = [i for i in t.items if i.kind in BUILDINGS and i.status != "sliver"]
    if len(roofs) >= 3:
        best, number = Counter(i.color for i in roofs).most_common(1)[0]
        if number >= 0.65 * len(roofs):
            yield Question(
                "color", "What color are most of the roofs?", best, "color:roofs", {"kind": "building"}
            )


def near_cell(item: Item, cell: str) -> str | None:
    """`cell` when the item could be taken to lie in it (its centre within a twelfth of the image)."""
    k = CELL_NAMES.index(cell)
    du, dv = abs(item.u - (k % 3 + 0.5) / 3), abs(item.v - (k // 3 + 0.5) / 3)
    return cell if max(du, dv) < 1 / 6 + 1 / 12 else None


def ab_position(t: Truth, s: Stream) -> Iterator[Question]:
    for name, item in named(t):
        if item.cell:
            text = s.choice(
                (f"Where is the {name} in the image?", f"In which part of the image is the {name}?",
                 f"What is the position of the {name}?")
            )  # fmt: skip
            facts = {"kind": item.kind, "u": item.u, "v": item.v}
            yield Question("ab_position", text, item.cell, "ab_position", facts, places_of([item]))


def side_of(one: Item, other: Item) -> str | None:
    """Where `one` lies as seen from `other`, None when it is close or between two names."""
    du, dv = one.u - other.u, one.v - other.v
    if max(abs(du), abs(dv)) < 0.12:
        return None
    if abs(dv) < 0.3 * abs(du):
        return "right" if du > 0 else "left"
    if abs(du) < 0.3 * abs(dv):
        return "below" if dv > 0 else "above"
    if 0.55 < abs(du / dv) < 1.8:
        return f"{'bottom' if dv > 0 else 'top'} {'right' if du > 0 else 'left'}"
    return None


def re_position(t: Truth, s: Stream) -> Iterator[Question]:
    names = s.shuffled(named(t))
    for (one, first), (two, second) in itertools.pairwise(names):
        facts = {"of": first.kind, "to": second.kind}
        side = side_of(first, second)
        if side:
            text = s.choice(
                (
                    f"Where is the {one} relative to the {two}?",
                    f"What is the position of the {one} relative to the {two}?",
                )
            )
            yield Question("re_position", text, side, "re_position", facts, places_of([first], [second]))


def area_comp(t: Truth, s: Stream) -> Iterator[Question]:
    present = [name for name, cls in AREAS.items() if t.shares[cls] >= 0.015]
    names = s.shuffled(present)
    for one, two in itertools.pairwise(names):
        x, y = t.shares[AREAS[one]], t.shares[AREAS[two]]
        if max(x, y) < 1.5 * min(x, y):
            continue
        facts = {one: round(x, 3), two: round(y, 3)}
        if s.chance(0.5):
            first, second = sorted((one, two))
            text = f"Which covers a larger area, {first} or {second}?"
            yield Question("area_comp", text, one if x > y else two, "two:area", facts)
        else:
            text = f"Is the area of {one} larger than that of {two}?"
            yield Question("area_comp", text, "yes" if x > y else "no", "area", facts)


def road_ori(t: Truth, s: Stream) -> Iterator[Question]:
    if t.main_direction:
        text = s.choice(
            ("What is the direction of the main road?", "In which direction does the main road run?")
        )
        yield Question("road_ori", text, t.main_direction, "road_ori", {"class": t.main_class})


def image(t: Truth, s: Stream) -> Iterator[Question]:
    text = s.choice(
        ("Is this a color or a panchromatic image?", "What type of image is this, color or panchromatic?")
    )
    yield Question("image", text, t.modality, "two:image", {})


URBAN = ("residential", "apartments", "commercial", "industrial")


def scene(t: Truth, s: Stream) -> Iterator[Question]:
    if t.scene:
        text = s.choice(
            ("What is the scene of this image?", "What kind of area is shown?", "What is the main land use?")
        )
        yield Question("scene", text, t.scene, "scene", {})
    urban = math.fsum(t.uses.get(u, 0.0) for u in URBAN)
    if (urban >= 0.6 and t.density in ("medium", "dense")) or t.uses.get("farmland", 0.0) >= 0.55:
        yield Question(
            "scene",
            "Is this an urban or a rural scene?",
            "urban" if urban >= 0.6 else "rural",
            "two:urban",
            {},
        )


def density(t: Truth, s: Stream) -> Iterator[Question]:
    if t.density:
        text = s.choice(("What is the building density?", "How densely is the area built up?"))
        yield Question("density", text, t.density, "density", {"share": round(t.shares["building"], 3)})


def reasoning(t: Truth, s: Stream) -> Iterator[Question]:
    if t.shares["water"] >= 0.2:
        answer = "yes" if t.bridges.sure else None if t.bridges.visible else "no"
        if answer:
            yield Question("reasoning", "Can vehicles cross the water in this image?", answer, "cross", {})
    if t.parking and t.parking[1] >= 6:
        share = t.parking[0] / t.parking[1]
        if share >= 0.6 or share <= 0.4:
            text = "Is the parking lot more than half full?"
            yield Question(
                "reasoning",
                text,
                "yes" if share > 0.5 else "no",
                "parking",
                {"cars": t.parking[0], "stalls": t.parking[1]},
            )
    homes = [t.count(kind) for kind in ("house", "apartment")]
    living = sum(c.sure for c in homes)
    if living >= 2 or not any(c.visible for c in homes):
        text = s.choice(("Do people live in this area?", "Is this a place where people live?"))
        yield Question("reasoning", text, "yes" if living else "no", "living", {"homes": living})
    if t.scene in ("harbor", "river"):
        answer = "yes" if t.scene == "harbor" else "no"
        yield Question("reasoning", "Do ships moor here?", answer, "mooring", {"ships": t.count("ship").sure})
    tall = [i for i in t.items if i.kind in (*BUILDINGS, "tank", "tree") and i.status == "inside"]
    if len(tall) >= 2 and s.chance(0.4):
        yield Question("reasoning", "From which corner does the sunlight come?", t.sun, "sun", {})


def drills(t: Truth, s: Stream) -> Iterator[Question]:
    """Training only: yes/no, counts and lists by cell and by half, which teach places and counting; and more
    pairs of areas."""
    for _ in range(2):
        yield from area_comp(t, s)
    names = s.shuffled(named(t))
    for (one, first), (two, second) in itertools.pairwise(names):
        axis = s.choice(("left of", "right of", "above", "below"))
        gap = (first.u - second.u) if "of" in axis else (first.v - second.v)
        if abs(gap) > 0.1:
            true = gap > 0 if axis in ("right of", "below") else gap < 0
            text = f"Is the {one} {'to the ' if 'of' in axis else ''}{axis} the {two}?"
            answer = "yes" if true else "no"
            yield Question("cell", text, answer, "even:relation", {}, places_of([first], [second]))
    for kind in ("car", "house", "pool", "tank", "ship", "tree", "building"):
        items = [i for i in t.items if (i.kind in BUILDINGS if kind == "building" else i.kind == kind)]
        if not items:
            continue
        cell = (
            s.choice([i.cell for i in items if i.cell] or CELL_NAMES)
            if s.chance(0.5)
            else s.choice(CELL_NAMES)
        )
        sure = sum(i.cell == cell for i in items)
        unsure = sum(1 for i in items if i.cell is None and near_cell(i, cell))
        where = f"in the {cell} part of the image"
        if sure or not unsure:
            text = f"Is there {a(kind)} {where}?"
            there = places_of([i for i in items if i.cell == cell])
            yield Question("cell", text, "yes" if sure else "no", f"cell:{kind}", {}, there if sure else ())
        if not unsure and sure <= 5 and s.chance(0.5):
            yield Question(
                "cell", f"How many {plural(kind)} are {where}?", str(sure), f"cellcount:{kind}", {}
            )
        half = s.choice(("left", "right", "top", "bottom"))
        place = [i.u if half in ("left", "right") else i.v for i in items]
        if t.count(kind).exact is not None and all(abs(p - 0.5) > 0.02 for p in place):
            inside = [p for p, i in zip(place, items, strict=True) if i.status == "inside"]
            number = sum((p < 0.5) == (half in ("left", "top")) for p in inside)
            if number <= MAX_COUNT:
                text = f"How many {plural(kind)} are in the {half} half of the image?"
                yield Question("cell", text, str(number), f"half:{kind}", {})
        if 2 <= len(items) <= 4 and all(i.cell for i in items):
            cells = sorted({i.cell for i in items}, key=CELL_NAMES.index)
            text = f"Where are the {plural(kind)}?"
            yield Question("cell", text, ", ".join(cells), f"list:{kind}", {}, places_of(items))


GENERAL = (
    presence,
    quantity,
    color,
    ab_position,
    re_position,
    area_comp,
    road_ori,
    image,
    scene,
    density,
    reasoning,
)
