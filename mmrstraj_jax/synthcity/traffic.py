"""Traffic descriptions and questions (stage 2) from the facts of an image and from the city's hourly flow.

Everything an image question needs is visible, or its numbers (counts, speeds) stand in the question. The
words are taught beforehand by text-only rows (vocabulary.py) made from the same `questions` and `describe`.
"""

import math
from collections.abc import Iterator

from mmrstraj_jax.synthcity import flow
from mmrstraj_jax.synthcity.city import ROAD_CLASSES
from mmrstraj_jax.synthcity.questions import Question
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.truth import Truth
from mmrstraj_jax.synthcity.window import View
from mmrstraj_jax.synthcity.words import NOUNS, a, counted

PROMPTS = (
    "Describe the traffic and the road layout.",
    "What can you say about the traffic in this image?",
    "Describe the traffic conditions.",
)
TYPES = ("hierarchy", "connectivity", "traffic_density", "zoning", "direction", "bottleneck", "peak_hour")
JUNCTIONS = ("crossroads", "T-junction", "roundabout", "dead end", "overpass")
MEETING = ("crossroads", "T-junction", "roundabout")  # kinds that count as a junction of roads
ZONES = (
    "residential", "apartments", "commercial", "industrial", "park", "sports field", "farmland", "harbor",
    "airport",
)  # fmt: skip
SIDES = ("left", "right", "top", "bottom")
PHASES = ("peak hour", "quiet hour")
COUNT_MINUTES = 5  # of a stated vehicle count, as loop detectors report them
_MARGIN = 10  # vehicles, or percent of free speed, by which a stated maximum or minimum stands out
HOURS = (1, 3, 5, 6, 7, 8, 9, 10, 12, 14, 15, 17, 18, 19, 21, 23)  # that counts are stated for


def facts_of(t: Truth, view: View | None = None) -> dict:
    """Known facts of an image; what is not clear is absent.

    From the truth: class, direction, motorway (is there one), junction, junctions, vehicles, parked, level,
    side, zone, and seen / unseen (junction kinds surely in or surely not in the image). From the flow of the
    view's city, if given: counts ({hour: vehicles in 5 minutes} of the busiest main road), speeds
    ({class: percent of the free speed} at the image's hour) and phase (of PHASES, where it shows).
    """
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
    if t.main_class:
        near = "motorway" in (t.road_lengths if view is None else {r.cls for r in view.roads})
        if near == (t.main_class == "motorway"):
            facts["motorway"] = near
    if view is not None and t.main_class:
        facts |= _flow_facts(t, view)
    return facts


def _flow_facts(t: Truth, view: View) -> dict:
    """What the trips of the city add: hourly counts and speeds, and whether this is a peak hour."""
    hourly = flow.of_city(view.window.city)
    lengths = flow.lengths_inside(view.roads, view.window.bounds)
    main = [r for r in view.roads if r.cls == t.main_class and lengths.get(r.id)]
    if not main:
        return {}
    road = max(main, key=lambda r: hourly.flow[r.id].sum())
    found: dict = {
        "road": road.id,
        "counts": {h: round(hourly.flow[road.id, h] * COUNT_MINUTES / 60) for h in HOURS},
        "speeds": {
            cls: round(100 * share)
            for cls, share in hourly.relative_speeds(view.roads, lengths, view.window.hour).items()
            if cls in ROAD_CLASSES
        },
    }
    share = hourly.share_of_peak(lengths, view.window.hour)
    large = math.fsum(math.fsum(t.road_lengths.get(c, {}).values()) for c in ("motorway", "arterial"))
    # Only where the vehicles in sight agree with the hour
    if share >= 0.7 and t.level == "heavy":
        found["phase"] = "peak hour"
    elif share <= 0.5 and t.level == "light" and large >= 80.0:
        found["phase"] = "quiet hour"
    return found


