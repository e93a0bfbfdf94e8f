"""Imagery that is no tile: Google Earth Engine's getPixels, and cloud-optimised GeoTIFFs found through STAC.

Both resample to the window's grid (EPSG:3857): their pixels are not the sensor's own. All requests, those for
parts of a GeoTIFF too, go through fetch.py; GDAL opens no connection.
"""

import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import PurePath
from urllib.parse import quote, urlencode, urlsplit

import numpy as np
from jaxtyping import UInt8

from mmrstraj_jax.construction.download import Downloader
from mmrstraj_jax.construction.imagery import NoImagery, Source
from mmrstraj_jax.construction.tiles import Window
from mmrstraj_jax.errors import UserError

_JSON = ("application/json", "application/geo+json")
_BLOCK = 256 * 1024  # bytes of a GeoTIFF asked for at a time
_NAME = "image.tif"  # what GDAL knows a remote file by
_ITEMS = 20  # of a search: the newest ones that touch the window


class EarthEngine:
    """One image asset of Earth Engine, such as projects/earthengine-public/assets/USDA/NAIP/DOQQ/m_..."""

    def __init__(
        self,
        asset: str,
        bands: tuple[str, ...],
        limits: tuple[float, float],
        source: Source,
        downloader: Downloader,
        *,
        token_variable: str = "EARTHENGINE_TOKEN",
        endpoint: str = "https://earthengine.googleapis.com/v1",
    ):
        """
        Args:
          bands: the three shown as red, green and blue.
          limits: band values shown as 0 and 255.
          token_variable: environment variable with an OAuth token (`gcloud auth print-access-token`).
        Raises:
          UserError: an asset of another form, not three bands, limits that are not in order.
        """
        if not asset.startswith("projects/") or "/assets/" not in asset:
            raise UserError(f"--tiles {asset}: expected an asset, projects/PROJECT/assets/PATH")
        if len(bands) != 3 or not limits[0] < limits[1]:
            raise UserError(f"--bands {bands}, --value-range {limits}: expected three bands, and LOW:HIGH")
        self.source, self._downloader, self._variable = source, downloader, token_variable
        self._url = f"{endpoint}/{quote(asset)}:getPixels"
        self._shown = {
            "fileFormat": "PNG",
            "bandIds": list(bands),
            "visualizationOptions": {"ranges": [{"min": limits[0], "max": limits[1]}]},
        }
        key = json.dumps([asset, self._shown], sort_keys=True)
        self._folder = f"earth-engine-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

    def image(self, window: Window) -> UInt8[np.ndarray, "H W 3"]:
        """Raises UserError: no token. NoImagery, FetchError: see Downloader.image."""
        token = os.environ.get(self._variable, "").strip()
        if not token:
            raise UserError(f"{self._variable}: not set; expected an OAuth token of Earth Engine")
        west, pixel, _, north, _, down = window.transform
        affine = {"scaleX": pixel, "shearX": 0, "translateX": west}
        affine |= {"shearY": 0, "scaleY": down, "translateY": north}
        size = {"width": window.width, "height": window.height}
        grid = {"dimensions": size, "affineTransform": affine, "crsCode": "EPSG:3857"}
        return self._downloader.image(
            self._url,
            f"{self._folder}/{window.zoom}/{window.left}-{window.top}-{window.width}x{window.height}",
            (window.width, window.height),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            body=json.dumps(self._shown | {"grid": grid}).encode(),
        )


