"""Teaches the tiny base where to look: one layer's attention, at an answer, on what is asked about.

The look-up of one object among the image tokens does not form in an hour from answers alone. The world knows
where the objects are, so the attention of one layer is trained on it: head 0 looks at the first thing that a
question names in the base view, head 1 at the same in the crops. The third is left to averages, which areas
and counts are read from.
Legend: B images, Q questions, K supervised positions, P prefix tokens, N places of a thing.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mmrstraj_jax.data.anyres import Plan

MOST_PLACES = 4  # a thing with more of them is not pointed at
_HEADS = ("base", "crop")  # which tokens head 0, 1 look at


class TokenPlaces(NamedTuple):
    """Where the prefix tokens of images of one size look, as shares of width and height; v down."""

    center: Float[np.ndarray, "P 2"]
    reach: Float[np.ndarray, "P 2"]  # three quarters of a token's own size; 0: not of the image
    is_crop: Bool[np.ndarray, " P"]

    @classmethod
    def of(cls, plan: Plan, num_prefix: int) -> "TokenPlaces":
        """The image's tokens are the last but one of the prefix, and the crops cover the image."""
        assert plan.kind == "anyres" and plan.resize is None and plan.num_views > 1
        size, (height, width) = plan.reduced_side, (plan.map_height, plan.map_width)
        base = _grid(size, size)
        crops = np.full((height, width + 1, 4), np.nan)  # a row ends with a newline
        crops[:, :-1] = _grid(height, width).reshape(height, width, 4)
        found = np.full((num_prefix, 4), np.nan)
        start = num_prefix - 1 - plan.num_tokens
        found[start:-1] = np.concatenate([base, crops.reshape(-1, 4)])
        is_crop = np.arange(num_prefix) >= start + len(base)
        found = np.nan_to_num(found).astype(np.float32)
        return cls(found[:, :2], found[:, 2:], is_crop)


def _grid(rows: int, columns: int) -> Float[np.ndarray, "cells 4"]:
    v, u = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    reach = np.broadcast_to((0.75 / columns, 0.75 / rows), (rows * columns, 2))
    return np.concatenate([np.stack([u, v], -1).reshape(-1, 2), reach], axis=1)


def pack_places(places: list[list]) -> Float[np.ndarray, "M N 2"]:
    """The first of Question.places of each question of an image; NaN where there is nothing to look at."""
    packed = np.full((len(places), MOST_PLACES, 2), np.nan, np.float16)
    for row, things in enumerate(places):
        if things and 0 < len(things[0]) <= MOST_PLACES:
            packed[row, : len(things[0])] = things[0]
    return packed


def pointing_loss(
    looks: Float[Array, "B Q K heads P"],
    places: Float[Array, "B Q N 2"],
    weights: Bool[Array, "B Q K"],
    tokens: TokenPlaces,
) -> Float[Array, ""]:
    """Mean of -log of n times the attention on each of the n places: 0 when it is shared evenly among them.

    Args:
        looks: attention on the prefix tokens where each supervised token is predicted.
        weights: the supervised positions; the last of a question, which predicts its end, looks anywhere.
    """
    given = jnp.isfinite(places[..., 0])
    near = jnp.abs(jnp.nan_to_num(places)[..., None, :] - tokens.center) < tokens.reach
    near = near.all(-1) & given[..., None]  # [B Q N P]
    number = given.sum(-1, keepdims=True)
    answers = weights & jnp.roll(weights, -1, axis=-1).at[..., -1].set(False)
    loss, total = 0.0, 0.0
    for head, kind in enumerate(_HEADS):
        allowed = near & (tokens.is_crop == (kind == "crop"))
        mass = jnp.einsum("bqkp,bqnp->bqkn", looks[:, :, :, head], allowed.astype(looks.dtype))
        counts = answers[..., None] & given[:, :, None]
        loss -= jnp.where(counts, jnp.log(mass * number[:, :, None] + 1e-4), 0.0).sum()
        total += counts.sum()
    return loss / jnp.maximum(total, 1)
