"""Trains the tiny model's byte-level BPE on generated text: about 1,000 tokens, Qwen's special tokens by
name."""

import os
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmrstraj_jax.synthcity import vocabulary
from mmrstraj_jax.synthcity.questions import Balancer
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.sample import samples, training_turns

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
VOCABULARY = 1000
# Qwen2's pattern: words with their space, single digits, punctuation.

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT = ("You are a helpful assistant.", "system\n", "user\n", "assistant\n")


def corpus(num: int = 1500, seed: int = 0) -> Iterator[str]:
    """Texts of `num` windows with every kind of question, the text-only rows, and the chat frame's words."""
    balancer = Balancer()
    for k, sample in enumerate(samples("base", seed, num, "AB"[seed % 2], "traffic", square=True)):
        s = Stream(seed, 11, k)
        for kind in ("base", "traffic"):
            for turn in training_turns(sample, s, kind, balancer, 12):
                yield from turn
        for turn in vocabulary.text_row(s):
            yield from turn
        yield _CHAT[k % len(_CHAT)]


def train_tokenizer(folder: str | os.PathLike, num: int = 1500, vocabulary: int = VOCABULARY) -> Path:
    """Trains on corpus(num) and writes folder/tokenizer.json; the same file for the same arguments.

    vocabulary: entries without the special tokens, which follow them with the highest ids.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus(num), trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    path = Path(folder) / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path
