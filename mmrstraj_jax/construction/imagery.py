"""Images of windows: decoding what a provider sent, the track drawn on it, and the record beside each."""

import dataclasses
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from mmrstraj_jax.construction.files import dump, write_atomic
from mmrstraj_jax.construction.tiles import Window
from mmrstraj_jax.errors import UserError

_MAX_PIXELS = 4096 * 4096  # of what a server sent
_MAGIC = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff"}


class NoImagery(UserError):
    """The provider has nothing for a window: the window is dropped and counted, the run goes on."""


class DamagedImage(NoImagery):
    """A file that is no whole PNG or JPEG: cut off, empty, an error page."""


@dataclass(frozen=True)
class Source:
    """Who made the imagery and on what terms it may be used; goes beside each image."""

    name: str
    attribution: str
    licence: str
    terms: str = ""  # a URL
    capture_date: str = ""  # where the provider states one


def decode(
    body: bytes, where: str, size: tuple[int, int] | None = None, max_pixels: int = _MAX_PIXELS
) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of a PNG or JPEG; partly transparent ones in their own colour.

    Raises DamagedImage: another format, or broken. NoImagery: nothing but transparent pixels. UserError:
    another size, too large or deeper than 8 bits: as a rule, all tiles of a provider are then.
    """
    kind = next((name for name, magic in _MAGIC.items() if body.startswith(magic)), None)
    if kind is None:
        raise DamagedImage(f"{where}: not a PNG or JPEG image (it begins with {body[:8]!r})")
    try:
        # the header is read first: a small file may claim terabytes of pixels
        with Image.open(io.BytesIO(body), formats=[kind]) as image:
            if size is not None and image.size != size:
                raise UserError(f"{where}: {image.size} pixels, expected {size}")
            if image.width * image.height > max_pixels:
                raise UserError(f"{where}: {image.size} pixels, expected at most {max_pixels} in all")
            if any(";16" in str(part.args) for part in image.tile):
                # Pillow clips grey at 255 and keeps the upper 8 bits of colours: nearly black reflectances
                raise UserError(f"{where}: deeper than 8 bits; convert the tiles to 8-bit RGB with a stretch")
            if image.has_transparency_data:
                if image.convert("RGBA").getchannel("A").getextrema() == (0, 0):
                    raise NoImagery(f"{where}: fully transparent, as tiles without imagery are")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedImage(f"{where}: a damaged {kind} image") from None


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
        write_atomic(path.with_suffix(".json"), dump(record | about))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a folder that can be written") from None
    return record | about
