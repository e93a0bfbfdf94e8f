"""The compiled programs of training: one step on an accumulated global batch, and one evaluation batch.

Both are a single jax.jit over pure functions of flat trees. A: micro-batches, B: rows of one over all
devices.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mmrstraj_jax import parallel
from mmrstraj_jax.config import Config
from mmrstraj_jax.models.mmrstraj import Inputs
from mmrstraj_jax.models.qwen2 import along_rows
from mmrstraj_jax.training.loss import RowLoss, chunk_positions, row_coefficients, supervised_loss
from mmrstraj_jax.training.optimizer import Optimizer, OptState, Tree
from mmrstraj_jax.training.state import merge


class Batch(TypedDict):
    """What collate makes of rows; training stacks micro-batches on a leading axis A."""

    inputs: Inputs
    positions: Int[Array, "B K"]
    targets: Int[Array, "B K"]
    weights: Float[Array, "B K"]
    answer: Bool[Array, "B K"]


TrainStep = Callable[[Tree, OptState, Tree, Batch, int], tuple[Tree, OptState, dict[str, Array]]]


def last_layer_is_short(batch: Batch, trainable: Iterable[str]) -> bool:
    """Whether the last decoder layer asks for the supervised positions alone.

    They must be few, as their scores are materialised; and the layer's own weights frozen: it is looked up in
    the stack, whose gradient would be a whole stack for one layer.
    """
    few = 4 * batch["positions"].shape[-1] <= batch["inputs"].input_ids.shape[-1]
    stack = "language_model.layers."
    return few and not any(name.startswith(stack) and ".lora_" not in name for name in trainable)


def _row_loss(
    graphdef: nnx.GraphDef,
    trainable: Tree,
    frozen: Tree,
    batch: Batch,
    key: Array | None,
    remat: str,
    mesh: Mesh | None,
) -> RowLoss:
    """mesh: of weights that are split (parallel.weights_mesh)."""
    model = merge(graphdef, parallel.gather_unstacked(trainable | frozen, mesh))
    how = {"remat": remat, "mesh": mesh}
    if last_layer_is_short(batch, trainable):
        hidden = model.hidden_states(batch["inputs"], key, at=batch["positions"], **how)
    else:
        hidden = along_rows(model.hidden_states(batch["inputs"], key, **how), batch["positions"])
    vocab_size = model.language_model.config.vocab_size
    return supervised_loss(
        model.logits,
        hidden,
        batch["targets"],
        batch["weights"],
        batch["answer"],
        chunk=chunk_positions(*batch["positions"].shape, vocab_size),
    )


def gradients(
    graphdef: nnx.GraphDef,
    config: Config,
    trainable: Tree,
    frozen: Tree,
    batch: Batch,
    step: Int[Array, ""],
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], Tree]:
    """Loss of the accumulated batch [A, B, ...] and its float32 gradients with respect to the trainables
    only.

    The loss is linear in its rows (loss.row_coefficients), so micro-batches simply add up.

    Args:
        mesh: of weights that are split over devices (parallel.weights_mesh).
    """
    coefficients = row_coefficients(batch["weights"], config.loss_normalization, config.micro_batch_size)
    key = None
    if config.lora.dropout > 0:
        # counts, not the generator's state: device count, accumulation and resume cannot change the masks
        key = jax.random.fold_in(jax.random.key(config.seed), step)

    def micro_loss(trainable: Tree, micro: Batch, coefficients: Float[Array, " B"]) -> Float[Array, ""]:
        rows = _row_loss(graphdef, trainable, frozen, micro, key, config.remat, mesh)
        return jnp.sum(coefficients * rows.nll)

    def accumulate(carry, scanned):
        loss, grads = jax.value_and_grad(micro_loss)(trainable, *scanned)
        return jax.tree.map(jnp.add, carry, (loss, grads)), None

    zeros = (jnp.zeros(()), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trainable))
    (loss, grads), _ = lax.scan(accumulate, zeros, (batch, coefficients))
    return loss, grads


def build_step(
    graphdef: nnx.GraphDef, optimizer: Optimizer, config: Config, *, placed: Any = None
) -> TrainStep:
    """step(trainable, opt_state, frozen, batch, step) -> (trainable, opt_state, metrics).

    trainable and opt_state are donated, frozen never is. `step` is 0-based and traced. Metrics are scalars on
    the device: loss, grad_norm, lr/<group>, skipped, targets (supervised tokens), tokens (without padding).

    Args:
        placed: shardings of (trainable, opt_state) that results keep. On several devices the compiler may
            otherwise move a leaf, and the next step would be another program.
    """

    mesh = None if placed is None else jax.tree.leaves(placed)[0].mesh
    split_over = parallel.weights_mesh(mesh)

    def train_step(trainable: Tree, opt_state: OptState, frozen: Tree, batch: Batch, step: Int[Array, ""]):
        loss, grads = gradients(graphdef, config, trainable, frozen, batch, step, split_over)
        trainable, opt_state, metrics = optimizer.update(grads, opt_state, trainable, loss, step)
        metrics |= {
            "loss": loss,
            "targets": batch["weights"].sum().astype(jnp.int32),
            "tokens": jnp.sum(batch["inputs"].lengths * (batch["weights"].sum(-1) > 0)),
        }
        return trainable, opt_state, metrics

    if mesh is None:
        return jax.jit(train_step, donate_argnums=(0, 1))
    everywhere = NamedSharding(mesh, P())  # every process reads the metrics
    return jax.jit(train_step, donate_argnums=(0, 1), out_shardings=(*placed, everywhere))


class RowScore(NamedTuple):
    """Per row of an evaluation batch."""

    nll: Float[Array, " B"]  # as in RowLoss
    correct: Bool[Array, " B"]
    tokens: Float[Array, " B"]  # supervised tokens


EvalStep = Callable[[Tree, Tree, Batch], RowScore]


def build_eval_step(graphdef: nnx.GraphDef, mesh: Mesh | None = None) -> EvalStep:
    """eval_step(trainable, frozen, batch [B, ...]) -> RowScore of all rows, without dropout.

    `correct` is greedy exact match: under teacher forcing every answer token is the argmax exactly when
    greedy decoding produces the answer.

    Args:
        mesh: where the result is wanted whole, so that every process can read it.
    """

    def eval_step(trainable: Tree, frozen: Tree, batch: Batch) -> RowScore:
        rows = _row_loss(graphdef, trainable, frozen, batch, None, "none", parallel.weights_mesh(mesh))
        return RowScore(rows.nll, rows.correct, batch["weights"].sum(-1))

    return jax.jit(eval_step, out_shardings=None if mesh is None else NamedSharding(mesh, P()))
