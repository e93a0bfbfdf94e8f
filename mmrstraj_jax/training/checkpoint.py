"""Checkpoints of everything that changes in a run; the base weights are never in them.

One Orbax step folder `checkpoints/<step>/` holds the trainables (flat names), the optimizer state and
`meta` (step, seed, total steps). It appears under its name only when complete; <step> counts finished
updates.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training.optimizer import OptState, Tree

UNREADABLE = "unreadable-"  # prefix of a step folder that was set aside


class Restored(NamedTuple):
    step: int
    trainable: Tree
    opt_state: OptState
    meta: dict[str, Any]


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree: where restored arrays go, whatever devices saved them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class Checkpoints:
    """Saves in the background, keeps the last `keep_last` steps and the one with the lowest held-out loss.

    Args:
        directory: created on the first save.
        keep_last: None keeps all.
        say: takes one line of text.
    """

    def __init__(self, directory: Path, keep_last: int | None = None, *, say: Callable[[str], None] = print):
        self.directory, self._say = Path(directory).absolute(), say
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["eval_loss"],
            reverse=True,  # descending, and the end of the list is kept: the lowest loss
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        # Most saves have no held-out loss, on purpose; Orbax warns at each of them
        logging.getLogger("absl").addFilter(_expected_warning)
        options = ocp.CheckpointManagerOptions(
            # best_fn only makes Orbax keep metrics; which steps stay is the policy's decision
            best_fn=lambda metrics: metrics["eval_loss"],
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_last), best]),
            cleanup_tmp_directories=True,  # what a kill during a save left behind
            create=True,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps that were completely written, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        trainable: Tree,
        opt_state: OptState,
        meta: Mapping[str, Any],
        eval_loss: float | None = None,
    ) -> None:
        """Copies the state to the host and returns; the files are written in the background.

        An error of the save before surfaces here, or in `close`.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(trainable),
                optimizer=ocp.args.StandardSave(opt_state._asdict()),
                meta=ocp.args.JsonSave(dict(meta) | {"eval_loss": eval_loss}),
            ),
            metrics=None if eval_loss is None else {"eval_loss": eval_loss},
        )

    def restore(self, trainable: Tree, opt_state: OptState) -> Restored | None:
        """The newest step that can be read, into the shapes and shardings given; None when there is none at
        all.

        A step that cannot be read is set aside with a line saying so, and the one before it is used.
        Raises UserError: there are checkpoints, but none can be read. Never starts over silently.
        """
        args = ocp.args.Composite(
            trainable=ocp.args.StandardRestore(abstract(trainable)),
            optimizer=ocp.args.StandardRestore(abstract(opt_state._asdict())),
            meta=ocp.args.JsonRestore(),
        )
        steps = self.steps()
        for step in reversed(steps):
            try:
                found = self._manager.restore(step, args=args)
            except Exception as error:  # Orbax, TensorStore, JSON and the file system raise what they like
                self._set_aside(step, error)
                continue
            return Restored(step, found["trainable"], OptState(**found["optimizer"]), found["meta"])
        if steps:
            raise UserError(
                f"{self.directory}: none of the checkpoints {', '.join(map(str, steps))} can be read; "
                "nothing is started over by itself: restore a copy, or name a new --run-dir"
            )
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        folder = self.directory / str(step)
        aside = self.directory / f"{UNREADABLE}{step}"
        self._say(
            f"WARNING: checkpoint {folder} cannot be read ({_first_line(error)}); "
            f"it is kept as {aside.name}, and the step before it is used"
        )
        if folder.exists():
            folder.rename(aside)
        self._manager.reload()

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises what went wrong with it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go."""
        self._manager.wait_until_finished()
        self._manager.close()


# ---- reading a run, also while it trains ----


def finished_steps(directory: Path) -> list[int]:
    """Steps whose folders are complete, ascending: Orbax gives a folder its number by a rename at the end."""
    return sorted(int(folder.name) for folder in Path(directory).glob("*") if folder.name.isdigit())


def best_step(directory: Path) -> int | None:
    """The step with the lowest held-out loss among those still there; None when none was evaluated."""
    losses = {}
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        for step in finished_steps(directory):
            try:
                loss = reader.restore(Path(directory).absolute() / str(step) / "meta")["eval_loss"]
            except (OSError, ValueError):  # unreadable: no candidate; whoever wants this very step is told
                continue
            if loss is not None:
                losses[step] = loss
    return min(losses, key=losses.get) if losses else None


def read_trainable(
    directory: Path,
    trainable: Tree,
    step: int | str | None = None,
    *,
    say: Callable[[str], None] = print,
) -> tuple[int, Tree]:
    """(step, trainables) of one step, into the shapes and shardings given; nothing on disk changes.

    Args:
        step: a step, "best" for the lowest held-out loss, or None for the newest that can be read (a line
            says so when it is not the newest).
    Raises:
        UserError: no such step, or it cannot be read.
    """
    directory = Path(directory).absolute()
    steps = finished_steps(directory)
    if not steps:
        raise UserError(f"{directory}: no finished checkpoint yet; train until the first save")
    if step == "best":
        step = best_step(directory)
        if step is None:
            raise UserError(f"{directory}: no checkpoint was evaluated, so none is the best; name a step")
    if step is not None and step not in steps:
        raise UserError(
            f"{directory}: no checkpoint of step {step}; expected one of {', '.join(map(str, steps))}"
        )
    problems = []
    with ocp.StandardCheckpointer() as reader:
        for candidate in [step] if step is not None else reversed(steps):
            try:
                return candidate, reader.restore(
                    directory / str(candidate) / "trainable", abstract(trainable)
                )
            except Exception as error:  # Orbax, TensorStore and the file system raise what they like
                problems.append(
                    f"checkpoint {directory / str(candidate)} cannot be read ({_first_line(error)})"
                )
                if candidate != steps[0] and step is None:
                    say(f"WARNING: {problems[-1]}; taking the step before it")
    raise UserError(f"{problems[0]}; restore a copy, or name another step")


def _expected_warning(record: logging.LogRecord) -> bool:
    return "did not provide metrics" not in record.getMessage()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
