"""A step's folder and its manifest.json: what went in, with which settings, what was dropped, what came out.

The manifest makes a second call do nothing, and refuses a call with other settings or changed inputs instead
of mixing two builds in one folder. It holds no time, host or key: the same inputs give the same bytes.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmrstraj_jax import settings
from mmrstraj_jax.construction.files import dump, sha256, write_atomic
from mmrstraj_jax.errors import UserError

NAME = "manifest.json"


def digest(path: Path) -> dict[str, Any]:
    """{"files", "sha256"} of a file, or of all files below a folder with their names. Raises UserError."""
    if path.is_file():
        return {"files": 1, "sha256": sha256(path)}
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    listing = [[file.relative_to(path).as_posix(), sha256(file)] for file in files]
    return {"files": len(files), "sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest()}


class Step:
    """One step of a build.

    with Step(folder, "imagery", settings, inputs) as step:
        if step.done:
            return
        ...                     # writes into step.folder
        step.finish(counts, outputs)
    """

    def __init__(
        self, folder: Path, name: str, config: Any, inputs: Mapping[str, Path], option: str = "--out"
    ):
        """
        Args:
          config: the step's settings, a frozen dataclass. Fields with the metadata {"run": True} (addresses,
            concurrency, limits of cost) do not shape the output and are not recorded.
          inputs: files and folders by name; those inside the build's own folder are written relative to it.
          option: of the command, that names the folder.
        """
        self.folder, self.name = folder, name
        self.done = False
        self._config, self._option = config, option
        self._inputs = dict(inputs)

    def __enter__(self) -> "Step":
        """Raises UserError: another process builds here, or the folder belongs to another build."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("ab")
        except OSError as error:
            raise UserError(
                f"{self.folder}: {error.strerror}; expected a folder that can be written"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if isinstance(error, BlockingIOError):
                why = f"another process is building here; wait or name another {self._option}"
            else:  # Lustre and NFS may be mounted without
                why = f"no file can be locked here ({error.strerror}); name a folder on another file system"
            raise UserError(f"{self.folder}: {why}") from None
        try:
            self._compare()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._lock.close()

    def _compare(self) -> None:
        given = {"step": self.name, "settings": recorded(self._config)}
        given["inputs"] = {name: self._input(path) for name, path in sorted(self._inputs.items())}
        self._given = given
        path = self.folder / NAME
        if not path.exists():
            # a preview leaves its log of calls, which the build goes on with
            own = (".lock", "calls.jsonl")
            names = [file.name for file in self.folder.iterdir()]
            # and a kill in the midst of the write below, write_atomic's temporary file
            strangers = [name for name in names if name not in own and not name.startswith(f".{NAME}.")]
            if strangers:
                raise UserError(
                    f"{self.folder}: holds {min(strangers)} but no {NAME}; expected a new or empty folder"
                )
            write_atomic(path, dump(given | {"status": "unfinished"}))
            return
        found = load(path)
        defaults = dict(_leaves(recorded(type(self._config)()), ""))
        changes = list(_changes(found, given, defaults))
        if changes:
            paid = (self.folder / "calls.jsonl").exists()
            but = " but its calls.jsonl: what is paid is used again" if paid else ""
            raise UserError(
                f"{path}: was built differently ({'; '.join(changes)}); name another {self._option}, repeat "
                f"the old settings, or remove what is in {self.folder}{but}"
            )
        if found.get("status") == "finished":
            for name, known in found["outputs"].items():
                if not (self.folder / name).is_file() or sha256(self.folder / name) != known:
                    raise UserError(
                        f"{self.folder / name}: missing or changed since the step finished; remove "
                        f"{self.folder} to build it again"
                    )
            self.done = True

    def _input(self, path: Path) -> dict[str, Any]:
        home, here = self.folder.parent.absolute(), path.absolute()
        shown = here.relative_to(home).as_posix() if here.is_relative_to(home) else str(path)
        return {"path": shown} | digest(path)

    def finish(self, counts: Mapping[str, Any], outputs: list[Path]) -> None:
        """Writes the final manifest; the outputs must be complete."""
        files = {path.relative_to(self.folder).as_posix(): sha256(path) for path in sorted(outputs)}
        write_atomic(
            self.folder / NAME, dump(self._given | {"status": "finished", "counts": counts, "outputs": files})
        )
        self.done = True


def load(path: Path) -> dict[str, Any]:
    """A manifest. Raises UserError: missing or not one."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; run the step before this one first") from None
    except ValueError:
        value = None
    if not isinstance(value, dict) or not {"step", "settings", "inputs", "status"} <= value.keys():
        raise UserError(f"{path}: not a manifest of the build command; restore it or remove its folder")
    return value


def finished(folder: Path, step: str, **inputs: Path) -> dict[str, Any]:
    """The manifest of a step that another one builds on.

    Raises UserError: missing, unfinished, or not made from these `inputs`: a step before it was built again.
    """
    found = load(folder / NAME)
    if found["step"] != step or found["status"] != "finished":
        raise UserError(f"{folder}: step {found['step']} is {found['status']}; finish {step} first")
    for name, path in inputs.items():
        if found["inputs"].get(name, {}).get("sha256") != sha256(path):
            raise UserError(f"{folder}: was made from another {path}; remove {folder} and run {step} again")
    return found


def recorded(config: Any) -> dict[str, Any]:
    """The settings that shape the output, as plain JSON."""
    kept = settings.to_dict(config)
    for field in type(config).__dataclass_fields__.values():
        if field.metadata.get("run"):
            del kept[field.name]
    return kept


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _changes(found: dict, given: dict, defaults: dict[str, Any]) -> Iterator[str]:
    if found["step"] != given["step"]:
        yield f"step: {found['step']} -> {given['step']}"
    old, new = dict(_leaves(found["settings"], "")), dict(_leaves(given["settings"], ""))
    # a setting that is younger than the manifest had no other value than its default
    old = {name: defaults[name] for name in new.keys() & defaults.keys()} | old
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"{name}: {old.get(name)} -> {new.get(name)}"
    for name in sorted(found["inputs"].keys() | given["inputs"].keys()):
        before, now = (value["inputs"].get(name, {}).get("sha256") for value in (found, given))
        if before != now:
            yield f"input {name}: {'changed' if before and now else 'new' if now else 'gone'}"
