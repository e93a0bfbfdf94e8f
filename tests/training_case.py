"""A tiny model and random batches, shared by the tests of training."""

import dataclasses
import json
from pathlib import Path

import data_case
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmrstraj_jax.config import (
    AnyResConfig,
    Config,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    VisionConfig,
)
from mmrstraj_jax.models.lora import add_lora, train_in_full
from mmrstraj_jax.models.mmrstraj import Inputs, MMRSTraj, init_model
from mmrstraj_jax.weights import native

MODEL = ModelConfig(
    vision=VisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        feature_layers=(2,),
    ),
    text=TextConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=64,
        tie_word_embeddings=True,
    ),
)
CONFIG = Config(
    name="case",
    model="tiny",
    dtype="float32",
    remat="none",
    batch_size=4,
    micro_batch_size=4,
    anyres=AnyResConfig().for_views(28, 14),
    lora=LoRAConfig(rank=2, alpha=4.0, dropout=0.2),
    optim=OptimConfig(tower_lr=1e-2, projector_lr=2e-2, other_lr=3e-2),
)


def config(**changes) -> Config:
    return dataclasses.replace(CONFIG, **changes)


def model(lora: LoRAConfig = CONFIG.lora, train_full: tuple[str, ...] = (), *, tied: bool = True) -> MMRSTraj:
    """Random weights from NumPy (JAX would compile for seconds); adapters have a B, so that every gradient
    counts.
    """

    text = dataclasses.replace(MODEL.text, tie_word_embeddings=tied)

    def build():
        made = init_model(dataclasses.replace(MODEL, text=text), jax.random.key(0))
        train_in_full(made, train_full)
        add_lora(made, lora, jax.random.key(1))
        return made

    graphdef, state = nnx.split(nnx.eval_shape(build))
    random = np.random.default_rng(0)
    fill = lambda leaf: jnp.asarray(0.2 * random.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(fill, state))


def batch(rows: int = 4, seed: int = 0, length: int = 12, num_targets: int = 6, views: int = 2) -> dict:
    """One micro-batch of random rows with different numbers of targets; visual tokens at 1..4, the last the
    newline.
    """
    random = np.random.default_rng(seed)
    visual = np.full((rows, length), -1, np.int32)
    visual[:, 1:5] = random.permuted(np.arange(views * 4)[None].repeat(rows, 0), axis=1)[:, :4]
    visual[:, 4] = views * 4  # the newline
    lengths = random.integers(length - 3, length + 1, rows).astype(np.int32)
    weights = (np.arange(num_targets)[None] < random.integers(1, num_targets + 1, rows)[:, None]).astype(
        np.float32
    )
    return {
        "inputs": Inputs(
            input_ids=random.integers(0, 64, (rows, length)).astype(np.int32),
            views=random.integers(0, 256, (rows, views, 28, 28, 3)).astype(np.uint8),
            visual_index=visual,
            lengths=lengths,
            sample_index=(np.arange(rows) + 100 * seed).astype(np.int32),
        ),
        "positions": np.sort(random.integers(4, length - 4, (rows, num_targets))).astype(np.int32),
        "targets": random.integers(0, 64, (rows, num_targets)).astype(np.int32),
        "weights": weights,
        "answer": weights > 0,
    }


def stacked(one: dict, num_micro: int = 1) -> dict:
    """[rows, ...] -> [num_micro, rows / num_micro, ...]."""
    return jax.tree.map(lambda x: jnp.asarray(x).reshape(num_micro, -1, *x.shape[1:]), one)


def world(folder: Path, rows: int = 12) -> dict[str, str]:
    """Random weights with a tokenizer, and a small data set with a held-out part: {weights, data,
    eval_data}.
    """
    tokenizer = data_case.tokenizer()
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save(folder / "tokenizer")
    text = dataclasses.replace(MODEL.text, vocab_size=len(tokenizer) + 3)
    config = dataclasses.replace(MODEL, text=text)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: init_model(config, jax.random.key(0))))
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(0.2 * random.normal(size=leaf.shape), leaf.dtype), state)
    weights = native.save(
        nnx.merge(graphdef, state),
        config,
        CONFIG.anyres,
        folder / "weights",
        dtype=jnp.float32,
        tokenizer_dir=folder / "tokenizer",
    )
    for number in range(rows):
        data_case.picture(30 + number, 28, number).save(folder / f"{number}.png")
    made = [data_case.chat_row(number, f"{number}.png", answer=f"{number} roads.") for number in range(rows)]
    for number, row in enumerate(made):
        row["type"] = ("count", "scene")[number % 2]
    (folder / "train.json").write_text(json.dumps(made))
    (folder / "held_out.jsonl").write_text("\n".join(json.dumps(row) for row in made[:5]))
    return {
        "weights": str(weights),
        "data": str(folder / "train.json"),
        "eval_data": str(folder / "held_out.jsonl"),
    }
