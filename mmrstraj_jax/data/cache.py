"""Arrays that a later start maps instead of making them again. A cache is only a cache: faults cost time."""

import json
import logging
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

log = logging.getLogger(__name__)


def read(folder: str | os.PathLike | None, name: str) -> tuple[np.memmap, dict[str, Any]] | None:
    """(array, what was said of it), the array mapped read-only; None where it is missing or damaged."""
    if folder is None or not (notes := pathlib.Path(folder) / f"{name}.json").is_file():
        return None
    try:
        said = json.loads(notes.read_text(encoding="utf-8"))
        array = np.load(notes.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        if array.shape != tuple(said["shape"]) or str(array.dtype) != said["dtype"]:
            raise ValueError(f"shape {array.shape}, expected {said['shape']}")
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        log.warning("cache %s is damaged (%s); made again", notes.with_suffix(""), error)
        return None
    return array, said


def write(folder: str | os.PathLike | None, name: str, array: np.ndarray, said: dict[str, Any]) -> np.ndarray:
    """Keeps an array, and returns it mapped where that worked. The notes come last: they make it valid."""
    if folder is None:
        return array
    path = pathlib.Path(folder) / name
    said = said | {"shape": list(array.shape), "dtype": str(array.dtype)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as temporary:
            np.save(f"{temporary}/array.npy", array, allow_pickle=False)
            pathlib.Path(temporary, "notes").write_text(json.dumps(said), encoding="utf-8")
            os.replace(f"{temporary}/array.npy", path.with_suffix(".npy"))
            os.replace(f"{temporary}/notes", path.with_suffix(".json"))
    except OSError as error:
        log.warning("cache %s cannot be written (%s)", path, error)
        return array
    found = read(folder, name)
    return array if found is None else found[0]


def handle(array: np.ndarray) -> np.ndarray | str:
    """What to pickle: the file of a mapped array, so that worker processes share its pages."""
    return str(array.filename) if isinstance(array, np.memmap) else array


def reopen(handle: np.ndarray | str) -> np.ndarray:
    return np.load(handle, mmap_mode="r", allow_pickle=False) if isinstance(handle, str) else handle
