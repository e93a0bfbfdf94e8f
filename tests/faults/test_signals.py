"""One process that is killed, stopped, or whose surroundings break.

Rows 1, 3, 4, 5, 15, 16, 17, 21, 24, 48 and 49.
"""

import random
import re
import signal
import time

import pytest
from children import facts, state_sha256
from conftest import EVALUATED

from mmrstraj_jax.training import manifest
from mmrstraj_jax.training.checkpoint import finished_steps


def kill_and_compare(world, folder, kills: int, steps: int, seed: int) -> None:
    """Kills a run at random moments, lets it finish, and compares it with one that was left alone.

    Every fifth kill falls before the first step of its start, the others soon after a checkpoint.
    """

    def newest() -> int:
        return max(finished_steps(folder / "run" / "checkpoints"), default=0)

    length, every = ("--steps", str(steps)), ("--save-every", "1")
    world.start(folder / "straight", *length).ends(0)
    draw, fallen = random.Random(seed), []
    for number in range(kills):
        child = world.start(folder / "run", *length, *every, fault="slow_steps:0.4")
        if number % 5 == 4:
            time.sleep(draw.uniform(0, 3))  # in its imports, or while it loads
        else:
            begun = newest()
            while newest() == begun:
                assert child.process.poll() is None, child.output
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.4))
        child.process.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        fallen.append(newest())
    world.start(folder / "run", *length, *every).ends(0)
    print(
        f"{kills} kills, newest finished steps after each: {fallen}; SHA-256 {state_sha256(folder / 'run')}"
    )
    assert facts(folder / "run") == facts(folder / "straight")


def test_five_kills_change_nothing(world, tmp_path):
    """Rows 1 and 48: each start finds the lock of a killed process of this machine."""
    kill_and_compare(world, tmp_path, 5, steps=12, seed=0)


@pytest.mark.slow
def test_twenty_kills_change_nothing(world, tmp_path):
    """Row 1."""
    kill_and_compare(world, tmp_path, 20, steps=36, seed=1)


@pytest.mark.parametrize("step", [3, 5])  # the end of epoch 1; inside epoch 2
def test_sigterm_saves_at_the_next_step_boundary(world, straight, tmp_path, step):
    """Rows 3, 4 and 21."""
    stopped = world.start(tmp_path / "run", fault=f"signal_at:{step}:SIGTERM")
    assert f"stopped: SIGTERM after step {step} of 6, which is saved" in stopped.ends(75)
    assert finished_steps(tmp_path / "run" / "checkpoints")[-1] == step
    world.start(tmp_path / "run").ends(0)
    assert facts(tmp_path / "run") == facts(straight)


def test_sigterm_while_it_waits_for_data_saves_what_is_done(world, straight, tmp_path):
    """Row 4: loader.timeout is 300 s, more than a scheduler grants."""
    stopped = world.start(tmp_path / "run", "--save-every", "100", fault="reading_hangs:8:SIGTERM")
    assert "stopped: SIGTERM after step 2 of 6, which is saved" in stopped.ends(75)
    world.start(tmp_path / "run").ends(0)
    assert facts(tmp_path / "run") == facts(straight)


@pytest.mark.parametrize("where", ["data", "compile", "eval"])
def test_sigterm_before_the_first_step_is_honoured_in_time(world, straight, tmp_path, where):
    """Row 4."""
    child = world.start(tmp_path / "run", "--eval-samples", "8", fault=f"slow:{where}:{tmp_path}/begun")
    while not (tmp_path / "begun").exists():
        assert child.process.poll() is None, child.output
        time.sleep(0.05)
    child.process.send_signal(signal.SIGTERM)
    assert "stopped: SIGTERM" in child.ends(75)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_and_harms_nothing(world, halfway, number):
    """Row 5."""
    child = world.start(halfway, fault=f"signal_at:5:{number.name}:2")
    assert child.wait() in (-number, 128 + number)
    steps = finished_steps(halfway / "checkpoints")
    assert steps[-1] == 4
    for step in steps:
        manifest.verify(halfway / "checkpoints" / str(step))


def test_a_save_that_fails_ends_the_run_with_an_error(world, halfway):
    """Rows 15 and 17."""
    before = state_sha256(halfway)
    output = world.start(halfway, fault="save_fails").ends(1)
    assert re.search(
        r"error: .*step 6 could not be saved .*No space left.*checkpoints .*4.* are untouched", output
    )
    assert state_sha256(halfway) == before


def test_an_output_folder_that_is_a_file_is_an_error_at_once(world, tmp_path):
    """Row 16."""
    (tmp_path / "run").write_text("kept")
    output = world.start(tmp_path / "run").ends(2)
    assert output.splitlines()[-1] == f"error: {tmp_path / 'run'}: is a file; name a folder with --run-dir"
    assert "vision_tower" not in output and (tmp_path / "run").read_text() == "kept"


def test_a_second_run_in_the_same_directory_is_refused(world, halfway):
    """Row 48."""
    first = world.start(halfway, fault="sleep_at:5")
    first.wait_for("going on after step 4")
    output = world.start(halfway).ends(2)
    first.stop()
    assert f"another run (process {first.process.pid} on" in output and output.count("error:") == 1


@pytest.mark.parametrize("when, days", [("", -1), ("running step 5", 1)])
def test_a_clock_that_jumps_and_a_lost_tmp_change_nothing(world, evaluated, tmp_path, when, days):
    """Rows 24 and 49: the same seed twice, here with another clock, temporary files gone before the first
    evaluation or before the last, no cache.
    """
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "cache")  # a folder that cannot be made
    caches = {"JAX_COMPILATION_CACHE_DIR": nowhere, "MMRSTRAJ_CACHE": nowhere}
    options, fault = (*EVALUATED, "--loader.workers", "2"), f"clock_and_tmp:{when}:{days}"
    child = world.start(tmp_path / "run", *options, fault=fault, TMPDIR=str(tmp_path / "tmp"), **caches)
    assert "cannot be written" in child.ends(0)
    assert facts(tmp_path / "run") == facts(evaluated)
