"""A start on a million rows (row 52), as benchmarks/index_million.py measures it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "index_million.py"
NOTE = re.compile(r"([\w ]+) [\d.]+ s \(([\d.]+) s CPU\), \d+ MiB \((\d+) own\)")


@pytest.mark.parametrize("rows", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_million_rows_start_in_seconds_and_take_no_memory(tmp_path, rows):
    command = [sys.executable, str(SCRIPT), "--rows", str(rows), "--work", str(tmp_path), "--tiled"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0, done.stderr
    again = done.stdout.splitlines()[-1]
    assert again.startswith(f"{rows:,} rows: ")
    notes = {name.strip(): (float(cpu), int(own)) for name, cpu, own in NOTE.findall(again)}
    assert notes["first batch"][0] < 5  # seconds of CPU from its first line on, imports left out
    assert notes["100 more"][1] - notes["imports"][1] < 100  # MiB; a million rows are 241 on disk
    assert notes["100 more"][1] - notes["first batch"][1] < 10
