"""Grid, unpadding, token counts and gather indices of Higher AnyRes."""

import csv
import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrstraj_jax.config import AnyResConfig
from mmrstraj_jax.data import anyres
from mmrstraj_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden"
MAX_9 = AnyResConfig(policy="anyres_max_9")
MAX_9_ORIGINAL = AnyResConfig(policy="anyres_max_9", rounding="original")
TAU = AnyResConfig()
TINY = AnyResConfig().for_views(112, 14)
TINY_MAX = AnyResConfig(policy="anyres_max_2").for_views(112, 14)


def rows():
    with open(GOLDEN / "token_counts_384.csv") as file:
        return [{key: int(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_every_column_of_the_reference_table():
    assert len(rows()) == 600
    for row in rows():
        size = row["width"], row["height"]
        hf, original, tau = (anyres.plan(*size, policy) for policy in (MAX_9, MAX_9_ORIGINAL, TAU))
        assert hf.grid == original.grid == tau.grid == (row["grid_rows"], row["grid_cols"]), size
        assert hf.num_views == tau.num_views == row["n_views"], size
        assert hf.num_tokens == row["n_tokens_hf"], size
        assert original.num_tokens == row["n_tokens_original"], size
        assert (hf.map_height, hf.map_width) == (row["crop_map_h"], row["crop_map_w"]), size
        assert tau.reduced_side == row["tau2000_side"], size
        assert tau.num_views * tau.reduced_side**2 == row["tau2000_tokens_no_newline"], size
        assert (tau.map_height, tau.map_width) == (row["tau2000_map_h"], row["tau2000_map_w"]), size
        assert tau.num_tokens == row["tau2000_tokens"], size


def test_known_rounding_differences():
    cases = json.loads((GOLDEN / "rounding_mismatch_384.json").read_text())["cases"]
    assert len(cases) == 34
    for case in cases:
        size = case["width"], case["height"]
        assert anyres.plan(*size, MAX_9).num_tokens == case["n_hf"], size
        assert anyres.plan(*size, MAX_9_ORIGINAL).num_tokens == case["n_original"], size


@pytest.mark.parametrize(
    "size, count",
    [((954, 1154), 8765), ((1382, 1152), 8748), ((1, 1000), 891), ((10000, 1), 757), ((1024, 899), 6551)],
)
def test_landmarks_of_anyres_max_9(size, count):
    assert anyres.plan(*size, "anyres_max_9").num_tokens == count


def test_tau_reading_of_the_paper():
    """512 x 512 is the hint that the formula is meant per view: 2000 / 5 = 20 * 20, exactly."""
    plan = anyres.plan(512, 512, "tau")
    assert (plan.num_views, plan.reduced_side, plan.num_tokens) == (5, 20, 2040)
    assert plan.view_scale == 20 / 27
    sides = {1: 27, 2: 25, 3: 22, 4: 20, 5: 18, 6: 16, 8: 14, 9: 14, 10: 13, 12: 12, 15: 11, 16: 10}
    sides |= {18: 10, 20: 9, 24: 8, 25: 8, 30: 8, 36: 7}
    for rows_ in range(1, 7):
        for columns in range(1, 7):
            plan = anyres.plan(384 * columns, 384 * rows_, "tau")
            assert plan.grid == (rows_, columns)
            assert plan.reduced_side == sides[rows_ * columns]


def test_tau_keeps_its_share_at_other_view_sizes():
    assert TINY.tau == pytest.approx(2000 * 64 / 729)
    assert anyres.plan(200, 200, TINY).grid == (2, 2)
    assert anyres.plan(100, 100, TINY).view_scale is None


def test_small_budget_keeps_one_token_a_view():
    plan = anyres.plan(2304, 2304, dataclasses.replace(TAU, tau=5.0))
    assert plan.reduced_side == 1 and plan.num_tokens == 1 + 6 * 7


def test_square_and_video():
    square, video = anyres.plan_multi_image("anyres_max_9"), anyres.plan_video(32, "tau")
    assert square.num_tokens == 730 and video.num_tokens == 6273 and video.view_scale == 14 / 27
    index = video.index(1, 40)
    assert index[-1] == 40 * 729 and index[0] == 729 and index[14] == 729 + 27
    assert index[-2] == 32 * 729 + 13 * 27 + 13
    np.testing.assert_array_equal(square.index(2, 5), np.append(np.arange(2 * 729, 3 * 729), 5 * 729))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 3)])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(UserError, match="expected at least 1x1"):
        anyres.plan(*size, "tau")
    with pytest.raises(UserError, match="frames"):
        anyres.plan_video(0, "tau")


