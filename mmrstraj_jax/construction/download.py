"""Images by URL: cached on disk, not too fast, tried again with jitter. Forged requests: see fetch.py."""

import random
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import UInt8

from mmrstraj_jax.construction import fetch
from mmrstraj_jax.construction.files import write_atomic
from mmrstraj_jax.construction.imagery import NoImagery, decode
from mmrstraj_jax.errors import UserError

_IMAGES = ("image/png", "image/jpeg", "image/jpg")  # the last is no such type, but what some servers say


class RateLimiter:
    """At most one start every `interval` seconds, across threads."""

    def __init__(self, interval: float, sleep: Callable[[float], None] = time.sleep):
        self.interval, self._sleep = interval, sleep
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self) -> None:
        """Returns when it is this call's turn."""
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self.interval
        if turn > now:
            self._sleep(turn - now)


class Downloader:
    """Images by URL: cached on disk, one at a time and not too fast, tried again with jitter."""

    def __init__(
        self,
        cache: Path | None,
        *,
        interval: float = 0.2,
        tries: int = 5,
        backoff: float = 1.0,
        limits: fetch.Limits = fetch.LIMITS,
        allow_loopback: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """
        Args:
          cache: folder; None where the terms forbid storing. A failing cache only warns.
          interval: least seconds between two requests.
          tries: of one image, the first included; pauses grow from `backoff` seconds to a minute.
          allow_loopback: for tests only.
        """
        self.cache, self.tries, self.backoff, self.limits = cache, tries, backoff, limits
        self._allow_loopback, self._sleep = allow_loopback, sleep
        self._limiter = RateLimiter(interval, sleep)
        self._jitter = random.Random()  # not a seed's business: many machines must not try again in step

    def image(self, url: str, name: str, size: tuple[int, int], **request: Any) -> UInt8[np.ndarray, "H W 3"]:
        """Pixels behind `url`, from the cache file `name` if it is whole.

        `request`: headers and body of fetch.get. Raises NoImagery (404), FetchError, UserError.
        """
        path = None if self.cache is None else self.cache / name
        if path is not None and path.is_file():
            try:
                return decode(path.read_bytes(), str(path), size)
            except (UserError, OSError) as error:
                warnings.warn(f"cache: {error}; downloaded again", stacklevel=2)
        body = self.download(url, _IMAGES, **request).body
        pixels = decode(body, f"{urlsplit(url).hostname}: {name}", size)
        if path is not None:
            try:
                write_atomic(path, body)
            except OSError as error:
                warnings.warn(f"cache: {path.name} not stored ({error.strerror})", stacklevel=2)
        return pixels

    def download(self, url: str, types: tuple[str, ...], **request: Any) -> fetch.Response:
        """What is behind `url`, of one of these content types (none: any). Raises NoImagery, FetchError."""
        for attempt in range(1, self.tries + 1):
            self._limiter.wait()
            try:
                response = fetch.get(url, self.limits, allow_loopback=self._allow_loopback, **request)
            except fetch.FetchError as error:
                if error.status in (204, 404, 410):
                    raise NoImagery(str(error)) from None
                if not error.retryable or attempt == self.tries:
                    raise
                pause = self.backoff * 2 ** (attempt - 1) * self._jitter.uniform(0.5, 1.5)
                self._sleep(min(max(pause, error.retry_after or 0.0), 60.0))
                continue
            if types and response.content_type not in types:
                kind, host = response.content_type[:60], urlsplit(url).hostname
                raise fetch.FetchError(f"{host}: content type {kind!r}, expected {' or '.join(types)}")
            return response
        raise AssertionError("unreachable")
