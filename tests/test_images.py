"""Files to RGB, RGB to views: bit-equal to the reference, and a defined answer to every odd file."""

import hashlib
import io
import json
import pathlib
import struct
import types
import warnings

import data_case
import numpy as np
import pytest
from image_zoo import deep_png, png, tiff
from PIL import Image, TiffImagePlugin

from mmrstraj_jax.config import AnyResConfig
from mmrstraj_jax.data import anyres, images
from mmrstraj_jax.data.images import ImagePolicy
from mmrstraj_jax.errors import UserError

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "images.json").read_text())
ODD_SIZES = [(1, 40), (40, 1), (1200, 9), (9, 700), (385, 384), (384, 384), (100, 101), (640, 480), (1, 1)]
ODD_SIZES += [(333, 517), (512, 512), (57, 900), (769, 383)]


def policy(view_size):
    return AnyResConfig(policy="anyres_max_9").for_views(view_size, 14)


@pytest.mark.parametrize(
    "case", GOLDEN, ids=lambda case: f"{case['width']}x{case['height']}-{case['view_size']}"
)
def test_committed_hashes_of_views(case):
    """Made by golden/make_images.py, which checks them against transformers."""
    at = policy(case["view_size"])
    image = data_case.picture(case["width"], case["height"])
    plan = anyres.plan_multi_image(at) if case["kind"] == "square" else anyres.plan(*image.size, at)
    found = images.views(image, plan, case["view_size"])
    assert list(found.shape) == case["shape"]
    assert hashlib.sha256(found.tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("view_size, sizes", [(104, ODD_SIZES), (384, ODD_SIZES[1:4:2])])
def test_bit_equal_to_the_reference_processor(view_size, sizes):
    module = pytest.importorskip("transformers.models.llava_onevision.image_processing_pil_llava_onevision")
    at = policy(view_size)
    processor = module.LlavaOnevisionImageProcessorPil(
        size={"height": view_size, "width": view_size},
        image_grid_pinpoints=[list(pair) for pair in at.grid_pinpoints],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_rescale=False,
        do_normalize=False,
    )
    for size in sizes:
        image = data_case.picture(*size)
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        found = images.views(image, anyres.plan(*size, at), view_size)
        np.testing.assert_array_equal(found.transpose(0, 3, 1, 2), expected, err_msg=str(size))
    pair = [data_case.picture(50, 90), data_case.picture(64, 64)]
    padded = processor([pair], image_mean=[0.5] * 3, return_tensors="np")["pixel_values"]
    for image, expected in zip(pair, padded, strict=True):
        found = images.views(image, anyres.plan_multi_image(at), view_size)
        np.testing.assert_array_equal(found.transpose(0, 3, 1, 2), expected[:1])


def test_video_frames_are_resized_whole():
    frames = [data_case.picture(30, 20, seed) for seed in range(3)]
    found = images.views(frames, anyres.plan_video(3, data_case.TINY), 112)
    assert found.shape == (3, 112, 112, 3)
    np.testing.assert_array_equal(
        found[2], np.asarray(frames[2].resize((112, 112), Image.Resampling.BICUBIC))
    )


def saved(tmp_path, image, name, **how):
    path = tmp_path / name
    image.save(path, **how)
    return path


def test_modes_become_rgb_as_pil_does_it(tmp_path):
    rgb = data_case.picture(31, 17)
    palette = rgb.quantize(16)
    palette.info["transparency"] = b"\x00\x80" + b"\xff" * 14
    zoo = {
        "cmyk.jpg": rgb.convert("CMYK"),
        "grey.png": rgb.convert("L"),
        "bits.png": rgb.convert("1"),
        "palette.png": rgb.quantize(16),
        "palette_alpha.png": palette,
        "alpha.png": rgb.convert("RGBA"),
        "grey_alpha.png": rgb.convert("LA"),
        "photo.jpg": rgb,
        "photo.webp": rgb,
        "photo.tif": rgb,
        "photo.gif": rgb,
    }
    for name, image in zoo.items():
        how = {"transparency": palette.info["transparency"]} if name == "palette_alpha.png" else {}
        path = saved(tmp_path, image, name, **how)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = images.load(path)
        assert found.mode == "RGB" and found.size == images.size(path) == (31, 17), name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = Image.open(path).convert("RGB")
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), err_msg=name)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [data_case.picture(20, 10, seed) for seed in range(3)]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(path) as reference:
        np.testing.assert_array_equal(np.asarray(images.load(path)), np.asarray(reference.convert("RGB")))


