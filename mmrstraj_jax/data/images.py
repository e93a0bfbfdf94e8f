"""Images from files to uint8 views, bit-equal to the reference (PIL bicubic; LLaVA-NeXT mm_utils.py, HF's PIL
processor).

File policy: 8-bit images of any PIL mode become RGB as PIL's `convert("RGB")` does it (alpha is dropped, not
blended; CMYK and palettes are converted; the first frame of an animation counts). EXIF rotation is ignored
unless asked for, as in the original; a TIFF's Pillow applies in either case. Deeper than 8 bits is refused
unless a stretch is named (for one band: Pillow cannot read more): scaling reflectances blindly gives nearly
black pictures. Size is checked from the header, before anything is decoded.
"""

import io
import math
import os
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from mmrstraj_jax.config import ImagePolicy
from mmrstraj_jax.data.anyres import Plan
from mmrstraj_jax.errors import UserError

# Only formats whose decoders are in-process and common; EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000", "PPM")
PAD_BLACK = (0, 0, 0)
PAD_MEAN = (127, 127, 127)  # int(255 * 0.5), the mean of SigLIP's normalisation
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_HOW_TO_STRETCH = 'choose --images.deep stretch in training, ImagePolicy(deep="stretch") in load'
_ORIENTATION, _GDAL_NODATA = 0x0112, 42113
_TURNED = (5, 6, 7, 8)  # orientations that swap the sides
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError)
_UNREADABLE += (TypeError, struct.error, zlib.error)  # as Pillow raises for what tags may hold


DEFAULT = ImagePolicy()

# Pillow gives the memory of every image back to the kernel, which clears new pages for the next one: a
# quarter of the time of a large image. Four of its 16 MiB blocks hold what one image needs up to its views.
if "PILLOW_BLOCKS_MAX" not in os.environ:
    Image.core.set_blocks_max(4)

Source = str | os.PathLike | bytes  # bytes: the content of a file
Picture = Image.Image | UInt8[np.ndarray, "h w 3"]  # decoded already


def _name(source: Source) -> str:
    return "the row's own image" if isinstance(source, bytes) else str(source)


def _file(source: Source) -> str | os.PathLike | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _num_bytes(source: Source) -> int:
    return len(source) if isinstance(source, bytes) else os.path.getsize(source)


def _open(source: Source, policy: ImagePolicy) -> Image.Image:
    """Opens a file, reading its header only."""
    path = _name(source)
    try:
        image = Image.open(_file(source), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: more than {policy.max_pixels} pixels; cut it into tiles first") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such image") from error
    except UnidentifiedImageError as error:
        what = f"not an image that can be read; expected 8-bit bands in one of {', '.join(FORMATS)}"
        if not _num_bytes(source):
            what = "an empty file"
        raise UserError(f"{path}: {what}") from error
    except _UNREADABLE as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    width, height = image.size
    if width * height > policy.max_pixels:
        image.close()
        raise UserError(
            f"{path}: {width}x{height} pixels, over the limit of {policy.max_pixels}; cut it into tiles first"
        )
    try:
        _check_depth(image, policy, path)
    except UserError:
        image.close()
        raise
    return image


def _check_depth(image: Image.Image, policy: ImagePolicy, name: str) -> None:
    """Refuses an image whose bands would not become 8 bits as asked; a file's is not decoded yet."""
    try:
        cut = image.mode not in _DEEP_MODES and _has_deep_bands(image)
    except _UNREADABLE as error:
        raise UserError(f"{name}: cannot be read ({error})") from error
    if cut:  # Pillow would keep the upper 8 bits, and reflectances would be nearly black
        raise UserError(f"{name}: several bands deeper than 8 bits; convert it to 8-bit RGB with a stretch")
    if image.mode in _DEEP_MODES and policy.deep == "refuse":
        raise UserError(
            f"{name}: more than 8 bits per band (mode {image.mode}); convert it to 8-bit RGB with a stretch "
            f"that suits the sensor, or {_HOW_TO_STRETCH}"
        )


def _has_deep_bands(image: Image.Image) -> bool:
    """Whether the file's bands are deeper than the 8 bits that Pillow's mode has."""
    if not getattr(image, "tile", ()):  # decoded already, or never in a file
        return False
    if image.format == "JPEG2000":
        image.fp.seek(0)
        head = image.fp.read(1 << 20)
        at = head.index(b"\xff\x4f\xff\x51")  # SOC and SIZ; ISO 15444-1, A.5.1: Csiz, then 3 bytes a band
        bands = int.from_bytes(head[at + 40 : at + 42], "big")
        return any((head[at + 42 + 3 * band] & 0x7F) + 1 > 8 for band in range(bands))
    if image.format == "PPM":
        return any(codec != "raw" and args[-1] > 255 for codec, _, _, args in image.tile)
    return any(";16" in str(args) for _, _, _, args in image.tile)  # by name only since Pillow 11


def _rotation(image: Image.Image, policy: ImagePolicy, name: object) -> int:
    """EXIF orientation 1..8, 1 when rotation is not asked for. PIL decodes a PNG to find it."""
    if not policy.exif or image.format == "TIFF":  # Pillow turns a TIFF itself, its size too
        return 1
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except _UNREADABLE as error:
        raise UserError(f"{name}: damaged image or EXIF data ({error}); write it again") from error