class Stac:
    """Cloud-optimised GeoTIFFs of a STAC API: 8-bit RGB, such as NAIP's "image" or Sentinel-2's "visual"."""

    def __init__(self, api: str, collection: str, asset: str, source: Source, downloader: Downloader):
        """
        Args:
          api: the API's root, https://HOST/v1 or the like; assets need https links that ask for no key.
        Raises:
          UserError: rasterio is missing, or no collection is named.
        """
        _rasterio()
        if not collection:
            raise UserError("--collection: expected the name of a collection of the STAC API")
        self.source, self._downloader = source, downloader
        self._api, self._collection, self._asset = api.rstrip("/"), collection, asset

    def image(self, window: Window) -> UInt8[np.ndarray, "H W 3"]:
        """The newest item's pixels, and where it has none, those of older ones.

        Raises NoImagery: no item, or a part of the window that no item covers. FetchError, UserError.
        """
        result = np.zeros((window.height, window.width, 3), np.uint8)
        missing = np.ones((window.height, window.width), bool)
        for href in self._links(window):
            pixels, valid = self._read(href, window)
            fill = missing & valid
            result[fill] = pixels[fill]
            missing &= ~valid
            if not missing.any():
                return result
        share = missing.mean()
        raise NoImagery(
            f"{urlsplit(self._api).hostname}: {share:.0%} of a window in no {self._collection} item"
        )

    def _links(self, window: Window) -> Iterator[str]:
        west, south, east, north = window.bounds
        query = {"collections": self._collection, "limit": _ITEMS, "sortby": "-properties.datetime"}
        query["bbox"] = f"{west:.7f},{south:.7f},{east:.7f},{north:.7f}"
        body = self._downloader.download(f"{self._api}/search?{urlencode(query)}", _JSON).body
        host = urlsplit(self._api).hostname
        try:
            items = json.loads(body)["features"]
            links = [item["assets"].get(self._asset, {}).get("href") for item in items]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{host}: the answer is no STAC item collection; check --tiles") from None
        if items and not any(links):
            known = ", ".join(sorted(items[0]["assets"]))[:200]
            raise UserError(f"--asset {self._asset}: items of {self._collection} have {known}")
        yield from (link for link in links if link)

    def _read(self, href: str, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Pixels on the window's grid, and which of them the file has."""
        rasterio = _rasterio()
        from rasterio.enums import ColorInterp, Resampling
        from rasterio.vrt import WarpedVRT

        west, pixel, _, north, _, down = window.transform
        grid = {"transform": rasterio.Affine(pixel, 0, west, 0, down, north), "crs": "EPSG:3857"}
        grid |= {"width": window.width, "height": window.height, "resampling": Resampling.bilinear}
        where = urlsplit(href).hostname
        opener = _opener(self._downloader, href)
        try:
            # No listing of folders, no side files, no other driver: a VRT could name files of this machine
            with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED="NO"):
                with rasterio.open(_NAME, driver="GTiff", opener=opener) as file:
                    if file.count < 3 or file.dtypes[0] != "uint8":
                        raise UserError(
                            f"{where}: {file.count} bands of {file.dtypes[0]}; expected 8-bit RGB"
                        )
                    # what lies beyond the file must be told from black; it may have its own way to say so
                    alpha = file.nodata is None and ColorInterp.alpha not in file.colorinterp
                    with WarpedVRT(file, add_alpha=alpha, **grid) as warped:
                        pixels = warped.read([1, 2, 3])
                        valid = warped.dataset_mask() > 0
        except rasterio.errors.RasterioError as error:
            raise UserError(f"{where}: a GeoTIFF that cannot be read ({type(error).__name__})") from None
        return np.moveaxis(pixels, 0, -1), valid


def _rasterio():
    try:
        import rasterio
    except ImportError:
        raise UserError("--provider stac: needs rasterio: pip install 'mmrstraj-jax[geo]'") from None
    return rasterio


def _opener(downloader: Downloader, url: str) -> Callable[..., "_Remote"]:
    """What opens _NAME for GDAL, which asks for side files by other names too. All share the blocks read."""

    @functools.lru_cache(maxsize=64)
    def block(number: int) -> tuple[bytes, int]:
        first = number * _BLOCK
        part = downloader.download(url, (), headers={"Range": f"bytes={first}-{first + _BLOCK - 1}"})
        return part.body, part.total

    def opened(name: str, mode: str = "rb", **_) -> _Remote:
        if mode != "rb" or PurePath(name).name != _NAME:
            raise FileNotFoundError(name)
        return _Remote(block)

    return opened


class _Remote(io.RawIOBase):
    """A file read in blocks: number -> (bytes, size of the whole file)."""

    def __init__(self, block: Callable[[int], tuple[bytes, int]]):
        self._block, self._at, self._size = block, 0, block(0)[1]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._at + size, self._size)
        numbers = range(self._at // _BLOCK, math.ceil(end / _BLOCK))
        data = b"".join(self._block(number)[0] for number in numbers)
        start = self._at - (self._at // _BLOCK) * _BLOCK
        result = data[start : start + max(end - self._at, 0)]
        self._at += len(result)
        return result
