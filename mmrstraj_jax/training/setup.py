"""What a run trains on: the embedded defaults or what was named, indexed and bucketed."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmrstraj_jax.config import INT32, AnyResConfig, Config, recipe_line
from mmrstraj_jax.data import records
from mmrstraj_jax.data.collate import Sizes
from mmrstraj_jax.data.index import Index, build_index
from mmrstraj_jax.data.loader import Loader
from mmrstraj_jax.data.schedule import Schedule
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.attention import uses_cudnn
from mmrstraj_jax.synthcity import sample
from mmrstraj_jax.training import run
from mmrstraj_jax.training.run import Start
from mmrstraj_jax.training.step import Batch

MAX_EVAL_BUCKETS = 4


@dataclass(frozen=True)
class Sources:
    """Where a run's data comes from; None: the embedded sample."""

    data: str | None
    eval_data: str | None
    split: str  # of the embedded sample

    def files(self) -> tuple[str, str | None]:
        """(training data, evaluation data or None); renders the embedded sample on first use."""
        if self.data is not None and (self.eval_data is not None):
            return self.data, self.eval_data
        if self.data is not None:
            return self.data, None
        paths = sample.ensure_sample()
        return str(paths[self.split]), self.eval_data or str(paths[f"eval_{self.split}"])


def sources(config: Config) -> Sources:
    """Checks what is named, without reading it.

    Raises UserError: a size without embedded weights or data named none, or a named path is missing.
    """
    if config.model != "tiny" and config.weights is None and config.init_from is None:
        raise UserError(f"--model {config.model}: has no embedded weights; name them with --weights DIR")
    if config.model != "tiny" and config.data is None:
        raise UserError(
            f"--model {config.model}: name its training data with --data FILE (only tiny has a sample)"
        )
    for option, spec in (("--data", config.data), ("--eval-data", config.eval_data)):
        for path, _ in records.parse_mixture(spec) if spec is not None else ():
            if not Path(path).exists():
                raise UserError(f"{option} {path}: no such file")
    if config.image_root is not None and not Path(config.image_root).is_dir():
        raise UserError(f"--image-root {config.image_root}: no such folder")
    return Sources(config.data, config.eval_data, "stage2" if config.name == "stage2" else "stage1")


def check_start(config: Config) -> None:
    """Raises UserError where no run can begin: a part trained twice, nothing to merge, no run to go on
    from, or one of another size.
    """
    if config.merge_init and config.init_from is None:
        raise UserError("--merge-init: merges the adapters of a finished run; name it with --init-from")
    if config.init_from is not None and not run.is_run(config.init_from):
        raise UserError(
            f"--init-from {config.init_from}: not a run directory; expected one with config.json and "
            "base.json"
        )
    if config.init_from and (trained := run.read_config(Path(config.init_from)).model) != config.model:
        raise UserError(
            f"--init-from {config.init_from}: was trained with --model {trained}; --model {config.model} has "
            f"another recipe (learning rates, steps): give --model {trained}"
        )
    for part in config.train_full:
        if getattr(config.lora, part, ()):
            raise UserError(
                f"train_full {part}: has LoRA targets too, and would be trained twice; "
                f"drop one of them (--lora.{part.replace('_', '-')} without a value means no target)"
            )


def describe(config: Config, found: Sources, overridden: frozenset[str]) -> str:
    """The first line of a run: what is trained on what, and whether that is the paper's recipe."""
    if config.init_from is not None:
        model = f"the model of {config.init_from}"
    elif config.weights is not None:
        model = config.weights
    else:
        model = "the embedded tiny model"
    data = found.data or f"the embedded SynthCity sample ({found.split})"
    return f"Training {model} on {data}: {recipe_line(config, overridden)}"


@dataclass(frozen=True)
class Data:
    """Loaders of one run. `types` maps a row's place in the evaluation data to its question type."""

    train: Loader
    held_out: Loader | None
    types: Mapping[tuple[str, int], str]

    def problems(self) -> list[dict[str, Any]]:
        """Every row that was left out or remarked on."""
        loaders = [loader for loader in (self.train, self.held_out) if loader]
        return [dataclasses.asdict(problem) for loader in loaders for problem in loader.index.problems]

    def fingerprints(self) -> dict[str, str | None]:
        """What all hosts, and all starts of a run, must have in common."""
        train, held_out = self.train.index, self.held_out and self.held_out.index
        return {
            "data": train.fingerprint,
            "images": train.pixels,
            "eval_data": held_out and held_out.fingerprint,
            "eval_images": held_out and held_out.pixels,
        }


def check_views(config: Config, anyres: AnyResConfig, overridden: Collection[str]) -> None:
    """Raises UserError where a view or patch size was set by hand that is not the tower's."""
    for name in ("view_size", "patch_size"):
        given, own = getattr(config.anyres, name), getattr(anyres, name)
        if f"anyres.{name}" in overridden and given != own:
            raise UserError(
                f"--anyres.{name.replace('_', '-')} {given}: the tower's is {own}, which is used; "
                "drop the option"
            )


