"""A progress line with GB/s on stderr."""

import sys
import time


class Progress:
    """Shows bytes done, speed and time left; silent when `show` is false or stderr is not a terminal.

    Args:
        label: what is done.
        total: bytes.
        show: False for silence.
    """

    def __init__(self, label: str, total: int, show: bool = True) -> None:
        self._label, self._total, self._done = label, total, 0
        self._show = show and sys.stderr.isatty()
        self._start = self._last = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if self._show and (now - self._last > 0.2 or self._done == self._total):
            self._last = now
            sys.stderr.write("\r" + self.line() + "\x1b[K")
            sys.stderr.flush()

    def line(self) -> str:
        """`label 1.2/15.3 GB  8 %  1.10 GB/s  13 s left`."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        speed = self._done / seconds
        left = (self._total - self._done) / speed if speed else 0.0
        share = self._done / self._total if self._total else 1.0
        return (
            f"{self._label} {self._done / 1e9:.2f}/{self._total / 1e9:.2f} GB  {share:4.0%}  "
            f"{speed / 1e9:.2f} GB/s  {left:.0f} s left"
        )

    def close(self) -> None:
        if self._show:
            sys.stderr.write("\n")
