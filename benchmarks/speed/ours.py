"""The JAX side: the package's own step, prefill and decoder. A child of compare.py (speed.child)."""

import gc
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmrstraj_jax import parallel
from mmrstraj_jax.config import Config, LoRAConfig, OptimConfig
from mmrstraj_jax.inference.decoding import Decoder, laid_out
from mmrstraj_jax.inference.options import DecodeOptions
from mmrstraj_jax.models.lora import add_lora
from mmrstraj_jax.models.mmrstraj import Inputs, MMRSTraj, init_model
from mmrstraj_jax.models.qwen2 import init_cache
from mmrstraj_jax.training import state
from mmrstraj_jax.training.optimizer import Optimizer
from mmrstraj_jax.training.step import build_step, gradients
from speed import child, workloads
from speed.workloads import Item

LORA = LoRAConfig(rank=workloads.RANK, alpha=workloads.ALPHA, dropout=0.0)


def build(item: Item) -> MMRSTraj:
    """The model with the drawn weights, with adapters where it trains. Nothing is initialised twice."""

    def make() -> MMRSTraj:
        model = init_model(item.model, jax.random.key(0), jnp.dtype(item.dtype))
        if item.kind == "train":
            add_lora(model, LORA, jax.random.key(0))
        return model

    structure = []

    def split() -> tuple[dict, dict]:
        graphdef, *trees = state.split(make())
        structure.append(graphdef)  # no array, so eval_shape cannot return it
        return tuple(trees)

    shapes = jax.eval_shape(split)
    return state.merge(structure[0], *({n: _leaf(n, leaf) for n, leaf in tree.items()} for tree in shapes))


