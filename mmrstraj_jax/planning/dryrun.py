"""Compiles the real train step for N devices on this CPU, in a child process that has that many.

A process cannot change its number of devices, and the compiler's memory must not add to the caller's.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time

from mmrstraj_jax import settings
from mmrstraj_jax.config import Config, ModelConfig, from_dict, to_dict
from mmrstraj_jax.data.collate import Shape
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.planning import report
from mmrstraj_jax.planning.memory import estimate
from mmrstraj_jax.planning.program import Measured


def run(config: Config, model: ModelConfig, shape: Shape, devices: int) -> list[str]:
    """The report of a dry run. Raises UserError: the step does not compile; the compiler's last line."""
    began = time.monotonic()
    result = compiled(config, model, shape, devices)
    seconds = time.monotonic() - began
    return report.measured(result, predicted(config, model, shape, devices), seconds, devices)


def predicted(config: Config, model: ModelConfig, shape: Shape, devices: int) -> int:
    """Peak bytes of one of `devices` CPU devices, by the plan's own count."""
    each = config.batch_size // devices
    own = dataclasses.replace(config, batch_size=each, micro_batch_size=min(config.micro_batch_size, each))
    return estimate(own, model, shape, fsdp=config.fsdp, gpu=False).peak


def compiled(config: Config, model: ModelConfig, shape: Shape, devices: int) -> Measured:
    """The compiler's figures for one of `devices` devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    task = {"config": to_dict(config), "model": settings.to_dict(model), "shape": shape}
    child = subprocess.run(
        [sys.executable, "-m", "mmrstraj_jax.planning.dryrun"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"--dry-run: the step does not compile for {devices} devices: {last}")
    return Measured(**json.loads(child.stdout))


def _child() -> None:
    import jax

    from mmrstraj_jax import parallel
    from mmrstraj_jax.planning.program import compile_step, memory_of

    task = json.load(sys.stdin)
    config = from_dict(task["config"])
    model = settings.from_dict(task["model"], ModelConfig, "the model")
    mesh = parallel.make_mesh(config.fsdp) if jax.device_count() > 1 else None
    program = compile_step(config, model, Shape(*task["shape"]), mesh)
    print(json.dumps(dataclasses.asdict(memory_of(program))))


if __name__ == "__main__":
    _child()
