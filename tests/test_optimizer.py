"""AdamW per group against torch's rules, the schedule against HF's numbers, and the guards."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrstraj_jax.config import OptimConfig
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training.optimizer import Optimizer, check_groups, group_of

CONFIG = OptimConfig(tower_lr=2e-2, projector_lr=5e-2, other_lr=1e-2, warmup_ratio=0.0, schedule="constant")
NAMES = {
    "vision_tower.layers.mlp.fc1.lora_A": "tower",
    "multi_modal_projector.linear_1.weight": "projector",
    "multi_modal_projector.linear_1.bias": "projector",
    "image_newline": "other",
    "language_model.layers.input_layernorm.weight": "other",
}


def tree(seed: int, scale: float = 1.0):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * random.normal(size=(3, 4)), jnp.float32) for name in NAMES}


def run(config: OptimConfig, gradients: list, total: int = 10):
    """Plain NumPy AdamW in float64 beside ours."""
    optimizer = Optimizer(config, total)
    ours, state = tree(0), optimizer.init(tree(0))
    theirs = {name: np.asarray(value, np.float64) for name, value in ours.items()}
    m = {name: np.zeros((3, 4)) for name in NAMES}
    v = {name: np.zeros((3, 4)) for name in NAMES}
    lr = {"tower": config.tower_lr, "projector": config.projector_lr, "other": config.other_lr}
    for step, grads in enumerate(gradients):
        ours, state, metrics = optimizer.update(grads, state, ours, jnp.float32(1), step)
        norm = np.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in grads.values()))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
        scale = min(1.0, config.clip_norm / (norm + 1e-6)) if config.clip_norm else 1.0
        for name, grad in grads.items():
            grad = np.asarray(grad, np.float64) * scale
            m[name] = config.b1 * m[name] + (1 - config.b1) * grad
            v[name] = config.b2 * v[name] + (1 - config.b2) * grad**2
            m_hat, v_hat = m[name] / (1 - config.b1 ** (step + 1)), v[name] / (1 - config.b2 ** (step + 1))
            rate = lr[group_of(name)]
            decay = config.weight_decay if name in list(NAMES)[:2] + ["image_newline"] else 0.0
            theirs[name] = theirs[name] * (1 - rate * decay) - rate * m_hat / (np.sqrt(v_hat) + config.eps)
    for name in NAMES:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_adamw_with_group_rates(clip, decay):
    config = dataclasses.replace(CONFIG, clip_norm=clip, weight_decay=decay)
    run(config, [tree(seed, 10.0 ** (seed - 3)) for seed in range(1, 5)])


def test_clipping_is_over_all_groups_together():
    """Adam hides a common scale, so look at the moments themselves."""
    optimizer = Optimizer(dataclasses.replace(CONFIG, clip_norm=1.0), 10)
    grads = tree(1)
    _, state, metrics = optimizer.update(grads, optimizer.init(grads), tree(0), jnp.float32(1), 0)
    first_moments = state.adam.mu
    norm = np.sqrt(sum(float((value**2).sum()) for value in first_moments.values()))
    np.testing.assert_allclose(norm, 0.1, rtol=1e-5)
    for name in NAMES:
        np.testing.assert_allclose(first_moments[name] * metrics["grad_norm"] * 10, grads[name], rtol=1e-4)


def test_schedule_equals_the_hf_trainer(golden_schedule):
    for total, expected in golden_schedule.items():
        optimizer = Optimizer(OptimConfig(), int(total))
        assert optimizer.warmup == expected["warmup_steps"]
        ours = jax.vmap(optimizer.multiplier)(jnp.arange(int(total)))
        np.testing.assert_allclose(ours, expected["multiplier_used_at_step"], atol=1e-6)


@pytest.fixture
def golden_schedule(request):
    return json.loads((request.path.parent / "golden" / "lr_schedule.json").read_text())


def test_rates_per_group_share_the_schedule():
    optimizer = Optimizer(OptimConfig(), 100)
    rates = optimizer.learning_rates(50)
    np.testing.assert_allclose(rates["projector"] / rates["tower"], 25, rtol=1e-6)
    np.testing.assert_allclose(rates["other"] / rates["tower"], 5, rtol=1e-6)
    *_, metrics = optimizer.update(*_one_group(optimizer), jnp.float32(0), 50)
    assert {name for name in metrics if name.startswith("lr/")} == {"lr/tower"}


def _one_group(optimizer):
    held = {"vision_tower.x": jnp.ones(3)}
    return held, optimizer.init(held), held


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_nothing_moves_on_a_non_finite_step(poison):
    optimizer = Optimizer(CONFIG, 10)
    params, grads = tree(0), tree(1)
    params, state, _ = optimizer.update(grads, optimizer.init(params), params, jnp.float32(1), 0)
    bad = (
        grads | {"image_newline": grads["image_newline"].at[0, 0].set(jnp.nan)}
        if poison == "gradient"
        else grads
    )
    loss = jnp.float32(jnp.inf if poison == "loss" else 1)
    after, state_after, metrics = optimizer.update(bad, state, params, loss, 1)
    jax.tree.map(np.testing.assert_array_equal, (after, state_after.adam), (params, state.adam))
    assert metrics["skipped"] == 1
    *_, metrics = optimizer.update(bad, state_after, after, loss, 2)
    assert metrics["skipped"] == 2
    *_, metrics = optimizer.update(grads, state_after, after, jnp.float32(1), 2)
    assert metrics["skipped"] == 0


def test_a_spike_is_clipped_or_by_policy_dropped_and_counted():
    params, grads = tree(0), tree(1, scale=1e6)
    for skip_norm, skipped in ((0.0, 0), (1e3, 1)):
        optimizer = Optimizer(dataclasses.replace(CONFIG, clip_norm=1.0, skip_norm=skip_norm), 10)
        after, state, metrics = optimizer.update(grads, optimizer.init(params), params, jnp.float32(1), 5)
        assert metrics["skipped"] == skipped and metrics["grad_norm"] > 1e5
        assert skipped == all(np.array_equal(after[name], params[name]) for name in params)
        total = sum(float((value.astype(jnp.float32) ** 2).sum()) for value in state.adam.mu.values())
        assert total**0.5 <= 0.1 * 1.0001  # (1 - b1) x a gradient of norm 1, or nothing
        *_, metrics = optimizer.update(tree(2), state, after, jnp.float32(1), 6)
        assert metrics["skipped"] == 0


def test_an_empty_group_that_was_overridden_is_named():
    check_groups({"vision_tower.x", "multi_modal_projector.x"}, {"optim.tower_lr", "steps"})
    with pytest.raises(UserError, match="optim.other_lr.*'other' has no trainable"):
        check_groups({"vision_tower.x", "multi_modal_projector.x"}, {"optim.other_lr"})
    with pytest.raises(UserError, match="nothing to train"):
        check_groups(set(), set())


def test_an_unknown_schedule_is_named():
    with pytest.raises(UserError, match="optim.schedule 'cosinus': expected one of cosine"):
        dataclasses.replace(CONFIG, schedule="cosinus")


def test_moments_are_float32():
    state = Optimizer(CONFIG, 10).init(tree(0))
    assert {leaf.dtype for leaf in jax.tree.leaves((state.adam.mu, state.adam.nu))} == {jnp.dtype("float32")}
