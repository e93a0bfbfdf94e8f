"""How long a million rows take to index once, and to start from that index; and how much memory.

    python benchmarks/index_million.py --rows 1000000 --work DIR [--tiled]

Synthetic JSON Lines rows over 64 shared images, the embedded tokenizer. Each start is a process of its own.
Rows repeat after 4,096 but for their ids; with --tiled only so many are measured, and the index repeats their
shapes: what a later start costs does not depend on how its index was made.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES, PERIOD = 64, 4096
WORDS = "two roads cross near the river and a bridge leads cars to the harbour in the evening rush".split()


def make(folder: Path, rows: int) -> Path:
    """The data file; made once."""
    path = folder / f"rows-{rows}.jsonl"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    mixer = random.Random(0)
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (64 + 8 * number, 96, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    answers = [" ".join(mixer.choices(WORDS, k=mixer.randrange(4, 40))) for _ in range(PERIOD)]
    with path.open("w") as file:
        for number in range(rows):
            answer = answers[number % PERIOD]
            turns = [
                {"from": "human", "value": "<image>\nWhat is seen here?"},
                {"from": "gpt", "value": answer},
            ]
            row = {"id": f"row-{number}", "image": f"{number % IMAGES}.png", "conversations": turns}
            file.write(json.dumps(row) + "\n")
    return path


def start(path: Path, cache: Path) -> None:
    """One start: rows, index, schedule, first batch, 100 more; prints seconds and resident memory."""
    from mmrstraj_jax.config import MODEL_PRESETS, AnyResConfig
    from mmrstraj_jax.data import records
    from mmrstraj_jax.data.collate import Sizes
    from mmrstraj_jax.data.index import build_index
    from mmrstraj_jax.data.loader import Loader
    from mmrstraj_jax.data.schedule import Schedule
    from mmrstraj_jax.data.tokenizer import Tokenizer
    from mmrstraj_jax.training.run import embedded_weights

    begin, said = (time.perf_counter(), time.process_time()), []

    def note(name: str) -> None:
        pages = [int(number) for number in Path("/proc/self/statm").read_text().split()[1:3]]
        resident, shared = (number * os.sysconf("SC_PAGE_SIZE") for number in pages)
        own = resident - shared  # mapped files can be dropped at any time
        wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
        said.append(f"{name} {wall:.2f} s ({cpu:.2f} s CPU), {resident >> 20} MiB ({own >> 20} own)")

    vision = MODEL_PRESETS["tiny"].vision
    policy = AnyResConfig().for_views(vision.image_size, vision.patch_size)
    tokenizer, sizes = Tokenizer.load(embedded_weights()), Sizes((1, 2, 5, 10, 37), 512, 1024)
    note("imports")
    rows = records.load(str(path), cache_dir=cache)
    note("rows")
    index = build_index(rows, tokenizer, policy, sizes, cache_dir=cache)
    note("index")
    loader = Loader(index, Schedule(index, sizes, 8, seed=0), tokenizer, policy)
    loader(0)
    note("first batch")
    for step in range(1, 101):
        loader(step)
    note("100 more")
    print(f"{len(index.rows):,} rows: {'; '.join(said)}", flush=True)


def tile() -> None:
    """Lets the index measure one period only."""
    from mmrstraj_jax.data import index

    whole = index._measure_all

    def measure(rows, *how):
        shapes, said = whole(rows.take(np.arange(PERIOD)), *how)
        return np.resize(shapes, (len(rows), shapes.shape[1])), said

    index._measure_all = measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--start", action="store_true", help="one start only, in this process")
    parser.add_argument("--tiled", action="store_true", help="measure one period of the rows only")
    options = parser.parse_args()
    path = make(options.work, options.rows)
    if options.start:
        if options.tiled:
            tile()
        start(path, options.work / "cache")
        return
    print(f"{path}: {path.stat().st_size >> 20} MiB")
    for name in ("once, to index it", "again, from the index"):
        print(name, flush=True)
        subprocess.run([sys.executable, *sys.argv, "--start"], check=True)


if __name__ == "__main__":
    main()
