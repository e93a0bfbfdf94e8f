"""Whole runs on a random tiny model: resume, stop, continue, and every refusal."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import training_case as case

from mmrstraj_jax import config as configs
from mmrstraj_jax.config import LoRAConfig
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.train import Launch, main, train
from mmrstraj_jax.training import manifest, run, setup
from mmrstraj_jax.training import state as states
from mmrstraj_jax.training.checkpoint import Checkpoints, finished_steps
from mmrstraj_jax.training.monitor import Meter, read_metrics
from mmrstraj_jax.training.optimizer import Optimizer
from mmrstraj_jax.training.resilience import Diverged, Stopped
from mmrstraj_jax.weights import load as weights_load


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of this file share their programs through JAX's disk cache: compiling is most of what they
    cost.
    """
    keys = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {key: getattr(jax.config, key) for key in keys}
    for key, value in keys.items():
        jax.config.update(key, value)
    yield
    for key, value in before.items():
        jax.config.update(key, value)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    os.environ["MMRSTRAJ_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield case.world(tmp_path_factory.mktemp("world"))
    del os.environ["MMRSTRAJ_CACHE"]


def settings(world, run_dir: Path, **changes):
    """Six steps, two epochs of twelve rows, with dropout; saves and evaluates on the way."""
    defaults = {"steps": 6, "save_every": 2, "eval_every": 3, "length_multiple": 32, "max_length": 256}
    return case.config(**world, run_dir=str(run_dir), **(defaults | changes))


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """(run directory, config) of an uninterrupted run."""
    config = settings(world, tmp_path_factory.mktemp("straight") / "run")
    return train(config), config


def final_state(run_dir: Path):
    opened = run.open_run(run_dir)
    _, trainable, frozen = states.split(opened.model)
    return opened, trainable, frozen


def assert_same_run(a: Path, b: Path):
    """Every trained number and every logged loss is bit-equal; the optimizer's state too."""
    (first, ours, _), (second, theirs, _) = final_state(a), final_state(b)
    assert first.step == second.step
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    losses = [
        [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(d / "metrics.jsonl")] for d in (a, b)
    ]
    assert losses[0] == losses[1]


# ---- a whole run ----


def test_the_run_directory_is_what_the_contract_says(straight):
    run_dir, config = straight
    assert {path.name for path in run_dir.iterdir()} == {
        *(
            "config.json",
            "base.json",
            "clock.json",
            "tokenizer",
            "metrics.jsonl",
            "loss.png",
            "tb",
            "checkpoints",
            "log.txt",
        ),
        "summary.json",
    }
    assert run.read_config(run_dir) == config
    base = json.loads((run_dir / "base.json").read_text())
    loaded = weights_load.load_model(config.weights, dtype=jnp.float32)
    assert (base["path"], base["fingerprint"]) == (config.weights, loaded.fingerprint)
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    keys = {"loss", "lr/tower", "lr/projector", "grad_norm", "samples_per_s", "tokens_per_s"}
    assert all(keys <= set(row) for row in rows)
    assert rows[0]["lr/tower"] == 0 and rows[1]["lr/projector"] == pytest.approx(0.02)
    assert ["eval_loss" in row for row in rows] == [False, False, True, False, False, True]
    assert {"eval_accuracy", "eval_accuracy/count", "eval_accuracy/scene"} <= set(rows[-1])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval_loss"] == rows[-1]["eval_loss"] and summary["best_step"] in (3, 6)
    log = (run_dir / "log.txt").read_text().splitlines()
    assert log[0].startswith(f"Training {config.weights} on {config.data}: case, model tiny")
    assert any("vision_tower (LoRA)" in line for line in log)
    (programs,) = [line for line in log if "compiled train programs for" in line]
    assert not programs.startswith("WARNING")  # no more programs than buckets
    assert log[-1].startswith(f"The run lies in {run_dir}")


def test_a_finished_run_says_so(straight, capsys):
    run_dir, config = straight
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert train(config) == run_dir
    assert f"{run_dir} is finished" in capsys.readouterr().out
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_another_config_is_shown_and_refused(straight):
    run_dir, config = straight
    changed = replace(config, seed=5, optim=replace(config.optim, tower_lr=0.5))
    with pytest.raises(UserError, match="another config: seed: 0 -> 5; optim.tower_lr: 0.01 -> 0.5"):
        train(changed)
    assert train(replace(config, notes="only a note")) == run_dir


def test_another_config_goes_on_if_asked(straight, tmp_path, capsys):
    """One step more than the finished run had: it is unfinished again, and its config is the new one."""
    run_dir = Path(shutil.copytree(straight[0], tmp_path / "run"))
    longer = replace(straight[1], run_dir=str(run_dir), steps=7)
    with pytest.raises(UserError, match="another config: steps: 6 -> 7.*--allow-config-change"):
        train(longer)
    train(longer, launch=Launch(allow_config_change=True))
    out = capsys.readouterr().out
    assert "goes on with another config: steps: 6 -> 7" in out and "total_steps 6 -> 7" in out
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]
    assert (
        run.read_config(run_dir) == longer
        and json.loads((run_dir / "summary.json").read_text())["steps"] == 7
    )


