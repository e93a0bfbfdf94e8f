"""What a run shows, and that showing it never stops the run."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import training_case as case
from PIL import Image

from mmrstraj_jax.training import monitor as monitoring
from mmrstraj_jax.training import state as states
from mmrstraj_jax.training.monitor import Log, Meter, Monitor, parameter_table, read_metrics


def row(step: int, loss: float = 2.0, **more) -> dict:
    rates = {"samples_per_s": 4.0, "tokens_per_s": 100.0, "seconds": 0.5}
    return {"step": step, "loss": loss, "lr/tower": 1e-4, "grad_norm": 0.5} | rates | more


def test_table_says_what_trains(tmp_path):
    config = case.config(train_full=("newline",))
    _, trainable, frozen = states.split(case.model(config.lora, config.train_full))
    lines = {
        line.split("  ")[0].strip(): line.split() for line in parameter_table(trainable, frozen, config.optim)
    }
    tower = sum(leaf.size for name, leaf in trainable.items() if name.startswith("vision_tower"))
    assert lines["vision_tower (LoRA)"][2:6] == [f"{tower:,}", f"{tower:,}", "float32", "0.01"]
    assert lines["vision_tower"][2:5] == ["0", "float32", "frozen"]
    assert lines["image_newline (in full)"][3:7] == ["16", "16", "float32", "0.03"]
    total = sum(leaf.size for leaf in (trainable | frozen).values())
    assert lines["total"][1:3] == [f"{total:,}", f"{sum(leaf.size for leaf in trainable.values()):,}"]


def test_one_row_a_step_and_a_plot(tmp_path):
    lines = []
    monitor = Monitor(tmp_path, 0, 3, lines.append)
    for step in (1, 2, 3):
        monitor.row(row(step, 3.0 / step))
    monitor.amend({"eval_loss": np.float32(1.5), "eval_accuracy": 0.25})
    monitor.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert rows[-1]["eval_loss"] == 1.5 and "eval_loss" not in rows[0]
    assert Image.open(tmp_path / "loss.png").size == (960, 540)
    assert list((tmp_path / "tb").iterdir())
    assert any(line.startswith("step 3/3: loss 1.0000") and "tokens/s 100" in line for line in lines)


def test_rows_after_the_checkpoint_are_redone(tmp_path):
    first = Monitor(tmp_path, 0, 9, lambda _: None)
    for step in range(1, 6):
        first.row(row(step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    second = Monitor(tmp_path, 3, 9, lambda _: None)
    second.row(row(4, 9.0))
    second.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 9.0)]


def test_values_that_json_lacks_keep_the_file_valid(tmp_path):
    monitor = Monitor(tmp_path, 0, 1, lambda _: None)
    monitor.row(row(1, float("nan"), grad_norm=float("inf")))
    monitor.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (read["loss"], read["grad_norm"]) == ("nan", "inf")


@pytest.mark.faults
@pytest.mark.parametrize("sink", ["_append", "_tensorboard", "_plot", "_progress"])
def test_a_sink_that_fails_is_switched_off_once(tmp_path, monkeypatch, sink):
    def broken(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Monitor, sink, broken)
    lines = []
    monitor = Monitor(tmp_path, 0, 2, lines.append)
    monitor.row(row(1))
    monitor.row(row(2))
    monitor.close()
    assert len([line for line in lines if "switched off: OSError: No space left" in line]) == 1


@pytest.mark.faults
def test_a_log_that_cannot_be_written_goes_on_in_the_terminal(tmp_path, capsys):
    log = Log()
    log("early")
    log.open(tmp_path / "missing" / "log.txt")
    log("late")
    assert "late" in capsys.readouterr().out
    log = Log()
    log("early")
    log.open(tmp_path / "log.txt")
    log("late")
    assert (tmp_path / "log.txt").read_text() == "early\nlate\n"


def test_meter_counts_real_samples_and_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(monitoring.time, "perf_counter", lambda: now[0])
    meter = Meter()

    def batches():
        for item in "ab":
            now[0] += 1.0
            yield item

    fetched = meter.fetch(batches())
    assert next(fetched) == "a"
    now[0] += 3.0
    values = meter.row(1, {"loss": jnp.float32(2), "tokens": jnp.int32(80)}, 2)
    assert (values["samples_per_s"], values["tokens_per_s"], values["data_wait"]) == (0.5, 20.0, 0.25)
    now[0] += 50.0
    meter.pause()
    now[0] += 1.0
    assert meter.row(2, {"loss": jnp.float32(2), "tokens": jnp.int32(80)}, 2)["seconds"] == 1.0
