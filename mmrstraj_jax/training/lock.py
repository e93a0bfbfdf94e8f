"""One run directory, one run: a lock file that names its owner and shows that it lives."""

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
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


def _machine() -> str | None:
    """This boot of this machine, and which process numbers count here (those of a container do not)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _me() -> dict[str, str | int | None]:
    started = _started(os.getpid())
    return {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "started": started}


class RunLock:
    """Holds `<run_dir>/lock` from `with` to its end; the folder must exist.

    An owner that was killed is recognised: on this machine by its process number and start, on another one
    because it does not touch the file for STALE seconds, which are watched: no clock has to be right, neither
    ours nor the file server's. Of several that find the same dead owner one takes over.

    Raises UserError: another run holds it, or the file cannot be written.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None] = print):
        self.path, self._say = Path(run_dir) / NAME, say
        self._me = _me()
        self._done = threading.Event()

    def __enter__(self) -> "RunLock":
        for _ in range(3):
            try:
                taken = self._take(self._dead_owner())
            except OSError as error:
                raise UserError(
                    f"{self.path}: {error.strerror}; name a folder that can be written with --run-dir"
                ) from error
            if taken and self._owner() == self._me:
                threading.Thread(target=self._touch, name="lock", daemon=True).start()
                return self
            time.sleep(1.0)  # who takes it needs less
        raise UserError(
            f"{self.path}: other runs keep taking it; wait for them, or name another --run-dir. If there are "
            f"none, delete it and {self.path}.taken-*"
        )

    def _take(self, dead: str | None) -> bool:
        """Writes the file in the place of what it was; False: somebody else was quicker."""
        if dead is None:
            try:
                with self.path.open("x", encoding="utf-8") as file:
                    json.dump(self._me, file)
            except FileExistsError:
                return False
            return True
        # Whoever makes this file may follow this dead owner; so nobody replaces what he did not judge
        turn = self.path.with_name(f"{NAME}.taken-{hashlib.sha256(dead.encode()).hexdigest()[:16]}")
        try:
            turn.open("x").close()
        except FileExistsError:
            return False
        try:
            if self._content() != dead:
                return False
            mine = self.path.with_name(f"{NAME}.new-{os.getpid()}")
            mine.write_text(json.dumps(self._me), encoding="utf-8")
            mine.replace(self.path)
            return True
        finally:
            turn.unlink(missing_ok=True)

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

    def _content(self) -> str | None:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def _owner(self) -> dict | None:
        try:
            return _parse(self._content())
        except OSError:
            return None

    def _dead_owner(self) -> str | None:
        """What the file says, once its owner is known to be dead; None: there is no file."""
        content, last = self._content(), self._touched()
        if content is None or last is None:
            return None
        owner = _parse(content) or {}
        alive = UserError(
            f"{self.path.parent}: {_describe(owner)} is running here; wait for it, stop it, "
            "or name another --run-dir"
        )
        here = all(owner.get(key) == self._me[key] is not None for key in ("host", "machine"))
        if here and isinstance(owner.get("pid"), int):
            if owner.get("started") == _started(owner["pid"]):
                raise alive
            return content
        self._say(
            f"{self.path}: left by {_describe(owner)}, perhaps still alive; watching it for {STALE:g} s"
        )
        end = time.monotonic() + STALE
        while time.monotonic() < end:
            time.sleep(min(1.0, STALE / 3))
            if (now := self._touched()) is None:
                return None
            if now != last:
                raise alive
        return content

    def _touched(self) -> float | None:
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return None

    def _touch(self) -> None:
        while not self._done.wait(SIGN_OF_LIFE):
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                if self._owner() == self._me:
                    os.utime(self.path)


def _parse(content: str | None) -> dict | None:
    try:
        owner = json.loads(content or "")
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None


def _describe(owner: dict | None) -> str:
    owner = owner or {}
    return f"another run (process {owner.get('pid', '?')} on {owner.get('host', '?')})"