def load_data(config: Config, found: Sources, start: Start, cache_dir: Path, say) -> Data:
    """Reads, checks and indexes the rows; bad ones are reported and left out.

    Args:
        cache_dir: of the index; may be deleted at any time.
        say: takes one line of text.
    Raises:
        UserError: no usable row, or a tokenizer that is missing or does not fit the model.
    """
    if start.tokenizer_dir is None:
        raise UserError(f"{start.base['path']}: no tokenizer beside the weights; put tokenizer.json there")
    tokenizer = Tokenizer.load(start.tokenizer_dir)
    vocab_size = start.config.text.vocab_size
    if tokenizer.max_text_id() >= vocab_size:
        raise UserError(
            f"{start.tokenizer_dir}: the tokenizer has ids up to {tokenizer.max_text_id()}, "
            f"the model {vocab_size} rows"
        )
    if config.packing and uses_cudnn(jnp.dtype(config.dtype)):
        raise UserError(
            "packing: cuDNN's attention, used for bfloat16 on a GPU, takes no segment ids; drop --packing "
            "or add --dtype float32 (XLA attention: its memory grows with max_length squared)"
        )
    data, eval_data = found.files()
    cache_dir = cache_dir if config.loader.cache_dir is None else Path(config.loader.cache_dir)

    def loader(spec: str, name: str, limit: int | None) -> Loader:
        read = records.load(spec, config.image_root, on_bad=config.on_bad, cache_dir=cache_dir)
        if limit is not None:  # held out: each row once, whatever the weight of its file
            rows = read.rows
            if len(rows) > limit:
                rows = rows.take(np.linspace(0, len(rows) - 1, limit, dtype=int))
            whole = records.Source(spec, None, 0, len(rows))
            read = dataclasses.replace(read, rows=rows, sources=[whole])
        index = build_index(
            read,
            tokenizer,
            start.anyres,
            Sizes.of(config),
            mask=config.label_mask,
            image_policy=config.images,
            on_bad=config.on_bad,
            cache_dir=cache_dir,
            verify=config.loader.verify,
        )
        say(f"{name}: {index.report()}")
        for problem in index.problems[:20]:
            say(f"{name}: {'left out' if problem.dropped else 'note'}: {problem}")
        if len(index.problems) > 20:
            say(f"{name}: ... and {len(index.problems) - 20} more")
        if lost := sum(problem.dropped for problem in index.problems):
            whole = len(index.rows) + lost
            much = "WARNING: " if 2 * lost > whole else ""
            say(f"{much}{name}: {lost} of {whole} rows are left out")
        return _loader(config, index, tokenizer, start, held_out=limit is not None)

    train = loader(data, "data", None)
    held_out = (
        loader(eval_data, "eval data", config.eval_samples) if eval_data and config.eval_samples else None
    )
    if config.eval_every and held_out is None:
        say(
            f"WARNING: eval_every {config.eval_every}: nothing is held out, so nothing is evaluated; "
            "name --eval-data, and eval_samples above 0"
        )
    return Data(train, held_out, _types(eval_data) if held_out else {})


def _loader(config: Config, index: Index, tokenizer: Tokenizer, start: Start, held_out: bool) -> Loader:
    rows = global_micro_batch(config) if held_out else config.batch_size
    kind = {"max_buckets": MAX_EVAL_BUCKETS} if held_out else {"packing": config.packing}
    schedule = Schedule(index, Sizes.of(config), rows, config.seed, **kind)
    # Evaluation starts its stream anew each time: worker processes would cost seconds each time
    how = dataclasses.replace(config.loader, workers=0) if held_out else config.loader
    return Loader(
        index,
        schedule,
        tokenizer,
        start.anyres,
        config.label_mask,
        config.images,
        how,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _types(eval_data: str) -> dict[tuple[str, int], str]:
    """(source, line) -> "type" of the rows that carry one; training ignores that key, so records drop it."""
    types = {}
    for path, _ in records.parse_mixture(eval_data):
        for source, line, value in records.read_rows(path):
            if isinstance(value, Mapping) and isinstance(value.get("type"), str):
                types[source, line] = value["type"]
    return types


def global_micro_batch(config: Config, devices: int | None = None) -> int:
    """Rows of one micro-batch over all devices; many devices get fewer rows each, so that the batch stays.

    Args:
        devices: how many; None: those of the run.
    Raises:
        UserError: the devices do not divide the batch.
    """
    devices = devices or jax.device_count()
    rows = min(config.micro_batch_size * devices, config.batch_size)
    if config.batch_size % rows or rows % devices:
        raise UserError(
            f"batch_size {config.batch_size}: cannot be split into micro-batches of {devices} devices x "
            f"{config.micro_batch_size} rows (micro_batch_size); change one of them"
        )
    return rows


def fold(batch: Batch, rows: int) -> Any:
    """[batch, ...] -> [micro-batches, rows, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), batch)


def check_length(config: Config, overridden: Collection[str]) -> None:
    """Raises UserError where epochs were set by hand that the recipe's steps make nothing of."""
    if config.steps and "epochs" in overridden and "steps" not in overridden:
        raise UserError(
            f"--epochs {config.epochs}: this recipe counts steps ({config.steps}); add --steps 0 to go by "
            "epochs"
        )


def total_steps(config: Config, loader: Loader) -> int:
    """N of the schedule: `steps`, or what the epochs give. Raises UserError: too many to be numbered."""
    total = config.steps or config.epochs * loader.schedule.steps_per_epoch
    if total > INT32:
        raise UserError(f"epochs {config.epochs}: {total} steps; expected at most {INT32}, lower it")
    return total


def eval_batches(loader: Loader) -> Iterator[tuple[np.ndarray, Batch]]:
    """(row numbers, -1 for padding; batch) of one pass over the evaluation rows, in a fixed order."""
    for step, _, batch in loader.iterate(0, loader.schedule.steps_per_epoch):
        yield loader.schedule.batch(step)[1], batch
