"""Memory of one training step on one device, buffer by buffer, from shapes alone.

What the backward pass keeps is not retyped here: the model's own blocks are traced under jax.vjp, and what
their backward functions hold on to is counted. So a change of the model changes the plan.
Legend: N views, T patches, B rows, L tokens, K supervised positions, H hidden, W vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmrstraj_jax import parallel
from mmrstraj_jax.config import Config, ModelConfig
from mmrstraj_jax.data.collate import Shape
from mmrstraj_jax.models.attention import attention, block_length
from mmrstraj_jax.models.layers import PRODUCT, Trainable, rematerialised
from mmrstraj_jax.models.token_reduction import merge_with_text, visual_pool
from mmrstraj_jax.planning import flops
from mmrstraj_jax.planning.program import abstract_batch, abstract_model
from mmrstraj_jax.training.loss import chunk_positions
from mmrstraj_jax.training.state import merge, num_bytes
from mmrstraj_jax.training.step import last_layer_is_short

# Alive at once in the backward pass of a chunk of logits: the logits, their exponentials, their gradient.
LOGIT_COPIES = 3
# XLA's CPU library (YNNPACK) works in memory of its own, which memory_analysis does not count: arrays as
# large as what a softmax runs over. How many at once was measured (docs/planning.md).
SCRATCH_COPIES = 2


@dataclass(frozen=True)
class Phase:
    """Buffers that are alive together at one moment of the step, in bytes."""

    name: str
    buffers: dict[str, int]
    stack: str | None = None  # whose layers run

    @property
    def total(self) -> int:
        return sum(self.buffers.values())


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `resident` lives through the whole step, phases come one after the other.

    `scratch` is what the CPU's library takes beside the program's buffers; the peak does not hold it.
    """

    resident: dict[str, int]
    phases: list[Phase] = field(default_factory=list)
    scratch: int = 0

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + self.peak_phase.total

    @property
    def buffers(self) -> dict[str, int]:
        """Everything that is alive at the peak."""
        return self.resident | self.peak_phase.buffers


def estimate(
    config: Config,
    model: ModelConfig,
    shape: Shape,
    *,
    fsdp: int = 1,
    gpu: bool = True,
) -> Memory:
    """Memory of one device that trains on this bucket.

    Args:
        config: dtype, remat, adapters; batch_size and micro_batch_size are this device's.
        model: sizes.
        shape: the bucket.
        fsdp: devices that share one copy of the weights.
        gpu: True: attention is cuDNN's, and the next layer's weights are on their way while one is in use.
            False: scores are materialised, and one layer is whole at a time.
    """
    rows = config.micro_batch_size
    found = abstract_model(config, model)
    batch = abstract_batch(shape, config, model, rows)
    trainable = _sharded_bytes(found.trainable, fsdp)
    resident = {
        "frozen weights": _sharded_bytes(found.frozen, fsdp),
        "trainables": trainable,
        "Adam moments": 2 * trainable,
        "batch": _bytes(batch),
        # the sum over micro-batches, and the gradient being added to it
        "gradients": 2 * trainable,
    }
    phases = _phases(config, model, shape, rows, gpu)
    scratch = 0 if gpu else SCRATCH_COPIES * _largest_softmax(model, shape, rows, jnp.dtype(config.dtype))
    if fsdp == 1:
        return Memory(resident, phases, scratch)
    leaves = found.trainable | found.frozen
    split = {name: leaf for name, leaf in leaves.items() if parallel.is_split(name, leaf.shape, fsdp)}
    single = {"gathered head": parallel.gathered_once(leaves, fsdp)}
    if config.batch_size > rows:  # no micro-batch changes them: the compiler gathers them before the first
        resident |= single
    else:
        phases = [Phase(phases[0].name, phases[0].buffers | single), *phases[1:]]
    # the last decoder layer is then apart from the loop, and made whole when the compiler likes
    apart = {"language_model": last_layer_is_short(batch, found.trainable)}
    whole = [_with_layers(phase, split, 1 + gpu + apart.get(phase.stack, False)) for phase in phases]
    return Memory(resident, whole, scratch)


def _largest_softmax(model: ModelConfig, shape: Shape, rows: int, dtype: jnp.dtype) -> int:
    """Bytes of the largest array that a softmax of the step runs over: scores of one layer, or logits."""
    vision, text = model.vision, model.text
    tower = rows * shape.views * vision.num_attention_heads * _block_scores(vision.num_patches, False, dtype)
    decoder = rows * text.num_attention_heads * _block_scores(shape.length, True, dtype)
    logits = rows * chunk_positions(rows, shape.supervised, text.vocab_size) * text.vocab_size
    return 4 * max(tower, decoder, logits)


def _block_scores(length: int, is_causal: bool, dtype: jnp.dtype) -> int:
    return length * min(length, block_length(length, is_causal, dtype))


def _with_layers(phase: Phase, split: dict[str, jax.ShapeDtypeStruct], count: int) -> Phase:
    """The phase of a stack with so many of its layers whole."""
    if phase.stack is None:
        return phase
    layers = [_first(leaf) for name, leaf in split.items() if name.startswith(f"{phase.stack}.layers.")]
    return dataclasses.replace(phase, buffers=phase.buffers | {"gathered layers": count * _bytes(layers)})


