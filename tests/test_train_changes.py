"""What may change while a run goes on, what may not, and options that would do nothing."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import training_case as case
from test_train import compiled_once  # noqa: F401

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.train import Launch, train
from mmrstraj_jax.training import manifest, run, setup
from mmrstraj_jax.training.checkpoint import best_step
from mmrstraj_jax.training.monitor import read_metrics

CHANGED = Launch(allow_config_change=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMRSTRAJ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield case.world(tmp_path_factory.mktemp("world"))


def settings(world, run_dir: Path, **changes):
    defaults = {
        "steps": 2,
        "save_every": 1,
        "length_multiple": 256,
        "max_length": 256,
        "run_dir": str(run_dir),
    }
    return case.config(**world | defaults | changes)


@pytest.fixture(scope="module")
def unscored(world, tmp_path_factory):
    """The config of a finished run of two steps that held nothing out."""
    config = settings(world, tmp_path_factory.mktemp("unscored") / "run", eval_data=None)
    train(config)
    return config


def copy(config, folder: Path):
    """The config of a copy of its run."""
    return replace(config, run_dir=str(shutil.copytree(config.run_dir, folder / "run")))


def test_held_out_rows_may_come_later(world, unscored, tmp_path):
    config = replace(copy(unscored, tmp_path), steps=3, eval_data=world["eval_data"])
    run_dir = train(config, launch=CHANGED)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval_loss"] > 0 and summary["before"] == {} and summary["best_step"] == 3
    assert "held-out loss" not in (run_dir / "log.txt").read_text()
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3]


def test_steps_of_other_held_out_rows_are_not_compared(unscored, tmp_path):
    checkpoints = Path(copy(unscored, tmp_path).run_dir) / "checkpoints"
    for step, (rows, loss) in {1: ("old", 0.5), 2: ("old", 0.7)}.items():
        meta = manifest.read_meta(checkpoints / str(step))
        manifest.rewrite(checkpoints / str(step), meta | {"eval_data": rows, "eval_loss": loss})
    assert best_step(checkpoints) == 1
    manifest.rewrite(checkpoints / "2", meta | {"eval_data": "new", "eval_loss": 0.7})
    assert best_step(checkpoints) == 2


def test_weights_that_were_moved_are_named_anew(unscored, tmp_path):
    moved = str(shutil.copytree(unscored.weights, tmp_path / "moved"))
    other = case.world(tmp_path / "other")["weights"]
    config = replace(copy(unscored, tmp_path), steps=3)
    base = Path(config.run_dir) / "base.json"
    gone = json.loads(base.read_text()) | {"path": str(tmp_path / "gone")}
    base.write_text(json.dumps(gone))
    tensors = next(Path(other).glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="not the weights this run was trained on"):
        train(replace(config, weights=other), launch=CHANGED)
    train(replace(config, weights=moved), launch=CHANGED)
    assert json.loads(base.read_text()) == gone | {"path": moved}
    assert run.open_run(config.run_dir).step == 3


@pytest.mark.parametrize(
    "change, named",
    [
        ({"feature_layer": -1}, "feature_layer: 0 -> -1"),
        ({"dtype": "bfloat16"}, "dtype: float32 -> bfloat16"),
        ({"quantize_llm": "int8"}, "quantize_llm: none -> int8"),
        ({"init_from": "runs/other"}, "init_from: None -> runs/other"),
        ({"train_full": ("newline",)}, r"train_full: \(none\) -> newline"),
        ({"lora": replace(case.CONFIG.lora, rank=4)}, "lora.rank: 2 -> 4"),
    ],
)
def test_the_model_of_a_run_stays_what_it_is(unscored, change, named):
    config = replace(unscored, **change, steps=3)
    with pytest.raises(UserError, match=f"holds a run of another model: {named}; .* a new --run-dir"):
        run.status(Path(config.run_dir), config, allow_config_change=True)


def test_a_full_disk_at_a_change_of_config_is_one_line(unscored, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "write_json", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device."):
        run.change_config(Path(unscored.run_dir), unscored, {})


def test_a_run_cannot_end_before_where_it_is(unscored, tmp_path):
    config = replace(copy(unscored, tmp_path), steps=1)
    with pytest.raises(UserError, match="2 steps are done, more than the 1 asked for"):
        train(config, launch=CHANGED)
    assert run.read_config(Path(config.run_dir)).steps == 2


def test_a_run_goes_on_from_a_finished_one_of_its_size(unscored, tmp_path, capsys):
    first = copy(unscored, tmp_path)
    config = replace(first, init_from=first.run_dir, run_dir=str(tmp_path / "next"), steps=1)
    with pytest.raises(UserError, match="was trained with --model tiny; --model 7b has another recipe"):
        setup.check_start(replace(config, model="7b"))
    (Path(first.run_dir) / "summary.json").unlink()
    train(config)
    assert f"WARNING: {first.run_dir} has not finished; the adapters of its step 2" in capsys.readouterr().out
    (Path(first.run_dir) / "summary.json").touch()
    train(replace(config, run_dir=str(tmp_path / "other")))
    assert "WARNING" not in capsys.readouterr().out


def test_options_that_would_do_nothing(world, tmp_path, capsys):
    with pytest.raises(UserError, match="--merge-init: .* name it with --init-from"):
        setup.check_start(settings(world, tmp_path, merge_init=True))
    train(settings(world, tmp_path / "run", eval_data=None, eval_every=1, steps=1))
    assert "WARNING: eval_every 1: nothing is held out" in capsys.readouterr().out


def test_held_out_rows_count_once_whatever_their_files_weigh(world, tmp_path):
    lines = Path(world["eval_data"]).read_text().splitlines()
    few = Path(world["eval_data"]).with_name("few.jsonl")
    few.write_text(lines[0])
    config = settings(world, tmp_path / "run", eval_data=f"{few}:9,{world['eval_data']}:1")
    data = setup.load_data(config, setup.sources(config), run.start(config), tmp_path, print)
    numbers = [int(n) for rows, _ in setup.eval_batches(data.held_out) for n in rows if n >= 0]
    assert sorted(numbers) == list(range(1 + len(lines)))
