"""Linear (with its optional LoRA), norms, and the scan over stacked layers.

Weights keep the torch orientation [out, in] of the public checkpoints: loading and exporting copy bytes.
Layers of one kind are stacked on a leading axis; inside `scan_layers` a module sees one slice of it.
Where weights are split over devices (fsdp), the scan is what makes a layer whole, just before its use.
Legend: N rows, T tokens, D features, S leading stack axes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from mmrstraj_jax.models.quantized import dequantized

REMAT_POLICIES = ("none", "block", "dots")
PRODUCT, ATTENTION = "product of a Linear", "attention of XLA"  # what "dots" keeps, by name
FEW_ROWS = 32  # as batches of decoding have


class Trainable(nnx.Param):
    """A parameter that the optimizer updates; kept in float32. Any other nnx.Param is frozen."""


class LoRAParam(Trainable):
    """An adapter matrix. (Not nnx.LoRAParam: that one derives from Param and would also match as frozen.)"""


def normal(key: Key[Array, ""], shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> Array:
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def times(
    x: Float[Array, "*N in"], weight: Float[Array, "out in"], dtype: jnp.dtype | None = None
) -> Float[Array, "*N out"]:
    """x W^T, in `dtype` where it is not that of x."""
    rows = x.size // x.shape[-1]
    on_cpu, rounds = jax.default_backend() == "cpu", x.dtype == jnp.bfloat16
    if on_cpu and (1 if rounds else 2) <= rows <= FEW_ROWS:
        # XLA for CPUs reads a weight up to twice as fast for W x^T as for x W^T. Not for a single row: a
        # float32 one is as fast either way, for a bfloat16 one it makes a float32 copy of the whole weight
        few = x.reshape(rows, -1)
        few = jnp.pad(few, ((0, 1), (0, 0))) if rows == 1 else few
        y = _times(weight, few, dtype)
        y = lax.optimization_barrier(y)  # else the transpose is folded into the product: x W^T again
        return y[:, :rows].T.reshape(*x.shape[:-1], -1)
    if on_cpu and rounds and dtype is None:
        return _rounded_apart(x, weight)
    return _times(x, weight, dtype)


def _times(x: Array, weight: Array, dtype: jnp.dtype | None = None) -> Array:
    # an einsum takes several times as long to trace
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


@jax.custom_jvp
def _rounded_apart(x: Array, weight: Array) -> Array:
    """A product in bfloat16, rounded after it: XLA for CPUs takes longer where it rounds as it multiplies.

    The derivative is the plain product's; this one's would turn the whole weight into float32.
    """
    return _times(x, weight, jnp.float32).astype(x.dtype)


def _rounded_apart_jvp(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Any]:
    (x, weight), (dx, dweight) = primals, tangents
    y = _rounded_apart(x, weight)
    terms = [
        _times(*pair)
        for pair in ((dx, weight), (x, dweight))
        if not any(isinstance(each, jax.custom_derivatives.SymbolicZero) for each in pair)
    ]
    return y, sum(terms[1:], terms[0])


_rounded_apart.defjvp(_rounded_apart_jvp, symbolic_zeros=True)


@jax.custom_vjp
def _widened(low: Float[Array, "*N R"], matrix: Float[Array, "out R"]) -> Float[Array, "*N out"]:
    """low B^T. Its gradient for B is (low^T dy)^T: for dy^T low, XLA for CPUs would transpose all of dy."""
    return _times(low, matrix)


def _widened_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    low, matrix = saved
    rows = tuple(range(dy.ndim - 1))
    gradient = lax.dot_general(low, dy, ((rows, rows), ((), ())))
    gradient = lax.optimization_barrier(gradient)  # else it is turned round again
    return lax.dot_general(dy, matrix, (((dy.ndim - 1,), (0,)), ((), ()))), gradient.T


_widened.defvjp(lambda low, matrix: (_times(low, matrix), (low, matrix)), _widened_backward)


class Linear(nnx.Module):
    """y = x W^T + b, plus the adapter (alpha/r) B A dropout(x) where there is one."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        rngs: nnx.Rngs,
        use_bias: bool = True,
        stack: tuple[int, ...] = (),
        dtype: jnp.dtype = jnp.float32,
    ):
        self.weight = nnx.Param(normal(rngs.params(), (*stack, num_out, num_in), num_in**-0.5, dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, num_out), dtype)) if use_bias else nnx.data(None)
        self.weight_scale = nnx.data(None)  # of a weight that is stored in fewer bits (models.quantized)
        self.stored_as = ""
        self.lora_A = nnx.data(None)
        self.lora_B = nnx.data(None)
        self.lora_scale = 0.0
        self.lora_dropout = 0.0

    def __call__(
        self, x: Float[Array, "N *T in"], keys: Key[Array, " N"] | None = None, tag: int = 0
    ) -> Float[Array, "N *T out"]:
        """Weights are cast to the dtype of x.

        Args:
            x: activations.
            keys: one dropout key per row, or None outside training.
            tag: distinguishes the linears of a block that share the same keys.
        """
        if self.weight_scale is None:
            y = times(x, self.weight[...].astype(x.dtype))
        else:
            y = self._times_stored(x, self.weight[...], self.weight_scale[...])
        y = checkpoint_name(y, PRODUCT)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora_A is not None:
            if keys is not None and self.lora_dropout > 0:
                x = dropout(x, self.lora_dropout, jax.vmap(lambda key: jax.random.fold_in(key, tag))(keys))
            low = _times(x, self.lora_A[...].astype(x.dtype))
            low = checkpoint_name(low, PRODUCT)
            # B's product has no name: as wide as the layer's own, it would double what "dots" keeps
            # The scale is of `low`, which is narrow: behind B, the backward pass would write all of dy again
            y = y + _widened(self.lora_scale * low, self.lora_B[...].astype(x.dtype))
        return y

    def _times_stored(self, x: Array, values: Array, scale: Array) -> Array:
        @jax.checkpoint  # else the backward pass keeps every layer's whole weight
        def times_whole(x, values, scale):
            return times(x, dequantized(values, scale, self.stored_as).astype(x.dtype))

        return times_whole(x, values, scale)


