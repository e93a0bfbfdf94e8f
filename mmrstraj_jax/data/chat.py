"""Text in and out: the tokenizer, the ChatML template and the label masks.

Training layout and masks are those of LLaVA-NeXT `preprocess_qwen` and `preprocess_multimodal`
(llava/train/train.py): every turn is tokenised as one string between its control tokens, the system line is
always "You are a helpful assistant.", and generation uses the same. Control tokens are found by name, never
by number (`<image>` is 151646 with Qwen2 and 151665 with Qwen2.5), and never read from user text: a typed
"<|im_end|>" becomes ordinary text tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from mmrstraj_jax.data.tokenizer import StreamDecoder, Tokenizer, bind_token_ids
from mmrstraj_jax.errors import UserError

__all__ = [
    "IGNORE",
    "SYSTEM_MESSAGE",
    "Encoded",
    "StreamDecoder",
    "Tokenizer",
    "bind_token_ids",
    "clean_up",
    "encode",
    "encode_spans",
    "labels_of",
    "normalise_role",
    "prompt",
]

IGNORE = -100
SYSTEM_MESSAGE = "You are a helpful assistant."
IMAGE, VIDEO = "<image>", "<video>"
# Words that stand for the visual input, by kind of row. Video rows of the public sets say "<image>" too.
SLOT_WORDS = {"text": (), "image": (IMAGE,), "video": (IMAGE, VIDEO)}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Encoded(NamedTuple):
    """One conversation, one id (`image_id`) per visual slot."""

    ids: Int[np.ndarray, " n"]
    assistant: Bool[np.ndarray, " n"]  # whole assistant turns, header and trailing newline included
    answer: Bool[np.ndarray, " n"]  # answers and their <|im_end|> only


def normalise_role(name: object) -> str | None:
    """ "user" or "assistant" for the role names in use, None for any other."""
    return _ROLES.get(name) if isinstance(name, str) else None


def turns_of(conversation: Sequence[Mapping]) -> list[tuple[str, str]]:
    """(role, text) of each turn; a first turn that is not the human's is dropped, as in preprocess_qwen.

    Raises UserError for a turn that is neither {"from", "value"} nor {"role", "content"}.
    """
    turns = []
    for number, turn in enumerate(conversation):
        role = normalise_role(turn.get("from", turn.get("role")))
        text = turn.get("value", turn.get("content"))
        if role is None or not isinstance(text, str):
            raise UserError(
                f'turn {number}: expected {{"from": "human" or "gpt", "value": text}}, found {turn!r:.80}'
            )
        turns.append((role, text))
    return turns[1:] if turns and turns[0][0] != "user" else turns


def clean_up(text: str, words: Sequence[str] = (IMAGE,)) -> str:
    """preprocess_multimodal: a single slot that is not in front moves to the front, on a line of its own."""
    found = re.findall("|".join(map(re.escape, words)), text) if words else []
    if len(found) != 1 or text.startswith(found[0]):
        return text
    return f"{found[0]}\n{text.replace(found[0], '').strip()}".strip()


def _turn(role: str, text: str, tokenizer: Tokenizer, words: Sequence[str]) -> list[int]:
    """Ids of one turn. Role and text are one string to the tokenizer, as in the reference."""
    body = f"{role}\n{text}"
    pieces = re.split("|".join(map(re.escape, words)), body) if words else [body]
    ids = [tokenizer.im_start]
    for number, piece in enumerate(pieces):
        if number:
            ids.append(tokenizer.image_id)
        ids += tokenizer.encode(piece)
    return [*ids, tokenizer.im_end, tokenizer.newline_id]


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count


def encode_spans(conversation: Sequence[Mapping], tokenizer: Tokenizer, kind: str = "image") -> Encoded:
    """Token ids of a training conversation and what each of them belongs to.

    Args:
      conversation: turns {"from": human | gpt, "value"} (or role / content).
      kind: "image", "video" or "text"; in a text row "<image>" is ordinary text, as in the reference.
    """
    words = SLOT_WORDS[kind]
    ids = _turn("system", SYSTEM_MESSAGE, tokenizer, ())
    assistant, answer = [False] * len(ids), [False] * len(ids)
    header = tokenizer.encode("assistant\n")
    for role, text in turns_of(conversation):
        # Slots are the human's: an answer that spells "<image>" is text, it cannot open a slot.
        turn = _turn(role, clean_up(text, words), tokenizer, words if role == "user" else ())
        ids += turn
        is_assistant = role == "assistant"
        assistant += [is_assistant] * len(turn)
        # An answer that starts with a newline merges with the header's: the merged token is the answer's.
        begin = 1 + _common_prefix(header, turn[1:]) if is_assistant else len(turn)
        answer += [is_assistant and begin <= at < len(turn) - 1 for at in range(len(turn))]
    return Encoded(np.asarray(ids, np.int32), np.asarray(assistant), np.asarray(answer))


def labels_of(encoded: Encoded, tokenizer: Tokenizer, mask: str) -> Int[np.ndarray, " n"]:
    """Label of every token, IGNORE where unsupervised.

    "original": whole assistant turns, and every <|im_start|>, <|im_end|> and newline token wherever it
    stands. "clean": answers and their <|im_end|>.
    """
    assert mask in ("original", "clean"), mask
    if mask == "clean":
        supervised = encoded.answer
    else:
        separators = [tokenizer.newline_id, tokenizer.im_start, tokenizer.im_end]
        supervised = encoded.assistant | (encoded.ids[:, None] == separators).any(1)
    return np.where(supervised, encoded.ids, IGNORE).astype(np.int32)


def encode(
    conversation: Sequence[Mapping], tokenizer: Tokenizer, mask: str = "original", kind: str = "image"
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """(input_ids with one `image_id` per slot, labels) of a conversation; see encode_spans, labels_of."""
    encoded = encode_spans(conversation, tokenizer, kind)
    return encoded.ids, labels_of(encoded, tokenizer, mask)


def prompt(messages: Sequence[Mapping], tokenizer: Tokenizer) -> Int[np.ndarray, " n"]:
    """Ids of a prompt for generation, in the training layout, ending with "<|im_start|>assistant\\n".

    Args:
      messages: {"role": system | user | assistant, "content"}. Content is a string, in which "<image>" is a
        slot (moved to the front when it is the only one), or a list of {"type": "image"}, {"type": "video"}
        and {"type": "text", "text"} parts: slots come first, and "<image>" in a text part is ordinary text. A
        first system message replaces the default one.
    Raises:
      UserError: unknown role or content, or the last message is not the user's.
    """
    messages = list(messages)
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f'message {number}: expected {{"role", "content"}}, found {message!r:.60}')
    first, system = 0, SYSTEM_MESSAGE
    if messages and messages[0].get("role") == "system":
        first, system = 1, messages.pop(0).get("content")
    if not messages or normalise_role(messages[-1].get("role")) != "user":
        raise UserError("the last message is not the user's: there is nothing to answer")
    if isinstance(system, str):
        ids = _turn("system", system, tokenizer, ())
    else:
        ids = _parts_turn("system", system, tokenizer, 0)
    for number, message in enumerate(messages, first):
        role, content = normalise_role(message.get("role")), message.get("content")
        if role is None:
            raise UserError(f"message {number}: role {message.get('role')!r}, expected user or assistant")
        if isinstance(content, str):
            words = SLOT_WORDS["video"] if role == "user" else ()
            ids += _turn(role, clean_up(content, words), tokenizer, words)
        else:
            ids += _parts_turn(role, content, tokenizer, number)
    return np.asarray([*ids, tokenizer.im_start, *tokenizer.encode("assistant\n")], np.int32)


def _parts_turn(role: str, parts: object, tokenizer: Tokenizer, number: int) -> list[int]:
    """A turn given as typed parts. HF's template: all slots, a newline, then the text."""
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise UserError(f"message {number}: content is neither text nor a list of parts")
    slots, texts = 0, []
    for part in parts:
        if part.get("type") in ("image", "video") and role == "user":
            slots += 1
        elif part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise UserError(
                f'message {number}: part {part.get("type")!r}, expected "text", or "image" from the user'
            )
    text = "\n".join(texts)
    if not slots:
        return _turn(role, text, tokenizer, ())
    head = [tokenizer.im_start, *tokenizer.encode(f"{role}\n"), *[tokenizer.image_id] * slots]
    return [*head, *(tokenizer.encode(f"\n{text}") if text else []), tokenizer.im_end, tokenizer.newline_id]
