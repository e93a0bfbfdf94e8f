"""Real training processes for the faults suite: started with a fault inside, watched through their output."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from mmrstraj_jax.training.checkpoint import finished_steps
from mmrstraj_jax.training.monitor import read_metrics

CHILD = Path(__file__).parent / "child.py"
QUICK = "--xla_backend_optimization_level=0"  # programs run for milliseconds: compiling is what they cost
PATIENCE = 600.0  # seconds; for a machine that does other things too


@dataclass
class World:
    """Weights and data shared by all runs, and caches that make the second one quick."""

    options: list[str]
    caches: Path
    children: list["Child"] = field(default_factory=list)

    def start(self, run_dir: Path, *options: str, fault: str = "none", devices: int = 1, **env) -> "Child":
        child = Child(self, run_dir, options, fault, devices, env)
        self.children.append(child)
        return child

    def pair(self, run_dir: Path, *options: str, faults=("none", "none"), devices: int = 1) -> list["Child"]:
        """Two processes of one run over loopback."""
        place = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
        return [
            self.start(run_dir, *options, *place, str(index), fault=faults[index], devices=devices)
            for index in range(2)
        ]


class Child:
    """One process; everything it prints goes to a file."""

    def __init__(self, world: World, run_dir: Path, options, fault: str, devices: int, env: dict[str, str]):
        self.run_dir = run_dir
        self.log = world.caches / f"child-{len(world.children)}.txt"
        variables = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "MMRSTRAJ_CACHE": str(world.caches / "index"),
            "JAX_COMPILATION_CACHE_DIR": str(world.caches / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, str(CHILD), fault, *world.options, "--run-dir", str(run_dir), *options]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=variables | env, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        """Its exit code."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.output[-3000:]}") from None

    def wait_for(self, text: str) -> None:
        """Returns when it has printed this."""
        end = time.monotonic() + PATIENCE
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < end, (
                f"no {text!r}:\n{self.output[-3000:]}"
            )
            time.sleep(0.02)

    def ends(self, code: int) -> str:
        """Its output, after it ended with this code."""
        found = self.wait()
        assert found == code, f"exit code {found}, expected {code}:\n{self.output[-5000:]}"
        return self.output

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def state_sha256(run_dir: Path, step: int | None = None) -> str:
    """Of everything in a checkpoint: names, dtypes, shapes and bytes of trainables and optimizer state."""
    folder = run_dir / "checkpoints"
    folder /= str(finished_steps(folder)[-1] if step is None else step)
    digest = hashlib.sha256()
    with ocp.StandardCheckpointer() as reader:
        for item in ("trainable", "optimizer"):
            tree = reader.restore(folder / item)
            for path, leaf in jax.tree.leaves_with_path(tree):
                array = np.asarray(leaf)
                digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
                digest.update(array.tobytes())
    return digest.hexdigest()


def loss_log(run_dir: Path) -> list[tuple]:
    """(step, loss, grad_norm, tokens) of every step; tokens tell which rows it saw."""
    keys = ("step", "loss", "grad_norm", "tokens")
    return [tuple(row[key] for key in keys) for row in read_metrics(run_dir / "metrics.jsonl")]


def facts(run_dir: Path) -> dict:
    """What two runs have in common when nothing was lost and nothing changed."""
    summary = json.loads((run_dir / "summary.json").read_text())
    return {"state": state_sha256(run_dir), "losses": loss_log(run_dir), "summary": summary}
