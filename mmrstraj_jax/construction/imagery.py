"""Satellite images of windows: providers, a disk cache, and what must be recorded beside each image.

A provider gives the pixels of a `tiles.Window`. Whoever uses one answers for its terms: many allow viewing
but no storing (Google); they are written beside every image. Keys come from environment variables, and are
in no message, file name or record.
"""

import base64
import dataclasses
import hashlib
import hmac
import io
import json
import os
import random
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from mmrstraj_jax.construction import fetch
from mmrstraj_jax.construction.tiles import TILE, Window, stitch
from mmrstraj_jax.errors import UserError

_MAX_PIXELS = 4096 * 4096
_MAGIC = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff"}


@dataclass(frozen=True)
class Source:
    """Who made the imagery and on what terms it may be used; goes beside each image."""

    name: str
    attribution: str
    licence: str
    terms: str = ""  # a URL
    capture_date: str = ""  # where the provider states one


class Provider(Protocol):
    """Pixels of a window."""

    source: Source

    def image(self, window: Window) -> UInt8[np.ndarray, "H W 3"]:
        """Raises UserError: the provider lacks the window."""


def decode(body: bytes, where: str, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of a PNG or JPEG. Raises UserError: another format, broken, another size or too large."""
    kind = next((name for name, magic in _MAGIC.items() if body.startswith(magic)), None)
    if kind is None:
        raise UserError(f"{where}: not a PNG or JPEG image (it begins with {body[:8]!r})")
    try:
        # the header is read first: a small file may claim terabytes of pixels
        with Image.open(io.BytesIO(body), formats=[kind]) as image:
            if size is not None and image.size != size:
                raise UserError(f"{where}: {image.size} pixels, expected {size}")
            if image.width * image.height > _MAX_PIXELS:
                raise UserError(f"{where}: {image.size} pixels, expected at most {_MAX_PIXELS} in all")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: a damaged {kind} image") from None


@dataclass(frozen=True)
class TileFolder:
    """Tiles in a local folder: `pattern` with {z}, {x} and {y} or {-y} (TMS rows, counted from the south)."""

    root: Path
    source: Source
    pattern: str = "{z}/{x}/{y}.png"

    def __post_init__(self):
        _check_pattern(self.pattern)

    def image(self, window: Window) -> UInt8[np.ndarray, "H W 3"]:
        """Stitched from the files. Raises UserError: a tile is missing or no 256 px image."""
        return stitch(window, self._tile)

    def _tile(self, zoom: int, x: int, y: int) -> UInt8[np.ndarray, "256 256 3"]:
        path = Path(self.root) / _fill(self.pattern, zoom, x, y)
        try:
            body = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; the window needs this tile") from None
        return decode(body, str(path), (TILE, TILE))


def _check_pattern(pattern: str) -> None:
    names = re.findall(r"\{([^{}]*)\}", pattern)
    if (
        not {"z", "x"} <= set(names)
        or not {"y", "-y"} & set(names)
        or set(names) - {"z", "x", "y", "-y", "key"}
    ):
        raise UserError(
            f"tile pattern with {names}: expected {{z}}, {{x}}, {{y}} or {{-y}}, and at most {{key}}"
        )


def _fill(pattern: str, zoom: int, x: int, y: int, key: str = "") -> str:
    values = {"z": zoom, "x": x, "y": y, "-y": 2**zoom - 1 - y, "key": quote(key, safe="")}
    return re.sub(r"\{([^{}]*)\}", lambda match: str(values[match[1]]), pattern)


def _secret(variable: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise UserError(f"{variable}: not set; expected the provider's key in this environment variable")
    return value


# ---- downloads ----


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

    def image(self, url: str, name: str, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
        """Pixels behind `url`, from the cache file `name` if it is whole. Raises FetchError, UserError."""
        path = None if self.cache is None else self.cache / name
        if path is not None and path.is_file():
            try:
                return decode(path.read_bytes(), str(path), size)
            except (UserError, OSError) as error:
                warnings.warn(f"cache: {error}; downloaded again", stacklevel=2)
        body = self._download(url)
        pixels = decode(body, f"{urlsplit(url).hostname}: {name}", size)
        if path is not None:
            try:
                write_atomic(path, body)
            except OSError as error:
                warnings.warn(f"cache: {path.name} not stored ({error.strerror})", stacklevel=2)
        return pixels

    def _download(self, url: str) -> bytes:
        for attempt in range(1, self.tries + 1):
            self._limiter.wait()
            try:
                response = fetch.get(url, self.limits, allow_loopback=self._allow_loopback)
            except fetch.FetchError as error:
                if not error.retryable or attempt == self.tries:
                    raise
                pause = self.backoff * 2 ** (attempt - 1) * self._jitter.uniform(0.5, 1.5)
                self._sleep(min(max(pause, error.retry_after or 0.0), 60.0))
                continue
            if response.content_type not in ("image/png", "image/jpeg"):
                kind = response.content_type[:60]
                raise fetch.FetchError(
                    f"{urlsplit(url).hostname}: content type {kind!r}, expected PNG or JPEG"
                )
            return response.body
        raise AssertionError("unreachable")


class XYZ:
    """Tiles of a web server: `template` like https://HOST/{z}/{x}/{y}.png, {-y} for TMS, {key} for a key."""

    def __init__(
        self, template: str, source: Source, downloader: Downloader, key_variable: str | None = None
    ):
        """Raises UserError: a template without {z} {x} {y}, or {key} without its environment variable."""
        _check_pattern(template)
        if ("{key}" in template) != (key_variable is not None):
            raise UserError("tile template: {key} and the name of the key's environment variable go together")
        self.source, self._template, self._downloader = source, template, downloader
        self._variable = key_variable
        # hashed with {key} in place: the folder names the provider and not the key
        self._folder = f"{_slug(source.name)}-{hashlib.sha256(template.encode()).hexdigest()[:12]}"

    def image(self, window: Window) -> UInt8[np.ndarray, "H W 3"]:
        """Stitched from the server's tiles. Raises FetchError, UserError."""
        return stitch(window, self._tile)

    def _tile(self, zoom: int, x: int, y: int) -> UInt8[np.ndarray, "256 256 3"]:
        url = _fill(self._template, zoom, x, y, _secret(self._variable) if self._variable else "")
        return self._downloader.image(url, f"{self._folder}/{zoom}/{x}/{y}", (TILE, TILE))


GOOGLE = Source(
    "google-static-maps",
    "Imagery (c) Google and its data providers; keep the logo and notices in the image",
    "Google Maps Platform terms; storing, pre-fetching and redistributing are restricted",
    "https://cloud.google.com/maps-platform/terms",
)


class GoogleStatic:
    """Google Static Maps, satellite: the paper's source. Nothing is cached: its terms forbid storing."""

    source = GOOGLE

    def __init__(
        self,
        downloader: Downloader,
        *,
        key_variable: str = "GOOGLE_MAPS_API_KEY",
        secret_variable: str = "GOOGLE_MAPS_URL_SECRET",
        endpoint: str = "https://maps.googleapis.com/maps/api/staticmap",
    ):
        """The URL is signed where `secret_variable` is set. Raises UserError: a downloader with a cache."""
        if downloader.cache is not None:
            raise UserError("google-static-maps: its terms forbid a cache; use Downloader(cache=None)")
        self._downloader, self._endpoint = downloader, endpoint
        self._key, self._signing = key_variable, secret_variable

    def image(self, window: Window) -> UInt8[np.ndarray, "H W 3"]:
        """One request for a window of up to 640 x 640 px. Raises FetchError, UserError."""
        if max(window.width, window.height) > 640:
            raise UserError(
                f"google-static-maps: window of {window.width} x {window.height}, at most 640 x 640"
            )
        where = f"{window.zoom}/{window.left}/{window.top}"
        return self._downloader.image(self.url(window), where, (window.width, window.height))

    def url(self, window: Window) -> str:
        """The signed request. Holds the key: never log it."""
        lat, lon = window.center
        url = (
            f"{self._endpoint}?center={lat:.7f},{lon:.7f}&zoom={window.zoom}&size={window.width}x{window.height}"
            f"&scale=1&maptype=satellite&format=png&key={quote(_secret(self._key), safe='')}"
        )
        secret = os.environ.get(self._signing, "").strip()
        return f"{url}&signature={sign(url, secret, self._signing)}" if secret else url


def sign(url: str, secret: str, variable: str = "secret") -> str:
    """Google's URL signature: base64 of HMAC-SHA1 over path and query. Raises UserError: bad secret."""
    parts = urlsplit(url)
    try:
        key = base64.b64decode(secret, altchars=b"-_", validate=True)
    except ValueError:
        raise UserError(f"{variable}: not url-safe base64; expected the URL signing secret") from None
    digest = hmac.new(key, f"{parts.path}?{parts.query}".encode(), hashlib.sha1).digest()
    return base64.urlsafe_b64encode(digest).decode()


# ---- files ----


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "provider"


def write_atomic(path: Path, body: bytes) -> None:
    """Whole or not at all, also when killed. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(body)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def draw_track(
    image: UInt8[np.ndarray, "H W 3"], window: Window, lat, lon, color=(255, 40, 40), width: int = 3
):
    """A copy of the image with the path of N points drawn on it."""
    canvas = Image.fromarray(image)
    x, y = window.pixels(lat, lon)
    ImageDraw.Draw(canvas).line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=color, width=width)
    return np.asarray(canvas)


def save(path: Path, image: UInt8[np.ndarray, "H W 3"], window: Window, source: Source, **about) -> dict:
    """Writes `path` (PNG) and, last, `path` with .json: where, how large a pixel, whose and on what terms.

    The record exists only beside a whole image, and the same input gives the same bytes.

    Args:
      about: further fields of the record, such as trip and anchor.
    Raises:
      UserError: a path that does not end in .png, an image of another size, a folder that is not writable.
    """
    if path.suffix != ".png" or image.shape != (window.height, window.width, 3):
        raise UserError(
            f"{path}: image {image.shape}; expected .png and {window.height} x {window.width} RGB"
        )
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    record = {
        "image": path.name,
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "provider": dataclasses.asdict(source),
        "window": dataclasses.asdict(window),
        "center": window.center,
        "bounds": window.bounds,
        "crs": "EPSG:3857",
        "transform": window.transform,
        "gsd_metres": window.gsd,
    }
    clash = sorted(record.keys() & about.keys())
    assert not clash, clash
    try:
        write_atomic(path, buffer.getvalue())
        write_atomic(path.with_suffix(".json"), (json.dumps(record | about, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a folder that can be written") from None
    return record | about
