"""The embedded default learns: `python -m mmrstraj_jax.train --config stage1`, then stage 2, as typed."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from mmrstraj_jax import parallel
from mmrstraj_jax.config import load_config
from mmrstraj_jax.synthcity.sample import ensure_sample
from mmrstraj_jax.train import train
from mmrstraj_jax.training import run, setup
from mmrstraj_jax.training import state as states
from mmrstraj_jax.training.step import build_eval_step
from mmrstraj_jax.training.validation import evaluate


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> dict[str, Path]:
    return ensure_sample(tmp_path_factory.mktemp("cache"))


def blanked(rows: Path, folder: Path) -> Path:
    """The same questions about grey images of the same sizes."""
    (folder / "images").mkdir(parents=True)
    for image in {row["image"] for row in json.loads(rows.read_text())}:
        size = Image.open(rows.parent / image).size
        Image.new("RGB", size, (127, 127, 127)).save(folder / image)
    (folder / rows.name).write_text(rows.read_text())
    return folder / rows.name


def held_out(run_dir: Path, rows: Path, cache: Path) -> dict[str, float]:
    opened = run.open_run(run_dir)
    config = dataclasses.replace(opened.run_config, eval_samples=10**6)
    data = setup.load_data(config, setup.Sources(str(rows), str(rows), "stage1"), opened, cache, print)
    graphdef, trainable, frozen = states.split(opened.model)
    step = build_eval_step(graphdef)
    return evaluate(step, trainable, frozen, data, parallel.make_mesh(), lambda: None)


def test_the_embedded_base_is_small():
    size = sum(path.stat().st_size for path in run.embedded_weights().iterdir())
    adapters = 2 * 147_456 * 2  # two adapters of the paper's targets, bfloat16
    assert size + adapters < 8_000_000


@pytest.mark.slow
def test_both_stages_learn_and_look_at_the_image(sample, tmp_path, monkeypatch):
    monkeypatch.setattr("mmrstraj_jax.training.setup.sample.ensure_sample", lambda: sample)
    previous = None
    for stage in ("stage1", "stage2"):
        config, _ = load_config(stage, [])
        config = dataclasses.replace(config, run_dir=str(tmp_path / stage), init_from=previous)
        folder = train(config)
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["eval_loss"] < summary["before"]["eval_loss"], summary
        seen = held_out(folder, sample[f"eval_{stage}"], tmp_path / "index")
        blind = held_out(
            folder, blanked(sample[f"eval_{stage}"], tmp_path / f"blank_{stage}"), tmp_path / "index"
        )
        print(stage, "held-out loss", summary["before"]["eval_loss"], "->", summary["eval_loss"])
        print(stage, "answers right:", {"image": seen, "blanked": blind})
        assert seen["eval_accuracy"] > blind["eval_accuracy"]
        previous = str(folder)
