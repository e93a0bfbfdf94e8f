"""SHA-256 of every file of a checkpoint: Orbax and safetensors both restore a flipped bit without a word."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NAME = "manifest.json"


class Damaged(Exception):
    """A checkpoint is not what was written; the message says which file, and how."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(4) as pool:  # hashlib lets go of the interpreter
        return dict(zip(names, pool.map(_sha256, [folder / name for name in names]), strict=True))


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write(folder: Path, meta: Mapping[str, Any]) -> None:
    """Seals the folder: names and hashes of all its files, and `meta`, in manifest.json. Raises OSError."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    _write(folder, {"meta": dict(meta), "files": _hashes(folder, names)})


def rewrite(folder: Path, meta: Mapping[str, Any]) -> None:
    """Other `meta` for a sealed folder, whose files stay as they are. Raises OSError, Damaged."""
    _write(folder, _read(folder) | {"meta": dict(meta)})


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    temporary = folder / f"{NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content | {"sha256": _seal(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / NAME).read_bytes())
        seal = content.pop("sha256")
    except OSError as error:
        raise Damaged(f"{NAME}: {error.strerror}") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise Damaged(f"{NAME}: not what was written") from error
    if seal != _seal(content):
        raise Damaged(f"{NAME}: not what was written")
    return content


def read_meta(folder: Path) -> dict[str, Any]:
    """`meta` of a sealed folder, without reading the other files. Raises Damaged."""
    return _read(folder)["meta"]


def verify(folder: Path) -> dict[str, Any]:
    """`meta` of a folder whose files all have their hash.

    Raises Damaged: names the first file that is missing or changed.
    """
    content = _read(folder)
    try:
        found = _hashes(folder, sorted(content["files"]))
    except OSError as error:
        name = Path(error.filename).relative_to(folder) if error.filename else folder.name
        raise Damaged(f"{name}: {error.strerror}") from error
    for name, expected in content["files"].items():
        if found[name] != expected:
            raise Damaged(
                f"{name}: its SHA-256 is {found[name][:12]}, and {expected[:12]} when it was written"
            )
    return content["meta"]