def test_the_frozen_weights_are_those_of_the_file(straight):
    run_dir, config = straight
    _, trainable, frozen = final_state(run_dir)
    base = weights_load.load_model(config.weights, dtype=jnp.float32).model
    _, nothing, plain = states.split(base)
    assert not nothing
    assert states.checksum(frozen) == states.checksum(plain)
    assert json.loads((run_dir / "base.json").read_text())["frozen"] == states.checksum(frozen)


# ---- resume ----


class Killed(BaseException):
    """As near to kill -9 as one process can come: nothing below train() catches it."""


@pytest.mark.faults
def test_resume_after_a_crash_is_bit_equal(world, straight, tmp_path, monkeypatch):
    config = settings(world, tmp_path / "run")
    real = Meter.row

    def dies(self, step, *rest):
        if step == 5:
            raise Killed
        return real(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "row", dies)
        with pytest.raises(Killed):
            train(config)
    assert run.status(tmp_path / "run", config) == "resume"
    train(config)
    assert f"going on after step 4 of 6 in {tmp_path / 'run'}" in (tmp_path / "run" / "log.txt").read_text()
    assert_same_run(tmp_path / "run", straight[0])


@pytest.mark.faults
def test_a_signal_saves_at_the_next_step_boundary(world, straight, tmp_path, monkeypatch):
    config = settings(world, tmp_path / "run", save_every=100, eval_every=0)
    real = Meter.row

    def signalled(self, step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step, *rest)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Meter, "row", signalled)
        with pytest.raises(Stopped, match="SIGTERM after step 3 of 6, which is saved"):
            train(config)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert not (tmp_path / "run" / "summary.json").exists()
    train(config)
    assert_same_run(tmp_path / "run", straight[0])


@pytest.mark.faults
def test_stopped_in_the_last_evaluation_goes_on_with_it(world, straight, tmp_path, monkeypatch):
    config = settings(world, tmp_path / "run", eval_every=0)
    real, passes = setup.eval_batches, []

    def signalled(loader):
        passes.append(loader)
        if len(passes) > 1:  # the first is before training
            os.kill(os.getpid(), signal.SIGTERM)
        yield from real(loader)

    with monkeypatch.context() as patch:
        patch.setattr("mmrstraj_jax.training.validation.eval_batches", signalled)
        for _ in range(2):  # in the second start it is stopped while it makes up for it
            with pytest.raises(Stopped, match="after step 6 of 6"):
                train(config)
    assert len(passes) == 3 and not (tmp_path / "run" / "summary.json").exists()
    train(config)
    summaries = [json.loads((d / "summary.json").read_text()) for d in (tmp_path / "run", straight[0])]
    assert summaries[0]["eval_loss"] == summaries[1]["eval_loss"]
    assert summaries[0]["before"] == summaries[1]["before"] != {}


