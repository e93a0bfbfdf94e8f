"""Environment variables that a run would trip over, found before JAX is imported.

An XLA flag that this XLA does not know aborts the process, without a Python error. So flags are tried in a
child process first; unknown ones are left out with a warning. Imports the standard library only.

    python -m mmrstraj_jax.environment FLAG...    prints the flags that are known, warnings on stderr
"""

import difflib
import importlib.util
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path

from mmrstraj_jax.errors import UserError

OURS = ("MMRSTRAJ_CACHE",)
# Settings of the XLA client and of JAX's start-up that jax.config does not list
OTHERS = (
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "JAX_COORDINATOR_ADDRESS",
    "JAX_COORDINATOR_PORT",
    "JAX_COORDINATOR_BIND_ADDRESS",
)
HARMLESS = ("--xla_force_host_platform_device_count",)  # known to every version: needs no child process
SECONDS = 600  # for a child process to import JAX, on a file system that many nodes ask at once


def check(environ: MutableMapping[str, str], say: Callable[[str], None]) -> None:
    """Takes unknown flags out of XLA_FLAGS and warns of names that look mistyped. Call before importing JAX.

    Raises UserError: an unknown MMRSTRAJ_ variable, or flags that JAX cannot start with for another reason.
    """
    for name in sorted(environ):
        if name.startswith("MMRSTRAJ_") and name not in OURS:
            raise UserError(f"{name}: no such variable; expected {' or '.join(OURS)}")
    flags = environ.get("XLA_FLAGS", "").split()
    if any(flag.partition("=")[0] not in HARMLESS for flag in flags):
        kept, warnings = known_flags(flags)
        environ["XLA_FLAGS"] = " ".join(kept)
        for warning in warnings:
            say(f"WARNING: {warning}")
    suspects = [name for name in sorted(environ) if name.startswith(("JAX_", "XLA_")) and name not in OTHERS]
    if suspects:
        import jax

        names = [name.upper() for name in jax.config.values] + list(OTHERS)
        for name in suspects:
            if name not in names and (near := difflib.get_close_matches(name, names, 1, 0.85)):
                say(f"WARNING: {name}: JAX has no such setting; did you mean {near[0]}?")


def known_flags(flags: list[str]) -> tuple[list[str], list[str]]:
    """(flags that this XLA accepts, a warning for each other one).

    Raises UserError: JAX does not start for another reason, a value that a flag cannot have for example.
    """
    warnings: list[str] = []
    while flags:
        # On the CPU: the flags are the same ones, and no accelerator is held
        try:
            child = subprocess.run(
                [sys.executable, "-c", "import jax; jax.devices()"],
                env=os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"XLA_FLAGS {' '.join(flags)}: JAX did not start with them within {SECONDS} s in "
                f"{sys.executable}; put Python on a faster disk, or unset them"
            ) from error
        if child.returncode == 0:
            break
        found = re.search(r"Unknown flags? in XLA_FLAGS:(.*)", child.stderr)
        unknown = [flag for flag in flags if found and flag in found[1].split()]
        if not unknown:
            lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
            # XLA says why first, and then lists all its flags; Python says it last
            why = lines[-1 if "Traceback (most recent call last):" in lines else 0]
            raise UserError(
                f"XLA_FLAGS {' '.join(flags)}: JAX does not start with them in {sys.executable}: {why:.200}"
            )
        flags = [flag for flag in flags if flag not in unknown]
        warnings += [f"XLA_FLAGS: {flag} is left out: {_suggestion(flag)}" for flag in unknown]
    return flags, warnings


def _suggestion(flag: str) -> str:
    name = flag.partition("=")[0].removeprefix("--")
    near = difflib.get_close_matches(name, _names_in_library(), 1, 0.8)
    return f"this XLA has no such flag{f'; did you mean --{near[0]}?' if near else ''}"


def _names_in_library() -> list[str]:
    """Every word in jaxlib's libraries that looks like a flag: XLA has no list to ask for."""
    spec = importlib.util.find_spec("jaxlib")
    names: set[bytes] = set()
    for path in Path(spec.submodule_search_locations[0]).glob("*.so"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            names.update(re.findall(rb"\0(xla_[a-z0-9_]{4,80})\0", data))
    return sorted(name.decode() for name in names)


def main(flags: list[str]) -> int:
    """Prints the known ones of these flags on one line."""
    kept, warnings = known_flags(flags)
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    print(" ".join(kept))
    return 0


if __name__ == "__main__":
    from mmrstraj_jax.errors import run_command

    run_command(main)
