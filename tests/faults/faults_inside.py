"""Faults that child.py puts into its own process, by name; each is called before training begins."""

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path


def _at_step(step: int, action) -> None:
    """Calls action when the main thread begins this step."""
    from mmrstraj_jax.training.watchdog import Watchdog

    real = Watchdog.beat

    def beat(self, doing: str) -> None:
        real(self, doing)
        if doing == f"running step {step}":
            action()

    Watchdog.beat = beat


def signal_at(step: str, name: str, times: str = "1") -> None:
    def send():
        for _ in range(int(times)):
            os.kill(os.getpid(), getattr(signal, name))

    _at_step(int(step), send)


def sleep_at(step: str) -> None:
    _at_step(int(step), lambda: time.sleep(600))


def slow_steps(seconds: str) -> None:
    from mmrstraj_jax.training.watchdog import Watchdog

    real = Watchdog.beat

    def beat(self, doing: str) -> None:
        real(self, doing)
        if doing.startswith("running"):
            time.sleep(float(seconds))

    Watchdog.beat = beat


def slow(where: str, marker: str) -> None:
    """Something that takes for ever begins, and a file says so: reading data, or compiling."""
    from mmrstraj_jax.training import setup, step

    def stuck(*_, **__):
        Path(marker).touch()
        time.sleep(600)

    if where == "data":
        setup.build_index = stuck
    elif where == "compile":
        import ctypes

        def inside_c(*_, **__):
            Path(marker).touch()
            ctypes.PyDLL(None).sleep  # noqa: B018
            ctypes.CDLL(None).usleep(600_000_000)  # the interpreter is free, the main thread is not

        step.gradients = inside_c
    else:
        real = setup.eval_batches

        def batches(loader):
            for item in real(loader):
                Path(marker).touch()
                time.sleep(3)
                yield item

        from mmrstraj_jax.training import validation

        validation.eval_batches = batches


def clock_and_tmp() -> None:
    """At step 2 the clock jumps back by a day and the folder for temporary files is gone."""

    def strike():
        shutil.rmtree(tempfile.gettempdir())
        now = time.time
        time.time = lambda: now() - 86400

    _at_step(2, strike)


def other_data() -> None:
    """This process believes that its data has another fingerprint."""
    import dataclasses

    from mmrstraj_jax.training import setup

    real = setup.build_index
    setup.build_index = lambda *a, **k: dataclasses.replace(real(*a, **k), fingerprint="other")


def save_fails() -> None:
    """The disk is full when a checkpoint is sealed."""
    from mmrstraj_jax.training import manifest

    def write(*_):
        raise OSError(28, "No space left on device")

    manifest.write = write


def other_code() -> None:
    """This process runs other sources of the package."""
    from mmrstraj_jax.training import run

    run.code_fingerprint = lambda: "other"


def kill_worker_at(step: str) -> None:
    """One of the processes that read data is killed."""
    import multiprocessing

    def kill():
        workers = [child for child in multiprocessing.active_children() if child.name.startswith("grain-")]
        workers[0].kill()

    _at_step(int(step), kill)


def reading_hangs(row: str) -> None:
    """A thread that reads data never comes back from this row."""
    from mmrstraj_jax.data.loader import Loader

    real = Loader._example

    def example(self, number):
        if number == int(row) and self.trace is not None:
            time.sleep(600)
        return real(self, number)

    Loader._example = example
