"""FLOPs of a row, forward and training, and the 4N count that MFU is quoted with.

A multiply-add counts 2. Causal attention is halved. Logits are of supervised positions only. The language
model is frozen: its backward pass is one more pass through its linears (dX; no dW) and two through its
attention. The tower's is the same plus the adapters, whose own FLOPs (rank 8) are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from mmrstraj_jax.config import Config, ModelConfig, TextConfig, VisionConfig

if TYPE_CHECKING:  # the formulas are also used where no data library is installed
    from mmrstraj_jax.data.schedule import Schedule


def tower_trains(config: Config) -> bool:
    """Whether gradients go through the vision tower; stage 0 trains the projector only."""
    return bool(config.lora.vision_tower) or "vision_tower" in config.train_full


@dataclass(frozen=True)
class Parameters:
    """Parameters that a token passes through, by part."""

    tower: int
    projector: int
    decoder: int  # the layers, without embeddings and head
    head: int


def tower_layer(vision: VisionConfig) -> int:
    """Weights of one encoder layer's linears (biases and norms are no matrix products)."""
    return 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size


def decoder_layer(text: TextConfig) -> int:
    """Weights of one decoder layer's linears."""
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    return text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)


def parameters(model: ModelConfig) -> Parameters:
    """Matrix parameters of each part; the patch embedding counts as the tower's."""
    vision, text = model.vision, model.text
    patch = 3 * vision.patch_size**2 * vision.hidden_size
    return Parameters(
        tower=vision.num_layers_run * tower_layer(vision) + patch,
        projector=text.hidden_size * (vision.output_size + text.hidden_size),
        decoder=text.num_hidden_layers * decoder_layer(text),
        head=text.hidden_size * text.vocab_size,
    )


@dataclass(frozen=True)
class Flops:
    """FLOPs of one row: `linear` and `attention` of a forward pass, per part."""

    tower_linear: float
    tower_attention: float
    projector: float
    decoder_linear: float
    decoder_attention: float
    head: float

    @property
    def forward(self) -> float:
        return sum(vars(self).values())

    def training(self, config: Config) -> float:
        """Forward and backward; "block" computes every layer once more, "dots" its attention scores only.

        What is left out: logits of several chunks are computed twice, and cuDNN's attention is under "dots".
        """
        remat, through_tower = config.remat, tower_trains(config)
        linear = self.projector + self.decoder_linear + self.tower_linear * through_tower
        attention = self.decoder_attention + self.tower_attention * through_tower
        total = 0.0 if through_tower else self.tower_linear + self.tower_attention
        total += 2 * linear + 3 * attention + 2 * self.head
        if remat == "block":
            total += linear - self.projector + attention
        return total + (attention / 2 if remat == "dots" else 0)


def of_row(model: ModelConfig, views: int, length: int, supervised: int) -> Flops:
    """FLOPs of one row of this many views, tokens and supervised positions (padded or real)."""
    vision, text, counts = model.vision, model.text, parameters(model)
    patches = views * vision.num_patches
    width = text.num_attention_heads * text.head_dim
    return Flops(
        tower_linear=2.0 * counts.tower * patches,
        tower_attention=4.0 * vision.num_layers_run * patches * vision.num_patches * vision.hidden_size,
        projector=2.0 * counts.projector * patches,
        decoder_linear=2.0 * counts.decoder * length,
        decoder_attention=2.0 * text.num_hidden_layers * length**2 * width,
        head=2.0 * counts.head * supervised,
    )


def four_n(model: ModelConfig, shapes: Int[np.ndarray, "rows 5"]) -> Float[np.ndarray, " rows"]:
    """The 4N count of each row: 4 x parameters x what passes through them, forward and dX once each.

    4 (N_tower + N_projector) x patches + 4 N_decoder x tokens + 4 N_head x supervised tokens: real ones,
    without padding, attention and recomputation. columns of shapes: data.collate.Shape.
    """
    counts = parameters(model)
    views, length, supervised = (shapes[:, at].astype(np.float64) for at in range(3))
    patches = views * model.vision.num_patches
    visual = (counts.tower + counts.projector) * patches
    return 4 * (visual + counts.decoder * length + counts.head * supervised)


def of_step(
    model: ModelConfig, shapes: Int[np.ndarray, "rows 5"], schedule: "Schedule"
) -> Callable[[int], float]:
    """work(step) -> 4N FLOPs of the rows of that step, over all devices and without padding."""
    rows = four_n(model, shapes)

    def work(step: int) -> float:
        numbers = schedule.batch(step)[1].tolist()
        return float(sum(rows[schedule.members(number)].sum() for number in numbers))

    return work
