import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_samples import CONFIG, FEW_TARGETS, TAU, hidden_states, inputs, mixed_rows, model, with_lora

from mmrstraj_jax.config import LoRAConfig
from mmrstraj_jax.data import anyres
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models import layers
from mmrstraj_jax.models.layers import Linear, dropout
from mmrstraj_jax.models.lora import add_lora, merge_lora, train_in_full

ALL = {"language_model": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}


@pytest.fixture(scope="module")
def batch():
    return inputs(mixed_rows()[1:4])


def test_zero_b_equals_the_base_bit_for_bit(batch):
    base = hidden_states(model(), batch)
    adapted = with_lora(model(), random_b=False, **ALL)
    np.testing.assert_array_equal(hidden_states(adapted, batch), base)


def test_merged_equals_unmerged(batch):
    built = with_lora(model(), **ALL)
    unmerged = hidden_states(built, batch)
    assert np.abs(unmerged - hidden_states(model(), batch)).max() > 0.1  # the adapters do something
    merge_lora(built)
    assert not any("lora" in str(path) for path, _ in nnx.to_flat_state(nnx.state(built)))
    np.testing.assert_allclose(hidden_states(built, batch), unmerged, atol=1e-5)


def test_formula_of_a_linear():
    """y = W x + b + (alpha / r) B A x, alpha / r = 2 in the paper's setting."""
    linear = Linear(6, 5, rngs=nnx.Rngs(0))
    holder = nnx.Module()
    holder.vision_tower, holder.language_model = nnx.Module(), nnx.Module()
    holder.multi_modal_projector = nnx.Module()
    holder.multi_modal_projector.linear_1 = linear
    add_lora(holder, LoRAConfig(vision_tower=(), projector=("linear_1",)), jax.random.key(0))
    random = np.random.default_rng(0)
    linear.lora_B[...] = jnp.asarray(random.standard_normal((5, 8)), jnp.float32)
    linear.bias[...] = jnp.asarray(random.standard_normal(5), jnp.float32)
    x = random.standard_normal((2, 3, 6)).astype(np.float32)
    low = x @ np.asarray(linear.lora_A[...]).T
    expected = x @ np.asarray(linear.weight[...]).T + np.asarray(linear.bias[...])
    expected = expected + 2 * low @ np.asarray(linear.lora_B[...]).T
    np.testing.assert_allclose(linear(x), expected, atol=1e-5)

    graphdef, adapter, rest = nnx.split(linear, layers.LoRAParam, ...)

    def squares(adapter, x):
        return jnp.square(nnx.merge(graphdef, adapter, rest)(x)).sum() / 2

    of_adapter, of_x = jax.grad(squares, (0, 1))(adapter, jnp.asarray(x))
    gradients = of_adapter["lora_A"][...], of_adapter["lora_B"][...], of_x
    a, b = np.asarray(linear.lora_A[...]), np.asarray(linear.lora_B[...])
    rows, back, low = x.reshape(-1, 6), expected.reshape(-1, 5), low.reshape(-1, 8)
    by_hand = 2 * (back @ b).T @ rows, 2 * back.T @ low, back @ (linear.weight[...] + 2 * b @ a)
    for gradient, other in zip(gradients, by_hand, strict=True):
        np.testing.assert_allclose(gradient.reshape(other.shape), other, rtol=1e-4, atol=1e-4)


def test_remat_dots_keeps_nothing_wide_of_an_adapter():
    """Of each linear its product [N, out]; of its adapter only A's, [N, r]."""
    rows, width, rank = 64, 32, 4
    x = jnp.ones((rows, width))

    def kept(adapted: bool) -> int:
        first, second = (Linear(width, width, use_bias=False, rngs=nnx.Rngs(seed)) for seed in (0, 1))
        for linear in (first, second) if adapted else ():
            linear.lora_A = layers.LoRAParam(jnp.ones((rank, width)))
            linear.lora_B = layers.LoRAParam(jnp.ones((width, rank)))
        graphdef, params = nnx.split((first, second))

        def block(params, x):
            one, two = nnx.merge(graphdef, params)
            return two(jax.nn.gelu(one(x)))

        back = jax.vjp(layers.rematerialised(block, "dots"), params, x)[1]
        inputs = sum(leaf.size for leaf in jax.tree.leaves((params, x)))
        return sum(leaf.size for leaf in jax.tree.leaves(back)) - inputs

    assert kept(False) == rows * width  # the first product; nothing asks for the second again
    assert kept(True) == kept(False) + 2 * rows * rank


