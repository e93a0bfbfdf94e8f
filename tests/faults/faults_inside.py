"""Faults that child.py puts into its own process, by name; each is called before training begins."""

import contextlib
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path


def _at(what: str, action) -> None:
    """Calls action when the main thread begins this."""
    from mmrstraj_jax.training.watchdog import Watchdog

    real = Watchdog.beat

    def beat(self, doing: str) -> None:
        real(self, doing)
        if doing == what:
            action()

    Watchdog.beat = beat


def _at_step(step: str | int, action) -> None:
    _at(f"running step {step}", action)


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


def clock_and_tmp(when: str, days: str) -> None:
    """The clock jumps by some days and the folder for temporary files is gone."""

    def strike():
        shutil.rmtree(tempfile.gettempdir())
        now = time.time
        time.time = lambda: now() + 86400 * float(days)

    _at(when, strike) if when else strike()


def full_disk(when: str, folder: str) -> None:
    """Nothing can be written any more: a small file system is filled, elsewhere no file may grow."""

    def fill():
        for thread in threading.enumerate():
            if thread.name == "save":  # of the step before
                thread.join()
        if not Path(folder).is_mount():
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            return
        with open(Path(folder) / "fill", "wb", 0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    if when == "summary.json":  # nothing else is being written any more
        from mmrstraj_jax import train

        real = train.record
        train.record = lambda path, value: (path.name == when and fill(), real(path, value))
    elif when:
        _at(when, fill)
    else:
        fill()


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
    from mmrstraj_jax.training import distributed

    distributed.code_fingerprint = lambda: "other"


def kill_worker_at(step: str) -> None:
    """One of the processes that read data is killed."""
    import multiprocessing

    def kill():
        workers = [child for child in multiprocessing.active_children() if child.name.startswith("grain-")]
        workers[0].kill()

    _at_step(int(step), kill)


def reading_hangs(row: str, number: str | None = None) -> None:
    """A thread that reads data never comes back from this row; a signal may follow."""
    from mmrstraj_jax.data.loader import Loader

    real, names = Loader._example, [number] if number else []

    def example(self, number):
        if number == int(row) and self.trace is not None:
            if names:
                name = names.pop()  # another thread may be at this row of the next epoch
                time.sleep(3)  # the steps before it are done
                os.kill(os.getpid(), getattr(signal, name))
            time.sleep(600)
        return real(self, number)

    Loader._example = example
