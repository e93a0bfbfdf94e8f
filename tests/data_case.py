"""What the data tests share: a small BPE tokenizer with Qwen's names, and a folder of rows and images."""

import json
import pathlib

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from mmrstraj_jax.config import AnyResConfig
from mmrstraj_jax.data.tokenizer import CONTROL_TOKENS, Tokenizer

SENTENCES = [
    "You are a helpful assistant.",
    "system user assistant",
    "How many roads are there in this image? Two roads, one bridge and a roundabout.",
    "Describe the traffic near the harbour in the evening.",
]
TINY = AnyResConfig().for_views(112, 14)
TINY_MAX = AnyResConfig(policy="anyres_max_2").for_views(112, 14)


def bpe(vocab_size: int = 360, extra: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(SENTENCES * 4, trainer)
    library.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (*CONTROL_TOKENS, *extra)]
    )
    return library


def tokenizer() -> Tokenizer:
    return Tokenizer.from_library(bpe())


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Deterministic, with detail at several scales."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    bands = [127.5 + 127.5 * np.sin(x / (3 + seed + c) + y / (7 + 2 * c) + c) for c in range(3)]
    return Image.fromarray(np.stack(bands, -1).round().astype(np.uint8))


def chat_row(
    number: int, image: str | list | None, question: str = "How many roads?", answer: str = "Two roads."
) -> dict:
    slots = 0 if image is None else 1 if isinstance(image, str) else len(image)
    row = {
        "id": f"row{number}",
        "conversations": [
            {"from": "human", "value": "<image>\n" * slots + question},
            {"from": "gpt", "value": answer},
        ],
    }
    return row | ({} if image is None else {"image": image})


def dataset(
    folder: pathlib.Path, sizes: list[tuple[int, int] | None], name: str = "rows.json"
) -> pathlib.Path:
    """A JSON list with one row per size (None: a text row), and its PNG files; answers differ in length."""
    rows = []
    for number, size in enumerate(sizes):
        image = None
        if size is not None:
            image = f"{name}-{number}.png"
            picture(*size, seed=number % 5).save(folder / image)
        rows.append(chat_row(number, image, answer="Two roads. " * (1 + number % 4)))
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
