"""Traffic descriptions and questions (stage 2), and text-only rows that teach their vocabulary beforehand.

Both start from the same few facts: `facts_of` reads them off a window's truth, `vocabulary` makes them up.
So the words, the wording and the thresholds of an image question are already known to a model that has read
text rows.
"""

from collections.abc import Iterator

from mmrstraj_jax.synthcity.city import ROAD_CLASSES
from mmrstraj_jax.synthcity.questions import Question
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.truth import DIRECTIONS, Truth, level_of
from mmrstraj_jax.synthcity.words import NOUNS, a, capital, counted

PROMPTS = (
    "Describe the traffic and the road layout.",
    "What can you say about the traffic in this image?",
    "Describe the traffic conditions.",
)
JUNCTIONS = ("crossroads", "T-junction", "roundabout", "dead end", "overpass")
ZONES = (
    "residential",
    "apartments",
    "commercial",
    "industrial",
    "park",
    "sports field",
    "farmland",
    "harbor",
)
SIDES = ("left", "right", "top", "bottom")
MEETING = ("crossroads", "T-junction", "roundabout")  # kinds that count as a junction of roads


def facts_of(t: Truth) -> dict:
    """Known facts of an image: class, direction, motorway (is there one), junction,
    junctions, vehicles, level, side, zone, parked and the
    yes/no pair seen / unseen (junction kinds surely in or surely not in the image). What is not clear is
    absent."""
    facts: dict = {}
    if t.main_class:
        facts["class"] = t.main_class
        if t.main_direction:
            facts["direction"] = t.main_direction
    meeting = [t.junctions[k] for k in MEETING]
    if sum(c.visible for c in meeting) == sum(c.sure for c in meeting):
        facts["junctions"] = sum(c.sure for c in meeting)
    present = [k for k in JUNCTIONS if t.junctions[k].visible]
    if len(present) == 1 and t.junctions[present[0]].sure == t.junctions[present[0]].visible == 1:
        facts["junction"] = present[0]
    facts["seen"] = [k for k in JUNCTIONS if t.junctions[k].sure]
    facts["unseen"] = [k for k in JUNCTIONS if not t.junctions[k].visible]
    moving, parked = t.count("moving car"), t.count("parked car")
    if moving.exact is not None and moving.exact <= 15:
        facts["vehicles"] = moving.exact
    if parked.exact is not None and parked.exact <= 9:
        facts["parked"] = parked.exact
    if t.level and t.main_class:
        facts["level"] = t.level
    if t.busiest:
        facts["side"] = t.busiest
    if t.scene in ZONES:
        facts["zone"] = t.scene
    facts["motorway"] = (
        bool(t.road_lengths.get("motorway")) if t.main_class in ("motorway", *_LOWER) else None
    )
    return facts


_LOWER = ("arterial", "collector", "local")


def questions(facts: dict, s: Stream) -> Iterator[Question]:
    """All traffic questions that the facts answer."""

    def ask(type_, options, answer, group=None):
        return Question(type_, s.choice(options), str(answer), group or type_, {})

    if "class" in facts:
        yield ask(
            "hierarchy",
            ("What is the class of the main road?", "Which road class is the main road?"),
            facts["class"],
        )
        lanes = ROAD_CLASSES[facts["class"]].lanes
        yield ask("lanes", ("How many lanes does the main road have?",), lanes)
    if "motorway" in facts:
        yield ask("hierarchy", ("Is there a motorway?",), "yes" if facts["motorway"] else "no")
    if "direction" in facts:
        yield ask(
            "direction",
            ("In which direction does the main road run?", "What is the direction of the traffic?"),
            facts["direction"],
        )
    if "junction" in facts:
        yield ask(
            "junction",
            ("What kind of junction is there?", "How do the roads connect?"),
            facts["junction"],
        )
    if "junctions" in facts and facts["junctions"] <= 5:
        yield ask("connectivity", ("How many junctions are there?",), facts["junctions"], "junctions")
    for kind in JUNCTIONS:
        if kind in facts["seen"] or kind in facts["unseen"]:
            yield ask("connectivity", (f"Is there {a(kind)}?",), "yes" if kind in facts["seen"] else "no")
    if "vehicles" in facts and facts["vehicles"] <= 12:
        yield ask(
            "vehicles",
            ("How many moving vehicles are there?", "How many vehicles are on the roads?"),
            facts["vehicles"],
        )
    if facts.get("parked"):
        yield ask("vehicles", ("How many vehicles are parked?",), facts["parked"], "parked")
    if "level" in facts:
        yield ask(
            "traffic_level", ("How heavy is the traffic?", "What is the traffic level?"), facts["level"]
        )
    if "side" in facts:
        yield ask(
            "busiest_side",
            ("Which side of the image is the busiest?", "Which side has more vehicles?"),
            facts["side"],
        )
    if "zone" in facts:
        yield ask(
            "zoning",
            ("What is the zone around the roads?", "Which kind of zone does the road serve?"),
            facts["zone"],
        )