def _picture(value: object) -> tuple[Image.Image, str]:
    """An array or an image of PIL's, as the latter, and its name in errors."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.shape[2:] == (3,):
        return Image.fromarray(value), "image"
    if isinstance(value, Image.Image):
        return value, str(getattr(value, "filename", "") or "image")
    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
    raise UserError(f"image given as {found}: expected a path, a PIL image or an array uint8 [h, w, 3]")


def size(source: Source | Picture, policy: ImagePolicy = DEFAULT) -> tuple[int, int]:
    """(width, height) that `load` will give, from the header alone.

    A file that lacks its format's end mark is decoded, to find truncated downloads before training does.
    Raises UserError naming the file.
    """
    if not isinstance(source, Source):
        image, name = _picture(source)
        _check_depth(image, policy, name)
        return image.size[::-1] if _rotation(image, policy, name) in _TURNED else image.size
    with _open(source, policy) as image:
        if not _has_end_mark(source, image.format):
            _decode(image, _name(source))
        return image.size[::-1] if _rotation(image, policy, _name(source)) in _TURNED else image.size


def _has_end_mark(source: Source, image_format: str | None) -> bool:
    mark = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}.get(image_format or "")
    if mark is None:
        return True
    if isinstance(source, bytes):
        return mark in source[-16:]
    with open(source, "rb") as file:
        file.seek(max(0, _num_bytes(source) - 16))
        return mark in file.read()


def _decode(image: Image.Image, name: object) -> None:
    try:
        image.load()
    except _UNREADABLE as error:
        raise UserError(
            f"{name}: damaged or truncated image ({error}); download or write it again"
        ) from error


def load(source: Source | Picture, policy: ImagePolicy = DEFAULT) -> Image.Image:
    """An RGB image, decoded.

    Args:
      source: a path, the content of a file, a PIL image (converted by the same rules, its size trusted) or
        an array.
    Raises:
      UserError: naming the file; missing, unknown format, damaged, above max_pixels, or deeper than 8 bits.
    """
    if not isinstance(source, Source):
        image, name = _picture(source)
        _check_depth(image, policy, name)
        _decode(image, name)
        return _to_rgb(image, policy, name)
    with _open(source, policy) as image:
        _decode(image, _name(source))
        return _to_rgb(image, policy, _name(source))


def _to_rgb(image: Image.Image, policy: ImagePolicy, name: object) -> Image.Image:
    rotation = _rotation(image, policy, name)
    if image.mode in _DEEP_MODES:
        image = Image.fromarray(_stretch(np.asarray(image), _nodata(image)))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # same colours as straight to RGB, without PIL's warning
    image = image.convert("RGB")
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(turns[rotation]) if rotation in turns else image


def _nodata(image: Image.Image) -> float | None:
    """The value that a GeoTIFF has where nothing was measured."""
    try:
        return float(getattr(image, "tag_v2", {}).get(_GDAL_NODATA))
    except (TypeError, ValueError):
        return None


def _stretch(values: np.ndarray, nodata: float | None = None) -> UInt8[np.ndarray, "h w"]:
    """2nd to 98th percentile to 0..255, the usual stretch of viewers of satellite imagery.

    What was not measured (NaN, infinite, nodata) counts for no percentile and becomes black.
    """
    values = values.astype(np.float64)
    known = np.isfinite(values) & (values != nodata)
    low, high = np.percentile(values[known], (2, 98)) if known.any() else (0.0, 0.0)
    values = np.where(known, values, low)
    return np.clip((values - low) / max(high - low, 1e-12) * 255 + 0.5, 0, 255).astype(np.uint8)


def _pad(image: Image.Image, width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    """Centred on a canvas; an odd remainder goes right and down."""
    padded = Image.new("RGB", (width, height), colour)
    padded.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return padded


def resize_and_pad(image: Image.Image, width: int, height: int) -> Image.Image:
    """Largest size that fits, aspect kept, centred on black (LLaVA-NeXT resize_and_pad_image)."""
    scale_width, scale_height = width / image.width, height / image.height
    if scale_width < scale_height:
        new = width, min(math.ceil(image.height * scale_width), height)
    else:
        new = min(math.ceil(image.width * scale_height), width), height
    return _pad(image.resize(new, Image.Resampling.BICUBIC), width, height, PAD_BLACK)


def views(
    image: Image.Image | Sequence[Image.Image], plan: Plan, view_size: int
) -> UInt8[np.ndarray, "V S S 3"]:
    """The views of a plan, base view first, crops row by row.

    Args:
      image: RGB; the list of frames for a video plan.
      view_size: S, pixels.
    """
    square = (view_size, view_size)
    if plan.kind == "video":
        assert len(image) == plan.num_views, (len(image), plan.num_views)
        return np.stack([np.asarray(frame.resize(square, Image.Resampling.BICUBIC)) for frame in image])
    if plan.kind == "square":
        side = max(image.size)
        padded = image if image.width == image.height else _pad(image, side, side, PAD_MEAN)
        return np.asarray(padded.resize(square, Image.Resampling.BICUBIC))[None]
    assert image.size == (plan.width, plan.height), (image.size, plan)
    rows, columns = plan.grid
    out = np.empty((plan.num_views, view_size, view_size, 3), np.uint8)
    # The original image without its aspect: a FIXME of the reference, kept on purpose.
    out[0] = np.asarray(image.resize(square, Image.Resampling.BICUBIC))
    whole = np.asarray(resize_and_pad(image, columns * view_size, rows * view_size))
    crops = out[1:].reshape(rows, columns, view_size, view_size, 3)  # a view of out: one copy, not two
    crops[:] = whole.reshape(rows, view_size, columns, view_size, 3).transpose(0, 2, 1, 3, 4)
    return out
