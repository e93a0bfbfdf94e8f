"""Many questions about one image for the price of one: all of them stand behind a single image prefix.

A question sees the prefix (system line and image) and itself, at the positions it has alone, so the answers
are those of single-turn inference. Legend: B images, P prefix tokens, Q questions an image, L tokens a
question, K supervised positions of it, H hidden, V views, T patches a view, F tower features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mmrstraj_jax.data import chat
from mmrstraj_jax.data.anyres import Plan
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.models.layers import scan_layers
from mmrstraj_jax.models.mmrstraj import MMRSTraj
from mmrstraj_jax.models.token_reduction import merge_with_text, visual_pool
from mmrstraj_jax.synthcity.sample import conversation

Turn = tuple[str, str]  # question, answer


class Prefix(NamedTuple):
    """What stands before the first question about an image of one size; the same for all of them."""

    ids: Int[np.ndarray, " P"]
    visual_index: Int[np.ndarray, " P"]  # -1: text
    num_ids: int  # with the image as one token: where the first question begins

    @classmethod
    def of(cls, plan: Plan, tokenizer: Tokenizer) -> "Prefix":
        ids = chat.encode_spans(conversation([("?", "!")]), tokenizer).ids
        slot = int(np.flatnonzero(ids == tokenizer.image_id)[0])
        end = slot + 2  # the newline after the image belongs to the prefix
        visual = np.full(plan.num_tokens, tokenizer.pad_id)
        index = np.full(slot + plan.num_tokens + 1, -1, np.int32)
        index[slot : slot + plan.num_tokens] = plan.index(0, plan.num_views)
        return cls(np.concatenate([ids[:slot], visual, ids[slot + 1 : end]]).astype(np.int32), index, end)


class Segments(NamedTuple):
    """Questions or whole conversations, each behind its prefix; leading axes B Q, or any."""

    ids: Int[np.ndarray, "*B L"]
    positions: Int[np.ndarray, "*B K"]  # the token before each supervised one
    targets: Int[np.ndarray, "*B K"]
    weights: Bool[np.ndarray, "*B K"]  # all False: padding

    def at(self, index) -> "Segments":
        return Segments(*(x[index].astype(np.int32) for x in self))


def segment(
    turns: Sequence[Turn], tokenizer: Tokenizer, skip: int, mask: str, *, image: bool = True
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Ids behind the first `skip` and which of them are supervised, up to the last supervised one."""
    encoded = chat.encode_spans(conversation(turns, image), tokenizer, "image" if image else "text")
    supervised = chat.labels_of(encoded, tokenizer, mask)[skip:] != chat.IGNORE
    supervised[0] = False  # predicted from before the segment
    end = int(np.flatnonzero(supervised)[-1]) + 1
    return encoded.ids[skip:][:end], supervised[:end]


def pack(segments: Sequence[tuple[np.ndarray, np.ndarray]], length: int, supervised: int) -> Segments:
    """Segments of fixed size; one that does not fit becomes padding."""
    shapes = (length, supervised, supervised, supervised)
    ids, positions, targets = (np.zeros((len(segments), size), np.int16) for size in shapes[:3])
    weights = np.zeros((len(segments), supervised), bool)
    for row, (tokens, mask) in enumerate(segments):
        where = np.flatnonzero(mask)
        if len(tokens) - 1 > length or len(where) > supervised:
            continue
        ids[row, : len(tokens) - 1] = tokens[:-1]  # nothing is predicted from the last
        positions[row, : len(where)], targets[row, : len(where)] = where - 1, tokens[where]
        weights[row, : len(where)] = True
    return Segments(ids, positions, targets, weights)


def image_tokens(
    model: MMRSTraj, features: Float[Array, "B V T F"], view_scale: float | None
) -> Float[Array, "B S H"]:
    """The visual pool of images of one size, from tower features."""
    rows, views = features.shape[:2]
    tokens = model.multi_modal_projector(features.reshape(rows * views, *features.shape[2:]))
    scale = None if view_scale is None else jnp.full((rows, views), view_scale)
    tokens = tokens.reshape(rows, views, *tokens.shape[1:])
    return visual_pool(tokens, model.image_newline[...], scale, None, None)


