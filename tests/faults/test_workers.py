"""Whole runs whose data workers are killed, hang, or would outlive them (row 23)."""

import re
import signal
import time
from pathlib import Path

from children import facts

WORKERS = ("--loader.workers", "2", "--loader.prefetch", "1")


def test_a_killed_worker_ends_the_run_and_the_same_command_goes_on(world, tmp_path):
    long = (*WORKERS, "--steps", "40", "--save-every", "5")
    failed = world.start(tmp_path / "run", *long, fault="kill_worker_at:8").ends(1)
    assert re.search(r"(?m)^error: a data worker died at step .*row\d+.* exit code -9", failed)
    assert "going on after step" in world.start(tmp_path / "run", *long).ends(0)


def test_a_row_that_hangs_ends_the_run_with_its_name(world, straight, tmp_path):
    """In a thread of the training process, which ends although the thread does not."""
    begin = time.monotonic()
    failed = world.start(tmp_path / "run", "--loader.timeout", "5", fault="reading_hangs:7").ends(1)
    assert re.search(r"(?m)^error: a data worker stopped at step .*\(id row7\)", failed)
    assert time.monotonic() - begin < 120
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
