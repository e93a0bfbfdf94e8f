"""The two-layer MLP between tower and language model: mlp2x_gelu of LLaVA-NeXT."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from mmrstraj_jax.models.layers import Linear


class Projector(nnx.Module):
    """linear, exact (erf) GELU, linear; both with bias. Applied to every view before any reduction."""

    def __init__(self, num_in: int, num_out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.linear_1 = Linear(num_in, num_out, rngs=rngs, dtype=dtype)
        self.linear_2 = Linear(num_out, num_out, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "N T D"], keys: Key[Array, " N"] | None = None
    ) -> Float[Array, "N T H"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(x, keys, 0), approximate=False), keys, 1)
