"""The run directory: what it holds, whether a command may go on with it, and the model of a run.

config.json      the whole Config, data only
base.json        base weights: where they are, their fingerprint, a checksum per frozen leaf
tokenizer/       metrics.jsonl   loss.png   tb/   checkpoints/<step>/   log.txt
left_out.json    rows of the data that are not used, or were remarked on, if any
summary.json     written last: the run is finished
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mmrstraj_jax import config as configs
from mmrstraj_jax import parallel
from mmrstraj_jax.config import AnyResConfig, Config, ModelConfig
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.layers import Linear, Trainable
from mmrstraj_jax.models.lora import add_lora, merge_lora, train_in_full
from mmrstraj_jax.models.mmrstraj import MMRSTraj
from mmrstraj_jax.models.quantized import quantize_linears
from mmrstraj_jax.training import state as states
from mmrstraj_jax.training.checkpoint import UNREADABLE, read_trainable
from mmrstraj_jax.training.monitor import read_metrics
from mmrstraj_jax.weights.load import load_model, with_feature_layer
from mmrstraj_jax.weights.tokens import copy_tokenizer

EMBEDDED = "embedded:tiny"  # in base.json: the weights that come with the package
# May differ when a run goes on: none of them changes what a step computes
NOT_COMPARED = (
    *("run_dir", "notes", "fsdp", "loader", "cluster", "wandb", "compilation_cache"),
    *("save_every", "keep_last", "log_every"),
)
# What the model of a run is made of: its checkpoints fit no other
FIXED = (
    *("init_from", "merge_init", "feature_layer", "dtype", "quantize_llm", "train_full"),
    *("lora.rank", "lora.vision_tower", "lora.projector", "lora.language_model"),
)


def embedded_weights() -> Path:
    """The tiny model that ships with the package. Raises UserError where it was left out."""
    folder = Path(__file__).parent.parent / "assets" / "tiny"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: the embedded model is missing; install the package again, or name --weights"
        )
    return folder


def write_json(path: Path, value: Any) -> None:
    """Replaces the file in one step, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError: missing, or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; expected a run directory of mmrstraj_jax.train"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); restore a copy, or name a new --run-dir"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def is_run(path: str | Path) -> bool:
    """Whether a folder is a run directory."""
    return (Path(path) / "base.json").is_file() and (Path(path) / "config.json").is_file()


def read_config(run_dir: Path) -> Config:
    """The config of a run. Raises UserError."""
    return configs.from_dict(read_json(run_dir / "config.json"), str(run_dir / "config.json"))


@contextlib.contextmanager
def _usable(run_dir: Path) -> Iterator[None]:
    """A folder that the file system refuses is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{run_dir}: cannot be written ({error.strerror or error}); name another folder with --run-dir"
        ) from error


def prepare(run_dir: Path) -> None:
    """Makes the folder and writes a byte into it, before minutes are spent.

    Raises UserError: a file in the way, no permission, a full or read-only disk.
    """
    probe = run_dir / f".probe-{os.getpid()}"
    with _usable(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"0" * 4096)
        finally:
            probe.unlink(missing_ok=True)


def status(
    run_dir: Path,
    config: Config,
    *,
    allow_fresh: bool = False,
    allow_config_change: bool = False,
    say: Callable[[str], None] = print,
) -> str:
    """ "new", "resume" or "finished": what the same command finds in its run directory.

    Args:
        allow_fresh: start over where no checkpoint can be read.
        allow_config_change: go on with another config; a line lists the differences.
        say: takes one line of text.
    Raises:
        UserError: the run there has another config (the differences are listed), or one that no run can go
            on with, its checkpoints are all unreadable or gone, or the path is no folder for it.
    """
    with _usable(run_dir):
        if run_dir.exists() and not run_dir.is_dir():
            raise UserError(f"{run_dir}: is a file; name a folder with --run-dir")
        finished = (run_dir / "summary.json").is_file()  # before glob, which is silent without permission
    saved = [folder.name for folder in (run_dir / "checkpoints").glob("*") if folder.name[-1:].isdigit()]
    if not any(name.isdigit() for name in saved):
        unreadable = any(name.startswith(UNREADABLE) for name in saved)
        if not allow_fresh and (unreadable or finished or _has_saved(run_dir)):
            raise UserError(
                f"{run_dir}: all its checkpoints are {'unreadable' if unreadable else 'gone'}; nothing is "
                "started over by itself: restore a copy, give --allow-fresh, or name a new --run-dir"
            )
        return "new"
    if not is_run(run_dir):
        raise UserError(f"{run_dir}: has checkpoints but no config.json and base.json; name a new --run-dir")
    changed = [
        line
        for line in configs.diff(read_config(run_dir), config)
        if line.split(":")[0].split(".")[0] not in NOT_COMPARED
    ]
    if fixed := [line for line in changed if line.split(":")[0] in FIXED]:
        raise UserError(
            f"{run_dir} holds a run of another model: {'; '.join(fixed)}; this cannot change while a run "
            "goes on: give the same options, or name a new --run-dir"
        )
    if changed and allow_config_change:
        say(f"WARNING: {run_dir} goes on with another config: {'; '.join(changed)}")
        return "resume"
    if changed:
        raise UserError(
            f"{run_dir} holds a run with another config: {'; '.join(changed)}. Give the same options to go "
            "on with it, --allow-config-change to go on with these, or name a new --run-dir"
        )
    return "finished" if finished else "resume"


def _has_saved(run_dir: Path) -> bool:
    """Whether the metrics show that a checkpoint was finished: the second save waits for the first."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return bool(rows) and is_run(run_dir) and rows[-1]["step"] > 2 * read_config(run_dir).save_every


