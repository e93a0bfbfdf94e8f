"""Rows 41, 50 and 51: flags and names that nobody knows, a damaged compilation cache, sinks that are down."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmrstraj_jax import environment
from mmrstraj_jax.config import load_config
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training import sinks

ROOT = Path(__file__).parent.parent.parent


# ---- row 41 ----


def test_an_unknown_xla_flag_is_left_out_with_the_nearest_name():
    flags = "--xla_cpu_use_onednnn=true --xla_force_host_platform_device_count=2 --xla_no_such=1"
    environ, lines = {"XLA_FLAGS": flags}, []
    environment.check(environ, lines.append)
    assert environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=2"
    assert len(lines) == 2 and all(line.startswith("WARNING: XLA_FLAGS: --xla_") for line in lines)
    assert "did you mean --xla_cpu_use_onednn?" in lines[0] and "did you mean" not in lines[1]


def test_a_value_that_a_flag_cannot_have_is_a_user_error():
    with pytest.raises(UserError, match="XLA_FLAGS .*=many: JAX does not start with them"):
        environment.known_flags(["--xla_gpu_all_reduce_combine_threshold_bytes=many"])


def test_mistyped_variables_are_named():
    with pytest.raises(UserError, match="MMRSTRAJ_CACH: no such variable; expected MMRSTRAJ_CACHE"):
        environment.check({"MMRSTRAJ_CACH": "/tmp"}, print)
    lines = []
    environment.check(
        {"JAX_PLATFORMSS": "cpu", "JAX_PLATFORMS": "cpu", "XLA_FLAG": "", "JAX_X": ""}, lines.append
    )
    assert [line.split("did you mean ")[1] for line in lines] == ["JAX_PLATFORMS?", "XLA_FLAGS?"]


def test_an_unknown_config_key_is_refused_with_the_nearest_name():
    with pytest.raises(
        UserError, match="unknown option --optim.projecter-lr: did you mean --optim.projector-lr"
    ):
        load_config("stage1", ["--optim.projecter-lr", "1e-4"])


def test_the_command_survives_an_unknown_flag():
    """Without the probe XLA aborts the process before Python can say anything."""
    done = subprocess.run(
        [sys.executable, "-m", "mmrstraj_jax.train", "--data", "missing.json"],
        env=os.environ | {"XLA_FLAGS": "--xla_no_such=1", "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "--xla_no_such=1 is left out" in done.stdout and "missing.json" in done.stderr


# ---- row 50 ----

PROGRAM = """
import sys, jax
from mmrstraj_jax.training import compilation_cache
compilation_cache.use(sys.argv[1], print)
print("result", jax.jit(lambda x: (x * 2).sum())(jax.numpy.arange(4.0)))
print("folder", compilation_cache.folder_of(sys.argv[1]))
"""


def program(cache: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(cache)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "result 12.0" in done.stdout, done.stderr
    return done


def test_a_damaged_compilation_cache_is_compiled_around(tmp_path):
    first = program(tmp_path)
    assert "Error reading" not in first.stderr
    folder = Path(first.stdout.split("folder ")[1].strip())
    entries = [path for path in folder.iterdir() if path.name.endswith("-cache")]
    assert folder.parent == tmp_path and folder.name.startswith("cpu-") and entries
    for path in entries:
        path.write_bytes(b"garbage" + path.read_bytes()[7:99])
    assert "Error reading persistent compilation cache entry" in program(tmp_path).stderr


def test_a_cache_that_cannot_be_written_is_switched_off(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = program(tmp_path / "file" / "cache")
    assert "WARNING: compilation cache" in done.stdout and "is switched off: Not a directory" in done.stdout


# ---- row 51 ----


class Hungry:
    """A writer that posts to a server which accepts the connection and never answers."""

    def __init__(self, port: int):
        self._socket = socket.create_connection(("127.0.0.1", port))

    def write(self, values) -> None:
        self._socket.sendall(b"POST / HTTP/1.1\r\n\r\n")
        self._socket.recv(1)  # for ever

    def close(self) -> None:
        self._socket.close()


def test_a_server_that_never_answers_does_not_stop_training(monkeypatch):
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        lines = []
        sink = sinks.Background("Weights & Biases", lambda: Hungry(server.getsockname()[1]), lines.append)
        for step in range(100):
            sink.write({"step": step})
        sink.close()
    assert lines == ["WARNING: Weights & Biases is switched off: it did not finish within 0.1 s"]


def test_a_server_that_is_down_is_one_warning():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    lines = []
    sink = sinks.Background("Weights & Biases", lambda: Hungry(port), lines.append)
    sink.write({"step": 1})
    sink.close()
    assert len(lines) == 1 and "is switched off: ConnectionRefusedError" in lines[0]
