"""Prefill and decode as two jitted programs over a whole batch, padded on the right.

Rows have their own lengths, budgets and random keys; a row that is done waits, in place, for the others.
Legend: B rows, L prompt tokens (images expanded), V vocabulary, H hidden, C tokens of a chunk.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Int, Key

from mmrstraj_jax.inference.options import DecodeOptions
from mmrstraj_jax.inference.sampling import SamplingValues, next_tokens
from mmrstraj_jax.models.mmrstraj import Inputs, MMRSTraj
from mmrstraj_jax.models.qwen2 import KVCache, init_cache

CHUNK = 32  # tokens between two looks of the host at the batch
SLOT_MULTIPLE = 128  # cache slots are rounded up to it, so that few programs are compiled


class DecodeState(NamedTuple):
    """A batch between two tokens."""

    cache: KVCache
    tokens: Int[Array, " B"]  # the last one, not yet in the cache; -1: the row was done before
    remaining: Int[Array, " B"]  # tokens the row may still write; 0: done
    seen: Bool[Array, "B V"]
    keys: Key[Array, " B"]
    step: Int[Array, ""]


class _Static(NamedTuple):
    """What the two programs are compiled for, beside shapes."""

    graphdef: nnx.GraphDef
    greedy: bool
    filtered: bool


def _choose(static: _Static, model: MMRSTraj, hidden, state: DecodeState, values, eos) -> DecodeState:
    """The state after one more token of every row that is not done."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, state.step))(state.keys)
    tokens = next_tokens(
        model.logits(hidden), state.seen, keys, values, greedy=static.greedy, filtered=static.filtered
    ).astype(jnp.int32)
    active = state.remaining > 0
    stop = jnp.isin(tokens, eos)
    return state._replace(
        tokens=jnp.where(active, tokens, -1),
        remaining=jnp.where(active & ~stop, state.remaining - 1, 0),
        seen=state.seen.at[jnp.arange(tokens.shape[0]), tokens].set(True),
        step=state.step + 1,
    )


@functools.partial(jax.jit, static_argnames=("static", "slots"))
def _prefill(static: _Static, params, inputs: Inputs, remaining, seen, keys, values, eos, slots: int):
    model = nnx.merge(static.graphdef, params)
    text = model.language_model
    cache = init_cache(text.config, inputs.input_ids.shape[0], slots, text.dtype)
    hidden, cache = model.prefill(inputs, cache)
    state = DecodeState(cache, remaining, remaining, seen, keys, jnp.int32(0))
    return _choose(static, model, hidden, state, values, eos)


@functools.partial(jax.jit, static_argnames=("static",), donate_argnames=("state",))
def _decode(static: _Static, params, state: DecodeState, values, eos, limit):
    """Up to `limit` (at most CHUNK) more tokens; stops as soon as every row is done."""
    model = nnx.merge(static.graphdef, params)
    rows = state.tokens.shape[0]

    def go_on(carry):
        state, _, written = carry
        return (written < limit) & jnp.any(state.remaining > 0)

    def body(carry):
        state, out, written = carry
        lengths = state.cache.lengths
        hidden, cache = model.decode(jnp.maximum(state.tokens, 0), state.cache)
        cache = cache._replace(lengths=jnp.where(state.remaining > 0, cache.lengths, lengths))
        state = _choose(static, model, hidden, state._replace(cache=cache), values, eos)
        return state, out.at[:, written].set(state.tokens), written + 1

    out = jnp.full((rows, CHUNK), -1, jnp.int32)
    state, out, _ = lax.while_loop(go_on, body, (state, out, jnp.int32(0)))
    return state, out


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def row_keys(seed: int, numbers: Sequence[int]) -> Key[Array, " B"]:
    """The random key of each row: a function of the seed and the row's own number, not of its batch."""
    key = jax.random.key(seed)
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.asarray(numbers, jnp.uint32))


class Decoder:
    """A model made ready to write: parameters split off once, two compiled programs per bucket of shapes."""

    def __init__(self, model: MMRSTraj, eos_token_ids: Sequence[int]):
        """eos_token_ids: ids that end a row; empty means that only the budget does."""
        self.graphdef, self.params = nnx.split(model)
        self.config = model.language_model.config
        self.eos = tuple(sorted(set(eos_token_ids)))

    def tokens(
        self,
        inputs: Inputs,
        prompts: Sequence[Sequence[int]],
        options: DecodeOptions,
        *,
        numbers: Sequence[int] | None = None,
        budgets: Sequence[int] | None = None,
        chunk: int = CHUNK,
    ) -> Iterator[Int[np.ndarray, "B C"]]:
        """Writes on, a chunk of tokens at a time, until every row has met an end token or its budget.

        Args:
            inputs: B prompts, images expanded, padded on the right (data/collate.prompt_batch).
            prompts: their ids with one image id per image: what the repetition penalty counts as seen. (HF's
                input_ids hold the image id too, once per visual token, so its penalty is the same.)
            options: options.max_new_tokens is the budget of every row unless `budgets` is given.
            numbers: each row's number for its random key; default 0..B-1.
            budgets: tokens each row may write; 0 for a row that only fills the batch up.
            chunk: tokens per piece, at most CHUNK; 1 to stream.
        Yields:
            the next tokens, end tokens included; -1 where a row had already ended.
        """
        assert 1 <= chunk <= CHUNK and len(prompts) == len(inputs.lengths)
        rows, length = inputs.input_ids.shape
        budgets = np.asarray([options.max_new_tokens] * rows if budgets is None else budgets, np.int32)
        seen = np.zeros((rows, self.config.vocab_size), bool)
        for row, ids in enumerate(prompts):
            seen[row, np.asarray(ids, np.int64)] = True
        needed = max(length, int((np.asarray(inputs.lengths) + budgets).max()))
        static = _Static(self.graphdef, options.greedy, options.filtered)
        values = SamplingValues.of(options)
        # -1 is no token: another number of end tokens is not another program.
        eos = np.full(round_up(len(self.eos) + 1, 8), -1, np.int32)
        eos[: len(self.eos)] = self.eos
        state = _prefill(
            static,
            self.params,
            inputs,
            jnp.asarray(budgets),
            jnp.asarray(seen),
            row_keys(options.seed, range(rows) if numbers is None else numbers),
            values,
            eos,
            slots=round_up(needed, SLOT_MULTIPLE),
        )
        yield np.asarray(state.tokens)[:, None]
        while np.asarray(state.remaining).any():
            state, out = _decode(static, self.params, state, values, eos, jnp.int32(chunk))
            out = np.asarray(out)
            yield out[:, : max(1, int((out >= 0).any(axis=0).sum()))]
