"""Where metrics go besides metrics.jsonl. Each sink has a thread: if it hangs or fails, training goes on."""

import hashlib
import importlib.util
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mmrstraj_jax.errors import UserError

MAX_WAITING = 1000  # rows; a sink that is this far behind is given up
CLOSE_SECONDS = 10.0  # that the end of a run waits for a sink


class Sink(Protocol):
    """Something that takes rows; any of its methods may raise or hang."""

    def write(self, values: Mapping[str, Any]) -> None:
        """Numbers of one step; values["step"] says which."""

    def close(self) -> None:
        """Nothing follows."""


class Background:
    """A sink behind a bounded queue and a daemon thread; the first failure switches it off with one line.

    Args:
        name: for that line.
        make: opens the sink, in the thread.
        log: takes one line of text.
    """

    def __init__(self, name: str, make: Callable[[], Sink], log: Callable[[str], None]):
        self._name, self._make, self._log = name, make, log
        self._rows: queue.Queue[Mapping[str, Any] | None] = queue.Queue(MAX_WAITING)
        self._off = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def write(self, values: Mapping[str, Any]) -> None:
        """Hands over a row; never waits."""
        if self._off.is_set():
            return
        try:
            self._rows.put_nowait(dict(values))
        except queue.Full:
            self._switch_off(f"{MAX_WAITING} rows wait for it")

    def close(self) -> None:
        """Waits a little for what is still to be written."""
        if self._off.is_set():
            return
        try:
            self._rows.put_nowait(None)
        except queue.Full:
            self._switch_off(f"{MAX_WAITING} rows wait for it")
            return
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._switch_off(f"it did not finish within {CLOSE_SECONDS:g} s")

    def _run(self) -> None:
        try:
            sink = self._make()
            while (values := self._rows.get()) is not None and not self._off.is_set():
                sink.write(values)
            sink.close()
        except Exception as error:  # whatever a sink does wrong, training goes on without it
            self._switch_off(f"{type(error).__name__}: {error}")

    def _switch_off(self, why: str) -> None:
        if not self._off.is_set():
            self._off.set()
            self._log(f"WARNING: {self._name} is switched off: {why}")


class TensorBoard:
    """Scalars in a folder; viewers drop what a crashed attempt wrote after start_step."""

    def __init__(self, folder: Path, start_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, int | float) and key != "step":
                self._writer.add_scalar(key, value, values["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def check_wandb(project: str | None) -> None:
    """Raises UserError: Weights & Biases is asked for, and its package is missing."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "--wandb: the package is missing; pip install 'mmrstraj-jax[wandb]', or drop the option"
        )


class WandB:
    """A run of a Weights & Biases project; a resumed run goes on in the same one.

    Args:
        project: its name. Account, mode and server come from wandb's own environment variables.
        run_dir: names the run.
        began: Unix time of its first start: another run in the same folder is another one there too.
    """

    def __init__(self, project: str, run_dir: Path, began: float):
        import wandb

        identity = hashlib.sha256(f"{run_dir.absolute()} {began}".encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=project, id=identity, name=run_dir.name, resume="allow", dir=str(run_dir)
        )
        # redone steps are logged again: they need an axis of their own, wandb's own step cannot go back
        self._run.define_metric("*", step_metric="step")

    def write(self, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values))

    def close(self) -> None:
        self._run.finish()
