"""Held-out loss and answer accuracy during training."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mmrstraj_jax import parallel
from mmrstraj_jax.training.optimizer import Tree
from mmrstraj_jax.training.setup import Data, eval_batches
from mmrstraj_jax.training.step import EvalStep


def evaluate(
    eval_step: EvalStep,
    trainable: Tree,
    frozen: Tree,
    data: Data,
    mesh: Mesh,
    should_stop: Callable[[], Any],
) -> dict[str, float]:
    """One pass over the held-out rows.

    Returns:
        eval_loss: mean over supervised tokens; eval_accuracy: share of rows whose whole answer is what greedy
        decoding gives; eval_accuracy/<type> where rows have a type. Empty without held-out data, and when
        should_stop() turned true on the way.
    """
    if data.held_out is None:
        return {}
    nll = tokens = 0.0
    right: dict[str, list[bool]] = defaultdict(list)
    rows = data.held_out.index.rows
    for numbers, batch in eval_batches(data.held_out):
        if should_stop():
            return {}
        scored = eval_step(trainable, frozen, parallel.shard_batch(batch, mesh, batch_axis=0))
        nll += float(np.asarray(scored.nll, np.float64).sum())
        tokens += float(np.asarray(scored.tokens, np.float64).sum())
        for number, correct in zip(numbers.tolist(), np.asarray(scored.correct).tolist(), strict=True):
            if number >= 0:
                right[""].append(correct)
                if kind := data.types.get((rows[number].source, rows[number].line)):
                    right[kind].append(correct)
    scores = {"eval_loss": nll / tokens}
    for kind, values in sorted(right.items()):
        scores[f"eval_accuracy/{kind}" if kind else "eval_accuracy"] = sum(values) / len(values)
    return scores
