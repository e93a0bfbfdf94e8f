"""Whole runs whose data workers are killed, hang, or would outlive them (row 23)."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from children import facts

from mmrstraj_jax.training.checkpoint import finished_steps

WORKERS = ("--loader.workers", "2", "--loader.prefetch", "1")


def test_a_killed_worker_ends_the_run_and_the_same_command_goes_on(world, tmp_path):
    long = (*WORKERS, "--steps", "40", "--save-every", "5")
    failed = world.start(tmp_path / "run", *long, fault="kill_worker_at:8").ends(1)
    assert re.search(r"(?m)^error: a data worker died at step .*row\d+.* exit code -9", failed)
    assert "going on after step" in world.start(tmp_path / "run", *long).ends(0)


def test_sigterm_to_all_processes_saves_and_ends_the_workers(world, tmp_path):
    """Rows 3 and 23: what schedulers do; the workers leave it to the training process."""
    child = world.start(tmp_path / "run", *WORKERS, "--steps", "40", fault="slow_steps:1")
    child.wait_for("step 1/40")
    os.killpg(child.process.pid, signal.SIGTERM)
    assert re.search(r"stopped: SIGTERM after step \d of 40, which is saved", child.ends(75))
    end = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):  # nobody is left
        while time.monotonic() < end:
            os.killpg(child.process.pid, 0)
            time.sleep(0.1)


def test_a_row_that_hangs_ends_the_run_with_its_name(world, straight, tmp_path):
    """In a thread of the training process, which ends although the thread does not."""
    begin = time.monotonic()
    options = ("--loader.timeout", "5", "--save-every", "100")
    failed = world.start(tmp_path / "run", *options, fault="reading_hangs:8").ends(1)
    assert re.search(r"(?m)^error: a data worker stopped at step .*\(id row8\)", failed)
    assert time.monotonic() - begin < 120
    assert finished_steps(tmp_path / "run" / "checkpoints") == [2]  # the row belongs to step 3
    world.start(tmp_path / "run").ends(0)
    assert facts(tmp_path / "run") == facts(straight)


def test_workers_end_with_a_run_that_is_killed(world, tmp_path):
    # So many steps that no worker has read all of its rows
    child = world.start(tmp_path / "run", *WORKERS, "--steps", "40", fault="slow_steps:1")
    child.wait_for("step 1/40")
    workers: list[str] = []
    end = time.monotonic() + 30  # the kernel's list may lack a child for a moment
    while len(workers) < 2:
        assert time.monotonic() < end, workers
        # A child belongs to the thread that started it
        lists = Path(f"/proc/{child.process.pid}/task").glob("*/children")
        workers = [pid for path in lists for pid in path.read_text().split()]
    child.process.send_signal(signal.SIGKILL)
    child.wait()
    end = time.monotonic() + 30
    while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, alive
        time.sleep(0.1)
