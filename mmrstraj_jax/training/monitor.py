"""What a run shows: its log, the parameter table, metrics.jsonl, TensorBoard, loss.png and the bar.

Watching must never stop training: a sink that fails says so once and is switched off.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tqdm

from mmrstraj_jax.config import OptimConfig
from mmrstraj_jax.training.optimizer import GROUPS, Tree, group_of, moment_bytes
from mmrstraj_jax.training.sinks import Background, TensorBoard, WandB
from mmrstraj_jax.training.state import num_bytes

PARTS = ("vision_tower", "multi_modal_projector", "image_newline", "language_model")


class Log:
    """Lines to the terminal and, once it has a file, to log.txt; lines before that are kept for it."""

    def __init__(self):
        self._early: list[str] | None = []
        self._file = None

    def __call__(self, line: str) -> None:
        try:
            tqdm.tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:  # `| head`, a full disk
            line += f"\nWARNING: the terminal is switched off: {error.strerror}; log.txt goes on"
            # The interpreter flushes it at its end, and would exit with another code
            with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if self._early is not None:
            self._early.append(line)
        self._write(line)

    def open(self, path: Path) -> None:
        """Appends to path from here on."""
        early, self._early = self._early or [], None
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            self(f"WARNING: {path}: {error.strerror}; the log goes to the terminal only")
        for line in early:
            self._write(line)

    def _write(self, line: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            self._file = None
            print(f"WARNING: log.txt is switched off: {error.strerror}", file=sys.stderr)


def human_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def parameter_table(trainable: Tree, frozen: Tree, config: OptimConfig) -> list[str]:
    """Lines "part, parameters, trainable, dtype, lr, decay, bytes"; bytes of trained rows include gradient
    and moments.
    """
    rows = [("part", "parameters", "trainable", "dtype", "lr", "decay", "bytes")]
    totals = [0, 0, 0]
    for part in PARTS:
        for tree, trains in ((frozen, False), (trainable, True)):
            leaves = {name: leaf for name, leaf in tree.items() if name.split(".")[0] == part}
            if not leaves:
                continue
            count = sum(leaf.size for name, leaf in leaves.items() if not name.endswith(".weight_scale"))
            size = sum(map(num_bytes, leaves.values()))
            kind = ""
            if trains:
                size += moment_bytes(leaves) + 4 * count
                kind = " (LoRA)" if all(".lora_" in name for name in leaves) else " (in full)"
            rate = f"{getattr(config, GROUPS[group_of(part)]):g}" if trains else "frozen"
            dtypes = "/".join(sorted({str(leaf.dtype) for leaf in leaves.values()}))
            decay = f"{config.weight_decay:g}" if trains else ""
            counts = f"{count:,}", f"{count * trains:,}"
            rows.append((part + kind, *counts, dtypes, rate, decay, human_bytes(size)))
            totals = [a + b for a, b in zip(totals, (count, count * trains, size), strict=True)]
    rows.append(("total", f"{totals[0]:,}", f"{totals[1]:,}", "", "", "", human_bytes(totals[2])))
    widths = [max(len(row[at]) for row in rows) for at in range(7)]
    align = ("<", ">", ">", "<", ">", ">", ">")
    return [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; lines that are none (cut off by a kill, damaged) are left out."""
    rows = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and type(row.get("step")) is int:
                    rows.append(row)
    return rows