@pytest.mark.faults
def test_an_evaluation_that_was_stopped_is_made_up_for(world, straight, tmp_path, monkeypatch):
    """Of step 3, whose row log_every alone would leave out."""
    config = settings(world, tmp_path / "run", log_every=4)
    real, passes = setup.eval_batches, []

    def signalled(loader):
        passes.append(loader)
        if len(passes) == 2:  # the first is before training
            os.kill(os.getpid(), signal.SIGTERM)
        yield from real(loader)

    with monkeypatch.context() as patch:
        patch.setattr("mmrstraj_jax.training.validation.eval_batches", signalled)
        with pytest.raises(Stopped, match="after step 3 of 6"):
            train(config)
    train(config)
    rows, expected = (read_metrics(d / "metrics.jsonl") for d in (tmp_path / "run", straight[0]))
    assert [row["step"] for row in rows] == [3, 4, 6]
    for row in rows:
        assert row.get("eval_loss") == expected[row["step"] - 1].get("eval_loss")
    summaries = [json.loads((d / "summary.json").read_text()) for d in (tmp_path / "run", straight[0])]
    assert summaries[0] == summaries[1] and summaries[0]["skipped"] == 0
    meta = manifest.verify(tmp_path / "run" / "checkpoints" / "3")
    assert meta["eval_loss"] == expected[2]["eval_loss"]


@pytest.mark.faults
def test_other_held_out_rows_and_other_images_are_refused(world, straight, tmp_path):
    run_dir = shutil.copytree(straight[0], tmp_path / "run")
    (run_dir / "summary.json").unlink()
    config = replace(straight[1], run_dir=str(run_dir))
    held_out, picture = Path(world["eval_data"]), Path(world["data"]).parent / "0.png"
    other = tmp_path / "other.png"
    PIL.Image.open(picture).rotate(180).save(other)
    changes = {
        held_out: ("eval_data", held_out.read_bytes().replace(b"0 roads", b"9 roads")),
        picture: ("images .*, eval_images", other.read_bytes()),
    }
    for path, (keys, content) in changes.items():
        before = path.read_bytes()
        path.write_bytes(content)
        try:
            with pytest.raises(UserError, match=f"the data changed since the run began .{keys} .* -> "):
                train(config)
        finally:
            path.write_bytes(before)
    old = {"total_steps": 6, "seed": 0, "data": "same"}  # of a version that kept no more
    run.check_resumable(run_dir, old, old | {"images": "new", "eval_data": None}, False, print)


@pytest.mark.faults
def test_changed_data_is_refused(straight, tmp_path, monkeypatch):
    shutil.copytree(straight[0], tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    real = setup.build_index
    monkeypatch.setattr(setup, "build_index", lambda *a, **k: replace(real(*a, **k), fingerprint="other"))
    with pytest.raises(UserError, match="the data changed since the run began .data .* -> other"):
        train(replace(straight[1], run_dir=str(tmp_path / "run")))


def test_a_run_that_never_saved_starts_again(world, tmp_path):
    config = settings(world, tmp_path / "run")
    start = run.start(config)
    run.create(tmp_path / "run", config, start.base, start.tokenizer_dir)
    assert run.status(tmp_path / "run", replace(config, seed=3)) == "new"
    (tmp_path / "run" / "checkpoints" / "unreadable-2").mkdir(parents=True)
    with pytest.raises(UserError, match="all its checkpoints are unreadable.*--allow-fresh"):
        run.status(tmp_path / "run", config)
    assert run.status(tmp_path / "run", config, allow_fresh=True) == "new"


def test_a_run_whose_checkpoints_are_gone_does_not_start_over_by_itself(straight, tmp_path):
    run_dir = shutil.copytree(straight[0], tmp_path / "run")
    config = replace(straight[1], run_dir=str(run_dir))
    for folder in (run_dir / "checkpoints").iterdir():
        shutil.rmtree(folder)
    with pytest.raises(UserError, match="all its checkpoints are gone.*--allow-fresh"):
        run.status(run_dir, config)
    start = run.start(config)
    assert run.status(run_dir, config, allow_fresh=True) == "new"
    run.create(run_dir, config, start.base, start.tokenizer_dir)
    assert not (run_dir / "summary.json").exists()  # or the new run would count as finished
    with pytest.raises(UserError, match="all its checkpoints are gone"):
        run.status(run_dir, config)
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:4]))
    assert run.status(run_dir, config) == "new"  # the first save, after step 2, may have failed


