"""Prefill and decode as two jitted programs over a whole batch, padded on the right.

Rows have their own lengths, budgets and random keys; a row that is done waits, in place, for the others.
Several devices take a share of the rows each and run the same programs without a word to each other, so an
answer does not depend on their number.
Legend: B rows, L prompt tokens (images expanded), V vocabulary, H hidden, C tokens of a chunk.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, Key

from mmrstraj_jax import parallel
from mmrstraj_jax.inference.options import DecodeOptions
from mmrstraj_jax.inference.sampling import SamplingValues, next_tokens
from mmrstraj_jax.models.layers import unstacked
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
    steps: Int[Array, " B"]  # tokens its device has written, for the random key


class _Static(NamedTuple):
    """What the two programs are compiled for, beside shapes."""

    graphdef: nnx.GraphDef
    greedy: bool
    filtered: bool
    mesh: Mesh


_ROWS = P(parallel.BATCH_AXES)
_STATE = DecodeState(KVCache(P(None, *_ROWS), P(None, *_ROWS), _ROWS), *[_ROWS] * 5)


def _on_every_device(mesh: Mesh, function: Callable, in_specs: tuple, out_specs) -> Callable:
    """`function` run by each device of the mesh on its own rows."""
    if mesh.size == 1:
        return function
    # Loop counters differ between devices once their rows are done: nothing for check_vma to check.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _choose(static: _Static, model: MMRSTraj, hidden, state: DecodeState, values, eos) -> DecodeState:
    """The state after one more token of every row that is not done."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.steps)
    tokens = next_tokens(
        model.logits(hidden), state.seen, keys, values, greedy=static.greedy, filtered=static.filtered
    ).astype(jnp.int32)
    active = state.remaining > 0
    stop = jnp.isin(tokens, eos)
    return state._replace(
        tokens=jnp.where(active, tokens, -1),
        remaining=jnp.where(active & ~stop, state.remaining - 1, 0),
        seen=state.seen.at[jnp.arange(tokens.shape[0]), tokens].set(True),
        steps=state.steps + 1,
    )


@functools.partial(jax.jit, static_argnames=("static", "slots"))
def _prefill(static: _Static, params, inputs: Inputs, remaining, seen, keys, values, eos, slots: int):
    def fill(params, inputs: Inputs, remaining, seen, keys, values, eos):
        model = nnx.merge(static.graphdef, params)
        text = model.language_model
        cache = init_cache(text.config, inputs.input_ids.shape[0], slots, text.dtype)
        on_cpu = static.mesh.devices.flat[0].platform == "cpu"
        hidden, cache = model.prefill(inputs, cache, one_by_one=on_cpu)
        state = DecodeState(cache, remaining, remaining, seen, keys, jnp.zeros_like(remaining))
        return _choose(static, model, hidden, state, values, eos)

    specs = (P(), _ROWS, _ROWS, _ROWS, _ROWS, P(), P())
    fill = _on_every_device(static.mesh, fill, specs, _STATE)
    return fill(params, inputs, remaining, seen, keys, values, eos)


@functools.partial(jax.jit, static_argnames=("static",), donate_argnames=("state",))
def _decode(static: _Static, params, state: DecodeState, values, eos, limit):
    """Up to `limit` (at most CHUNK) more tokens; a device stops as soon as all its rows are done."""

    def write(params, state: DecodeState, values, eos, limit):
        model = nnx.merge(static.graphdef, params)

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

        out = jnp.full((len(state.tokens), CHUNK), -1, jnp.int32)
        state, out, _ = lax.while_loop(go_on, body, (state, out, jnp.int32(0)))
        return state, out

    write = _on_every_device(static.mesh, write, (P(), _STATE, P(), P(), P()), (_STATE, _ROWS))
    return write(params, state, values, eos, limit)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def row_keys(seed: int, numbers: Sequence[int]) -> Key[Array, " B"]:
    """The random key of each row: a function of the seed and the row's own number, not of its batch."""
    key = jax.random.key(seed)
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.asarray(numbers, jnp.uint32))


def laid_out(model: MMRSTraj, platform: str) -> MMRSTraj:
    """The model with its weights as this platform's products read them best (layers.unstacked)."""
    if platform != "cpu":
        return model
    model = nnx.merge(*nnx.split(model))  # the same arrays in a module of its own
    for part in (model.vision_tower, model.language_model):
        part.layers = unstacked(part.layers)
    return model


class Decoder:
    """A model made ready to write: parameters split off once, two compiled programs per bucket of shapes."""

    def __init__(self, model: MMRSTraj, eos_token_ids: Sequence[int], mesh: Mesh):
        """
        Args:
            eos_token_ids: ids that end a row; empty means that only the budget does.
            mesh: devices of this process; each holds the whole model and takes a share of the rows.
        """
        self.graphdef, params = nnx.split(laid_out(model, mesh.devices.flat[0].platform))
        self.mesh, self.params = mesh, jax.device_put(params, NamedSharding(mesh, P()))
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
            inputs: B prompts, images expanded, padded on the right; B a multiple of the number of devices.
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
        static = _Static(self.graphdef, options.greedy, options.filtered, self.mesh)
        values = SamplingValues.of(options)
        # -1 is no token: another number of end tokens is not another program.
        eos = np.full(round_up(len(self.eos) + 1, 8), -1, np.int32)
        eos[: len(self.eos)] = self.eos
        keys = row_keys(options.seed, range(rows) if numbers is None else numbers)
        own = parallel.shard_batch((inputs, budgets, seen), self.mesh, batch_axis=0)
        slots = round_up(needed, SLOT_MULTIPLE)
        state = _prefill(static, self.params, *own, keys, values, eos, slots=slots)
        yield np.asarray(state.tokens)[:, None]
        while np.asarray(state.remaining).any():
            state, out = _decode(static, self.params, state, values, eos, jnp.int32(chunk))
            out = np.asarray(out)
            yield out[:, : max(1, int((out >= 0).any(axis=0).sum()))]