@functools.cache  # fsdp changes none of it
def _phases(config: Config, model: ModelConfig, shape: Shape, rows: int, fused: bool) -> list[Phase]:
    found = abstract_model(config, model)
    batch = abstract_batch(shape, config, model, rows)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
    whole = merge(found.graphdef, found.trainable, found.frozen)
    dtype, inputs = jnp.dtype(config.dtype), batch["inputs"]
    rows, views = inputs.views.shape[:2]
    vision, text = model.vision, model.text
    length, count = inputs.input_ids.shape[1], rows * views
    view = jax.ShapeDtypeStruct((count, vision.num_patches, vision.hidden_size), dtype)
    token = jax.ShapeDtypeStruct((rows, length, text.hidden_size), dtype)
    layers = {"tower": vision.num_layers_run, "decoder": text.num_hidden_layers}

    dropout = config.lora.dropout > 0
    keys = {
        n: jax.ShapeDtypeStruct((n,), jax.random.key(0).dtype) if dropout else None for n in (count, rows)
    }

    def encoder(layer, x, keys):
        return layer(x, keys)

    def decoder(layer, x, rope, keys, at=None):
        return layer(x, lambda q, k, v: attention(q, k, v, is_causal=True, q_at=at), rope, keys, at)

    half = jax.ShapeDtypeStruct((rows, length, 1, text.head_dim // 2), dtype)
    tower_heads, per_key = vision.num_attention_heads, text.num_attention_heads // text.num_key_value_heads
    head_dim = vision.hidden_size // tower_heads
    patch = jax.ShapeDtypeStruct((count, vision.num_patches, tower_heads, head_dim), dtype)
    key = jax.ShapeDtypeStruct((rows, length, text.num_key_value_heads, text.head_dim), dtype)
    blocks = {
        "tower": (encoder, whole.vision_tower.layers, (view, keys[count]), _Attention(patch, 1, False)),
        "decoder": (
            decoder,
            whole.language_model.layers,
            (token, (half, half), keys[rows]),
            _Attention(key, per_key, True),
        ),
    }
    saved, live = {}, {}
    for name, (apply, stacked, args, attends) in blocks.items():
        block = _Block(apply, stacked, args, attends, fused)
        saved[name] = layers[name] * block.kept(config.remat)
        live[name] = block.workspace(config.remat)
    asked = token
    if last_layer_is_short(batch, found.trainable):
        asked = jax.ShapeDtypeStruct((*batch["positions"].shape, text.hidden_size), dtype)
        args = *blocks["decoder"][2], batch["positions"]
        last = _Block(decoder, whole.language_model.layers, args)  # its few queries: scores, as on a CPU
        saved["decoder"] += last.kept("none") - saved["decoder"] // layers["decoder"]
        live["decoder"] = max(live["decoder"], last.workspace("none"))
    if not flops.tower_trains(config):  # no gradient goes through it: it runs forward only, and keeps nothing
        saved["tower"] = 0

    joined = _joining(whole, batch, dtype, keys[count])
    head = rows * chunk_positions(rows, batch["positions"].shape[1], text.vocab_size) * text.vocab_size * 4
    hidden = _bytes(asked)
    vision_saved = {"saved by the tower": saved["tower"], "saved by projector and merge": joined}
    pixels = 4 * math.prod(inputs.views.shape)
    return [
        Phase(
            "head and loss",
            vision_saved
            | {"saved by the decoder": saved["decoder"], "hidden states": 2 * hidden}
            | {"logits chunk": LOGIT_COPIES * head},
        ),
        Phase(
            "decoder backward",
            vision_saved
            | {"saved by the decoder": saved["decoder"], "hidden states": 2 * hidden}
            | {"one decoder layer": live["decoder"]},
            stack="language_model",
        ),
        Phase(
            "tower",
            vision_saved | {"pixels as numbers": pixels, "one tower layer": live["tower"]},
            stack="vision_tower",
        ),
    ]


class _Attention(NamedTuple):
    """Of whole rows."""

    key: jax.ShapeDtypeStruct  # [B, L, Hkv, D], as the value
    queries_per_key: int
    is_causal: bool

    def saved_by_fusing(self) -> int:
        """Bytes that the backward pass of XLA's attention keeps, less those of a fused one: queries, keys,
        values, the output, and a float32 log-sum a query."""
        rows, length, heads, _ = self.key.shape
        log_sums = 4 * rows * length * heads * self.queries_per_key
        return self._kept() - (2 + 2 * self.queries_per_key) * _bytes(self.key) - log_sums

    def saved_by_blocks(self) -> int:
        """Bytes of scores that are not alive at once where they are computed again: of all blocks but one."""
        length = self.key.shape[1]
        count = math.ceil(length / block_length(length, self.is_causal, self.key.dtype))
        operands = (2 + self.queries_per_key) * _bytes(self.key)
        alive = 2 / (count + 1) if self.is_causal else 1 / count  # the share of the last block
        return int((1 - alive) * (self._kept() - operands))

    def _kept(self) -> int:
        rows, length, heads, dim = self.key.shape
        query = jax.ShapeDtypeStruct((rows, length, heads * self.queries_per_key, dim), self.key.dtype)
        attend = functools.partial(attention, is_causal=self.is_causal)
        return sum(map(_bytes, residuals(attend, (query, self.key, self.key), (), keep_varied=None)))


class _Block:
    """One layer of a stack, traced: what its backward pass keeps under a remat policy, and works with."""

    def __init__(
        self,
        apply: Callable,
        stacked: nnx.Module,
        args: tuple,
        attends: _Attention | None = None,
        fused: bool = False,
    ):
        """attends: the layer's attention, where it is of whole rows."""
        self._graphdef, *trees = nnx.split(stacked, Trainable, ...)
        self._params = [jax.tree.map(_first, tree) for tree in trees]  # [trainable, frozen]
        self._apply, self._args, self._attends, self._fused = apply, args, attends, fused

    def kept(self, remat: str) -> int:
        """Bytes that one layer keeps from its forward pass to its backward pass."""
        kept = sum(map(_bytes, self._residuals(remat)))
        return kept - self._attends.saved_by_fusing() if remat == "none" and self._fused else kept

    def workspace(self, remat: str) -> int:
        """Bytes that one layer needs while its backward pass runs, beside what it kept."""
        again = 0 if remat == "none" else self.kept("none")
        if remat == "dots":  # what it kept is not computed again
            again -= self.kept(remat) - _bytes(self._args[0])
        if again and self._attends and not self._fused:
            again -= self._attends.saved_by_blocks()
        return again + 2 * _bytes(self._args[0])  # the gradient coming in and the one going out

    def _residuals(self, remat: str) -> list[jax.ShapeDtypeStruct]:
        def apply(trainable, x, frozen, rest):
            return self._apply(nnx.merge(self._graphdef, trainable, frozen), x, *rest)

        trainable, frozen = self._params
        x, *rest = self._args
        if remat == "dots" and self._fused:  # cuDNN's attention has no name
            apply = jax.checkpoint(apply, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT))
        else:
            apply = rematerialised(apply, remat)
        return residuals(apply, (trainable, x), (frozen, tuple(rest)), keep_varied=1)


def residuals(function: Callable, varied: tuple, fixed: tuple, *, keep_varied: int | None) -> list:
    """What jax.vjp keeps of function(*varied, *fixed), as shapes; nothing is computed.

    Args:
        varied: arguments that are differentiated.
        fixed: arguments that are not.
        keep_varied: which of `varied` is counted where it is kept, None: all; the others, and `fixed`, are
            parameters, which are in memory anyway.
    """
    found: list[jax.ShapeDtypeStruct] = []

    def run(varied, fixed):
        kept = range(len(varied)) if keep_varied is None else (keep_varied,)
        parameters = (*(arg for at, arg in enumerate(varied) if at not in kept), *fixed)
        given = {id(leaf) for leaf in jax.tree.leaves(parameters)}
        result, backward = jax.vjp(lambda *args: function(*args, *fixed), *varied)
        leaves = [leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in given]
        found.extend(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        return result

    jax.eval_shape(run, varied, fixed)
    return found


def _joining(whole: nnx.Module, batch: Any, dtype: jnp.dtype, keys: Any) -> int:
    """Bytes kept between tower and decoder: projector, reduction, merge."""
    inputs = batch["inputs"]
    rows, views = inputs.views.shape[:2]
    config = whole.vision_tower.config
    features = jax.ShapeDtypeStruct((rows * views, config.num_patches, config.output_size), dtype)
    text = jax.ShapeDtypeStruct((*inputs.input_ids.shape, whole.language_model.config.hidden_size), dtype)
    newline = jax.ShapeDtypeStruct(text.shape[-1:], dtype)
    graphdef, *params = nnx.split(whole.multi_modal_projector, Trainable, ...)

    def join(trainable, features, frozen, newline, text, inputs, keys):
        projected = nnx.merge(graphdef, trainable, frozen)(features, keys)
        tokens = projected.reshape(rows, views, -1, text.shape[-1])
        pool = visual_pool(tokens, newline, inputs.view_scale, inputs.canvas_index, inputs.canvas_scale)
        return merge_with_text(text, pool, inputs.visual_index)

    kept = residuals(join, (params[0], features), (params[1], newline, text, inputs, keys), keep_varied=1)
    return sum(map(_bytes, kept))


def _first(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """One layer's slice of a stacked leaf."""
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)


def _bytes(tree: Any) -> int:
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(tree)]
    leaves = zip(jax.tree.leaves(tree), is_key, strict=True)
    return sum(8 * math.prod(leaf.shape) if key else num_bytes(leaf) for leaf, key in leaves)


def _sharded_bytes(tree: dict[str, jax.ShapeDtypeStruct], fsdp: int) -> int:
    return sum(
        _bytes(leaf) // (fsdp if parallel.is_split(name, leaf.shape, fsdp) else 1)
        for name, leaf in tree.items()
    )
