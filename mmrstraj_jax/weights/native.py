"""Our own formats: a whole model with stacked layers, and an adapter (everything that was trained).

Model folder: config.json {"format": "mmrstraj_jax", "version": 1, "model", "anyres", "dtype"},
model.safetensors (or shards with an index) whose names are tree paths, tokenizer files. "fresh" in
config.json names leaves that nothing has trained; the file does not hold them.
Adapter folder: adapter.json and adapter.safetensors in float32.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from mmrstraj_jax import settings
from mmrstraj_jax.config import AnyResConfig, LoRAConfig, ModelConfig
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.lora import Trainable, add_lora, train_in_full
from mmrstraj_jax.models.mmrstraj import MMRSTraj
from mmrstraj_jax.weights import layouts
from mmrstraj_jax.weights.files import MERGE_PEFT, list_tensors, optional_json, read_json
from mmrstraj_jax.weights.foreign import CAN_BE_FRESH, fresh_projector
from mmrstraj_jax.weights.load import Source, path_name
from mmrstraj_jax.weights.safetensors_io import DTYPES, Output, Reader, write_file, write_sharded, write_text
from mmrstraj_jax.weights.tokens import copy_tokenizer, find_tokenizer

FORMAT, VERSION = "mmrstraj_jax", 1
_UNUSED = "unused."


def is_native(folder: Path) -> bool:
    """Whether a folder's config.json says that it is in our format."""
    return optional_json(folder / "config.json").get("format") == FORMAT


def leaves(model: nnx.Module) -> dict[str, jax.Array]:
    """Tree path -> array of every parameter, adapters included, in tree order."""
    state = nnx.split(model)[1]
    return {path_name(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(state)}


def save(
    model: MMRSTraj,
    config: ModelConfig,
    anyres: AnyResConfig,
    directory: str | Path,
    *,
    dtype: jnp.dtype = jnp.bfloat16,
    tokenizer_dir: Path | None = None,
    unused: Mapping[str, Shaped[np.ndarray, "*S"]] | None = None,
    fresh: tuple[str, ...] = (),
) -> Path:
    """Writes a model folder.

    Args:
        model: without adapters (models.lora.merge_lora first, or save_adapter).
        directory: must not exist, or be empty.
        dtype: of every tensor in the file: bfloat16, float16 or float32.
        tokenizer_dir: copied, slot tokens added.
        unused: LoadedModel.unused, kept so that an export is bit-identical.
        fresh: LoadedModel.fresh; named and not written, so that they are fresh to whoever opens the folder.
    Raises:
        UserError: the folder is not empty.
    """
    arrays = leaves(model)
    assert not any(".lora_" in path for path in arrays), "merge or save the adapters first"
    directory = new_folder(directory)
    dtype = np.dtype(dtype)
    outputs = [
        Output(path, dtype, array.shape, lambda array=array: np.asarray(array).astype(dtype, copy=False))
        for path, array in arrays.items()
        if path not in fresh
    ]
    for key, array in (unused or {}).items():
        outputs.append(Output(_UNUSED + key, array.dtype, array.shape, lambda array=array: array))
    if tokenizer_dir is not None:
        copy_tokenizer(tokenizer_dir, directory)
    write_sharded(directory, outputs)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype.name,
        "model": settings.to_dict(config),
        "anyres": settings.to_dict(anyres),
    } | ({"fresh": list(fresh)} if fresh else {})
    # Last: a folder with a config.json is complete.
    write_text(directory / "config.json", json.dumps(description, indent=2) + "\n")
    return directory


