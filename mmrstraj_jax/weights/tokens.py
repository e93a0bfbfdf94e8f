"""Tokenizer files beside weights. Ids are always resolved by name: in Qwen2.5 151646 is not `<image>`."""

import json
import shutil
from pathlib import Path

from mmrstraj_jax.data.tokenizer import SLOT_TOKENS, Tokenizer
from mmrstraj_jax.weights.files import read_json
from mmrstraj_jax.weights.safetensors_io import write_text

_COPIED = ("tokenizer_config.json", "vocab.json", "merges.txt")


def find_tokenizer(directory: Path) -> Path | None:
    """The folder that holds the tokenizer: the given one or its `tokenizer/`; None without one."""
    for folder in (directory, directory / "tokenizer"):
        if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
            return folder
    return None


def copy_tokenizer(source: Path, target: Path) -> Tokenizer:
    """Copies a tokenizer, `<image>` and `<video>` added at the next free ids where they are missing.

    Args:
        source: folder with tokenizer.json, or vocab.json and merges.txt.
        target: existing folder.
    Returns:
        the tokenizer as written.
    Raises:
        UserError: not a Qwen tokenizer.
    """
    tokenizer = Tokenizer.load(source)
    tokenizer.save(target)
    for name in _COPIED:
        if (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)
    path = target / "tokenizer_config.json"
    if path.exists():
        settings = read_json(path)
        decoder = settings.setdefault("added_tokens_decoder", {})
        for token, number in zip(SLOT_TOKENS, (tokenizer.image_id, tokenizer.video_id), strict=True):
            decoder.setdefault(str(number), added_token(token))
        write_text(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return tokenizer


def added_token(text: str) -> dict:
    """An entry of tokenizer_config.json's added_tokens_decoder."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": text, **flags}
