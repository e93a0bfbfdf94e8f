"""Examples and micro-batches: every integer of the model's inputs, against a literal construction."""

import dataclasses

import data_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrstraj_jax.config import MODEL_PRESETS, Config
from mmrstraj_jax.data import anyres, chat, collate, images, records
from mmrstraj_jax.data.collate import Shape, Sizes
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.inference import prompts
from mmrstraj_jax.models.token_reduction import visual_pool

TOKENIZER = data_case.tokenizer()
SIZES = Sizes((1, 2, 3, 5, 7, 10, 37), 32, 2048)
PAD, VIEW = TOKENIZER.pad_id, 112


def row(folder, *sizes, answer="Two roads.", video=False, name="r"):
    names = []
    for number, size in enumerate(sizes):
        names.append(f"{name}{number}.png")
        data_case.picture(*size, seed=number).save(folder / names[-1])
    value = data_case.chat_row(0, names or None, answer=answer)
    if video:
        value["conversations"][0]["value"] = "<image>\nWhat moves?"
    paths = ((), tuple(names)) if video else (tuple(names), ())
    return records.Row(name, *paths, value["conversations"], "rows", 1, str(folder))


def make(folder, *sizes, policy=data_case.TINY, **how):
    return collate.example(row(folder, *sizes, **how), TOKENIZER, policy)


def together(*examples):
    shape = examples[0].shape
    for item in examples[1:]:
        shape = shape.join(item.shape)
    return SIZES.round(shape)


def test_lengths_are_rounded_to_few_sizes():
    sizes = Sizes((1, 5), 128, 4000)
    rounded = [sizes.round(Shape(1, length, 1, 0, False)).length for length in range(1, 4001)]
    assert all(size >= length for length, size in zip(range(1, 4001), rounded, strict=True))
    assert sorted(set(rounded)) == [
        *range(128, 1025, 128),
        *range(1280, 2049, 256),
        *range(2560, 3585, 512),
        4000,
    ]
    assert sizes.round(Shape(2, 9, 33, 0, True)) == Shape(5, 128, 64, 0, True)
    assert sizes.round(Shape(0, 9, 0, 0, False)) == Shape(1, 128, 0, 0, False)
    with pytest.raises(UserError, match="4001 tokens"):
        sizes.round(Shape(1, 4001, 1, 0, False))
    with pytest.raises(UserError, match="6 views"):
        sizes.round(Shape(6, 9, 1, 0, False))
    assert Sizes.of(Config()).max_length == 4096


def test_supervised_positions_predict_the_next_token(tmp_path):
    item = make(tmp_path, (200, 150))
    for mask in ("original", "clean"):
        item = collate.example(row(tmp_path, (200, 150)), TOKENIZER, data_case.TINY, mask=mask)
        made = collate.batch([item], together(item), PAD, VIEW)
        wanted = [
            (t - 1, item.labels[t], item.answer[t]) for t in range(1, len(item.labels)) if item.labels[t] >= 0
        ]
        count = int(made["weights"].sum())
        assert count == len(wanted) == item.shape.supervised
        found = zip(made["positions"][0], made["targets"][0], made["answer"][0], strict=True)
        assert [(int(p), int(t), bool(a)) for p, t, a in found][:count] == wanted
        assert not made["weights"][0, count:].any() and not made["answer"][0, count:].any()
        ids = made["inputs"].input_ids[0]
        np.testing.assert_array_equal(ids[made["positions"][0, :count] + 1], made["targets"][0, :count])
    answer = made["targets"][0][made["answer"][0]]
    assert TOKENIZER.decode(answer, skip_special=False) == "Two roads.<|im_end|>"