# ---- numbers that go wrong ----


@pytest.mark.faults
def test_a_run_without_one_usable_update_has_not_finished(world, tmp_path, monkeypatch):
    real = setup.fold
    poison = lambda batch, rows: (made := real(batch, rows)) | {"weights": made["weights"] * np.nan}  # noqa: E731
    monkeypatch.setattr(setup, "fold", poison)
    config = settings(world, tmp_path / "run", steps=3, eval_every=0, eval_samples=0)
    with pytest.raises(Diverged, match="none of the 3 updates was usable"):
        train(config)
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.faults
def test_non_finite_updates_are_logged_and_end_the_run(world, tmp_path, monkeypatch):
    config = settings(world, tmp_path / "run")
    real, calls = setup.fold, []

    def poisoned(batch, rows):
        folded = real(batch, rows)
        if folded["weights"].any():  # not the padding that the largest program is tried on
            calls.append(0)
        return folded | {"weights": folded["weights"] * np.float32(np.nan if len(calls) > 3 else 1)}

    monkeypatch.setattr(setup, "fold", poisoned)
    monkeypatch.setattr("mmrstraj_jax.training.resilience.MAX_SKIPPED", 3)
    with pytest.raises(Diverged, match=r"3 updates in a row were not usable, the last at step 6 \(rows row"):
        train(config)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 2, 3] and rows[3]["loss"] == "nan"
    assert "WARNING: step 4: loss nan" in (tmp_path / "run" / "log.txt").read_text()
    opened, trainable, _ = final_state(tmp_path / "run")
    assert opened.step == 4  # the last save; its numbers are those after step 3
    assert all(np.isfinite(leaf).all() for leaf in trainable.values())


@pytest.mark.faults
def test_a_frozen_leaf_that_changes_stops_the_run(world, tmp_path, monkeypatch):
    config = settings(world, tmp_path / "run")
    real, leaf = states.checksum, "language_model.norm.weight"

    def after_the_start(tree):
        if (tmp_path / "run" / "base.json").exists():
            tree = tree | {leaf: tree[leaf] + 1}
        return real(tree)

    monkeypatch.setattr(states, "checksum", after_the_start)
    with pytest.raises(states.FrozenWeightsChanged, match=f"step 2: frozen weights changed: {leaf};"):
        train(config)
    assert not finished_steps(tmp_path / "run" / "checkpoints")


# ---- one run built on another ----


def as_if_trained(config) -> Path:
    """A run directory with one checkpoint whose trainables moved, without the time that training takes."""
    start, run_dir = run.start(config), Path(config.run_dir)
    _, trainable, frozen = states.split(start.model)
    run.create(run_dir, config, start.base | {"frozen": states.checksum(frozen)}, start.tokenizer_dir)
    checkpoints = Checkpoints(run_dir / "checkpoints")
    moved = {name: leaf + 0.25 for name, leaf in trainable.items()}
    checkpoints.save(2, moved, Optimizer(config.optim, 2).init(moved), {})
    checkpoints.close()
    return run_dir


def test_init_from_continues_the_adapters(world, straight, tmp_path):
    run_dir, config = straight
    _, before, frozen = final_state(run_dir)
    after = replace(
        config, init_from=str(run_dir), run_dir=str(tmp_path / "next"), weights=None, name="stage2"
    )
    start = run.start(replace(after, lora=replace(config.lora, dropout=0.0)))
    _, trainable, same = states.split(start.model)
    for name in before:
        np.testing.assert_array_equal(trainable[name], before[name])
    assert states.checksum(same) == states.checksum(frozen)
    assert start.model.multi_modal_projector.linear_1.lora_dropout == 0.0
    assert start.base["init_from"] == {"run": str(run_dir), "step": 6} and start.base["rebuild"] is None
    train(after)
    assert read_metrics(tmp_path / "next" / "metrics.jsonl")[0]["step"] == 1
    with pytest.raises(UserError, match="adapters are of another shape.*lora.rank: 2 -> 4.*--merge-init"):
        run.start(replace(after, lora=replace(config.lora, rank=4)))


