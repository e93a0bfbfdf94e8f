"""Fifty steps on random batches with one arrangement of devices, and what its program looks like.

shapes.py WORK NAME FSDP [COORDINATOR COUNT INDEX]: writes WORK/NAME.json, saves step 25 in WORK/NAME, and
goes on for five steps from what the arrangement "one" saved.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import hlo
import jax
import training_case as case

from mmrstraj_jax import parallel
from mmrstraj_jax.config import ClusterConfig
from mmrstraj_jax.training import state as states
from mmrstraj_jax.training.checkpoint import Checkpoints
from mmrstraj_jax.training.distributed import Place, Processes
from mmrstraj_jax.training.optimizer import Optimizer
from mmrstraj_jax.training.step import build_step

ROWS, STEPS, SAVED = 8, 50, 25


def batches(mesh, index: int, count: int):
    """Step number -> its batch; each process hands in its own rows."""
    local = ROWS // count

    def batch(step: int):
        whole = case.stacked(case.batch(rows=ROWS, seed=step % 5))
        mine = jax.tree.map(lambda x: x[:, index * local : (index + 1) * local], whole)
        return parallel.shard_batch(mine, mesh, batch_axis=1)

    return batch


def train(step, batch, trainable, opt_state, frozen, first: int, last: int, save=lambda *_: None):
    losses = []
    for number in range(first, last):
        trainable, opt_state, metrics = step(trainable, opt_state, frozen, batch(number), number)
        losses.append(metrics["loss"].item())
        if number + 1 == SAVED:
            save(trainable, opt_state)
    return losses, trainable, opt_state


def main(work: Path, name: str, fsdp: int, place: Place | None) -> None:
    with Processes(place, ClusterConfig()) as processes:
        mesh = parallel.make_mesh(fsdp)
        config = case.config(micro_batch_size=ROWS // jax.device_count(), batch_size=ROWS)
        graphdef, trainable, frozen = states.split(case.model())
        trainable, frozen = (parallel.shard_parameters(tree, mesh) for tree in (trainable, frozen))
        optimizer = Optimizer(config.optim, STEPS)
        opt_state = parallel.init_optimizer(optimizer.init, trainable, mesh)
        placed = parallel.shardings_of((trainable, opt_state))
        like = jax.tree.map(jax.numpy.copy, (trainable, opt_state))  # the step eats its arguments
        step = build_step(graphdef, optimizer, config, placed=placed)
        batch = batches(mesh, processes.index, processes.count)
        checkpoints = Checkpoints(work / name, say=lambda _: None)

        compiled = step.lower(trainable, opt_state, frozen, batch(0), 0).compile()
        if fsdp > 1:
            hlo.check_fsdp(compiled.as_text(), trainable | frozen)
        losses, trainable, _ = train(
            step, batch, trainable, opt_state, frozen, 0, STEPS,
            lambda *state: (checkpoints.save(SAVED, *state, {}), checkpoints.wait()),
        )  # fmt: skip
        report = {
            "devices": jax.device_count(),
            "losses": losses,
            "specs": {leaf: str(value.sharding.spec) for leaf, value in (trainable | frozen).items()},
            "shapes": {leaf: list(value.shape) for leaf, value in (trainable | frozen).items()},
            "collectives": hlo.collectives(compiled.as_text()),
        }
        if name != "one":
            restored = Checkpoints(work / "one").restore(SAVED, *like)
            report["after restore"], *_ = train(step, batch, *restored[1:3], frozen, SAVED, SAVED + 5)
        checkpoints.close()
        if processes.primary:
            (work / f"{name}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    work, name, fsdp, *place = sys.argv[1:]
    main(Path(work), name, int(fsdp), Place(place[0], int(place[1]), int(place[2])) if place else None)
