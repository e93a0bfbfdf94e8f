"""Dense pre-training of the tiny tower on exact ground truth: its stand-in for SigLIP's pre-training.

Every patch predicts what covers it (class shares), what stands in it (object counts) and where in the view
it is. The heads are thrown away. Only the shipped tiny base is made this way; real towers come from files.
Legend: N views, T patches, C classes, K kinds of objects, s patches per view side.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, Float, UInt8
from PIL import Image

from mmrstraj_jax.config import VisionConfig
from mmrstraj_jax.models.layers import Linear
from mmrstraj_jax.models.siglip import SiglipVisionTower


class DenseBatch(NamedTuple):
    """Views with their labels on the patch grid."""

    views: UInt8[np.ndarray, "N S S 3"]
    shares: Float[np.ndarray, "N T C"]  # share of each patch's pixels by class; rows sum to 1
    counts: Float[np.ndarray, "N T K"]  # object centres in each patch


class Heads(nnx.Module):
    """Linear read-outs of one patch feature."""

    def __init__(self, dim: int, classes: int, kinds: int, side: int, *, rngs: nnx.Rngs):
        self.classes = Linear(dim, classes, rngs=rngs)
        self.counts = Linear(dim, kinds, rngs=rngs)
        self.row = Linear(dim, side, rngs=rngs)
        self.column = Linear(dim, side, rngs=rngs)


def views_with_labels(
    image: UInt8[np.ndarray, "H H 3"],
    shares: Float[np.ndarray, "2s 2s C"],
    counts: Float[np.ndarray, "2s 2s K"],
    view_size: int,
) -> DenseBatch:
    """Base view and 2 x 2 crops of a square image of twice the view size, as Higher AnyRes cuts it."""
    assert image.shape[0] == image.shape[1] == 2 * view_size, image.shape
    base = np.asarray(Image.fromarray(image).resize((view_size, view_size), Image.Resampling.BICUBIC))
    crops = rearrange(image, "(a h) (b w) c -> (a b) h w c", a=2, b=2)

    def cut(labels: np.ndarray, pool: Callable) -> np.ndarray:
        whole = reduce(labels, "(y p) (x q) c -> (y x) c", pool, p=2, q=2)
        parts = rearrange(labels, "(a y) (b x) c -> (a b) (y x) c", a=2, b=2)
        return np.concatenate([whole[None], parts])

    return DenseBatch(np.concatenate([base[None], crops]), cut(shares, "mean"), cut(counts, "sum"))


def pretrain_tower(
    config: VisionConfig,
    batches: Iterable[DenseBatch],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
    report: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
) -> SiglipVisionTower:
    """Trains a fresh float32 tower for `steps` batches with AdamW, warm-up 5 %, cosine to zero.

    Args:
        config: its hidden states after the last layer are what the heads read.
        batches: at least `steps` of them, all of one shape.
        report: called every 50 steps with the losses: classes (nats), counts (Poisson, up to a constant),
            position (nats, row + column).
    """
    rngs = nnx.Rngs(params=jax.random.key(seed))
    tower = SiglipVisionTower(config, rngs=rngs)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 20), steps)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=0.01))
    row, column = np.divmod(np.arange(config.num_patches), config.grid_side)
    graphdef = params = opt_state = step_fn = None
    for step, batch in zip(range(steps), batches, strict=False):
        if step_fn is None:
            sizes = batch.shares.shape[-1], batch.counts.shape[-1], config.grid_side
            heads = Heads(config.output_size, *sizes, rngs=rngs)
            graphdef, params = nnx.split((tower, heads))
            opt_state = adam.init(params)
            step_fn = _build_step(graphdef, adam, row, column)
        params, opt_state, losses = step_fn(params, opt_state, batch)
        if step % 50 == 0 or step == steps - 1:
            report(step, {name: float(value) for name, value in losses.items()})
    assert params is not None and step == steps - 1, "fewer batches than steps"
    return nnx.merge(graphdef, params)[0]


def _build_step(graphdef, adam: optax.GradientTransformation, row: np.ndarray, column: np.ndarray):
    def loss_of(params, batch: DenseBatch) -> tuple[Float[Array, ""], dict[str, Array]]:
        tower, heads = nnx.merge(graphdef, params)
        features = tower(batch.views)
        log_rate = heads.counts(features)
        losses = {
            "classes": optax.softmax_cross_entropy(heads.classes(features), batch.shares).mean(),
            "counts": (jnp.exp(log_rate) - batch.counts * log_rate).sum(-1).mean(),
            "position": sum(
                optax.softmax_cross_entropy_with_integer_labels(
                    head(features), jnp.broadcast_to(target, features.shape[:2])
                ).mean()
                for head, target in ((heads.row, row), (heads.column, column))
            ),
        }
        return losses["classes"] + losses["counts"] + 0.2 * losses["position"], losses

    def step(params, opt_state, batch: DenseBatch):
        (_, losses), grads = jax.value_and_grad(loss_of, has_aux=True)(params, batch)
        updates, opt_state = adam.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, losses

    return jax.jit(step, donate_argnums=(0, 1))
