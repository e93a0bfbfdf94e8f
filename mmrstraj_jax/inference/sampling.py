"""The next token as Hugging Face `generate` chooses it: greedy or sampled, with a repetition penalty.

Legend: B rows, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mmrstraj_jax.inference.options import DecodeOptions


class SamplingValues(NamedTuple):
    """The numbers of DecodeOptions as traced scalars: another temperature is not another program."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]
    repetition_penalty: Float[Array, ""]

    @classmethod
    def of(cls, options: DecodeOptions) -> "SamplingValues":
        return cls(
            jnp.float32(options.temperature),
            jnp.float32(options.top_p),
            jnp.int32(options.top_k),
            jnp.float32(options.repetition_penalty),
        )


def penalize(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""]
) -> Float[Array, "B V"]:
    """HF's RepetitionPenaltyLogitsProcessor: divides the logits of seen ids, or multiplies negative ones."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def filter_logits(
    logits: Float[Array, " V"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, " V"]:
    """-inf outside the top k, then outside the smallest set of mass top_p (HF's two warpers in turn)."""
    size = logits.shape[0]
    order = jnp.argsort(logits)
    ordered = logits[order]
    kth = jnp.where(top_k > 0, ordered[size - jnp.clip(top_k, 1, size)], -jnp.inf)
    mass = jnp.cumsum(jax.nn.softmax(jnp.where(ordered >= kth, ordered, -jnp.inf)))
    # HF drops, from the least likely on, what sums up to 1 - top_p, and never the most likely token. A top_p
    # of 1 must drop nothing, though rounding may leave a zero mass at the bottom.
    dropped = jnp.where(top_p < 1, jnp.sum(mass[:-1] <= 1 - top_p), 0)
    # by place, not by value: of equal logits at the border some may go
    kept = (jnp.arange(size) >= dropped) & (ordered >= kth)
    return jnp.full_like(logits, -jnp.inf).at[order].set(jnp.where(kept, ordered, -jnp.inf))


def next_tokens(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    keys: Key[Array, " B"],
    values: SamplingValues,
    *,
    greedy: bool,
    filtered: bool,
) -> Int[Array, " B"]:
    """One token a row, in HF's order: repetition penalty, temperature, top-k, top-p, draw.

    Args:
        logits: float32.
        seen: ids of the row's prompt and of what it has written so far.
        keys: one key per row (never one per batch: a row's samples must not depend on its neighbours).
        greedy, filtered: static, see DecodeOptions.
    """
    logits = penalize(logits, seen, values.repetition_penalty)
    if greedy:  # the first of the largest, which XLA for CPUs finds three times faster so than by argmax
        behind = logits < logits.max(axis=-1, keepdims=True)
        return jnp.where(behind, logits.shape[1], jnp.arange(logits.shape[1])).min(axis=-1)
    logits = logits / values.temperature
    if filtered:
        logits = jax.vmap(filter_logits, (0, None, None))(logits, values.top_k, values.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits)
