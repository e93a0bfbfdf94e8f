"""Tiny models and micro-batches for the model tests: random weights, random views, plans of `data.anyres`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmrstraj_jax.config import AnyResConfig, LoRAConfig, ModelConfig, TextConfig, VisionConfig
from mmrstraj_jax.data import anyres
from mmrstraj_jax.models.lora import add_lora
from mmrstraj_jax.models.mmrstraj import Inputs, MMRSTraj, init_model

VISION = VisionConfig(32, 48, 2, 56, 14, 1e-6, (3,))  # 4 x 4 patches a view
TEXT = TextConfig(48, 64, 3, 4, 2, 16, 96, 1e6, 1e-6, True, 512)  # head_dim is not hidden / heads
CONFIG = ModelConfig(VISION, TEXT)
TAU = AnyResConfig().for_views(56, 14)  # 43.9 tokens an image
MAX_9 = AnyResConfig(policy="anyres_max_9").for_views(56, 14)
MAX_2 = AnyResConfig(policy="anyres_max_2").for_views(56, 14)  # resizes the map of four views
# Adapters in both transformers and the projector; a dropout mask each, and masks take long to compile.
FEW_TARGETS = {
    "vision_tower": ("q_proj",),
    "projector": ("linear_1",),
    "language_model": ("down_proj",),
}


def model(config: ModelConfig = CONFIG, dtype=jnp.float32, seed: int = 0) -> MMRSTraj:
    """Random weights from NumPy; norms and biases too, so that no term hides behind its initial 0 or 1."""
    built = nnx.eval_shape(lambda: init_model(config, jax.random.key(0), dtype))
    graphdef, state = nnx.split(built)
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        value = random.standard_normal(leaf.shape)
        names = ["", *(str(key.key) for key in path if hasattr(key, "key"))]
        module, name = names[-2:]
        if "norm" in module or name == "bias":
            value = 0.1 * value + (name == "weight")
        elif module == "patch_embedding":
            value = value * np.prod(leaf.shape[1:]) ** -0.5
        elif module != "position_embedding":
            value = value * leaf.shape[-1] ** -0.5
        return jnp.asarray(value, leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map_with_path(draw, state))


def with_lora(built: MMRSTraj, *, seed: int = 1, random_b: bool = True, **config) -> MMRSTraj:
    add_lora(built, LoRAConfig(**{"dropout": 0.0, **config}), jax.random.key(seed))
    if random_b:
        random = np.random.default_rng(seed)
        for _, module in nnx.iter_modules(built):
            if getattr(module, "lora_B", None) is not None:
                module.lora_B[...] = jnp.asarray(
                    0.1 * random.standard_normal(module.lora_B.shape), jnp.float32
                )
    return built


@functools.partial(jax.jit, static_argnames=("graphdef", "remat", "unroll"))
def _hidden_states(graphdef, state, batch, key, remat, unroll):
    return nnx.merge(graphdef, state).hidden_states(batch, key, remat=remat, unroll=unroll)


def hidden_states(built: MMRSTraj, batch: Inputs, key=None, *, remat: str = "none", unroll: bool = False):
    """MMRSTraj.hidden_states, compiled once per structure and shape for all tests."""
    return _hidden_states(*nnx.split(built), batch, key, remat, unroll)


def text_config(**changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, **changes))


def vision_config(**changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, vision=dataclasses.replace(VISION, **changes))


def inputs(
    rows: list[list[anyres.Plan]],
    *,
    config: ModelConfig = CONFIG,
    text: int = 6,
    length: int | None = None,
    num_views: int | None = None,
    canvas: tuple[int, int] | None = None,
    reduced: bool = True,
    first: int = 0,
) -> Inputs:
    """A micro-batch whose row r has the given visuals between `text` + r random ids on either side.

    A row's content depends on its number alone (first + r), never on the padding asked for.
    """
    size = config.vision.image_size
    used = [max(sum(plan.num_views for plan in row), 1) for row in rows]
    resized = [plan for row in rows for plan in row if plan.resize]
    num_views = num_views or max(used)
    if canvas is None:
        canvas = tuple(max((plan.resize[0][axis] for plan in resized), default=0) for axis in (0, 1))
    ids, index, views, scales, canvas_index, canvas_scale = [], [], [], [], [], []
    for number, row in enumerate(rows, start=first):
        random = np.random.default_rng(number)
        slots, row_scale, row_index, row_canvas, offset = [], [], [], (1.0, 1.0), 0
        slots.append(np.full(text + number, -1))
        row_index = np.zeros(canvas, np.int32)
        for plan in row:
            slots.append(plan.index(offset, num_views, canvas))
            row_scale += [plan.view_scale or 1.0] * plan.num_views
            if plan.resize:
                row_index = plan.canvas_index(offset, canvas)
                row_canvas = tuple(after / before for before, after in zip(*plan.resize, strict=True))
            offset += plan.num_views
        slots.append(np.full(text + number, -1))
        slots = np.concatenate(slots)
        index.append(slots)
        ids.append(np.where(slots < 0, random.integers(0, config.text.vocab_size, len(slots)), 0))
        views.append(random.integers(0, 256, (offset, size, size, 3), dtype=np.uint8))
        scales.append(row_scale)
        canvas_index.append(row_index)
        canvas_scale.append(row_canvas)
    lengths = [len(row) for row in ids]
    length = length or max(lengths)

    def pad(rows, to, value):
        return np.stack(
            [
                np.concatenate([np.asarray(row), np.full((to - len(row), *np.shape(row)[1:]), value)])
                for row in rows
            ]
        )

    has_canvas = canvas != (0, 0)
    return Inputs(
        input_ids=jnp.asarray(pad(ids, length, 0), jnp.int32),
        views=jnp.asarray(pad(views, num_views, 0), jnp.uint8),
        visual_index=jnp.asarray(pad(index, length, -1), jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        view_scale=jnp.asarray(pad(scales, num_views, 1.0), jnp.float32) if reduced else None,
        canvas_index=jnp.asarray(np.stack(canvas_index), jnp.int32) if has_canvas else None,
        canvas_scale=jnp.asarray(canvas_scale, jnp.float32) if has_canvas else None,
        sample_index=jnp.arange(first, first + len(rows), dtype=jnp.int32),
    )


def mixed_rows() -> list[list[anyres.Plan]]:
    """A text row, single images of both policies (one resized on a canvas), a multi-image row and a video."""
    return [
        [],
        [anyres.plan(100, 60, TAU)],
        [anyres.plan(112, 108, MAX_2)],
        [anyres.plan_multi_image(TAU), anyres.plan_multi_image(TAU)],
        [anyres.plan_video(3, TAU)],
        [anyres.plan(30, 200, MAX_9)],
    ]
