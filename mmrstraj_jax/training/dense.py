"""Dense pre-training of the tiny tower on exact ground truth: its stand-in for SigLIP's pre-training.

Every patch predicts what covers it, what stands in it and where in the view it is. The mean of a view's
tokens, reduced as AnyRes will reduce them, predicts how many objects the view shows; base view and crops
together predict the counts and the facts of the whole image. All read-outs are linear and are thrown away.
Legend: B images, V views an image, S view side, T patches a view, C classes, K kinds of counts, F facts.
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from mmrstraj_jax.models.layers import Linear
from mmrstraj_jax.synthcity.canvas import CLASSES
from mmrstraj_jax.training.tiny_data import COUNTS, FACTS, OBJECTS, DenseLabels

MAX_COUNT = 10  # this many or more is one class
WEIGHTS = {"classes": 1.0, "counts": 1.0, "position": 0.2, "view": 4.0, "image": 4.0, "facts": 0.3}
_cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Heads(nnx.Module):
    """Linear read-outs, zero at the start, of features of size D."""

    def __init__(self, dim: int, side: int, *, rngs: nnx.Rngs):
        sizes = {"classes": (dim, len(CLASSES)), "counts": (dim, len(COUNTS)), "row": (dim, side)}
        sizes |= {"column": (dim, side), "view": (dim, len(OBJECTS) * (MAX_COUNT + 1))}
        sizes |= {"image": (2 * dim, len(OBJECTS) * (MAX_COUNT + 1))}
        sizes |= {"facts": (2 * dim, sum(map(len, FACTS.values())))}
        for name, (num_in, num_out) in sizes.items():
            head = Linear(num_in, num_out, rngs=rngs)
            head.weight[...] = jnp.zeros((num_out, num_in))
            setattr(self, name, head)


def pooling_weights(side: int, reduced_side: int) -> Float[np.ndarray, " T"]:
    """Weight of each patch in the mean over the bilinearly reduced map of a view."""
    at = (np.arange(reduced_side) + 0.5) * side / reduced_side - 0.5
    low = np.floor(at).astype(int)
    weights = np.zeros(side, np.float32)
    np.add.at(weights, np.clip(low, 0, side - 1), 1 - (at - low))
    np.add.at(weights, np.clip(low + 1, 0, side - 1), at - low)
    weights /= reduced_side
    return np.outer(weights, weights).reshape(-1)


def dense_losses(
    features: Float[Array, "B V T D"],
    heads: Heads,
    labels: DenseLabels,
    side: int,
    reduced_side: int,
) -> dict[str, Float[Array, ""]]:
    """Losses by name, to be weighted by WEIGHTS: nats each, `counts` a Poisson loss up to a constant.

    Args:
        side, reduced_side: patches per side of a view, and what AnyRes will reduce them to.
    """
    rows, views = features.shape[:2]
    features, shares, counts = (
        x.reshape(rows * views, *x.shape[2:]) for x in (features, labels.shares, labels.counts)
    )
    row, column = np.divmod(np.arange(side**2), side)
    pooling = pooling_weights(side, reduced_side)
    log_rate = heads.counts(features)
    pooled = jnp.einsum("ntd,t->nd", features, pooling)
    number = jnp.minimum(counts[..., : len(OBJECTS)].sum(1) + 0.5, MAX_COUNT).astype(jnp.int32)
    whole = number.reshape(rows, views, -1)[:, 0]  # the base view shows all of the image
    views_of = pooled.reshape(rows, views, -1)
    both = jnp.concatenate([views_of[:, 0], views_of[:, 1:].mean(1)], axis=-1)
    facts = jnp.split(heads.facts(both), np.cumsum([*map(len, FACTS.values())])[:-1], axis=-1)
    return {
        "classes": optax.softmax_cross_entropy(heads.classes(features), shares).mean(),
        "counts": (jnp.exp(log_rate) - counts * log_rate).sum(-1).mean(),
        "position": sum(
            _cross_entropy(head(features), jnp.broadcast_to(target, features.shape[:2])).mean()
            for head, target in ((heads.row, row), (heads.column, column))
        ),
        "view": _cross_entropy(heads.view(pooled).reshape(*number.shape, -1), number).mean(),
        "image": _cross_entropy(heads.image(both).reshape(*whole.shape, -1), whole).mean(),
        "facts": sum(
            jnp.where(target >= 0, _cross_entropy(logits, jnp.maximum(target, 0)), 0.0).mean()
            for logits, target in zip(facts, labels.facts.T, strict=True)
        ),
    }


def total(losses: dict[str, Float[Array, ""]]) -> Float[Array, ""]:
    return sum(WEIGHTS[name] * value for name, value in losses.items())
