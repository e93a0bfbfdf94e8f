"""The host's side of training: one large image on one core, and samples a second from the loader.

    python benchmarks/pipeline.py                       9 images, 64 rows of the loader
    python benchmarks/pipeline.py --gpu-samples 5.5     feeding 8 GPUs of a measured speed

The image is a 2000 x 1500 JPEG whose AnyRes grid is 4 x 6: 25 views of 384. Its views must be those of the
reference, transformers' PIL processor, bit for bit, or nothing is reported. Everything runs pinned to one
core, and what is counted is that core's time for this process, which other work does not lengthen.
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
from speed import machine, store

from mmrstraj_jax.config import MODEL_PRESETS, AnyResConfig, Config, LoaderConfig
from mmrstraj_jax.data import anyres, images, records
from mmrstraj_jax.data.collate import Sizes
from mmrstraj_jax.data.index import build_index
from mmrstraj_jax.data.loader import Loader
from mmrstraj_jax.data.schedule import Schedule
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.planning import flops
from mmrstraj_jax.planning.gpus import GPUS
from mmrstraj_jax.training.run import embedded_weights

WIDTH, HEIGHT = 2000, 1500
POLICY = AnyResConfig()
GOAL_MS = 105.0


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
        start = time.process_time()
        images.load(jpeg)
        decoded = time.process_time()
        views(jpeg)
        decode.append(1e3 * (decoded - start))
        whole.append(1e3 * (time.process_time() - decoded))
    return {
        "views": len(ours),
        "decode_ms": statistics.median(decode),
        "image_ms": statistics.median(whole),
        "image_ms_all": whole,
    }


def loader(size: int, steps: int) -> dict:
    """Samples of size x size tiles a second of one core: reading, decoding, resizing, collating."""
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
        schedule, how = Schedule(index, sizes, 1, seed=0), LoaderConfig(workers=0, threads=1)
        stream = Loader(index, schedule, tokenizer, POLICY, how=how).iterate(0, steps)
        _, bucket, _ = next(stream)  # starting threads is not the rate
        start = time.process_time()
        rate = sum(1 for _ in stream) / (time.process_time() - start)
        return {"size": size, "views": bucket.views, "length": bucket.length, "samples_per_s": rate}


def feeding(rates: dict, gpu_samples: float | None) -> dict:
    """Cores that keep 8 GPUs busy; without a rate of one, that of 7B at 55 % of an H100's data sheet."""
    source = "measured"
    if gpu_samples is None:
        row = flops.of_row(MODEL_PRESETS["7b"], rates["views"], rates["length"], 64)
        gpu_samples = 0.55 * GPUS["h100"].tflops * 1e12 / row.training(Config(remat="none"))
        source = "7B at 55 % of an H100's data-sheet rate"
    cores = 8 * gpu_samples / rates["samples_per_s"]
    return {"gpu_samples_per_s": gpu_samples, "source": source, "cores": cores}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=65, help="rows through the loader; default: %(default)s")
    parser.add_argument("--tile", type=int, default=512, help="side of the loader's images, pixels")
    parser.add_argument("--gpu-samples", type=float, help="samples/s of one GPU, of compare.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "measured")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    record = {
        "command": shlex.join(["python", "benchmarks/pipeline.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "host": machine.processor(),
        "code": store.fingerprint(store.HOST_CODE),
        "image": one_image(args.repeats),
        "loader": loader(args.tile, args.steps),
    }
    image, rates = record["image"], record["loader"]
    need = record["feeding"] = feeding(rates, args.gpu_samples)
    print(f"one {WIDTH} x {HEIGHT} image, {image['views']} views: {image['image_ms']:.0f} ms of one core")
    print(f"(goal {GOAL_MS:g} ms; decoding {image['decode_ms']:.0f} ms); pixels equal the reference's")
    print(
        f"loader, {args.tile} x {args.tile} tiles: {rates['samples_per_s']:.1f} samples a second of one core"
    )
    print(
        f"8 GPUs at {need['gpu_samples_per_s']:.1f} samples/s ({need['source']}): {need['cores']:.1f} cores"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "pipeline.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
