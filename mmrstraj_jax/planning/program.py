"""The real train step for a bucket, compiled from shapes alone: nothing is allocated, no weights are read."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmrstraj_jax import parallel
from mmrstraj_jax.config import Config, ModelConfig
from mmrstraj_jax.data import collate
from mmrstraj_jax.data.collate import Shape
from mmrstraj_jax.models.lora import add_lora, train_in_full
from mmrstraj_jax.models.mmrstraj import init_model
from mmrstraj_jax.models.quantized import quantize_linears
from mmrstraj_jax.training import state as states
from mmrstraj_jax.training.optimizer import Optimizer
from mmrstraj_jax.training.step import build_step

Tree = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Abstract:
    """A model as shapes: its structure, and the leaves that train and that are frozen."""

    graphdef: nnx.GraphDef
    trainable: Tree
    frozen: Tree


@functools.cache
def abstract_model(config: Config, model: ModelConfig) -> Abstract:
    """The model of a run, as training.run.start would build it, without arrays."""

    structure = []

    def build() -> tuple[dict, dict]:
        made = init_model(model, jax.random.key(0), jnp.dtype(config.dtype))
        if config.quantize_llm != "none":
            quantize_linears(made.language_model.layers, config.quantize_llm)
        train_in_full(made, config.train_full)
        add_lora(made, config.lora, jax.random.key(1))
        graphdef, *trees = states.split(made)
        structure.append(graphdef)  # no array, so eval_shape cannot return it
        return tuple(trees)

    trainable, frozen = jax.eval_shape(build)
    return Abstract(structure[0], trainable, frozen)


def abstract_batch(shape: Shape, config: Config, model: ModelConfig, rows: int) -> dict[str, Any]:
    """One accumulated global batch, [micro-batches, rows, ...]: collate's own padding row, repeated."""
    one = collate.batch([None], shape, 0, model.vision.image_size, packed=config.packing)
    lead = (config.batch_size // rows, rows)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape[1:]), x.dtype), one)


def compile_step(config: Config, model: ModelConfig, shape: Shape, mesh: Mesh | None = None) -> Any:
    """The compiled train step (jax.stages.Compiled) of one bucket.

    Args:
        config: dtype, remat, batch sizes, adapters.
        model: sizes.
        shape: the bucket.
        mesh: the devices; None: one, without shardings.
    """
    found = abstract_model(config, model)
    optimizer = Optimizer(config.optim, 1000)
    opt_state = jax.eval_shape(optimizer.init, found.trainable)
    devices = 1 if mesh is None else mesh.size
    rows = min(config.micro_batch_size * devices, config.batch_size)
    args = (found.trainable, opt_state, found.frozen, abstract_batch(shape, config, model, rows))
    placed = None
    if mesh is not None:
        args = _on(mesh, *args)
        placed = tuple(jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in args[:2])
    step = build_step(found.graphdef, optimizer, config, placed=placed)
    lowered = step.lower(*args, jax.ShapeDtypeStruct((), jnp.int32))
    # It is looked at, never run: without code optimisation its buffers are the same, in half the time
    return lowered.compile({"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None)


def _on(mesh: Mesh, trainable: Tree, opt_state: Any, frozen: Tree, batch: Any) -> tuple:
    """The same trees with the shardings that a run gives them."""

    def put(tree: Any, shardings: Any) -> Any:
        def one(leaf: jax.ShapeDtypeStruct, where: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return jax.tree.map(one, tree, shardings)

    split = NamedSharding(mesh, P(None, parallel.BATCH_AXES))
    return (
        put(trainable, parallel.parameter_shardings(trainable, mesh)),
        put(opt_state, parallel.optimizer_shardings(opt_state, mesh)),
        put(frozen, parallel.parameter_shardings(frozen, mesh)),
        put(batch, jax.tree.map(lambda _: split, batch)),
    )


@dataclass(frozen=True)
class Measured:
    """Bytes of one device, as the compiler counts them (memory_analysis)."""

    arguments: int
    outputs: int
    aliased: int  # outputs that take over a donated argument's memory
    temporary: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporary


def memory_of(compiled: Any) -> Measured:
    """What the compiler says a program needs on each device."""
    found = compiled.memory_analysis()
    return Measured(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
    )