class Meter:
    """Turns a step's metrics into its row. Reading them waits for the device, so it is done one step late.

    Args:
        work: 4N FLOPs of a 0-based step over all devices (planning.flops.of_step); None: not counted.
        peak: FLOP/s of all devices by their data sheets; None where that is not known: no MFU.
    """

    def __init__(self, work: Callable[[int], float] | None = None, peak: float | None = None):
        self._work, self._peak = work, peak
        self._ready = time.perf_counter()
        self._waited = 0.0
        self._useful = 0.0

    def fetch(self, batches: Iterator) -> Iterator:
        """The same iterator; the time spent waiting for it counts as data wait."""
        while True:
            begin = time.perf_counter()
            try:
                item = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - begin
            yield item

    def pause(self) -> None:
        """Time up to now (evaluation, saving) belongs to no step."""
        self._ready, self._waited = time.perf_counter(), 0.0

    def row(self, step: int, metrics: Mapping[str, Any], num_samples: int) -> dict[str, Any]:
        """Waits for the metrics of a step; `step` counts finished ones, so from 1.

        samples_per_s and tokens_per_s count real rows and tokens, no padding. mfu is the 4N count over
        seconds x peak. useful_s is the time of all steps so far of this process, waiting for data left out.
        """
        values = {key: value.item() for key, value in metrics.items()}
        now = time.perf_counter()
        seconds, waited = max(now - self._ready, 1e-9), self._waited
        self._ready, self._waited = now, 0.0
        rates = {
            "samples_per_s": num_samples / seconds,
            "tokens_per_s": values["tokens"] / seconds,
            "seconds": seconds,
            "data_wait": min(1.0, waited / seconds),
        }
        self._useful += seconds - min(seconds, waited)
        rates["useful_s"] = self._useful
        if self._work is not None:
            achieved = self._work(step - 1) / seconds
            rates["tflops_per_s"] = achieved / 1e12
            if self._peak is not None:
                rates["mfu"] = achieved / self._peak
        return {"step": step} | values | rates


