"""Hugging Face folders, lmms-lab folders and models composed of parts -> Source."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from mmrstraj_jax.config import AnyResConfig, ModelConfig, TextConfig, VisionConfig
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.weights import layouts
from mmrstraj_jax.weights.files import MERGE_PEFT, list_tensors, optional_json
from mmrstraj_jax.weights.hf_config import Described, describe, detect_layout, resolve_tied
from mmrstraj_jax.weights.load import Source
from mmrstraj_jax.weights.safetensors_io import Entry, Job, Reader
from mmrstraj_jax.weights.tokens import find_tokenizer

_HEAD, _EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
_PROJECTOR = tuple(f"multi_modal_projector.linear_{n}.{p}" for n in (1, 2) for p in ("weight", "bias"))
CAN_BE_FRESH = (*_PROJECTOR, "image_newline")
_PADDED_ROWS = 64


def open_folder(folder: Path) -> Source:
    """A llava-hf or lmms-lab folder.

    Raises:
        UserError: anything that does not fit together.
    """
    tensors = list_tensors(folder)
    if folder.is_file():
        raise UserError(
            f"{folder}: a weight file alone does not say its sizes; name its folder, with config.json"
        )
    if tensors and all(name.startswith("base_model.model.") for name in tensors):
        raise UserError(f"{folder}: is a PEFT adapter, not a model; {MERGE_PEFT}")
    described = describe(folder)
    if described.layout not in ("llava-hf", "lmms-lab"):
        other = "qwen=DIR" if described.layout == "siglip" else "siglip=DIR"
        raise UserError(
            f"{folder}: is a {described.layout} model, only a part of this one; name all parts: "
            f"{described.layout}={folder},{other},projector=DIR or projector=fresh"
        )
    hub, unused, ignored = _normalise(folder, tensors, described)
    config = _model_config(folder, described.vision, described, hub)
    if config.text.tie_word_embeddings and _HEAD in hub:
        ignored += _check_tied_head(folder, hub, described.layout)
    return Source(
        str(folder), described.layout, config, described.anyres, find_tokenizer(folder), hub, unused, ignored
    )


def open_parts(text: str) -> Source:
    """ "siglip=DIR,qwen=DIR,projector=DIR|fresh": a tower, a language model and a projector with its newline.

    Raises:
        UserError: unknown or missing parts, or parts whose sizes do not fit.
    """
    named = [item.strip().partition("=")[::2] for item in text.split(",")]
    if sorted(name for name, _ in named) != ["projector", "qwen", "siglip"]:
        raise UserError(f"weights {text!r}; expected siglip=DIR,qwen=DIR,projector=DIR or projector=fresh")
    parts = dict(named)
    hub: dict[str, Entry] = {}
    unused: dict[str, Entry] = {}
    ignored: tuple[str, ...] = ()
    described: dict[str, Described] = {}
    for part in ("siglip", "qwen"):
        folder = Path(parts[part])
        tensors = list_tensors(folder)
        described[part] = describe(folder)
        if described[part].layout != part:
            raise UserError(
                f"{folder}: {part}= names a {described[part].layout} model; expected a {part} folder"
            )
        found, kept, left = _normalise(folder, tensors, described[part])
        hub, unused, ignored = hub | found, unused | kept, ignored + left
    vision, qwen = described["siglip"].vision, Path(parts["qwen"])
    anyres, fresh = AnyResConfig().for_views(vision.image_size, vision.patch_size), {}
    if parts["projector"] == "fresh":
        fresh = fresh_projector(vision, described["qwen"].text)
    else:
        folder = Path(parts["projector"])
        found = _projector(folder)
        hub |= found
        if (folder / "config.json").is_file():
            anyres = describe(folder).anyres or anyres
        if (anyres.view_size, anyres.patch_size) != (vision.image_size, vision.patch_size):
            raise UserError(
                f"{folder}: made for views of {anyres.view_size} px; the tower takes {vision.image_size}"
            )
    config = _model_config(qwen, vision, described["qwen"], hub)
    if config.text.tie_word_embeddings and _HEAD in hub:
        ignored += _check_tied_head(qwen, hub, "qwen")
    return Source(text, "parts", config, anyres, find_tokenizer(qwen), hub, unused, ignored, fresh)


def _normalise(
    folder: Path, tensors: Mapping[str, Entry], described: Described
) -> tuple[dict[str, Entry], dict[str, Entry], tuple[str, ...]]:
    """(hub key -> tensor, unused tensors worth keeping, names of declared exceptions).

    A key that the layout does not know keeps its name, so that `load.check` lists it as extra.
    """
    num_run = described.vision.num_layers_run if described.vision else 0
    hub: dict[str, Entry] = {}
    unused: dict[str, Entry] = {}
    ignored = []
    for name, entry in tensors.items():
        key = layouts.to_hub(name, described.layout) or name
        if layouts.is_unused(name, described.layout, num_run, described.num_file_layers):
            ignored.append(name)
            if key in layouts.POST_LAYERNORM:
                unused[key] = entry
            continue
        if key in hub:
            raise UserError(f"{folder}: {name} and {hub[key].name} are the same parameter; remove one")
        hub[key] = entry
    return hub, unused, tuple(ignored)


def _model_config(
    folder: Path, vision: VisionConfig, described: Described, hub: Mapping[str, Entry]
) -> ModelConfig:
    tied = resolve_tied(folder / "config.json", described.tied, _HEAD in hub)
    return ModelConfig(
        vision=vision,
        text=replace(described.text, tie_word_embeddings=tied),
        image_token_id=described.image_token_id,
        video_token_id=described.video_token_id,
        eos_token_ids=described.eos_token_ids,
        pad_token_id=described.pad_token_id,
    )


def _check_tied_head(folder: Path, hub: dict[str, Entry], layout: str) -> tuple[str, ...]:
    """Drops a head that repeats the tied embedding; returns its name.

    Raises:
        UserError: it differs in a row that stands for a token.
    """
    head, embedding = hub.pop(_HEAD), hub.get(_EMBEDDING)
    if embedding is None:
        return (head.name,)  # load.check reports the missing embedding
    rows, same = head.shape[0], head.shape == embedding.shape and head.dtype == embedding.dtype
    tokenizer = find_tokenizer(folder)
    if layout == "llava-hf":
        # Its conversion padded the vocabulary to a multiple of 64 and drew the new rows of both
        # matrices separately.
        used = 0 if tokenizer is None else len(Tokenizer.load(tokenizer))
        rows = max(used, rows - _PADDED_ROWS)
    with Reader() as reader:
        # A few megabytes at a time: two embeddings of a 7B model are 2 GB.
        step = max(1, 2**22 // (head.shape[-1] * head.dtype.itemsize))
        for first in range(0, rows if same else 0, step):
            shape = (min(step, rows - first), head.shape[1])
            pieces = [np.empty(shape, entry.dtype) for entry in (head, embedding)]
            starts = [first * head.shape[1]] * 2
            reader.read_many([Job(*job) for job in zip((head, embedding), pieces, starts, strict=True)])
            same = same and pieces[0].tobytes() == pieces[1].tobytes()
    if not same:
        raise UserError(
            f"{folder / 'config.json'}: tie_word_embeddings is true but {head.name} differs from "
            f"{embedding.name}; set it to false, or remove the tensor that is wrong"
        )
    return (head.name,)


def _projector(folder: Path) -> dict[str, Entry]:
    """Projector and newline of a OneVision checkpoint, or of a file that holds just them."""
    tensors = list_tensors(folder)
    config = optional_json(folder / "config.json")
    known = [detect_layout(config, folder / "config.json")] if config else ["llava-hf", "lmms-lab"]
    found: dict[str, Entry] = {}
    for name, entry in tensors.items():
        keys = {layouts.to_hub(name, layout) for layout in known if layout in ("llava-hf", "lmms-lab")}
        for key in keys & set(CAN_BE_FRESH):
            found[key] = entry
    if not found:
        raise UserError(
            f"{folder}: holds no projector; expected a LLaVA-OneVision checkpoint (llava-hf or lmms-lab)"
        )
    return found


def fresh_projector(vision: VisionConfig, text: TextConfig) -> dict[str, Shaped[np.ndarray, "*S"]]:
    """torch.nn.Linear's default initialisation; newline N(0, 1/H) as in llava_arch.py."""
    rng, hidden, out = np.random.default_rng(0), text.hidden_size, {}
    for number, num_in in ((1, vision.output_size), (2, hidden)):
        for name, shape in (("weight", (hidden, num_in)), ("bias", (hidden,))):
            value = rng.uniform(-1, 1, shape) * num_in**-0.5
            out[f"multi_modal_projector.linear_{number}.{name}"] = value.astype(np.float32)
    out["image_newline"] = (rng.standard_normal(hidden) * hidden**-0.5).astype(np.float32)
    return out
