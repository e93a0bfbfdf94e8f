"""The host's side of training: one large image on one core, and samples a second from the loader.

    python benchmarks/pipeline.py                       9 images, 64 loader steps; pins itself to one core
    python benchmarks/pipeline.py --gpu-samples 5.5     and how many cores feed 8 GPUs of that speed

The image is a 2000 x 1500 JPEG whose AnyRes grid is 4 x 6: 25 views of 384. Its views must be those of the
reference, transformers' PIL processor, bit for bit, or nothing is reported.
"""

import argparse
import io
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mmrstraj_jax.config import AnyResConfig, LoaderConfig
from mmrstraj_jax.data import anyres, images, records
from mmrstraj_jax.data.collate import Sizes
from mmrstraj_jax.data.index import build_index
from mmrstraj_jax.data.loader import Loader
from mmrstraj_jax.data.schedule import Schedule
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.training.run import embedded_weights

WIDTH, HEIGHT = 2000, 1500
POLICY = AnyResConfig()
TARGET_MS = 105.0


def photograph(seed: int) -> bytes:
    """A JPEG with detail at several scales, quality 90."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    bands = [127 + 80 * np.sin(x / (40 + seed + c)) * np.cos(y / (17 + c)) for c in range(3)]
    noise = np.random.default_rng(seed).normal(0, 12, (HEIGHT, WIDTH, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.stack(bands, -1) + noise, 0, 255).astype(np.uint8)).save(
        file, "JPEG", quality=90
    )
    return file.getvalue()


def views(jpeg: bytes) -> np.ndarray:
    """What the loader does to an image: decode, plan, resize, cut."""
    picture = images.load(jpeg)
    plan = anyres.plan(*picture.size, POLICY)
    return images.views(picture, plan, POLICY.view_size)


def reference_views(jpeg: bytes) -> np.ndarray:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    processor = LlavaOnevisionImageProcessorPil(
        size={"height": POLICY.view_size, "width": POLICY.view_size},
        image_grid_pinpoints=[list(each) for each in POLICY.grid_pinpoints],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    found = np.asarray(
        processor(images=[Image.open(io.BytesIO(jpeg))], return_tensors="np")["pixel_values"][0]
    )
    return np.round((found + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def one_image(repeats: int) -> dict:
    """Milliseconds of decoding and of everything, medians. Raises SystemExit where pixels differ."""
    jpegs = [photograph(seed) for seed in range(3)]
    ours, theirs = views(jpegs[0]), reference_views(jpegs[0])
    if ours.shape != theirs.shape or (ours != theirs).any():
        raise SystemExit(f"views {ours.shape} differ from the reference's {theirs.shape}: no figure")
    decode, whole = [], []
    for number in range(repeats):
        jpeg = jpegs[number % len(jpegs)]
        start = time.perf_counter()
        images.load(jpeg)
        decoded = time.perf_counter()
        views(jpeg)
        decode.append(1e3 * (decoded - start))
        whole.append(1e3 * (time.perf_counter() - decoded))
    return {
        "views": len(ours),
        "decode_ms": statistics.median(decode),
        "image_ms": statistics.median(whole),
        "image_ms_all": whole,
    }


def loader(size: int, steps: int, how: LoaderConfig) -> dict:
    """Samples a second of size x size tiles, one row a step, through reading, resizing and collating."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for number in range(16):
            picture = Image.open(io.BytesIO(photograph(number))).resize((size, size))
            picture.save(folder / f"{number}.jpg", quality=90)
            turns = [
                {"from": "human", "value": "<image>\nWhat is seen?"},
                {"from": "gpt", "value": "A road."},
            ]
            rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
        (folder / "rows.json").write_text(json.dumps(rows))
        tokenizer, sizes = Tokenizer.load(embedded_weights()), Sizes((1, 5, 10, 37), 128, 8192)
        found = records.load(str(folder / "rows.json"), cache_dir=folder)
        index = build_index(found, tokenizer, POLICY, sizes, cache_dir=folder)
        stream = Loader(index, Schedule(index, sizes, 1, seed=0), tokenizer, POLICY, how=how).iterate(
            0, steps
        )
        _, bucket, _ = next(stream)  # starting threads or workers is not the rate
        start = time.perf_counter()
        count = sum(1 for _ in stream)
        return {"size": size, "views": bucket.views, "samples_per_s": count / (time.perf_counter() - start)}


def feeding(samples_per_s_core: float, gpu_samples: float, gpus: int) -> dict:
    """Cores that keep the GPUs of a node busy, from the rate of one core."""
    return {"gpu_samples_per_s": gpu_samples, "gpus": gpus, "cores": gpu_samples * gpus / samples_per_s_core}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=65, help="rows through the loader; default: %(default)s")
    parser.add_argument("--tile", type=int, default=512, help="side of the loader's images, pixels")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one thread, on one core")
    parser.add_argument("--gpu-samples", type=float, help="samples/s of one GPU, of compare.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "measured")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    record = {
        "command": shlex.join(["python", "benchmarks/pipeline.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "load_before": os.getloadavg()[0],
        "image": one_image(args.repeats),
    }
    if args.workers:
        os.sched_setaffinity(0, cores)
    record["workers"] = args.workers
    record["loader"] = loader(args.tile, args.steps, LoaderConfig(workers=args.workers, threads=1))
    image, rate = record["image"], record["loader"]["samples_per_s"]
    print(f"one {WIDTH} x {HEIGHT} image, {image['views']} views: {image['image_ms']:.0f} ms on one core")
    print(f"(target {TARGET_MS:g} ms; decoding {image['decode_ms']:.0f} ms); pixels equal the reference's")
    print(f"loader, {args.tile} x {args.tile} tiles: {rate:.1f} samples/s with {args.workers or 1} worker(s)")
    if args.gpu_samples:
        need = record["feeding"] = feeding(rate / (args.workers or 1), args.gpu_samples, 8)
        print(f"8 GPUs at {args.gpu_samples:g} samples/s need {need['cores']:.1f} cores")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "pipeline.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
