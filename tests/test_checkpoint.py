"""Checkpoints: bit-equal round trip, retention, fallback, and what an interrupted save leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrstraj_jax.config import OptimConfig
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training.checkpoint import Checkpoints, best_step, finished_steps, read_trainable
from mmrstraj_jax.training.optimizer import Optimizer, OptState


def state(seed: int):
    random = np.random.default_rng(seed)
    trainable = {
        "vision_tower.layers.mlp.fc1.lora_A": jnp.asarray(random.normal(size=(2, 3, 4)), jnp.float32),
        "image_newline": jnp.asarray(random.normal(size=5), jnp.float32),
    }
    opt_state = Optimizer(OptimConfig(), 10).init(trainable)
    noise = lambda x: x + jnp.asarray(random.integers(1, 9, x.shape), x.dtype)  # noqa: E731
    return trainable, jax.tree.map(noise, opt_state)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]


def saved(folder, losses: dict, keep_last: int = 2, say=print) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep_last, say=say)
    for step, loss in losses.items():
        checkpoints.save(step, *state(step), {"step": step}, loss)
    checkpoints.wait()
    return checkpoints


def restored(checkpoints: Checkpoints):
    """The newest intact step, as train.py reads it."""
    return checkpoints.restore(checkpoints.newest_intact(), *state(99))


def test_round_trip_is_bit_equal(tmp_path):
    saved(tmp_path / "c", {3: None}).close()
    found = restored(Checkpoints(tmp_path / "c"))
    assert found.step == 3 and found.meta == {"step": 3, "eval_loss": None}
    assert isinstance(found.opt_state, OptState)
    equal((found.trainable, found.opt_state), state(3))


def test_another_model_is_named_and_nothing_is_set_aside(tmp_path):
    saved(tmp_path / "c", {3: None}).close()
    other = {"image_newline": jnp.zeros(9)}
    with pytest.raises(UserError, match="c/3: intact, but not of this model"):
        Checkpoints(tmp_path / "c").restore(3, other, Optimizer(OptimConfig(), 10).init(other))
    assert finished_steps(tmp_path / "c") == [3]


def test_state_may_change_while_it_is_being_written(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", 1)
    trainable, opt_state = state(1)
    checkpoints.save(1, trainable, opt_state, {})
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    overwrite(trainable), overwrite(opt_state)
    checkpoints.wait()
    equal(checkpoints.restore(1, *state(5))[1:3], state(1))


def test_the_last_ones_and_the_best_stay(tmp_path):
    checkpoints = saved(tmp_path / "c", {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 4.0})
    assert checkpoints.steps() == [2, 4, 5]
    assert best_step(tmp_path / "c") == 2
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", 2)
    again.save(6, *state(6), {}, 0.5)
    again.wait()
    assert again.steps() == [5, 6] and best_step(tmp_path / "c") == 6


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    checkpoints = saved(tmp_path / "c", {2: float("nan"), 4: 0.5, 6: None})
    assert checkpoints.steps() == [4, 6] and best_step(tmp_path / "c") == 4
    checkpoints.amend(6, 0.25)
    assert best_step(tmp_path / "c") == 6
    assert checkpoints.newest_intact() == 6 and restored(checkpoints).meta["eval_loss"] == 0.25
    checkpoints.close()


def test_trainables_alone(tmp_path):
    folder, like = tmp_path / "c", state(9)[0]
    checkpoints = saved(folder, {1: None, 2: None, 3: 0.5, 4: 0.7}, keep_last=3)
    (folder / "5.partial.orbax-checkpoint-tmp").mkdir()  # another process is writing
    for step, expected in ((None, 4), ("best", 3), (2, 2)):
        found, trainable = read_trainable(folder, like, step)
        assert found == expected
        equal(trainable, state(expected)[0])
    assert (folder / "5.partial.orbax-checkpoint-tmp").exists()
    with pytest.raises(UserError, match="no checkpoint of step 7; expected one of 2, 3, 4"):
        read_trainable(folder, like, 7)
    with pytest.raises(UserError, match="cannot be read"):
        read_trainable(folder, {"image_newline": jnp.zeros(9)}, 4)
    checkpoints.close()


def test_reading_falls_back_too(tmp_path):
    saved(tmp_path / "c", {1: None, 2: None}).close()
    for path in (tmp_path / "c" / "2" / "trainable").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    lines = []
    step, trainable = read_trainable(tmp_path / "c", state(9)[0], say=lines.append)
    assert step == 1 and len(lines) == 1 and "taking the step before it" in lines[0]
    equal(trainable, state(1)[0])
    with pytest.raises(UserError, match="checkpoint .*2 cannot be read"):
        read_trainable(tmp_path / "c", state(9)[0], 2)
    with pytest.raises(UserError, match="no checkpoint was evaluated"):
        read_trainable(tmp_path / "c", state(9)[0], "best")


def test_nothing_saved_is_not_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.newest_intact() is None
    with pytest.raises(UserError, match="no finished checkpoint"):
        read_trainable(tmp_path / "c", state(0)[0])
