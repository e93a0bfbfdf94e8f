"""What a run would train on, from image headers and token counts; no weights are read."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from mmrstraj_jax.config import MODEL_PRESETS, Config, ModelConfig
from mmrstraj_jax.data.loader import Loader
from mmrstraj_jax.synthcity.sample import cache_root
from mmrstraj_jax.training import run, setup
from mmrstraj_jax.weights.load import open_source

BAR = 40  # characters of the longest bar of a histogram


@dataclass(frozen=True)
class Dataset:
    """The training data of a config, indexed, and the sizes of the model that would see it."""

    loader: Loader
    model: ModelConfig
    notes: tuple[str, ...]  # where the plan stands on something else than the run would

    @property
    def shapes(self) -> Int[np.ndarray, "rows 5"]:
        return self.loader.index.shapes

    @property
    def drawn(self) -> Int[np.ndarray, "rows 5"]:
        """Of what batch_size counts: rows, or with packing packs of them."""
        packs = self.loader.schedule.packs
        return self.shapes if packs is None else packs.shapes


def inspect(config: Config, say) -> Dataset:
    """Checks and indexes the data of a config.

    Without `weights` the sizes are the preset's, and text is counted with the embedded tokenizer.
    Args:
        say: takes one line of text.
    Raises:
        UserError: as training would, before any weight is read.
    """
    notes = []
    if config.weights is not None and run.is_run(config.weights):
        run.absolute_weights(config.weights)  # says what to name instead
    source = open_source(run.embedded_weights() if config.weights is None else config.weights)
    model = source.config
    if config.weights is None and config.model != "tiny":
        model = MODEL_PRESETS[config.model]
        notes.append(
            f"no --weights: sizes are the preset {config.model}'s, text tokens are counted with the embedded "
            "tokenizer (Qwen's needs fewer)"
        )
    found = setup.Sources(config.data, config.eval_data, "stage2" if config.name == "stage2" else "stage1")
    if config.data is None:
        notes.append(f"no --data: rows are those of the embedded SynthCity sample ({found.split})")
    start = run.Start(None, model, run.policy_of(config, model), source.tokenizer_dir, {"path": source.where})
    cache = Path(config.loader.cache_dir or cache_root() / "index")
    return Dataset(setup.load_data(config, found, start, cache, say).train, model, tuple(notes))


def histogram(values: Int[np.ndarray, " n"], title: str, most: int = 12) -> list[str]:
    """Lines with a bar for each value, or for each of a few equal ranges where values are many."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) > most:
        edges = np.unique(np.linspace(distinct[0], distinct[-1] + 1, most + 1).astype(int))
        counts = np.histogram(values, edges)[0]
        labels = [f"{low}-{high - 1}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    else:
        labels = [str(value) for value in distinct]
    width = max(map(len, labels))
    lines = [title]
    for label, count in zip(labels, counts.tolist(), strict=True):
        bar = "#" * max(int(count > 0), round(BAR * count / counts.max()))
        lines.append(f"  {label:>{width}}  {bar:<{BAR}} {count}")
    return lines