def packed_literally(width, height, policy, view_offset, num_views, canvas):
    """Oracle: the reference's reshape, unpad and newline on maps whose values are their pool index."""
    plan, side, size = (
        anyres.plan(width, height, policy),
        policy.side,
        anyres.plan(width, height, policy).reduced_side,
    )
    rows_, columns = plan.grid
    newline = num_views * side**2 + canvas[0] * canvas[1]
    ids = np.arange(num_views * side**2).reshape(num_views, side, side)[:, :size, :size]
    ids = ids[view_offset : view_offset + plan.num_views]
    base, crops = ids[0], ids[1:].reshape(rows_, columns, size, size)
    merged = crops.transpose(0, 2, 1, 3).reshape(rows_ * size, columns * size)
    full_height, full_width = merged.shape

    def truncate(value):
        return int(round(value, 7)) if policy.rounding == "hf" else int(value)

    if width / height > full_width / full_height:
        padding = (full_height - truncate(height * (full_width / width))) // 2
        merged = merged[padding : full_height - padding]
    else:
        padding = (full_width - truncate(width * (full_height / height))) // 2
        merged = merged[:, padding : full_width - padding]
    laid = merged
    if policy.max_num is not None:
        times = math.sqrt(merged.shape[0] * merged.shape[1] / (policy.max_num * side**2))
        if times > 1.1:
            small = int(merged.shape[0] // times), int(merged.shape[1] // times)
            pool = num_views * side**2 + np.arange(canvas[0] * canvas[1]).reshape(canvas)
            merged = pool[: small[0], : small[1]]
    lines = np.concatenate([merged, np.full((merged.shape[0], 1), newline)], axis=1)
    return np.concatenate([base.reshape(-1), lines.reshape(-1)]), laid


def check(width, height, policy, view_offset=0, spare=0):
    plan = anyres.plan(width, height, policy)
    num_views = view_offset + plan.num_views + spare
    canvas = (plan.canvas_side, plan.canvas_side)
    index = plan.index(view_offset, num_views, canvas)
    expected, laid = packed_literally(width, height, policy, view_offset, num_views, canvas)
    np.testing.assert_array_equal(index, expected)
    assert index.dtype == np.int32 and len(index) == plan.num_tokens
    assert index.min() >= 0 and index.max() <= num_views * policy.side**2 + canvas[0] * canvas[1]
    if plan.resize:
        filled = plan.canvas_index(view_offset, canvas)
        assert plan.resize[0] == laid.shape
        np.testing.assert_array_equal(
            filled, np.pad(laid, [(0, c - n) for c, n in zip(canvas, laid.shape, strict=True)], "edge")
        )
    if policy.max_num is None:
        assert plan.num_views * plan.reduced_side**2 <= policy.tau
        assert plan.num_tokens <= policy.tau + plan.grid[0] * plan.reduced_side


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 1500),
    st.integers(1, 1500),
    st.sampled_from(
        [TAU, MAX_9, MAX_9_ORIGINAL, TINY, TINY_MAX, dataclasses.replace(TAU, rounding="original")]
    ),
    st.integers(0, 3),
    st.integers(0, 5),
)
def test_indices_equal_the_packed_reference(width, height, policy, view_offset, spare):
    check(width, height, policy, view_offset, spare)


@pytest.mark.parametrize(
    "size", [(1, 1000), (1000, 1), (1, 1), (4000, 4000), (2304, 2304), (1920, 1080), (3, 5000)]
)
@pytest.mark.parametrize("policy", [TAU, MAX_9, TINY_MAX])
def test_extreme_shapes(size, policy):
    check(*size, policy)


def test_an_empty_map_still_shows_the_base_view():
    plan = anyres.plan(1, 1000, "tau")
    assert (plan.map_height, plan.map_width, plan.num_tokens) == (66, 0, 22 * 22 + 66)
    assert (plan.index(0, 4)[22 * 22 :] == 4 * 729).all()


def test_a_policy_that_cannot_be_planned_is_refused():
    with pytest.raises(UserError, match="anyres_max_0.*N from 1 on"):
        anyres.plan(30, 40, "anyres_max_0")
    sizes = [{"view_size": 500}, {"view_size": 336}, {"view_size": 0}, {"grid_pinpoints": ((384, 0),)}]
    sizes += [{"view_size": 12, "grid_pinpoints": ((12, 24),)}, {"patch_size": 0}]
    for changes in sizes:
        with pytest.raises(UserError, match="AnyResConfig.for_views"):
            AnyResConfig(**changes)


def test_rows_choose_their_layout():
    kinds = [p.kind for p in anyres.plan_row([(10, 10), (20, 20)], 0, TAU)]
    assert kinds == ["square", "square"]
    assert [p.kind for p in anyres.plan_row([(10, 10)], 0, TAU)] == ["anyres"]
    assert [p.num_views for p in anyres.plan_row([], 8, TAU)] == [8]
    assert anyres.plan_row([], 0, TAU) == []


def test_an_image_whose_square_would_fill_the_memory_is_refused():
    """60,000 x 10 pixels are small, 60,000 x 60,000 are 14 GB; alone the image is cropped, not squared."""
    with pytest.raises(UserError, match="60000x10: one of several is padded to a square"):
        anyres.plan_row([(10, 10), (60_000, 10)], 0, TAU)
    assert len(anyres.plan_row([(10, 10), (20_000, 10)], 0, TAU)) == 2
    assert anyres.plan_row([(60_000, 10)], 0, TAU)[0].kind == "anyres"


@pytest.mark.parametrize(
    "change", [{"tau": float("nan")}, {"tau": float("inf")}, {"tau": 0.0}, {"grid_pinpoints": ()}]
)
def test_settings_that_are_no_policy_are_refused(change):
    with pytest.raises(UserError, match=f"anyres.{next(iter(change))}.*: expected"):
        AnyResConfig(**change)
