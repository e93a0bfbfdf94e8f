"""MM-RSTraj: views -> SigLIP -> projector -> Higher AnyRes -> merged with text -> Qwen2.5 (paper section 4).

Legend: B rows, V views a row, S view side in pixels, T patches a view, L tokens, H hidden, W vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, UInt8

from mmrstraj_jax.config import ModelConfig
from mmrstraj_jax.models.layers import normal
from mmrstraj_jax.models.projector import Projector
from mmrstraj_jax.models.qwen2 import KVCache, Qwen2
from mmrstraj_jax.models.siglip import SiglipVisionTower
from mmrstraj_jax.models.token_reduction import merge_with_text, visual_pool


class Inputs(NamedTuple):
    """One micro-batch; every shape is fixed by its bucket, everything integer was computed on the host.

    With `pool_row`, views and what describes them have fewer rows than the batch: rows about the same image
    share them.
    """

    input_ids: Int[Array, "B L"]  # any valid id at visual positions
    views: UInt8[Array, "B V S S 3"]  # raw pixels; zeros where a row has fewer views
    visual_index: Int[Array, "B L"]  # -1: text; else index into the row's visual pool
    lengths: Int[Array, " B"]  # valid tokens, padding on the right
    view_scale: Float[Array, "B V"] | None = None
    canvas_index: Int[Array, "B Y X"] | None = None
    canvas_scale: Float[Array, "B 2"] | None = None
    sample_index: Int[Array, " B"] | None = None  # global sample number, for the dropout key
    segment_ids: Int[Array, "B L"] | None = None  # packed rows: which sample a token belongs to, 0: padding
    positions: Int[Array, "B L"] | None = None  # packed rows: restarts from 0 in each segment
    pool_row: Int[Array, " B"] | None = None  # inference: which row of `views` each row reads; None: its own


class MMRSTraj(nnx.Module):
    """The whole model. Methods are pure functions of the module's arrays."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        vision, text = config.vision, config.text
        self.vision_tower = SiglipVisionTower(vision, rngs=rngs, dtype=dtype)
        self.multi_modal_projector = Projector(vision.output_size, text.hidden_size, rngs=rngs, dtype=dtype)
        newline = normal(rngs.params(), (text.hidden_size,), text.hidden_size**-0.5, dtype)
        self.image_newline = nnx.Param(newline)
        self.language_model = Qwen2(text, rngs=rngs, dtype=dtype)

    def encode_views(
        self, pixels: UInt8[Array, "N S S 3"], keys: Key[Array, " N"] | None = None, **how
    ) -> Float[Array, "N T F"]:
        """Tower features of single views; how: one_by_one, and remat, unroll, mesh of layers.scan_layers."""
        return self.vision_tower(pixels, keys, **how)

    def visual_pool(self, inputs: Inputs, key: Key[Array, ""] | None = None, **how) -> Float[Array, "B P H"]:
        """Projected, reduced view tokens of each row, canvas, newline (token_reduction.visual_pool)."""
        rows, views = inputs.views.shape[:2]
        pixels = inputs.views.reshape(rows * views, *inputs.views.shape[2:])
        keys = None
        if key is not None:
            keys = jax.vmap(
                lambda row: jax.vmap(lambda view: jax.random.fold_in(row, view))(jnp.arange(views))
            )(self._row_keys(inputs, key)).reshape(-1)
        features = self.multi_modal_projector(self.encode_views(pixels, keys, **how), keys)
        tokens = features.reshape(rows, views, *features.shape[1:])
        return visual_pool(
            tokens, self.image_newline[...], inputs.view_scale, inputs.canvas_index, inputs.canvas_scale
        )

    def embed(self, inputs: Inputs, key: Key[Array, ""] | None = None, **how) -> Float[Array, "B L H"]:
        """Text embeddings with every image slot filled from the row's visual pool."""
        text = self.language_model.embed(inputs.input_ids)
        pool = self.visual_pool(inputs, key, **how)
        if inputs.pool_row is not None:
            pool = pool[inputs.pool_row]
        return merge_with_text(text, pool, inputs.visual_index)

    def hidden_states(
        self,
        inputs: Inputs,
        key: Key[Array, ""] | None = None,
        *,
        at: Int[Array, "B Q"] | None = None,
        **how,
    ) -> Float[Array, "B Q H"]:
        """Normed hidden states of whole rows.

        Args:
            key: dropout key of the step; each row's own is fold_in(key, sample_index). None: no dropout.
            at: the tokens that are wanted; None: all, Q = L.
            how: remat, unroll, mesh of layers.scan_layers.
        """
        x = self.embed(inputs, key, **how)
        keys = None
        if key is not None:  # another stream than the tower's
            keys = jax.vmap(lambda row: jax.random.fold_in(row, 2**31 - 1))(self._row_keys(inputs, key))
        packed = {"segment_ids": inputs.segment_ids, "positions": inputs.positions}
        return self.language_model(x, keys, **packed, at=at, **how)

    def logits(self, hidden: Float[Array, "*N H"]) -> Float[Array, "*N W"]:
        """float32 logits of chosen hidden states."""
        return self.language_model.logits(hidden)

    def prefill(self, inputs: Inputs, cache: KVCache, **how) -> tuple[Float[Array, "B H"], KVCache]:
        """Reads a prompt into the cache; the hidden state after its last token. how: of encode_views."""
        return self.language_model.prefill(self.embed(inputs, **how), inputs.lengths, cache)

    def decode(self, tokens: Int[Array, " B"], cache: KVCache) -> tuple[Float[Array, "B H"], KVCache]:
        """One more token a row."""
        return self.language_model.decode(tokens, cache)

    def _row_keys(self, inputs: Inputs, key: Key[Array, ""]) -> Key[Array, " B"]:
        return jax.vmap(lambda index: jax.random.fold_in(key, index))(inputs.sample_index)


def init_model(config: ModelConfig, key: Key[Array, ""], dtype: jnp.dtype = jnp.float32) -> MMRSTraj:
    """A random model: linears N(0, 1/in), biases 0, norms 1. Under nnx.eval_shape it takes no memory."""
    return MMRSTraj(config, rngs=nnx.Rngs(params=key), dtype=dtype)