def test_init_from_can_merge_and_start_new_adapters(world, straight, tmp_path):
    run_dir, config = straight
    lora = LoRAConfig(rank=1, dropout=0.0, vision_tower=("q_proj",), projector=("linear_1",))
    merged = replace(
        config, init_from=str(run_dir), merge_init=True, lora=lora, weights=None, steps=2, eval_samples=0,
        run_dir=str(tmp_path / "merged"),
    )  # fmt: skip
    start = run.start(merged)
    inputs = jax.tree.map(jnp.asarray, case.batch()["inputs"])
    hidden = jax.jit(lambda model: model.hidden_states(inputs))
    _, trainable, frozen = states.split(start.model)
    assert {name.rsplit(".", 2)[1] for name in trainable} == {"q_proj", "linear_1"}
    np.testing.assert_allclose(hidden(start.model), hidden(run.open_run(run_dir).model), atol=1e-4)
    opened, after, again = final_state(as_if_trained(merged))
    assert states.checksum(again) == states.checksum(frozen)
    assert opened.step == 2
    for name in after:
        np.testing.assert_array_equal(after[name], trainable[name] + 0.25)


def test_open_run_finds_steps_and_checks_the_base(straight, tmp_path):
    run_dir, config = straight
    best = json.loads((run_dir / "summary.json").read_text())["best_step"]
    assert run.is_run(run_dir) and not run.is_run(tmp_path)
    assert run.open_run(run_dir, step="best").step == best
    opened = run.open_run(run_dir, dtype=jnp.bfloat16, step=4)
    assert opened.step == 4 and opened.config.text.hidden_size == 16 and opened.tokenizer_dir.is_dir()
    assert opened.model.language_model.norm.weight.dtype == jnp.bfloat16
    assert opened.model.multi_modal_projector.linear_1.lora_A.dtype == jnp.float32
    assert opened.anyres == config.anyres
    other = case.world(tmp_path / "other")["weights"]
    run.open_run(run_dir, weights=other)  # the same bytes elsewhere
    with pytest.raises(UserError, match="no checkpoint of step 1; expected one of 3, 4, 6"):
        run.open_run(run_dir, step=1)


def test_weights_that_changed_are_refused(world, straight, monkeypatch):
    run_dir, _ = straight
    real = weights_load.load_model
    monkeypatch.setattr(run, "load_model", lambda *a, **k: replace(real(*a, **k), fingerprint="0" * 64))
    with pytest.raises(UserError, match="not the weights this run was trained on"):
        run.open_run(run_dir)


