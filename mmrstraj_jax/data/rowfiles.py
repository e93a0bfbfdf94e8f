"""Files of rows, opened three ways: a JSON list, JSON Lines, and array_record. Rows lie at byte offsets.

What a file holds is told by its content: "[" begins a JSON list, array_record goes by its name (a file
NAME.array_record[-00000-of-00002], or a folder of them), anything else is JSON Lines.
"""

import codecs
import functools
import json
import os
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mmrstraj_jax.errors import UserError

_SPACE = " \t\r\n"


class Raw(NamedTuple):
    """One row as it lies in its file."""

    line: int  # of JSON Lines from 1, of a list and of records from 0
    offset: int  # bytes; of records their number
    size: int
    data: bytes


@dataclass(frozen=True)
class RowFile:
    """A file of rows as it was when it was first read."""

    path: str
    kind: str  # "lines" | "list" | "records"
    size: int
    mtime: int  # ns

    @property
    def source(self) -> str:
        """How rows name it; `place` makes the words of messages from it."""
        return f"{self.path}[]" if self.kind == "list" else self.path

    def scan(self) -> Iterator[Raw]:
        """Every row in order. Raises UserError: the file is broken as a whole."""
        return {"lines": self._lines, "list": self._list, "records": self._records}[self.kind]()

    def read(self, offset: int, size: int) -> bytes:
        """One row's bytes. Raises UserError: the file is gone or not what it was."""
        if self.kind == "records":
            self._check(os.stat(self.path))
            (data,) = _records_of(self.path).read([offset])
            return data
        try:
            with open(self.path, "rb", buffering=0) as file:
                self._check(os.fstat(file.fileno()))
                return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}") from error

    def _check(self, status: os.stat_result) -> None:
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime):
            raise UserError(f"{self.path}: changed since it was read first; start again")

    def _lines(self) -> Iterator[Raw]:
        with open(self.path, "rb") as file:
            offset = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
            file.seek(offset)
            for line, data in enumerate(file, 1):
                if data.strip():
                    yield Raw(line, offset, len(data), data)
                offset += len(data)

    def _list(self) -> Iterator[Raw]:
        # As Latin-1 every byte is a character, so positions are byte offsets; JSON's own signs are ASCII.
        data = pathlib.Path(self.path).read_bytes()
        text = data.decode("latin-1")
        scan = json.JSONDecoder().raw_decode
        at, line = text.index("[") + 1, 0
        try:
            at = _past_space(text, at)
            while text[at : at + 1] != "]" or line:
                begin = at
                _, at = scan(text, begin)
                yield Raw(line, begin, at - begin, data[begin:at])
                line += 1
                at = _past_space(text, at)
                if text[at : at + 1] == "]":
                    break
                if text[at : at + 1] != ",":
                    raise json.JSONDecodeError("expected ',' or ']'", text, at)
                at = _past_space(text, at + 1)
            if _past_space(text, at + 1) != len(text):
                raise json.JSONDecodeError("more data behind the list", text, at + 1)
        except RecursionError as error:
            raise UserError(f"{self.path}: not valid JSON (nested too deeply)") from error
        except ValueError as error:
            raise UserError(f"{self.path}: not valid JSON ({error})") from error

    def _records(self) -> Iterator[Raw]:
        reader = _records_of(self.path)
        for number in range(reader.num_records()):
            (data,) = reader.read([number])
            yield Raw(number, number, len(data), data)


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


@functools.lru_cache(maxsize=64)
def _records_of(path: str):
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path)
    if not reader.ok():
        raise UserError(f"{path}: not an array_record file, or cut off")
    return reader


def place(source: str, line: int) -> str:
    """Where a row lies, for messages; `source` as RowFile has it."""
    if source.endswith("[]"):
        return f"{source[:-2]}: row {line} (counted from 0)"
    if ".array_record" in os.path.basename(source):
        return f"{source}: record {line} (counted from 0)"
    return f"{source}: line {line}"


def find(path: str | os.PathLike) -> list[RowFile]:
    """The files behind a name: itself, or the shards of a folder. Raises UserError: missing, of no kind."""
    name = str(path)
    if os.path.isdir(name):
        shards = sorted(shard for shard in os.listdir(name) if ".array_record" in shard)
        if not shards:
            raise UserError(f"{name}: a folder without .array_record files; expected a JSON file, or these")
        return [file for shard in shards for file in find(os.path.join(name, shard))]
    try:
        status = os.stat(name)
        with open(name, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}; expected a JSON or JSON Lines file") from error
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{name}: UTF-16; expected UTF-8, save it again as UTF-8")
    kind = "lines"
    if ".array_record" in os.path.basename(name):
        kind = "records"
    elif head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        kind = "list"
    return [RowFile(name, kind, status.st_size, status.st_mtime_ns)]


def parse(data: bytes) -> object:
    """JSON; NaN and Infinity, which are not JSON, become null. Raises ValueError only."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=lambda _: None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
