"""Qwen2 / Qwen2.5 decoder (HF modeling_qwen2.py) with an explicit KV cache.

Legend: B rows, L tokens, S cache slots, N layers, H hidden, K KV heads, D head size.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key

from mmrstraj_jax.config import TextConfig
from mmrstraj_jax.models.attention import attention
from mmrstraj_jax.models.layers import Linear, RMSNorm, normal, rounded_once, scan_layers, times


class KVCache(NamedTuple):
    """Keys and values of every layer; row b holds lengths[b] valid tokens, from slot 0 on."""

    k: Float[Array, "N B S K D"]
    v: Float[Array, "N B S K D"]
    lengths: Int[Array, " B"]


def init_cache(config: TextConfig, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache; 2 x layers x KV heads x head size x itemsize bytes a token."""
    shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))


def rotary(
    positions: Int[Array, "B L"], head_dim: int, theta: float, dtype: jnp.dtype
) -> tuple[Float[Array, "B L 1 half"], Float[Array, "B L 1 half"]]:
    """cos and sin of RoPE; angles in float32, cast to the activation dtype."""
    inv_freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: Float[Array, "B L K D"], rope: tuple[Array, Array]) -> Float[Array, "B L K D"]:
    """Half-split rotation: element i is paired with element i + D/2."""
    cos, sin = rope
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def along_rows(x: Float[Array, "B L *D"], at: Int[Array, "B Q"]) -> Float[Array, "B Q *D"]:
    """The tokens `at` of each row."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1, mode="clip")


class Attention(nnx.Module):
    def __init__(self, config: TextConfig, **init):
        hidden, dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(hidden, config.num_attention_heads * dim, **init)
        self.k_proj = Linear(hidden, config.num_key_value_heads * dim, **init)
        self.v_proj = Linear(hidden, config.num_key_value_heads * dim, **init)
        self.o_proj = Linear(config.num_attention_heads * dim, hidden, use_bias=False, **init)
        self.head_dim = dim

    def project(
        self, x: Float[Array, "B L H"], rope: tuple[Array, Array], keys, at: Int[Array, "B Q"] | None = None
    ) -> tuple[Array, Array, Array]:
        """Rotated queries (of the tokens `at`, else of all) and keys, and values: [B, Q or L, heads, D]."""
        asking, q_rope = x, rope
        if at is not None:
            asking, q_rope = along_rows(x, at), tuple(along_rows(each, at) for each in rope)
        linears = ((self.q_proj, asking), (self.k_proj, x), (self.v_proj, x))
        q, k, v = (
            rearrange(proj(each, keys, tag), "b l (h d) -> b l h d", d=self.head_dim)
            for tag, (proj, each) in enumerate(linears)
        )
        return rotate(q, q_rope), rotate(k, rope), v

    def output(self, x: Float[Array, "B L heads D"], keys) -> Float[Array, "B L H"]:
        return self.o_proj(rearrange(x, "b l h d -> b l (h d)"), keys, 3)


class MLP(nnx.Module):
    def __init__(self, config: TextConfig, **init):
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, use_bias=False, **init)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, use_bias=False, **init)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, use_bias=False, **init)

    def __call__(self, x: Float[Array, "B L H"], keys) -> Float[Array, "B L H"]:
        return self.down_proj(gated(self.gate_proj(x, keys, 4), self.up_proj(x, keys, 5)), keys, 6)


def gated(gate: Float[Array, "*B I"], up: Float[Array, "*B I"]) -> Float[Array, "*B I"]:
    return rounded_once(lambda gate, up: jax.nn.silu(gate) * up, gate, up)


class DecoderLayer(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, stack: tuple[int, ...], dtype: jnp.dtype):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, stack=stack, dtype=dtype)
        self.self_attn = Attention(config, rngs=rngs, stack=stack, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, stack=stack, dtype=dtype
        )
        self.mlp = MLP(config, rngs=rngs, stack=stack, dtype=dtype)

    def __call__(self, x, attend, rope, keys=None, at: Int[Array, "B Q"] | None = None) -> Array:
        """One block, [B, L, H], or [B, Q, H] of the tokens `at` alone: only keys and values need the others.

        attend(q, k, v) is plain causal attention or the cached one.
        """
        q, k, v = self.self_attn.project(self.input_layernorm(x), rope, keys, at)
        x = x if at is None else along_rows(x, at)
        x = x + self.self_attn.output(attend(q, k, v), keys)
        return x + self.mlp(self.post_attention_layernorm(x), keys)


class Embedding(nnx.Module):
    def __init__(self, rows: int, dim: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.weight = nnx.Param(normal(rngs.params(), (rows, dim), dim**-0.5, dtype))


@jax.custom_vjp
def _scores(hidden: Float[Array, "*B H"], head: Float[Array, "V H"]) -> Float[Array, "*B V"]:
    """float32 products. Left to autodiff, a float32 cotangent turns the whole bfloat16 head into float32."""
    return times(hidden, head, jnp.float32)


def _scores_forward(hidden, head):
    # symbolic_zeros tells whether the head is differentiated at all; a frozen one has no gradient to build
    kept = hidden.value if head.perturbed else None
    return _scores(hidden.value, head.value), (kept, head.value)


def _scores_backward(residuals, gradient):
    hidden, head = residuals
    gradient = gradient.astype(head.dtype)
    for_head = None if hidden is None else jnp.einsum("...v,...h->vh", gradient, hidden)
    if jax.default_backend() == "cpu" and head.dtype == jnp.bfloat16:
        # In parts: for one product over so many words XLA for CPUs makes a copy as large as the head
        parts = math.gcd(head.shape[0], 16)
        head = head.reshape(parts, -1, head.shape[-1])
        gradient = gradient.reshape(*gradient.shape[:-1], *head.shape[:2])
        summed = jnp.einsum("...pv,pvh->p...h", gradient, head, preferred_element_type=jnp.float32).sum(0)
        return summed.astype(head.dtype), for_head
    return jnp.einsum("...v,vh->...h", gradient, head), for_head


_scores.defvjp(_scores_forward, _scores_backward, symbolic_zeros=True)


class Qwen2(nnx.Module):
    """Embeddings in, hidden states out; `logits` is apart, so that callers score only what they need."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)
        self.layers = DecoderLayer(config, rngs=rngs, stack=(config.num_hidden_layers,), dtype=dtype)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, rngs=rngs, dtype=dtype)

    def embed(self, input_ids: Int[Array, "*B"]) -> Float[Array, "*B H"]:
        return self.embed_tokens.weight[...][input_ids].astype(self.dtype)

    def head(self) -> Float[Array, "V H"]:
        """Rows of the output matrix: the embedding where the two are tied."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head.weight[...]

    def logits(self, hidden: Float[Array, "*B H"]) -> Float[Array, "*B V"]:
        """float32 logits of any hidden states."""
        return _scores(hidden, self.head().astype(hidden.dtype))

    def __call__(
        self,
        x: Float[Array, "B L H"],
        keys: Key[Array, " B"] | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        at: Int[Array, "B Q"] | None = None,
        **how,
    ) -> Float[Array, "B Q H"]:
        """Normed hidden states of whole rows, padded on the right (no valid token sees the padding).

        Args:
            x: embeddings.
            keys: one LoRA dropout key per row, or None.
            segment_ids, positions: packed rows only; positions default to 0..L-1.
            at: the tokens that are wanted; None: all, Q = L. The last layer's queries and MLP are of them
                alone.
            how: remat, unroll, mesh of layers.scan_layers.
        """
        rope = self.rope(x, positions)

        def run(layer: DecoderLayer, x, index, at=None):
            def attend(q, k, v):
                return attention(q, k, v, is_causal=True, segment_ids=segment_ids, q_at=at)

            layer_keys = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            return layer(x, attend, rope, layer_keys, at)

        def body(layer: DecoderLayer, x, index):
            return run(layer, x, index), None

        def last(layer: DecoderLayer, x, index):
            return x, run(layer, x, index, at)

        count = self.config.num_hidden_layers
        if at is None:
            x, _ = scan_layers(body, self.layers, x, last=count, **how)
            return self.norm(x)
        x, _ = scan_layers(body, self.layers, x, last=count - 1, **how)
        # Its backward pass follows at once: what it keeps is no longer alive than were it computed again
        how = how | {"remat": "none"}
        _, wanted = scan_layers(last, self.layers, x, first=count - 1, last=count, **how)
        return self.norm(wanted[0])

    def prefill(
        self, x: Float[Array, "B L H"], lengths: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B H"], KVCache]:
        """Fills slots 0..L-1 of the cache; returns the hidden state of each row's last valid token.

        The last layer's queries and MLP are computed for that token alone.
        """
        rope, length, final = self.rope(x, None), x.shape[1], self.config.num_hidden_layers - 1

        def read(layer: DecoderLayer, x, at=None):
            kept = {}

            def attend(q, k, v):
                kept["k"], kept["v"] = k.astype(cache.k.dtype), v.astype(cache.v.dtype)
                if at is None:
                    return attention(q, k, v, is_causal=True)
                return attention(q, k, v, is_causal=False, kv_lengths=lengths)

            return layer(x, attend, rope, at=at), kept["k"], kept["v"]

        def body(layer: DecoderLayer, x, index):
            x, k, v = read(layer, x)
            return x, (k, v)

        def last(layer: DecoderLayer, x, index):
            return x, read(layer, x, at=lengths[:, None] - 1)

        x, (k, v) = scan_layers(body, self.layers, x, last=final)
        _, (hidden, k_last, v_last) = scan_layers(last, self.layers, x, first=final, last=final + 1)
        cache = KVCache(
            cache.k.at[:final, :, :length].set(k).at[final:, :, :length].set(k_last),
            cache.v.at[:final, :, :length].set(v).at[final:, :, :length].set(v_last),
            lengths,
        )
        return self.norm(hidden[0, :, 0]), cache

    def decode(self, tokens: Int[Array, " B"], cache: KVCache) -> tuple[Float[Array, "B H"], KVCache]:
        """One token per row, written to slot lengths[b]; the cache is the scan's carry: updated in place."""
        rows, slots = jnp.arange(tokens.shape[0]), cache.lengths
        rope = rotary(slots[:, None], self.config.head_dim, self.config.rope_theta, self.dtype)

        def body(layer: DecoderLayer, carry, index):
            x, k_all, v_all = carry
            updated = {}

            def attend(q, k, v):
                updated["k"] = k_all.at[index, rows, slots].set(k[:, 0].astype(k_all.dtype))
                updated["v"] = v_all.at[index, rows, slots].set(v[:, 0].astype(v_all.dtype))
                # Else XLA for CPUs would update a layer's slice apart, and copy the whole cache to do so
                updated["k"], updated["v"] = lax.optimization_barrier((updated["k"], updated["v"]))
                return attention(
                    q, updated["k"][index], updated["v"][index], is_causal=False, kv_lengths=slots + 1
                )

            x = layer(x, attend, rope)
            return (x, updated["k"], updated["v"]), None

        carry = (self.embed(tokens)[:, None], cache.k, cache.v)
        (x, k, v), _ = scan_layers(body, self.layers, carry, last=self.config.num_hidden_layers)
        return self.norm(x[:, 0]), KVCache(k, v, slots + 1)

    def rope(self, x: Float[Array, "B L H"], positions: Int[Array, "B L"] | None) -> tuple[Array, Array]:
        """cos and sin for the tokens of x, [B, L, 1, D / 2] each; positions default to 0..L-1."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return rotary(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
