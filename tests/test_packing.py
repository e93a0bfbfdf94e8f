"""Several samples in one row: who shares a row with whom, and that nobody notices."""

import data_case
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_case as case

from mmrstraj_jax.config import AnyResConfig
from mmrstraj_jax.data import collate, records
from mmrstraj_jax.data.collate import Shape, Sizes
from mmrstraj_jax.data.index import Index, build_index
from mmrstraj_jax.data.loader import Loader
from mmrstraj_jax.data.packing import pack
from mmrstraj_jax.data.records import Source
from mmrstraj_jax.data.schedule import Schedule
from mmrstraj_jax.models import attention
from mmrstraj_jax.training import state as states
from mmrstraj_jax.training.step import gradients

SIZES = Sizes((1, 2, 3, 5, 10, 37), 32, 512)
TOKENIZER = data_case.tokenizer()
POLICIES = {"tau": AnyResConfig(), "anyres_max": AnyResConfig(policy="anyres_max_2")}
POLICIES = {name: policy.for_views(28, 14) for name, policy in POLICIES.items()}


def index_of(shapes, sources=None):
    shapes = np.asarray(shapes, np.int32).reshape(-1, 5)
    return Index([None] * len(shapes), shapes, [], sources or [Source("a", None, 0, len(shapes))], "", "")


