"""The train step: which leaves get gradients, accumulation, dropout keys, the non-finite guard, frozen
checksums.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_case as case

from mmrstraj_jax.training import state as states
from mmrstraj_jax.training import step as steps
from mmrstraj_jax.training.optimizer import Optimizer
from mmrstraj_jax.training.step import build_eval_step, build_step

CONFIG = case.config(train_full=("newline",))
GRAPHDEF, TRAINABLE, FROZEN = states.split(case.model(CONFIG.lora, CONFIG.train_full))
OPTIMIZER = Optimizer(CONFIG.optim, 10)
# Compiling is what these tests cost: they share one program per shape.
STEP = build_step(GRAPHDEF, OPTIMIZER, CONFIG)
EVALUATE = build_eval_step(GRAPHDEF)


def fresh():
    """(trainable, opt_state) that a donating step may eat."""
    trainable = {name: jnp.array(leaf) for name, leaf in TRAINABLE.items()}
    return trainable, OPTIMIZER.init(trainable)


def after_step(batch, index=1):
    return STEP(*fresh(), FROZEN, batch, index)


def copied(tree):
    return jax.tree.map(np.array, tree)  # not a view: a live view would stop the donation


def close(a, b, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_accumulation_equals_one_large_batch():
    """With dropout: the masks follow the samples."""
    one = case.batch()
    whole, halves = (after_step(case.stacked(one, num_micro)) for num_micro in (1, 2))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(halves[2][name], whole[2][name], rtol=1e-6)
    # Adam's first step divides a gradient by its own size, so compare the moments: they are the gradients
    close(halves[1].adam.mu, whole[1].adam.mu)


def test_loss_is_the_token_mean_of_the_model():
    one = jax.tree.map(jnp.asarray, case.batch())
    model = states.merge(GRAPHDEF, TRAINABLE, FROZEN)
    logits = jax.jit(lambda inputs: model.logits(model.hidden_states(inputs)))(one["inputs"])
    picked = jnp.take_along_axis(logits, one["positions"][..., None], axis=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(picked, one["targets"]) * one["weights"]
    rows = EVALUATE(TRAINABLE, FROZEN, one)
    np.testing.assert_allclose(rows.nll, losses.sum(-1), rtol=1e-5)

    best = jnp.argmax(picked, -1)
    assert EVALUATE(TRAINABLE, FROZEN, one | {"targets": best}).correct.all()
    one_wrong = best.at[1, 0].set((best[1, 0] + 1) % 64)
    assert EVALUATE(TRAINABLE, FROZEN, one | {"targets": one_wrong}).correct.tolist() == [
        True,
        False,
        True,
        True,
    ]
    assert EVALUATE._cache_size() == 1


@pytest.mark.parametrize("remat", ["none", "block", "dots"])
def test_the_last_layer_asks_for_the_supervised_positions_alone(remat, monkeypatch):
    """The same loss and gradients, dropout included, as with queries and MLP of every token."""
    config = case.config(train_full=("newline",), remat=remat)
    batch = case.stacked(case.batch(length=32, num_targets=6), 2)

    def computed():
        def compute(trainable):  # a function of its own each time: traces are kept by function
            return steps.gradients(GRAPHDEF, config, trainable, FROZEN, batch, 3)

        return jax.jit(compute)(TRAINABLE), str(jax.make_jaxpr(compute)(TRAINABLE))

    short, program = computed()
    monkeypatch.setattr(steps, "last_layer_is_short", lambda *_: False)
    whole, program_of_all = computed()
    close(short, whole, atol=2e-6)
    mlp = "f32[2,6,24]"  # rows of a micro-batch, targets, width
    assert mlp in program and mlp not in program_of_all


def test_the_last_layer_is_whole_where_that_is_cheaper():
    few, many = (case.batch(length=32, num_targets=number) for number in (8, 9))
    assert steps.last_layer_is_short(few, TRAINABLE) and not steps.last_layer_is_short(many, TRAINABLE)
    adapters, in_full = ({f"language_model.layers.mlp.up_proj.{x}"} for x in ("lora_A", "weight"))
    assert steps.last_layer_is_short(few, adapters) and not steps.last_layer_is_short(few, in_full)


def test_rows_of_weight_zero_do_not_count():
    one = case.batch()
    weights = one["weights"] * np.array([[1], [1], [0], [0]], np.float32)
    other = case.batch(seed=1)
    swapped = jax.tree.map(lambda x, y: np.concatenate([x[:2], y[2:]]), one, other)
    a = after_step(case.stacked(one | {"weights": weights}))
    b = after_step(case.stacked(swapped | {"weights": weights}))
    close((a[2]["loss"], a[1].adam.mu), (b[2]["loss"], b[1].adam.mu))


def test_only_trainables_move_and_inputs_are_donated():
    before = states.checksum(FROZEN)
    assert "image_newline" in TRAINABLE and "image_newline" not in FROZEN
    assert {leaf.dtype for leaf in TRAINABLE.values()} == {jnp.dtype("float32")}
    trainable, opt_state = donated = fresh()
    for index in range(3):
        trainable, opt_state, metrics = STEP(
            trainable, opt_state, FROZEN, case.stacked(case.batch(seed=index)), index
        )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
    states.check_frozen(FROZEN, before, "after 3 steps")
    assert not [name for name, value in trainable.items() if np.array_equal(value, TRAINABLE[name])]
    assert metrics["targets"] == case.batch(seed=2)["weights"].sum()
    assert metrics["tokens"] == case.batch(seed=2)["inputs"].lengths.sum()
    assert {"loss", "grad_norm", "lr/tower", "lr/projector", "lr/other"} <= set(metrics)


def test_the_step_number_is_not_a_constant_of_the_program():
    for index in (3, 4):
        after_step(case.stacked(case.batch()), index)
    assert STEP._cache_size() <= 2  # one and two micro-batches


def test_dropout_depends_on_step_and_sample_only():
    one = case.batch()

    def loss(batch, index):
        return float(after_step(case.stacked(batch), index)[2]["loss"])

    base = loss(one, 1)
    assert loss(one, 1) == base
    assert abs(loss(one, 2) - base) > 1e-5
    order = np.array([2, 0, 3, 1])
    assert abs(loss(jax.tree.map(lambda x: x[order], one), 1) - base) < 1e-6
    renumbered = one | {"inputs": one["inputs"]._replace(sample_index=one["inputs"].sample_index + 7)}
    assert abs(loss(renumbered, 1) - base) > 1e-5


def test_a_non_finite_step_changes_nothing():
    good = case.stacked(case.batch())
    bad = good | {"weights": good["weights"].at[0, 0, 0].set(jnp.nan)}
    trainable, opt_state, _ = after_step(good)
    kept = copied((trainable, opt_state.adam))
    trainable, opt_state, metrics = STEP(trainable, opt_state, FROZEN, bad, 2)
    assert not np.isfinite(metrics["loss"]) and metrics["skipped"] == 1
    equal((trainable, opt_state.adam), kept)


# ---- frozen checksums ----


def test_split_and_merge_keep_every_array():
    graphdef, trainable, frozen = states.split(case.model())
    assert all("lora_" in name for name in trainable) and not any("lora_" in name for name in frozen)
    again = states.split(states.merge(graphdef, trainable, frozen))
    equal((trainable, frozen), again[1:])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_frozen_leaf_that_changes_is_named(dtype):
    _, _, frozen = states.split(case.model())
    frozen = {name: leaf.astype(dtype) for name, leaf in frozen.items()}
    before = states.checksum(frozen)
    states.check_frozen(frozen, before, "at once")
    name = "vision_tower.layers.mlp.fc2.weight"
    leaf = np.array(frozen[name])
    bits = leaf.view({2: np.uint16, 4: np.uint32}[leaf.dtype.itemsize])
    bits[1, 3, 5] ^= 1  # the lowest bit of one value
    with pytest.raises(states.FrozenWeightsChanged, match=f"step 7: frozen weights changed: {name};"):
        states.check_frozen(frozen | {name: jnp.asarray(leaf)}, before, "step 7")
    swapped = frozen[name].at[0, 0].set(frozen[name][0, 1]).at[0, 1].set(frozen[name][0, 0])
    with pytest.raises(states.FrozenWeightsChanged, match=name):
        states.check_frozen(frozen | {name: swapped}, before, "swapped")


def test_a_frozen_leaf_that_trains_is_seen():
    """The mistake the checksum exists for: a weight meant to be frozen is handed to the optimizer."""
    leaked = "multi_modal_projector.linear_2.weight"
    before = states.checksum(FROZEN)
    trainable = {leaked: FROZEN[leaked]}
    grads = {leaked: jnp.ones_like(FROZEN[leaked])}
    moved, *_ = OPTIMIZER.update(grads, OPTIMIZER.init(trainable), trainable, jnp.float32(1), 1)
    with pytest.raises(states.FrozenWeightsChanged, match=f"at the end: .* changed: {leaked};"):
        states.check_frozen(FROZEN | moved, before, "at the end")
