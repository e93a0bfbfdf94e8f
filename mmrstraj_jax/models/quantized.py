"""The frozen language model stored in 8 or 4 bits; each matrix is made whole just before its product.

int8 has one float32 scale for each output channel, nf4 (4-bit NormalFloat, Dettmers et al. 2023, appendix E)
one for 64 inputs of a channel. It saves memory, not time: products run in the dtype of the activations.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Integer

from mmrstraj_jax.errors import UserError

BLOCK = 64  # inputs that share a scale of nf4
_HOW: dict[str, dict[str, Any]] = {
    "int8": {"qtype": jnp.int8, "channelwise_axes": (0,)},
    "nf4": {"qtype": "nf4", "channelwise_axes": (0,), "tiled_axes": {1: BLOCK}},
}
KINDS = tuple(_HOW)


def _qwix(kind: str):
    try:
        import qwix
    except ImportError as error:
        raise UserError(
            f"quantize_llm {kind}: needs qwix, which is not installed; pip install 'mmrstraj-jax[quant]'"
        ) from error
    return qwix


def quantize_linears(module: nnx.Module, kind: str) -> None:
    """Stores the weight of every Linear of a stack of layers in fewer bits, in place; biases, norms and
    adapters stay.

    Args:
        module: its linears hold plain, frozen weights [layers, out, in].
        kind: one of KINDS.
    Raises:
        UserError: qwix is missing, or nf4 and a number of inputs that BLOCK does not divide.
    """
    qwix = _qwix(kind)

    @jax.jit
    def smaller(weight: Float[Array, "layers out in"]):  # a layer at a time: no float32 copy of the stack
        one = jax.lax.map(lambda layer: qwix.quantize(layer.astype(jnp.float32), **_HOW[kind]), weight)
        return one.qvalue, one.scale

    for path, linear in nnx.iter_modules(module):
        if not hasattr(linear, "weight_scale"):
            continue
        num_in = linear.weight.shape[-1]
        if kind == "nf4" and num_in % BLOCK:
            name = ".".join(map(str, path))
            raise UserError(
                f"quantize_llm nf4: {name} has {num_in} inputs, not a multiple of {BLOCK}; use int8"
            )
        values, scale = smaller(linear.weight[...])
        linear.weight, linear.weight_scale = nnx.Param(values), nnx.Param(scale)
        linear.stored_as = kind


def dequantized(
    values: Integer[Array, "out in"], scale: Float[Array, "out blocks"], kind: str
) -> Float[Array, "out in"]:
    """The weight that was stored, float32."""
    qwix = _qwix(kind)
    return qwix.dequantize(qwix.QArray(values, scale, None, _HOW[kind]["qtype"]))
