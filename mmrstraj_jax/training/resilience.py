"""What training does when it is told to stop, and when numbers stop being finite."""

import os
import signal
import sys
import threading
import time
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL: "run me again"; schedulers can requeue on it
MAX_SKIPPED = 10  # non-finite updates in a row, after which going on is pointless
GRACE = 5.0  # seconds the interpreter has to act on a signal before a thread does


class Stopped(BaseException):
    """Asked to stop, and everything that can be saved is saved. No library may swallow it, as with Ctrl-C."""

    at_once = False  # whether the interpreter's clean end would wait for a thread that reads a row


class Diverged(Exception):
    """Loss or gradients were not finite for too long, or never were."""


class StopSignal:
    """SIGINT or SIGTERM: the first asks for a stop at the next step boundary, the second stops at once.

    As a context manager it puts the handlers in place (main thread only, as Python wants) and back. Before
    `arm` there is nothing to save, so the first signal raises Stopped right there. Python runs handlers only
    between two byte codes; while the main thread is inside a compilation or a collective, a thread acts for
    it: after GRACE seconds it ends the process with EXIT_STOPPED where there is nothing to save, and with
    128 + its number at a second signal.
    """

    def __init__(self):
        self.requested: str | None = None  # name of the signal
        self._armed = False
        self._previous: dict[int, object] = {}
        self._handled = 0  # signals that the handler has seen

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, end == self._pipe[0])
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._pipe[1])  # ends the thread

    def arm(self) -> None:
        """From here on the caller looks at `requested` at every step boundary."""
        self._armed = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._handled += 1
        if self.requested:
            # Finished checkpoints are safe: a step folder gets its name only when it is complete.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.requested = name
        if not self._armed:
            raise Stopped(f"{name} before the first step: nothing to save")

    def _watch(self) -> None:
        """Reads what the C handler writes the moment a signal arrives."""
        seen = 0
        while data := os.read(self._pipe[0], 1):
            number = data[0]
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            seen += 1
            if self._armed and seen == 1:
                continue  # the loop sees it
            end = time.monotonic() + GRACE
            while self._handled < seen and time.monotonic() < end:
                time.sleep(0.05)
            if self._handled < seen:
                name = signal.Signals(number).name
                second = "a second time; unfinished work is dropped" if seen > 1 else "nothing to save yet"
                print(f"stopped: {name}: {second}", file=sys.stderr, flush=True)
                os._exit(EXIT_STOPPED if seen == 1 else 128 + number)
        os.close(self._pipe[0])
