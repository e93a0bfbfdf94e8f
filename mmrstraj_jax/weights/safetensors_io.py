"""Reading and writing safetensors files, strictly and in bounded memory.

Why not the `safetensors` package itself: its NumPy front end returns a fresh array per tensor (no reading
into a preallocated slice, no bf16 -> fp32 on the way) and its writer wants every tensor in memory at once,
15 GB for a 7B model. The format is a length, a JSON header and raw bytes; the tests hold this module against
the package.
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped, UInt16

from mmrstraj_jax.errors import UserError

# The float formats of the public checkpoints.
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Of buffers that older files hold beside their weights (position_ids); no parameter is read from one.
_READABLE = DTYPES | {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32)}
# 7B models have headers of about 100 kB; the format's own cap of 100 MB lets a 1 kB-per-key bomb take
# gigabytes.
MAX_HEADER_BYTES = 16 * 2**20
_CHUNK_BYTES = 2**20  # fits the L2 cache, so that checksum and cast find the bytes still there
_BLOCK_BYTES = 8 * _CHUNK_BYTES  # what a thread takes at a time; part of the definition of the checksum
_NUM_THREADS = 4


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` is its absolute byte offset."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parses and checks a header; reads no tensor.

    Args:
        path: a .safetensors file.
    Returns:
        entries by name in file order, and the free-form metadata.
    Raises:
        UserError: not a regular readable file, or a header that does not describe the file exactly: length,
            JSON, dtype, shape, offsets in range, no overlap, no hole, nothing after the last tensor.
    """

    def bad(what: str) -> UserError:
        return UserError(
            f"{path}: {what}; expected a complete safetensors file, download or convert it again"
        )

    if not path.is_file():
        raise UserError(f"{path}: no such weight file")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise bad(f"file has {size} bytes, less than a header")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES or length + 8 > size:
            if prefix.startswith((b"PK\x03\x04", b"\x80", b"\x93NUMPY")):
                raise refuse_pickle(path)
            raise bad(f"header length {length} in a file of {size} bytes (limit {MAX_HEADER_BYTES})")
        raw = file.read(length)
    try:
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants
        )
    except (ValueError, RecursionError) as error:
        raise bad(f"header is not valid JSON ({type(error).__name__}: {str(error)[:80]})") from None
    if not isinstance(header, dict):
        raise bad("header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad("__metadata__ is not a map of strings")

    data_start, entries, spans = 8 + length, {}, []
    for name, info in header.items():
        if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
            raise bad(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
        if not isinstance(info["dtype"], str) or info["dtype"] not in _READABLE:
            raise bad(
                f"tensor {name!r} has dtype {str(info['dtype'])[:20]!r}, supported are {', '.join(DTYPES)}"
            )
        dtype, shape, offsets = _READABLE[info["dtype"]], info["shape"], info["data_offsets"]
        if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
            raise bad(f"tensor {name!r} has shape {str(shape)[:60]} and data_offsets {str(offsets)[:60]}")
        begin, end = offsets
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise bad(
                f"tensor {name!r} spans {end - begin} bytes, its shape {shape} and dtype "
                f"{info['dtype']} need {math.prod(shape) * dtype.itemsize}"
            )
        entries[name] = Entry(name, path, dtype, tuple(shape), data_start + begin)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise bad(f"tensor {name!r} {kind} (begins at {begin}, expected {position})")
        position = end
    if data_start + position != size:
        raise bad(
            f"tensors end at byte {data_start + position} of {size}: the file is truncated or has a tail"
        )
    return entries, metadata


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key appears twice")
    return out


def _no_constants(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _is_counts(value: object) -> bool:
    # 2**48 bytes bound every product below, and bool is an int in Python
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(item) is int and 0 <= item < 2**48 for item in value)
    )


def refuse_pickle(path: Path) -> UserError:
    """The error for .bin, .pt, .pth, .npy and their like: loading them can run code."""
    shards = re.sub(r"-\d{5}-of-\d{5}", "-*", path.name)
    return UserError(
        f"{path}: pickle weights can run code and are not read; convert them once, where you trust them, in "
        'their folder: python -c "import glob, torch, safetensors.torch as s; s.save_file({k: '
        f"v.contiguous().clone() for f in sorted(glob.glob('{shards}')) for k, v in "
        "torch.load(f, weights_only=True).items()}, 'model.safetensors', metadata={'format': 'pt'})\""
    )


class Job(NamedTuple):
    """Fill `out` with consecutive elements of a tensor, from element `first` on, cast to its dtype."""

    entry: Entry
    out: Shaped[np.ndarray, "*S"]  # C-contiguous
    first: int = 0


class Reader:
    """Reads tensors of many files into given arrays, one small reused buffer a thread; a context manager.

    `preadv` rather than mmap: a file truncated while it is read is an error here and a SIGBUS there, and
    mapped pages would count towards the memory of a container. A few threads, because half the time goes
    into page faults of the destination and the checksum, during which no other byte would move.
    """

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(_NUM_THREADS)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read_many(self, jobs: list[Job]) -> list[str]:
        """Does the jobs; returns for each the checksum of the bytes in the file (not of the cast values).

        Raises:
            UserError: a file ended early.
        """
        for entry, out, first in jobs:
            assert out.flags.c_contiguous and first + out.size <= math.prod(entry.shape)
            if entry.file not in self._descriptors:
                self._descriptors[entry.file] = os.open(entry.file, os.O_RDONLY)
        blocks = [
            (number, begin)
            for number, job in enumerate(jobs)
            for begin in range(0, job.out.size, _BLOCK_BYTES // job.entry.dtype.itemsize)
        ]
        digests = [hashlib.sha256() for _ in jobs]
        sums = self._pool.map(lambda block: self._read_block(jobs[block[0]], block[1]), blocks)
        for (number, _), checksum in zip(blocks, sums, strict=True):
            digests[number].update(checksum)
        return [digest.hexdigest() for digest in digests]

    def read(self, entry: Entry, dtype: np.dtype | None = None) -> Shaped[np.ndarray, "*S"]:
        """The whole tensor as a new array."""
        out = empty(entry.shape, dtype or entry.dtype)
        self.read_many([Job(entry, out)])
        return out

    def _read_block(self, job: Job, begin: int) -> bytes:
        entry, digest = job.entry, hashlib.sha256()
        if not hasattr(self._local, "buffer"):
            self._local.buffer = np.empty(_CHUNK_BYTES, np.uint8)
        itemsize, is_direct = entry.dtype.itemsize, job.out.dtype == entry.dtype
        flat = job.out.reshape(-1)[begin : begin + _BLOCK_BYTES // itemsize]
        for at in range(0, flat.size, _CHUNK_BYTES // itemsize):
            target = flat[at : at + _CHUNK_BYTES // itemsize]
            offset = entry.start + (job.first + begin + at) * itemsize
            raw = target.view(np.uint8) if is_direct else self._local.buffer[: target.size * itemsize]
            self._read_exactly(entry, memoryview(raw), offset)
            _update_checksum(digest, raw)
            if not is_direct:
                cast_into(raw.view(entry.dtype), target)
        return digest.digest()

    def _read_exactly(self, entry: Entry, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(self._descriptors[entry.file], [view], offset)
            if count == 0:
                raise UserError(
                    f"{entry.file}: ended inside {entry.name!r}; the file is truncated, download it again"
                )
            view, offset = view[count:], offset + count


def _update_checksum(digest: "hashlib._Hash", data: np.ndarray) -> None:
    """Folds 4 kB column sums of 64-bit words into a SHA-256: ten times the speed of hashing every byte.

    Finds accidents (bit flips, other weights), not an adversary.
    """
    whole = data.size // 4096 * 4096
    if whole:
        digest.update(data[:whole].view(np.uint64).reshape(-1, 512).sum(0, dtype=np.uint64).tobytes())
    digest.update(data[whole:].tobytes())


def empty(shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "*S"]:
    """Uninitialised page-aligned array: `jax.device_put` on CPU takes aligned memory over without a copy."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if num_bytes < 2**16:
        return np.empty(shape, dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a hint that kernels without huge pages refuse
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)


def cast_into(source: Shaped[np.ndarray, " N"], target: Shaped[np.ndarray, " N"]) -> None:
    """Casts between bf16, fp16 and fp32, to nearest even; what fp16 cannot hold becomes inf, as in torch."""
    if source.dtype == np.float16 and target.dtype == ml_dtypes.bfloat16:
        _float16_to_bfloat16(source.view(np.uint16), target.view(np.uint16))
        return
    if source.dtype == np.float16:
        # NumPy's own cast of fp16 is scalar code; the look-up takes half the time and gives the same bits.
        table = _values_of_float16(target.dtype)
        np.take(table, source.view(np.uint16), out=target.view(table.dtype), mode="clip")
        return
    _plain_cast(source, target)


def _plain_cast(source: Shaped[np.ndarray, " N"], target: Shaped[np.ndarray, " N"]) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(target, source, casting="unsafe")


def _float16_to_bfloat16(bits: UInt16[np.ndarray, " N"], out: UInt16[np.ndarray, " N"]) -> None:
    """Drops three bits of the fraction, to nearest even, and moves the bias of the exponent from 15 to 127.

    Whole-array integer operations, which NumPy runs as vector code; zero, subnormal numbers, infinities and
    NaNs come from the table.
    """
    signed, result = bits.view(np.int16), out.view(np.int16)  # so that a right shift keeps the sign
    np.right_shift(signed, 3, out=result)
    np.bitwise_and(result, 1, out=result)  # a tie goes up where what is kept is odd
    np.add(result, 3, out=result)
    np.add(result, signed, out=result)
    np.right_shift(result, 3, out=result)
    np.bitwise_and(out, np.uint16(0x8FFF), out=out)
    np.add(result, 112 << 7, out=result)
    exponent = np.add(
        bits, np.uint16(0x0400)
    )  # all ones becomes 0, and 0 becomes the bit that the mask leaves out
    np.bitwise_and(exponent, np.uint16(0x7800), out=exponent)
    others = np.flatnonzero(exponent == 0)
    out[others] = _values_of_float16(np.dtype(ml_dtypes.bfloat16))[bits[others]]


@functools.cache
def _values_of_float16(dtype: np.dtype) -> Shaped[np.ndarray, "65536"]:
    """Every fp16 bit pattern cast to `dtype`, as unsigned integers of its size."""
    table = np.empty(2**16, dtype)
    _plain_cast(np.arange(2**16, dtype=np.uint16).view(np.float16), table)
    return table.view(f"u{dtype.itemsize}")


@dataclass(frozen=True)
class Output:
    """One tensor to be written; `make` is called when its turn comes, so that only one is in memory."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], Shaped[np.ndarray, "*S"]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_file(path: Path, tensors: Iterable[Output], metadata: dict[str, str] | None = None) -> None:
    """Writes one file under a temporary name and renames it when it is complete and on disk.

    Args:
        path: the file; replaced if it exists.
        tensors: written in this order.
        metadata: {"format": "pt"} by default, which transformers requires.
    """
    tensors, header, position = list(tensors), {"__metadata__": metadata or {"format": "pt"}}, 0
    for tensor in tensors:
        assert tensor.name not in header, tensor.name
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.num_bytes],
        }
        position += tensor.num_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # tensors start 8-byte aligned
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for tensor in tensors:
                array = np.asarray(tensor.make(), order="C")
                assert array.shape == tensor.shape and array.dtype == tensor.dtype, (tensor.name, array.shape)
                file.write(memoryview(array.reshape(-1).view(np.uint8)))
                del array
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_sharded(
    directory: Path, tensors: Iterable[Output], max_shard_bytes: int = 5 * 10**9, stem: str = "model"
) -> None:
    """Writes `model.safetensors`, or `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`.

    Args:
        directory: exists.
        tensors: kept in order; a tensor larger than a shard has a shard of its own.
        max_shard_bytes: upper limit of the tensor bytes of a file (transformers: 5 GB).
        stem: first part of the names.
    """
    shards: list[list[Output]] = [[]]
    for tensor in tensors:
        used = sum(other.num_bytes for other in shards[-1])
        if shards[-1] and used + tensor.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return write_file(directory / f"{stem}.safetensors", shards[0])
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(directory / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")


# Of a disk that is full or fails: `write` reports these without the file's name.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOTEMPTY}


@contextlib.contextmanager
def whole_folder(directory: str | Path) -> Iterator[Path]:
    """A temporary folder beside the target that takes its name if the body succeeds.

    Raises:
        UserError: the target exists, or the disk is full or fails; nothing of it is left then.
    """
    directory = Path(directory)
    if os.path.lexists(directory):
        raise UserError(f"{directory}: exists; nothing is overwritten, name a new folder")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(directory)
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        raise UserError(
            f"{directory}: cannot be written ({error.strerror}), and nothing of it is left; free some space, "
            "or name a folder elsewhere"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small file atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
