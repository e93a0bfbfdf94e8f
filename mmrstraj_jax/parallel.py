"""Devices: the mesh, the one table name -> PartitionSpec, and batches spread over devices.

Axes `data` and `fsdp` always exist. The frozen model has no gradient and no optimizer state, so replicated
weights and plain data parallel are the default; with fsdp > 1 weights are split too, never along the layer
axis that the scan runs over, and made whole just before their use, a layer at a time (`weights_mesh`). The
batch is split over both axes.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmrstraj_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")

# First match wins: (pattern of the flat name, axis that fsdp splits). Stacked weights are [layers, out, in].
FSDP_AXES: tuple[tuple[str, int | None], ...] = (
    (r"norm\d?\.weight$", None),  # too small to be worth a collective
    (r"\.layers\..*\.lora_A$", 2),  # [layers, r, in]: r is too small to split
    (r"\.layers\..*\.(weight|lora_B)$", 1),
    (r"\.(embed_tokens|lm_head)\.weight$", 0),  # [vocabulary, hidden]
    (r"^multi_modal_projector\..*\.weight$", 0),
)


def make_mesh(fsdp: int = 1) -> Mesh:
    """A mesh over all devices: `fsdp` of them share one copy of the weights, the rest are data parallel.

    Raises UserError: fsdp does not divide the number of devices.
    """
    devices = jax.device_count()
    if fsdp < 1 or devices % fsdp:
        raise UserError(f"fsdp {fsdp}: expected a divisor of the number of devices, {devices}")
    # Auto: the compiler places collectives. make_mesh's own default differs between JAX versions.
    return jax.make_mesh((devices // fsdp, fsdp), BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def local_mesh() -> Mesh:
    """A mesh over the devices of this process alone: no program on it waits for another process."""
    return Mesh(np.asarray(jax.local_devices())[:, None], BATCH_AXES)


def weights_mesh(mesh: Mesh | None) -> Mesh | None:
    """The mesh if weights are split over it: then the model gathers them (models.layers.scan_layers)."""
    return mesh if mesh is not None and mesh.shape["fsdp"] > 1 else None


def looked_up(names: Collection[str]) -> set[str]:
    """The embedding, where it is not the head as well."""
    untied = "language_model.lm_head.weight" in names
    return {"language_model.embed_tokens.weight"} if untied else set()


def gather_unstacked(tree: Mapping[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """The flat tree of a model, every leaf that no scan runs over made whole; unchanged without a mesh.

    An embedding that is only looked up is split by columns instead: lookups are local, their rows travel.
    """
    if mesh is None:
        return dict(tree)
    turned, found = looked_up(tree), dict(tree)
    for name, leaf in tree.items():
        if ".layers." not in name:
            spec = P(None, "fsdp") if name in turned else P()
            found[name] = jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))
    return found


def partition_spec(name: str, shape: tuple[int, ...], fsdp: int) -> P:
    """Where fsdp splits the parameter of this flat name; an axis that fsdp does not divide stays whole."""
    for pattern, axis in FSDP_AXES:
        if re.search(pattern, name):
            if fsdp > 1 and axis is not None and axis < len(shape) and shape[axis] % fsdp == 0:
                return P(*(["fsdp" if i == axis else None for i in range(axis + 1)]))
            break
    return P()


def gathered_once(tree: Mapping[str, Any], fsdp: int) -> int:
    """Bytes that gather_unstacked yields on each device (of ShapeDtypeStructs or arrays); 0 without fsdp."""
    turned = looked_up(tree)
    return sum(
        leaf.size * leaf.dtype.itemsize // (fsdp if name in turned else 1)
        for name, leaf in tree.items()
        if ".layers." not in name and is_split(name, leaf.shape, fsdp)
    )


def is_split(name: str, shape: tuple[int, ...], fsdp: int) -> bool:
    """Whether each of `fsdp` devices holds a part of the parameter only."""
    return any(partition_spec(name, shape, fsdp))


def sharding_of(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where the parameter of this flat name lies."""
    return NamedSharding(mesh, partition_spec(name, shape, mesh.shape["fsdp"]))


def parameter_shardings(tree: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Sharding of every leaf of a flat tree (arrays or ShapeDtypeStructs)."""
    return {name: sharding_of(name, leaf.shape, mesh) for name, leaf in tree.items()}


def shard_parameters(tree: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """The same flat tree, placed on the mesh. With several processes each holds all of it, or its shards."""
    shardings = parameter_shardings(tree, mesh)
    return {name: _place(leaf, shardings[name]) for name, leaf in tree.items()}


def _place(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    if leaf.sharding == sharding or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    # Each process places its own shards: device_put would first compare the whole array across processes
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def optimizer_shardings(opt_state: Any, mesh: Mesh) -> Any:
    """Sharding of every leaf of an optimizer state (arrays or ShapeDtypeStructs): moments lie where their
    parameter lies, counters on every device.
    """

    def where(path: tuple, leaf: Any) -> NamedSharding:
        name = str(getattr(path[-1], "key", ""))
        return sharding_of(name, leaf.shape, mesh)

    return jax.tree.map_with_path(where, opt_state)


def init_optimizer(init: Callable[[Any], Any], trainable: Mapping[str, Any], mesh: Mesh) -> Any:
    """init(trainable), made where it belongs."""
    shardings = optimizer_shardings(jax.eval_shape(init, dict(trainable)), mesh)
    return jax.jit(init, out_shardings=shardings)(dict(trainable))


def shard_batch(batch: Any, mesh: Mesh, *, batch_axis: int) -> Any:
    """Host arrays -> device arrays split along batch_axis; each process hands in its own rows only.

    None leaves stay None. The rows of the global batch must be a multiple of the number of devices.
    """
    sharding = NamedSharding(mesh, P(*[None] * batch_axis, BATCH_AXES))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def shardings_of(tree: Any) -> Any:
    """Where each leaf of a tree of device arrays lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
