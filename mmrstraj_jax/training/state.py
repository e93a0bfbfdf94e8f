"""A model as two flat trees, {"vision_tower.layers.mlp.fc1.weight": array}: what trains, and what is frozen.

Flat names are the same in checkpoints, tables, learning-rate groups, shardings and messages.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Int, UInt32

from mmrstraj_jax.models.layers import Trainable

Tree = dict[str, Array]


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
    """(structure, trainable, frozen) of a model; the arrays are shared, not copied."""
    graphdef, *states = nnx.split(model, Trainable, ...)
    trees = [{".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(state)} for state in states]
    return graphdef, *trees


def merge(graphdef: nnx.GraphDef, *trees: Tree) -> nnx.Module:
    """The model again, from all its leaves; works on tracers too."""
    leaves = {name: leaf for tree in trees for name, leaf in tree.items()}
    return nnx.merge(graphdef, traverse_util.unflatten_dict(leaves, sep="."))


def num_bytes(leaf: Array | jax.ShapeDtypeStruct) -> int:
    """Bytes on a device, where two 4-bit numbers share one (`nbytes` counts one each)."""
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf.size * jnp.iinfo(leaf.dtype).bits // 8
    return leaf.size * leaf.dtype.itemsize


_UINT = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def _leaf_checksum(leaf: Array) -> UInt32[Array, " 2"]:
    """Sums modulo 2^32 of the bits and of bits x (2 index + 1): the same under any sharding or order of
    addition.

    An odd factor makes every single changed bit visible; the position in it makes swapped values visible.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.integer):
        leaf = jax.lax.bitcast_convert_type(leaf, _UINT[leaf.dtype.itemsize])
    bits = leaf.astype(jnp.uint32)
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):  # built per axis: a reshape would gather a sharded leaf
        iota = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        index, stride = index + iota * jnp.uint32(stride % 2**32), stride * leaf.shape[axis]
    return jnp.stack([bits.sum(dtype=jnp.uint32), (bits * (2 * index + 1)).sum(dtype=jnp.uint32)])


@jax.jit
def _checksums(leaves: list[Array]) -> UInt32[Array, "N 2"]:
    return jnp.stack([_leaf_checksum(leaf) for leaf in leaves])


def checksum(tree: Tree) -> dict[str, str]:
    """Per leaf 16 hex digits, computed where the leaf lies; only they travel to the host."""
    if not tree:
        return {}
    sums: Int[np.ndarray, "N 2"] = np.asarray(_checksums(list(tree.values())))
    return {
        name: f"{plain:08x}{weighted:08x}"
        for name, (plain, weighted) in zip(tree, sums.tolist(), strict=True)
    }


class FrozenWeightsChanged(RuntimeError):
    """A frozen leaf is not what it was: a bug or broken memory, and nothing may be saved from here on."""


def check_frozen(tree: Tree, expected: dict[str, str], when: str) -> None:
    """Raises FrozenWeightsChanged naming every leaf whose checksum is not the expected one."""
    now = checksum(tree)
    changed = sorted(name for name in now.keys() | expected.keys() if now.get(name) != expected.get(name))
    if changed:
        raise FrozenWeightsChanged(
            f"{when}: frozen weights changed: {', '.join(changed)}; nothing was saved. "
            "This is a bug or a memory fault: restart from the last checkpoint and report it"
        )