def describe(facts: dict, s: Stream) -> str:
    """A traffic description of 2 to 4 sentences from facts."""
    parts = []
    if "class" in facts:
        way = facts.get("direction", "").replace("diagonal", "diagonally")
        way = way and f" and runs {way}"
        parts.append(
            f"The main road is {_road(facts['class'])} with {ROAD_CLASSES[facts['class']].lanes} lanes{way}."
        )
    if "junction" in facts:
        parts.append(
            s.choice((f"There is {a(facts['junction'])}.", f"The roads connect by {a(facts['junction'])}."))
        )
    elif facts.get("junctions") is not None:
        number = facts["junctions"]
        parts.append(
            f"There {'is' if number == 1 else 'are'} {number or 'no'} junction{'' if number == 1 else 's'}."
        )
    if "level" in facts:
        count = f", with {counted(facts['vehicles'], 'moving car')}" if facts.get("vehicles") else ""
        parts.append(f"Traffic is {facts['level']}{count}.")
    if "side" in facts:
        parts.append(f"The {facts['side']} side is the busiest.")
    if "zone" in facts:
        parts.append(
            f"The roads serve a {facts['zone']} zone.".replace("a apart", "an apart").replace(
                "a indus", "an indus"
            )
        )
    return " ".join(parts) or "No road is clearly visible."


def _road(cls: str) -> str:
    return "a motorway" if cls == "motorway" else f"{'an' if cls == 'arterial' else 'a'} {cls} road"


def vocabulary(s: Stream) -> list[tuple[str, str]]:
    """One text-only conversation, (question, answer) turns: made-up facts are stated, then asked about."""
    if s.chance(0.35):
        return [_definition(s)]
    facts = _made_up(s)
    stated = s.shuffled(_statements(facts, s))
    turns = [(q.question, q.answer) for q in s.shuffled(list(questions(facts, s)))[: s.integer(2, 5)]]
    if s.chance(0.5):
        turns.insert(0, (s.choice(PROMPTS), describe(facts, s)))
    first, answer = turns[0]
    return [(f"Facts: {'; '.join(stated)}.\n{first}", answer), *turns[1:]]


def _made_up(s: Stream) -> dict:
    vehicles = s.choice((s.integer(0, 3), s.integer(4, 9), s.integer(10, 12)))
    junction = s.choice(JUNCTIONS)
    return {
        "class": s.choice(tuple(ROAD_CLASSES)),
        "direction": s.choice(tuple(DIRECTIONS)),
        "junction": junction,
        "junctions": int(junction in MEETING),
        "seen": [junction],
        "unseen": [k for k in JUNCTIONS if k != junction],
        "vehicles": vehicles,
        "level": level_of(vehicles),
        "side": s.choice(SIDES),
        "zone": s.choice(ZONES),
        "parked": s.integer(1, 9),
    }


def _statements(facts: dict, s: Stream) -> list[str]:
    less, more = sorted((s.integer(0, 4), s.integer(6, 9)))
    other = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[facts["side"]]
    kind = {
        "crossroads": "four roads meet", "T-junction": "three roads meet",
        "roundabout": "the roads meet in a circle",
        "dead end": "the road ends", "overpass": "one road passes over another",
    }[facts["junction"]]  # fmt: skip
    road = s.choice(
        (
            f"{ROAD_CLASSES[facts['class']].lanes} lanes, {_road(facts['class'])}",
            f"main road {facts['class']}",
        )
    )
    return [
        road,
        f"direction {facts['direction']}",
        s.choice((f"junction {facts['junction']}", f"{kind}, {a(facts['junction'])}")),
        f"{facts['vehicles']} moving vehicles",
        f"{facts['parked']} parked",
        s.choice(
            (f"{other} {less} vehicles, {facts['side']} {more} vehicles", f"busiest side {facts['side']}")
        ),
        f"zone {facts['zone']}",
    ]


def _definition(s: Stream) -> tuple[str, str]:
    """A fact of the vocabulary itself."""
    vehicles = s.integer(0, 15)
    cls = s.choice(("motorway", "arterial"))
    first, second = s.integer(0, 9), s.integer(0, 9)
    one, two = s.choice((("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")))
    second = second if second != first else first + 1
    sides = f"The {one} side has {first} vehicles and the {two} side has {second}."
    options = [
        (f"{vehicles} moving vehicles are on the roads. How heavy is the traffic?", level_of(vehicles)),
        (f"The main road has {ROAD_CLASSES[cls].lanes} lanes. Which road class is the main road?", cls),
        (
            f"The main road is {_road(cls)}. How many lanes does the main road have?",
            str(ROAD_CLASSES[cls].lanes),
        ),
        (f"{sides} Which side has more vehicles?", one if first > second else two),
        ("Four roads meet at one point. What kind of junction is there?", "crossroads"),
        ("Three roads meet at one point. What kind of junction is there?", "T-junction"),
        ("The roads meet in a circle around an island. What kind of junction is there?", "roundabout"),
        ("One road passes over another on a bridge. How do the roads connect?", "overpass"),
        ("A road stops and leads nowhere. How do the roads connect?", "dead end"),
        ("Shops and parking lots stand along the road. What is the zone around the roads?", "commercial"),
        ("Houses with gardens stand along the road. What is the zone around the roads?", "residential"),
        (
            "Storage tanks and warehouses stand along the road. What is the zone around the roads?",
            "industrial",
        ),
        ("The road leads from top to bottom. In which direction does the main road run?", "north-south"),
        ("The road leads from left to right. In which direction does the main road run?", "east-west"),
        ("The road leads from corner to corner. In which direction does the main road run?", "diagonal"),
    ]
    question, answer = s.choice(options)
    return capital(question), answer


assert set(JUNCTIONS) <= set(NOUNS)