def test_text_only_row(tmp_path):
    item = make(tmp_path)
    made = collate.batch([item], together(item), PAD, VIEW)["inputs"]
    assert made.views.shape == (1, 1, VIEW, VIEW, 3) and not made.views.any()
    assert (made.visual_index == -1).all() and made.view_scale is None and made.canvas_index is None
    expected = chat.encode(row(tmp_path).conversations, TOKENIZER, kind="text")[0]
    np.testing.assert_array_equal(made.input_ids[0, : made.lengths[0]], expected)


def literal(item, policy, tokens, newline):
    """The reference's visual sequence of a row from its own view tokens [v, T, H], by jax.image.resize."""
    side, out, offset = policy.side, [], 0
    for plan in item.plans:
        maps = tokens[offset : offset + plan.num_views].reshape(-1, side, side, tokens.shape[-1])
        if plan.view_scale is not None:
            size = plan.reduced_side
            maps = jax.image.resize(maps, (len(maps), size, size, maps.shape[-1]), "linear", antialias=False)
        offset += plan.num_views
        if plan.kind != "anyres":
            out += [maps.reshape(-1, maps.shape[-1]), newline[None]]
            continue
        rows_, columns = plan.grid
        size = maps.shape[1]
        merged = maps[1:].reshape(rows_, columns, size, size, -1).transpose(0, 2, 1, 3, 4)
        merged = merged.reshape(rows_ * size, columns * size, -1)
        height, width = plan.resize[0] if plan.resize else (plan.map_height, plan.map_width)
        merged = merged[plan.top : plan.top + height, plan.left : plan.left + width]
        if plan.resize:
            merged = jax.image.resize(merged, (*plan.resize[1], merged.shape[-1]), "linear", antialias=False)
        lines = jnp.concatenate([merged, jnp.broadcast_to(newline, (merged.shape[0], 1, len(newline)))], 1)
        out += [maps[0].reshape(-1, maps.shape[-1]), lines.reshape(-1, maps.shape[-1])]
    return np.concatenate([np.asarray(part) for part in out])


@pytest.mark.parametrize("policy", [data_case.TINY, data_case.TINY_MAX], ids=["tau", "anyres_max"])
def test_gathered_tokens_equal_the_reference_packing(tmp_path, policy):
    """The host's indices and the device's pool, together."""
    items = [
        make(tmp_path, (500, 600), policy=policy, name="large"),
        make(tmp_path, (100, 90), policy=policy, name="small"),
        make(tmp_path, (50, 90), (200, 30), (64, 64), policy=policy, name="three"),
        make(tmp_path, (50, 90), (200, 30), policy=policy, video=True, name="video"),
        make(tmp_path, policy=policy, name="text"),
        make(tmp_path, (5, 700), policy=policy, name="thin"),
    ]
    bucket = together(*items)
    assert bucket.reduced and bool(bucket.canvas) == (policy is data_case.TINY_MAX)
    made = collate.batch([*items, None], bucket, PAD, VIEW)["inputs"]
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(7, bucket.views, policy.side**2, 3)).astype(np.float32)
    newline = np.asarray([7.0, 8.0, 9.0], np.float32)
    scale, grid, canvas = made.view_scale, made.canvas_index, made.canvas_scale
    pool = np.asarray(visual_pool(jnp.asarray(tokens), jnp.asarray(newline), scale, grid, canvas))
    for at, item in enumerate(items):
        slots = made.visual_index[at] >= 0
        assert (made.input_ids[at][slots] == PAD).all()
        starts = [
            start + np.arange(plan.num_tokens) for start, plan in zip(item.starts, item.plans, strict=True)
        ]
        np.testing.assert_array_equal(np.flatnonzero(slots), np.concatenate([np.zeros(0, int), *starts]))
        if item.plans:
            expected = literal(item, policy, tokens[at], newline)
            np.testing.assert_allclose(pool[at][made.visual_index[at][slots]], expected, atol=2e-6)
        assert made.lengths[at] == len(item.input_ids)
        np.testing.assert_array_equal(made.views[at, : len(item.views)], item.views)
    assert made.lengths[-1] == 1 and (made.visual_index[-1] == -1).all()


