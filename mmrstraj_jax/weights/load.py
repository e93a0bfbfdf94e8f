"""`load_model`: any supported weights -> MMRSTraj, tensor by tensor, strict in both directions."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from mmrstraj_jax.config import AnyResConfig, ModelConfig
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.mmrstraj import MMRSTraj, init_model
from mmrstraj_jax.weights import layouts
from mmrstraj_jax.weights.progress import Progress
from mmrstraj_jax.weights.safetensors_io import DTYPES, Entry, Job, Reader, empty

# path of a leaf, its shape -> where it goes; one sharding for all is fine too
Sharding = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


@dataclass(frozen=True)
class Source:
    """Weights that were found and described but not read yet.

    `tensors` maps a hub key (or, in our own format, a tree path) to its place in a file.
    """

    where: str
    layout: str  # native | llava-hf | lmms-lab | parts
    config: ModelConfig
    anyres: AnyResConfig
    tokenizer_dir: Path | None
    tensors: Mapping[str, Entry]
    unused: Mapping[str, Entry] = field(
        default_factory=dict
    )  # post_layernorm: kept for a bit-identical export
    ignored: tuple[str, ...] = ()  # names of declared exceptions that were left out
    fresh: Mapping[str, Shaped[np.ndarray, "*S"]] = field(default_factory=dict)  # path -> initial value

    def keys_of(self, path: str, num_layers: int | None) -> list[str]:
        """Keys of `tensors` that fill the leaf: one, or one per layer."""
        return [path] if self.layout == "native" else layouts.hub_keys(path, num_layers)


@dataclass(frozen=True)
class LoadedModel:
    """A model and everything that came with it."""

    model: MMRSTraj
    config: ModelConfig
    anyres: AnyResConfig
    tokenizer_dir: Path | None
    layout: str
    fingerprint: str  # of the tensors in the file, whatever the layout and the dtype loaded
    fresh: tuple[str, ...] = ()  # leaves that no file held: a fresh projector needs stage 0
    unused: Mapping[str, Shaped[np.ndarray, "*S"]] = field(default_factory=dict)


def load_model(
    path: str | Path,
    *,
    dtype: jnp.dtype | str = jnp.bfloat16,
    sharding: Sharding | None = None,
    progress: bool = True,
) -> LoadedModel:
    """Loads weights in any supported layout.

    Args:
        path: folder in our format, of llava-hf (every key variant) or of lmms-lab; or parts,
            "siglip=DIR,qwen=DIR,projector=DIR" with "projector=fresh" for one that stage 0 is to train.
        dtype: of every parameter; "source" keeps the dtype of the embedding's tensor.
        sharding: where leaves go; None is the default device. A function gets (tree path, shape).
        progress: a line with GB/s on stderr when it is a terminal.
    Raises:
        UserError: everything wrong with the files, all missing, extra and mis-shaped keys in one message.
    """
    source = open_source(path)
    if isinstance(dtype, str):
        dtype = source_dtype(source) if dtype == "source" else jnp.dtype(dtype)
    abstract = nnx.eval_shape(lambda: init_model(source.config, jax.random.key(0), dtype))
    graphdef, state = nnx.split(abstract)
    shapes = leaf_shapes(state)
    check(source, shapes)

    arrays, checksums = {}, []
    total = sum(entry.num_bytes for entry in source.tensors.values())
    bar = Progress(f"loading {source.where}", total, progress)
    with Reader() as reader:
        for leaf, shape in shapes.items():
            host = empty(shape, np.dtype(dtype))
            checksums += read_leaf(reader, source, leaf, host)
            bar.add(
                sum(
                    source.tensors[key].num_bytes
                    for key in source.keys_of(leaf, len(host))
                    if key in source.tensors
                )
            )
            where = sharding(leaf, shape) if callable(sharding) else sharding
            arrays[leaf] = _put(host, where)
            # Before the next leaf, so that the host never holds more than one besides the result.
            jax.block_until_ready(arrays[leaf])
        unused = {name: reader.read(entry) for name, entry in source.unused.items()}
    bar.close()
    state = jax.tree.map_with_path(lambda keys, _: arrays[path_name(keys)], state)
    return LoadedModel(
        model=nnx.merge(graphdef, state),
        config=source.config,
        anyres=source.anyres,
        tokenizer_dir=source.tokenizer_dir,
        layout=source.layout,
        fingerprint=hashlib.sha256("\n".join(sorted(checksums)).encode()).hexdigest(),
        fresh=tuple(source.fresh),
        unused=unused,
    )


def with_feature_layer(loaded: LoadedModel, layer: int) -> LoadedModel:
    """The same model with features taken earlier in the tower; layers behind them are dropped.

    Args:
        layer: hidden state counted from the end of the layers that are held (-1: the last one); 0: as it is.
    Raises:
        UserError: the tower has no such layer, or hands on several.
    """
    vision = loaded.config.vision
    if layer == 0:
        return loaded
    index = vision.num_layers_run + 1 + layer
    if len(vision.feature_layers) > 1 or not 1 <= index <= vision.num_layers_run:
        raise UserError(
            f"feature_layer {layer}: expected -1 to -{vision.num_layers_run}; these weights hand on the "
            f"output of layers {', '.join(map(str, vision.feature_layers))}"
        )
    tower = loaded.model.vision_tower
    nnx.update(tower.layers, jax.tree.map(lambda leaf: leaf[:index], nnx.state(tower.layers)))
    vision = dataclasses.replace(vision, feature_layers=(index,))
    tower.config = vision
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, vision=vision))


def open_source(path: str | Path) -> Source:
    """Finds out what the path is and describes it; reads JSON and headers only.

    Raises:
        UserError: not weights, or weights whose description contradicts itself.
    """
    # Imported here because both build a Source.
    from mmrstraj_jax.weights import foreign, native

    if "=" in str(path) and not Path(path).exists():
        return _check_plausible(foreign.open_parts(str(path)))
    folder = Path(path)
    source = native.open_native(folder) if native.is_native(folder) else foreign.open_folder(folder)
    return _check_plausible(source)


def _check_plausible(source: Source) -> Source:
    """Sizes that would take gigabytes before any tensor is looked at are a broken or hostile config.json."""
    vision, text = source.config.vision, source.config.text
    for name, value, limit in (
        ("vision image_size / patch_size", vision.grid_side, 512),
        ("vision num_hidden_layers", vision.num_layers_run, 1000),
        ("vision hidden_size", vision.hidden_size, 2**16),
        ("text num_hidden_layers", text.num_hidden_layers, 1000),
    ):
        if not 0 < value <= limit:
            raise UserError(f"{source.where}: {name} is {value}; expected 1 to {limit}, correct config.json")
    return source


def source_dtype(source: Source) -> np.dtype:
    """The dtype of the embedding in the file, taken for the whole."""
    found = [entry.dtype for name, entry in source.tensors.items() if name.endswith("embed_tokens.weight")]
    floats = [dtype for dtype in found if dtype in DTYPES.values()]
    return next(iter(floats), DTYPES["F32"])  # `check` names one that is missing, or holds integers


def leaf_shapes(state: nnx.State) -> dict[str, tuple[int, ...]]:
    """Tree path -> shape, in tree order."""
    return {path_name(keys): tuple(leaf.shape) for keys, leaf in jax.tree_util.tree_leaves_with_path(state)}


def path_name(keys: tuple) -> str:
    """`vision_tower.layers.mlp.fc1.weight` from the key path of a leaf."""
    names = (getattr(key, "key", getattr(key, "name", None)) for key in keys)
    return ".".join(str(name) for name in names if name != "value" and name is not None)


def check(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every key used exactly once and every leaf filled exactly once.

    Raises:
        UserError: lists all missing, extra and mis-shaped keys.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for path, shape in shapes.items():
        if path in source.fresh:
            continue
        stacked = layouts.is_stacked(path)
        keys = source.keys_of(path, shape[0] if stacked else None)
        wanted |= dict.fromkeys(keys, shape if source.layout == "native" or not stacked else shape[1:])
    missing = wanted.keys() - source.tensors.keys()
    extra = source.tensors.keys() - wanted.keys()
    wrong: dict[tuple, list[str]] = {}
    for key in wanted.keys() & source.tensors.keys():
        if source.tensors[key].shape != wanted[key]:
            wrong.setdefault((source.tensors[key].shape, wanted[key]), []).append(source.tensors[key].name)
    entries = (source.tensors[key] for key in wanted.keys() & source.tensors.keys())
    integers = [entry.name for entry in entries if np.issubdtype(entry.dtype, np.integer)]
    problems = []
    if missing:
        problems.append(f"missing {layouts.fold(missing)}")
    if integers:
        problems.append(f"{layouts.fold(integers)} holds integers, expected {', '.join(DTYPES)}")
    if extra:
        problems.append(f"extra {layouts.fold(source.tensors[key].name for key in extra)}")
    for (found, expected), names in sorted(wrong.items()):
        problems.append(f"{layouts.fold(names)} has shape {list(found)}, config.json gives {list(expected)}")
    if problems:
        raise UserError(f"{source.where}: weights and config.json do not fit: " + "; ".join(problems))


def read_leaf(
    reader: Reader,
    source: Source,
    path: str,
    out: Shaped[np.ndarray, "*S"],
) -> list[str]:
    """Fills one leaf, layer by layer where it is stacked.

    Returns:
        one line per tensor: path, layer, dtype, shape, checksum; the same for every layout.
    """
    if path in source.fresh:
        out[...] = source.fresh[path].astype(out.dtype)
        return [f"{path} fresh"]
    stacked, jobs = layouts.is_stacked(path), []
    entries = [source.tensors[key] for key in source.keys_of(path, len(out) if stacked else None)]
    for layer, target in enumerate(out) if stacked else [(0, out)]:
        # A stack of one layer, or our own stacked tensor: where in the entry the layer begins.
        first = layer * target.size if len(entries) == 1 else 0
        jobs.append(Job(entries[layer] if len(entries) > 1 else entries[0], target, first))
    checksums = reader.read_many(jobs)
    return [
        f"{path} {layer} {job.entry.dtype} {list(job.out.shape)} {checksum}"
        for layer, (job, checksum) in enumerate(zip(jobs, checksums, strict=True))
    ]


def _put(host: Shaped[np.ndarray, "*S"], sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(host)
    # Each process places its own shards; device_put of a global array would compare it across processes
    # first.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
