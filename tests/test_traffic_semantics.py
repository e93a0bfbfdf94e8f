import json

import pytest

from mmrstraj_jax.evaluation import traffic
from mmrstraj_jax.evaluation.readers import Item

TRUTH = (
    "The main road is an arterial road with 4 lanes and runs north-south. There is a roundabout. "
    "Traffic is heavy, with 12 moving cars. The left side is the busiest. The roads serve a residential zone."
)


def test_a_description_becomes_facts():
    assert traffic.facts(TRUTH) == {
        "class": "arterial", "lanes": 4, "direction": frozenset(["NS"]), "junction": "roundabout",
        "level": "heavy", "vehicles": 12, "busiest": frozenset([("", "left")]), "zone": "residential",
    }  # fmt: skip
    assert traffic.facts("There are 3 junctions. Traffic is light.") == {"junctions": 3, "level": "light"}
    assert traffic.facts("There is no roundabout. A park lies beside the road.") == {}
    assert traffic.facts("") == {}


def test_every_fact_is_right_contradicted_missing_or_unsupported():
    said = "A motorway runs vertically. There are two junctions. Traffic is heavy. "
    said += "The roads serve a residential area."
    assert traffic.check(said, TRUTH) == {
        "class": "contradicted", "lanes": "missing", "direction": "right", "junction": "missing",
        "junctions": "unsupported", "busiest": "missing",
        "level": "right", "vehicles": "missing",
        "zone": "right",
    }  # fmt: skip
    assert set(traffic.check(TRUTH, TRUTH).values()) == {"right"}
    table = traffic.table([(said, TRUTH), (TRUTH, TRUTH)])
    road = table["road structure"]
    assert (road["known"], road["right"], road["contradicted"], road["missing"], road["unsupported"]) == (
        8,
        5,
        1,
        2,
        1,
    )
    assert table["functional zoning"]["share_right"] == 1.0


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{}", '[{"kind": "x"}]', '[{"kind": "weather", "text": "", "place": "", "evidence": ""}]'],
)
def test_units_are_exactly_what_was_asked_for(text):
    assert traffic.units(text) is None
    assert traffic.units('[{"kind": ["bottlenecks"], "text": "", "place": "", "evidence": ""}]') is None
    row = {"kind": "bottlenecks", "text": "queue", "place": "left", "evidence": "cars stand close"}
    assert traffic.units(f"```json\n{json.dumps([row])}\n```") == [traffic.Unit(**row)]


def test_a_model_that_goes_round_in_circles_says_nothing():
    assert traffic.units("[" * 100_000) is None
    assert traffic.facts(f"There are {'9' * 500} cars and {'9' * 500} lanes.") == {}


def test_selection_is_a_seeded_draw_of_road_images():
    items = [Item(str(n), (), None, "caption", ("a road" if n % 2 else "a lake",)) for n in range(40)]
    first = traffic.select(items, 5, seed=1)
    assert first == traffic.select(items, 5, seed=1) != traffic.select(items, 5, seed=2)
    assert len(first) == 5 and all(int(item.id) % 2 for item in first)
    assert len(traffic.select(items, 100)) == 20
