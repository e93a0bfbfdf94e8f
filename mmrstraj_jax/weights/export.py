"""Our model -> a merged Hugging Face checkpoint, or a PEFT adapter for one.

Everything is written to a temporary folder beside the target, read back, compared, and only then renamed.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Shaped

from mmrstraj_jax.config import AnyResConfig, LoRAConfig, ModelConfig
from mmrstraj_jax.data.tokenizer import Tokenizer, bind_token_ids
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.layers import Linear
from mmrstraj_jax.models.lora import PARTS
from mmrstraj_jax.models.mmrstraj import MMRSTraj, init_model
from mmrstraj_jax.weights import layouts
from mmrstraj_jax.weights.files import list_tensors
from mmrstraj_jax.weights.foreign import open_folder
from mmrstraj_jax.weights.load import check, leaf_shapes, open_source, read_leaf
from mmrstraj_jax.weights.native import leaves
from mmrstraj_jax.weights.progress import Progress
from mmrstraj_jax.weights.safetensors_io import (
    Output,
    Reader,
    whole_folder,
    write_file,
    write_sharded,
    write_text,
)
from mmrstraj_jax.weights.serving import model_card, write_serving_files

# transformers' module path of the tower's layers; 5.0 dropped the `vision_model` module in between.
RUNTIMES = {"5": "model.vision_tower.encoder.", "4.57": "model.vision_tower.vision_model.encoder."}
_NO_TARGET = "dummy-target-modules"  # peft.utils.constants: it refuses an empty list


@dataclass(frozen=True)
class Exported:
    """What was written."""

    directory: Path
    num_tensors: int
    num_merged: int  # tensors with an adapter
    num_unchanged: int  # of these, tensors whose change was lost to rounding


def merged_slices(model: MMRSTraj, dtype: np.dtype) -> Iterator[tuple[str, Output, Output | None]]:
    """(hub key, tensor with its adapter merged, the same without it or None) of every parameter.

    W + (alpha / r) B A in float32, then one cast; a layer at a time: the float32 stack of a 7B MLP is 7.6 GB.
    """
    arrays = leaves(model)
    scales = {
        ".".join(map(str, path)): module.lora_scale
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and module.lora_A is not None
    }
    for path, array in arrays.items():
        if ".lora_" in path:
            continue
        stacked = layouts.is_stacked(path)
        module = path.removesuffix(".weight")
        scale = scales.get(module) if path.endswith(".weight") else None
        for layer, key in enumerate(layouts.hub_keys(path, array.shape[0])):
            index = layer if stacked else ...
            shape = array.shape[1:] if stacked else array.shape

            def base(array=array, index=index) -> Shaped[np.ndarray, "*S"]:
                return np.asarray(array[index]).astype(dtype)

            def merged(array=array, index=index, module=module, scale=scale) -> Shaped[np.ndarray, "*S"]:
                low, high = (np.asarray(arrays[f"{module}.lora_{x}"][index], np.float32) for x in "AB")
                return (np.asarray(array[index], np.float32) + np.float32(scale) * (high @ low)).astype(dtype)

            plain = Output(key, dtype, shape, base)
            yield (key, plain, None) if scale is None else (key, Output(key, dtype, shape, merged), plain)


def serving_policy(trained: AnyResConfig, name: str | None) -> AnyResConfig:
    """The policy that transformers and vLLM will use.

    Raises:
        UserError: the model was trained with `tau`, which they cannot express, and no other policy was named.
    """
    if name is None and trained.policy == "tau":
        raise UserError(
            "anyres policy 'tau' cannot be expressed by transformers or vLLM; name what they shall use, e.g. "
            "--serving-policy anyres_max_9 (other token counts than in training: the model card will say so)"
        )
    served = replace(trained, policy=name or trained.policy, rounding="hf")  # they know no other
    if served.policy == "tau":
        raise UserError(
            "--serving-policy tau: transformers and vLLM cannot express it; expected e.g. anyres_max_9"
        )
    return served


def export_hf(
    model: MMRSTraj,
    config: ModelConfig,
    anyres: AnyResConfig,
    directory: str | Path,
    *,
    tokenizer_dir: Path | None,
    policy: str | None = None,
    dtype: jnp.dtype | None = None,
    unused: Mapping[str, Shaped[np.ndarray, "*S"]] | None = None,
    base: str | None = None,
    train_full: tuple[str, ...] = (),
    title: str = "MM-RSTraj",
    notes: tuple[str, ...] = (),
    max_shard_bytes: int = 5 * 10**9,
    progress: bool = True,
) -> Exported:
    """Writes a merged checkpoint that transformers and vLLM load as LlavaOnevisionForConditionalGeneration.

    Args:
        model: with or without adapters; it is not changed.
        anyres: the policy the model was trained with.
        directory: must not exist.
        tokenizer_dir: tokenizer of the model.
        policy: serving policy, "anyres_max_N"; needed when `anyres` is tau.
        dtype: of the tensors; by default that of the embedding.
        unused: LoadedModel.unused; without it the unused post_layernorm is written as identity.
        base: weights that the parts trained in full must differ from; adapters know their base without it.
        train_full: parts trained in full, each of which must differ from the base.
        title, notes: of the model card.
    Raises:
        UserError: the target exists, tau without a policy, no tokenizer, a tokenizer that does not fit,
            adapters or a part trained in full that change nothing, or a difference between what was written
            and what was read back.
    """
    served = serving_policy(anyres, policy)
    if tokenizer_dir is None:
        raise UserError(
            "export needs a tokenizer; put tokenizer.json beside the weights, or name --tokenizer DIR"
        )
    config = with_ids(config, tokenizer_dir)
    last = max(config.image_token_id, config.video_token_id)
    if last >= config.text.vocab_size:
        raise UserError(
            f"{tokenizer_dir}: <image> and <video> have ids up to {last}, the embedding has "
            f"{config.text.vocab_size} rows, and transformers looks them up; export needs a model with spare "
            "rows, as Qwen's have"
        )
    embedding = model.language_model.embed_tokens.weight
    dtype = np.dtype(dtype or embedding.dtype)
    outputs, pairs = [], []
    for key, tensor, plain in merged_slices(model, dtype):
        outputs.append(tensor)
        if plain is not None:
            pairs.append((key, tensor, plain))
    shape = (config.vision.hidden_size,)
    for key, value in zip(layouts.POST_LAYERNORM, (1, 0), strict=True):
        array = (unused or {}).get(key)
        # In the dtype it came in: it takes no part in anything, and so comes back bit for bit.
        array = np.full(shape, value, dtype) if array is None else array
        outputs.append(Output(key, array.dtype, shape, lambda array=array: array))
    outputs.sort(key=lambda tensor: _natural(tensor.name))
    num_unchanged = _check_merge(pairs)
    if train_full:
        assert base is not None, "parts trained in full are compared with the base"
        _check_trained(model, base, dtype, train_full)

    with whole_folder(directory) as folder:
        write_sharded(folder, outputs, max_shard_bytes)
        write_serving_files(folder, config, anyres, served, dtype.name, tokenizer_dir, title, list(notes))
        _read_back(folder, config, served, outputs, progress)
    return Exported(Path(directory), len(outputs), len(pairs), num_unchanged)


def with_ids(config: ModelConfig, tokenizer_dir: Path) -> ModelConfig:
    """The tokenizer's ids for the slots (they must agree), and for what the model's own files left open.

    <|im_end|> comes first of the ids that end an answer: a base Qwen's files lack it, training teaches it.
    """
    bound = bind_token_ids(config, Tokenizer.load(tokenizer_dir))
    eos = tuple(dict.fromkeys((*bound.eos_token_ids, *config.eos_token_ids)))
    pad = bound.pad_token_id if config.pad_token_id is None else config.pad_token_id
    return replace(bound, eos_token_ids=eos, pad_token_id=pad)


def _check_merge(pairs: list[tuple[str, Output, Output]]) -> int:
    """Number of merged tensors equal to the base; an error when all are."""
    unchanged = [key for key, merged, base in pairs if merged.make().tobytes() == base.make().tobytes()]
    if pairs and len(unchanged) == len(pairs):
        raise UserError(
            f"merged weights equal the base in all {len(pairs)} adapted tensors: the adapters are "
            "zero or smaller than "
            "the rounding of the export's dtype; train them, or export with --dtype float32"
        )
    return len(unchanged)


def _check_trained(model: MMRSTraj, base: str, dtype: np.dtype, train_full: tuple[str, ...]) -> None:
    """An error that names the parts trained in full of which every parameter still equals the base's."""
    state, source, unchanged = leaves(model), open_source(base), []
    with Reader() as reader:

        def differs(path: str) -> bool:
            before = np.empty(state[path].shape, dtype)
            read_leaf(reader, source, path, before)
            return before.tobytes() != np.asarray(state[path]).astype(dtype).tobytes()

        for part in train_full:
            paths = [path for path in state if path.startswith(PARTS[part]) and ".lora_" not in path]
            if not any(differs(path) for path in paths):
                unchanged.append(part)
    if unchanged:
        raise UserError(
            f"{', '.join(unchanged)}: trained in full, but every parameter equals the base {base}: "
            "nothing was trained, or rounding lost it; train it, or export with --dtype float32"
        )


