"""Text-only rows that teach the base model the words and the thresholds of traffic questions, without images.

Facts are made up, stated where an image would stand, and asked about in the words of traffic.py. They are
stated in sentences or as bare words in any order: a model that answers from bare words can later be shown
them by a vision tower that has learned to say them.
"""

from mmrstraj_jax.synthcity import traffic
from mmrstraj_jax.synthcity.city import ROAD_CLASSES
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.traffic import JUNCTIONS, MEETING, PHASES, SIDES, ZONES, describe, questions, road
from mmrstraj_jax.synthcity.truth import DIRECTIONS, level_of
from mmrstraj_jax.synthcity.words import a, capital

_OTHER_SIDE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
_MEETS = {
    "crossroads": "four roads meet", "T-junction": "three roads meet",
    "roundabout": "the roads meet in a circle", "dead end": "the road ends",
    "overpass": "one road passes over another",
}  # fmt: skip


def text_row(s: Stream) -> list[tuple[str, str]]:
    """One conversation without image, as (question, answer) turns; the first question states the facts."""
    kind = s.weighted({"facts": 0.6, "numbers": 0.25, "definition": 0.15})
    if kind == "definition":
        return [_definition(s)]
    if kind == "numbers":
        return [
            (q.question, q.answer) for _ in range(3) for q in s.shuffled(list(questions(_numbers(s), s)))[:1]
        ]
    facts = _made_up(s)
    stated = (_tags if s.chance(0.6) else _sentences)(facts, s)
    turns = [(q.question, q.answer) for q in s.shuffled(list(questions(facts, s)))[: s.integer(3, 7)]]
    if s.chance(0.3):
        turns.insert(0, (s.choice(traffic.PROMPTS), describe(facts, s)))
    (first, answer), *rest = turns
    return [(f"{stated}\n{first}", answer), *rest]


def shown_facts(s: Stream) -> tuple[str, list[tuple[str, str]]]:
    """Bare words of made-up facts, to stand among the image tokens, and all questions that they answer."""
    while True:
        facts = _made_up(s)
        found = [(q.question, q.answer) for q in s.shuffled(list(questions(facts, s)))]
        if len(found) >= 3:
            return _tags(facts, s), found


def stated_question(s: Stream) -> tuple[str, str]:
    """One question, and its answer, on facts that it states itself: mostly numbers, else bare words."""
    while True:
        facts, stated = _numbers(s), ""
        if s.chance(0.3):
            facts = _made_up(s)
            stated = f"{_tags(facts, s)}\n"
        found = list(questions(facts, s))
        if found:
            chosen = s.choice(found)
            return stated + chosen.question, chosen.answer


def _made_up(s: Stream) -> dict:
    """Facts as `traffic.facts_of` gives them, some left out."""
    vehicles = s.choice((s.integer(0, 3), s.integer(4, 9), s.integer(10, 12)))
    seen = s.shuffled(JUNCTIONS)[: s.choice((0, 1, 1, 2, 3, 4, 5))]
    meeting = sum(k in MEETING for k in seen)
    facts = {
        "class": s.choice((*ROAD_CLASSES, "motorway")),  # as often as not, nearly
        "direction": s.choice(tuple(DIRECTIONS)),
        "junctions": meeting + (s.integer(0, 2) if meeting else 0),
        "vehicles": vehicles,
        "level": level_of(vehicles),
        "side": s.choice(SIDES),
        "zone": s.choice(ZONES),
        "parked": s.integer(1, 9),
        "phase": s.choice(PHASES),
    }
    facts = {k: v for k, v in facts.items() if s.chance(0.7)}
    facts |= {"seen": seen, "unseen": [k for k in JUNCTIONS if k not in seen]}
    if len(seen) == 1 and facts.get("junctions", 1) <= 1:
        facts["junction"] = seen[0]
    if "class" in facts:
        facts["motorway"] = facts["class"] == "motorway"
    return facts


def _numbers(s: Stream) -> dict:
    """Facts for questions that state their numbers: one value leads."""
    low = s.integer(0, 50)
    counts = {h: low + s.integer(0, 15) for h in s.shuffled(traffic.HOURS)[:3]}
    counts[s.choice(tuple(counts))] = low + s.integer(25, 45)
    speeds = {cls: s.integer(60, 99) for cls in s.shuffled(tuple(ROAD_CLASSES))[: s.integer(2, 3)]}
    speeds[s.choice(tuple(speeds))] = s.integer(20, 50)
    none = {"seen": [], "unseen": []}
    return none | ({"counts": counts} if s.chance(0.5) else {"speeds": speeds})


def _tags(facts: dict, s: Stream) -> str:
    """Bare words in any order, sometimes said more than once."""
    words = [str(facts[k]) for k in ("class", "direction", "level", "side", "zone", "phase") if k in facts]
    words += facts["seen"]
    for key, unit in (("junctions", "junctions"), ("vehicles", "vehicles"), ("parked", "parked")):
        if key in facts:
            words.append(f"{facts[key]} {unit}")
    said = [w for _ in range(s.choice((1, 1, 2, 3))) for w in s.shuffled(words)]
    return " ".join(said) or "no facts"


def _sentences(facts: dict, s: Stream) -> str:
    parts = []
    if "class" in facts:
        cls = facts["class"]
        lanes = f"{ROAD_CLASSES[cls].lanes} lanes, {road(cls)}"
        parts.append(s.choice((lanes, f"main road {cls}")))
    for key, text in (
        ("direction", "direction {}"),
        ("junctions", "{} junctions"),
        ("vehicles", "{} moving vehicles"),
        ("parked", "{} parked"),
        ("zone", "zone {}"),
        ("phase", "{}"),
    ):
        if key in facts:
            parts.append(text.format(facts[key]))
    if "level" in facts and "vehicles" not in facts:
        parts.append(f"traffic {facts['level']}")
    if "side" in facts:
        less, more = sorted((s.integer(0, 4), s.integer(6, 9)))
        other = _OTHER_SIDE[facts["side"]]
        compared = f"{other} {less} vehicles, {facts['side']} {more} vehicles"
        parts.append(s.choice((compared, f"busiest side {facts['side']}")))
    parts += [s.choice((k, f"{_MEETS[k]}, {a(k)}")) for k in facts["seen"]]
    return f"Facts: {'; '.join(s.shuffled(parts)) or 'none'}."


def _definition(s: Stream) -> tuple[str, str]:
    """A fact of the vocabulary itself."""
    vehicles = s.integer(0, 15)
    cls = s.choice(("motorway", "arterial"))
    first, second = s.integer(0, 9), s.integer(0, 9)
    one = s.choice(SIDES)
    two = _OTHER_SIDE[one]
    second = second if second != first else first + 1
    sides = f"The {one} side has {first} vehicles and the {two} side has {second}."
    phase = s.choice(PHASES)
    level = {"peak hour": "heavy", "quiet hour": "light"}[phase]
    options = [
        (f"{vehicles} moving vehicles are on the roads. How heavy is the traffic?", level_of(vehicles)),
        (f"The main road has {ROAD_CLASSES[cls].lanes} lanes. Which road class is the main road?", cls),
        (
            f"The main road is {road(cls)}. How many lanes does the main road have?",
            str(ROAD_CLASSES[cls].lanes),
        ),
        (f"{sides} Which side has more vehicles?", one if first > second else two),
        (f"The traffic on a large road is {level}. Is this a peak hour or a quiet hour?", phase),
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
