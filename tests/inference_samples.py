"""A tiny model for the inference tests, filled by NumPy: nothing is compiled to make it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmrstraj_jax.config import AnyResConfig, ModelConfig, TextConfig, VisionConfig
from mmrstraj_jax.models.mmrstraj import MMRSTraj, init_model

VISION = VisionConfig(32, 48, 2, 56, 14, 1e-6, (2,))  # 4 x 4 patches a view
TEXT = TextConfig(48, 64, 2, 4, 2, 16, 96, 1e6, 1e-6, True, 512)
IMAGE, VIDEO = 90, 91
CONFIG = ModelConfig(VISION, TEXT, IMAGE, VIDEO, (), 0)
TAU = AnyResConfig().for_views(56, 14)  # 43.9 tokens an image


def random_model(config: ModelConfig = CONFIG, seed: int = 0) -> MMRSTraj:
    """float32; no weight is 0 or 1, so that no term hides."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: init_model(config, jax.random.key(0))))
    random = np.random.default_rng(seed)

    def fill(leaf):
        scale = leaf.shape[-1] ** -0.5 if len(leaf.shape) > 1 else 0.3
        return jnp.asarray(scale * random.standard_normal(leaf.shape), jnp.float32)

    return nnx.merge(graphdef, jax.tree.map(fill, state))


def with_text(**changes) -> ModelConfig:
    return dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, **changes))
