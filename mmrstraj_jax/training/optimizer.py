"""AdamW with a learning rate per group and one shared schedule (paper section 5.1).

Trees here are flat: {"vision_tower.layers.mlp.fc1.lora_A": array, ...}. Groups follow the name, as in LLaVA:
vision_tower -> optim.tower_lr, multi_modal_projector -> optim.projector_lr, everything else ->
optim.other_lr.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mmrstraj_jax.config import OptimConfig, warmup_steps
from mmrstraj_jax.errors import UserError

Tree = dict[str, Array]
# group -> field of OptimConfig
GROUPS = {"tower": "tower_lr", "projector": "projector_lr", "other": "other_lr"}


def group_of(name: str) -> str:
    """The learning-rate group of a parameter, by the first part of its name."""
    top = name.split(".", 1)[0]
    return {"vision_tower": "tower", "multi_modal_projector": "projector"}.get(top, "other")


def check_groups(names: Collection[str], overridden: Collection[str]) -> None:
    """Raises UserError where something trains nothing: no parameter at all, or an empty group's lr was set
    by hand.
    """
    if not names:
        raise UserError(
            "nothing to train: name targets in lora.vision_tower, lora.projector or lora.language_model, "
            "or parts in train_full"
        )
    held = {group_of(name) for name in names}
    for group, field in GROUPS.items():
        if group not in held and f"optim.{field}" in overridden:
            raise UserError(
                f"optim.{field}: group {group!r} has no trainable parameter, so its learning rate would do "
                f"nothing; drop the option, or train a part of that group (--lora.*, --train-full)"
            )


def _decays(name: str) -> bool:
    """HF Trainer's rule: weight decay on everything but biases and norms."""
    *parents, last = name.split(".")
    return last != "bias" and not any("norm" in part for part in parents)


class OptState(NamedTuple):
    """What the optimizer remembers; all of it is in a checkpoint."""

    adam: Any  # optax state: count and float32 moments, flat trees
    skipped: Int[Array, ""]  # updates in a row that were not applied: not finite, or above skip_norm


class Optimizer:
    """Pure functions over flat trees. total_steps is N of the schedule."""

    def __init__(self, config: OptimConfig, total_steps: int):
        self.config = config
        self.total_steps = total_steps
        self.warmup = warmup_steps(total_steps, config.warmup_ratio)
        self._adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32)

    def init(self, trainable: Tree) -> OptState:
        return OptState(self._adam.init(trainable), jnp.zeros((), jnp.int32))

    def multiplier(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Schedule at a 0-based step: linear from 0 over ceil(warmup_ratio N) steps, then down to 0 at N.

        The first step's learning rate is 0, as in HF's get_cosine_schedule_with_warmup.
        """
        step = jnp.asarray(step, jnp.float32)
        progress = (step - self.warmup) / max(1, self.total_steps - self.warmup)
        after = {
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
            "linear": 1.0 - progress,
            "constant": jnp.ones_like(progress),
        }[self.config.schedule]
        return jnp.where(step < self.warmup, step / max(1, self.warmup), after)

    def learning_rates(self, step: Int[Array, ""]) -> dict[str, Float[Array, ""]]:
        """Learning rate of each group at a 0-based step."""
        scale = self.multiplier(step)
        return {group: scale * getattr(self.config, field) for group, field in GROUPS.items()}

    def update(
        self, grads: Tree, state: OptState, trainable: Tree, loss: Float[Array, ""], step: Int[Array, ""]
    ) -> tuple[Tree, OptState, dict[str, Array]]:
        """One AdamW step (torch.optim.AdamW), gradients clipped to the global norm over all groups before
        Adam.

        With a non-finite loss or gradient norm, or one above skip_norm, nothing changes but `skipped`.
        Metrics: grad_norm (before clipping), lr/<group> of the groups that hold parameters, skipped.
        """
        grad_norm = optax.tree.norm(grads)
        usable = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if self.config.skip_norm > 0:
            usable &= grad_norm <= self.config.skip_norm
        if self.config.clip_norm > 0:
            # torch.nn.utils.clip_grad_norm_, its 1e-6 included
            scale = jnp.minimum(1.0, self.config.clip_norm / (grad_norm + 1e-6))
            grads = jax.tree.map(lambda grad: grad * scale, grads)
        rates = self.learning_rates(step)
        direction, adam = self._adam.update(grads, state.adam)

        def stepped(name: str, value: Array) -> Array:
            rate = rates[group_of(name)]
            decay = self.config.weight_decay if _decays(name) else 0.0
            return value - rate * (direction[name] + decay * value)

        updated = {name: stepped(name, value) for name, value in trainable.items()}
        updated, adam = jax.tree.map(
            lambda new, old: jnp.where(usable, new, old), (updated, adam), (trainable, state.adam)
        )
        skipped = jnp.where(usable, 0, state.skipped + 1)
        held = {group_of(name) for name in trainable}
        metrics = {f"lr/{group}": rate for group, rate in rates.items() if group in held}
        return updated, OptState(adam, skipped), metrics | {"grad_norm": grad_norm, "skipped": skipped}


def moment_bytes(trainable: Mapping[str, Any]) -> int:
    """Bytes of the two float32 moments."""
    return sum(2 * 4 * leaf.size for leaf in trainable.values())
