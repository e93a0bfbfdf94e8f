"""Append-only JSON lines that survive a kill: whole lines only, one writer, a torn last line is dropped."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mmrstraj_jax.errors import UserError


def read(path: Path, *, log: bool = True) -> list[dict[str, Any]]:
    """All rows. Raises UserError: unreadable, or a line that is no JSON object.

    Args:
      log: written by `append`: a last line without its line break was being written when the process died,
        and is left out. In a file that a user made (False) it is a row like any other.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a JSON Lines file") from None
    rows = []
    data = data[: data.rfind(b"\n") + 1] if log else data
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{path}: line {number} is not JSON; restore a copy or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is not a JSON object")
        rows.append(row)
    return rows


def dump(row: dict[str, Any]) -> str:
    """One line, its break included. Half an emoji (a lone surrogate) stays escaped: UTF-8 has no form
    for it."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(row)
    return text + "\n"


def append(file: IO[bytes], row: dict[str, Any]) -> None:
    """Writes one row and hands it to the operating system in one call."""
    file.write(dump(row).encode())
    file.flush()


@contextmanager
def writer(path: Path) -> Iterator[IO[bytes]]:
    """The file opened for `append`, its torn last line cut off. Raises UserError: another process
    writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path}: another process is writing it; wait for it or name another --out"
            ) from None
        except OSError as error:  # Lustre and NFS may be mounted without locks
            raise UserError(
                f"{path}: no file can be locked here ({error.strerror}); name a folder on another file system"
            ) from None
        data = path.read_bytes()
        if len(data) != (whole := data.rfind(b"\n") + 1):
            os.ftruncate(file.fileno(), whole)
        yield file
