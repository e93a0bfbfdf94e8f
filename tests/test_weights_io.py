"""The safetensors reader and writer: exact, held against the `safetensors` package, and hard to fool."""

import errno
import json
import mmap
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.weights.files import list_tensors
from mmrstraj_jax.weights.safetensors_io import (
    MAX_HEADER_BYTES,
    Job,
    Output,
    Reader,
    cast_into,
    empty,
    read_header,
    write_file,
    write_sharded,
)

BF16 = np.dtype(ml_dtypes.bfloat16)


def sample() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "a": random.standard_normal((3, 5)).astype(np.float32),
        "b.weight": random.standard_normal((700, 1000)).astype(np.float16),  # more than one chunk
        "c": random.standard_normal(7).astype(BF16),
        "scalar": np.array(3, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }


def outputs(tensors: dict[str, np.ndarray]) -> list[Output]:
    return [Output(k, v.dtype, v.shape, lambda v=v: v) for k, v in tensors.items()]


def raw_file(path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def test_reads_what_the_package_wrote(tmp_path):
    tensors = sample()
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"} and entries.keys() == tensors.keys()
    with Reader() as reader:
        for name, entry in entries.items():
            found = reader.read(entry)
            assert found.dtype == tensors[name].dtype and found.tobytes() == tensors[name].tobytes()


def test_the_package_reads_what_we_wrote(tmp_path):
    tensors = sample()
    write_file(tmp_path / "x.safetensors", outputs(tensors))
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[k].tobytes() == v.tobytes() and found[k].shape == v.shape for k, v in tensors.items())
    assert os.listdir(tmp_path) == ["x.safetensors"]  # no temporary file left


def test_shards_and_index(tmp_path):
    tensors = {f"t{i}": np.full((10,), i, np.float32) for i in range(7)}
    write_sharded(tmp_path, outputs(tensors), max_shard_bytes=100)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 280 and index["weight_map"].keys() == tensors.keys()
    assert list_tensors(tmp_path).keys() == tensors.keys()
    assert list_tensors(tmp_path / "model.safetensors.index.json").keys() == tensors.keys()


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    write_file(tmp_path / "x.safetensors", outputs({"a": np.ones(3, np.float32)}))

    def fail():
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_file(tmp_path / "x.safetensors", [Output("a", np.dtype(np.float32), (3,), fail)])
    assert np.array_equal(load_file(tmp_path / "x.safetensors")["a"], np.ones(3))
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("source", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("target", [BF16, np.float16, np.float32])
def test_casts_round_like_ml_dtypes(source, target):
    """Every 16-bit pattern, and random float32 with halfway cases, infinities and NaN."""
    if np.dtype(source).itemsize == 2:
        values = np.arange(2**16, dtype=np.uint16).view(source)
    else:
        random = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
        halfway = (random & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
        values = np.concatenate([random, halfway]).view(np.float32)
    found = np.empty(values.shape, target)
    cast_into(values, found)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float32).astype(target)
    is_nan = np.isnan(expected.astype(np.float32))
    assert np.array_equal(is_nan, np.isnan(found.astype(np.float32)))
    assert found[~is_nan].tobytes() == expected[~is_nan].tobytes()


def test_reads_a_slice_and_the_checksum_sees_every_bit(tmp_path):
    data = np.random.default_rng(0).standard_normal((4, 3000)).astype(np.float32)
    path = tmp_path / "x.safetensors"
    write_file(path, outputs({"a": data}))
    entry = read_header(path)[0]["a"]
    out = np.empty(3000, np.float32)
    with Reader() as reader:
        first = reader.read_many([Job(entry, out, 2 * 3000)])
    assert np.array_equal(out, data[2])
    raw = bytearray(path.read_bytes())
    for position in (entry.start + 2 * 3000 * 4, entry.start + 2 * 3000 * 4 + 11_999):
        for bit in (1, 128):
            raw[position] ^= bit
            path.write_bytes(raw)
            with Reader() as reader:
                assert reader.read_many([Job(entry, out, 2 * 3000)]) != first
            raw[position] ^= bit


def test_tensors_of_many_blocks(tmp_path):
    """Larger than a thread's block, in every cast; blocks and threads change neither values nor checksum."""
    data = np.random.default_rng(0).standard_normal(5_000_001).astype(np.float32)  # 20 MB
    path = tmp_path / "x.safetensors"
    write_file(path, outputs({"pad": np.zeros(3, np.float16), "a": data}))
    entry, checksums = read_header(path)[0]["a"], set()
    with Reader() as reader:
        for dtype in (np.float32, np.float16, BF16):
            out = empty(data.shape, dtype)
            checksums |= set(reader.read_many([Job(entry, out)]))
            assert out.tobytes() == data.astype(dtype).tobytes()
    assert len(checksums) == 1


def test_a_kernel_without_huge_pages_is_fine(monkeypatch):
    """madvise is a hint; such kernels answer EINVAL."""

    class Pages(mmap.mmap):
        def madvise(self, *_):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Pages)
    assert empty((300, 300), np.float32).shape == (300, 300)


def test_large_arrays_are_aligned_for_jax():
    assert empty((300, 300), np.float32).ctypes.data % 64 == 0
    assert empty((3,), np.float32).shape == (3,)


T = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "empty file": (b"", None, b""),
    "huge length": ({}, 2**62, b""),
    "length beyond the file": ({"a": T}, 5000, b""),
    "not JSON": (b"{nope", None, b""),
    "not UTF-8": (b'{"\xff": 1}', None, b""),
    "deep nesting": (b"[" * 100_000, None, b""),
    "a list": ([], None, b""),
    "NaN": (b'{"a": NaN}', None, b""),
    "a key twice": (b'{"a": {}, "a": {}}', None, b""),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, None, b""),
    "missing dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, None, b"x" * 8),
    "unknown dtype": ({"a": T | {"dtype": "F8_E4M3", "data_offsets": [0, 2]}}, None, b"x" * 2),
    "dtype is a list": ({"a": T | {"dtype": ["F32"]}}, None, b"x" * 8),
    "wrong dtype size": ({"a": T | {"dtype": "F16"}}, None, b"x" * 8),
    "negative shape": ({"a": T | {"shape": [-2]}}, None, b"x" * 8),
    "boolean shape": ({"a": T | {"shape": [True, 2]}}, None, b"x" * 8),
    "float shape": ({"a": T | {"shape": [2.0]}}, None, b"x" * 8),
    "huge shape": ({"a": T | {"shape": [2**60, 2**60]}}, None, b"x" * 8),
    "shape that wraps to 0": ({"a": T | {"shape": [2**32, 2**32], "data_offsets": [0, 0]}}, None, b""),
    "reversed offsets": ({"a": T | {"data_offsets": [8, 0]}}, None, b"x" * 8),
    "three offsets": ({"a": T | {"data_offsets": [0, 8, 8]}}, None, b"x" * 8),
    "beyond the file": ({"a": T | {"data_offsets": [8, 16]}}, None, b"x" * 8),
    "overlap": ({"a": T, "b": T | {"data_offsets": [4, 12]}}, None, b"x" * 12),
    "same bytes twice": ({"a": T, "b": T}, None, b"x" * 8),
    "hole": ({"a": T, "b": T | {"data_offsets": [16, 24]}}, None, b"x" * 24),
    "tail": ({"a": T}, None, b"x" * 9),
    "truncated": ({"a": T}, None, b"x" * 7),
}


@pytest.mark.parametrize("case", LIES)
def test_header_lies_are_caught_without_memory(case, tmp_path):
    header, length, data = LIES[case]
    path = tmp_path / "x.safetensors"
    if case == "empty file":
        path.write_bytes(b"")
    else:
        raw_file(path, header, data, length)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="x.safetensors"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_random_damage_never_raises_anything_else(tmp_path):
    """Bit flips, cuts and insertions: a UserError, or a header that still describes the file exactly."""
    path, random = tmp_path / "x.safetensors", np.random.default_rng(0)
    write_file(path, outputs({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}))
    good = path.read_bytes()
    for _ in range(500):
        raw = bytearray(good)
        for _ in range(random.integers(1, 4)):
            at, kind = int(random.integers(len(raw))), random.integers(3)
            if kind == 0:
                raw[at] ^= 1 << int(random.integers(8))
            elif kind == 1:
                del raw[at : at + int(random.integers(1, 9))]
            else:
                raw[at:at] = random.bytes(int(random.integers(1, 9)))
        path.write_bytes(raw)
        try:
            entries, _ = read_header(path)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        for entry in entries.values():
            assert 0 <= entry.start and entry.start + entry.num_bytes <= len(raw)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch sentinel",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pth", "x.npy", "model.safetensors"])
def test_pickles_are_refused_and_not_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name.endswith("npy"):
        np.save(name, np.array([Bomb()], dtype=object), allow_pickle=True)
    elif name in ("x.pt", "model.safetensors"):
        with zipfile.ZipFile(name, "w") as archive:  # what torch.save writes
            archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match="save_file"):
            list_tensors(path)
    assert not (tmp_path / "sentinel").exists()


def test_the_command_against_pickles_makes_one_file_of_all_shards(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        values = {f"t{number}": torch.full((3,), float(number))}
        torch.save(values, f"pytorch_model-{number:05d}-of-00002.bin")
    torch.save({"lr": 1.0}, "optimizer.pt")
    with pytest.raises(UserError, match="pytorch_model-00001-of-00002.bin: .*in their folder: ") as caught:
        list_tensors(tmp_path)
    command = str(caught.value).partition("folder: python ")[2]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
    found = {name: values.tolist() for name, values in load_file("model.safetensors").items()}
    assert found == {"t1": [1.0] * 3, "t2": [2.0] * 3} and set(list_tensors(tmp_path)) == set(found)


def test_a_folder_may_be_named_like_a_pickle(tmp_path):
    write_sharded(tmp_path, outputs({"a": np.zeros(2, np.float32)}))
    assert set(list_tensors(tmp_path.rename(tmp_path.with_name("model.ckpt")))) == {"a"}


def test_index_problems_are_named(tmp_path):
    tensors = {f"t{i}": np.zeros(10, np.float32) for i in range(4)}
    write_sharded(tmp_path, outputs(tensors), max_shard_bytes=80)
    index_path = tmp_path / "model.safetensors.index.json"
    good = json.loads(index_path.read_text())

    def with_map(**changes):
        index_path.write_text(json.dumps({"weight_map": good["weight_map"] | changes}))

    with_map(extra="model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="not in the file: extra"):
        list_tensors(tmp_path)
    with_map(t0="../secret.safetensors")
    with pytest.raises(UserError, match="same folder"):
        list_tensors(tmp_path)
    with_map(t0="model-00009-of-00002.safetensors")
    with pytest.raises(UserError, match="00009"):
        list_tensors(tmp_path)
    index_path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        list_tensors(tmp_path)
    index_path.write_text(json.dumps(good))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="holds both"):
        list_tensors(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    write_file(path, outputs({"a": np.zeros(100_000, np.float32)}))
    entry = read_header(path)[0]["a"]
    os.truncate(path, 1000)
    with Reader() as reader, pytest.raises(UserError, match="truncated"):
        reader.read(entry)


def test_header_limit_is_above_any_real_model():
    assert MAX_HEADER_BYTES > 100 * 1000 * 150  # 100 x the keys of a 7B model at 150 bytes each
