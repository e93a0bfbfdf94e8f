"""LoRA, and what "trainable" means in this package: a type, not a name pattern.

`nnx.split(model, Trainable, ...)` separates what trains from what is frozen. LoRA follows PEFT
(y = Wx + (alpha / r) B A dropout(x); A kaiming-uniform(a=sqrt 5), B zero).
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from mmrstraj_jax.config import LoRAConfig
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.layers import Linear, LoRAParam, Trainable

# config name of a part -> attribute of MMRSTraj
PARTS = {
    "vision_tower": "vision_tower",
    "projector": "multi_modal_projector",
    "newline": "image_newline",
    "language_model": "language_model",
}


def _named_linears(module: nnx.Module) -> Iterator[tuple[str, Linear]]:
    for path, node in nnx.iter_modules(module):
        if isinstance(node, Linear):
            yield str(path[-1]), node


def add_lora(model: nnx.Module, config: LoRAConfig, key: Key[Array, ""]) -> None:
    """Gives every targeted Linear its adapter, in place: A random, B zero, both float32.

    Args:
        model: an MMRSTraj, its linears without adapters.
        config: targets per part by HF module name (`q_proj`, `fc1`, `linear_1`, ...).
        key: randomness of A; each linear uses a key of its own, in tree order.
    Raises:
        UserError: a target that no linear of the part has.
    """
    for field in ("vision_tower", "projector", "language_model"):
        targets = set(getattr(config, field))
        found = set()
        for name, linear in _named_linears(getattr(model, PARTS[field])):
            if name not in targets:
                continue
            found.add(name)
            key, key_a = jax.random.split(key)
            *stack, num_out, num_in = linear.weight.shape
            bound = num_in**-0.5  # kaiming_uniform(a=sqrt 5)
            linear.lora_A = LoRAParam(
                jax.random.uniform(key_a, (*stack, config.rank, num_in), jnp.float32, -bound, bound)
            )
            linear.lora_B = LoRAParam(jnp.zeros((*stack, num_out, config.rank), jnp.float32))
            linear.lora_scale = config.alpha / config.rank
            linear.lora_dropout = config.dropout
        if missing := sorted(targets - found):
            have = sorted({name for name, _ in _named_linears(getattr(model, PARTS[field]))})
            raise UserError(f"lora.{field} {missing}: no such linear; expected some of {', '.join(have)}")


def merge_lora(model: nnx.Module) -> None:
    """Adds every adapter into its weight (in float32, then cast back) and removes it, in place."""
    for _, linear in _named_linears(model):
        if linear.lora_A is None:
            continue
        delta: Float[Array, "*stack out in"] = linear.lora_scale * jnp.einsum(
            "...or,...ri->...oi", linear.lora_B[...], linear.lora_A[...], precision="highest"
        )
        weight = linear.weight[...]
        linear.weight[...] = (weight.astype(jnp.float32) + delta).astype(weight.dtype)
        linear.lora_A = linear.lora_B = None


def train_in_full(model: nnx.Module, parts: tuple[str, ...]) -> None:
    """Turns every parameter of the named parts into a float32 Trainable, in place.

    Raises:
        UserError: a part that is not one of PARTS.
    """
    for part in parts:
        if part not in PARTS:
            raise UserError(f"train_full {part!r}: expected some of {', '.join(PARTS)}")
        node = getattr(model, PARTS[part])
        if isinstance(node, nnx.Param):
            setattr(model, PARTS[part], Trainable(node[...].astype(jnp.float32)))
            continue
        for _, module in list(nnx.iter_modules(node)):
            for name, value in list(vars(module).items()):
                if isinstance(value, nnx.Param) and not isinstance(value, Trainable):
                    setattr(module, name, Trainable(value[...].astype(jnp.float32)))
