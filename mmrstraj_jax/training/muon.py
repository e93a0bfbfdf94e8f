"""Muon for the stacked matrices of the layers, Adam for the rest (Jordan et al. 2024, "Muon").

The momentum of a matrix is replaced by the nearest orthogonal one, so that every direction learns at the same
speed. On the tiny model it needs about half the images that AdamW needs.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mmrstraj_jax.parallel import BATCH_AXES

Tree = dict[str, Array]
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the paper; five steps bring singular values near 1
STEPS = 5
RMS = 0.2  # of an update whose learning rate is 1, as large as Adam's: one rate serves both


def orthogonal(matrices: Float[Array, "S O I"], mesh: Mesh) -> Float[Array, "S O I"]:
    """Each matrix with its singular values brought near 1; the stack is shared out over the devices."""
    flip = matrices.shape[-2] > matrices.shape[-1]
    x = jnp.swapaxes(matrices, -1, -2) if flip else matrices
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    if len(x) % mesh.size == 0:
        x = lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH_AXES)))
    a, b, c = NEWTON_SCHULZ
    for _ in range(STEPS):
        square = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    x = lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
    return jnp.swapaxes(x, -1, -2) if flip else x


class MuonState(NamedTuple):
    adam: optax.ScaleByAdamState
    step: Int[Array, ""]


class Muon:
    """Pure functions over flat trees {"vision_tower.layers.mlp.fc1.weight": array}.

    Learning rates follow one schedule: linear from 0 over 4 % of the steps, then a cosine to 0.
    """

    b1, b2, clip, weight_decay = 0.9, 0.99, 10.0, 0.01

    def __init__(
        self,
        mesh: Mesh,
        steps: int,
        *,
        matrix_lr: float,
        adam_lr: float,
        factors: Mapping[str, float] | None = None,
    ):
        """
        Args:
            matrix_lr: of stacked matrices [S, O, I] below a "layers".
            adam_lr: of everything else.
            factors: first part of a name -> factor on its learning rates.
        """
        self.mesh, self.rates, self.factors = mesh, (matrix_lr, adam_lr), factors or {}
        self.schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 25), steps)
        self.adam = optax.scale_by_adam(self.b1, self.b2)

    def init(self, trainable: Tree) -> MuonState:
        return MuonState(self.adam.init(trainable), jnp.zeros((), jnp.int32))

    def update(self, grads: Tree, state: MuonState, trainable: Tree) -> tuple[Tree, MuonState]:
        """One step: the trainables and the state after it."""
        norm = optax.tree.norm(grads)
        grads = jax.tree.map(lambda grad: grad * jnp.minimum(1.0, self.clip / (norm + 1e-6)), grads)
        directions, adam = self.adam.update(grads, state.adam)
        matrix_lr, adam_lr = (rate * self.schedule(state.step) for rate in self.rates)

        def stepped(name: str, value: Array) -> Array:
            factor = self.factors.get(name.partition(".")[0], 1.0)
            decay = self.weight_decay * value if value.ndim > 1 else 0.0
            if "layers." not in name or value.ndim != 3:
                return value - factor * adam_lr * (directions[name] + decay)
            momentum = (1 - self.b1) * grads[name] + self.b1 * adam.mu[name]  # Nesterov
            direction = orthogonal(momentum, self.mesh) * RMS * max(value.shape[-2:]) ** 0.5
            return value - factor * matrix_lr * (direction + decay)

        return {name: stepped(name, value) for name, value in trainable.items()}, MuonState(
            adam, state.step + 1
        )
