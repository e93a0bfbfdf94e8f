"""One run directory, one run: a lock file that names its owner and shows that it lives."""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path

from mmrstraj_jax.errors import UserError

NAME = "lock"
SIGN_OF_LIFE = 10.0  # seconds between two touches of the file
STALE = 60.0  # seconds without one, after which an owner on another machine counts as dead


class LockLost(Exception):
    """Another run took the directory over while this one was suspended."""


def _started(pid: int) -> str | None:
    """When a process of this machine began, in ticks since its boot; None: there is none of that number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _me() -> dict[str, str | int | None]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}


class RunLock:
    """Holds `<run_dir>/lock` from `with` to its end; the folder must exist.

    An owner that was killed is recognised: on this machine by its process number and start, on another one
    because it does not touch the file for STALE seconds, which are waited for. Ages are differences between
    two times of the file server, so that clocks need not agree.

    Raises UserError: another run holds it, or the file cannot be written.
    """

    def __init__(self, run_dir: Path):
        self.path = Path(run_dir) / NAME
        self._me = _me()
        self._done = threading.Event()

    def __enter__(self) -> "RunLock":
        for _ in range(3):
            try:
                with self.path.open("x", encoding="utf-8") as file:
                    json.dump(self._me, file)
            except FileExistsError:
                self._refuse_a_live_owner()
                stale = self.path.with_name(f"{NAME}.stale-{os.getpid()}")
                with contextlib.suppress(FileNotFoundError):  # somebody else was quicker
                    self.path.rename(stale)
                    stale.unlink()
                continue
            except OSError as error:
                raise UserError(
                    f"{self.path}: {error.strerror}; name a folder that can be written with --run-dir"
                ) from error
            threading.Thread(target=self._touch, name="lock", daemon=True).start()
            return self
        raise UserError(f"{self.path}: other runs keep taking it; wait for them, or name another --run-dir")

    def __exit__(self, *_) -> None:
        self._done.set()
        if self._owner() == self._me:
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a run that never began leaves no empty folder
                self.path.parent.rmdir()

    def check(self) -> None:
        """Raises LockLost when another run took over."""
        if (owner := self._owner()) != self._me:
            raise LockLost(
                f"{self.path}: {_describe(owner)} took over while this one was suspended; it saves nothing"
            )

    def _owner(self) -> dict | None:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _refuse_a_live_owner(self) -> None:
        owner = self._owner() or {}
        if owner.get("host") == self._me["host"] and self._me["started"] is not None:
            if owner.get("started") == _started(owner["pid"]):
                raise UserError(
                    f"{self.path.parent}: {_describe(owner)} is running here; wait for it, stop it, "
                    "or name another --run-dir"
                )
            return
        last = self._touched()
        while self._age() < STALE:
            time.sleep(1.0)
            if self._touched() != last:
                raise UserError(
                    f"{self.path.parent}: {_describe(owner)} is running here; wait for it, stop it, "
                    "or name another --run-dir"
                )

    def _touched(self) -> float | None:
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return None

    def _age(self) -> float:
        """Seconds since the owner's last touch, by the clock of the file server."""
        probe = self.path.with_name(f"{NAME}.probe-{os.getpid()}")
        try:
            probe.touch()
            touched = self._touched()
            return STALE if touched is None else probe.stat().st_mtime - touched
        finally:
            probe.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._done.wait(SIGN_OF_LIFE):
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                if self._owner() == self._me:
                    os.utime(self.path)


def _describe(owner: dict | None) -> str:
    owner = owner or {}
    return f"another run (process {owner.get('pid', '?')} on {owner.get('host', '?')})"
