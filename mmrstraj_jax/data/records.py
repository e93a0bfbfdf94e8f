"""Training rows: LLaVA-OneVision's, from JSON lists, JSON Lines or array_record, checked one by one.

A bad row is quarantined with its place and reason, or ends the run, as the caller chooses; a file that is
missing or broken as a whole always raises. Images are named relative to an image root and can never leave it.
"""

import array
import base64
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tqdm
from jaxtyping import Int

from mmrstraj_jax.data import cache, chat, rowfiles
from mmrstraj_jax.data.rowfiles import RowFile
from mmrstraj_jax.errors import UserError

LAYOUT = 2  # raise when rows are read or checked differently: caches are made again
FRAMES = 32  # LLaVA-OneVision's frames_upbound
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row was dropped, or (dropped False) only remarked on. `line` counts from 1; list rows from 0."""

    source: str
    line: int
    message: str
    dropped: bool = True

    def __str__(self) -> str:
        return f"{rowfiles.place(self.source, self.line)}: {self.message}"


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation with its images. Paths are relative to `root`, checked whenever they are opened."""

    id: str
    images: tuple[str, ...]
    videos: tuple[str, ...]  # the frames of one video: files, or one folder of them
    conversations: list[dict[str, str]]  # [{"from": "human" | "gpt", "value": text}, ...]
    source: str
    line: int
    root: str
    blobs: tuple[bytes, ...] = ()  # images that the row itself holds; `images` then has their hashes

    @property
    def kind(self) -> str:
        """ "image", "video" or "text"."""
        return "image" if self.images else "video" if self.videos else "text"

    @property
    def where(self) -> str:
        """File, line and id, for messages."""
        return f"{rowfiles.place(self.source, self.line)} (id {repr(self.id)[1:-1]:.80})"

    def image_files(self) -> list[pathlib.Path | bytes]:
        """What to open, in order: files, or their content. Raises UserError."""
        return list(self.blobs) or self.image_paths()

    def image_paths(self) -> list[pathlib.Path]:
        """The files to open, in order; of a video, up to 32 frames, evenly spread. Raises UserError."""
        if not self.videos:
            return [resolve_inside(self.root, name) for name in self.images]
        frames = [resolve_inside(self.root, name) for name in self.videos]
        if len(frames) == 1 and frames[0].is_dir():
            names = sorted(name for name in os.listdir(frames[0]) if name.lower().endswith(FRAME_SUFFIXES))
            if not names:
                raise UserError(f"video {self.videos[0]!r}: a folder without frames; expected image files")
            frames = [resolve_inside(self.root, f"{self.videos[0]}/{name}") for name in names]
        count = min(len(frames), FRAMES)
        # LLaVA-OneVision's np.linspace(0, n - 1, 32, dtype=int)
        return [frames[at * (len(frames) - 1) // max(count - 1, 1)] for at in range(count)]


@dataclass(frozen=True)
class Source:
    """The rows of one file and its share of the mixture."""

    path: str
    weight: float | None  # None: every row once an epoch
    start: int  # its rows are rows[start : start + count]
    count: int


@dataclass(frozen=True)
class Records:
    """What `load` found."""

    rows: Sequence[Row]
    problems: list[Problem]
    sources: list[Source] = field(default_factory=list)


def parse_mixture(spec: str) -> list[tuple[str, float | None]]:
    """ "A.json:0.7,B.json:0.3" -> [(path, weight)]; weight None when no weight is given.

    A spec or a part of it that names an existing file is a path, even with ':' or ',' in it.
    Raises UserError: empty, a weight that is not positive, or weights for some files only.
    """
    parts = [spec] if os.path.exists(spec) else [part.strip() for part in spec.split(",") if part.strip()]
    mixture: list[tuple[str, float | None]] = []
    for part in parts:
        match = re.fullmatch(r"(.+):([0-9.eE+-]+)", part)
        if match is None or os.path.exists(part):
            mixture.append((part, None))
            continue
        try:
            weight = float(match[2])
        except ValueError:
            weight = -1.0
        if not 0 < weight < float("inf"):
            raise UserError(
                f"data {part!r}: expected PATH or PATH:WEIGHT with a positive weight, e.g. A.json:0.7"
            )
        mixture.append((match[1], weight))
    if not mixture:
        raise UserError(f"data {spec!r}: names no file; expected e.g. A.json or A.json:0.7,B.json:0.3")
    if len({weight is None for _, weight in mixture}) == 2:
        raise UserError(f"data {spec!r}: weights for some files only; give every file one, or none")
    return mixture


class Rows(Sequence[Row]):
    """The rows of data files, each read when it is asked for: only where they lie is held, 26 bytes a row."""

    PLACE = np.dtype([("file", "<i2"), ("line", "<i8"), ("offset", "<i8"), ("size", "<i8")])

    def __init__(self, files: Sequence[tuple[RowFile, str]], places: np.ndarray):
        """files: each with its image root; places: of dtype PLACE."""
        self.files, self.places = tuple(files), places

    def __reduce__(self):
        return _rows_again, (self.files, cache.handle(self.places))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Row:
        """Raises UserError: the file is not what it was. Images are checked when they are opened."""
        place = self.places[number]
        file, root = self.files[place["file"]]
        data = file.read(int(place["offset"]), int(place["size"]))
        return _row(_value(data), file.source, int(place["line"]), root)

    def take(self, numbers: Int[np.ndarray, " n"]) -> "Rows":
        """Some of the rows, in the order of their numbers."""
        return Rows(self.files, np.asarray(self.places[numbers]))

    def identity(self) -> str:
        """Changes with the files, and with which of their rows these are."""
        return hashlib.sha256(repr(self.files).encode() + self.places.tobytes()).hexdigest()


def _rows_again(files: Sequence[tuple[RowFile, str]], places: np.ndarray | str) -> Rows:
    return Rows(files, cache.reopen(places))


def load(
    spec: str,
    image_root: str | os.PathLike | None = None,
    *,
    on_bad: str = "quarantine",
    check_files: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> Records:
    """Rows of one or several data files: every row is read and checked, and only its place is kept.

    Args:
      spec: "A.json" or "A.json:0.7,B.jsonl:0.3"; also array_record files, or folders of them.
      image_root: folder that image paths are relative to; None: the folder of each file.
      on_bad: "quarantine" drops bad rows and reports them, "error" raises on the first.
      check_files: whether images must exist (nothing is decoded).
      cache_dir: keeps the places; a later start with the same files reads only the rows that were bad.
    Raises:
      UserError: a file is missing or broken, holds no valid row, or (on_bad="error") has a bad one.
    """
    assert on_bad in ("quarantine", "error"), on_bad
    mixture, files, counts = parse_mixture(spec), [], []
    for path, _ in mixture:
        root = pathlib.Path(image_root) if image_root is not None else pathlib.Path(path).parent
        if not root.is_dir():
            raise UserError(f"image root {root}: no such folder")
        found = rowfiles.find(path)
        counts.append(len(found))
        files += [(file, str(root.resolve())) for file in found]
    key = repr((LAYOUT, os.getcwd(), files, check_files))
    name = f"rows-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    kept = cache.read(cache_dir, name)
    if kept is not None and not _still_bad(files, kept[1]["bad"], check_files):
        kept = None  # an image that was missing is there now
    if kept is None:
        places, said = _scan(files, check_files)
        places = cache.write(cache_dir, name, places, said)
    else:
        places, said = kept
    problems = [Problem(*problem) for problem in said["problems"]]
    bad = [problem for problem in problems if problem.dropped]
    if bad and on_bad == "error":
        raise UserError(str(bad[0]))
    sources, first, start = [], 0, 0
    per_file = said["rows"]
    for (path, weight), count in zip(mixture, counts, strict=True):
        rows = sum(per_file[first : first + count])
        if not rows:
            mine = {file.source for file, _ in files[first : first + count]}
            mine = [problem for problem in bad if problem.source in mine]
            reason = f"{len(mine)} bad, the first: {mine[0]}" if mine else "the file is empty"
            raise UserError(f"{path}: no valid row; {reason}")
        sources.append(Source(path, weight, start, rows))
        first, start = first + count, start + rows
    return Records(Rows(files, places), problems, sources)


def _scan(files: Sequence[tuple[RowFile, str]], check_files: bool) -> tuple[np.ndarray, dict]:
    """(places of the good rows; problems, rows of each file and places of the bad ones) of whole files."""
    columns = [array.array("q") for _ in Rows.PLACE.names]
    keys = array.array("Q")  # 64 bits of each id: a million ids as text would take 100 MB
    problems, bad, per_file = [], [], []
    total = sum(file.size for file, _ in files)
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="reading rows", **_bar(total)) as bar:
        for number, (file, root) in enumerate(files):
            before = len(keys)
            for line, offset, size, data in file.scan():
                bar.update(size)
                try:
                    row = _check(_value(data), file.source, line, root, check_files)
                except UserError as error:
                    problems.append(Problem(file.source, line, str(error)))
                    bad.append((number, line, offset, size))
                    continue
                digest = hashlib.blake2b(row.id.encode(), digest_size=8).digest()
                keys.append(int.from_bytes(digest, "little"))
                for column, value in zip(columns, (number, line, offset, size), strict=True):
                    column.append(value)
            per_file.append(len(keys) - before)
    places = np.empty(len(keys), Rows.PLACE)
    for name, column in zip(Rows.PLACE.names, columns, strict=True):
        places[name] = np.frombuffer(column, np.int64) if column else 0
    problems += _repeated(Rows(files, places), np.frombuffer(keys, np.uint64) if keys else np.zeros(0))
    said = {"problems": [dataclasses.astuple(problem) for problem in problems], "bad": bad, "rows": per_file}
    return places, said


def _bar(total: int) -> dict:
    return {"disable": None if total > 1 << 24 else True, "leave": False}


def _repeated(rows: Rows, keys: np.ndarray) -> list[Problem]:
    """A remark for every row whose id was used before."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[group] != np.arange(len(keys))) if len(keys) else ()
    remarks = []
    for number in again:
        row, other = rows[number], rows[first[group[number]]]
        message = (
            f"id {row.id!r} is already used in {rowfiles.place(other.source, other.line)}; the row is kept"
        )
        remarks.append(Problem(row.source, row.line, message, dropped=False))
    return remarks


def _still_bad(files: Sequence[tuple[RowFile, str]], bad: Sequence[Sequence[int]], check_files: bool) -> bool:
    for number, line, offset, size in bad[:1000]:
        file, root = files[number]
        try:
            _check(_value(file.read(offset, size)), file.source, line, root, check_files)
        except UserError:
            continue
        return False
    return True


def _value(data: bytes) -> object:
    try:
        return rowfiles.parse(data)
    except ValueError as error:
        raise UserError(f"not valid JSON ({error}); expected one row a line") from error


def read_rows(path: str | os.PathLike) -> Iterator[tuple[str, int, object]]:
    """(source, line, value) of each row; value is a ValueError for a row that is not JSON.

    The source of a JSON list gets a "[]", its lines count from 0 (JSON Lines: from 1). A byte order mark,
    CRLF and blank lines are tolerated.
    """
    for file in rowfiles.find(path):
        for line, _, _, data in file.scan():
            try:
                value = rowfiles.parse(data)
            except ValueError as error:
                value = error
            yield file.source, line, value


def _check(value: object, source: str, line: int, root: str, check_files: bool) -> Row:
    """A Row whose images lie inside the root, and (check_files) exist; else UserError."""
    row = _row(value, source, line, root)
    for name in () if row.blobs else row.images + row.videos:
        path = resolve_inside(root, name, must_exist=check_files)
        if check_files and row.images and not path.is_file():
            raise UserError(f"image {name!r}: not a file")
    return row


def _row(value: object, source: str, line: int, root: str) -> Row:
    """A Row of a parsed value, or UserError saying what is wrong with it; no file is looked at."""
    if not isinstance(value, Mapping):
        raise UserError(f"expected an object with id, image and conversations, found {type(value).__name__}")
    identity = value.get("id")
    identity = f"row-{line}" if identity is None else identity
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise UserError(f"id {identity!r:.60}: expected text or a whole number")
    images, blobs = _images(value)
    videos = _names(value, ("video", "videos"))
    if images and videos:
        raise UserError("both image and video; expected one of them")
    turns = _check_turns(value.get("conversations"))
    row = Row(str(identity), images, videos, turns, source, line, root, blobs)
    _check_slots(row)
    return row


def _images(value: Mapping) -> tuple[tuple[str, ...], tuple[bytes, ...]]:
    """(paths, ()), or (hashes, contents) of images given as {"bytes": base64}."""
    found = value.get("image", value.get("images"))
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(one, Mapping) for one in found) or not found:
        return _names(value, ("image", "images")), ()
    try:
        blobs = tuple(base64.b64decode(one["bytes"], validate=True) for one in found)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError('image: expected a path, or {"bytes": the file in base64}') from error
    return tuple(f"sha256:{hashlib.sha256(blob).hexdigest()}" for blob in blobs), blobs


def _names(value: Mapping, keys: tuple[str, ...]) -> tuple[str, ...]:
    present = [key for key in keys if value.get(key) not in (None, "", [])]
    if len(present) > 1:
        raise UserError(f"both {present[0]!r} and {present[1]!r}; expected one of them")
    if not present:
        return ()
    names = value[present[0]]
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{present[0]} {names!r:.60}: expected a path or a list of paths")
    return tuple(names)


def _check_turns(turns: object) -> list[dict[str, str]]:
    """Turns as {"from": human | gpt, "value"}, alternating from a human's to a gpt's."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError('conversations: expected a list of {"from", "value"} turns')
    pairs = chat.turns_of(turns)
    for number, (role, text) in enumerate(pairs):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise UserError(f"conversations: turn {number} is the {role}'s; expected human and gpt in turn")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"conversations: turn {number} is not valid Unicode ({error.reason})") from error
        if role == "assistant" and not text.strip():
            raise UserError(f"conversations: turn {number} is an empty answer")
    if len(pairs) % 2 or not pairs:
        raise UserError("conversations: the last turn is not an answer; expected human and gpt in turn")
    return [{"from": ("human", "gpt")[role == "assistant"], "value": text} for role, text in pairs]


def _check_slots(row: Row) -> None:
    """As many slots in the human's turns as there are images (one for a video), none in an answer."""
    words = chat.SLOT_WORDS["video" if row.videos else "image"]
    counts = Counter()
    for turn in row.conversations:
        counts[turn["from"]] += sum(turn["value"].count(word) for word in words)
    expected = len(row.images) or len(row.videos[:1])
    if counts["gpt"]:
        raise UserError("<image> in an answer; expected it in the human's turns only")
    if counts["human"] != expected:
        raise UserError(f"{counts['human']} <image> in the human's turns, but {expected} image(s) or video")


def resolve_inside(root: str | os.PathLike, name: str, must_exist: bool = True) -> pathlib.Path:
    """The real path of an image, inside `root` after all links are followed.

    Raises UserError: absolute, "..", a URL or drive, backslashes, control characters, characters that Unicode
    compatibility turns into any of these, a link out of the root, or (must_exist) no such file.
    """
    for form in {name, unicodedata.normalize("NFKC", name)}:
        if any(ord(char) < 32 or ord(char) == 127 for char in form):
            raise UserError(f"image {name!r:.80}: control characters in the path")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", form):
            raise UserError(f"image {name!r:.80}: a URL or drive; expected a path relative to the image root")
        if form.startswith(("/", "\\", "~")) or "\\" in form:
            raise UserError(
                f"image {name!r:.80}: expected a path relative to the image root, with forward slashes"
            )
        if ".." in form.split("/"):
            raise UserError(f"image {name!r:.80}: '..' leaves the image root")
    root = _real(os.fspath(root))
    try:
        path = os.path.realpath(os.path.join(root, name), strict=must_exist)
    except FileNotFoundError as error:
        raise UserError(f"image {name!r:.80}: no such file under {root}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"image {name!r:.80}: cannot be opened ({error})") from error
    if os.path.commonpath((path, root)) != root:
        raise UserError(
            f"image {name!r:.80}: a link that leaves the image root {root}; name a root that contains it"
        )
    return pathlib.Path(path)


_real = functools.lru_cache(maxsize=64)(os.path.realpath)  # of image roots
