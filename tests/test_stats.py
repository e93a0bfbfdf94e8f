import numpy as np
import pytest

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import stats
from mmrstraj_jax.evaluation.readers import Item


def _items(*rows):
    return [Item(str(i), (), question, kind, (answer,)) for i, (kind, question, answer) in enumerate(rows)]


def test_wilson_against_published_values():
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29
    for (k, n), expected in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():  # fmt: skip
        assert stats.wilson(k, n) == pytest.approx(expected, abs=5e-5)
    assert stats.wilson(0, 0) == (0.0, 1.0)
    assert stats.wilson(7, 7)[1] == 1.0
    with pytest.raises(UserError):
        stats.wilson(3, 2)


def test_paired_bootstrap_sees_what_is_paired():
    rng = np.random.default_rng(1)
    a = rng.random(200)
    same = stats.paired_bootstrap(a, a, draws=500)
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    better = stats.paired_bootstrap(a, a + 0.01, draws=500)  # far below the spread of a, but in every pair
    assert better.low > 0 and better.p <= 0.01
    coin = stats.paired_bootstrap(a, rng.random(200), draws=500)
    assert coin.low < coin.difference < coin.high
    assert stats.paired_bootstrap(a, a[::-1], draws=500) == stats.paired_bootstrap(a, a[::-1], draws=500)
    with pytest.raises(UserError):
        stats.paired_bootstrap(a, a[:5])


def test_table_names_micro_and_macro_and_keeps_undecided_apart():
    items = _items(*[("presence", "q", "yes")] * 8, *[("color", "q", "red")] * 2)
    verdicts = {str(i): "correct" for i in range(6)} | {
        "6": "wrong",
        "7": "undecided",
        "8": "wrong",
        "9": "unparsed",
    }
    table = stats.table(items, verdicts)
    presence, color = table.rows
    assert (presence.n, presence.correct, presence.wrong, presence.undecided) == (8, 6, 1, 1)
    assert presence.accuracy == pytest.approx(6 / 7) and presence.floor == pytest.approx(6 / 8)
    assert (color.accuracy, color.undecided) == (0.0, 1)
    assert table.micro.accuracy == pytest.approx(6 / 8)
    assert table.macro == pytest.approx((6 / 7 + 0) / 2)
    assert presence.majority is None


def test_a_type_without_a_decided_answer_has_no_accuracy():
    table = stats.table(_items(("a", "q", "x"), ("b", "q", "y")), {"0": "undecided", "1": "correct"})
    assert table.rows[0].accuracy is None and (table.rows[0].low, table.rows[0].high) == (0.0, 1.0)
    assert (table.macro, table.macro_types) == (1.0, 1)


def test_blind_baseline_never_uses_the_item_itself():
    items = _items(
        ("presence", "Is there a car?", "yes"),
        ("presence", "is there a car ？", "yes"),
        ("presence", "Is there a car?", "no"),
        ("presence", "Is there snow?", "no"),
        ("color", "Which color?", "red"),
    )
    same = {item.id: item.references[0] for item in items}
    blind = stats.blind_answers(items, same)
    assert blind["2"] == "yes"
    assert blind["0"] in ("yes", "no")  # one of each is left
    assert blind["3"] == "yes"  # asked once: the type's majority without its own answer
    assert blind["4"] == ""  # nothing else of its type
    assert stats.majority_answers(items, same) == {"0": "yes", "1": "yes", "2": "yes", "3": "yes", "4": "red"}
