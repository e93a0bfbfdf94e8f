"""A frozen language model in 8 or 4 bits: what it computes, what it costs, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_case as case
from flax import nnx

from mmrstraj_jax.config import MODEL_PRESETS, Config, load_config
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.layers import Linear
from mmrstraj_jax.models.mmrstraj import init_model
from mmrstraj_jax.models.quantized import quantize_linears
from mmrstraj_jax.planning.program import abstract_model
from mmrstraj_jax.train import Launch, train
from mmrstraj_jax.training import run, state

pytest.importorskip("qwix")

STEP = {"int8": 1 / 127, "nf4": 0.304}  # largest distance of two neighbouring values, of a scale's block


def stack(num_in=128, num_out=48, dtype=jnp.float32):
    return Linear(num_in, num_out, rngs=nnx.Rngs(0), stack=(3,), dtype=dtype)


def by_layer(linear, x):
    graphdef, params = nnx.split(linear)
    return jax.lax.scan(lambda _, layer: (None, nnx.merge(graphdef, layer)(x)), None, params)[1]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_are_rounded_within_their_blocks(kind, dtype):
    linear = stack(dtype=dtype)
    before = np.asarray(linear.weight[...], np.float32)
    bias = linear.bias[...]
    quantize_linears(nnx.List([linear]), kind)
    # products with the identity read the weights back
    after = np.moveaxis(np.asarray(by_layer(linear, jnp.eye(128)) - bias[:, None]), 1, 2)
    blocks = before.reshape(3, 48, -1, 64 if kind == "nf4" else 128)
    error = np.abs(after.reshape(blocks.shape) - blocks)
    assert (error <= np.abs(blocks).max(-1, keepdims=True) * STEP[kind] * 0.51 + 1e-6).all()
    assert error.max() > 0


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_nothing_keeps_the_whole_weights(kind):
    """The backward pass makes each layer whole again: no residual is as large as a stack of weights."""
    linear = stack(256, 256)
    quantize_linears(nnx.List([linear]), kind)
    graphdef, params = nnx.split(linear)

    def loss(x, params):
        def body(x, layer):
            return jnp.tanh(nnx.merge(graphdef, layer)(x)), None

        return jax.lax.scan(body, x, params)[0].sum()

    x = jnp.ones((1, 256))
    compiled = jax.jit(jax.grad(loss)).lower(x, params).compile()
    one_layer = 4 * 256 * 256
    # as stored, with a copy that the loop may make of its slices, and the whole of the layer at hand
    assert compiled.memory_analysis().temp_size_in_bytes < 2.6 * one_layer
    np.testing.assert_allclose(
        jax.grad(loss)(x, params), jax.jit(jax.grad(loss))(x, params), rtol=1e-4, atol=1e-5
    )


def test_bytes_and_checksums_of_what_is_stored():
    model = init_model(MODEL_PRESETS["tiny"], jax.random.key(0))
    full = state.split(model)[2]
    sums, sizes = {}, {}
    for kind in ("int8", "nf4"):
        model = init_model(MODEL_PRESETS["tiny"], jax.random.key(0))
        quantize_linears(model.language_model.layers, kind)
        frozen = state.split(model)[2]
        name = "language_model.layers.mlp.up_proj.weight"
        sizes[kind] = state.num_bytes(frozen[name])
        sums[kind] = state.checksum(frozen)
        changed = frozen | {name: frozen[name].at[1, 2, 3].set(frozen[name][1, 2, 3] ^ 1)}
        assert state.checksum(changed)[name] != sums[kind][name]
        untouched = [
            n for n in full if ".layers." not in n or "vision_tower" in n or "norm" in n or "bias" in n
        ]
        assert all(frozen[n] is full[n] or (frozen[n] == full[n]).all() for n in untouched)
    assert state.num_bytes(full[name]) == 4 * sizes["int8"] == 8 * sizes["nf4"]


def test_a_run_trains_resumes_and_opens_in_full(tmp_path, monkeypatch):
    """Checksums of the frozen leaves hold over a resumption; whoever opens the run gets the full weights."""
    monkeypatch.setenv("MMRSTRAJ_CACHE", str(tmp_path / "cache"))
    found = case.world(tmp_path / "world")
    sizes = {"steps": 2, "save_every": 1, "eval_samples": 0, "length_multiple": 32, "max_length": 256}
    config = case.config(**found, run_dir=str(tmp_path / "run"), quantize_llm="int8", **sizes)
    folder = train(config)
    longer = train(dataclasses.replace(config, steps=3), launch=Launch(allow_config_change=True))
    assert longer == folder
    opened = run.open_run(folder)
    weight = opened.model.language_model.layers.mlp.up_proj.weight[...]
    plain = run.start(dataclasses.replace(config, quantize_llm="none")).model
    np.testing.assert_array_equal(weight, plain.language_model.layers.mlp.up_proj.weight[...])


def test_the_plan_counts_what_is_stored():
    sizes = {}
    for kind in ("none", "int8", "nf4"):
        config = dataclasses.replace(load_config("stage1", [], model="7b")[0], quantize_llm=kind)
        found = abstract_model(config, MODEL_PRESETS["7b"])
        sizes[kind] = sum(
            state.num_bytes(leaf)
            for name, leaf in found.frozen.items()
            if name.startswith("language_model.layers")
        )
    assert 0.50 < sizes["int8"] / sizes["none"] < 0.505
    assert 0.28 < sizes["nf4"] / sizes["none"] < 0.285  # half a byte, and a float32 for 64 of them


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(UserError, match="quantize_llm nf4: .*96 inputs, not a multiple of 64; use int8"):
        quantize_linears(nnx.List([stack(96)]), "nf4")
    with pytest.raises(UserError, match="quantize_llm int8: the language model is in train_full"):
        Config(quantize_llm="int8", train_full=("language_model",))
    with pytest.raises(UserError, match="quantize_llm 'int4': expected one of none, int8, nf4"):
        Config(quantize_llm="int4")
