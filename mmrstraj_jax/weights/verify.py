"""Are two sets of weights the same model? And: what is in this file or folder?"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from mmrstraj_jax import settings
from mmrstraj_jax.config import AnyResConfig, ModelConfig
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.mmrstraj import MMRSTraj, init_model
from mmrstraj_jax.weights import layouts
from mmrstraj_jax.weights.export import merged_slices, with_ids
from mmrstraj_jax.weights.files import list_tensors
from mmrstraj_jax.weights.load import Source, check, leaf_shapes, open_source
from mmrstraj_jax.weights.safetensors_io import Job, Reader

_HEAD, _EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
# hub prefix -> row of the table; first match wins
_PARTS = (
    ("vision_tower.vision_model.embeddings.", "vision_tower.embeddings"),
    ("vision_tower.", "vision_tower.layers"),
    ("multi_modal_projector.", "multi_modal_projector"),
    ("image_newline", "image_newline"),
    (_EMBEDDING, "language_model.embed_tokens"),
    (_HEAD, "language_model.lm_head"),
    ("language_model.model.norm.", "language_model.norm"),
    ("language_model.", "language_model.layers"),
)


@dataclass(frozen=True)
class Tensors:
    """One side of a comparison: hub keys with shapes, values read when asked for."""

    name: str
    config: ModelConfig
    anyres: AnyResConfig
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Float[np.ndarray, "*S"]]


@dataclass
class Row:
    """One line of the table; `max_abs_diff` is in the units of the weights."""

    part: str
    num_tensors: int = 0
    max_abs_diff: float = 0.0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def verdict(self, tolerance: float) -> str:
        if self.problems:
            return "; ".join(self.problems)
        # not (x <= t): a NaN is a difference
        word = "differs" if not self.max_abs_diff <= tolerance else "equal"
        return word + (f" ({', '.join(self.notes)})" if self.notes else "")

    def is_equal(self, tolerance: float) -> bool:
        return not self.problems and self.max_abs_diff <= tolerance


def tensors_of_files(path: str | Path, reader: Reader) -> Tensors:
    """Weights on disk in any layout; nothing is read yet.

    Args:
        reader: open for as long as the result is used.
    """
    source = open_source(path)
    shapes = leaf_shapes(nnx.split(nnx.eval_shape(lambda: init_model(source.config, jax.random.key(0))))[1])
    check(source, shapes)
    places: dict[str, tuple[str, int, tuple[int, ...]]] = {}
    for leaf, shape in shapes.items():
        stacked = layouts.is_stacked(leaf)
        for layer, key in enumerate(layouts.hub_keys(leaf, shape[0])):
            places[key] = (leaf, layer, shape[1:] if stacked else shape)

    def read(key: str) -> Float[np.ndarray, "*S"]:
        leaf, layer, shape = places[key]
        if leaf in source.fresh:
            return source.fresh[leaf]
        out = np.empty(shape, np.float32)
        if source.layout == "native":
            reader.read_many([Job(source.tensors[leaf], out, layer * out.size)])
        else:
            reader.read_many([Job(source.tensors[key], out)])
        return out

    keys = {key: shape for key, (_, _, shape) in places.items()}
    return Tensors(str(path), _with_ids(source.config, source.tokenizer_dir), source.anyres, keys, read)


def _with_ids(config: ModelConfig, tokenizer_dir: Path | None) -> ModelConfig:
    """A model's own files may leave token ids to the tokenizer beside the weights; an export states them."""
    return config if tokenizer_dir is None else with_ids(config, tokenizer_dir)


def tensors_of_model(
    name: str,
    model: MMRSTraj,
    config: ModelConfig,
    anyres: AnyResConfig,
    dtype,
    tokenizer_dir: Path | None = None,
) -> Tensors:
    """A model in memory, its adapters merged, rounded to the dtype it would be exported in."""
    config = _with_ids(config, tokenizer_dir)
    outputs = {key: tensor for key, tensor, _ in merged_slices(model, np.dtype(dtype))}
    shapes = {key: tensor.shape for key, tensor in outputs.items()}
    return Tensors(name, config, anyres, shapes, lambda key: outputs[key].make().astype(np.float32))


def compare(a: Tensors, b: Tensors) -> list[Row]:
    """One row per part, and one for the settings.

    A tied head counts as a copy of the embedding. Rows that only the larger vocabulary has are a note:
    they stand for no token (llava-hf pads to a multiple of 64).
    """
    rows = {part: Row(part) for _, part in _PARTS}
    for key in sorted(a.shapes.keys() | b.shapes.keys()):
        row = rows[next(part for prefix, part in _PARTS if key.startswith(prefix))]
        sides = [_EMBEDDING if key == _HEAD and key not in side.shapes else key for side in (a, b)]
        absent = [side.name for side, name in zip((a, b), sides, strict=True) if name not in side.shapes]
        if absent:
            row.problems.append(f"{key} only in {(b if absent == [a.name] else a).name}")
            continue
        row.num_tensors += 1
        left, right = a.read(sides[0]), b.read(sides[1])
        if left.shape != right.shape:
            num_rows = min(len(left), len(right))
            if key not in (_HEAD, _EMBEDDING) or left.shape[1:] != right.shape[1:]:
                row.problems.append(f"{key}: shape {list(left.shape)} and {list(right.shape)}")
                continue
            row.notes.append(f"{abs(len(left) - len(right))} extra vocabulary rows not compared")
            left, right = left[:num_rows], right[:num_rows]
        row.max_abs_diff = float(np.maximum(row.max_abs_diff, _max_abs_diff(left, right)))
    for row in rows.values():
        row.problems = row.problems[:1] + ([f"and {len(row.problems) - 1} more"] if row.problems[1:] else [])
    return [row for row in rows.values() if row.num_tensors or row.problems] + [_settings_row(a, b)]


