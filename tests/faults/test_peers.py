"""Two processes of one run over loopback: start, stop, death and standstill (rows 6 to 11 and 19)."""

import re
import signal
import socket
import time

import numpy as np
import pytest
from children import free_port, loss_log

from mmrstraj_jax.training.checkpoint import finished_steps

HEARTBEAT = ("--cluster.heartbeat", "15")


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def test_sigterm_to_one_stops_both_at_the_same_step(world, straight, tmp_path):
    """Rows 6 and 19: saved by two processes of one device, finished by one of four, its weights split."""
    pair = world.pair(tmp_path / "run", "--micro-batch-size", "1", faults=("none", "signal_at:2:SIGTERM"))
    said = [re.search(r"after step (\d) of 6, which is saved", child.ends(75)) for child in pair]
    steps = {int(found[1]) for found in said}
    assert steps == {finished_steps(tmp_path / "run" / "checkpoints")[-1]} and steps < {2, 3, 4}
    world.start(tmp_path / "run", "--micro-batch-size", "1", "--fsdp", "2", devices=4).ends(0)
    ours, theirs = np.array(loss_log(tmp_path / "run")), np.array(loss_log(straight))
    np.testing.assert_array_equal(ours[:, [0, 3]], theirs[:, [0, 3]])  # steps, and tokens of their rows
    np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=1e-5)


def test_the_survivor_of_a_kill_names_the_other_process(world, tmp_path):
    """Row 7: first process 1 dies, then, after a restart, process 0, which holds the coordination service."""
    options = ("--micro-batch-size", "2", "--save-every", "1", *HEARTBEAT)
    for victim, step in ((1, 3), (0, 5)):
        faults = ["none", "none"]
        faults[victim] = f"signal_at:{step}:SIGKILL"
        pair = world.pair(tmp_path / "run", *options, faults=faults)
        assert pair[victim].wait() == -signal.SIGKILL
        begin = time.monotonic()
        line = last_line(pair[1 - victim].ends(69))
        assert time.monotonic() - begin < 30, line  # twice the heartbeat
        assert line.startswith("error: ") and f"process {victim} (" in line
    assert finished_steps(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("fault, expected", [
    ("sleep_at:3", r"stuck: process 1 \(.*\) for \d+ s in: running step 3; the others wait for it"),
    ("signal_at:3:SIGSTOP", r"dead or frozen: process 1 \(.*\), last seen in: .+, \d+ s ago"),
])  # fmt: skip
def test_a_process_that_hangs_is_named(world, tmp_path, fault, expected):
    """Row 8: asleep in Python, and frozen from outside, when its last sign of life may be some steps old."""
    options = ("--micro-batch-size", "2", "--cluster.step-timeout", "40", *HEARTBEAT)
    pair = world.pair(tmp_path / "run", *options, faults=("none", fault))
    assert re.search(expected, last_line(pair[0].ends(69)))
    if "sleep" in fault:
        output = pair[1].ends(69)
        assert re.search(expected, last_line(output))
        assert "no progress for" in output and "in sleep_at" in output.replace("<lambda>", "sleep_at")
    pair[1].stop()


@pytest.mark.parametrize("index", [0, 1])
def test_a_missing_process_is_named_in_time(world, tmp_path, index):
    """Row 9."""
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id", str(index)]
    output = world.start(tmp_path / "run", *place, "--cluster.start-timeout", "6").ends(2)
    expected = (
        r"process 0 of 2: process 1 did not come to 127.0.0.1:\d+ within 6 s",
        r"process 1 of 2: nothing answers at 127.0.0.1:\d+ .*process 0 must run there",
    )
    assert re.search("^error: " + expected[index], last_line(output)), output


def test_a_port_in_use_and_an_unknown_host_are_errors_at_once(world, tmp_path):
    """Row 10."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wrong = (
            (f"127.0.0.1:{port}", "0", f"port {port} of .* cannot be opened"),
            ("no-such-host.invalid:9999", "1", "coordinator host 'no-such-host.invalid' is unknown"),
        )
        for coordinator, index, message in wrong:
            place = ["--coordinator", coordinator, "--num-processes", "2", "--process-id", index]
            output = world.start(tmp_path / "run", *place, "--cluster.start-timeout", "5").ends(2)
            assert re.search(f"^error: .*{message}", last_line(output)), output


def test_processes_that_differ_stop_before_the_first_step(world, tmp_path):
    """Row 11: another setting, other sources of the package, and other data behind the same path."""
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    pair = [world.start(tmp_path / "run", *place, str(at), "--seed", str(5 * at)) for at in range(2)]
    for child in pair:
        assert "process 0 and process 1 do not have the same settings: seed: 0 and 5;" in child.ends(2)
    for child in world.pair(tmp_path / "run", faults=("none", "other_code")):
        assert re.search("do not have the same settings: code of mmrstraj_jax: .* and other;", child.ends(2))
    for child in world.pair(tmp_path / "run", faults=("none", "other_data")):
        assert re.search("do not have the same data and weights: data: .* and other;", child.ends(2))
    assert not (tmp_path / "run" / "checkpoints").exists()
