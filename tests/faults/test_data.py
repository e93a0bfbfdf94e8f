"""Faults of the data path, with real worker processes that die, raise or hang, and files that attack."""

import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import replace

import data_case
import image_zoo
import jax
import numpy as np
import pytest
from PIL import Image

from mmrstraj_jax.config import LoaderConfig
from mmrstraj_jax.data import records
from mmrstraj_jax.data.collate import Sizes
from mmrstraj_jax.data.index import build_index
from mmrstraj_jax.data.loader import Loader
from mmrstraj_jax.data.schedule import Schedule
from mmrstraj_jax.errors import UserError

pytestmark = pytest.mark.faults
SIZES = Sizes((1, 2, 3, 5, 7, 10, 37), 32, 1024)
MIXED = [(100, 100), (200, 150), None, (112, 300), (90, 110), (230, 230), (50, 60), (100, 90), (30, 40)]
TOKENIZER = data_case.tokenizer()


def build(folder, sizes=MIXED, kind=Loader, packing=False):
    index = build_index(records.load(str(data_case.dataset(folder, sizes))), TOKENIZER, data_case.TINY, SIZES)
    schedule = Schedule(index, SIZES, 3, seed=1, packing=packing)
    return kind(index, schedule, TOKENIZER, data_case.TINY)


def stream(loader, start, stop, **how):
    return list(replace(loader, how=LoaderConfig(**how)).iterate(start, stop))


IN_THREADS = {"threads": 3}, {"threads": 2, "prefetch": 7}
IN_PROCESSES = {"workers": 2, "prefetch": 1}, {"workers": 4}


@pytest.mark.parametrize(
    "packing, hows", [(False, (*IN_THREADS, *IN_PROCESSES)), (True, (*IN_THREADS, IN_PROCESSES[0]))]
)
def test_row_22_workers_prefetch_and_resume_change_no_sample(tmp_path, packing, hows):
    """0, 2 and 4 processes, other depths, every second one from the middle of epoch 2: equal bytes."""
    loader = build(tmp_path, packing=packing)
    stop = 2 * loader.schedule.steps_per_epoch
    expected = [loader(step) for step in range(stop)]
    for number, how in enumerate(hows):
        start = number % 2 * (loader.schedule.steps_per_epoch + 1)
        found = stream(loader, start, stop, **how)
        assert [item[0] for item in found] == list(range(start, stop))
        for mine, other in zip(expected[start:], found, strict=True):
            assert mine[1] == other[1]
            jax.tree.map(np.testing.assert_array_equal, mine[2], other[2])


class Faulty(Loader):
    """Does `fault` at row 5, and only in a stream."""

    def _example(self, row):
        if row == 5 and self.trace is not None:
            time.sleep(1)  # batches before it leave the worker
            self.fault()
        return super()._example(row)


class Dies(Faulty):
    def fault(self):
        os.kill(os.getpid(), 9)


class LeavesQuietly(Faulty):
    def fault(self):
        os._exit(0)  # no exit code tells of it


class Raises(Faulty):
    def fault(self):
        raise UserError("row 5 (id row5): cannot be read")


class Hangs(Faulty):
    def fault(self):
        time.sleep(600)


@pytest.mark.parametrize(
    "kind, workers, message",
    [
        (Dies, 2, "died.*exit code -9"),
        (LeavesQuietly, 1, "stopped.*no batch for"),
        (Raises, 1, "cannot be read"),
        (Hangs, 0, "stopped.*no batch for"),
        (Hangs, 2, "stopped.*no batch for"),
    ],
)
def test_row_23_a_worker_that_dies_raises_or_hangs_ends_the_stream(tmp_path, kind, workers, message):
    """Within the timeout, with the sample's id, and nothing of it stays behind."""
    loader = build(tmp_path, kind=kind)
    guilty = next(step for step in range(3) if "row5" in loader.ids(step))
    assert guilty > 0  # the first batch may take longer
    got, begin = [], time.monotonic()
    with pytest.raises((RuntimeError, UserError), match=r"row 5 .*\(id row5\)") as error:
        for item in replace(loader, how=LoaderConfig(workers=workers, prefetch=1, timeout=15)).iterate(0, 3):
            got.append(item[0])
    assert time.monotonic() - begin < 200
    assert got == list(range(len(got))) and len(got) <= guilty  # nothing of the batch itself came
    assert re.search(message, str(error.value)), error.value
    deadline = time.monotonic() + 10
    while workers and children() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not children()


