"""The sharding table, and that splitting over devices does not change a step."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_case as case
from flax import nnx
from jax.sharding import PartitionSpec as P

from mmrstraj_jax import parallel
from mmrstraj_jax.config import MODEL_PRESETS
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
    assert specs["language_model.embed_tokens.weight"] == P(None, "fsdp")
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


def three_steps(fsdp: int) -> dict:
    """Losses of three steps with dropout on all devices of this process, and what was compiled."""
    config = case.config(micro_batch_size=4 // jax.device_count())
    mesh = parallel.make_mesh(fsdp)
    graphdef, trainable, frozen = states.split(case.model())
    before = states.checksum(frozen)
    trainable, frozen = (parallel.shard_parameters(tree, mesh) for tree in (trainable, frozen))
    optimizer = Optimizer(config.optim, 10)
    opt_state = parallel.init_optimizer(optimizer.init, trainable, mesh)
    step = build_step(graphdef, optimizer, config, placed=parallel.shardings_of((trainable, opt_state)))
    losses = []
    for index in range(3):
        batch = parallel.shard_batch(case.stacked(case.batch(seed=index)), mesh, batch_axis=1)
        trainable, opt_state, metrics = step(trainable, opt_state, frozen, batch, index + 1)
        losses.append(float(metrics["loss"]))
    states.check_frozen(frozen, before, "sharded")
    kept = {name: str(leaf.sharding.spec) for name, leaf in trainable.items()}
    expected = parallel.parameter_shardings(trainable, mesh)
    assert kept == {name: str(sharding.spec) for name, sharding in expected.items()}
    return {"losses": losses, "devices": jax.device_count(), "compiled": step._cache_size()}


def test_losses_do_not_depend_on_the_number_of_devices():
    command = "import json, test_parallel; print(json.dumps(test_parallel.three_steps(2)))"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    four, here = json.loads(done.stdout.splitlines()[-1]), three_steps(1)
    assert four["devices"] == 4
    np.testing.assert_allclose(four["losses"], here["losses"], rtol=1e-5)
    assert here["compiled"] == four["compiled"] == 1
