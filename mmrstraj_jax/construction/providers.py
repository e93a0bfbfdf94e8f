"""Providers of satellite images: local tiles, any XYZ server, Google Static Maps, the embedded SynthCity.

A provider gives the pixels of a `tiles.Window`. Whoever uses one answers for its terms: many allow viewing
but no storing (Google); they are written beside every image. Keys come from environment variables, and are
in no message, file name or record.
"""

import base64
import functools
import hashlib
import hmac
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit

import numpy as np
from jaxtyping import UInt8

from mmrstraj_jax.construction.download import Downloader
from mmrstraj_jax.construction.imagery import NoImagery, Source, decode
from mmrstraj_jax.construction.remote_providers import EarthEngine, Stac
from mmrstraj_jax.construction.tiles import TILE, Window, stitch
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.synthcity.city import make_city
from mmrstraj_jax.synthcity.tiles import tile, tile_look


class Provider(Protocol):
    """Pixels of a window."""

    source: Source

    def image(self, window: Window) -> UInt8[np.ndarray, "H W 3"]:
        """Raises NoImagery: the provider lacks the window."""


@dataclass(frozen=True)
class TileFolder:
    """Tiles in a local folder: `pattern` with {z}, {x} and {y} or {-y} (TMS rows, counted from the south)."""

    root: Path
    source: Source
    pattern: str = "{z}/{x}/{y}.png"

    def __post_init__(self):
        _check_pattern(self.pattern)

    def image(self, window: Window) -> UInt8[np.ndarray, "H W 3"]:
        """Stitched from the files. Raises NoImagery: a tile is missing. UserError: no 256 px image."""
        return stitch(window, self._tile)

    def _tile(self, zoom: int, x: int, y: int) -> UInt8[np.ndarray, "256 256 3"]:
        path = Path(self.root) / _fill(self.pattern, zoom, x, y)
        try:
            body = path.read_bytes()
        except FileNotFoundError:
            raise NoImagery(f"{path}: no such file; the window needs this tile") from None
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
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        # not shown: it may be the key itself
        raise UserError("--key-variable: expected the name of an environment variable, like TILE_KEY")
    value = os.environ.get(variable, "").strip()
    if not value:
        raise UserError(f"{variable}: not set; expected the provider's key in this environment variable")
    return value


class XYZ:
    """Tiles of a web server: `template` like https://HOST/{z}/{x}/{y}.png, {-y} for TMS, {key} for a key."""

    def __init__(
        self, template: str, source: Source, downloader: Downloader, key_variable: str | None = None
    ):
        """Raises UserError: a template without {z} {x} {y}, or {key} without its environment variable."""
        _check_pattern(template)
        if re.search(r"[?&][^=&]*(?:key|token|secret|sig)[^=&]*=(?!\{key\})", template, re.IGNORECASE):
            raise UserError(
                "tile template: a key in it would end up in files; write {key} and --key-variable"
            )
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


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "provider"


class SynthCity:
    """The embedded city (zooms 17 to 19): a factory that can be tried without imagery, terms or network."""

    source = Source("SynthCity", "Rendered by mmrstraj_jax", "Apache-2.0")

    def __init__(self, seed: int, lat: float, lon: float):
        self._city = make_city(seed, lat=lat, lon=lon)
        self._look = tile_look(self._city)
        # neighbouring windows share tiles; drawing one takes longer than all else here
        self._tile = functools.lru_cache(maxsize=256)(self._draw)

    def image(self, window: Window) -> UInt8[np.ndarray, "H W 3"]:
        """Raises UserError: another zoom."""
        return stitch(window, self._tile)

    def _draw(self, zoom: int, x: int, y: int) -> UInt8[np.ndarray, "256 256 3"]:
        return tile(self._city, zoom, x, y, self._look)


# ---- by name ----


@dataclass(frozen=True)
class ProviderSettings:
    """Which imagery, and on whose terms."""

    provider: str = ""  # folder, xyz, google, earthengine, stac or synthcity
    tiles: str = ""  # folder, URL template of an XYZ server, Earth Engine's asset, or root of a STAC API
    pattern: str = "{z}/{x}/{y}.png"  # of a folder's files; {-y} counts rows from the south
    title: str = ""  # of the imagery; it, attribution and licence go beside every image
    attribution: str = ""
    licence: str = ""
    terms: str = ""  # a URL
    capture_date: str = ""
    key_variable: str = ""  # environment variable that holds the key of a template with {key}, or the token
    bands: tuple[str, ...] = ("R", "G", "B")  # of an Earth Engine asset
    value_range: str = "0:255"  # LOW:HIGH of these bands
    collection: str = ""  # of a STAC API
    asset: str = "visual"  # of its items: an 8-bit RGB GeoTIFF
    city: str = "0:45:8"  # SEED:LAT:LON of SynthCity


def _source(config: ProviderSettings) -> Source:
    for field in ("tiles", "title", "attribution", "licence"):
        if not getattr(config, field):
            raise UserError(
                f"--{field}: expected with --provider {config.provider}; it goes beside every image"
            )
    return Source(config.title, config.attribution, config.licence, config.terms, config.capture_date)


def _folder(config: ProviderSettings, downloader: Downloader) -> Provider:
    if not Path(config.tiles).is_dir():
        raise UserError(f"--tiles {config.tiles}: no such folder")
    return TileFolder(Path(config.tiles), _source(config), config.pattern)


def _synthcity(config: ProviderSettings, downloader: Downloader) -> Provider:
    match = re.fullmatch(r"(\d{1,9}):(-?[\d.]+):(-?[\d.]+)", config.city)
    try:
        seed, lat, lon = int(match[1]), float(match[2]), float(match[3])
    except (TypeError, ValueError):
        raise UserError(f"--city {config.city}: expected SEED:LAT:LON, as of the trips") from None
    return SynthCity(seed, lat, lon)


def _earthengine(config: ProviderSettings, downloader: Downloader) -> Provider:
    low, _, high = config.value_range.partition(":")
    try:
        limits = float(low), float(high)
    except ValueError:
        raise UserError(f"--value-range {config.value_range}: expected LOW:HIGH") from None
    source, variable = _source(config), config.key_variable or "EARTHENGINE_TOKEN"
    return EarthEngine(config.tiles, config.bands, limits, source, downloader, token_variable=variable)


PROVIDERS: dict[str, Callable[[ProviderSettings, Downloader], Provider]] = {
    "folder": _folder,
    "xyz": lambda config, downloader: XYZ(
        config.tiles, _source(config), downloader, config.key_variable or None
    ),
    "google": lambda config, downloader: GoogleStatic(
        downloader, key_variable=config.key_variable or "GOOGLE_MAPS_API_KEY"
    ),
    "earthengine": _earthengine,
    "stac": lambda config, downloader: Stac(
        config.tiles, config.collection, config.asset, _source(config), downloader
    ),
    "synthcity": _synthcity,
}


def provider_of(config: ProviderSettings, downloader: Downloader) -> Provider:
    """The provider of these settings. Raises UserError: unknown name, or a setting it needs is missing."""
    if config.provider not in PROVIDERS:
        raise UserError(f"--provider {config.provider!r}: expected one of {', '.join(PROVIDERS)}")
    return PROVIDERS[config.provider](config, downloader)
