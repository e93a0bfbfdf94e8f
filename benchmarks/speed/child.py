"""How a side of the comparison talks to compare.py: one JSON request a line in, one answer a line out."""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

DOES = ("prepare", "outputs", "time", "memory", "limits", "about")


def serve(side: Any) -> None:
    """Answers {"do": one of DOES, **arguments} with the side's method of that name until the input ends.

    What libraries print on stdout goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        do = request.pop("do")
        assert do in DOES, do
        answers.write(json.dumps(getattr(side, do)(**request)) + "\n")
        answers.flush()


def forget_peak() -> None:
    """Peak memory counts from here on; what is free already goes back to the kernel first."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak resident memory of this process since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
