"""One question to a language model: what shapes its answer, the form the answer must have, strict parsing.

Names, captions and other foreign text go into a prompt as JSON data, called data there; the schema then
bounds what an instruction hidden in them could do.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrstraj_jax.errors import UserError

_REPAIR = (
    "Your last reply was not usable: {problem} Reply again with one JSON object in the form that was asked "
    "for, and nothing else."
)
# An answer becomes a turn of a conversation: it must not open an image slot or end the turn.
_CONTROL = re.compile(r"<\|[^<>|]{1,40}\|>|<(?:image|video)>")


@dataclass(frozen=True)
class Text:
    """A text field of an answer."""

    max_chars: int = 4000
    min_chars: int = 1
    choices: tuple[str, ...] = ()

    def problem(self, value: Any) -> str:
        """What is wrong with the value, or ""."""
        if not isinstance(value, str):
            return f"a {type(value).__name__}, expected a string"
        if self.choices and value not in self.choices:
            return f"not one of {', '.join(self.choices)}"
        if not self.min_chars <= len(value.strip()) <= self.max_chars:
            return f"{len(value.strip())} characters, expected {self.min_chars} to {self.max_chars}"
        if _CONTROL.search(value):
            return "a control word of the chat format, expected plain text"
        try:
            value.encode()
        except UnicodeEncodeError:
            # neither a training file nor the next call could hold it
            return "half an emoji (a lone surrogate), expected plain text"
        return ""


@dataclass(frozen=True)
class ImageFile:
    """A PNG or JPEG that is read when it is sent: a run over thousands of images holds a few."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "ImageFile":
        """Raises UserError: unreadable, or neither PNG nor JPEG."""
        try:
            body = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; expected an image") from None
        if not body.startswith((b"\x89PNG", b"\xff\xd8\xff")):
            raise UserError(f"{path}: expected a PNG or JPEG image")
        return cls(path, hashlib.sha256(body).hexdigest())

    def url(self) -> str:
        """The image as a base64 data URL. Raises UserError: it changed under the run."""
        body = self.path.read_bytes()
        if hashlib.sha256(body).hexdigest() != self.sha256:
            raise UserError(f"{self.path}: changed while the run was reading it; start again")
        kind = "png" if body.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(body).decode()}"


def _anything(values: dict[str, str]) -> str:
    return ""


@dataclass(frozen=True)
class Request:
    """One question to a model."""

    version: str  # of the prompt's wording
    system: str
    prompt: str  # rendered
    schema: Mapping[str, Text] = field(default_factory=lambda: {"answer": Text()})
    image: ImageFile | None = None
    max_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 0
    extra: str = ""  # JSON object that the call's body gets besides, such as vLLM's chat_template_kwargs
    # what is wrong with an answer of the right form, or ""; a function of version and prompt alone
    check: Callable[[dict[str, str]], str] = field(default=_anything, compare=False)
    repair: tuple[str, str] | None = None  # the unusable reply and what was wrong with it

    def key(self, model: str) -> str:
        """SHA-256 of model, prompt version, rendered prompt, image, sampling and extra body."""
        image = None if self.image is None else self.image.sha256
        sampling = [self.max_tokens, self.temperature, self.top_p, self.seed]
        parts = [model, self.version, self.system, self.prompt, image, sampling, self.repair]
        # only where there is one: logs from before it stay good
        parts += [self.extra] if self.extra else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def messages(self) -> list[dict[str, Any]]:
        """In the form of the chat completions interface; images as base64. Raises UserError: the image."""
        content: Any = self.prompt
        if self.image is not None:
            content = [
                {"type": "image_url", "image_url": {"url": self.image.url()}},
                {"type": "text", "text": self.prompt},
            ]
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": content}]
        if self.repair is not None:
            reply, problem = self.repair
            messages.append({"role": "assistant", "content": reply})
            messages.append({"role": "user", "content": _REPAIR.replace("{problem}", problem)})
        return messages

    def read(self, reply: str, finish: str = "stop") -> tuple[dict[str, str] | None, str]:
        """(values, "") of a usable reply, else (None, why)."""
        if finish == "content_filter":
            return None, "the server's content filter withheld it."
        if finish == "length":
            return None, f"it was cut off after {self.max_tokens} tokens; be shorter."
        values, why = parse(reply, self.schema)
        if values is not None and (found := self.check(values)):
            return None, found
        return values, why

    def tokens(self, image_tokens: int) -> tuple[int, int]:
        """(typical, most) prompt tokens. Byte-level tokenisers never make more tokens than bytes."""
        texts = [self.system, self.prompt, *(self.repair or ())]
        count = sum(len(text.encode()) for text in texts)
        image = image_tokens if self.image is not None else 0
        return math.ceil(count / 4) + 16 + image, count + 256 + image


def _value(text: str) -> Any:
    """The JSON value of a text, in a code fence or bare; None where it is not JSON."""
    text = text.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, flags=re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else text)
    except ValueError:
        return None


def parse(reply: str, schema: Mapping[str, Text]) -> tuple[dict[str, str] | None, str]:
    """(values, "") of a reply that is one JSON object with exactly the schema's fields, else (None, why).

    A code fence around it and a reasoning model's thought before it, up to </think>, are tolerated, nothing
    else. The thought need not begin with <think>: some chat templates open it in the prompt.
    """
    try:
        value = _value(reply)
        if value is None:
            value = _value(reply.partition("</think>")[2])
    except RecursionError:
        value = None
    if value is None:
        return None, "it was not one JSON object."
    if not isinstance(value, dict) or set(value) != set(schema):
        return None, f"it must be a JSON object with exactly the fields {', '.join(schema)}."
    problems = [f"{name}: {found}." for name, rule in schema.items() if (found := rule.problem(value[name]))]
    return (None, " ".join(problems)) if problems else ({name: value[name].strip() for name in schema}, "")
