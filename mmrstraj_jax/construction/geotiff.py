"""GeoTIFF of a Web Mercator window, without GDAL: TIFF tags of OGC GeoTIFF 1.1, written by Pillow."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from mmrstraj_jax.construction.files import write_atomic
from mmrstraj_jax.construction.tiles import Window
from mmrstraj_jax.errors import UserError

PIXEL_SCALE, TIEPOINT, GEO_KEYS = 33550, 33922, 34735  # ModelPixelScale, ModelTiepoint, GeoKeyDirectory
_DOUBLE, _SHORT = 12, 3  # types of TIFF values
_KEYS = (  # key, value: all of them are short and stand in the directory itself
    (1024, 1),  # GTModelType: projected
    (1025, 1),  # GTRasterType: a pixel is an area
    (3072, 3857),  # ProjectedCRS: EPSG:3857
    (3076, 9001),  # ProjLinearUnits: metre
)


def write(path: Path, image: UInt8[np.ndarray, "H W 3"], window: Window) -> None:
    """Writes the window's exact pixels (deflate) with their place in EPSG:3857.

    Raises UserError: an image of another size, a folder that is not writable.
    """
    if image.shape != (window.height, window.width, 3):
        raise UserError(f"{path}: image {image.shape}; expected {window.height} x {window.width} RGB")
    west, pixel, _, north, _, _ = window.transform
    tags = ImageFileDirectory_v2()
    values = {
        PIXEL_SCALE: (pixel, pixel, 0.0),
        TIEPOINT: (0.0, 0.0, 0.0, west, north, 0.0),
        GEO_KEYS: (1, 1, 1, len(_KEYS), *(n for key, value in _KEYS for n in (key, 0, 1, value))),
    }
    for tag, value in values.items():
        tags.tagtype[tag] = _SHORT if tag == GEO_KEYS else _DOUBLE
        tags[tag] = value
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "TIFF", compression="tiff_adobe_deflate", tiffinfo=tags)
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a folder that can be written") from None
