"""The sharding table, and that splitting over devices does not change a step."""

import json
import math
import os
import subprocess
import sys

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_case as case
from flax import nnx
from jax.sharding import PartitionSpec as P

from mmrstraj_jax import parallel
from mmrstraj_jax.config import MODEL_PRESETS, LoRAConfig
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.mmrstraj import init_model
from mmrstraj_jax.training import state as states
from mmrstraj_jax.training.optimizer import Optimizer
from mmrstraj_jax.training.step import build_step


def test_without_fsdp_everything_is_replicated():
    _, trainable, frozen = states.split(case.model())
    for name, leaf in (trainable | frozen).items():
        assert parallel.partition_spec(name, leaf.shape, 1) == P()


def test_fsdp_splits_the_large_weights_but_never_the_layer_axis():
    abstract = nnx.eval_shape(lambda: init_model(MODEL_PRESETS["7b"], jax.random.key(0), jnp.bfloat16))
    shapes = {".".join(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(abstract))}
    specs = {name: parallel.partition_spec(name, shape, 8) for name, shape in shapes.items()}
    assert specs["language_model.layers.mlp.up_proj.weight"] == P(None, "fsdp")
    assert specs["language_model.embed_tokens.weight"] == P("fsdp")
    assert parallel.partition_spec("vision_tower.layers.mlp.fc1.lora_A", (26, 8, 1152), 8) == P(
        None, None, "fsdp"
    )
    assert parallel.partition_spec("vision_tower.layers.mlp.fc1.lora_B", (26, 4304, 8), 8) == P(None, "fsdp")
    assert not any(spec and spec[0] == "fsdp" for name, spec in specs.items() if ".layers." in name)
    split = sum(math.prod(shapes[name]) for name, spec in specs.items() if spec)
    assert split > 0.99 * sum(math.prod(shape) for shape in shapes.values())


def test_an_axis_that_does_not_divide_stays_whole():
    assert parallel.partition_spec("language_model.layers.mlp.up_proj.weight", (2, 25, 16), 2) == P()


def test_a_mesh_that_does_not_fit_is_named():
    with pytest.raises(UserError, match=f"fsdp {2 * jax.device_count() + 1}: expected a divisor"):
        parallel.make_mesh(2 * jax.device_count() + 1)


def test_none_leaves_of_a_batch_stay_none():
    sharded = parallel.shard_batch(case.batch(), parallel.make_mesh(), batch_axis=0)
    assert sharded["inputs"].canvas_index is None
    np.testing.assert_array_equal(sharded["targets"], case.batch()["targets"])


LORA = LoRAConfig(rank=5, alpha=4.0, dropout=0.2)  # 5: no other axis of the program is that long


def three_steps(fsdp: int, remat: str = "none", tied: bool = True) -> list[float]:
    """Losses of three steps of eight rows, with dropout, on all devices of this process; in two micro-batches
    where there are no more than four. With fsdp the program is checked.
    """
    config = case.config(lora=LORA, micro_batch_size=1, batch_size=8, remat=remat)
    num_micro = 8 // max(4, jax.device_count())
    mesh = parallel.make_mesh(fsdp)
    graphdef, trainable, frozen = states.split(case.model(LORA, tied=tied))
    before = states.checksum(frozen)
    trainable, frozen = (parallel.shard_parameters(tree, mesh) for tree in (trainable, frozen))
    optimizer = Optimizer(config.optim, 10)
    opt_state = parallel.init_optimizer(optimizer.init, trainable, mesh)
    step = build_step(graphdef, optimizer, config, placed=parallel.shardings_of((trainable, opt_state)))
    batches = [
        parallel.shard_batch(case.stacked(case.batch(8, seed=index), num_micro), mesh, batch_axis=1)
        for index in range(3)
    ]
    lowered = step.lower(trainable, opt_state, frozen, batches[0], jnp.int32(0))
    program = lowered.compile({"xla_backend_optimization_level": 0})
    if fsdp > 1 and tied:
        hlo.check_fsdp(program.as_text(), trainable | frozen)
    elif fsdp > 1:  # the head is gathered, the embedding of the same shape is not
        table = list(frozen["language_model.embed_tokens.weight"].shape)
        gathers = [one for one in hlo.collectives(program.as_text()) if one["kind"] == "all-gather"]
        assert sum(table in one["shapes"] for one in gathers) == 1
    losses = []
    for index, batch in enumerate(batches, 1):  # a compiled program refuses arguments that lie elsewhere
        trainable, opt_state, metrics = program(trainable, opt_state, frozen, batch, jnp.int32(index))
        losses.append(float(metrics["loss"]))
    states.check_frozen(frozen, before, "sharded")
    kept = {name: str(leaf.sharding.spec) for name, leaf in trainable.items()}
    expected = parallel.parameter_shardings(trainable, mesh)
    assert kept == {name: str(sharding.spec) for name, sharding in expected.items()}
    return losses


def on_devices(count: int, expression: str):
    """The value of an expression over this module in a process with that many devices."""
    command = f"import json, test_parallel; print(json.dumps(test_parallel.{expression}))"
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone():
    return three_steps(1)


@pytest.mark.parametrize(
    "devices, fsdp, remat",
    [
        (4, 4, "none"),
        *(
            pytest.param(devices, fsdp, remat, marks=pytest.mark.slow)
            for devices, fsdp in ((4, 1), (4, 2), (4, 4), (8, 4), (8, 8))
            for remat in ("none", "block", "dots")
        ),
    ],
)
def test_splitting_changes_no_loss_and_gathers_weights_layer_by_layer(devices, fsdp, remat, alone):
    """hlo.check_fsdp says what is gathered."""
    np.testing.assert_allclose(on_devices(devices, f"three_steps({fsdp}, {remat!r})"), alone, rtol=1e-5)


@pytest.mark.slow
def test_an_embedding_beside_a_head_of_its_own_is_not_gathered():
    found = on_devices(4, "three_steps(4, tied=False)")
    np.testing.assert_allclose(found, three_steps(1, tied=False), rtol=1e-5)
