"""What a measurement was taken on: device, versions, limits, and whether other work ran beside it."""

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# Of the CPUs that sides are pinned to, while all of them wait: more is work of somebody else.
BUSY = 0.1


def other_work(cpus: list[int], seconds: float) -> float:
    """Share of these CPUs' time that is used during the next `seconds`, in which this process sleeps."""
    before = _times(cpus)
    time.sleep(seconds)
    used, total = _times(cpus) - before
    return float(used / max(total, 1))


def _times(cpus: list[int]) -> np.ndarray:
    """(used, total) ticks of these CPUs since the machine started, time stolen by its host included."""
    found = np.zeros(2)
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name in {f"cpu{number}" for number in cpus}:
            user, nice, system, idle, wait, *rest = (int(each) for each in ticks[:8])
            used = user + nice + system + sum(rest)
            found += used, used + idle + wait
    return found


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def slug(text: str) -> str:
    """The text as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def describe(setting: Any, dtype: str, size: str) -> dict[str, Any]:
    """Device, CPUs, memory, versions of both libraries, and limits.

    Limits are the best matrix rate (FLOP/s, at this dtype) and copy and read rates (bytes/s) that either
    library reaches; of tiny probes at size tiny.
    """
    versions, device = {"python": sys.version.split()[0], "numpy": np.__version__}, ""
    limits: dict[str, float] = {}
    for name in list(setting.commands)[:2]:
        side = setting.start(name)
        about = side.ask("about")
        found = side.ask("limits", dtype=dtype, large=size != "tiny")
        side.close()
        versions |= about["versions"]
        if about.get("python", versions["python"]) != versions["python"]:  # --rival-python
            versions[f"{name} in python"] = about["python"]
        device = about["device"] or device
        limits = {key: max(value, limits.get(key, 0.0)) for key, value in found.items()}
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "device": device or f"{processor()}, {len(setting.cpus)} CPUs",
        "host": f"{processor()}, {len(setting.cpus)} CPUs, {gib:.0f} GiB",
        "versions": versions,
        "limits": limits,
    }
