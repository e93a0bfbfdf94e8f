"""Earth Engine and STAC against servers on this machine; the part that reads GeoTIFFs where rasterio is."""

import io
import json
import sys

import numpy as np
import pytest
from test_imagery import KEY, SOURCE, downloader, png, stub  # noqa: F401

from mmrstraj_jax.construction import fetch, providers, remote_providers
from mmrstraj_jax.construction.imagery import NoImagery
from mmrstraj_jax.construction.tiles import window_at
from mmrstraj_jax.errors import UserError

ASSET = "projects/earthengine-public/assets/USDA/NAIP/DOQQ/m_1"
WINDOW = window_at(34.05, -118.25, 18, 64)


def engine(stub, cache=None, **changes):  # noqa: F811
    options = {"bands": ("R", "G", "B"), "limits": (0.0, 255.0)} | changes
    return remote_providers.EarthEngine(
        ASSET, options["bands"], options["limits"], SOURCE, downloader(cache), endpoint=f"{stub.url}/v1"
    )


def posted(stub, answers):  # noqa: F811
    """Lets the stub take POST; the requests it saw."""
    seen = []

    def do_POST(handler):
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        seen.append((handler.path, dict(handler.headers), json.loads(body)))
        status, headers, body = next(answers)
        handler.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(body)

    stub.server.RequestHandlerClass.do_POST = do_POST
    return seen