def children() -> list[str]:
    return [child.name for child in multiprocessing.active_children() if child.name.startswith("grain-")]


LIMITED = """
import resource, sys
from mmrstraj_jax.data import images
from mmrstraj_jax.errors import UserError
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    for read in (images.size, images.load):
        try:
            read(path)
        except UserError as error:
            print(error)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
assert grown < 20_000, f"{grown} KiB"
"""


def test_rows_32_and_33_bombs_and_mosaics_take_no_memory(tmp_path):
    """Real content behind the header: decoded it would be 7.5 GB. Under a limit of 4 GB of address space."""
    (tmp_path / "bomb.png").write_bytes(image_zoo.bomb(20_000, 10_000))
    (tmp_path / "huge.png").write_bytes(image_zoo.png(50_000, 50_000, 8, b""))
    (tmp_path / "mosaic.tif").write_bytes(image_zoo.tiff(40_000, 40_000, 8, data=b"\0" * 100))
    names = ("bomb.png", "huge.png", "mosaic.tif")
    assert (tmp_path / "bomb.png").stat().st_size < 1_000_000
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and all("pixels" in line and "cut it into tiles first" in line for line in lines)


ODD = ["animated.gif", "cmyk.jpg", "column.png", "exif.jpg", "good.png", "palette.png", "pixel.png"]


def test_row_31_the_whole_zoo_is_sorted_before_training(tmp_path):
    """Readable oddities are trained on, the others are named and left out; the same each time."""
    path = zoo(tmp_path)
    loader, again = (sorted_out(path) for _ in range(2))
    kept = sorted(row.images[0] for row in loader.index.rows)
    assert kept == ODD
    bad = [problem.message.split(":")[0].rsplit("/", 1)[-1] for problem in loader.index.problems]
    assert sorted(bad) == ["bomb.png", "crc.png", "cut.jpg", "deep.png", "deep.tif", "empty.jpg", "page.jpg"]
    assert loader.index.fingerprint == again.index.fingerprint
    assert again.index.problems == loader.index.problems
    for step in range(loader.schedule.steps_per_epoch):
        jax.tree.map(np.testing.assert_array_equal, loader(step)[2], again(step)[2])


def zoo(folder):
    rgb = data_case.picture(120, 90)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "good.png")
    rgb.save(folder / "exif.jpg", exif=exif)
    rgb.save(folder / "animated.gif", save_all=True, append_images=[data_case.picture(120, 90, 1)])
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.quantize(16).save(folder / "palette.png", transparency=3)
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.new("RGB", (1, 10_000)).save(folder / "column.png")
    whole = (folder / "good.png").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (folder / "crc.png").write_bytes(flipped)
    rgb.save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-900])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (folder / "deep.png").write_bytes(image_zoo.deep_png(20, 10))
    Image.fromarray(np.full((9, 9), 700, np.uint16)).save(folder / "deep.tif")
    (folder / "bomb.png").write_bytes(image_zoo.png(50_000, 50_000, 8, b""))
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".json")
    path = folder / "zoo.json"
    path.write_text(json.dumps([data_case.chat_row(at, name) for at, name in enumerate(names)]))
    return path


def sorted_out(path):
    index = build_index(records.load(str(path)), TOKENIZER, data_case.TINY, SIZES, verify=True)
    return Loader(index, Schedule(index, SIZES, 3, seed=1), TOKENIZER, data_case.TINY)