def new_folder(directory: str | Path) -> Path:
    """Creates a folder for output.

    Raises:
        UserError: something is there already.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: exists and is not empty; nothing is overwritten, name a new folder")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def open_native(folder: Path) -> Source:
    """Describes a model folder written by `save`.

    Raises:
        UserError: another version, or a config that does not have exactly the known fields.
    """
    where = folder / "config.json"
    raw = read_json(where)
    if raw.get("version") != VERSION:
        raise UserError(
            f"{where}: version {raw.get('version')!r}; this package reads {VERSION}, convert it again"
        )
    config = settings.from_dict(raw.get("model"), ModelConfig, f"{where}: model")
    anyres = settings.from_dict(raw.get("anyres"), AnyResConfig, f"{where}: anyres")
    tensors = list_tensors(folder)
    unused = {name[len(_UNUSED) :]: entry for name, entry in tensors.items() if name.startswith(_UNUSED)}
    if extra := unused.keys() - set(layouts.POST_LAYERNORM):
        raise UserError(f"{folder}: extra {layouts.fold(extra)} among the unused tensors; convert it again")
    used = {name: entry for name, entry in tensors.items() if not name.startswith(_UNUSED)}
    names = raw.get("fresh", [])
    if not isinstance(names, list) or not all(name in CAN_BE_FRESH for name in names):
        raise UserError(f"{where}: fresh {names!r:.60}; expected leaves of the projector, or the newline")
    initial = fresh_projector(config.vision, config.text) if names else {}
    fresh = {name: initial[name] for name in names}
    return Source(str(folder), "native", config, anyres, find_tokenizer(folder), used, unused, fresh=fresh)


@dataclass(frozen=True)
class Adapter:
    """What adapter.json says."""

    lora: LoRAConfig
    train_full: tuple[str, ...]  # parts trained without LoRA, as in Config.train_full
    base_fingerprint: str | None


def save_adapter(
    model: MMRSTraj,
    lora: LoRAConfig,
    directory: str | Path,
    *,
    train_full: tuple[str, ...] = (),
    base_fingerprint: str | None = None,
) -> Path:
    """Writes every trainable of a model (adapters, and parts trained in full) in float32.

    Args:
        lora: the settings the adapters were made with.
        directory: must not exist, or be empty.
        train_full: parts that train_in_full made trainable.
        base_fingerprint: LoadedModel.fingerprint of the weights the adapter belongs to.
    Raises:
        UserError: the folder is not empty.
    """
    directory = new_folder(directory)
    state = nnx.split(model, Trainable, ...)[1]
    found = {path_name(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(state)}
    float32 = np.dtype(np.float32)
    write_file(
        directory / "adapter.safetensors",
        [Output(path, float32, x.shape, lambda x=x: np.asarray(x, float32)) for path, x in found.items()],
    )
    description = {
        "format": FORMAT + "-adapter",
        "version": VERSION,
        "lora": settings.to_dict(lora),
        "train_full": list(train_full),
        "base_fingerprint": base_fingerprint,
    }
    write_text(directory / "adapter.json", json.dumps(description, indent=2) + "\n")
    return directory


def read_adapter(directory: str | Path) -> Adapter:
    """The description of an adapter folder.

    Raises:
        UserError: not an adapter folder of this version.
    """
    directory = Path(directory)
    where = directory / "adapter.json"
    if not where.is_file():
        found = "no adapter.json; expected a folder of native.save_adapter"
        if (directory / "adapter_config.json").is_file():
            found = f"is a PEFT adapter; {MERGE_PEFT}"
        raise UserError(f"{directory}: {found}")
    raw = read_json(where)
    if raw.get("format") != FORMAT + "-adapter" or raw.get("version") != VERSION:
        raise UserError(
            f"{where}: not an adapter of format version {VERSION}; write it again with this package"
        )
    lora = settings.from_dict(raw.get("lora"), LoRAConfig, f"{where}: lora")
    return Adapter(lora, tuple(raw.get("train_full") or ()), raw.get("base_fingerprint"))


def load_adapter(
    model: MMRSTraj, directory: str | Path, *, base_fingerprint: str | None = None
) -> tuple[MMRSTraj, Adapter]:
    """A model with an adapter folder attached.

    Args:
        model: the base, without adapters; its trained parts are replaced in place.
        base_fingerprint: LoadedModel.fingerprint of that base; compared with the adapter's where both
        are known.
    Returns:
        the model with its adapters, and their description.
    Raises:
        UserError: another base, or names or shapes that do not fit.
    """
    directory = Path(directory)
    adapter = read_adapter(directory)
    if base_fingerprint and adapter.base_fingerprint and base_fingerprint != adapter.base_fingerprint:
        raise UserError(
            f"{directory}: was trained on other base weights (fingerprint "
            f"{adapter.base_fingerprint[:12]}, these have "
            f"{base_fingerprint[:12]}); name the base it belongs to"
        )
    add_lora(model, adapter.lora, jax.random.key(0))
    train_in_full(model, adapter.train_full)
    graphdef, trainable, frozen = nnx.split(model, Trainable, ...)
    tensors = list_tensors(directory / "adapter.safetensors")
    wanted = {path_name(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(trainable)}
    problems = []
    if missing := wanted.keys() - tensors.keys():
        problems.append(f"missing {layouts.fold(missing)}")
    if extra := tensors.keys() - wanted.keys():
        problems.append(f"extra {layouts.fold(extra)}")
    for path in sorted(wanted.keys() & tensors.keys()):
        if tensors[path].shape != wanted[path].shape or tensors[path].dtype != DTYPES["F32"]:
            problems.append(
                f"{path} is {tensors[path].dtype} {list(tensors[path].shape)}, expected float32 "
                f"{list(wanted[path].shape)}"
            )
    if problems:
        raise UserError(f"{directory}: adapter does not fit this base: " + "; ".join(problems))
    with Reader() as reader:
        arrays = {path: jax.device_put(reader.read(tensors[path])) for path in wanted}
    trainable = jax.tree.map_with_path(lambda keys, _: arrays[path_name(keys)], trainable)
    return nnx.merge(graphdef, trainable, frozen), adapter