# ---- the model of a run ----


@dataclass(frozen=True)
class Start:
    """A model that is ready to train, or that a run has trained, and where it comes from."""

    model: MMRSTraj  # adapters attached, trainables typed
    config: ModelConfig
    anyres: AnyResConfig  # of the run, at the view size of the tower
    tokenizer_dir: Path | None
    base: dict[str, Any]  # base.json
    fresh: tuple[str, ...] = ()  # leaves that neither a file nor a run before has filled


@dataclass(frozen=True)
class OpenRun(Start):
    """A Start whose trainables are those of a checkpoint."""

    run_config: Config | None = None
    step: int = 0
    unused: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # of the base: weights.load.LoadedModel


def policy_of(config: Config, model: ModelConfig) -> AnyResConfig:
    """The run's AnyRes policy at the view size of the tower that was loaded.

    Exact for grids of whole views, the default and what every public config.json holds: a candidate keeps its
    rows and columns. tau keeps its share of the tokens of a full view (AnyResConfig.for_views).
    """
    view_size, patch_size = model.vision.image_size, model.vision.patch_size
    if (config.anyres.view_size, config.anyres.patch_size) == (view_size, patch_size):
        return config.anyres
    return config.anyres.for_views(view_size, patch_size)


def attach(model: MMRSTraj, config: Config) -> None:
    """Gives a plain model what the config trains, in place. Raises UserError: an unknown target."""
    train_in_full(model, config.train_full)
    add_lora(model, config.lora, jax.random.fold_in(jax.random.key(config.seed), 1))


def _store(model: MMRSTraj, config: Config) -> None:
    """Training only: whoever opens a run to ask or to export it gets the language model in full."""
    if config.quantize_llm != "none":
        quantize_linears(model.language_model.layers, config.quantize_llm)


def freeze(model: MMRSTraj, dtype: jnp.dtype) -> None:
    """Turns every Trainable into a plain parameter of this dtype, in place; adapters must be merged
    before.
    """
    for _, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            if isinstance(value, Trainable):
                setattr(module, name, nnx.Param(value[...].astype(dtype)))


def start(config: Config, mesh: Mesh | None = None) -> Start:
    """The model of a new run: base weights, or those of `init_from`, with what the config trains attached.

    Args:
        mesh: base weights are read straight to their place on it; None: the default device.
    Raises UserError: weights that are missing or do not fit, adapters of another shape, a fresh projector
    that LoRA would have to align.
    """
    if config.init_from is not None:
        found = _start_from_run(config, mesh)
    else:
        found = _start_from_weights(config, mesh)
    projector = [name for name in found.fresh if name.startswith("multi_modal_projector.")]
    if projector and "projector" not in config.train_full:
        raise UserError(
            "the projector is fresh, and LoRA cannot align it: run stage 0 first "
            "(--config stage0_align with the same --weights), then this with --init-from its run directory"
        )
    _store(found.model, config)
    return found