def _read_back(
    folder: Path, config: ModelConfig, served: AnyResConfig, outputs: list[Output], progress: bool
) -> None:
    """Opens what was written as any user would, and compares every byte."""
    source = open_folder(folder)
    check(source, leaf_shapes(nnx.split(nnx.eval_shape(lambda: init_model(config, jax.random.key(0))))[1]))
    assert source.config == config, (source.config, config)
    assert _used(source.anyres) == _used(served), (source.anyres, served)
    bar = Progress("checking", sum(tensor.num_bytes for tensor in outputs), progress)
    with Reader() as reader:
        for tensor in outputs:
            entry = source.tensors.get(tensor.name) or source.unused[tensor.name]
            found = reader.read(entry)
            if found.tobytes() != tensor.make().tobytes():
                raise UserError(
                    f"{folder}: {tensor.name} was not written as intended; check the disk and repeat"
                )
            if found.dtype == np.float16 and np.isinf(found).any():
                raise UserError(
                    f"{tensor.name}: holds values that float16 cannot (it ends at 65,504); export with "
                    "--dtype bfloat16 or float32"
                )
            bar.add(tensor.num_bytes)
    bar.close()


def _used(policy: AnyResConfig) -> tuple:
    return policy.policy, policy.view_size, policy.patch_size, policy.grid_pinpoints


