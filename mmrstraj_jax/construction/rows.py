"""Lines, times and rows of the text files that trips come in."""

import csv
import itertools
import math
import re
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmrstraj_jax.errors import UserError

_MILLISECONDS = 1e11  # as seconds: the year 5138
_NO_TEXT = {
    b"\x1f\x8b": "packed with gzip; unpack it first",
    b"PK\x03\x04": "packed with zip; unpack it first",
    b"\xff\xfe": "UTF-16; save it again as UTF-8",
    b"\xfe\xff": "UTF-16; save it again as UTF-8",
}


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line); bytes that are no UTF-8 spoil their row only. Raises UserError: no text at all."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
        for mark, why in _NO_TEXT.items():
            if head.startswith(mark):
                raise UserError(f"{path}: {why}")
        with path.open(encoding="utf-8-sig", errors="replace", newline=None) as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a readable file") from None


def seconds(text: Any, offset: float) -> float:
    """UTC seconds of a number (seconds; from 1e11 on milli-, from 1e14 on micro-, from 1e17 on nanoseconds)
    or of a date and time.

    A time with its own zone ignores `offset`. Raises ValueError.
    """
    if isinstance(text, datetime):
        moment = text
    else:
        try:
            value = float(text)
        except (TypeError, ValueError):
            iso = re.sub(r" ?(?:UTC|GMT)$", "+00:00", str(text).strip().replace("/", "-"))
            moment = datetime.fromisoformat(iso)
        else:
            while _MILLISECONDS <= abs(value) < math.inf:
                value /= 1000
            return value
    if moment.tzinfo is not None:
        return moment.timestamp()
    return moment.replace(tzinfo=UTC).timestamp() - offset


def rows_of(path: Path, needed: Iterable[str]) -> Iterator[tuple[int, dict]]:
    """(line, row) of a CSV with a header; spreadsheets of many countries put semicolons for its commas.

    Quoted polylines of a day are longer than csv's default limit.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = (line for _, line in lines_of(path))
    head = next(lines, "")
    delimiter = max(",;\t", key=head.count)
    reader = csv.reader(itertools.chain([head], lines), delimiter=delimiter, skipinitialspace=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in needed if name not in header]
        if missing:
            raise UserError(
                f"{path}: no column {', '.join(missing)}; expected them among {', '.join(header)[:200]}"
            )
        for row in reader:
            if row:
                # a short row lacks values, a long one has unquoted commas: neither can be trusted
                values = row if len(row) == len(header) else [None] * len(header)
                yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}; expected a CSV file") from None
