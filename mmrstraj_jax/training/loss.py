"""Cross-entropy on supervised positions only; the full [B, L, W] logits never exist.

The host finds the supervised positions (`data/collate.py`), the model gives their hidden states, and here
they are scored a chunk at a time.
Legend: A micro-batches, B rows, L tokens, K supervised positions a row (padded), H hidden, W vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# 2^26 float32 logits are 256 MiB: at 152,064 words, 441 positions at a time.
MAX_LOGITS = 2**26


class RowLoss(NamedTuple):
    """Per row, so that any normalisation is a weighted sum of rows."""

    nll: Float[Array, " B"]  # sum over the row's targets of weight x negative log likelihood, float32
    correct: Bool[Array, " B"]  # greedy decoding gives every answer token; False for a row without an answer


def chunk_positions(num_rows: int, num_positions: int, vocab_size: int) -> int:
    """Positions of each row scored at once, so that no more than MAX_LOGITS logits are live."""
    return max(1, min(num_positions, MAX_LOGITS // (num_rows * vocab_size)))


def supervised_loss(
    logits: Callable[[Float[Array, "B C H"]], Float[Array, "B C W"]],
    hidden: Float[Array, "B K H"],
    targets: Int[Array, "B K"],
    weights: Float[Array, "B K"],
    answer: Bool[Array, "B K"],
    *,
    chunk: int,
) -> RowLoss:
    """Weighted negative log likelihood of each row, and whether its whole answer is the argmax.

    Args:
        logits: float32 logits of hidden states (MMRSTraj.logits).
        hidden: normed hidden states of where each target is predicted from, one token before it.
        targets: token ids; anything valid where the weight is 0.
        weights: 1 per supervised target, 0 for padding.
        answer: the targets that count for `correct` (the answer and its end, without the template).
        chunk: positions scored at once (`chunk_positions`); several chunks are computed again going back.
    """
    rows, num_positions = targets.shape

    def in_chunks(x):
        x = jnp.pad(x, ((0, 0), (0, -num_positions % chunk), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)

    chunks = [in_chunks(x) for x in (hidden, targets, weights, answer)]

    def score(carry, scanned):
        nll, correct = carry
        hidden, targets, weights, answer = scanned
        scores_BCW = logits(hidden).astype(jnp.float32)
        target_scores = jnp.take_along_axis(scores_BCW, targets[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(scores_BCW, axis=-1) - target_scores
        # where, not times: a non-finite loss at a padded position must not become 0 x inf
        nll = nll + jnp.where(weights > 0, weights * losses, 0.0).sum(-1)
        correct = correct & ((jnp.argmax(scores_BCW, axis=-1) == targets) | ~answer).all(-1)
        return (nll, correct), None

    if chunk < num_positions:  # one chunk's logits may stay: in its backward pass they would live anyway
        score = jax.checkpoint(score)
    start = (jnp.zeros(rows, jnp.float32), answer.any(-1))
    (nll, correct), _ = lax.scan(score, start, tuple(chunks))
    return RowLoss(nll, correct)


def row_coefficients(
    weights: Float[Array, "A B K"], normalization: str, micro_batch_size: int
) -> Float[Array, "A B"]:
    """c such that the loss of an accumulated global batch is sum(c x RowLoss.nll); known before the model
    runs.

    Args:
        weights: of all targets of the global batch.
        normalization: "token": mean over all targets of the global batch, the same under any sharding and
            accumulation (HF Trainer >= 4.46); "microbatch": mean over micro-batches of their token means (the
            original's loss), micro-batches without a target left out.
        micro_batch_size: rows of one micro-batch of one device; B holds those of all devices.
    """
    row_weights = weights.sum(-1)
    if normalization == "token":
        return jnp.broadcast_to(1.0 / jnp.maximum(row_weights.sum(), 1.0), row_weights.shape)
    assert normalization == "microbatch", normalization
    group_weights = row_weights.reshape(row_weights.shape[0], -1, micro_batch_size).sum(-1)
    num_groups = jnp.maximum((group_weights > 0).sum(), 1)
    return jnp.repeat(1.0 / (jnp.maximum(group_weights, 1.0) * num_groups), micro_batch_size, axis=1)
