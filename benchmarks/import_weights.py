"""How fast, and in how much memory, real-size weights are imported. One JSON line on stdout.

    python benchmarks/import_weights.py --model 0.5b      2 GB of random weights in llava-hf's layout
    python benchmarks/import_weights.py --model 7b        15 GB; needs 40 GB of free disk and 24 GB of memory

Plain reading is the same files read into fresh memory (numpy.fromfile), right before, so both find the same
cache.
Peak anonymous memory is RssAnon + RssShmem of /proc/self/status, sampled while `load_model` runs.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

FREE_DISK = {"0.5b": 5e9, "7b": 40e9}


def write_checkpoint(folder: Path, size: str, dtype_name: str) -> None:
    """Random tensors under the names, shapes and shards of the public checkpoint."""
    import jax
    import numpy as np
    from flax import nnx

    from mmrstraj_jax.config import MODEL_PRESETS, AnyResConfig
    from mmrstraj_jax.models.mmrstraj import init_model
    from mmrstraj_jax.weights import layouts
    from mmrstraj_jax.weights.load import leaf_shapes
    from mmrstraj_jax.weights.safetensors_io import Output, cast_into, write_sharded
    from mmrstraj_jax.weights.serving import hf_config

    config = MODEL_PRESETS[size]
    rows = {"0.5b": 152000, "7b": 152128}[size]
    text = dataclasses.replace(config.text, vocab_size=rows)
    config = dataclasses.replace(config, text=text, image_token_id=151646, video_token_id=151647)
    shapes = leaf_shapes(nnx.split(nnx.eval_shape(lambda: init_model(config, jax.random.key(0))))[1])
    dtype = np.dtype(jax.numpy.dtype(dtype_name))
    noise = np.random.default_rng(0).standard_normal(2**20, dtype=np.float32) * 0.02
    block = np.empty(noise.shape, dtype)
    cast_into(noise, block)
    outputs = []
    for path, shape in shapes.items():
        shape, layers = (shape[1:], shape[0]) if layouts.is_stacked(path) else (shape, 1)
        for key in layouts.hub_keys(path, layers):
            outputs.append(Output(key, dtype, shape, lambda shape=shape: np.resize(block, shape)))
    write_sharded(folder, outputs)
    settings = hf_config(config, AnyResConfig("anyres_max_9"), dtype_name)
    (folder / "config.json").write_text(json.dumps(settings))


def read_files(folder: Path) -> float:
    """Seconds to read every weight file into fresh memory, 64 MB at a time."""
    import numpy as np

    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            pieces = []
            while (piece := np.fromfile(file, np.uint8, 2**26)).size:
                pieces.append(piece)
    return time.perf_counter() - start


def anonymous_gb() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return (
        sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon", "RssShmem"))) * 1024 / 1e9
    )


def measure(folder: Path) -> dict:
    import jax

    from mmrstraj_jax.weights.load import load_model
    from mmrstraj_jax.weights.native import leaves

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    jax.devices()  # start-up is not part of the import
    before, peak, finished = anonymous_gb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.wait(0.005):
            peak = max(peak, anonymous_gb())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    loaded = load_model(folder, progress=False)
    seconds = time.perf_counter() - start
    finished.set()
    thread.join()
    result = sum(array.nbytes for array in leaves(loaded.model).values()) / 1e9
    return {
        "file_gb": round(size / 1e9, 3),
        "import_s": round(seconds, 2),
        "import_gb_per_s": round(size / 1e9 / seconds, 3),
        "result_gb": round(result, 3),
        "peak_anonymous_gb": round(peak - before, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=FREE_DISK, default="0.5b")
    parser.add_argument("--file-dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--part", choices=("read", "import"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "read":
        return print(json.dumps({"read_s": read_files(args.folder)}))
    if args.part == "import":
        return print(json.dumps(measure(args.folder)))
    if shutil.disk_usage(args.folder).free < FREE_DISK[args.model]:
        sys.exit(f"skipped: {args.folder} has less than {FREE_DISK[args.model] / 1e9:.0f} GB free disk")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_checkpoint(folder, args.model, args.file_dtype)
        runs: dict[str, list[dict]] = {"read": [], "import": []}
        # A process each: the memory of one is not the other's. The first reading only fills the
        # page cache; the best
        # of three of each, in turns, because other work on the machine only ever slows a run down.
        for part in ("read", *("read", "import") * 3):
            command = [sys.executable, __file__, "--part", part, "--folder", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[part].append(json.loads(done.stdout.splitlines()[-1]))
    found = min(runs["import"], key=lambda run: run["import_s"])
    found["peak_anonymous_gb"] = max(run["peak_anonymous_gb"] for run in runs["import"])
    read_s = min(run["read_s"] for run in runs["read"][1:])
    found["read_gb_per_s"] = round(found["file_gb"] / read_s, 3)
    found["speed_ratio"] = round(found["import_gb_per_s"] / found["read_gb_per_s"], 2)
    print(json.dumps({"model": args.model, "file_dtype": args.file_dtype} | found))


if __name__ == "__main__":
    main()
