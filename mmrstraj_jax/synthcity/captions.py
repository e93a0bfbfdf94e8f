"""Captions in RSICap's style: two to four short, true sentences."""

from collections import Counter

from mmrstraj_jax.synthcity.questions import named
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.truth import BUILDINGS, Truth
from mmrstraj_jax.synthcity.words import a, at_place, capital, counted, joined, plural

PROMPTS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
_AREA = {
    "residential": "a residential area", "apartments": "an area of apartment buildings",
    "commercial": "a commercial area",
    "industrial": "an industrial area", "park": "a park", "sports field": "a sports ground",
    "farmland": "farmland", "airport": "an airport",
    "harbor": "a harbor", "river": "a river",
}  # fmt: skip
KINDS = (
    "house", "apartment", "shop", "warehouse", "terminal", "hangar", "airplane", "tank", "pool", "ship",
    "field",
)  # fmt: skip
_BUILT = {"sparse": "sparsely", "medium": "moderately", "dense": "densely"}


def caption(t: Truth, s: Stream) -> str:
    """A caption of 2 to 4 sentences; every number and place in it obeys the margin rule."""
    what = (
        _AREA[t.scene]
        if t.scene
        else "roads and buildings"
        if t.shares["building"] > 0.02
        else "roads and open land"
    )
    kind = "panchromatic" if t.modality == "panchromatic" else s.choice(("high-resolution", "color"))
    first = s.choice(
        (f"This is a {kind} aerial image showing {what}.", f"This {kind} satellite image shows {what}.")
    )
    rest = [x for x in (_objects(t, s), _places(t, s), _road(t, s), _cars(t, s), _cover(t, s)) if x]
    keep = s.integer(1, 3)
    chosen = rest if len(rest) <= keep else [rest[0], *s.shuffled(rest[1:])[: keep - 1]]
    if not chosen:
        chosen = ["The image is taken from above."]
    return " ".join([first, *chosen])


def _objects(t: Truth, s: Stream) -> str | None:
    parts = []
    for kind in (
        "house",
        "apartment",
        "shop",
        "warehouse",
        "terminal",
        "hangar",
        "airplane",
        "tank",
        "pool",
        "ship",
        "field",
    ):
        count = t.count(kind)
        if not count.sure:
            continue
        text = (
            counted(count.exact, kind)
            if count.exact is not None and count.exact <= 9
            else f"several {plural(kind)}"
        )
        if count.exact is None and count.possible < 3:
            text = "at least " + counted(count.sure, kind)
        if kind in BUILDINGS and t.modality == "color":
            colors = {i.color for i in t.items if i.kind == kind and i.status != "sliver"}
            if len(colors) == 1:
                color = colors.pop()
                text += f" with a {color} roof" if count.exact == 1 else f" with {color} roofs"
        parts.append(text)
    if not parts:
        return None
    one = parts[0].startswith(("one ", "at least one "))
    return s.choice(
        (f"There {'is' if one else 'are'} {joined(parts)}.", f"{capital(joined(parts))} can be seen.")
    )


def _places(t: Truth, s: Stream) -> str | None:
    names = [(n, i.cell) for n, i in s.shuffled(named(t)) if i.cell and i.kind != "tree"]
    if not names:
        return None
    name, cell = names[0]
    text = f"The {name} is {at_place(cell)} of the image"
    if len(names) > 1:
        text += f", and the {names[1][0]} is {at_place(names[1][1])}"
    return text + "."


def _road(t: Truth, s: Stream) -> str | None:
    if not t.main_class:
        return "There is no road in the image." if not t.road_lengths else None
    road = {"motorway": "motorway", "arterial": "wide road", "collector": "road", "local": "small road"}[
        t.main_class
    ]
    text = (
        f"{capital(a_word(road))} runs {t.main_direction}"
        if t.main_direction
        else f"{capital(a_word(road))} passes through"
    )
    if t.main_direction == "diagonal":
        text = f"{capital(a_word(road))} runs diagonally"
    ends = [
        k
        for k in ("roundabout", "crossroads", "overpass")
        if t.junctions[k].sure == t.junctions[k].visible == 1
    ]
    return f"{text}, with {a(ends[0])}." if ends else f"{text}."


def a_word(noun: str) -> str:
    return f"a {noun}"


def _cars(t: Truth, s: Stream) -> str | None:
    count = t.count("car")
    if count.visible == 0:
        return "No car is in sight." if t.road_lengths else None
    if count.exact is None or not count.sure:
        return None
    if count.exact <= 9:
        colors = Counter(i.color for i in t.inside("car"))
        more = ""
        if t.modality == "color" and 1 < count.exact <= 4:
            more = ": " + joined([f"{counted_color(n, c)}" for c, n in sorted(colors.items())])
        verb = "is" if count.exact == 1 else "are"
        return f"{capital(counted(count.exact, 'car'))} {verb} in the image{more}."
    return "Many cars are in the image."


def counted_color(number: int, color: str) -> str:
    return f"{counted(number, 'car').split(' ')[0]} {color}"


def _cover(t: Truth, s: Stream) -> str | None:
    if t.bridges.sure == t.bridges.visible == 1:
        return "A bridge crosses the water."
    trees = t.count("tree")
    if trees.sure >= 10:
        return "Many trees grow here."
    if trees.exact and trees.exact <= 9:
        return f"{capital(counted(trees.exact, 'tree'))} {'grows' if trees.exact == 1 else 'grow'} here."
    if t.density:
        return f"The area is {_BUILT[t.density]} built up."
    return None