# ---- refusals: one line each, before anything is written ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "nowhere"}, "--weights nowhere: no such folder"),
        ({"data": "nowhere.json"}, "--data nowhere.json: no such file"),
        ({"eval_data": "nowhere.json"}, "--eval-data nowhere.json: no such file"),
        ({"image_root": "nowhere"}, "--image-root nowhere: no such folder"),
        ({"init_from": "nowhere"}, "--init-from nowhere: not a run directory"),
        ({"model": "7b", "weights": None}, "--model 7b: has no embedded weights"),
        ({"model": "7b", "data": None}, "--model 7b: name its training data"),
        ({"train_full": ("projector",)}, "train_full projector: has LoRA targets too"),
        ({"lora": LoRAConfig(vision_tower=(), projector=())}, "nothing to train"),
        (
            {"micro_batch_size": 3, "batch_size": 3, "data": "{data}:2,nowhere.json:1"},
            "nowhere.json: no such file",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(world, tmp_path, changes, message):
    changes = {k: v.format(**world) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(UserError, match=message) as error:
        train(settings(world | changes, tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_empty_group_that_was_overridden(world, tmp_path):
    with pytest.raises(UserError, match="optim.other_lr: group 'other' has no trainable parameter"):
        train(settings(world, tmp_path / "run"), frozenset({"optim.other_lr"}))
    assert not (tmp_path / "run").exists()


def test_a_view_size_that_is_not_the_towers_is_refused(world, tmp_path):
    config = settings(world, tmp_path / "run")
    other = replace(config, anyres=config.anyres.for_views(2 * config.anyres.view_size, 7))
    with pytest.raises(UserError, match=f"--anyres.view-size {other.anyres.view_size}: the tower's is "):
        train(other, frozenset({"anyres.view_size"}))
    setup.check_views(other, config.anyres, frozenset())  # a recipe's own: the tower's is taken


def test_every_row_that_is_left_out_is_on_disk(world, tmp_path, capsys):
    rows = json.loads(Path(world["data"]).read_text())
    for row in rows[:8]:
        row["image"] = f"missing-{row['image']}"
    data = Path(world["data"]).with_name("mostly missing.json")
    data.write_text(json.dumps(rows))
    train(settings(world | {"data": str(data)}, tmp_path / "run", steps=2))
    found = json.loads((tmp_path / "run" / "left_out.json").read_text())
    assert [problem["line"] for problem in found if problem["dropped"]] == list(range(8))
    assert all("missing-" in problem["message"] for problem in found)
    out = capsys.readouterr().out
    assert "WARNING: data: 8 of 12 rows are left out" in out and "left_out.json" in out


def test_a_run_directory_is_no_weights(straight, tmp_path):
    run_dir, config = straight
    with pytest.raises(UserError, match="is a run directory; continue it with --init-from"):
        run.start(replace(config, weights=str(run_dir)))


def test_a_fresh_projector_needs_stage_0(world, straight, tmp_path, monkeypatch):
    run_dir, config = straight
    real = weights_load.load_model
    fresh = ("multi_modal_projector.linear_1.weight", "image_newline")
    monkeypatch.setattr(run, "load_model", lambda *a, **k: replace(real(*a, **k), fresh=fresh))
    with pytest.raises(UserError, match="the projector is fresh.*stage 0.*stage0_align"):
        run.start(config)
    aligned = replace(config, train_full=("projector",), lora=LoRAConfig(vision_tower=(), projector=()))
    aligned = replace(aligned, run_dir=str(tmp_path / "stage0"))
    as_if_trained(aligned)
    stage1 = run.start(replace(config, init_from=aligned.run_dir, weights=None))
    _, trainable, frozen = states.split(stage1.model)
    _, projector, _ = final_state(Path(aligned.run_dir))
    assert all(".lora_" in name for name in trainable)
    for name, value in projector.items():
        np.testing.assert_array_equal(frozen[name], value)


# ---- the command ----


def test_print_config_needs_no_run(capsys):
    assert main(["--config", "stage1", "--model", "7b", "--print-config", "--steps", "7"]) == 0
    out = capsys.readouterr().out
    assert "optim.projector_lr" in out and "5e-05" in out


def test_the_command_stops_with_code_75(monkeypatch, capsys):
    def stopped(config, overridden, launch):
        assert overridden == {"steps"} and config.steps == 3
        raise Stopped("SIGTERM after step 1")

    monkeypatch.setattr("mmrstraj_jax.train.train", stopped)
    assert main(["--config", "stage1", "--steps", "3"]) == 75
    assert "stopped: SIGTERM after step 1" in capsys.readouterr().out


def test_stage_names_choose_the_embedded_sample():
    config, _ = configs.load_config("stage2", [])
    found = setup.sources(config)
    assert (found.data, found.split) == (None, "stage2")
    line = setup.describe(config, found, frozenset())
    assert line.startswith("Training the embedded tiny model on the embedded SynthCity sample (stage2): ")
    assert "small-model settings instead of the paper's" in line
