"""The real 0.5B layout at real size: import speed and memory, in a process of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "import_weights.py"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_the_speed_of_reading_and_one_gigabyte_above_the_result(dtype, tmp_path):
    if shutil.disk_usage(tmp_path).free < 5e9:
        pytest.skip("needs 5 GB of free disk")
    command = [
        sys.executable,
        str(BENCHMARK),
        "--model",
        "0.5b",
        "--file-dtype",
        dtype,
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["speed_ratio"] >= 0.5, found
    assert found["peak_anonymous_gb"] <= found["result_gb"] + 1, found
