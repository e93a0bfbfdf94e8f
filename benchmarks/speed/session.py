"""A command's work: items measured one after the other, each written into its file at once."""

import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from speed import machine, measure, store
from speed.workloads import Item

ENVIRONMENT = {
    "cpu": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    # both sides live on one card: neither takes memory that it does not use
    "gpu": {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}


class Job(NamedTuple):
    """An item and the sides of Setting.commands that it is measured against."""

    item: Item
    rivals: list[str]
    from_cache: bool = False


def setting(
    commands: dict[str, list[str]], device: str, dtype: str, pairs: int, cpus: list[int]
) -> measure.Setting:
    """commands: side -> command line of its child."""
    environment = ENVIRONMENT[device] | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    fused = device == "gpu" and dtype == "bfloat16"  # cuDNN's attention has no float32
    return measure.Setting(commands, environment, cpus, pairs, fused=fused)


def all_cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(
    jobs: list[Job], how: measure.Setting, folder: Path, *, kind: str, device: str, again: bool
) -> list[dict[str, Any]]:
    """Measures what the files lack and returns the new results.

    Args:
        jobs: of one size and dtype.
        folder: where files lie; kind: how their names begin.
        again: measure also what a file has.
    """
    size, dtype = jobs[0].item.size, jobs[0].item.dtype
    about = machine.describe(how, dtype, size)
    head = {"device": device, "size": size, "dtype": dtype, "machine": about["device"], "host": about["host"]}
    path = store.file_of(folder, kind, device, size, dtype, about["device"])
    found = []
    for item, rivals, from_cache in jobs:
        record = {
            "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "device": device,
            "versions": about["versions"],
            "limits": about["limits"],
            "pairs": how.pairs,
            "code": store.code_of(item.kind),
        }
        if not again:
            rivals = store.missing(path, dataclasses.asdict(item), rivals, record)
        if not rivals:
            say(f"{item.name}: nothing to do; what {path.name} has, --again measures anew")
            continue
        commands = {side: how.commands[side] for side in (measure.OURS, *rivals)}
        mine = dataclasses.replace(how, commands=commands)
        result = measure.measure(item, mine, say, from_cache=from_cache)
        result["run"] = record
        store.add(path, head, result)
        found.append(result)
    return found
