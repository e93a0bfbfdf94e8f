"""The printed tables, and every inconsistency that published.py notes, recomputed."""

import pytest

from mmrstraj_jax.evaluation import published as p


def fits(value: float, n: int) -> bool:
    """Whether some k/n rounds or cuts to the printed percentage."""
    return any(
        abs(100 * k / n - value) < 0.005 + 1e-9 or 0 <= 100 * k / n - value < 0.01 for k in range(n + 1)
    )


def test_shapes():
    assert [table.number for table in p.TABLES.values()] == [2, 3, 4]
    assert list(p.TABLES) == ["rsieval-caption", "ucm", "rsieval-vqa"]
    assert [len(table.rows) for table in p.TABLES.values()] == [8, 21, 6]
    for table in p.TABLES.values():
        assert all(len(row) == len(table.columns) for row in table.rows.values())
        assert table.notes


def test_claims_of_the_text_that_hold():
    assert p.TABLE3.best("cider") == ("MM-RSTraj-7B", 398.10)
    assert {p.TABLE3.best(c)[0] for c in ("bleu1", "bleu2", "meteor")} == {"RS-MoE-7B"}
    assert {p.TABLE3.best(c)[0] for c in ("bleu3", "bleu4", "rouge_l")} == {"RS-LLaVA-13B"}
    assert sum(p.TABLE4.best(c)[0] == "MM-RSTraj" for c in p.TABLE4.columns) == 6


def test_implied_ngram_precisions_rise_in_four_rows_of_table_2_and_none_of_table_3():
    def rises(row):
        b = [1.0] + [value / 100 for value in row[:4]]
        precision = [b[n] ** n / b[n - 1] ** (n - 1) for n in range(1, 5)]
        return {
            n + 1: precision[n] / precision[n - 1] for n in range(1, 4) if precision[n] > precision[n - 1]
        }

    found = {name: rises(row) for name, row in p.TABLE2.rows.items() if rises(row)}
    assert {name: list(r) for name, r in found.items()} == {
        "MiniGPT4-13B": [4],
        "InstructBLIP-13B": [3],
        "RS-MoE-1B": [4],
        "MM-RSTraj-0.5B": [4],
    }
    assert found["RS-MoE-1B"][4] == pytest.approx(2.7, abs=0.05)
    assert found["MM-RSTraj-0.5B"][4] == pytest.approx(2.3, abs=0.05)
    assert not any(rises(row) for row in p.TABLE3.rows.values())


def test_meteor_and_rouge_scales():
    meteor, rouge, bleu4 = (p.CAPTION_COLUMNS.index(c) for c in ("meteor", "rouge_l", "bleu4"))
    assert all(row[meteor] > row[rouge] for row in p.TABLE2.rows.values())
    assert sum(row[bleu4] > row[rouge] for row in p.TABLE2.rows.values()) == 6
    assert max(row[rouge] for row in p.TABLE2.rows.values()) < 40  # a constant caption's
    ratios = {name: row[meteor] / row[rouge] for name, row in p.TABLE3.rows.items() if row[rouge]}
    assert {name: round(r, 2) for name, r in ratios.items() if r > 0.58} == {
        "RS-MoE-7B": 1.07,
        "MM-RSTraj-7B": 1.04,
    }
    near = [row[rouge] for row in p.TABLE3.rows.values() if 62 < row[bleu4] < 77]
    assert sorted(near)[:3] == [61.87, 62.74, 69.42] and max(near) == 85.78
    others = [r for r in ratios.values() if r < 1]
    assert round(min(others), 2) == 0.32 and round(max(others), 2) == 0.58


def test_05b_claims():
    rows = p.TABLE2.rows
    better = [
        c
        for c, a, b in zip(p.CAPTION_COLUMNS, rows["MM-RSTraj-0.5B"], rows["RS-MoE-1B"], strict=True)
        if a > b
    ]
    assert better == ["cider"]
    better = [
        c
        for c, a, b in zip(p.CAPTION_COLUMNS, rows["MM-RSTraj-0.5B"], rows["BLIP2-13B"], strict=True)
        if a > b
    ]
    assert better == ["bleu1", "cider"]


def test_denominators_of_table_4():
    assert sum(p.RSIEVAL_PUBLIC.values()) == 943
    assert sum(p.RSIEVAL_RSGPT.values()) == 935 == p.RSIEVAL_STATED - 1

    def misfits(name, counts):
        row = zip(p.VQA_COLUMNS, p.TABLE4.rows[name], strict=True)
        return {column for column, value in row if not fits(round(value, 2), counts[column])}

    for name in ("BLIP2", "MiniGPT4", "InstructBLIP", "RSGPT"):
        assert not misfits(name, p.RSIEVAL_RSGPT)
        assert len(misfits(name, p.RSIEVAL_PUBLIC)) >= 8
    assert misfits("MM-RSTraj", p.RSIEVAL_PUBLIC) == {"quantity", "reasoning"}
    assert misfits("RS-MoE", p.RSIEVAL_PUBLIC) == {"color", "area_comp", "image", "reasoning", "scene"}
    assert not any(fits(71.24, n) for n in range(1, 130))
    assert [n for n in range(100, 130) if fits(33.06, n)] == [121, 124]
    for value, n in ((71.92, 57), (77.89, 95), (74.07, 54), (93.18, 44), (63.41, 41)):
        assert fits(value, n)