def test_earth_engine_asks_for_the_windows_own_grid(stub, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("EARTHENGINE_TOKEN", KEY)
    good = (200, {"Content-Type": "image/png"}, png((64, 64), (1, 2, 3)))
    seen = posted(stub, iter([(429, {}, b""), good]))
    provider = engine(stub, tmp_path)
    image = provider.image(WINDOW)
    assert image.shape == (64, 64, 3) and image[0, 0].tolist() == [1, 2, 3]
    path, headers, body = seen[1]
    assert path == f"/v1/{ASSET}:getPixels" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["bandIds"] == ["R", "G", "B"] and body["fileFormat"] == "PNG"
    west, pixel, _, north, _, down = WINDOW.transform
    assert body["grid"]["crsCode"] == "EPSG:3857"
    assert body["grid"]["dimensions"] == {"width": 64, "height": 64}
    assert body["grid"]["affineTransform"] == {
        "scaleX": pixel, "shearX": 0, "translateX": west, "shearY": 0, "scaleY": down, "translateY": north,
    }  # fmt: skip
    assert np.array_equal(provider.image(WINDOW), image) and len(seen) == 2  # from the cache
    assert not any(KEY in path.as_posix() or KEY.encode() in path.read_bytes() for path in files(tmp_path))


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_token_follows_no_redirect_and_is_in_no_message(stub, monkeypatch):  # noqa: F811
    monkeypatch.setenv("EARTHENGINE_TOKEN", KEY)
    seen = posted(stub, iter([(302, {"Location": f"{stub.url}/elsewhere"}, b"")]))
    with pytest.raises(fetch.FetchError, match="more than 0 redirects") as error:
        engine(stub).image(WINDOW)
    assert len(seen) == 1 and not stub.paths and KEY not in str(error.value)
    posted(stub, iter([(404, {}, KEY.encode())]))
    with pytest.raises(NoImagery) as error:
        engine(stub).image(WINDOW)
    assert KEY not in str(error.value)


def test_earth_engine_settings(stub, monkeypatch):  # noqa: F811
    monkeypatch.delenv("EARTHENGINE_TOKEN", raising=False)
    with pytest.raises(UserError, match="EARTHENGINE_TOKEN: not set"):
        engine(stub).image(WINDOW)
    with pytest.raises(UserError, match="expected three bands"):
        engine(stub, bands=("N",))
    terms = {"title": "T", "attribution": "A", "licence": "L"}
    config = providers.ProviderSettings("earthengine", "NAIP", **terms)
    with pytest.raises(UserError, match="--tiles NAIP: expected an asset"):
        providers.provider_of(config, downloader(None))
    config = providers.ProviderSettings("earthengine", ASSET, value_range="9", **terms)
    with pytest.raises(UserError, match="--value-range 9: expected LOW:HIGH"):
        providers.provider_of(config, downloader(None))


# ---- STAC ----


def test_stac_without_rasterio_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(UserError, match=r"needs rasterio: pip install 'mmrstraj-jax\[geo\]'"):
        remote_providers.Stac("https://example.org", "naip", "image", SOURCE, downloader(None))


def cog(path, window, color, valid_columns):
    """A tiled GeoTIFF in a UTM zone, valid in its first columns, twice the window's size."""
    rasterio = pytest.importorskip("rasterio")
    from rasterio.warp import transform

    lat, lon = window.center
    (x,), (y,) = transform("EPSG:4326", "EPSG:32611", [lon], [lat])
    side, gsd = 256, 2 * 64 * window.gsd / 256
    pixels = np.zeros((4, side, side), np.uint8)
    pixels[:3] = np.array(color)[:, None, None]
    pixels[1] += np.arange(side, dtype=np.uint8)[None] // 4
    pixels[3, :, :valid_columns] = 255
    place = rasterio.Affine(gsd, 0, x - side / 2 * gsd, 0, -gsd, y + side / 2 * gsd)
    shape = {"width": side, "height": side, "count": 4, "dtype": "uint8", "crs": "EPSG:32611"}
    options = {"transform": place, "tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "deflate"}
    with rasterio.open(path, "w", driver="GTiff", **shape, **options) as file:
        file.write(pixels)
        file.colorinterp = [rasterio.enums.ColorInterp(n) for n in (3, 4, 5, 6)]
    return path.read_bytes()


def serve(stub, bodies):  # noqa: F811
    """Ranges of files, and a search that finds them all, newest first."""
    items = [{"assets": {"image": {"href": f"{stub.url}/{name}"}}} for name in bodies]

    def answer(path):
        if path.startswith("/search?"):
            return 200, {"Content-Type": "application/geo+json"}, json.dumps({"features": items}).encode()
        body = bodies.get(path[1:])

        def part(handler):
            if body is None:
                return handler.send_error(404)
            first, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
            chunk = body[first : last + 1]
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {first}-{first + len(chunk) - 1}/{len(body)}")
            handler.send_header("Content-Length", str(len(chunk)))
            handler.end_headers()
            handler.wfile.write(chunk)

        return part

    stub.answer = answer


def test_stac_fills_a_window_from_the_newest_items(stub, tmp_path, monkeypatch):  # noqa: F811
    new, old = (
        cog(tmp_path / "n.tif", WINDOW, (200, 0, 0), 128),
        cog(tmp_path / "o.tif", WINDOW, (0, 0, 90), 256),
    )
    monkeypatch.setattr(remote_providers, "_BLOCK", 4096)
    serve(stub, {"new.tif": new, "old.tif": old})
    image = remote_providers.Stac(stub.url, "naip", "image", SOURCE, downloader(None)).image(WINDOW)
    assert (image[:, :24, 0] == 200).all() and (image[:, :24, 2] == 0).all()  # the newer one has the west
    assert (image[:, 40:, 2] == 90).all() and (image[:, 40:, 0] == 0).all()
    # the file's columns in place: 256 of them are 128 of the window's pixels, green grows by 1 in 4
    expected = (np.arange(64) * 2 + 64) / 4
    assert np.abs(image[32, :, 1] - expected).max() <= 2
    west, south, east, north = WINDOW.bounds
    assert f"bbox={west:.7f}%2C{south:.7f}" in stub.paths[0] and "collections=naip" in stub.paths[0]


def test_stac_that_lacks_the_window(stub, tmp_path):  # noqa: F811
    provider_of = remote_providers.Stac
    half = cog(tmp_path / "h.tif", WINDOW, (9, 9, 9), 128)
    serve(stub, {"half.tif": half})
    with pytest.raises(NoImagery, match="% of a window in no naip item"):
        provider_of(stub.url, "naip", "image", SOURCE, downloader(None)).image(WINDOW)
    with pytest.raises(UserError, match="--asset visual: items of naip have image"):
        provider_of(stub.url, "naip", "visual", SOURCE, downloader(None)).image(WINDOW)
    serve(stub, {"bad.tif": b"<VRTDataset>file:///etc/passwd</VRTDataset>"})
    with pytest.raises(UserError, match="a GeoTIFF that cannot be read"):
        provider_of(stub.url, "naip", "image", SOURCE, downloader(None)).image(WINDOW)
    stub.answer = lambda path: (200, {"Content-Type": "application/json"}, b'{"hello": 1}')
    with pytest.raises(UserError, match="no STAC item collection"):
        provider_of(stub.url, "naip", "image", SOURCE, downloader(None)).image(WINDOW)


def test_a_remote_file_reads_like_a_local_one(stub, monkeypatch):  # noqa: F811
    monkeypatch.setattr(remote_providers, "_BLOCK", 10)
    body = bytes(range(57))
    serve(stub, {"a": body})
    remote, local = remote_providers._opener(downloader(None), f"{stub.url}/a")("image.tif"), io.BytesIO(body)
    for offset, whence, size in ((0, 0, 5), (3, 1, 20), (-4, 2, 9), (50, 0, -1), (60, 0, 3), (10, 0, 10)):
        assert remote.seek(offset, whence) == local.seek(offset, whence)
        assert remote.read(size) == local.read(size) and remote.tell() == local.tell()
    with pytest.raises(FileNotFoundError):
        remote_providers._opener(downloader(None), f"{stub.url}/a")("image.tif.aux.xml")
    stub.answer = lambda path: (200, {}, body)  # a server that ignores ranges
    with pytest.raises(fetch.FetchError, match="HTTP status 200"):
        remote_providers._opener(downloader(None), f"{stub.url}/b")("image.tif")