def hidden_states(
    model: MMRSTraj,
    pool: Float[Array, "B S H"],
    prefix: Prefix,
    parts: Sequence[Int[Array, "B Q L"]],
    looking: Int[Array, "B Q K"],
) -> tuple[list[Float[Array, "B Q L H"]], Float[Array, "N B Q K heads P"]]:
    """Normed hidden states of the prefix ([B, 1, P, H]) and of each part's segments; and the attention that
    the first part's positions `looking` pay to each prefix token in each of the N layers.
    """
    llm, rows = model.language_model, pool.shape[0]
    index = jnp.broadcast_to(prefix.visual_index, (rows, len(prefix.ids)))
    text = jnp.broadcast_to(llm.embed(prefix.ids), (rows, len(prefix.ids), pool.shape[-1]))
    groups = [(1, len(prefix.ids)), *(part.shape[1:] for part in parts)]
    x = [
        merge_with_text(text, pool, index),
        *(llm.embed(part).reshape(rows, -1, pool.shape[-1]) for part in parts),
    ]
    starts = [0, *[len(prefix.ids)] * len(parts)]
    at = [
        np.tile(start + np.arange(length), count)
        for start, (count, length) in zip(starts, groups, strict=True)
    ]
    x, at = jnp.concatenate(x, axis=1), np.concatenate(at)[None]
    ends = np.cumsum([count * length for count, length in groups])

    def attend(q, k, v):
        groups_of_heads = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(t, groups_of_heads, axis=2) for t in (k, v))
        q, k, v = (jnp.split(t, ends[:-1], axis=1) for t in (q * q.shape[-1] ** -0.5, k, v))
        mixed = [_attend(q[0], k[0], v[0], groups[0])[0]]
        paid = None
        for *part, group in zip(q[1:], k[1:], v[1:], groups[1:], strict=True):
            out, on_prefix = _attend(*part, group, k[0], v[0])
            mixed.append(out)
            paid = on_prefix if paid is None else paid
        return jnp.concatenate(mixed, axis=1), paid

    rope = llm.rope(x, jnp.asarray(at))

    def body(layer, x, _):
        kept = []

        def attend_and_keep(q, k, v):
            out, paid = attend(q, k, v)
            kept.append(jnp.take_along_axis(paid, looking[:, None, :, :, None], axis=3))
            return out

        return layer(x, attend_and_keep, rope), jnp.moveaxis(kept[0], 1, 3)

    x, looks = scan_layers(body, llm.layers, x, last=llm.config.num_hidden_layers)
    parts = jnp.split(llm.norm(x), ends[:-1], axis=1)
    return [part.reshape(rows, *group, -1) for part, group in zip(parts, groups, strict=True)], looks


def _attend(q, k, v, group: tuple[int, int], prefix_k=None, prefix_v=None) -> tuple[Array, Array | None]:
    """Causal attention within each segment and, if given, to the whole prefix: one softmax over both.

    Returns:
        [B, Q*L, heads, D], and what each token pays to the prefix, [B, heads, Q, L, P].
    """
    rows, _, heads, dim = q.shape
    own = [t.reshape(rows, *group, heads, dim) for t in (q, k, v)]
    scores = jnp.einsum("bqihd,bqjhd->bhqij", own[0], own[1])
    scores = jnp.where(np.tri(group[1], dtype=bool), scores, -1e30)
    if prefix_k is None:
        return jnp.einsum("bhqij,bqjhd->bqihd", jax.nn.softmax(scores), own[2]).reshape(q.shape), None
    before = jnp.einsum("bihd,bjhd->bhij", q, prefix_k).reshape(*scores.shape[:4], -1)
    top = lax.stop_gradient(jnp.maximum(scores.max(-1), before.max(-1)))[..., None]
    inside, before = jnp.exp(scores - top), jnp.exp(before - top)
    total = inside.sum(-1) + before.sum(-1)
    mixed = jnp.einsum("bhij,bjhd->bihd", before.reshape(rows, heads, q.shape[1], -1), prefix_v)
    mixed += jnp.einsum("bhqij,bqjhd->bqihd", inside, own[2]).reshape(q.shape)
    mixed /= jnp.moveaxis(total.reshape(rows, heads, -1), 1, 2)[..., None]
    return mixed, before / total[..., None]


def score(
    model: MMRSTraj, hidden: Float[Array, "B Q L H"], segments: Segments
) -> tuple[Float[Array, ""], Bool[Array, "B Q"]]:
    """Mean negative log likelihood of the supervised tokens; whether each segment's are all the argmax."""
    _, positions, targets, weights = segments
    logits = model.logits(jnp.take_along_axis(hidden, positions[..., None], axis=2))
    losses = (
        jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    )
    correct = ((logits.argmax(-1) == targets) | (weights == 0)).all(-1)
    return (losses * weights).sum() / jnp.maximum(weights.sum(), 1), correct
