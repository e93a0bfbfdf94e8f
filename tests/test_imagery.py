"""Providers against stub servers on this machine; the guard against forged requests; keys stay secret."""

import ast
import io
import json
import socket
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrstraj_jax import build
from mmrstraj_jax.construction import download, fetch, imagery, providers
from mmrstraj_jax.construction.tiles import Window
from mmrstraj_jax.errors import UserError

KEY = "sk-very-secret-key"
SOURCE = imagery.Source("Test tiles", "(c) nobody", "CC0-1.0")


def png(size=(256, 256), color=(10, 20, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


class Stub:
    """A server whose `answer(path)` gives (status, headers, body), or a function of the handler."""

    def __init__(self):
        self.paths, self.answer = [], lambda path: (200, {"Content-Type": "image/png"}, png())
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                stub.paths.append(self.path)
                answer = stub.answer(self.path)
                if callable(answer):
                    return answer(self)
                status, headers, body = answer
                self.send_response(status)
                for name, value in ({"Content-Length": len(body)} | headers).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def stub():
    stub = Stub()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


def downloader(cache, **options):
    options = {"interval": 0.0, "sleep": lambda _: None, "allow_loopback": True} | options
    return download.Downloader(cache, **options)


def get(url, **options):
    return fetch.get(url, fetch.Limits(max_bytes=10_000, seconds=1.0), allow_loopback=True, **options)


# ---- fetch ----


@pytest.mark.parametrize(
    "address",
    "127.0.0.1 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 "
    "::1 :: fe80::1 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::a9fe:a9fe 2002:7f00:1:: "
    "fe80::1%eth0".split(),
)
def test_addresses_that_are_not_public(address):
    assert not fetch.is_public(address)


def test_public_addresses_and_the_test_only_loopback():
    assert fetch.is_public("8.8.8.8") and fetch.is_public("2606:4700:4700::1111")
    assert fetch.is_public("127.0.0.1", True) and not fetch.is_public("10.0.0.1", True)


@pytest.mark.parametrize(
    "url",
    "file:///etc/passwd ftp://example.org/x gopher://x/ http:///x http://u:p@example.org/ http://127.0.0.1/ "
    "http://2130706433/ http://0x7f000001/ http://[::1]/ http://localhost/ http://[::ffff:169.254.169.254]/ "
    "http://169.254.169.254/latest/meta-data http://127.0.0.1:99999/ //example.org/x".split(),
)
def test_urls_that_are_refused_without_a_connection(url, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
    with pytest.raises(fetch.FetchError):
        fetch.get(url)


def test_every_redirect_is_checked(stub, monkeypatch):
    for target in ("http://169.254.169.254/latest", "http://10.1.2.3/", "file:///etc/passwd", "http://[::]/"):
        stub.answer = lambda path, target=target: (302, {"Location": target}, b"")
        with pytest.raises(fetch.FetchError, match="private|scheme"):
            get(stub.url)
    stub.answer = lambda path: (301, {"Location": "/again"}, b"")
    with pytest.raises(fetch.FetchError, match="more than 3 redirects"):
        get(stub.url)
    stub.answer = lambda path: (307, {"Location": "/b"}, b"") if path == "/a" else (200, {}, b"here")
    assert get(stub.url + "/a").body == b"here"


def test_a_name_that_rebinds_changes_nothing(stub, monkeypatch):
    """The second look-up of the name would give the metadata service: there is no second look-up."""
    answers = iter(["127.0.0.1"])
    port = stub.server.server_port
    real = socket.getaddrinfo

    def lookup(host, *args, **kwargs):
        if host == "tiles.example":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]
        assert host == "127.0.0.1", host  # create_connection of the literal, checked address
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert get(f"http://tiles.example:{port}/x").body == png()
    both = [(2, 1, 6, "", ("8.8.8.8", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: both)
    with pytest.raises(fetch.FetchError, match="private or local"):
        fetch.get("http://half.example/")


def test_size_time_and_encoding_limits(stub):
    stub.answer = lambda path: (200, {"Content-Length": 10**10}, b"")
    with pytest.raises(fetch.FetchError, match="10000000000 bytes announced"):
        get(stub.url)

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x" * 4096)
        except OSError:
            pass

    stub.answer = lambda path: endless
    with pytest.raises(fetch.FetchError, match="more than 10000 bytes"):
        get(stub.url)

    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(100):
                handler.wfile.write(b"x")
                time.sleep(0.1)
        except OSError:
            pass

    stub.answer = lambda path: drip
    start = time.monotonic()
    with pytest.raises(fetch.FetchError, match="within 1 s") as caught:
        get(stub.url)
    assert time.monotonic() - start < 3 and caught.value.retryable
    stub.answer = lambda path: (200, {"Content-Encoding": "gzip"}, b"x")
    with pytest.raises(fetch.FetchError, match="compressed"):
        get(stub.url)
    stub.answer = lambda path: (200, {"Content-Length": 50}, b"short")
    with pytest.raises(fetch.FetchError) as caught:
        get(stub.url)
    assert caught.value.retryable
    stub.answer = lambda path: (429, {"Retry-After": "7"}, b"")
    with pytest.raises(fetch.FetchError) as caught:
        get(stub.url)
    assert caught.value.retryable and caught.value.retry_after == 7


# ---- providers ----


def test_xyz_caches_retries_and_stitches(stub, tmp_path):
    failures = iter([503, 429])
    pauses = []

    def answer(path):
        status = next(failures, 200)
        x, y = (int(part) for part in path.removesuffix(".png").split("/")[-2:])
        body = png(color=(x % 256, y % 256, 0)) if status == 200 else b""
        return status, {"Content-Type": "image/png"}, body

    stub.answer = answer
    provider = providers.XYZ(stub.url + "/{z}/{x}/{y}.png", SOURCE, downloader(tmp_path, sleep=pauses.append))
    window = Window(18, 44964 * 256 + 100, 104674 * 256 + 100, 512, 512)
    image = provider.image(window)
    assert len(stub.paths) == 9 + 2 and 0.5 <= pauses[0] <= 1.5 and 1 <= pauses[1] <= 3
    assert image[0, 0].tolist() == [44964 % 256, 104674 % 256, 0]
    assert image[511, 511].tolist() == [44966 % 256, 104676 % 256, 0]
    assert np.array_equal(provider.image(window), image) and len(stub.paths) == 11  # all from the cache
    stub.answer = lambda path: (200, {"Content-Type": "image/jpg"}, png())  # not its name, but often said
    provider.image(Window(18, 0, 0, 256, 256))
    stub.answer, stub.paths[11:] = answer, []
    cached = next(path for path in tmp_path.rglob("44964/*") if path.is_file())
    cached.write_bytes(cached.read_bytes()[:40])
    with pytest.warns(UserWarning, match="downloaded again"):
        assert np.array_equal(provider.image(window), image)
    assert len(stub.paths) == 12


@pytest.mark.parametrize(
    ("headers", "body", "message"),
    [
        ({"Content-Type": "text/html"}, png(), "content type 'text/html'"),
        ({"Content-Type": "image/png"}, b"<html>no tile here</html>", "not a PNG or JPEG"),
        ({"Content-Type": "image/png"}, png()[:60], "damaged PNG"),
        ({"Content-Type": "image/png"}, png((512, 512)), r"\(512, 512\) pixels, expected \(256, 256\)"),
        ({"Content-Type": "image/png"}, b"GIF89a" + b"\0" * 50, "not a PNG or JPEG"),
    ],
)
def test_what_is_no_tile_is_refused_and_not_cached(stub, tmp_path, headers, body, message):
    stub.answer = lambda path: (200, headers, body)
    provider = providers.XYZ(stub.url + "/{z}/{x}/{-y}", SOURCE, downloader(tmp_path))
    with pytest.raises(UserError, match=message):
        provider.image(Window(3, 0, 0, 256, 256))
    assert stub.paths == ["/3/0/7"] and not list(tmp_path.iterdir())


def test_retries_are_bounded_and_404_is_final(stub, tmp_path):
    stub.answer = lambda path: (500, {}, b"")
    provider = providers.XYZ(stub.url + "/{z}/{x}/{y}", SOURCE, downloader(tmp_path, tries=3))
    with pytest.raises(fetch.FetchError, match="500"):
        provider.image(Window(3, 0, 0, 256, 256))
    assert len(stub.paths) == 3
    stub.answer = lambda path: (404, {}, b"")
    with pytest.raises(imagery.NoImagery, match="404"):
        provider.image(Window(3, 0, 0, 256, 256))
    assert len(stub.paths) == 4


def test_google_static_signs_and_is_never_stored(stub, monkeypatch, tmp_path):
    # the worked example of Google's documentation on digital signatures
    url = "https://maps.googleapis.com/maps/api/geocode/json?address=New+York&client=clientID"
    assert providers.sign(url, "vNIXE0xscrmjlyV-12Nj_BvUPaw=") == "chaRF2hTJKOScPr-RQCEhZbSzIE="
    provider = providers.GoogleStatic(downloader(None), endpoint=stub.url + "/maps/api/staticmap")
    window = Window(19, 45000 * 512, 104674 * 512)
    monkeypatch.delenv("GOOGLE_MAPS_API_KEY", raising=False)
    with pytest.raises(UserError, match="GOOGLE_MAPS_API_KEY: not set"):
        provider.image(window)
    monkeypatch.setenv("GOOGLE_MAPS_API_KEY", KEY)
    monkeypatch.setenv("GOOGLE_MAPS_URL_SECRET", "vNIXE0xscrmjlyV-12Nj_BvUPaw=")
    stub.answer = lambda path: (200, {"Content-Type": "image/png"}, png((512, 512)))
    assert provider.image(window).shape == (512, 512, 3)
    (path,) = stub.paths
    assert "&zoom=19&size=512x512&scale=1&maptype=satellite&format=png&key=" in path and "&signature=" in path
    lat, lon = (float(part) for part in path.split("center=")[1].split("&")[0].split(","))
    assert np.allclose(window.pixels(lat, lon), 256, atol=0.1)
    with pytest.raises(UserError, match="at most 640"):
        provider.image(Window(19, 0, 0, 700, 512))
    with pytest.raises(UserError, match="forbid a cache"):
        providers.GoogleStatic(downloader(tmp_path))
    settings = providers.ProviderSettings(provider="google", key_variable="MY_KEY")
    with pytest.raises(UserError, match="MY_KEY: not set"):
        providers.provider_of(settings, downloader(None)).image(window)


def test_keys_appear_in_no_error_file_or_record(stub, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TILE_KEY", KEY)
    template = stub.url + "/{key}/{z}/{x}/{y}.png?token={key}"
    provider = providers.XYZ(template, SOURCE, downloader(tmp_path / "cache", tries=2), "TILE_KEY")
    window = Window(3, 0, 0, 256, 256)
    imagery.save(tmp_path / "a.png", provider.image(window), window, provider.source)
    assert KEY in stub.paths[0]
    stub.answer = lambda path: (403, {}, path.encode())
    bad = [
        stub.answer,
        lambda path: (302, {"Location": f"http://10.0.0.1{path}"}, b""),
        lambda path: (500, {}, b""),
    ]
    bad.append(lambda path: (200, {"Content-Type": "image/png"}, b"junk"))
    bad.append(lambda path: lambda handler: handler.connection.shutdown(socket.SHUT_RDWR))
    for answer in bad:
        stub.answer = answer
        with pytest.raises(UserError) as caught:
            provider.image(Window(3, 256, 0, 256, 256))
        assert KEY not in "".join(traceback.format_exception(caught.value)) + repr(vars(provider))
    for path in tmp_path.rglob("*"):
        assert KEY not in str(path) and (path.is_dir() or KEY.encode() not in path.read_bytes())
    assert KEY not in "".join(capfd.readouterr())
    with pytest.raises(UserError, match="go together"):
        providers.XYZ(template, SOURCE, downloader(None))


def test_local_folder_and_the_record_beside_an_image(tmp_path):
    for x in (4, 5):
        path = tmp_path / "tiles" / "3" / str(x) / "2.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(png(color=(x, 0, 0)))
    provider = providers.TileFolder(tmp_path / "tiles", SOURCE)
    window = Window(3, 4 * 256 + 128, 2 * 256, 256, 256)
    image = provider.image(window)
    assert image[0, [0, 127, 128, 255], 0].tolist() == [4, 4, 5, 5]
    lat, lon = window.center
    drawn = imagery.draw_track(image, window, np.array([lat, lat]), np.array([lon, lon + 10]))
    assert drawn[128, 140].tolist() == [255, 40, 40] and not np.array_equal(drawn, image)
    record = imagery.save(tmp_path / "out" / "a.png", image, window, SOURCE, trip="t1", anchor="medoid")
    text = (tmp_path / "out" / "a.json").read_bytes()
    assert json.loads(text)["provider"]["licence"] == "CC0-1.0" and record["trip"] == "t1"
    assert json.loads(text)["gsd_metres"] == window.gsd and len(json.loads(text)["transform"]) == 6
    imagery.save(tmp_path / "out" / "a.png", image, window, SOURCE, trip="t1", anchor="medoid")
    assert (tmp_path / "out" / "a.json").read_bytes() == text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.json", "a.png"]
    with pytest.raises(imagery.NoImagery, match="needs this tile"):
        provider.image(Window(3, 0, 0, 256, 256))
    with pytest.raises(UserError, match="tile pattern"):
        providers.TileFolder(tmp_path, SOURCE, "{z}/{x}.png")


def test_a_decompression_bomb_is_refused_by_its_header():
    body = bytearray(png((8, 8)))
    body[16:24] = (50_000).to_bytes(4, "big") * 2
    with pytest.raises(UserError, match="damaged|pixels"):
        imagery.decode(bytes(body), "bomb")


def test_the_rate_limit_spaces_the_starts():
    waits = []
    limiter = download.RateLimiter(10.0, waits.append)
    for _ in range(3):
        limiter.wait()
    assert len(waits) == 2 and 9.9 < waits[0] <= 10 and 19.9 < waits[1] <= 20


def test_no_archive_is_unpacked_and_no_pickle_read():
    """Zip-slip and code in data need a module that opens such files: the factory has none."""
    files = [Path(build.__file__), *Path(fetch.__file__).parent.glob("*.py")]
    assert len(files) > 20
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & {"zipfile", "tarfile", "pickle", "shelve", "marshal", "unpack_archive"}, file


def encoded(pixels, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "PNG")
    return buffer.getvalue()


def test_transparent_tiles_are_no_imagery_and_deep_ones_are_refused():
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[..., :3] = 90
    with pytest.raises(imagery.NoImagery, match="fully transparent"):
        imagery.decode(encoded(clear), "t")
    clear[0, 0, 3] = 1
    assert (imagery.decode(encoded(clear), "t") == 90).all()
    for value in (0, 40_000):
        with pytest.raises(UserError, match="deeper than 8 bits") as caught:
            imagery.decode(encoded(np.full((8, 8), value, np.uint16)), "t")
        assert not isinstance(caught.value, imagery.NoImagery)
    for damaged in (b"", b"<html>", png()[:60]):
        with pytest.raises(imagery.DamagedImage):
            imagery.decode(damaged, "t")
