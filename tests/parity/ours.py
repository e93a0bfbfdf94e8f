"""Our side of the parity tests: what `mmrstraj_jax.load` gives, over all samples as one mixed batch."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmrstraj_jax.api import Model
from mmrstraj_jax.config import Config, LoRAConfig, OptimConfig
from mmrstraj_jax.data.chat import IGNORE
from mmrstraj_jax.data.collate import Example, Shape, batch
from mmrstraj_jax.inference import prompts
from mmrstraj_jax.models.lora import add_lora
from mmrstraj_jax.models.qwen2 import along_rows
from mmrstraj_jax.training import state
from mmrstraj_jax.training.loss import supervised_loss
from mmrstraj_jax.training.optimizer import Optimizer
from mmrstraj_jax.training.step import gradients

from . import cases


class Output(NamedTuple):
    views: np.ndarray
    features: np.ndarray
    logits: np.ndarray
    loss: float


def examples(model: Model, samples: list[cases.Sample]) -> list[Example]:
    """Expanded rows with their labels."""
    found = []
    for sample in samples:
        request = prompts.Request(sample.ids, sample.images, [sample.frames] if sample.frames else [])
        example = prompts.read(request, model.config, model.anyres)
        counts = np.ones(len(sample.ids), int)
        slots = np.isin(sample.ids, (cases.IMAGE_ID, cases.VIDEO_ID))
        counts[slots] = [plan.num_tokens for plan in example.plans]
        labels = np.repeat(np.where(sample.supervised, sample.ids, IGNORE), counts)
        found.append(dataclasses.replace(example, labels=labels, answer=labels != IGNORE))
    return found


def bucket(rows: list[Example]) -> Shape:
    return functools.reduce(Shape.join, [row.shape for row in rows])


@functools.partial(jax.jit, static_argnames="graphdef")
def _forward(graphdef, params, micro):
    model = nnx.merge(graphdef, params)
    inputs = micro["inputs"]
    pool = model.visual_pool(inputs)
    hidden = model.hidden_states(inputs)
    wanted, *score = (micro[key] for key in ("positions", "targets", "weights", "answer"))
    return (
        pool,
        model.logits(hidden),
        supervised_loss(model.logits, along_rows(hidden, wanted), *score, chunk=4),
    )


def run(model: Model, samples: list[cases.Sample]) -> list[Output]:
    """Every sample's outputs from ONE batch: text, images, resized images, image lists and a video."""
    rows = examples(model, samples)
    micro = batch(rows, bucket(rows), cases.PAD_ID, model.anyres.view_size)
    pool, logits, loss = jax.tree.map(np.asarray, _forward(*nnx.split(model.model), micro))
    index = micro["inputs"].visual_index
    return [
        Output(
            example.views,
            pool[row][index[row][index[row] >= 0]],
            logits[row, : len(example.input_ids)],
            float(loss.nll[row] / micro["weights"][row].sum()),
        )
        for row, example in enumerate(rows)
    ]


# ---- LoRA ----


class Training(NamedTuple):
    """A model with the adapters of `cases.adapter`, and one accumulated batch of its training rows."""

    graphdef: nnx.GraphDef
    trainable: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    batch: dict
    config: Config


def per_layer(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adapters by path with the layer number in it, as the reference has them."""
    flat = {}
    for path, value in tree.items():
        if ".layers." not in path:
            flat[path] = np.asarray(value)
            continue
        before, after = path.split(".layers.")
        flat |= {f"{before}.layers.{layer}.{after}": each for layer, each in enumerate(np.asarray(value))}
    return flat


def training(model: Model, samples: list[cases.Sample], **optim) -> Training:
    lora = LoRAConfig(
        rank=cases.LORA_RANK,
        alpha=cases.LORA_ALPHA,
        dropout=0.0,
        vision_tower=cases.TOWER_TARGETS,
        projector=cases.PROJECTOR_TARGETS,
    )
    graphdef, params = nnx.split(model.model)
    adapted = nnx.merge(graphdef, params)
    add_lora(adapted, lora, jax.random.key(0))
    graphdef, trainable, frozen = state.split(adapted)
    for path, value in trainable.items():
        names = per_layer({path: value})
        drawn = [cases.adapter(name, each.shape) for name, each in names.items()]
        trainable[path] = jnp.asarray(np.stack(drawn) if ".layers." in path else drawn[0])
    rows = examples(model, [sample for sample in samples if sample.name in cases.LORA_ROWS])
    micro = batch(rows, bucket(rows), cases.PAD_ID, model.anyres.view_size)
    stacked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], micro)
    optim = OptimConfig(warmup_ratio=0.0, schedule="constant", **optim)
    config = Config(batch_size=3, micro_batch_size=3, dtype="float32", remat="none", lora=lora, optim=optim)
    return Training(graphdef, trainable, frozen, stacked, config)


@functools.partial(jax.jit, static_argnames=("graphdef", "config"))
def _gradients(graphdef, config, trainable, frozen, batch):
    return gradients(graphdef, config, trainable, frozen, batch, jnp.zeros((), jnp.int32))


def first_gradients(run: Training) -> tuple[float, dict[str, np.ndarray]]:
    loss, grads = _gradients(run.graphdef, run.config, run.trainable, run.frozen, run.batch)
    return float(loss), per_layer(grads)


def train(run: Training, steps: int, clip: float) -> tuple[list[float], dict[str, np.ndarray]]:
    """Gradient norms, and the change of every adapter after some steps of our optimizer."""
    optim = dataclasses.replace(run.config.optim, clip_norm=clip)
    optimizer = Optimizer(optim, steps)
    update = jax.jit(optimizer.update)
    trainable, opt_state, norms = run.trainable, optimizer.init(run.trainable), []
    for step in range(steps):
        loss, grads = _gradients(run.graphdef, run.config, trainable, run.frozen, run.batch)
        trainable, opt_state, metrics = update(grads, opt_state, trainable, loss, jnp.asarray(step))
        norms.append(float(metrics["grad_norm"]))
    changes = {path: np.asarray(trainable[path] - run.trainable[path]) for path in trainable}
    return norms, per_layer(changes)
