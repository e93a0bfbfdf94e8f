"""The tokenizer: Qwen's byte-level BPE through the `tokenizers` library, its control tokens by name."""

import codecs
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from mmrstraj_jax.config import ModelConfig
from mmrstraj_jax.errors import UserError

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SLOT_TOKENS = ("<image>", "<video>")
# Qwen2's split (transformers, models/qwen2/tokenization_qwen2.py): single digits, contractions in any case
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text <-> ids. `encode` never yields a control or slot token: those are placed by the template, by id.

    Attributes: image_id, video_id, im_start, im_end, eos_ids, pad_id, newline_id; `source` says which files
    it is from; `fingerprint` is the SHA-256 of its definition.
    """

    def __init__(self, definition: str, source: str = "tokenizer.json"):
        """
        Args:
          definition: the text of a tokenizer.json.
          source: named in errors.
        Raises:
          UserError: not a tokenizer, or it lacks one of Qwen's control tokens.
        """
        self.source = source
        try:
            data = json.loads(definition)
            for token in data.get("added_tokens", ()):
                # Only tokens marked special can be kept out of ordinary text.
                token["special"] |= token["content"] in CONTROL_TOKENS + SLOT_TOKENS
            library = tokenizers.Tokenizer.from_str(json.dumps(data))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{source}: not a tokenizer definition ({error})") from error
        missing = [token for token in CONTROL_TOKENS if library.token_to_id(token) is None]
        if missing:
            raise UserError(f"{source}: no token {', '.join(missing)}; expected a Qwen2 or Qwen2.5 tokenizer")
        # As HF's add_tokens: the next id after the largest. Known tokens keep theirs.
        library.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in SLOT_TOKENS]
        )
        library.no_padding()
        library.no_truncation()
        self._definition = library.to_str()
        library.encode_special_tokens = True  # "<|im_end|>" in text is text
        self._library = library
        # The system turn, headers and many questions are the same in every row
        self._short = functools.lru_cache(maxsize=4096)(self._encode)
        self.pad_id, self.im_start, self.im_end = (library.token_to_id(token) for token in CONTROL_TOKENS)
        self.image_id, self.video_id = (library.token_to_id(token) for token in SLOT_TOKENS)
        self.eos_ids = (self.im_end, self.pad_id)
        self.fingerprint = hashlib.sha256(self._definition.encode()).hexdigest()
        newline = self.encode("\n")
        if len(newline) != 1:
            raise UserError(
                f"{source}: a newline is {len(newline)} tokens; expected Qwen's byte-level BPE (one)"
            )
        self.newline_id = newline[0]
        self._added = {number: token for number, token in library.get_added_tokens_decoder().items()}
        self._bytes = {char: byte for byte, char in _byte_characters().items()}

    def __reduce__(self):
        return Tokenizer, (self._definition, self.source)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """From tokenizer.json, or from vocab.json and merges.txt as Qwen2's BPE; `source` says which."""
        folder = pathlib.Path(folder)
        whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if whole.is_file():
            return cls(_read(whole), str(whole))
        if vocabulary.is_file() and merges.is_file():
            source = f"{vocabulary} and merges.txt, read as Qwen2's byte-level BPE"
            return cls(_qwen2_from_parts(vocabulary, merges), source)
        raise UserError(
            f"{folder}: no tokenizer.json, and no vocab.json with merges.txt; name a folder that has them"
        )

    @classmethod
    def from_library(cls, library: "tokenizers.Tokenizer", source: str = "memory") -> "Tokenizer":
        """From an object of the `tokenizers` library."""
        return cls(library.to_str(), source)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, slot tokens included."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._definition, encoding="utf-8")

    def __len__(self) -> int:
        """Number of ids in use, added tokens included."""
        return self._library.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; nothing in it is read as a control token."""
        try:
            return list(self._short(text) if len(text) < 200 else self._encode(text))
        except (TypeError, UnicodeEncodeError) as error:
            raise UserError(
                f"text {text!r:.60} cannot be tokenised: {error}; expected valid Unicode"
            ) from error

    def _encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; control tokens are left out unless asked for, incomplete UTF-8 becomes U+FFFD."""
        decoder = StreamDecoder(self, skip_special)
        return "".join(decoder.push(int(number)) for number in ids) + decoder.finish()

    def token_bytes(self, number: int, skip_special: bool = True) -> bytes:
        """UTF-8 bytes of one token; b"" for ids without a token (padded vocabulary rows)."""
        added = self._added.get(number)
        if added is not None:
            return b"" if added.special and skip_special else added.content.encode()
        token = self._library.id_to_token(number)
        return bytes(self._bytes[char] for char in token) if token is not None else b""

    def max_text_id(self) -> int:
        """The largest id that a model must have an embedding for (slot tokens are never looked up)."""
        return max(number for token, number in self._library.get_vocab().items() if token not in SLOT_TOKENS)


class StreamDecoder:
    """Decodes a growing sequence: `push` returns only complete characters, `finish` what is left."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, number: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(number, self._skip))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def bind_token_ids(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The configuration with the tokenizer's ids.

    Raises UserError when the tokenizer does not belong to the model: another id for a slot token, or more ids
    than the model has embedding rows.
    """
    for name in ("image", "video"):
        known, found = getattr(config, f"{name}_token_id"), getattr(tokenizer, f"{name}_id")
        if known is not None and known != found:
            raise UserError(
                f"{tokenizer.source}: <{name}> is token {found}, but the model's config says {known}; "
                "use the tokenizer that belongs to these weights"
            )
    if tokenizer.max_text_id() >= config.text.vocab_size:
        raise UserError(
            f"{tokenizer.source}: ids go up to {tokenizer.max_text_id()}, but the model has "
            f"{config.text.vocab_size} embedding rows; use the tokenizer that belongs to these weights"
        )
    return dataclasses.replace(
        config,
        image_token_id=tokenizer.image_id,
        video_token_id=tokenizer.video_id,
        eos_token_ids=tokenizer.eos_ids,
        pad_token_id=tokenizer.pad_id,
    )


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); download or write it again") from error


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, the alphabet of byte-level BPE vocabularies."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _qwen2_from_parts(vocabulary: pathlib.Path, merges: pathlib.Path) -> str:
    """Qwen2's tokenizer.json from its parts; added tokens from tokenizer_config.json, else the three."""
    try:
        library = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{vocabulary}: cannot be read as a BPE vocabulary ({error})") from error
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    settings = vocabulary.parent / "tokenizer_config.json"
    try:
        listed = json.loads(_read(settings)).get("added_tokens_decoder", {}) if settings.is_file() else {}
        listed = sorted((int(number), token) for number, token in listed.items())
    except (ValueError, AttributeError) as error:
        raise UserError(f"{settings}: not a tokenizer's settings ({error}); download it again") from error
    for number, token in listed:
        library.add_tokens([AddedToken(token["content"], special=token["special"], normalized=False)])
        if library.token_to_id(token["content"]) != number:
            raise UserError(
                f"{settings}: {token['content']} is token {number} there, which leaves a gap in the ids"
            )
    if not listed:
        library.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS]
        )
    return library.to_str()