def test_sixteen_bits_are_refused_or_stretched(tmp_path):
    values = np.linspace(200, 3000, 40 * 20).reshape(20, 40).astype(np.uint16)
    path = saved(tmp_path, Image.fromarray(values), "reflectance.tif")
    for read in (images.load, images.size):
        with pytest.raises(UserError, match="reflectance.tif: more than 8 bits"):
            read(path)
    found = np.asarray(images.load(path, ImagePolicy(deep="stretch")))
    assert found.min() == 0 and found.max() == 255 and 120 < found.mean() < 135
    flat = saved(tmp_path, Image.fromarray(np.full((5, 5), 7, np.uint16)), "flat.png")
    assert np.asarray(images.load(flat, ImagePolicy(deep="stretch"))).max() == 0
    with pytest.raises(UserError, match="more than 8 bits"):
        images.load(Image.fromarray(values))


def test_what_was_not_measured_does_not_spoil_the_stretch(tmp_path):
    """A thermal scene of 280 to 310 K with a tenth that no orbit saw."""
    values = np.linspace(280, 310, 1000, dtype=np.float32).reshape(20, 50)
    whole = np.asarray(images.load(Image.fromarray(values), ImagePolicy(deep="stretch")))
    for number, (hole, nodata) in enumerate([(np.nan, None), (-np.inf, None), (-9999, "-9999"), (0, "0")]):
        holed = np.pad(values, ((2, 0), (0, 0)), constant_values=hole)
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        if nodata:
            tags[42113] = nodata
        path = saved(tmp_path, Image.fromarray(holed), f"{number}.tif", tiffinfo=tags)
        found = np.asarray(images.load(path, ImagePolicy(deep="stretch")))
        assert (found[:2] == 0).all()
        np.testing.assert_array_equal(found[2:], whole)
    nothing = Image.fromarray(np.full((4, 4), np.nan, np.float32))
    assert np.asarray(images.load(nothing, ImagePolicy(deep="stretch"))).max() == 0