def test_slots_take_their_images_in_order(tmp_path):
    item = make(tmp_path, (50, 90), (200, 30))
    pictures = [images.load(tmp_path / f"r{at}.png") for at in range(2)]
    plan = anyres.plan_multi_image(data_case.TINY)
    np.testing.assert_array_equal(
        item.views, np.concatenate([images.views(one, plan, VIEW) for one in pictures])
    )
    made = collate.batch([item], together(item), PAD, VIEW)["inputs"].visual_index[0]
    assert made[item.starts[0]] == 0 and made[item.starts[1]] == 64 and made[item.starts[1] + 64] == 2 * 64


def test_padding_does_not_change_a_row(tmp_path):
    item = make(tmp_path, (200, 150))
    small = together(item)
    large = Shape(37, 1024, 256, 48, True)
    left, right = (collate.batch([item], bucket, PAD, VIEW) for bucket in (small, large))
    count, length = item.shape.supervised, len(item.input_ids)
    for name in ("positions", "targets", "weights", "answer"):
        np.testing.assert_array_equal(left[name][0, :count], right[name][0, :count])
    np.testing.assert_array_equal(left["inputs"].input_ids[0, :length], right["inputs"].input_ids[0, :length])
    assert (right["inputs"].view_scale[0, item.shape.views :] == 1).all()
    newline_left, newline_right = small.views * 64, 37 * 64 + 48 * 48
    index = left["inputs"].visual_index[0, :length]
    expected = np.where(index == newline_left, newline_right, index)
    np.testing.assert_array_equal(right["inputs"].visual_index[0, :length], expected)


def test_all_rows_of_a_bucket_have_the_same_shapes(tmp_path):
    items = [make(tmp_path, (200, 150)), make(tmp_path, (30, 30)), make(tmp_path)]
    bucket = together(*items)
    trees = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), collate.batch([one], bucket, PAD, VIEW))
        for one in items
    ]
    assert trees[0] == trees[1] == trees[2]


def test_rows_are_refused_rather_than_cut(tmp_path):
    shape = collate.example(row(tmp_path, (200, 150)), TOKENIZER, data_case.TINY).shape
    with pytest.raises(UserError, match=r"\d+ tokens, more than max_length 100"):
        collate.Sizes((1, 2, 5, 10), 64, 100).round(shape)
    silent = row(tmp_path, (20, 20))
    silent.conversations.pop()
    with pytest.raises(UserError, match="no supervised token"):
        collate.example(silent, TOKENIZER, data_case.TINY)
    extra = row(tmp_path, (20, 20))
    extra.conversations[0]["value"] += "<image>"
    with pytest.raises(UserError, match="2 <image> slots for 1 images"):
        collate.example(extra, TOKENIZER, data_case.TINY)
    item = make(tmp_path, (20, 20))
    item.labels[:] = chat.IGNORE
    with pytest.raises(UserError, match="row r: no supervised token"):
        collate.batch([item], together(item), PAD, VIEW)


def test_a_prompt_is_the_beginning_of_its_training_row(tmp_path):
    """One expansion of slots: what inference reads is what training saw, up to the answer."""
    config = dataclasses.replace(MODEL_PRESETS["tiny"], pad_token_id=PAD, image_token_id=TOKENIZER.image_id)
    trained = make(tmp_path, (200, 150), answer="Two.", name="x")
    question = row(tmp_path, (200, 150), name="x").conversations[0]["value"]
    ids = chat.prompt([{"role": "user", "content": question}], TOKENIZER)
    item = prompts.read(prompts.Request(ids, [data_case.picture(200, 150)]), config, data_case.TINY)
    np.testing.assert_array_equal(item.input_ids, trained.input_ids[: len(item.input_ids)])
    np.testing.assert_array_equal(item.views, trained.views)
    assert (item.plans, item.starts) == (trained.plans, trained.starts)
