"""Compiled programs kept on disk. The cache may be damaged, full or deleted: then programs are compiled."""

import hashlib
import platform
from collections.abc import Callable
from pathlib import Path

import jax


def folder_of(root: str | Path) -> Path:
    """The part of a cache that fits this process: by platform, versions and CPU features.

    Programs for a CPU hold instructions of the CPU they were compiled on, and JAX's own key does not name it.
    """
    backend = jax.default_backend()
    parts = [jax.__version__, jax.lib.__version__, platform.machine(), jax.devices()[0].device_kind]
    if backend == "cpu":
        parts.append(_cpu_features())
    return Path(root).expanduser() / f"{backend}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:16]}"


def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def use(root: str | Path, say: Callable[[str], None]) -> None:
    """Keeps compiled programs below root, which is made where it is missing; every trouble is a warning."""
    folder = folder_of(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        say(f"WARNING: compilation cache {folder} is switched off: {error.strerror or error}")
        return
    # An entry that cannot be read is a Python warning and a recompilation
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.config.update("jax_raise_persistent_cache_errors", False)
