"""Checkpoints: bit-equal round trip, retention, fallback, and what an interrupted save leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrstraj_jax.config import OptimConfig
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training.checkpoint import Checkpoints, best_step, read_trainable
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


def test_round_trip_is_bit_equal(tmp_path):
    saved(tmp_path / "c", {3: None}).close()
    restored = Checkpoints(tmp_path / "c").restore(*state(99))
    assert restored.step == 3 and restored.meta == {"step": 3, "eval_loss": None}
    assert isinstance(restored.opt_state, OptState)
    equal((restored.trainable, restored.opt_state), state(3))


def test_state_may_change_while_it_is_being_written(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", 1)
    trainable, opt_state = state(1)
    checkpoints.save(1, trainable, opt_state, {})
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    overwrite(trainable), overwrite(opt_state)
    checkpoints.wait()
    equal(checkpoints.restore(*state(5))[1:3], state(1))


def test_the_last_ones_and_the_best_stay(tmp_path):
    checkpoints = saved(tmp_path / "c", {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 4.0})
    assert checkpoints.steps() == [2, 4, 5]
    assert best_step(tmp_path / "c") == 2
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", 2)
    again.save(6, *state(6), {}, 0.5)
    again.wait()
    assert again.steps() == [5, 6] and best_step(tmp_path / "c") == 6


def test_trainables_alone(tmp_path):
    folder, like = tmp_path / "c", state(9)[0]
    checkpoints = saved(folder, {1: None, 2: None, 3: 0.5, 4: 0.7}, keep_last=3)
    (folder / "5.orbax-checkpoint-tmp-77").mkdir()  # another process is writing
    for step, expected in ((None, 4), ("best", 3), (2, 2)):
        found, trainable = read_trainable(folder, like, step)
        assert found == expected
        equal(trainable, state(expected)[0])
    assert (folder / "5.orbax-checkpoint-tmp-77").exists()
    with pytest.raises(UserError, match="no checkpoint of step 7; expected one of 2, 3, 4"):
        read_trainable(folder, like, 7)
    with pytest.raises(UserError, match="cannot be read"):
        read_trainable(folder, {"image_newline": jnp.zeros(9)}, 4)
    checkpoints.close()


@pytest.mark.faults
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
    assert checkpoints.restore(*state(0)) is None
    with pytest.raises(UserError, match="no finished checkpoint"):
        read_trainable(tmp_path / "c", state(0)[0])


@pytest.mark.faults
def test_an_unreadable_step_falls_back_loudly(tmp_path):
    saved(tmp_path / "c", {1: None, 2: None}).close()
    for path in (tmp_path / "c" / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:7])
    lines = []
    checkpoints = Checkpoints(tmp_path / "c", 2, say=lines.append)
    restored = checkpoints.restore(*state(9))
    assert restored.step == 1
    equal(restored.trainable, state(1)[0])
    assert len(lines) == 1 and "checkpoint" in lines[0] and "unreadable-2" in lines[0]
    # The step can be written again
    checkpoints.save(2, *state(2), {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


@pytest.mark.faults
def test_an_empty_step_folder_falls_back(tmp_path):
    """Orbax alone takes the empty folder for the latest step and raises."""
    saved(tmp_path / "c", {1: None}).close()
    (tmp_path / "c" / "3").mkdir()
    assert Checkpoints(tmp_path / "c", say=lambda _: None).restore(*state(9)).step == 1


@pytest.mark.faults
def test_when_none_can_be_read_nothing_starts_over(tmp_path):
    saved(tmp_path / "c", {1: None}).close()
    for path in (tmp_path / "c" / "1").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(UserError, match="none of the checkpoints 1 can be read"):
        Checkpoints(tmp_path / "c", say=lambda _: None).restore(*state(9))


@pytest.mark.faults
def test_an_interrupted_save_is_not_a_step(tmp_path):
    saved(tmp_path / "c", {1: None}).close()
    (tmp_path / "c" / "2.orbax-checkpoint-tmp-77").mkdir()
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.steps() == [1]
    assert checkpoints.restore(*state(9)).step == 1