def _leaf(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if ".layers." not in name:
        return jnp.asarray(workloads.weight(name, leaf.shape), leaf.dtype)
    before, after = name.split(".layers.")
    stacked = np.empty(leaf.shape, leaf.dtype)
    for layer in range(leaf.shape[0]):
        stacked[layer] = workloads.weight(f"{before}.layers.{layer}.{after}", leaf.shape[1:])
    return jnp.asarray(stacked)


def inputs(item: Item, row: workloads.Row) -> Inputs:
    reduced = item.reduced_side / item.model.vision.grid_side
    scale = np.full((item.batch, item.views), reduced, np.float32) if reduced < 1 else None
    lengths = np.full(item.batch, item.length, np.int32)
    return Inputs(row.input_ids, row.pixels, row.visual_index, lengths, scale)


def batch(item: Item, row: workloads.Row | None = None) -> dict[str, Any]:
    """One micro-batch of the step (training.step.Batch)."""
    row = workloads.row(item) if row is None else row
    return {
        "inputs": inputs(item, row)._replace(sample_index=np.arange(item.batch, dtype=np.int32)),
        "positions": row.positions,
        "targets": row.targets,
        "weights": np.ones(row.targets.shape, np.float32),
        "answer": np.ones(row.targets.shape, bool),
    }


def text_inputs(item: Item) -> Inputs:
    """A prompt without images."""
    side = item.model.vision.image_size
    ids = workloads.token_ids(item)
    lengths = np.full(item.batch, item.length, np.int32)
    return Inputs(ids, np.zeros((item.batch, 0, side, side, 3), np.uint8), np.full_like(ids, -1), lengths)


class Program:
    """A function compiled ahead of time, with the seconds that took."""

    def __init__(self, function: Callable, *args: Any):
        start = time.perf_counter()
        lowered = jax.jit(function).lower(*args) if not hasattr(function, "lower") else function.lower(*args)
        lowered_at = time.perf_counter()
        self.compiled = lowered.compile()
        self.about = {"lower_s": lowered_at - start, "compile_s": time.perf_counter() - lowered_at}
        self.about["fused_attention"] = "__cudnn$fmha" in self.compiled.as_text()
        self.about["temporary"] = self.compiled.memory_analysis().temp_size_in_bytes

    def __call__(self, *args: Any) -> Any:
        return jax.block_until_ready(self.compiled(*args))


class Vision:
    """Tower and projector over the views of one row."""

    def __init__(self, item: Item):
        self.graphdef, self.params = nnx.split(laid_out(build(item), jax.default_backend()))
        self.pixels = jnp.asarray(workloads.pixels(item)[0])
        self.program = Program(self._features, self.params, self.pixels)

    def _features(self, params, pixels):
        model = nnx.merge(self.graphdef, params)
        features = model.encode_views(pixels, one_by_one=jax.default_backend() == "cpu")
        return model.multi_modal_projector(features)

    def step(self) -> jax.Array:
        return self.program(self.params, self.pixels)

    def outputs(self) -> dict[str, Any]:
        return {"features": self.step()}


class Prefill:
    """A prompt's embeddings through the decoder into a cache, and the logits after its last token."""

    def __init__(self, item: Item):
        self.graphdef, self.params = nnx.split(laid_out(build(item), jax.default_backend()))
        self.inputs = jax.tree.map(jnp.asarray, text_inputs(item))
        self.cache_of = lambda: init_cache(item.model.text, item.batch, item.length, jnp.dtype(item.dtype))
        self.program = Program(self._prefill, self.params, self.inputs)

    def _prefill(self, params, inputs):
        model = nnx.merge(self.graphdef, params)
        text = model.language_model
        hidden, cache = text.prefill(text.embed(inputs.input_ids), inputs.lengths, self.cache_of())
        return model.logits(hidden), cache

    def step(self) -> jax.Array:
        return self.program(self.params, self.inputs)[0]

    def outputs(self) -> dict[str, Any]:
        return {"logits": self.step()}


class Decode:
    """DECODE_TOKENS greedy tokens a row with the product's decoder; the context grows from step to step."""

    def __init__(self, item: Item, budget: int):
        self.item = item
        self.decoder = Decoder(build(item), (), parallel.local_mesh())
        options = DecodeOptions(max_new_tokens=budget * workloads.DECODE_TOKENS + 1)
        ids = workloads.token_ids(item)
        self.pieces = self.decoder.tokens(text_inputs(item), ids, options)
        self.first = next(self.pieces)  # the prefill's

    def step(self) -> np.ndarray:
        return next(self.pieces)

    def outputs(self) -> dict[str, Any]:
        item, graphdef = self.item, self.decoder.graphdef

        @jax.jit
        def forced(params, ids, lengths):
            text = nnx.merge(graphdef, params).language_model
            cache = init_cache(text.config, item.batch, item.length, text.dtype)
            _, cache = text.prefill(text.embed(ids[:, :-1]), lengths - 1, cache)
            hidden, _ = text.decode(ids[:, -1], cache)
            return text.logits(hidden)

        prompt = text_inputs(item)
        logits = forced(self.decoder.params, prompt.input_ids, prompt.lengths)
        if item.dtype != "float32":  # a rounding decides between two likely tokens
            return {"logits": logits}
        return {"logits": logits, "ids": np.concatenate([self.first, self.step()], axis=1)}


def gradients_by_layer(grads: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The same gradients under PyTorch's names: stacked layers apart."""
    found = {}
    for name, value in grads.items():
        if ".layers." not in name:
            found[name] = value
            continue
        before, after = name.split(".layers.")
        found |= {f"{before}.layers.{layer}.{after}": each for layer, each in enumerate(value)}
    return found


class Train:
    """One LoRA step on tower and projector: training.step.build_step as the train command runs it."""

    def __init__(self, item: Item):
        self.item = item
        rate = workloads.LEARNING_RATE
        optim = OptimConfig(rate, rate, warmup_ratio=0.0, schedule="constant")
        self.config = Config(
            batch_size=item.batch,
            micro_batch_size=item.batch,
            dtype=item.dtype,
            remat=item.remat,
            lora=LORA,
            optim=optim,
        )
        self.graphdef, self.trainable, self.frozen = state.split(build(item))
        self.optimizer = Optimizer(optim, 1000)
        self.opt_state, self.number = self.optimizer.init(self.trainable), jnp.int32(0)
        self.prepare()

    def prepare(self) -> None:
        self.batch = self.on_device(batch(self.item))
        gc.freeze()  # as the train command does before it traces
        self.program = Program(self.function(), *self.arguments(self.batch))

    def on_device(self, micro: dict) -> dict:
        """A batch as the step takes it: one micro-batch."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], micro)

    def function(self) -> Callable:
        return build_step(self.graphdef, self.optimizer, self.config)

    def arguments(self, batch: dict) -> tuple:
        return self.trainable, self.opt_state, self.frozen, batch, self.number

    def run(self, program: Program, batch: dict) -> jax.Array:
        self.trainable, self.opt_state, metrics = program(*self.arguments(batch))
        return metrics["loss"]

    def step(self) -> jax.Array:
        return self.run(self.program, self.batch)

    def differentiate(self, batch: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        def loss_and_gradients(trainable, frozen, batch, number):
            return gradients(self.graphdef, self.config, trainable, frozen, batch, number)

        return jax.jit(loss_and_gradients)(self.trainable, self.frozen, batch, self.number)

    def outputs(self) -> dict[str, Any]:
        loss, grads = self.differentiate(self.batch)
        return {"loss": loss} | gradients_by_layer(grads)


class Side:
    """Requests of compare.py."""

    kinds = {"vision": Vision, "prefill": Prefill, "decode": Decode, "train": Train}

    def prepare(self, item: dict, budget: int, cache: str) -> dict:
        """Builds and compiles; lower_s and compile_s are of the step's program."""
        if cache:
            jax.config.update("jax_compilation_cache_dir", cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
        self.item = Item(**item)
        start = time.perf_counter()
        more = {"budget": budget} if self.item.kind == "decode" else {}
        self.work = self.kinds[self.item.kind](self.item, **more)
        answer = {"prepare_s": time.perf_counter() - start}
        program = getattr(self.work, "program", None)  # the decoder compiles its own two
        return answer if program is None else answer | program.about

    def outputs(self, path: str) -> dict:
        found = {name: np.asarray(value) for name, value in self.work.outputs().items()}
        ids = {name for name, value in found.items() if np.issubdtype(value.dtype, np.integer)}
        np.savez(path, **{n: v if n in ids else v.astype(np.float32) for n, v in found.items()})
        return {}

    def time(self) -> dict:
        start = time.perf_counter()
        result = jax.block_until_ready(self.work.step())
        seconds = time.perf_counter() - start
        return {"seconds": seconds} | ({"loss": float(result)} if self.item.kind == "train" else {})

    def memory(self, reset: bool) -> dict:
        stats = jax.local_devices()[0].memory_stats()
        if stats:  # a device's peak cannot be reset; the gate's own program is in it
            return {"peak": stats["peak_bytes_in_use"]}
        if reset:
            child.forget_peak()
        return {"peak": child.peak_bytes()}

    def limits(self, dtype: str, large: bool) -> dict:
        """Best matrix rate (FLOP/s) and copy and read rates (bytes/s) of three."""
        side, copy_bytes, repeats = workloads.probe(large, jax.default_backend() == "gpu")
        x = jax.random.normal(jax.random.key(0), (side, side), dtype)
        buffer = jnp.ones(copy_bytes // 4, jnp.float32)
        matmul, copy, read = Program(jnp.matmul, x, x), Program(_bump, buffer), Program(jnp.sum, buffer)
        return {
            "matmul": 2 * side**3 * repeats / _best(lambda: matmul.compiled(x, x), repeats),
            "copy": 2 * copy_bytes * repeats / _best(lambda: copy.compiled(buffer), repeats),
            "read": copy_bytes * repeats / _best(lambda: read.compiled(buffer), repeats),
        }

    def about(self) -> dict:
        device = jax.devices()[0]
        kind = "" if device.platform == "cpu" else device.device_kind
        return {"versions": {"jax": jax.__version__}, "device": kind, "threads": len(os.sched_getaffinity(0))}


def _bump(x: jax.Array) -> jax.Array:
    return x + 1


def _best(function: Callable, repeats: int) -> float:
    """Seconds of `repeats` calls, which the device gets without waiting in between: best of three."""
    found = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(repeats):
            result = function()
        jax.block_until_ready(result)
        found.append(time.perf_counter() - start)
    return min(found[1:])


if __name__ == "__main__":
    child.serve(Side())
