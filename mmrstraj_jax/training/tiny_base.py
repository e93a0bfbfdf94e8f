"""Makes the tiny base model that ships with the package, from nothing but seeds.

    python -m mmrstraj_jax.training.tiny_base --out mmrstraj_jax/assets/tiny --work runs/tiny_base

Phases, each resumable by the same command: the base split and the tokenizer; the tower on dense ground truth;
the language model and projector on a frozen tower; everything together; the result as bfloat16.
"""

import argparse
import dataclasses
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmrstraj_jax.config import MODEL_PRESETS, Config, load_config
from mmrstraj_jax.errors import UserError, run_command
from mmrstraj_jax.models.mmrstraj import MMRSTraj, init_model
from mmrstraj_jax.synthcity.sample import WINDOWS_PER_CITY, samples, write_sample
from mmrstraj_jax.synthcity.tokenizer import train_tokenizer
from mmrstraj_jax.train import train
from mmrstraj_jax.training.dense import DenseBatch, pretrain_tower, views_with_labels
from mmrstraj_jax.training.run import open_run
from mmrstraj_jax.weights import native

SEED = 0
IMAGES_A_STEP = 4  # of the dense phase: 20 views; small batches learn faster here than large ones
POOL_CITIES = 16  # windows of this many cities are mixed, so that a batch is not one city


def dense_batches(first_city: int, view_size: int) -> Iterator[DenseBatch]:
    """Endless batches of IMAGES_A_STEP windows of the base split; a thread renders ahead."""
    side = 2 * (view_size // 14)

    def city(number: int) -> list[DenseBatch]:
        found = samples("base", SEED, WINDOWS_PER_CITY, "A", square=True, start=number * WINDOWS_PER_CITY)
        labelled = ((sample.image, sample.labels(side)) for sample in found)
        return [views_with_labels(image, *labels, view_size) for image, labels in labelled]

    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    cities = grain.MapDataset.range(first_city, 1 << 20).map(city).to_iter_dataset(reading)
    mixer, pool = random.Random(SEED), []
    for windows in cities:
        pool += windows
        while len(pool) > POOL_CITIES * WINDOWS_PER_CITY:
            drawn = [pool.pop(mixer.randrange(len(pool))) for _ in range(IMAGES_A_STEP)]
            yield DenseBatch(*(np.concatenate(parts) for parts in zip(*drawn, strict=True)))


def tower_phase(work: Path, steps: int, num_images: int) -> Path:
    """A model folder whose tower is pre-trained and whose rest is fresh.

    Its windows follow those of the base split's files, so that the later phases see images it has not.
    """
    folder = work / "tower"
    if folder.exists():
        return folder
    config, run = MODEL_PRESETS["tiny"], tiny_config(work)

    def report(step: int, losses: dict[str, float]) -> None:
        print(f"tower step {step}/{steps}:", *(f"{k} {v:.4f}" for k, v in losses.items()), flush=True)

    batches = dense_batches(-(-num_images // WINDOWS_PER_CITY), config.vision.image_size)
    tower = pretrain_tower(config.vision, batches, steps=steps, seed=SEED, report=report)
    model = init_model(config, jax.random.key(SEED))
    model.vision_tower = tower
    native.save(model, config, run.anyres, folder, dtype=jnp.float32, tokenizer_dir=work)
    return folder


def tiny_config(work: Path) -> Config:
    config, _ = load_config("tiny_base", [], model="tiny")
    return dataclasses.replace(
        config, data=str(work / "base" / "base.json"), eval_data=str(work / "eval_base" / "eval_base.json")
    )


def train_phase(work: Path, name: str, weights: Path, **changes) -> Path:
    """One run of train.py under work/name, then its weights as a model folder."""
    config = dataclasses.replace(tiny_config(work), weights=str(weights), run_dir=str(work / name), **changes)
    run = train(config)
    folder = work / f"{name}_model"
    if not folder.exists():
        save_plain(open_run(run).model, config, folder, jnp.float32, work)
    return folder


def save_plain(model: MMRSTraj, config: Config, folder: Path, dtype: jnp.dtype, tokenizer: Path) -> None:
    """Saves a model without adapters in our format."""
    native.save(model, MODEL_PRESETS["tiny"], config.anyres, folder, dtype=dtype, tokenizer_dir=tokenizer)


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the finished model; must not exist"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_base"), help="data and phases")
    parser.add_argument("--images", type=int, default=12000)
    parser.add_argument("--tower-steps", type=int, default=3000)
    parser.add_argument("--frozen-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--until", choices=("tower", "frozen"), help="stop after this phase")
    options = parser.parse_args(args)
    if options.out.exists():
        raise UserError(f"--out {options.out}: exists; remove it or name another folder")
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer.json").exists():
        train_tokenizer(work)
    for split, number, kind in (("base", options.images, "base"), ("eval_base", 300, "eval_general")):
        if not (work / split / f"{split}.json").exists():
            write_sample(work / split, split, number, SEED, "A", kind)
    folder = tower_phase(work, options.tower_steps, options.images)
    if options.until == "tower":
        return
    parts = ("projector", "newline", "language_model")
    folder = train_phase(work, "frozen", folder, train_full=parts, steps=options.frozen_steps)
    if options.until == "frozen":
        return
    config = tiny_config(work)
    # Smaller batches: at this size the number of updates limits what is learned, not the number of images
    train_phase(work, "joint", folder, steps=options.steps, batch_size=4, micro_batch_size=4, eval_every=1000)
    save_plain(open_run(work / "joint").model, config, options.out, jnp.bfloat16, work)
    size = sum(path.stat().st_size for path in options.out.iterdir())
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(open_run(work / "joint").model)))
    print(f"{options.out}: {count:,} parameters, {size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
