"""Training rows from files: LLaVA-OneVision JSON lists and JSON Lines, checked row by row.

A bad row is quarantined with its place and reason, or ends the run, as the caller chooses; a file that is
missing or broken as a whole always raises. Images are named relative to an image root and can never leave it.
"""

import codecs
import json
import os
import pathlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mmrstraj_jax.data import chat
from mmrstraj_jax.errors import UserError

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
        return f"{self.source}: {'row' if self.source.endswith('[]') else 'line'} {self.line}: {self.message}"


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

    @property
    def kind(self) -> str:
        """ "image", "video" or "text"."""
        return "image" if self.images else "video" if self.videos else "text"

    @property
    def where(self) -> str:
        """File, line and id, for messages."""
        place = "row" if self.source.endswith("[]") else "line"
        return f"{self.source}: {place} {self.line} (id {repr(self.id)[1:-1]:.80})"

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

    rows: list[Row]
    problems: list[Problem]
    sources: list[Source] = field(default_factory=list)

    def summary(self) -> str:
        """One line for the log: how many rows stayed, and the first problem."""
        dropped = sum(problem.dropped for problem in self.problems)
        text = f"{len(self.rows)} rows from {len(self.sources)} file(s)"
        if dropped:
            text += f", {dropped} dropped"
        if len(self.problems) > dropped:
            text += f", {len(self.problems) - dropped} remark(s)"
        return text + (f"; first: {self.problems[0]}" if self.problems else "")


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


def load(
    spec: str,
    image_root: str | os.PathLike | None = None,
    *,
    on_bad: str = "quarantine",
    check_files: bool = True,
) -> Records:
    """Rows of one or several data files.

    Args:
      spec: "A.json" or "A.json:0.7,B.jsonl:0.3".
      image_root: folder that image paths are relative to; None: the folder of each file.
      on_bad: "quarantine" drops bad rows and reports them, "error" raises on the first.
      check_files: whether images must exist (nothing is decoded).
    Raises:
      UserError: a file is missing or broken, holds no valid row, or (on_bad="error") has a bad one.
    """
    assert on_bad in ("quarantine", "error"), on_bad
    records = Records([], [])
    seen: dict[str, str] = {}
    for path, weight in parse_mixture(spec):
        start, first_problem = len(records.rows), len(records.problems)
        root = pathlib.Path(image_root) if image_root is not None else pathlib.Path(path).parent
        if not root.is_dir():
            raise UserError(f"image root {root}: no such folder")
        root = root.resolve()
        for source, line, value in read_rows(path):
            try:
                if isinstance(value, ValueError):
                    raise UserError(str(value))
                row = _check(value, source, line, str(root), check_files)
            except UserError as error:
                problem = Problem(source, line, str(error))
                if on_bad == "error":
                    raise UserError(str(problem)) from error
                records.problems.append(problem)
                continue
            if row.id in seen:
                remark = f"id {row.id!r} is already used in {seen[row.id]}; the row is kept"
                records.problems.append(Problem(source, line, remark, dropped=False))
            seen.setdefault(row.id, f"{source} at {line}")
            records.rows.append(row)
        count = len(records.rows) - start
        if not count:
            found = records.problems[first_problem:]
            first = f"{len(found)} bad, the first: {found[0]}" if found else "the file is empty"
            raise UserError(f"{path}: no valid row; {first}")
        records.sources.append(Source(path, weight, start, count))
    return records


def read_rows(path: str | os.PathLike) -> Iterator[tuple[str, int, object]]:
    """(source, line, value) of each row; value is a ValueError for a line that is not JSON.

    A file that starts with "[" is one JSON list (source gets a "[]", line is the index from 0), any other is
    JSON Lines (line from 1). A byte order mark, CRLF and blank lines are tolerated.
    """
    name = str(path)
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}; expected a JSON or JSON Lines file") from error
    with file:
        head = file.read(64)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{name}: UTF-16; expected UTF-8, save it again as UTF-8")
        file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
        if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            try:
                rows = _parse(file.read())
            except ValueError as error:
                raise UserError(f"{name}: not valid JSON ({error})") from error
            for index, value in enumerate(rows):
                yield f"{name}[]", index, value
            return
        for line, raw in enumerate(file, 1):
            if raw.strip():
                try:
                    value = _parse(raw)
                except ValueError as error:
                    value = ValueError(f"not valid JSON ({error}); expected one row a line")
                yield name, line, value


def _parse(raw: bytes) -> object:
    """JSON; NaN and Infinity, which are not JSON, become null. Raises ValueError only."""
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=lambda _: None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _check(value: object, source: str, line: int, root: str, check_files: bool) -> Row:
    """A Row of a parsed value, or UserError saying what is wrong with it."""
    if not isinstance(value, Mapping):
        raise UserError(f"expected an object with id, image and conversations, found {type(value).__name__}")
    identity = value.get("id")
    identity = f"row-{line}" if identity is None else identity
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise UserError(f"id {identity!r:.60}: expected text or a whole number")
    images = _names(value, ("image", "images"))
    videos = _names(value, ("video", "videos"))
    if images and videos:
        raise UserError("both image and video; expected one of them")
    turns = _check_turns(value.get("conversations"))
    row = Row(str(identity), images, videos, turns, source, line, root)
    _check_slots(row)
    for name in images + videos:
        path = resolve_inside(root, name, must_exist=check_files)
        if check_files and images and not path.is_file():
            raise UserError(f"image {name!r}: not a file")
    return row


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
    root = pathlib.Path(root).resolve()
    try:
        path = (root / name).resolve(strict=must_exist)
    except FileNotFoundError as error:
        raise UserError(f"image {name!r:.80}: no such file under {root}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"image {name!r:.80}: cannot be opened ({error})") from error
    if not path.is_relative_to(root):
        raise UserError(
            f"image {name!r:.80}: a link that leaves the image root {root}; name a root that contains it"
        )
    return path