def random_shapes(count, seed=0):
    random = np.random.default_rng(seed)
    lengths = random.integers(20, 400, count)
    canvas = 4 * (random.random(count) < 0.2)
    reduced = random.random(count) < 0.5
    return np.stack([random.integers(0, 12, count), lengths, lengths // 3, canvas, reduced], 1)


def test_first_fit_holds_every_row_once_within_its_limits():
    shapes = random_shapes(500)
    sources = [Source("a", 1.0, 0, 300), Source("b", 3.0, 300, 200)]
    index = index_of(shapes, sources)
    packs = pack(index, 512, 37, seed=4)
    assert sorted(packs.rows) == list(range(500)) and packs.ends[-1] == 500
    for number in range(len(packs.ends)):
        rows = packs.members(number)
        used = shapes[rows]
        assert used[:, 1].sum() <= 512 and used[:, 0].sum() <= 37 and (used[:, 3] > 0).sum() <= 1
        expected = [*used[:, :3].sum(0), used[:, 3].max(), used[:, 4].max()]
        assert packs.shapes[number].tolist() == expected
        assert len({row < 300 for row in rows}) == 1  # one source: its share of the mixture stays exact
    filled = packs.shapes[:, 1].mean() / 512
    assert filled > 0.85 and len(packs.ends) < 300
    again = pack(index, 512, 37, seed=4)
    np.testing.assert_array_equal(packs.rows, again.rows)
    assert packs.rows.tolist() != pack(index, 512, 37, seed=5).rows.tolist()


def test_every_sample_once_an_epoch_in_constant_steps():
    schedule = Schedule(index_of(random_shapes(200)), SIZES, 4, seed=1, packing=True)
    assert schedule.steps_per_epoch == -(-len(schedule.packs.ends) // 4) < 50
    for epoch in range(2):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        numbers = [number for step in steps for number in schedule.batch(step)[1].tolist()]
        assert sorted(row for number in numbers for row in schedule.members(number)) == list(range(200))
        assert sum(schedule.num_samples(step) for step in steps) == 200
    shares = [Source("a", 1.0, 0, 100), Source("b", 3.0, 100, 100)]
    mixed = Schedule(index_of(random_shapes(200), shares), SIZES, 4, seed=1, packing=True)
    drawn = [
        row
        for step in range(5 * mixed.steps_per_epoch)
        for n in mixed.batch(step)[1]
        for row in mixed.members(n)
    ]
    assert 0.7 < sum(row >= 100 for row in drawn) / len(drawn) < 0.8


# ---- the model


def samples(folder, policy):
    """Four different samples: a grid that needs the canvas, a small image, text only, two images."""
    made = []
    for number, sizes in enumerate([[(150, 200)], [(30, 20)], [], [(20, 40), (40, 40)]]):
        names = [f"{number}-{at}.png" for at in range(len(sizes))]
        for at, size in enumerate(sizes):
            data_case.picture(*size, seed=number + at).save(folder / names[at])
        row = data_case.chat_row(number, names or None, answer="Two roads. " * (1 + number))
        row = records.Row(row["id"], tuple(names), (), row["conversations"], "rows", number, str(folder))
        made.append(collate.example(row, TOKENIZER, policy))
    return made


def batch_of(groups, policy, **how):
    """A batch with a row for each group of samples."""
    rows = [collate.join(group) for group in groups]
    shape = rows[0].shape
    for row in rows[1:]:
        shape = shape.join(row.shape)
    made = collate.batch(rows, SIZES.round(shape), TOKENIZER.pad_id, 28, **how)
    return jax.tree.map(jnp.asarray, made)


def unpacked(made):
    """A row for each sample."""
    shape = made[0].shape
    for one in made[1:]:
        shape = shape.join(one.shape)
    return jax.tree.map(jnp.asarray, collate.batch(made, SIZES.round(shape), TOKENIZER.pad_id, 28))


@pytest.fixture(scope="module")
def model():
    text = case.MODEL.text.__class__(**{**vars(case.MODEL.text), "vocab_size": len(TOKENIZER) + 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case, "MODEL", case.MODEL.__class__(case.MODEL.vision, text))
        return case.model()


def logits(model, inputs):
    return np.asarray(jax.jit(lambda inputs: model.logits(model.hidden_states(inputs)))(inputs))


@pytest.mark.parametrize("name", POLICIES)
def test_packed_logits_equal_unpacked_ones(tmp_path, model, name):
    policy = POLICIES[name]
    made = samples(tmp_path, policy)
    assert bool(made[0].shape.canvas) == (name == "anyres_max")
    packed = batch_of([made], policy, packed=True)["inputs"]
    assert packed.segment_ids.max() == 4 and set(np.asarray(packed.positions[packed.segment_ids == 0])) == {0}
    together, begin = logits(model, packed)[0], 0
    for one, alone in zip(made, logits(model, unpacked(made)["inputs"]), strict=True):
        length = len(one.input_ids)
        np.testing.assert_allclose(together[begin : begin + length], alone[:length], atol=2e-5, rtol=2e-5)
        assert np.abs(alone).max() > 0.5
        begin += length


def test_loss_and_gradients_of_packed_rows_are_those_of_single_ones(tmp_path, model):
    config = case.config(lora=case.LoRAConfig(rank=2, alpha=4.0, dropout=0.0))
    graphdef, trainable, frozen = states.split(model)
    policy = POLICIES["anyres_max"]
    made = samples(tmp_path, policy)
    single = unpacked(made)
    compute = jax.jit(lambda batch: gradients(graphdef, config, trainable, frozen, batch, 0))
    expected = compute(case.stacked(single))
    packed = batch_of([[made[2], made[0]], [made[3], made[1]]], policy, packed=True)
    assert packed["weights"].sum() == single["weights"].sum()
    found = compute(case.stacked(packed))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for leaf, other in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
        np.testing.assert_allclose(leaf, other, atol=2e-6, rtol=1e-4)


def test_loss_and_gradients_do_not_depend_on_padding(tmp_path, model):
    """Longer rows, more empty views, a larger canvas, more room for targets: the same loss and gradients."""
    config = case.config(lora=case.LoRAConfig(rank=2, alpha=4.0, dropout=0.0))
    graphdef, trainable, frozen = states.split(model)
    made = samples(tmp_path, POLICIES["anyres_max"])
    snug = made[0].shape
    for one in made[1:]:
        snug = snug.join(one.shape)
    wide = Shape(snug.views + 5, 2 * snug.length, 3 * snug.supervised, snug.canvas + 3, True)
    compute = jax.jit(lambda batch: gradients(graphdef, config, trainable, frozen, batch, 0))
    results = []
    for bucket in (snug, wide):
        batch = collate.batch(made, bucket, TOKENIZER.pad_id, 28)
        results.append(compute(case.stacked(jax.tree.map(jnp.asarray, batch))))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-6)
    for leaf, other in zip(*(jax.tree.leaves(result[1]) for result in results), strict=True):
        np.testing.assert_allclose(leaf, other, atol=2e-6, rtol=1e-4)


def test_changing_a_sample_never_changes_its_neighbours(tmp_path, model):
    """Values and gradients, to the last bit; the first, a middle and the last sample in turn."""
    policy = POLICIES["tau"]
    made = samples(tmp_path, policy)
    batch = batch_of([made], policy, packed=True)
    inputs, segments = batch["inputs"], np.asarray(batch["inputs"].segment_ids[0])
    graphdef, trainable, frozen = states.split(model)
    offsets = np.cumsum([0, *[one.shape.views for one in made]])

    @jax.jit
    def of_segment(inputs, number):
        """Logits, and the gradient of a loss on one segment w.r.t. trainables and all embeddings."""

        def loss(trainable, shift):
            merged = states.merge(graphdef, trainable, frozen)
            x = merged.embed(inputs) + shift
            hidden = merged.language_model(x, segment_ids=inputs.segment_ids, positions=inputs.positions)
            scores = merged.logits(hidden)
            mine = (inputs.segment_ids == number)[..., None]
            return jnp.where(mine, jnp.sin(scores), 0.0).sum(), scores

        shift = jnp.zeros((1, inputs.input_ids.shape[1], case.MODEL.text.hidden_size))
        (_, scores), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(trainable, shift)
        return scores[0], *grads

    random = np.random.default_rng(0)
    for changed in (1, 2, 4):
        mine = segments == changed
        ids = np.array(inputs.input_ids)
        text = mine[None] & (np.asarray(inputs.visual_index) < 0)
        ids[text] = random.integers(0, 60, text.sum())
        views = np.array(inputs.views)
        views[0, offsets[changed - 1] : offsets[changed]] = random.integers(0, 256)
        other = inputs._replace(input_ids=jnp.asarray(ids), views=jnp.asarray(views))
        for kept in {1, 2, 3, 4} - {changed}:
            before, after = of_segment(inputs, kept), of_segment(other, kept)
            where = segments == kept
            np.testing.assert_array_equal(before[0][where], after[0][where])
            jax.tree.map(np.testing.assert_array_equal, before[1], after[1])
            assert np.abs(before[2][0][where]).max() > 0
            assert not np.asarray(before[2][0][~where]).any()  # and nothing of it depends on the others
        assert (
            np.abs(np.asarray(of_segment(inputs, changed)[0] - of_segment(other, changed)[0])[mine]).max()
            > 0.01
        )


def test_the_test_sees_a_leak(tmp_path, model):
    """Without segment ids, or without restarting positions, packed and single logits differ."""
    made = samples(tmp_path, POLICIES["tau"])
    inputs = batch_of([made], POLICIES["tau"], packed=True)["inputs"]
    right = logits(model, inputs)[0]
    second = np.asarray(inputs.segment_ids[0] == 2)
    for missing in ("segment_ids", "positions"):
        wrong = logits(model, inputs._replace(**{missing: None}))[0]
        # RoPE is relative: within a segment a constant offset changes rounding only
        limit = 1e-2 if missing == "segment_ids" else 0
        assert np.abs(wrong - right)[second].max() > limit, missing


def test_cudnn_is_never_asked_for_segments(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention.uses_cudnn(jnp.dtype("bfloat16")) and not attention.uses_cudnn(jnp.dtype("float32"))
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(AssertionError, match="XLA attention"):
        attention.attention(q, q, q, is_causal=True, segment_ids=jnp.zeros((1, 4), jnp.int32))


# ---- the stream


def test_the_stream_of_packed_rows(tmp_path):
    path = data_case.dataset(
        tmp_path, [(20, 30), (90, 20), None, (56, 56), None, (30, 30), (20, 90), (200, 200)]
    )
    policy = POLICIES["tau"]
    index = build_index(records.load(str(path)), TOKENIZER, policy, SIZES)
    schedule = Schedule(index, SIZES, 2, seed=1, packing=True)
    loader = Loader(index, schedule, TOKENIZER, policy)
    halves = [
        Loader(index, schedule, TOKENIZER, policy, process_index=at, process_count=2) for at in range(2)
    ]
    seen = []
    for step in range(schedule.steps_per_epoch):
        _, bucket, batch = loader(step)
        ids = loader.ids(step)
        seen += [name for name in ids if name]
        assert (
            batch["inputs"].segment_ids.max(1).sum()
            == schedule.num_samples(step)
            == len([n for n in ids if n])
        )
        assert batch["inputs"].lengths.max() <= SIZES.max_length
        pieces = [half(step)[2] for half in halves]
        together = jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)
        jax.tree.map(np.testing.assert_array_equal, batch, together)
        blank = loader.blank(bucket)
        shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), one) for one in (batch, blank)]
        assert shapes[0] == shapes[1] and not blank["weights"].any()
    assert sorted(seen) == sorted(f"row{number}" for number in range(8))
    assert schedule.largest(0, schedule.steps_per_epoch) in schedule.buckets
    assert isinstance(schedule.largest(0, 1), Shape)
