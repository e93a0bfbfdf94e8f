"""Checkpoints of everything that changes in a run; the base weights are never in them.

A step folder `checkpoints/<step>/` holds the trainables and the optimizer state (Orbax, flat names) and
manifest.json (SHA-256 of every file; step, seed, total steps, held-out loss). It gets its name by a rename
when all of that is on disk: a number is a complete checkpoint. <step> counts finished updates. With several
processes all of them write their shards, and the first one seals, names and removes folders.
"""

import contextlib
import math
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training import manifest
from mmrstraj_jax.training.manifest import Damaged
from mmrstraj_jax.training.optimizer import OptState, Tree

UNREADABLE = "unreadable-"  # prefix of a step folder that was set aside
PARTIAL = ".partial"  # suffix of one that is being written
# Seconds that Orbax gives a save, by a clock that may be set right meanwhile; what hangs is the watchdog's
PATIENCE = 20 * 86400
REMOVED = "removed-"  # prefix of one that is being deleted


class SaveFailed(Exception):
    """A checkpoint could not be written; those before it are untouched."""


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
        directory: created by the first save.
        keep_last: None keeps all.
        say: takes one line of text.
    """

    def __init__(self, directory: Path, keep_last: int | None = None, *, say: Callable[[str], None] = print):
        self.directory, self._keep_last, self._say = Path(directory).absolute(), keep_last, say
        self._primary = jax.process_index() == 0
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), timeout_secs=PATIENCE)
        self._thread: threading.Thread | None = None
        self._saving: int | None = None
        self._error: BaseException | None = None
        self._kept_back: set[Path] = set()  # removed folders that a line was said about

    def clean(self) -> None:
        """Removes what an interrupted save or deletion left, with a line. For the first process alone."""
        for folder in sorted(self.directory.glob(f"[0-9]*{PARTIAL}*")):
            self._say(
                f"removed {folder.name}: the save of step {folder.name.split('.')[0]} was interrupted; "
                "finished steps are used"
            )
            self._remove(folder)
        self._empty_bin()

    def steps(self) -> list[int]:
        """Steps that were completely written, ascending."""
        return finished_steps(self.directory)

    def save(
        self,
        step: int,
        trainable: Tree,
        opt_state: OptState,
        meta: Mapping[str, Any],
        eval_loss: float | None = None,
    ) -> None:
        """Copies the state to the host and returns; the files are written in the background.

        Raises SaveFailed: this save, or the one before it.
        """
        self.wait()
        partial = self.directory / f"{step}{PARTIAL}"
        self._saving = step
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._orbax.save(
                partial,
                args=ocp.args.Composite(
                    trainable=ocp.args.StandardSave(trainable),
                    optimizer=ocp.args.StandardSave(opt_state._asdict()),
                ),
            )
        except Exception as error:  # Orbax, TensorStore and the file system raise what they like
            self._error = error
            self.check()
        meta = dict(meta) | {"step": step, "eval_loss": eval_loss}
        self._thread = threading.Thread(target=self._commit, args=(step, partial, meta), name="save")
        self._thread.start()

    def _commit(self, step: int, partial: Path, meta: Mapping[str, Any]) -> None:
        try:
            self._orbax.wait_until_finished()  # on every process: its end is a barrier
            if self._primary:
                manifest.write(partial, meta)
                partial.rename(self.directory / str(step))
                self._remove_old()
        except BaseException as error:  # it surfaces in `check`, on the thread that trains
            self._error = error

    def amend(self, step: int, eval_loss: float) -> None:
        """Adds the held-out loss to a step that was saved without. For the first process alone.

        Raises SaveFailed: the step stays as it was.
        """
        folder = self.directory / str(step)
        try:
            manifest.rewrite(folder, manifest.read_meta(folder) | {"eval_loss": eval_loss})
        except OSError as error:
            raise SaveFailed(
                f"{folder}: {manifest.NAME} cannot be written ({error.strerror}); finished checkpoints are "
                "untouched: make room, then the same command goes on"
            ) from error

    def _remove_old(self) -> None:
        steps = self.steps()
        kept = {*steps[-(self._keep_last or len(steps)) :], best_step(self.directory)}
        for step in steps:
            if step not in kept:
                self._remove(self.directory / str(step))
        self._empty_bin()

    def _remove(self, folder: Path) -> None:
        """Only by name, `_empty_bin` does the rest: who reads it finds it whole or not at all."""
        try:
            folder.rename(_free_name(self.directory / f"{REMOVED}{folder.name}"))
        except OSError as error:
            self._say(f"WARNING: {folder} cannot be removed ({error.strerror}); training goes on")

    def _empty_bin(self) -> None:
        """What cannot be deleted now (NFS keeps files that somebody reads) is tried again next time."""
        for folder in self.directory.glob(f"{REMOVED}*"):
            try:
                shutil.rmtree(folder)
            except OSError as error:
                if folder not in self._kept_back:
                    self._kept_back.add(folder)
                    self._say(f"WARNING: {folder} cannot be deleted yet ({error.strerror}); training goes on")

    def check(self) -> None:
        """Raises SaveFailed when a save has failed in the meantime; what it wrote is removed."""
        if self._error is None:
            return
        error, self._error = self._error, None
        if self._primary:
            for folder in self.directory.glob(f"{self._saving}{PARTIAL}*"):
                shutil.rmtree(folder, ignore_errors=True)
        kept = ", ".join(map(str, self.steps())) or "none"
        raise SaveFailed(
            f"{self.directory}: step {self._saving} could not be saved ({_first_line(error)}); training "
            f"stops, finished checkpoints ({kept}) are untouched: make room, then the same command goes on"
        ) from error

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises SaveFailed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Waits and lets go. Raises SaveFailed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # of a save that is known to be sealed, or to have failed
                self._orbax.close()

    def newest_intact(self, allow_fresh: bool = False) -> int | None:
        """The newest step whose files all have their hash; None when there is no checkpoint at all.

        Others are set aside as unreadable-<step>, with a line. For the first process alone.
        Raises UserError: there are checkpoints, but all are damaged, and allow_fresh does not say that the
        run may start over.
        """
        steps = self.steps()
        for step in reversed(steps):
            folder = self.directory / str(step)
            try:
                manifest.verify(folder)
                return step
            except Damaged as damage:
                aside = _free_name(self.directory / f"{UNREADABLE}{step}")
                folder.rename(aside)
                self._say(
                    f"WARNING: checkpoint {folder} is damaged ({damage}); "
                    f"it is kept as {aside.name}, and the step before it is used"
                )
        if steps and not allow_fresh:
            raise UserError(
                f"{self.directory}: none of the checkpoints {', '.join(map(str, steps))} can be read; "
                "nothing is started over by itself: restore a copy, give --allow-fresh, or name a new "
                "--run-dir"
            )
        return None

    def restore(self, step: int, trainable: Tree, opt_state: OptState) -> Restored:
        """An intact step, into the shapes and shardings given: any number of devices and processes.

        Raises UserError: it holds other parameters than these.
        """
        folder = self.directory / str(step)
        args = ocp.args.Composite(
            trainable=ocp.args.StandardRestore(abstract(trainable)),
            optimizer=ocp.args.StandardRestore(abstract(opt_state._asdict())),
        )
        try:
            found = self._orbax.restore(folder, args=args)
        except (ValueError, KeyError, TypeError) as error:  # how Orbax reports trees that do not match
            raise UserError(
                f"{folder}: intact, but not of this model ({_first_line(error)}); name a new --run-dir"
            ) from error
        return Restored(step, found["trainable"], OptState(**found["optimizer"]), manifest.read_meta(folder))


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}.{number}")
    return free


# ---- reading a run, also while it trains ----


def finished_steps(directory: Path) -> list[int]:
    """Steps whose folders are complete, ascending: a folder gets its number by a rename at the end."""
    return sorted(int(folder.name) for folder in Path(directory).glob("*") if folder.name.isdigit())


def best_step(directory: Path) -> int | None:
    """The step with the lowest held-out loss among those still there; None when none was evaluated.

    Where a run went on with other held-out rows, steps before that do not compare.
    """
    losses, rows = {}, {}
    for step in finished_steps(directory):
        try:
            meta = manifest.read_meta(Path(directory) / str(step))
        except Damaged:  # no candidate; whoever wants this very step is told
            continue
        loss = meta["eval_loss"]
        if loss is not None and math.isfinite(loss):
            losses[step], rows[step] = loss, meta.get("eval_data")
    # None: saved by a version that did not say
    same = [step for step in losses if rows[step] in (None, rows[max(losses)])]
    return min(same, key=losses.get, default=None)


def read_trainable(
    directory: Path,
    trainable: Tree,
    step: int | str | None = None,
    *,
    say: Callable[[str], None] = print,
) -> tuple[int, Tree]:
    """(step, trainables) of one step, into the shapes and shardings given; nothing on disk changes.

    A run that trains meanwhile may delete a step that is being read: then the choice is made again.

    Args:
        step: a step, "best" for the lowest held-out loss, or None for the newest that is intact (a line says
            so when it is not the newest).
    Raises:
        UserError: no such step, or it is damaged.
    """
    directory = Path(directory).absolute()
    while True:
        candidates = _candidates(directory, step)
        problems = []
        for candidate in candidates:
            folder = directory / str(candidate)
            try:
                manifest.verify(folder)
                with ocp.StandardCheckpointer() as reader:
                    return candidate, reader.restore(folder / "trainable", abstract(trainable))
            except Exception as error:  # Damaged, or whatever Orbax and TensorStore raise
                if not folder.exists():  # deleted under our hands
                    break
                reason = str(error) if isinstance(error, Damaged) else _first_line(error)
                problems.append(f"checkpoint {folder} cannot be read ({reason})")
                if candidate != candidates[-1]:
                    say(f"WARNING: {problems[-1]}; taking the step before it")
        else:
            others = "" if step is None else ", or name another step"
            raise UserError(f"{problems[0]}; restore a copy{others}")


def _candidates(directory: Path, step: int | str | None) -> list[int]:
    """Steps to try, in this order. Raises UserError: there is none."""
    steps = finished_steps(directory)
    if not steps:
        raise UserError(f"{directory}: no finished checkpoint yet; train until the first save")
    if step is None:
        return steps[::-1]
    if step == "best":
        step = best_step(directory)
        if step is None:
            raise UserError(f"{directory}: no checkpoint was evaluated, so none is the best; name a step")
    if step not in steps:
        raise UserError(
            f"{directory}: no checkpoint of step {step}; expected one of {', '.join(map(str, steps))}"
        )
    return [step]


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [""])[0]
    if len(line) > 200:  # TensorStore names files first, and what happened last
        line = f"{line[:60]} ... {line[-135:]}"
    return f"{type(error).__name__}: {line}"