def test_several_deep_bands_are_never_cut_to_their_upper_bits(tmp_path):
    """Pillow opens them as 8-bit RGB; reflectances of 200 to 3000 would become 0 to 11."""
    for name, data in (
        ("deep.png", deep_png(8, 4)),
        ("deep.tif", tiff(8, 4, 16)),
        ("alpha.tif", tiff(8, 4, 16, 4)),
        ("deep.ppm", b"P6 8 4 65535\n" + bytes(8 * 4 * 6)),
        ("twelve.ppm", b"P6 8 4 4095\n" + bytes(8 * 4 * 6)),
        ("plain.ppm", b"P3 1 1 4095\n200 900 3000\n"),
        ("deep.jp2", deep_jp2()),
        ("deep.j2k", deep_jp2(no_jp2=True)),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with Image.open(path) as image:
            assert image.mode in ("RGB", "RGBA")
        for deep in ("refuse", "stretch"):
            for read in (images.load, images.size):
                with pytest.raises(UserError, match=f"{name}: several bands deeper than 8 bits"):
                    read(path, ImagePolicy(deep=deep))
                with Image.open(path) as image:  # not decoded yet: the file can still tell
                    with pytest.raises(UserError, match=f"{name}: several bands deeper than 8 bits"):
                        read(image, ImagePolicy(deep=deep))
    (tmp_path / "plain.tif").write_bytes(tiff(8, 4, 8))
    (tmp_path / "eight.ppm").write_bytes(b"P6 8 4 200\n" + bytes(8 * 4 * 3))
    for name in ("plain.jp2", "plain.j2k"):
        data_case.picture(8, 4).save(tmp_path / name)
    for name in ("plain.tif", "eight.ppm", "plain.jp2", "plain.j2k"):
        assert images.load(tmp_path / name).size == images.size(tmp_path / name) == (8, 4)


def test_depth_is_found_where_pillow_names_no_fields():
    """Before Pillow 11 a tile is a plain tuple."""
    for args, deep in ((("RGB;16B", 0, 1), True), ("RGB", False)):
        image = types.SimpleNamespace(format="PNG", tile=[("zip", (0, 0, 8, 4), 40, args)])
        assert images._has_deep_bands(image) == deep


def odd_tiff(kind: int, value: bytes) -> bytes:
    """A TIFF that says otherwise where its strip lies: behind 2^63 bytes, or at a fraction."""
    data = tiff(8, 4, 8)
    at = data.index(struct.pack("<HHI", 273, 4, 1))
    return data[:at] + struct.pack("<HHII", 273, kind, 1, len(data)) + data[at + 12 :] + value


def deep_jp2(**how) -> bytes:
    """An RGB JPEG 2000 file whose header says 16 bits a band (Pillow writes only 8)."""
    file = io.BytesIO()
    data_case.picture(8, 4).save(file, "JPEG2000", **how)
    data = bytearray(file.getvalue())
    siz = data.index(b"\xff\x4f\xff\x51")
    data[siz + 42 : siz + 51 : 3] = b"\x0f" * 3
    return bytes(data)


def test_a_mosaic_that_is_too_large_is_refused_from_its_header(tmp_path, monkeypatch):
    """A legitimate GeoTIFF of 40,000 x 40,000: named, with what to do; nothing is decoded."""
    path = tmp_path / "mosaic.tif"
    path.write_bytes(tiff(40_000, 40_000, 8, data=b""))
    monkeypatch.setattr(images, "_decode", lambda *_: pytest.fail("decoded"))
    for read in (images.load, images.size):
        with pytest.raises(UserError, match="mosaic.tif: .*pixels.*; cut it into tiles first"):
            read(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_camera_rotation_is_ignored_unless_asked_for(tmp_path, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, data_case.picture(30, 20), "camera.png", exif=exif)
    assert images.load(path).size == images.size(path) == (30, 20)
    turned = ImagePolicy(exif=True)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(np.asarray(images.load(path, turned)), np.asarray(expected))
    assert images.size(path, turned) == expected.size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_by_pillow_once(tmp_path, orientation):
    """Its size too, in either policy: twice would end a run with "its image changed"."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, data_case.picture(30, 20), "camera.tif", exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    for at in (images.DEFAULT, ImagePolicy(exif=True)):
        assert images.size(path, at) == images.load(path, at).size
        np.testing.assert_array_equal(np.asarray(images.load(path, at)), expected)
        with Image.open(path) as image:  # not decoded yet
            assert images.size(image, at) == images.load(image, at).size


def test_damaged_files_are_named(tmp_path):
    whole = io.BytesIO()
    data_case.picture(200, 200).save(whole, "JPEG")
    png = io.BytesIO()
    data_case.picture(60, 60).save(png, "PNG")
    flipped = bytearray(png.getvalue())
    flipped[len(flipped) // 2] ^= 0xFF
    zoo = {
        "cut.jpg": whole.getvalue()[:-2000],
        "cut.png": png.getvalue()[:-200],
        "crc.png": bytes(flipped),
        "empty.png": b"",
        "page.jpg": b"<!DOCTYPE html><html>404</html>",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "header.png": png.getvalue()[:20],
    }
    for name, data in zoo.items():
        path = tmp_path / name
        path.write_bytes(data)
        for at in (images.DEFAULT, ImagePolicy(exif=True)):
            with pytest.raises(UserError, match=name):
                images.load(path, at)
        if name in ("cut.jpg", "cut.png"):
            with Image.open(path) as image, pytest.raises(UserError, match=f"{name}: damaged or truncated"):
                images.load(image)
        if name != "crc.png":  # only decoding finds a flipped bit
            with pytest.raises(UserError, match=name):
                images.size(path)
    with pytest.raises(UserError, match="missing.png: no such image"):
        images.load(tmp_path / "missing.png")
    with pytest.raises(UserError, match="cannot be read"):
        images.load(tmp_path)
    for data in (odd_tiff(16, b"\xff" * 8), odd_tiff(5, struct.pack("<II", 300, 7))):
        with pytest.raises(UserError, match="damaged or truncated"):
            images.load(data)


def test_decompression_bomb_is_refused_from_its_header(tmp_path, monkeypatch):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(50_000, 50_000, 8, b""))
    monkeypatch.setattr(images, "_decode", lambda *_: pytest.fail("decoded"))
    for read in (images.load, images.size):
        with pytest.raises(UserError, match="bomb.png.*tiles"):
            read(bomb)
    wide = saved(tmp_path, data_case.picture(40, 30), "wide.png")
    with pytest.raises(UserError, match="wide.png: 40x30 pixels"):
        images.size(wide, ImagePolicy(max_pixels=1000))


def test_header_only_unless_the_end_is_missing(tmp_path, monkeypatch):
    path = saved(tmp_path, data_case.picture(40, 30), "whole.jpg")
    monkeypatch.setattr(images, "_decode", lambda *_: pytest.fail("decoded"))
    assert images.size(path) == (40, 30)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_extreme_shapes_have_views(size):
    plan = anyres.plan(*size, data_case.TINY)
    assert images.views(Image.new("RGB", size), plan, 112).shape == (plan.num_views, 112, 112, 3)