def _start_from_weights(config: Config, mesh: Mesh | None) -> Start:
    path = EMBEDDED if config.weights is None else absolute_weights(config.weights)
    base = dict.fromkeys(("rebuild", "init_from")) | dict.fromkeys(("fingerprint", "layout"), "")
    base |= {"path": path, "feature_layer": config.feature_layer}
    loaded, base = _load_base(base, jnp.dtype(config.dtype), None, mesh)
    attach(loaded.model, config)
    policy = policy_of(config, loaded.config)
    return Start(loaded.model, loaded.config, policy, loaded.tokenizer_dir, base, loaded.fresh)


def _start_from_run(config: Config, mesh: Mesh | None) -> Start:
    folder = Path(config.init_from)
    previous = open_run(folder, dtype=config.dtype, weights=config.weights, mesh=mesh)
    if config.feature_layer not in (0, previous.base.get("feature_layer", 0)):
        raise UserError(
            f"--feature-layer {config.feature_layer}: {folder} was trained on another; leave it out"
        )
    model, provenance = previous.model, {"run": str(folder.absolute()), "step": previous.step}
    base = dict(previous.base, init_from=provenance)
    base.pop("eval", None)  # that was measured before the previous run
    if not config.merge_init and _same_trainables(previous.run_config, config):
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Linear) and module.lora_A is not None:
                module.lora_dropout = config.lora.dropout
    else:
        before = previous.run_config.lora
        if not config.merge_init and (before.vision_tower or before.projector or before.language_model):
            changed = [
                line
                for line in configs.diff(previous.run_config, config)
                if line.startswith(("lora.", "train_full")) and not line.startswith("lora.dropout")
            ]
            raise UserError(
                f"--init-from {folder}: its adapters are of another shape ({'; '.join(changed)}); give the "
                "same options to continue them, or --merge-init to merge them and start new ones"
            )
        merge_lora(model)
        freeze(model, jnp.dtype(config.dtype))
        attach(model, config)
        base["rebuild"] = provenance
    policy = policy_of(config, previous.config)
    return Start(model, previous.config, policy, previous.tokenizer_dir, base, previous.fresh)


def _same_trainables(before: Config, after: Config) -> bool:
    same_dropout = dataclasses.replace(before.lora, dropout=after.lora.dropout)
    return same_dropout == after.lora and before.train_full == after.train_full


def reopen(run_dir: Path, config: Config, mesh: Mesh | None = None) -> Start:
    """The model of a run as it was at step 0, without the values of its adapters: to resume it.

    Raises UserError: the base weights are missing, or are not those the run began with.
    """
    base = read_json(run_dir / "base.json")
    loaded, base = _load_base(base, jnp.dtype(config.dtype), config.weights, mesh)
    attach(loaded.model, config)
    _store(loaded.model, config)
    tokenizer = run_dir / "tokenizer"
    return Start(loaded.model, loaded.config, policy_of(config, loaded.config), tokenizer, base)


def open_run(
    run_dir: str | Path,
    *,
    dtype: jnp.dtype | str | None = None,
    step: int | str | None = None,
    weights: str | None = None,
    mesh: Mesh | None = None,
) -> OpenRun:
    """The model of a run directory with its trained values.

    Args:
        run_dir: of a finished or unfinished run.
        dtype: of the frozen weights; None: the run's; "source": that of the files.
        step: which checkpoint; None is the newest, "best" the one with the lowest held-out loss.
        weights: where the base weights are now, if they were moved; the fingerprint must still fit.
        mesh: where weights are placed; None: the default device.
    Raises:
        UserError: not a run directory, base weights missing or others than in training, no checkpoint.
    """
    run_dir = Path(run_dir)
    config = read_config(run_dir)
    dtype = config.dtype if dtype is None else dtype
    loaded, base = _load_base(read_json(run_dir / "base.json"), dtype, weights, mesh)
    attach(loaded.model, config)
    graphdef, trainable, frozen = states.split(loaded.model)
    if mesh is not None:
        trainable = parallel.shard_parameters(trainable, mesh)
    step, trainable = read_trainable(run_dir / "checkpoints", trainable, step)
    return OpenRun(
        states.merge(graphdef, trainable, frozen),
        loaded.config,
        policy_of(config, loaded.config),
        run_dir / "tokenizer",
        base,
        tuple(name for name in loaded.fresh if name not in trainable),
        config,
        step,
        loaded.unused,
    )


