"""How fast, and in how much memory, real-size weights are imported. One JSON line on stdout.

    python benchmarks/import_weights.py --model 0.5b      2 GB of random weights in llava-hf's layout
    python benchmarks/import_weights.py --model 7b        15 GB; needs 40 GB of free disk and 24 GB of memory

Plain reading is the same files read into fresh memory (numpy.fromfile). Reading and importing alternate,
each in a process of its own; the ratio of speeds is the median over the pairs. Right before, both touch and
free as much memory as they will fill: on a virtual machine the first touch of a page in a while is a fault of
the host, which can take longer than the whole import and says nothing about it.

Peak anonymous memory is RssAnon + RssShmem of /proc/self/status, sampled while `load_model` runs.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
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


def warm_memory(num_bytes: int) -> None:
    """Touches memory and gives it back to the kernel."""
    import numpy as np

    np.ones(num_bytes, np.uint8)


def read_files(folder: Path) -> float:
    """Seconds to read every weight file into fresh memory, 64 MB at a time."""
    import numpy as np

    warm_memory(file_bytes(folder))
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            pieces = []
            while (piece := np.fromfile(file, np.uint8, 2**26)).size:
                pieces.append(piece)
    return time.perf_counter() - start


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def anonymous_gb() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return (
        sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon", "RssShmem"))) * 1024 / 1e9
    )


def measure(folder: Path) -> dict:
    import jax

    from mmrstraj_jax.weights.load import load_model
    from mmrstraj_jax.weights.native import leaves

    size = file_bytes(folder)
    jax.devices()  # start-up is not part of the import
    warm_memory(size)
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
    return {
        "file_gb": size / 1e9,
        "import_s": seconds,
        "result_gb": sum(array.nbytes for array in leaves(loaded.model).values()) / 1e9,
        "peak_anonymous_gb": peak - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=FREE_DISK, default="0.5b")
    parser.add_argument("--file-dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of readings; default: %(default)s")
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

        def child(part: str) -> dict:
            command = [sys.executable, __file__, "--part", part, "--folder", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            return json.loads(done.stdout.splitlines()[-1])

        child("read")  # fills the page cache
        pairs = [(child("read")["read_s"], child("import")) for _ in range(args.repeats)]
    ratios = [read_s / run["import_s"] for read_s, run in pairs]
    read_s, import_s = (
        statistics.median(times) for times in zip(*((r, run["import_s"]) for r, run in pairs), strict=True)
    )
    size = pairs[0][1]["file_gb"]
    found = {
        "model": args.model,
        "file_dtype": args.file_dtype,
        "file_gb": round(size, 3),
        "import_s": round(import_s, 2),
        "import_gb_per_s": round(size / import_s, 2),
        "read_gb_per_s": round(size / read_s, 2),
        "speed_ratio": round(statistics.median(ratios), 2),
        "speed_ratios": [round(ratio, 2) for ratio in ratios],
        "result_gb": round(pairs[0][1]["result_gb"], 3),
        "peak_anonymous_gb": round(max(run["peak_anonymous_gb"] for _, run in pairs), 3),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