def rounded_once(function: Callable[..., Array], *inputs: Array) -> Array:
    """function of inputs of one dtype, in float32 until the end: XLA for CPUs rounds slowly. It is computed
    again in the backward pass, which would else keep float32 arrays."""
    dtype = inputs[0].dtype
    if dtype == jnp.float32:
        return function(*inputs)

    def rounded(*inputs):
        return function(*(x.astype(jnp.float32) for x in inputs)).astype(dtype)

    return jax.checkpoint(rounded, prevent_cse=False)(*inputs)


def dropout(x: Float[Array, "N *T D"], rate: float, keys: Key[Array, " N"]) -> Float[Array, "N *T D"]:
    """Inverted dropout whose mask depends on each row's key only, not on device count or accumulation.

    16-bit draws halve the cost of the random numbers; the rate is exact to 2^-16.
    """
    threshold = round(rate * 2**16)
    bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint16))(keys)
    return jnp.where(bits >= threshold, x / (1 - rate), 0).astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm with statistics in float32 (torch.nn.LayerNorm)."""

    def __init__(self, dim: int, eps: float, *, stack: tuple[int, ...] = (), dtype: jnp.dtype = jnp.float32):
        self.weight = nnx.Param(jnp.ones((*stack, dim), dtype))
        self.bias = nnx.Param(jnp.zeros((*stack, dim), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
        y = (x32 - mean) * lax.rsqrt(variance + self.eps)
        return (y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Qwen2RMSNorm: mean of squares in float32, cast back, then times the weight."""

    def __init__(self, dim: int, eps: float, *, stack: tuple[int, ...] = (), dtype: jnp.dtype = jnp.float32):
        self.weight = nnx.Param(jnp.ones((*stack, dim), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        x32 = x.astype(jnp.float32)
        y = x32 * lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.weight[...].astype(x.dtype)


def _gathered(leaf: Array, mesh: Mesh) -> Array:
    """One layer's slice of a parameter, complete on every device."""
    # Without this first, empty constraint the second one would reach back to the stack, all of which would
    # then be copied into another layout before the loop
    as_it_lies = P(*[P.UNCONSTRAINED] * leaf.ndim)
    leaf = lax.with_sharding_constraint(leaf, NamedSharding(mesh, as_it_lies))
    return lax.with_sharding_constraint(leaf, NamedSharding(mesh, P()))


def _all_but_fetched(primitive: Any, *_, **__) -> bool:
    return primitive.name not in ("sharding_constraint", "dynamic_slice", "squeeze")


def rematerialised(
    step: Callable, remat: str, *, prevent_cse: bool = True, fetches: bool = False
) -> Callable:
    """The same function under a policy of REMAT_POLICIES.

    Args:
        prevent_cse: can be off inside a scan.
        fetches: step gathers weights, or looks them up in the stack. No policy keeps them, as over all layers
            they would be the whole model: the backward pass fetches them again.
    """
    assert remat in REMAT_POLICIES, remat
    if remat == "none" and not fetches:
        return step
    policy = {
        "none": _all_but_fetched,
        "block": None,
        "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, ATTENTION),
    }[remat]
    return jax.checkpoint(step, prevent_cse=prevent_cse, policy=policy)


def unstacked(layers: nnx.Module) -> nnx.List:
    """The layers of a stack as modules of their own, which `scan_layers` runs one after the other.

    XLA for CPUs copies a slice of the stack before a product reads it: three times the traffic of memory,
    and when one token is decoded nothing else takes time.
    """
    graphdef, params = nnx.split(layers)
    count = jax.tree.leaves(params)[0].shape[0]
    return nnx.List(
        nnx.merge(graphdef, jax.tree.map(lambda leaf, at=number: leaf[at], params)) for number in range(count)
    )


def scan_layers(
    body: Callable[[nnx.Module, Any, Int[Array, ""]], tuple[Any, Any]],
    layers: nnx.Module,
    carry: Any,
    *,
    first: int = 0,
    last: int,
    remat: str = "none",
    unroll: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Any, Any]:
    """Runs body(layer, carry, index) -> (carry, output) over layers first..last-1 of a stacked module.

    Args:
        body: one layer; index is its number, a traced scalar in a loop.
        layers: module whose every parameter has the layer axis first; or `unstacked` ones, for inference.
        carry: any pytree.
        remat: "none" stores every residual, "block" only the carry between layers, "dots" also the products
            of linears, of their adapters' A and, where it is XLA's, of attention's weights and values.
        unroll: a Python loop instead of lax.scan (tests, and small programs).
        mesh: the devices that weights are split over. Each layer is gathered inside the loop, in the forward
            and again in the backward pass, and every leaf of the carry is split along its first axis. None:
            every device has the weights.
    Returns:
        the last carry, and the outputs stacked on a leading layer axis.
    """
    if isinstance(layers, nnx.List):
        assert remat == "none" and mesh is None, "training needs stacked layers"
        outputs = []
        for index in range(first, last):
            carry, output = body(layers[index], carry, index)
            outputs.append(output)
        if not outputs:  # as lax.scan of no step
            none = jax.eval_shape(lambda carry: body(layers[first], carry, first)[1], carry)
            return carry, jax.tree.map(lambda one: jnp.zeros((0, *one.shape), one.dtype), none)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)
    graphdef, params = nnx.split(layers)
    some = (first, last) != (0, jax.tree.leaves(params)[0].shape[0])

    def step(carry, scanned):
        layer_params, index = scanned
        if some:  # a slice of the stack in front of the loop would be a copy of most of the model
            layer_params = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, 0, False), params)
        if mesh is not None:
            layer_params = jax.tree.map(lambda leaf: _gathered(leaf, mesh), layer_params)
            # left alone, the compiler would rather move activations than weights
            carry = lax.with_sharding_constraint(carry, NamedSharding(mesh, P(mesh.axis_names)))
        return body(nnx.merge(graphdef, layer_params), carry, index)

    step = rematerialised(step, remat, prevent_cse=unroll, fetches=some or mesh is not None)
    scanned = (None if some else params, jnp.arange(first, last))
    return lax.scan(step, carry, scanned, unroll=(last - first) if unroll else 1)
