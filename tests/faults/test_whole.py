"""The whole command on a disk that fills up, and beside a server that hangs (rows 15 and 51)."""

import os
import socket
import subprocess
import sys

import pytest
from children import facts

from mmrstraj_jax.training import manifest
from mmrstraj_jax.training.checkpoint import finished_steps


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 8 MB where that may be mounted; else a folder, see faults_inside.full_disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    mounted = os.getuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("when, code, left", [
    ("", 2, []),  # in the preflight
    ("running step 3", 1, [2]),
    ("saving step 4", 1, [2]),
    ("summary.json", 1, [2, 4, 6]),
])  # fmt: skip
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(world, straight, small_disk, when, code, left):
    """Row 15."""
    output = world.start(small_disk / "run", fault=f"full_disk:{when}:{small_disk}").ends(code)
    last = output.rstrip().splitlines()[-1]
    assert last.startswith("error: ") and ("No space left" in last or "File too large" in last), output
    assert finished_steps(small_disk / "run" / "checkpoints") == left
    for step in left:
        manifest.verify(small_disk / "run" / "checkpoints" / str(step))
    (small_disk / "fill").unlink(missing_ok=True)
    world.start(small_disk / "run").ends(0)
    assert facts(small_disk / "run") == facts(straight)


FAKE = """
import os, socket
def init(**_):
    server = socket.create_connection(("127.0.0.1", int(os.environ["FAKE_SERVER"])))
    server.sendall(b"POST / HTTP/1.1")
    server.recv(1)  # for ever
"""


def test_a_server_that_never_answers_changes_nothing(world, straight, tmp_path):
    """Row 51."""
    (tmp_path / "wandb.py").write_text(FAKE)
    with socket.create_server(("127.0.0.1", 0)) as server:
        variables = {"FAKE_SERVER": str(server.getsockname()[1])}
        variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
        output = world.start(tmp_path / "run", "--wandb", "project", **variables).ends(0)
    assert "WARNING: Weights & Biases is switched off: it did not finish within 10 s" in output
    assert facts(tmp_path / "run") == facts(straight)
