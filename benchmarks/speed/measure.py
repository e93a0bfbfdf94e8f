"""Alternation: one child process a side, one request at a time, and no figure of sides that disagree."""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from speed import gate, machine, tables, workloads
from speed.workloads import Item

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = "ours"
STARTS = 3  # from cache: a single start says little on a noisy machine


class Child:
    """A side's process. It stays alive through all rounds of an item and ends with it."""

    def __init__(self, name: str, command: list[str], cpus: list[int], environment: dict[str, str]):
        self.name = name
        path = os.pathsep.join(
            filter(None, [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH")])
        )
        # Threads of both sides are as many as the CPUs they may run on, from the first import on
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment | {"PYTHONPATH": path},
            preexec_fn=lambda: os.sched_setaffinity(0, cpus),
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request. Raises SystemExit where the child has died; its own words are on stderr."""
        with contextlib.suppress(BrokenPipeError):  # the missing answer says the same
            self._process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended ({self._process.wait()}) at {do!r}; see above")
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # of a child that has died
            self._process.stdin.close()
        self._process.wait()


@dataclasses.dataclass(frozen=True)
class Setting:
    """How sides are run.

    Attributes:
        commands: side -> command line of its child; "ours" and at least one rival.
        environment: of the children.
        cpus: that every child is pinned to.
        pairs: alternated rounds.
        pause: seconds between two turns, for the other side's threads to fall asleep.
        look: seconds before and after the rounds in which nothing of ours runs, to see what else does.
        fused: whether ours must compute attention with cuDNN.
    """

    commands: dict[str, list[str]]
    environment: dict[str, str]
    cpus: list[int]
    pairs: int
    pause: float = 0.3
    look: float = 1.0
    fused: bool = False

    def start(self, side: str, **environment: str) -> Child:
        return Child(side, self.commands[side], self.cpus, self.environment | environment)


def caches(folder: str, side: str) -> tuple[str, dict[str, str]]:
    """Where a side keeps compiled programs: JAX's as a setting, PyTorch's in the environment."""
    path = str(Path(folder) / f"cache-{side}".replace(" ", "-"))  # g++ of torch.compile takes no spaces
    return path, {"TORCHINDUCTOR_CACHE_DIR": path, "TRITON_CACHE_DIR": path}


def measure(
    item: Item, setting: Setting, say: Callable[[str], None], *, from_cache: bool = False
) -> dict[str, Any]:
    """One item: gate, first step, alternated rounds, peak memory.

    Args:
        from_cache: start every side STARTS times more, to time its first step with the programs it left on
            disk.
    Returns:
        name, item, work (tables.work), sides {side: seconds, median_s, peak, compile_s, ...}, ratios
        {rival: tables.ratio}, refused {rival: why}: rivals that disagree have a reason and no figure;
        from_float32 {side: largest relative error}, where 16 bits differed so much that float32 decided;
        other_work: share of the CPUs that others used just before or after the rounds.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = {}
        try:
            for side in setting.commands:
                children[side] = setting.start(side, **caches(folder, side)[1])
            return _measure(item, setting, say, children, folder, from_cache)
        finally:
            for child in children.values():
                child.close()


def _first(
    child: Child, item: Item, setting: Setting, folder: str
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Builds a side and asks for the outputs that the gate compares."""
    cache = caches(folder, child.name)[0]
    budget = setting.pairs + 3
    prepared = child.ask("prepare", item=dataclasses.asdict(item), budget=budget, cache=cache)
    path = Path(folder) / f"{child.name}.npz"
    start = time.perf_counter()
    child.ask("outputs", path=str(path))
    prepared["outputs_s"] = time.perf_counter() - start
    with np.load(path) as found:
        arrays = dict(found)
    path.unlink()
    return prepared, arrays


def _in_float32(item: Item, setting: Setting, folder: str) -> dict[str, np.ndarray]:
    """Our outputs in float32: weights are drawn as 16 bits hold them, so they are the same."""
    child = setting.start(OURS, JAX_DEFAULT_MATMUL_PRECISION="highest")
    try:
        return _first(child, dataclasses.replace(item, dtype="float32"), setting, folder)[1]
    finally:
        child.close()


def _measure(item, setting, say, children, folder, from_cache) -> dict[str, Any]:
    sides, arrays = {}, {}
    for side, child in children.items():
        say(f"{item.name}: {side} starts")
        sides[side], arrays[side] = _first(child, item, setting, folder)
    refused, errors, from_float32, truth = {}, {}, {}, None
    for side in list(children)[1:]:
        why, errors[side] = gate.disagreements(arrays[OURS], arrays[side], item.dtype)
        if why and item.dtype != "float32":
            say(f"{item.name}: {side} and ours differ by {errors[side]:.2g}: float32 decides")
            truth = truth or _in_float32(item, setting, folder)
            why, _ = gate.disagreements(arrays[OURS], arrays[side], item.dtype, truth)
            from_float32 |= {each: gate.distance(arrays[each], truth) for each in (OURS, side)}
        if why:
            refused[side] = why
            say(f"{item.name}: {side} REFUSED, the two sides do not compute the same: {'; '.join(why[:3])}")
    # The decoder compiles its own two programs, in which attention is next to nothing
    if setting.fused and not sides[OURS].get("fused_attention", item.kind == "decode"):
        refused = {side: ["attention of ours is not cuDNN's in the compiled program"] for side in errors}
        say(f"{item.name}: REFUSED, {next(iter(refused.values()))[0]}")
    rivals = [side for side in list(children)[1:] if side not in refused]
    record = {
        "name": item.name,
        "item": dataclasses.asdict(item),
        "work": tables.work(item, workloads.DECODE_TOKENS),
        "relative_error": errors,
        "from_float32": from_float32,
        "sides": {},
        "ratios": {},
        "refused": refused,
    }
    if not rivals:
        return record
    running = {side: children[side] for side in (OURS, *rivals)}
    seconds, losses, record["other_work"] = _rounds(item, setting, say, running, sides)
    for side in rivals:
        # steps change the adapters: the sides must still agree after the last one
        ours, theirs = (np.asarray(losses[name], np.float32) for name in (OURS, side))
        if losses[OURS] and gate.disagreements({"last loss": ours}, {"last loss": theirs}, item.dtype)[0]:
            refused[side] = [f"last loss: ours {losses[OURS][-1]:.6g}, {side} {losses[side][-1]:.6g}"]
            say(f"{item.name}: {side} REFUSED after the rounds: {refused[side][0]}")
    kept = [side for side in rivals if side not in refused]
    if from_cache:
        for side in (OURS, *kept):
            sides[side]["from_cache"] = []
            for _ in range(STARTS):
                again = setting.start(side, **caches(folder, side)[1])
                sides[side]["from_cache"].append(_first(again, item, setting, folder)[0])
                again.close()
    for side in (OURS, *kept) if kept else ():
        found = seconds[side]
        sides[side] |= {"seconds": found, "median_s": statistics.median(found)}
        record["sides"][side] = sides[side]
    record["ratios"] = {side: tables.ratio(seconds[OURS], seconds[side]) for side in kept}
    return record


def _rounds(item, setting, say, running, sides) -> tuple[dict, dict, float]:
    """Sides in turn, the order reversed from round to round; also fills in second step and peak memory.

    A turn's first step is not timed: a virtual machine may have given the host what memory this side returned
    while it waited, and fetches it back page by page. Decoding returns none, and would need a longer cache.

    Returns seconds and losses of each side, and the larger share of other work before and after.
    """
    for side, child in running.items():
        sides[side]["second_step_s"] = child.ask("time")["seconds"]
        child.ask("memory", reset=True)
    seconds = {side: [] for side in running}
    losses = {side: [] for side in running}
    time.sleep(setting.pause)
    other = machine.other_work(setting.cpus, setting.look)
    for number in range(setting.pairs):
        for side in list(running)[:: -1 if number % 2 else 1]:
            time.sleep(setting.pause)
            for _ in range(1 if item.kind == "decode" else 2):
                answer = running[side].ask("time")
            seconds[side].append(answer["seconds"])
            losses[side] += [answer["loss"]] if "loss" in answer else []
        last = ", ".join(f"{side} {found[-1]:.4g} s" for side, found in seconds.items())
        say(f"{item.name}: round {number + 1} of {setting.pairs}: {last}")
    for side, child in running.items():
        sides[side]["peak"] = child.ask("memory", reset=False)["peak"]
    time.sleep(setting.pause)
    other = max(other, machine.other_work(setting.cpus, setting.look))
    if other > machine.BUSY:
        say(f"{item.name}: other work took {100 * other:.0f} % of the CPUs; its figures stay out of the docs")
    return seconds, losses, other
