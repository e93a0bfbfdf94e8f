"""A thread that ends this process, with one line, when it or another one can no longer go on.

A collective waits for ever for a process that is dead or stuck, and the runtime's own heartbeat says neither
which one it was nor notices one that is alive and stuck. Each process publishes a sign of life and how far
its main thread is; the first one judges and publishes the verdict. A beat is a point that every process
passes in the same order.
"""

import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

EXIT_PEER = 69  # EX_UNAVAILABLE: another process is dead or stuck; what is saved is good, a restart goes on
KEYS = "mmrstraj/alive/"
VERDICT = "mmrstraj/verdict"
LEFT = "mmrstraj/left/"
GOES_ON = "; finished checkpoints are good, the same command goes on"


class Watchdog:
    """Watches from `start` to `stop`.

    Args:
        client: of the coordination service; None: this process is alone.
        index, count: of this process.
        heartbeat: seconds without a sign of life after which a process counts as dead.
        step_timeout: seconds without a beat after which the run counts as stuck, once `arm` was called.
    """

    def __init__(self, client: Any, index: int, count: int, heartbeat: float, step_timeout: float):
        self._client, self._index, self._count = client, index, count
        self._heartbeat, self._step_timeout = heartbeat, step_timeout
        self._name = f"process {index} ({socket.gethostname()}, pid {os.getpid()})"
        self._beats, self._doing, self._since = 0, "starting", time.monotonic()
        self._armed = self._stalled = False
        self._num_silent = 0
        self._contact = time.monotonic()
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}
        self._done, self._ending = threading.Event(), threading.Lock()
        self._period = min(1.0, heartbeat / 5)

    def start(self) -> None:
        threading.Thread(target=self._judge, name="watchdog", daemon=True).start()
        if self._client is not None:
            self._announce_aborts()
            threading.Thread(target=self._talk, name="peers", daemon=True).start()

    def stop(self) -> None:
        self._done.set()

    def arm(self) -> None:
        """From here on a main thread without a beat is stuck."""
        self._armed = True

    def beat(self, doing: str) -> None:
        """The main thread begins something; all processes call this in the same order."""
        self._beats, self._doing, self._since = self._beats + 1, doing, time.monotonic()

    def tell(self, line: str, code: int) -> None:
        """Ends all the others with this line and exit code; the first verdict stands."""
        if self._client is not None:
            try:
                self._client.key_value_set(VERDICT, json.dumps({"line": line, "code": code}))
            except Exception:  # a verdict is there already, or there is nobody left to tell
                return
            self._leave()

    def wait_for_verdict(self) -> None:
        """After a collective failed: gives the watchdog the time it needs to say why. May not return."""
        if self._client is not None:
            time.sleep(self._heartbeat + 5 * self._period)

    def _leave(self) -> None:
        """This process has read the verdict. The first one, in which the service lives, goes last."""
        self._client.key_value_set(f"{LEFT}{self._index}", "", allow_overwrite=True)
        end = time.monotonic() + self._heartbeat / 2
        while self._index == 0 and time.monotonic() < end:
            if len(self._client.key_value_dir_get(LEFT)) >= self._count - self._num_silent:
                return
            time.sleep(self._period / 2)

    # ---- threads ----

    def _talk(self) -> None:
        """Every call can hang with the first process, so nothing is judged here but what was read."""
        tick = 0
        while not self._done.wait(self._period):
            tick += 1
            mine = {"tick": tick, "beats": self._beats, "doing": self._doing, "name": self._name}
            mine |= {"stalled": self._stalled, "since": time.monotonic() - self._since}
            try:
                self._client.key_value_set(f"{KEYS}{self._index}", json.dumps(mine), allow_overwrite=True)
                if self._index == 0:
                    self._look(self._client.key_value_dir_get(KEYS))
                verdict = self._client.key_value_try_get(VERDICT)
            except Exception as error:  # NOT_FOUND is the good case, anything else a missing answer
                if "NOT_FOUND" not in str(error):
                    continue
                verdict = None
            self._contact = time.monotonic()
            if verdict is not None and not self._done.is_set():
                self._leave()
                self._end(**json.loads(verdict))

    def _look(self, entries: list[tuple[str, str]]) -> None:
        now = time.monotonic()
        for key, value in entries:
            index, state = int(key.rpartition("/")[2]), json.loads(value)
            if self._seen.get(index, ({"tick": -1}, 0))[0]["tick"] != state["tick"]:
                self._seen[index] = state, now

    def _judge(self) -> None:
        while not self._done.wait(self._period / 2):
            now = time.monotonic()
            if self._armed and not self._stalled and now - self._since > self._step_timeout:
                self._stalled = True
                print(f"{self._name}: no progress for {now - self._since:.0f} s; stacks:", file=sys.stderr)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                stalled_at = now
                if self._client is None:
                    self._end(f"stuck for {now - self._since:.0f} s in: {self._doing}{GOES_ON}")
            if self._client is None:
                continue
            if now - self._contact > self._heartbeat:
                silence = f"{now - self._contact:.0f} s"
                self._end(f"process 0 (the coordinator) gave no answer for {silence}{GOES_ON}")
            if self._index == 0:
                self._name_the_silent(now)
                self._name_the_stuck()
            elif self._stalled and now - stalled_at > self._heartbeat:  # no verdict came
                self._end(f"{self._name} is stuck in: {self._doing}{GOES_ON}")

    def _name_the_silent(self, now: float) -> None:
        silent = [
            f"{state['name']}, last seen in: {state['doing']}, {now - when:.0f} s ago"
            for state, when in self._seen.values()
            if now - when > self._heartbeat
        ]
        if silent:
            self._num_silent = len(silent)
            self._condemn(f"dead or frozen: {'; '.join(sorted(silent))}")

    def _name_the_stuck(self) -> None:
        states = [state for state, _ in self._seen.values()]
        if len(states) < self._count or not any(state["stalled"] for state in states):
            return
        behind = min(state["beats"] for state in states)
        stuck = [
            f"{state['name']} for {state['since']:.0f} s in: {state['doing']}"
            for state in states
            if state["beats"] == behind
        ]
        everybody = len(stuck) == len(states)
        self._condemn(f"stuck: {'; '.join(stuck)}" + ("" if everybody else "; the others wait for it"))

    def _condemn(self, line: str) -> None:
        self.tell(line + GOES_ON, EXIT_PEER)
        self._end(line + GOES_ON)

    def _end(self, line: str, code: int = EXIT_PEER) -> None:
        if not self._ending.acquire(blocking=False):
            return  # another thread is at it
        sys.stdout.flush()
        print(f"error: {line}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(code)

    def _announce_aborts(self) -> None:
        """When the first process dies, the runtime here aborts within milliseconds: a line before the end.

        A handler written in Python would wait for the interpreter's main thread, which waits in a collective.
        """

        def aborted(_: int) -> None:
            self._end(f"process 0 (the coordinator) is dead, or the JAX runtime failed (see above){GOES_ON}")

        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)  # kept: C holds no reference
        ctypes.CDLL(None).signal(signal.SIGABRT, self._on_abort)