def test_initial_adapters():
    """A is kaiming-uniform(a = sqrt 5), bound 1 / sqrt(in), its own in every linear and layer; B is zero."""
    built = with_lora(model(dtype=jnp.bfloat16), random_b=False)
    attention, mlp = built.vision_tower.layers.self_attn, built.vision_tower.layers.mlp
    for linear in (attention.q_proj, attention.v_proj, mlp.fc1, mlp.fc2):
        a = np.asarray(linear.lora_A[...])
        bound = linear.weight.shape[-1] ** -0.5
        assert a.dtype == np.float32 and np.abs(a).max() <= bound
        np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.1)
        assert not np.any(np.asarray(linear.lora_B[...]))
        assert len({layer.tobytes() for layer in a}) == len(a)
    assert not np.array_equal(attention.q_proj.lora_A[...], attention.v_proj.lora_A[...])
    again, other = (with_lora(model(), seed=seed, random_b=False) for seed in (1, 2))
    np.testing.assert_array_equal(
        again.vision_tower.layers.mlp.fc1.lora_A[...], built.vision_tower.layers.mlp.fc1.lora_A[...]
    )
    assert not np.array_equal(other.vision_tower.layers.mlp.fc1.lora_A[...], mlp.fc1.lora_A[...])


def test_wrong_names_are_refused():
    with pytest.raises(UserError, match="lora.vision_tower 'o_proj'"):
        LoRAConfig(vision_tower=("o_proj",))
    built = model()
    del built.vision_tower.layers.mlp.fc2
    with pytest.raises(UserError, match="fc2.*no such linear"):
        add_lora(built, LoRAConfig(), jax.random.key(0))
    with pytest.raises(UserError, match="train_full 'tower'"):
        train_in_full(built, ("tower",))


# ---- dropout ----


def test_dropout_rate_and_scale():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 200, 250))
    out = np.asarray(dropout(x, 0.05, keys))
    kept = out != 0
    # 200,000 draws: one standard deviation is 0.0005
    assert abs(1 - kept.mean() - 0.05) < 0.002
    np.testing.assert_allclose(out[kept], 1 / 0.95, rtol=1e-6)
    assert not np.array_equal(kept[0], kept[1])


def test_dropout_mask_depends_on_the_rows_key_only():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(jax.random.key(1), (4, 6, 8))
    together = dropout(x, 0.5, keys)
    for row in range(4):
        np.testing.assert_array_equal(dropout(x[row : row + 1], 0.5, keys[row : row + 1])[0], together[row])
    np.testing.assert_array_equal(dropout(2 * x, 0.5, keys) != 0, together != 0)


@pytest.fixture(scope="module")
def dropping():
    return with_lora(model(), dropout=0.3, **FEW_TARGETS)


def test_dropout_ignores_how_the_batch_is_split(dropping):
    """The mask follows (key, sample, view, layer, linear), not the row, the padding or the batch size."""
    rows, key = mixed_rows()[1:4], jax.random.key(3)
    together = hidden_states(dropping, inputs(rows), key)
    for number, row in enumerate(rows):
        alone = inputs([row], first=number, length=128, num_views=7, canvas=(9, 9))
        length = int(alone.lengths[0])
        found = hidden_states(dropping, alone, key)[0, :length]
        np.testing.assert_allclose(found, together[number, :length], atol=2e-5)


def test_dropout_differs_between_steps_and_samples_and_is_off_without_a_key(dropping):
    batch = inputs([[anyres.plan(50, 50, TAU)]])
    base = hidden_states(dropping, batch)
    first, again, other = (hidden_states(dropping, batch, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - base).max() > 1e-3 and np.abs(first - other).max() > 1e-3
    moved = batch._replace(sample_index=batch.sample_index + 1)
    assert np.abs(hidden_states(dropping, moved, jax.random.key(0)) - first).max() > 1e-3


def test_every_layer_and_linear_draws_its_own_mask(monkeypatch):
    """Records the keys that reach `dropout`: all different over views, layers and linears."""
    seen = []

    def record(x, rate, keys):
        jax.debug.callback(lambda data: seen.append(np.asarray(data)), jax.random.key_data(keys))
        return x

    monkeypatch.setattr(layers, "dropout", record)
    built = with_lora(model(), dropout=0.3, **ALL)
    batch = inputs([[anyres.plan(50, 50, TAU)], []])
    # its own jit: a program with `record` in it must not stay in the cache of the other tests
    jax.jit(lambda key: built.hidden_states(batch, key))(jax.random.key(0)).block_until_ready()
    jax.effects_barrier()
    draws = np.concatenate([np.atleast_2d(keys) for keys in seen])
    views, tower, text = batch.views.shape[0] * batch.views.shape[1], 3 * 6, 3 * 7
    assert CONFIG.vision.num_layers_run == CONFIG.text.num_hidden_layers == 3
    assert len(draws) == views * (tower + 2) + 2 * text
    assert len({keys.tobytes() for keys in draws}) == len(draws)


def test_dropout_is_the_same_unrolled(dropping):
    """(And under remat: test_models.)"""
    batch, key = inputs([[anyres.plan(50, 50, TAU)]]), jax.random.key(0)
    expected = hidden_states(dropping, batch, key)
    np.testing.assert_allclose(hidden_states(dropping, batch, key, unroll=True), expected, atol=2e-5)