def _max_abs_diff(left: np.ndarray, right: np.ndarray) -> float:
    # Equal bits first: inf - inf would be NaN.
    different = left != right
    return float(np.abs(left[different] - right[different]).max()) if different.any() else 0.0


def _settings_row(a: Tensors, b: Tensors) -> Row:
    row = Row("settings")
    same = {"vocab_size": 0, "tie_word_embeddings": False}  # judged by the tensors
    left, right = (replace(side.config, text=replace(side.config.text, **same)) for side in (a, b))
    row.problems = settings.diff(left, right) + settings.diff(a.anyres, b.anyres)
    return row


def table(rows: list[Row], tolerance: float) -> str:
    """part, tensors, max |a - b|, verdict."""
    lines = [("part", "tensors", "max abs diff", "verdict")]
    for row in rows:
        number = f"{row.max_abs_diff:.3g}" if row.num_tensors else "-"
        lines.append((row.part, str(row.num_tensors or "-"), number, row.verdict(tolerance)))
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        "  ".join([*(x.ljust(w) for x, w in zip(line, widths, strict=False)), line[3]]) for line in lines
    )


def inspect(path: str | Path) -> str:
    """What a weight file, folder or composition is, as text; reads headers only.

    Raises:
        UserError: not weights; a folder whose weights and config.json do not fit is reported at the
        end instead.
    """
    if "=" not in str(path) or Path(path).exists():
        found = list_tensors(Path(path))
        if Path(path).is_file() or not (Path(path) / "config.json").is_file():
            return _inspect_tensors(path, found)
    source = open_source(path)
    shapes = leaf_shapes(nnx.split(nnx.eval_shape(lambda: init_model(source.config, jax.random.key(0))))[1])
    count = {part: 0 for part in ("vision_tower", "multi_modal_projector", "image_newline", "language_model")}
    for leaf, shape in shapes.items():
        count[leaf.split(".")[0]] += int(np.prod(shape))
    lines = [f"{path}: {source.layout} layout", *_dtype_lines(source), ""]
    lines += [f"  {part:<24}{number:>16,} parameters" for part, number in count.items()]
    lines += [f"  {'total':<24}{sum(count.values()):>16,} parameters", ""]
    lines += [f"  {name}: {value}" for name, value in _facts(source)]
    try:
        check(source, shapes)
        lines += ["", "weights and config fit: every key used once, every array filled once"]
    except UserError as error:
        lines += ["", f"PROBLEM {error}"]
    return "\n".join(lines)


def _inspect_tensors(path: str | Path, found: dict) -> str:
    groups: dict[tuple, list[str]] = {}
    for name, entry in found.items():
        groups.setdefault((layouts.LAYER.sub("{i}", name), str(entry.dtype), entry.shape), []).append(name)
    lines = [
        f"{path}: {len(found)} tensors, {sum(e.num_bytes for e in found.values()) / 1e9:.3f} GB, no "
        "config.json"
    ]
    for (_, dtype, shape), names in groups.items():
        lines.append(f"  {layouts.fold(names)}  {dtype} {list(shape)}")
    return "\n".join(lines)


def _dtype_lines(source: Source) -> list[str]:
    sizes: dict[str, int] = {}
    for entry in source.tensors.values():
        sizes[str(entry.dtype)] = sizes.get(str(entry.dtype), 0) + entry.num_bytes
    return [f"  {dtype}: {size / 1e9:.3f} GB" for dtype, size in sizes.items()]


def _facts(source: Source) -> list[tuple[str, object]]:
    config, anyres = source.config, source.anyres
    policy = f"tau {anyres.tau:g}" if anyres.policy == "tau" else anyres.policy
    facts: list[tuple[str, object]] = [
        (
            "views",
            f"{anyres.view_size} px, {anyres.side**2} tokens each, policy {policy}, rounding "
            f"{anyres.rounding}",
        ),
        (
            "tower layers run",
            f"{config.vision.num_layers_run}, features after {list(config.vision.feature_layers)}",
        ),
        (
            "vocabulary",
            f"{config.text.vocab_size} rows, head {'tied' if config.text.tie_word_embeddings else 'own'}",
        ),
        ("tokenizer", source.tokenizer_dir or "none"),
        (
            "ids",
            f"<image> {config.image_token_id}, <video> {config.video_token_id}, eos "
            f"{list(config.eos_token_ids)}",
        ),
    ]
    if source.ignored:
        facts.append(("not used (declared exceptions)", layouts.fold(source.ignored)))
    if source.fresh:
        facts.append(("fresh, needs stage 0", layouts.fold(source.fresh)))
    return facts