def export_peft(
    model: MMRSTraj,
    config: ModelConfig,
    anyres: AnyResConfig,
    lora: LoRAConfig,
    directory: str | Path,
    *,
    base: str,
    policy: str | None = None,
    train_full: tuple[str, ...] = (),
    runtime: str = "5",
) -> Exported:
    """Writes adapter_config.json and adapter_model.safetensors for peft.PeftModel.from_pretrained.

    Args:
        model: with adapters.
        lora: their settings.
        base: repository or folder of the base checkpoint, as transformers loads it.
        train_full: parts trained without LoRA; of these PEFT can hold only the projector.
        runtime: transformers version that will load it, a key of RUNTIMES.
    Raises:
        UserError: no adapters, adapters of zeros, a part PEFT cannot hold, tau without a serving policy.
    """
    served = serving_policy(anyres, policy)
    if unfit := set(train_full) - {"projector"}:
        raise UserError(
            f"PEFT cannot hold {', '.join(sorted(unfit))} trained in full; export merged weights instead"
        )
    arrays, float32 = leaves(model), np.dtype(np.float32)
    if train_full and any(path.startswith("multi_modal_projector.") and ".lora_" in path for path in arrays):
        raise UserError(
            "PEFT cannot hold a projector with adapters that is also trained in full; export merged weights"
        )
    outputs, modules, is_zero = [], [], True
    for path, array in arrays.items():
        module, _, leaf = path.rpartition(".")
        is_saved = "projector" in train_full and path.startswith("multi_modal_projector.")
        if not leaf.startswith("lora_") and not is_saved:
            continue
        is_zero &= leaf == "lora_A" or not np.any(np.asarray(array))
        names = _runtime_modules(module, array.shape[0], runtime)
        for layer, name in enumerate(names):
            tail = f"{leaf}.weight" if leaf.startswith("lora_") else leaf
            index = layer if layouts.is_stacked(path) else ...
            shape = array.shape[1:] if layouts.is_stacked(path) else array.shape

            def make(array=array, index=index) -> Shaped[np.ndarray, "*S"]:
                return np.asarray(array[index], np.float32)

            outputs.append(Output(f"base_model.model.{name}.{tail}", float32, shape, make))
        if leaf == "lora_A":
            modules += names
    if not outputs or is_zero:
        raise UserError(
            "the model has no adapters, or they are zero: merged would equal the base; train them first"
        )
    with whole_folder(directory) as folder:
        write_file(folder / "adapter_model.safetensors", outputs)
        settings = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "bias": "none",
            "fan_in_fan_out": False,
            # Full names: suffixes such as q_proj would match the language model too.
            "target_modules": sorted(modules, key=_natural) or _NO_TARGET,
            "modules_to_save": ["multi_modal_projector"] if "projector" in train_full else None,
        }
        write_text(folder / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
        note = f"PEFT adapter for `{base}`, names of transformers {runtime}. vLLM needs merged weights."
        write_text(folder / "README.md", model_card("MM-RSTraj adapter", anyres, served, [note]))
        with Reader() as reader:
            entries = list_tensors(folder / "adapter_model.safetensors")
            for tensor in outputs:
                if reader.read(entries[tensor.name]).tobytes() != tensor.make().tobytes():
                    raise UserError(
                        f"{folder}: {tensor.name} was not written as intended; check the disk and repeat"
                    )
    return Exported(Path(directory), len(outputs), len(modules), 0)


def check_base(folder: str, outputs: Iterable[Output], config: ModelConfig) -> None:
    """An error unless transformers would load these tensors, bit for bit in their dtype, from the folder."""
    source, problem = open_source(folder), None
    if source.layout != "llava-hf":
        problem = f"is in the layout {source.layout}; expected llava-hf, which transformers loads"
    elif (source.config.vision, source.config.text) != (config.vision, config.text):
        problem = "has other sizes, or another vision_feature_layer, than the base of the adapters"
    with Reader() as reader:

        def differs(output: Output) -> bool:
            entry = source.tensors[output.name]
            return reader.read(entry, output.dtype).tobytes() != output.make().tobytes()

        if problem is None and (wrong := next(filter(differs, outputs), None)):
            problem = f"{wrong.name} differs from what the adapters were trained on"
    if problem:
        raise UserError(f"--base {folder}: {problem}; name the right one, or export merged, without --peft")


def _runtime_modules(module: str, num_layers: int, runtime: str) -> list[str]:
    """Module paths in transformers of one of our linears, or of one per layer."""
    keys = layouts.hub_keys(module + ".", num_layers)
    return [
        key.removesuffix(".")
        .replace("vision_tower.vision_model.encoder.", RUNTIMES[runtime])
        .replace("language_model.model.", "model.language_model.")
        .replace("multi_modal_projector.", "model.multi_modal_projector.")
        for key in keys
    ]


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
