"""What a run shows, and that showing it never stops the run."""

import json
import subprocess
import sys
import threading
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
import training_case as case
from PIL import Image

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training import monitor as monitoring
from mmrstraj_jax.training import sinks
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
    of_lora = [f"{tower:,}", f"{tower:,}", "float32", "0.01", "0"]  # the last: weight decay
    assert lines["vision_tower (LoRA)"][2:7] == of_lora
    assert lines["vision_tower"][2:5] == ["0", "float32", "frozen"]
    assert lines["image_newline (in full)"][3:7] == ["16", "16", "float32", "0.03"]
    total = sum(leaf.size for leaf in (trainable | frozen).values())
    assert lines["total"][1:3] == [f"{total:,}", f"{sum(leaf.size for leaf in trainable.values()):,}"]


def test_one_row_a_step_and_a_plot(tmp_path):
    lines = []
    monitor = Monitor(tmp_path, 0, 3, lines.append)
    for step in (1, 2, 3):
        monitor.row(row(step, 3.0 / step))
    monitor.amend(3, {"eval_loss": np.float32(1.5), "eval_accuracy": 0.25})
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
@pytest.mark.parametrize("sink", ["_append", "_plot", "_progress"])
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


@pytest.mark.faults
def test_a_terminal_that_is_gone_stops_nothing(tmp_path):
    """As with `| head -1` and `> /dev/full`: the log goes on in its file, and the exit code is the run's."""
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from mmrstraj_jax.training.monitor import Log
log = Log()
log("first")
log.open(Path({str(tmp_path / "log.txt")!r}))
log("second")
print("stopped")
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and not done.stderr
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [lines[0], lines[-1]] == ["first", "second"] and "No space left on device" in lines[1]


@pytest.mark.faults
def test_rows_of_a_time_without_room_are_written_at_the_next_save(tmp_path, monkeypatch):
    lines = []
    monitor = Monitor(tmp_path, 0, 4, lines.append)
    monitor.row(row(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "_append", full)
        patch.setattr(Monitor, "_rewrite", full)
        monitor.row(row(2))
        monitor.plot()
    monitor.row(row(3))
    monitor.plot()
    monitor.row(row(4))
    monitor.close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len([line for line in lines if "metrics.jsonl is" in line]) == 2


def test_damaged_lines_cost_no_other_row(tmp_path):
    good = [json.dumps(row(step)).encode() for step in (1, 2, 3)]
    bad = [b'{"step": 2, "lo\xff"}', b"\0" * 9, b"[]", b'{"step": "2"}', b'{"loss": 1}', b"\xfe\xff", b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], *bad, good[1], good[2], good[0][:9]]))
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    Monitor(tmp_path, 3, 4, lambda _: None).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join(good) + b"\n"


def test_an_evaluation_belongs_to_its_own_step(tmp_path):
    monitor = Monitor(tmp_path, 0, 9, lambda _: None)
    monitor.row(row(4))
    monitor.amend(5, {"eval_loss": 1.0})
    monitor.close()
    assert "eval_loss" not in read_metrics(tmp_path / "metrics.jsonl")[0]


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
    assert values["useful_s"] == 3.0
    now[0] += 50.0
    meter.pause()
    now[0] += 1.0
    assert meter.row(2, {"loss": jnp.float32(2), "tokens": jnp.int32(80)}, 2)["seconds"] == 1.0


def test_mfu_is_the_4n_count_over_seconds_times_peak(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitoring.time, "perf_counter", lambda: now[0])
    meter = Meter(work={4: 6e12}.get, peak=8e12)  # step 5 is number 4 from 0
    now[0] = 1.5
    values = meter.row(5, {"loss": jnp.float32(2), "tokens": jnp.int32(80)}, 2)
    assert (values["tflops_per_s"], values["mfu"]) == (4.0, 0.5)
    assert "mfu" not in Meter(work=lambda step: 1.0).row(1, {"tokens": jnp.int32(8)}, 2)


def test_goodput_counts_every_start_of_a_run(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(monitoring.time, "time", lambda: now[0])
    first = Monitor(tmp_path, 0, 9, lambda _: None)
    for step in (1, 2, 3):
        now[0] += 10
        first.row(row(step, useful_s=8.0 * step))
    first.close()
    assert first.rows[-1]["goodput"] == 24 / 30
    now[0] += 100  # killed; step 3 is lost, and the queue is long
    second = Monitor(tmp_path, 2, 9, lambda _: None)
    now[0] += 10
    second.row(row(3, useful_s=8.0))
    second.close()
    assert second.rows[-1]["useful_s"] == 24 and second.rows[-1]["goodput"] == 24 / 140
    now[0] = 5.0  # the clock was set back
    second.row(row(4, useful_s=16.0))
    assert second.rows[-1]["goodput"] == 1.0


# ---- sinks ----


class Fake:
    """A wandb module that keeps what it is told."""

    def __init__(self, **also):
        self.rows, self.opened, self.finished = [], {}, False
        functions = {"log": self.rows.append, "finish": self._finish, "define_metric": lambda *a, **k: None}
        self.module = types.SimpleNamespace(init=self._init, **also)
        self._run = types.SimpleNamespace(**functions)

    def _init(self, **options):
        self.opened = options
        return self._run

    def _finish(self):
        self.finished = True


def test_weights_and_biases_gets_every_row_and_a_resumed_run_its_old_name(tmp_path, monkeypatch):
    names = []
    (tmp_path / "run").mkdir()
    for start in (0, 1):
        fake = Fake()
        monkeypatch.setitem(monitoring.sys.modules, "wandb", fake.module)
        monitor = Monitor(tmp_path / "run", start, 2, lambda _: None, "project")
        monitor.row(row(start + 1))
        monitor.amend(start + 1, {"eval_loss": 1.0})
        monitor.close()
        assert [r["step"] for r in fake.rows] == [start + 1] * 2 and fake.finished
        names.append((fake.opened["project"], fake.opened["id"], fake.opened["resume"]))
    assert names[0] == names[1] and names[0][0] == "project"


def test_weights_and_biases_is_asked_for_only_by_who_wants_it(monkeypatch):
    sinks.check_wandb(None)
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--wandb: the package is missing; pip install"):
        sinks.check_wandb("project")


@pytest.mark.parametrize("method", ["__init__", "write", "close"])
def test_a_sink_that_raises_is_switched_off_once(method):
    def broken(*_):
        raise ConnectionError("no route to host")

    methods = {"write": lambda self, values: None, "close": lambda self: None}
    made = type("Broken", (), methods | {method: broken})
    lines = []
    sink = sinks.Background("W&B", made, lines.append)
    for step in range(3):
        sink.write({"step": step})
    sink.close()
    assert lines == ["WARNING: W&B is switched off: ConnectionError: no route to host"]


def test_a_sink_that_hangs_costs_training_no_time(monkeypatch):
    monkeypatch.setattr(sinks, "MAX_WAITING", 3)
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.05)
    release, lines = threading.Event(), []
    try:
        for rows, why in ((2, "it did not finish within 0.05 s"), (9, "3 rows wait for it")):
            sink = sinks.Background("W&B", release.wait, lines.append)
            begin = time.monotonic()
            for step in range(rows):
                sink.write({"step": step})
            sink.close()
            assert time.monotonic() - begin < 30  # it would be for ever
            assert lines.pop() == f"WARNING: W&B is switched off: {why}" and not lines
    finally:
        release.set()
