"""What training does when it is told to stop, and when numbers stop being finite."""

import os
import signal
import threading
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL: "run me again"; schedulers can requeue on it
MAX_SKIPPED = 10  # non-finite updates in a row, after which going on is pointless


class Stopped(Exception):
    """Asked to stop, and everything that can be saved is saved."""


class Diverged(Exception):
    """Loss or gradients were not finite for too long."""


class StopSignal:
    """SIGINT or SIGTERM: the first asks for a stop at the next step boundary, the second stops at once.

    As a context manager it puts the handlers in place (main thread only, as Python wants) and back. Before
    `arm` there is nothing to save, so the first signal raises Stopped right there.
    """

    def __init__(self):
        self.requested: str | None = None  # name of the signal
        self._armed = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def arm(self) -> None:
        """From here on the caller looks at `requested` at every step boundary."""
        self._armed = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            # Finished checkpoints are safe: Orbax renames a step folder only when it is complete.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.requested = name
        if not self._armed:
            raise Stopped(f"{name} before the first step: nothing to save")
