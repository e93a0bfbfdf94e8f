"""The plan's memory against that of a process that really takes the step (slow: it compiles and runs it)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# Peak resident memory of one step above what the process held after compiling it, before any array was made
CHILD = """
import dataclasses, sys
import jax, numpy as np
from pathlib import Path
from mmrstraj_jax.config import MODEL_PRESETS, Config, LoRAConfig, small_model
from mmrstraj_jax.data.collate import Shape
from mmrstraj_jax.planning import memory, program
from mmrstraj_jax.training.optimizer import Optimizer
from mmrstraj_jax.training.step import build_step

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

name, remat, rows, *numbers = sys.argv[1:]
model, rows = MODEL_PRESETS[name], int(rows)
shape = Shape(*map(int, numbers), 0, True)
config = dataclasses.replace(
    small_model(Config(model="tiny")), model=name, remat=remat, batch_size=rows, micro_batch_size=rows,
    lora=LoRAConfig(dropout=0.0),
)
found, optimizer = program.abstract_model(config, model), Optimizer(config.optim, 10)
opt_state = jax.eval_shape(optimizer.init, found.trainable)
batch = program.abstract_batch(shape, config, model, rows)
args = (found.trainable, opt_state, found.frozen, batch, jax.ShapeDtypeStruct((), "int32"))
step = build_step(found.graphdef, optimizer, config).lower(*args).compile()
ones = jax.jit(lambda: jax.tree.map(lambda leaf: jax.numpy.full(leaf.shape, 1, leaf.dtype), args))
ones = ones.lower().compile()
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
arrays = ones()
jax.block_until_ready(step(*arrays))
predicted = memory.estimate(config, model, shape, gpu=False)
print(predicted.peak + predicted.scratch, status("VmHWM") - before)
"""


@pytest.mark.parametrize(
    "case",
    [
        ("tiny", "none", 4, 5, 512, 96),
        ("tiny", "block", 4, 5, 512, 96),
        ("tiny", "dots", 2, 5, 256, 64),
        ("mini", "none", 1, 2, 256, 64),
        ("mini", "block", 2, 2, 256, 64),
        ("0.5b", "block", 1, 2, 1024, 128),
    ],
    ids=lambda case: "-".join(map(str, case)),
)
def test_a_running_step_takes_what_was_predicted(case):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, case)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    predicted, measured = map(int, done.stdout.split())
    print(f"{case}: predicted {predicted / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB")
    assert abs(predicted / measured - 1) < 0.10