def questions(facts: dict, s: Stream) -> Iterator[Question]:
    """All traffic questions that the facts answer."""

    def ask(type_, options, answer, group=None, **extra):
        return Question(type_, s.choice(options), str(answer), group or type_, extra)

    if "class" in facts:
        yield ask(
            "hierarchy",
            ("What is the class of the main road?", "Which road class is the main road?"),
            facts["class"],
        )
        lanes = ROAD_CLASSES[facts["class"]].lanes
        yield ask("hierarchy", ("How many lanes does the main road have?",), lanes, "lanes")
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
            "connectivity",
            ("What kind of junction is there?", "How do the roads connect?"),
            facts["junction"],
            "junction",
        )
    if "junctions" in facts and facts["junctions"] <= 5:
        yield ask("connectivity", ("How many junctions are there?",), facts["junctions"], "junctions")
    for kind in JUNCTIONS:
        if kind in facts["seen"] or kind in facts["unseen"]:
            yield ask("connectivity", (f"Is there {a(kind)}?",), "yes" if kind in facts["seen"] else "no")
    if "vehicles" in facts and facts["vehicles"] <= 12:
        yield ask(
            "traffic_density",
            ("How many moving vehicles are there?", "How many vehicles are on the roads?"),
            facts["vehicles"],
            "vehicles",
        )
    if facts.get("parked"):
        yield ask("traffic_density", ("How many vehicles are parked?",), facts["parked"], "parked")
    if "level" in facts:
        options = ("How heavy is the traffic?", "What is the traffic level?")
        yield ask("traffic_density", options, facts["level"])
    if "side" in facts:
        options = ("Which side of the image is the busiest?", "Which side has more vehicles?")
        yield ask("bottleneck", options, facts["side"])
    if "zone" in facts:
        options = ("What is the zone around the roads?", "Which kind of zone does the road serve?")
        yield ask("zoning", options, facts["zone"])
    if "phase" in facts:
        yield ask("peak_hour", ("Is this a peak hour or a quiet hour?",), facts["phase"], "two:phase")
    yield from _stated(facts, s)


def _stated(facts: dict, s: Stream) -> Iterator[Question]:
    """Questions whose numbers stand in the question: the peak of three counts, the slowest road class."""
    hours = s.shuffled(sorted(facts.get("counts", {})))
    for three in (sorted(hours[k : k + 3]) for k in range(0, len(hours) - 2, 3)):
        counts = [facts["counts"][h] for h in three]
        if _outstanding(counts) and max(counts) <= 99:
            text = ", ".join(f"{h} o'clock {c} vehicles" for h, c in zip(three, counts, strict=True))
            peak = three[counts.index(max(counts))]
            extra = {"road": facts.get("road"), "counts": dict(zip(three, counts, strict=True))}
            yield Question("peak_hour", f"{text}. Which hour is the peak hour?", str(peak), "peak", extra)
            break
    speeds = facts.get("speeds", {})
    if len(speeds) >= 2 and _outstanding([-v for v in speeds.values()]) and max(speeds.values()) <= 99:
        text = ", ".join(f"{cls} {speeds[cls]} percent" for cls in s.shuffled(sorted(speeds)))
        slowest = min(speeds, key=lambda cls: speeds[cls])
        question = f"Speeds: {text}. Which road class is the bottleneck?"
        yield Question("bottleneck", question, slowest, "slowest", {"speeds": speeds})


def _outstanding(values: list[int]) -> bool:
    """Whether the largest leads by the margin."""
    first, second = sorted(values)[:-3:-1]
    return first - second >= _MARGIN


def describe(facts: dict, s: Stream) -> str:
    """A traffic description of 2 to 5 sentences from facts."""
    parts = []
    if "class" in facts:
        way = facts.get("direction", "").replace("diagonal", "diagonally")
        way = way and f" and runs {way}"
        lanes = ROAD_CLASSES[facts["class"]].lanes
        parts.append(f"The main road is {road(facts['class'])} with {lanes} lanes{way}.")
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
    if "phase" in facts:
        parts.append(f"This is a {facts['phase']}.")
    if "side" in facts:
        parts.append(f"The {facts['side']} side is the busiest.")
    if "zone" in facts:
        article = "an" if facts["zone"][0] in "ai" else "a"
        parts.append(f"The roads serve {article} {facts['zone']} zone.")
    return " ".join(parts) or "No road is clearly visible."


def road(cls: str) -> str:
    """ "a motorway", "an arterial road"."""
    return "a motorway" if cls == "motorway" else f"{'an' if cls == 'arterial' else 'a'} {cls} road"


assert set(JUNCTIONS) <= set(NOUNS)
