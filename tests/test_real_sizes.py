"""The real 0.5B and 7B: counted and traced without memory; the 0.5B is also run (slow)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmrstraj_jax.config import MODEL_PRESETS, Config, LoRAConfig
from mmrstraj_jax.data import anyres
from mmrstraj_jax.models.layers import LoRAParam, Trainable
from mmrstraj_jax.models.lora import add_lora
from mmrstraj_jax.models.mmrstraj import Inputs, init_model
from mmrstraj_jax.training import state
from mmrstraj_jax.training.optimizer import Optimizer
from mmrstraj_jax.training.step import build_step

POST_LAYERNORM = 2 * 1152  # in the files, used by nothing, not held
# Counted from the public files (golden/weight_names.json)
TOWER = 397_747_744 - POST_LAYERNORM
PROJECTOR = {"0.5b": 1_836_800, "7b": 16_980_992}
NEWLINE = {"0.5b": 896, "7b": 3_584}
TEXT = {"0.5b": 494_032_768, "7b": 7_615_616_512}
LORA = {"0.5b": 4_217_344, "7b": 4_281_856}
SIZES = ("0.5b", "7b")


def build(size: str):
    model = init_model(MODEL_PRESETS[size], jax.random.key(0), jnp.bfloat16)
    add_lora(model, LoRAConfig(), jax.random.key(1))
    return model


def abstract(size: str):
    return nnx.eval_shape(lambda: build(size))


def count(module, *filters) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, *filters)))


def frozen(path, value) -> bool:
    return not isinstance(value, Trainable)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    model = abstract(size)
    assert count(model.vision_tower, frozen) == TOWER
    assert count(model.multi_modal_projector, frozen) == PROJECTOR[size]
    assert math.prod(model.image_newline.shape) == NEWLINE[size]
    assert count(model.language_model) == TEXT[size]
    assert count(model, LoRAParam) == count(model, Trainable) == LORA[size]
    assert count(model.vision_tower, LoRAParam) == 4_186_624


def test_layer_counts():
    """Per layer, so that a wrong depth cannot hide a wrong width."""
    assert count(abstract("0.5b").vision_tower.layers, frozen) == 26 * 15_239_504
    assert count(abstract("0.5b").language_model.layers) == 24 * 14_912_384
    assert count(abstract("7b").language_model.layers) == 28 * 233_057_792


@pytest.mark.parametrize("size, added", [("0.5b", 152_000), ("7b", 152_128)])
def test_total_of_the_llava_hf_files(size, added):
    """With their padded vocabulary, and the head stored on its own even where it is tied."""
    config = MODEL_PRESETS[size]
    text = dataclasses.replace(config.text, vocab_size=added)
    model = nnx.eval_shape(
        lambda: init_model(dataclasses.replace(config, text=text), jax.random.key(0), jnp.bfloat16)
    )
    expected = {"0.5b": 893_675_552, "7b": 8_030_807_584}[size]
    assert count(model) + POST_LAYERNORM == expected


def step_arguments(size: str, width: int, height: int, policy: str, positions: int = 160):
    """Everything build_step's program takes, as shapes: one row of one image."""
    config = Config(model=size, batch_size=1, micro_batch_size=1)
    graphdef = nnx.split(abstract(size), Trainable, ...)[0]
    trainable, frozen_tree = jax.eval_shape(lambda: state.split(build(size))[1:])
    optimizer = Optimizer(config.optim, 100)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    plan = anyres.plan(width, height, policy)
    length, canvas = -(-(plan.num_tokens + 200) // 128) * 128, plan.canvas_side

    def shape(dtype, *axes):
        return jax.ShapeDtypeStruct((1, 1, *axes), dtype)

    int32, float32 = jnp.int32, jnp.float32
    inputs = Inputs(
        input_ids=shape(int32, length),
        views=shape(jnp.uint8, plan.num_views, 384, 384, 3),
        visual_index=shape(int32, length),
        lengths=shape(int32),
        view_scale=shape(float32, plan.num_views) if plan.view_scale else None,
        canvas_index=shape(int32, canvas, canvas) if canvas else None,
        canvas_scale=shape(float32, 2) if canvas else None,
        sample_index=shape(int32),
    )
    batch = {
        "inputs": inputs,
        "positions": shape(int32, positions),
        "targets": shape(int32, positions),
        "weights": shape(float32, positions),
        "answer": shape(bool, positions),
    }
    step = build_step(graphdef, optimizer, config)
    return step, (trainable, opt_state, frozen_tree, batch, jax.ShapeDtypeStruct((), int32))


@pytest.mark.parametrize(
    "size, image, policy",
    [("0.5b", (512, 512), "tau"), ("7b", (512, 512), "tau"), ("7b", (2304, 2304), "anyres_max_9")],
)
def test_train_step_traces_without_memory(size, image, policy):
    """Loss, gradients, clipping and AdamW of a whole step; the trainables come back, in float32, alone."""
    step, arguments = step_arguments(size, *image, policy)
    leaves = jax.tree.leaves(arguments)
    assert all(not isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves)
    trainable, opt_state, metrics = jax.eval_shape(step, *arguments)
    assert sum(math.prod(leaf.shape) for leaf in trainable.values()) == LORA[size]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((trainable, opt_state.adam.mu)))
    assert jax.tree.map(jnp.shape, trainable) == jax.tree.map(jnp.shape, arguments[0])
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32