class Monitor:
    """Sinks of one run. `row` takes one row a step; a row of a step that is already there never comes twice.

    Args:
        run_dir: the run directory.
        start_step: finished steps; rows after it (lost in a crash, about to be redone) are removed.
        total_steps: N.
        log: takes one line of text.
        wandb: project of Weights & Biases, or None.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int,
        total_steps: int,
        log: Callable[[str], None],
        wandb: str | None = None,
    ):
        self._log, self._off = log, set()
        self._path = run_dir / "metrics.jsonl"
        self._plot_path, self._total = run_dir / "loss.png", total_steps
        self.rows: list[dict[str, Any]] = []
        self._read = False  # whether `rows` has all of what the file had
        self._useful_before, self._began = 0.0, time.time()
        self._guarded("clock.json", lambda: self._read_clock(run_dir / "clock.json"))
        self._guarded("metrics.jsonl", lambda: self._reopen(start_step))
        folder, began = run_dir / "tb", self._began
        self._sinks = [Background("TensorBoard", lambda: TensorBoard(folder, start_step), log)]
        if wandb is not None:
            made = Background("Weights & Biases", lambda: WandB(wandb, run_dir, began), log)
            self._sinks.append(made)
        terminal = sys.stderr.isatty()
        self._every = 1 if terminal else max(1, total_steps // 20)
        self.bar = tqdm.tqdm(
            total=total_steps, initial=start_step, unit="step", disable=not terminal, dynamic_ncols=True
        )

    def row(self, values: Mapping[str, Any]) -> None:
        """Writes one step's row: step, loss, lr/<group>, grad_norm, samples_per_s, tokens_per_s, ..."""
        values = {key: _plain(value) for key, value in values.items()}
        if "useful_s" in values:
            values["useful_s"] += self._useful_before
            # a clock that was set back must not make it more than all
            wall = max(time.time() - self._began, values["useful_s"], 1e-9)
            values["goodput"] = values["useful_s"] / wall
        self.rows.append(values)
        self._guarded("metrics.jsonl", lambda: self._append(values))
        for sink in self._sinks:
            sink.write(values)
        self._guarded("bar", lambda: self._progress(values))

    def amend(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds values that came later (an evaluation) to the row of a step, the last one."""
        if not self.rows or self.rows[-1]["step"] != step:
            return
        added = {key: _plain(value) for key, value in values.items()}
        self.rows[-1] = self.rows[-1] | added
        self._guarded("metrics.jsonl", self._rewrite)
        for sink in self._sinks:
            sink.write(added | {"step": step})

    def plot(self) -> None:
        """Draws loss.png from all rows; writes those that a full disk had kept from metrics.jsonl."""
        self._guarded("loss.png", self._plot)
        if "metrics.jsonl" in self._off and self._read:
            with contextlib.suppress(OSError):
                self._rewrite()
                self._off.discard("metrics.jsonl")
                self._log("metrics.jsonl is complete again")

    def close(self) -> None:
        self.plot()
        self._guarded("bar", self.bar.close)
        for sink in self._sinks:
            sink.close()

    # ---- the sinks ----

    def _guarded(self, name: str, write: Callable[[], None]) -> None:
        if name in self._off:
            return
        try:
            write()
        except Exception as error:  # whatever a sink does wrong, training goes on without it
            self._off.add(name)
            self._log(f"WARNING: {name} is switched off: {type(error).__name__}: {error}")

    def _reopen(self, start_step: int) -> None:
        self.rows = [row for row in read_metrics(self._path) if row["step"] <= start_step]
        self._read = True
        useful = self.rows[-1].get("useful_s") if self.rows else None
        self._useful_before = useful if isinstance(useful, int | float) else 0.0
        self._rewrite()

    def _rewrite(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        temporary.replace(self._path)

    def _append(self, values: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def _read_clock(self, path: Path) -> None:
        """When the run began: goodput is measured over all its starts."""
        if path.is_file():
            self._began = float(json.loads(path.read_text(encoding="utf-8"))["began"])
        else:
            path.write_text(json.dumps({"began": self._began}) + "\n", encoding="utf-8")

    def _progress(self, values: Mapping[str, Any]) -> None:
        rate = values["samples_per_s"]
        shown = {
            "loss": f"{values['loss']:.4f}",
            "lr": "/".join(f"{v:.1e}" for k, v in values.items() if k.startswith("lr/")),
            "samples/s": f"{rate:.2f}",
            "tokens/s": f"{values['tokens_per_s']:.0f}",
        }
        if "mfu" in values:
            shown["MFU"] = f"{100 * values['mfu']:.0f} %"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(values["step"] - self.bar.n if not self.bar.disable else 0)
        if self.bar.disable and (values["step"] % self._every == 0 or values["step"] in (1, self._total)):
            recent = [row["seconds"] for row in self.rows[-20:]]
            remaining = (self._total - values["step"]) * sum(recent) / len(recent)
            text = ", ".join(f"{key} {value}" for key, value in shown.items())
            self._log(f"step {values['step']}/{self._total}: {text}, {remaining:.0f} s left")

    def _plot(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), dpi=120)  # not pyplot: it keeps global state and may want a display
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="step", ylabel="loss", title="Training loss")
        losses = [(row["step"], row["loss"]) for row in self.rows if isinstance(row.get("loss"), int | float)]
        held_out = [(row["step"], row["eval_loss"]) for row in self.rows if "eval_loss" in row]
        if losses:
            axes.plot(*zip(*losses, strict=True), color="#bbccee", linewidth=1, label="training, each step")
            axes.plot(*zip(*_smooth(losses), strict=True), color="#224488", label="training, moving average")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color="#cc4422", label="held out")
        if losses or held_out:
            axes.legend()
        axes.grid(alpha=0.3)
        figure.tight_layout()
        temporary = self._plot_path.with_suffix(".tmp.png")
        figure.savefig(temporary)
        temporary.replace(self._plot_path)


def _smooth(points: list[tuple[int, float]], span: int = 20) -> list[tuple[int, float]]:
    values = [loss for _, loss in points]
    means = (values[max(0, at - span + 1) : at + 1] for at in range(len(values)))
    return [(step, sum(part) / len(part)) for (step, _), part in zip(points, means, strict=True)]


def _plain(value: Any) -> Any:
    """Numbers that JSON can hold: a non-finite one becomes its name."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value