def absolute_weights(path: str) -> str:
    """A weights argument that still holds in another working directory; handles "siglip=DIR,qwen=DIR,...".

    Raises UserError: a folder that does not exist, or a run directory.
    """
    if "=" in path and not Path(path).exists():
        parts = (part.partition("=") for part in path.split(","))
        return ",".join(f"{k}={v if v == 'fresh' else absolute_weights(v)}" for k, _, v in parts)
    if not Path(path).exists():
        raise UserError(f"--weights {path}: no such folder")
    if is_run(path):
        raise UserError(f"--weights {path}: is a run directory; continue it with --init-from {path}")
    return str(Path(path).absolute())


def _load_base(
    base: dict[str, Any], dtype: Any, weights: str | None, mesh: Mesh | None
) -> tuple[Any, dict[str, Any]]:
    """(LoadedModel, base.json) of the weights below a run's adapters; fills in the fingerprint when it is
    empty.
    """
    if base["rebuild"] is not None:
        origin = base["rebuild"]
        if not is_run(origin["run"]):
            raise UserError(
                f"{origin['run']}: no run directory any more, but this run was built on it; restore it"
            )
        previous = open_run(origin["run"], dtype=dtype, step=origin["step"], weights=weights, mesh=mesh)
        merge_lora(previous.model)
        freeze(
            previous.model, jnp.dtype(previous.run_config.dtype) if dtype == "source" else jnp.dtype(dtype)
        )
        return previous, base
    path = base["path"] if weights is None else absolute_weights(weights)
    where = None if mesh is None else lambda name, shape: parallel.sharding_of(name, shape, mesh)
    loaded = load_model(embedded_weights() if path == EMBEDDED else path, dtype=dtype, sharding=where)
    if base["fingerprint"] and loaded.fingerprint != base["fingerprint"]:
        raise UserError(
            f"{path}: not the weights this run was trained on (fingerprint {loaded.fingerprint[:12]}, "
            f"expected {base['fingerprint'][:12]}); restore them, or name their new place"
        )
    loaded = with_feature_layer(loaded, base.get("feature_layer", 0))
    return loaded, base | {"path": path, "fingerprint": loaded.fingerprint, "layout": loaded.layout}


# ---- writing a run directory ----


def create(run_dir: Path, config: Config, base: dict[str, Any], tokenizer_dir: Path) -> None:
    """Writes what every run directory begins with. Raises UserError: the folder cannot be written."""
    with _usable(run_dir):
        (run_dir / "summary.json").unlink(missing_ok=True)  # of a run that --allow-fresh starts over
        (run_dir / "tokenizer").mkdir(parents=True, exist_ok=True)
        copy_tokenizer(tokenizer_dir, run_dir / "tokenizer")
        write_json(run_dir / "base.json", base)
        write_json(run_dir / "config.json", configs.to_dict(config))


def check_resumable(
    run_dir: Path, saved: dict[str, Any], now: dict[str, Any], allow: bool, say: Callable[[str], None]
) -> None:
    """Raises UserError where the data behind the same config is no longer the same, or says so if allowed.

    What a checkpoint of an older version does not tell is not compared.
    """
    changed = [
        f"{key} {saved[key]} -> {value}" for key, value in now.items() if saved.get(key, value) != value
    ]
    if not changed:
        return
    if not allow:
        raise UserError(
            f"{run_dir}: the data changed since the run began ({', '.join(changed)}); restore it, give "
            "--allow-config-change to go on with it, or name a new --run-dir"
        )
    say(f"WARNING: {run_dir} goes on with other data: {', '.join(changed)}")


def change_config(run_dir: Path, config: Config, base: dict[str, Any]) -> None:
    """The run goes on with this config, its base weights where they are now; it is unfinished again.

    Raises UserError: the folder cannot be written.
    """
    with _usable(run_dir):
        write_json(run_dir / "base.json", base)
        write_json(run_dir / "config.json", configs.to_dict(config))
        (run_dir / "summary.json").unlink(missing_ok=True)