def test_no_array_of_a_step_is_as_large_as_the_full_logits():
    """The [L, V] logits of a row (1.3 GB in float32 for 0.5B) exist neither forward nor backward."""
    step, arguments = step_arguments("0.5b", 512, 512, "tau")
    length, vocabulary = arguments[3]["inputs"].input_ids.shape[-1], 151_936

    def largest(jaxpr):
        for equation in jaxpr.eqns:
            yield from (math.prod(v.aval.shape) for v in equation.outvars if vocabulary in v.aval.shape)
            for value in equation.params.values():
                for inner in value if isinstance(value, (tuple, list)) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from largest(inner)

    with_vocabulary = list(largest(jax.make_jaxpr(step)(*arguments).jaxpr))
    assert with_vocabulary and max(with_vocabulary) < length * vocabulary / 4


@pytest.mark.slow
def test_half_billion_model_trains_a_step_and_generates():
    """Real sizes, random weights: one 384 px image, one optimizer step, four greedy tokens. About 8 GB."""
    from PIL import Image

    import mmrstraj_jax.api
    from mmrstraj_jax.config import AnyResConfig
    from mmrstraj_jax.data.chat import IGNORE
    from mmrstraj_jax.data.collate import Example, batch
    from mmrstraj_jax.data.images import views

    model_config = dataclasses.replace(MODEL_PRESETS["0.5b"], image_token_id=151_665, pad_token_id=151_643)
    model = init_model(model_config, jax.random.key(0), jnp.bfloat16)
    add_lora(model, LoRAConfig(), jax.random.key(1))
    policy, random = AnyResConfig(), np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (384, 384, 3), dtype=np.uint8))
    plan = anyres.plan(384, 384, policy)
    assert (plan.num_views, plan.num_tokens) == (2, 1485)
    ids = np.concatenate([np.zeros(plan.num_tokens, np.int32), random.integers(0, 151_643, 51)])
    labels = np.where(np.arange(len(ids)) >= len(ids) - 16, ids, IGNORE)
    row = Example("row", ids, views(image, plan, 384), (plan,), (0,), labels, labels != IGNORE)
    micro = batch([row], row.shape, 151_643, 384)

    config = Config(model="0.5b", batch_size=1, micro_batch_size=1)
    graphdef, trainable, frozen_tree = state.split(model)
    before = jax.tree.map(np.asarray, trainable)
    # One step of warm-up has learning rate 0: start behind it.
    optim = dataclasses.replace(config.optim, warmup_ratio=0.0, schedule="constant")
    optimizer = Optimizer(optim, 100)
    step = build_step(graphdef, optimizer, config)
    stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], micro)
    trainable, _, metrics = step(trainable, optimizer.init(trainable), frozen_tree, stacked, 0)
    assert np.isfinite(metrics["loss"]) and metrics["loss"] > 5 and metrics["grad_norm"] > 0
    # B starts at zero, so only B has a gradient in the first step; every layer of every B moves.
    for path, leaf in trainable.items():
        moved = np.abs(np.asarray(leaf) - before[path]).reshape(26 if "layers" in path else 1, -1).max(axis=1)
        assert (moved > 0).all() == path.endswith("lora_B"), path

    trained = mmrstraj_jax.api.Model(state.merge(graphdef, trainable, frozen_tree), model_config, policy)
    answer = trained.generate([1, 151_665, 2, 3], images=[image], max_new_tokens=4)
    assert len(answer) == 4 and all(0 <= token < 151_936 for token in answer)
