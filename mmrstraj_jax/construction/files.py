"""How the factory writes files: whole or not at all, the same content as the same bytes."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmrstraj_jax import jsonl
from mmrstraj_jax.errors import UserError


def write_atomic(path: Path, body: bytes) -> None:
    """Whole or not at all, also when killed. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # not mkstemp's 0600: others of a shared folder read what a build wrote, as the umask has it
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(body)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def lines_writer(path: Path) -> Iterator[Callable[[dict], object]]:
    """A function that takes rows of a JSON Lines file, which appears under its name when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        yield lambda row: file.write(jsonl.dump(row).encode())
    os.replace(temporary, path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON Lines file that another step wrote whole, one at a time. Raises UserError: damaged."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except ValueError:
                    raise UserError(f"{path}: line {number} is not JSON; build its step again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run the step that writes it first") from None


def sha256(path: Path) -> str:
    """Of a file's bytes. Raises UserError: unreadable."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a readable file") from None


def dump(value: Any) -> bytes:
    """Indented JSON. Half an emoji (a lone surrogate) has no UTF-8 form and stays escaped."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:
        return (json.dumps(value, indent=1) + "\n").encode()
