"""The benchmarks' own files, read into one type of item. No data ships with this package; licences are the
sets'.

Each reader accepts the oddities known of its set (named where they are handled) and nothing else: anything
unexpected is a UserError with file and row. Image files are resolved, kept inside their folder, and only
checked by `require_images`, since scoring a predictions file needs none.

The layouts, checked against the files or the loaders of syvlo/RSVQA, RSICC and RemoteCLIP, are in
docs/evaluation.md.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrstraj_jax.data.records import resolve_inside
from mmrstraj_jax.errors import UserError

RSIEVAL_TYPES = (
    "presence", "quantity", "color", "ab_position", "re_position", "area_comp", "road_ori", "image", "scene",
    "reasoning",
)  # fmt: skip
RSVQA_TYPES = {
    "lr": ("presence", "comp", "count", "rural_urban"),
    "hr": ("presence", "comp", "count", "area"),
}
RSVQA_SPLITS = {"lr": ("train", "val", "test"), "hr": ("train", "val", "test", "test_phili")}
# RSICC's eval.py calls a pair unchanged when a reference is one of these
LEVIR_UNCHANGED = frozenset(
    (
        "the scene is the same as before",
        "there is no difference",
        "the two scenes seem identical",
        "no change has occurred",
        "almost nothing has changed",
    )
)


@dataclass(frozen=True)
class Item:
    """One thing to ask a model, and what counts as its answer."""

    id: str  # unique in its set and stable: made of file names and positions
    images: tuple[Path, ...]  # two for change captioning: before, after
    question: str | None  # None: a caption is asked for, in the words of the protocol
    type: str  # "caption", or the set's question type
    references: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)


# ---- plumbing ----


class _Row:
    """A JSON object with its place in the file, for errors that name it."""

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object, found {type(value).__name__}")
        self.value, self.where = value, where

    def get(self, key: str, kind: type | tuple[type, ...] = str) -> Any:
        value = self.value.get(key)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if key not in self.value:
            raise UserError(f"{self.where}: lacks the key {key!r}; it has {', '.join(self.value) or 'none'}")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise UserError(f"{self.where}: {key!r} is {value!r:.60}, expected {names}")
        return value

    def text(self, key: str) -> str:
        """Text without the spaces around it (LEVIR-CC's captions begin with one); empty is an error."""
        value = self.get(key).strip()
        if not value:
            raise UserError(f"{self.where}: {key!r} is empty")
        return value

    def rows(self, key: str) -> Iterator["_Row"]:
        for i, value in enumerate(self.get(key, list)):
            yield _Row(value, f"{self.where}: {key}[{i}]")


def _read(path: Path) -> _Row:
    try:
        return _Row(json.loads(path.read_text(encoding="utf-8-sig")), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno} is not JSON ({error.msg}); download it again") from None


def _file(path: str | Path, name: str) -> Path:
    """The JSON file itself, or the folder that holds it under its published name."""
    path = Path(path)
    return path / name if path.is_dir() else path


def _image(row: _Row, root: Path, name: str) -> Path:
    try:
        return resolve_inside(root, name, must_exist=False)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None


def _unique(items: list[Item], path: Path) -> list[Item]:
    if not items:
        raise UserError(f"{path}: holds no items")
    name, count = Counter(item.id for item in items).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: {name} occurs {count} times; expected one row each")
    return items


def require_images(items: list[Item]) -> None:
    """Raises UserError, with a count and the first name, if an image file is missing."""
    missing = [path for item in items for path in item.images if not path.is_file()]
    if missing:
        total = sum(len(item.images) for item in items)
        raise UserError(
            f"{missing[0]}: no such image; {len(missing)} of {total} are missing; "
            "name their folder with --images"
        )


# ---- RSIEval, RSICap ----


def rsieval_captions(path: str | Path, images: str | Path | None = None) -> list[Item]:
    """RSIEval's captions, one reference an image. `path`: annotations.json or its folder (images in
    images/).
    """
    file = _file(path, "annotations.json")
    root = Path(images) if images else file.parent / "images"
    items = []
    for row in _read(file).rows("annotations"):
        name = row.text("filename")
        items.append(Item(name, (_image(row, root, name),), None, "caption", (row.text("caption"),)))
    return _unique(items, file)


def rsieval_questions(path: str | Path, images: str | Path | None = None) -> list[Item]:
    """RSIEval's questions, id "<file>#<position>", so that a question asked twice of an image stays two
    items.

    Types are as published. meta["filed_as"] names the type that three panchromatic/colour questions filed
    under `color` belong to; no score uses it. Answers keep their spelling: matching them is the scorer's
    work.
    """
    file = _file(path, "annotations.json")
    root = Path(images) if images else file.parent / "images"
    items = []
    for row in _read(file).rows("annotations"):
        name = row.text("filename")
        image = _image(row, root, name)
        for i, pair in enumerate(row.rows("qa_pairs")):
            kind, question = pair.text("type"), pair.text("question")
            if kind not in RSIEVAL_TYPES:
                raise UserError(f"{pair.where}: type {kind!r}, expected one of {', '.join(RSIEVAL_TYPES)}")
            meta = {"filed_as": "image"} if kind == "color" and "panchromatic" in question.lower() else {}
            items.append(Item(f"{name}#{i}", (image,), question, kind, (pair.text("answer"),), meta))
    return _unique(items, file)


def rsicap(path: str | Path, images: str | Path | None = None) -> list[Item]:
    """RSICap's captions with the prompt they were written to. `path`: captions.json or its folder.

    `image_id` is text in the published file, and accepted as a number.
    """
    file = _file(path, "captions.json")
    root = Path(images) if images else file.parent / "images"
    items = []
    for row in _read(file).rows("annotations"):
        image = _image(row, root, row.text("filename"))
        prompt, meta = row.text("text_input"), {"filename": row.text("filename")}
        number = str(row.get("image_id", (str, int)))
        items.append(Item(number, (image,), prompt, "caption", (row.text("text_output"),), meta))
    return _unique(items, file)


# ---- UCM, Sydney, RSICD, RSITMD, NWPU ----


class NoSplit(UserError):
    """A file without a single image of the split."""


def _split_of(items: Mapping[str, list[Item]], split: str, file: Path) -> list[Item]:
    if split not in items:
        raise NoSplit(f"{file}: no images of split {split!r}; it has {', '.join(sorted(items)) or 'none'}")
    return _unique(items[split], file)


def karpathy(path: str | Path, split: str = "test", images: str | Path | None = None) -> list[Item]:
    """Captions from dataset_{ucm,sydney,rsicd}.json or dataset_RSITMD.json; images in imgs/, images/ or
    RSICD's RSICD_images/ beside it.

    References are the `raw` sentences, as many as the file has: RSICD pads to five with repetitions, which
    stay (they are part of every published score) and are counted in meta["distinct_references"].
    """
    file = Path(path)
    root = Path(images) if images else _folder(file.parent, "imgs", "RSICD_images", "images")
    by_split: dict[str, list[Item]] = {}
    for row in _read(file).rows("images"):
        name = row.text("filename")
        references = tuple(sentence.text("raw") for sentence in row.rows("sentences"))
        if not references:
            raise UserError(f"{row.where}: {name} has no sentences")
        meta = {"distinct_references": len(set(references))}
        item = Item(name, (_image(row, root, name),), None, "caption", references, meta)
        by_split.setdefault(row.text("split"), []).append(item)
    return _split_of(by_split, split, file)


def _folder(parent: Path, *names: str) -> Path:
    """The first of these folders that is there, else the last."""
    return next((parent / name for name in names if (parent / name).is_dir()), parent / names[-1])


def nwpu(path: str | Path, split: str = "test", images: str | Path | None = None) -> list[Item]:
    """NWPU-Captions: an object of classes, each a list of rows with raw, raw_1 .. raw_4; images in
    <class>/<file>.

    Some captions hold the six characters backslash-u00a0, a non-breaking space that was escaped twice: it
    becomes a space, as a real one does, and meta["repaired"] counts such references (as tokens they would
    never be matched).
    """
    file = Path(path)
    root = Path(images) if images else _folder(file.parent, "NWPU_images", "images", "NWPU_images")
    classes = _read(file)
    by_split: dict[str, list[Item]] = {}
    spaces = r"(?:\\u00a0|\xa0)"
    for name in classes.value:
        for row in classes.rows(name):
            texts = [row.text(key) for key in ("raw", "raw_1", "raw_2", "raw_3", "raw_4")]
            references = tuple(re.sub(f" *{spaces} *", " ", text).strip() for text in texts)
            meta = {
                "class": name,
                "distinct_references": len(set(references)),
                "repaired": sum(bool(re.search(spaces, text)) for text in texts),
            }
            image = row.text("filename")
            paths = (_image(row, root, f"{name}/{image}"),)
            item = Item(f"{name}/{image}", paths, None, "caption", references, meta)
            by_split.setdefault(row.text("split"), []).append(item)
    return _split_of(by_split, split, file)


# ---- RSVQA ----


def rsvqa(
    folder: str | Path, variant: str = "lr", split: str = "test", images: str | Path | None = None
) -> list[Item]:
    """RSVQA low or high resolution: {LR,USGS}_split_<split>_{questions,answers}.json, images in Images_LR/ or
    Data/.

    Rows {"id": n, "active": false} are skipped. The reference is what Lobry's model is scored on: counts (LR)
    and areas (HR) in bins; the number itself is in meta["answer"]. meta["numeric"]: left out of "non-numeric"
    means.
    """
    if variant not in RSVQA_SPLITS or split not in RSVQA_SPLITS[variant]:
        known = "; ".join(f"{name}: {', '.join(splits)}" for name, splits in RSVQA_SPLITS.items())
        raise UserError(f"RSVQA {variant} {split}: expected a variant and split of {known}")
    prefix = Path(folder) / f"{'LR' if variant == 'lr' else 'USGS'}_split_{split}_"
    file = Path(f"{prefix}questions.json")
    root = Path(images) if images else Path(folder) / ("Images_LR" if variant == "lr" else "Data")
    answers = {row.get("id", int): row for row in _active(Path(f"{prefix}answers.json"), "answers")}
    items = []
    for row in _active(file, "questions"):
        number, kind = row.get("id", int), row.text("type")
        if kind not in RSVQA_TYPES[variant]:
            raise UserError(f"{row.where}: type {kind!r}, expected one of {', '.join(RSVQA_TYPES[variant])}")
        ids = row.get("answers_ids", list)
        answer = answers.get(ids[0]) if len(ids) == 1 else None
        if answer is None or answer.get("question_id", int) != number:
            raise UserError(
                f"{row.where}: answers_ids is {ids!r:.60}, expected the id of this question's answer"
            )
        text, image = answer.text("answer"), row.get("img_id", int)
        reference = rsvqa_bin(text, kind, variant)
        if reference is None:
            raise UserError(
                f"{answer.where}: answer {text!r} to a question of type {kind!r}, expected a number"
            )
        meta = {"answer": text, "numeric": kind in ("count", "area"), "img_id": image}
        paths = (_image(row, root, f"{image}.tif"),)
        items.append(Item(str(number), paths, row.text("question"), kind, (reference,), meta))
    return _unique(items, file)


def _active(file: Path, key: str) -> Iterator[_Row]:
    for row in _read(file).rows(key):
        if row.get("active", bool):
            yield row


def rsvqa_bin(answer: str, kind: str, variant: str) -> str | None:
    """The class of an answer in Lobry's scoring, in lower case; None where a number was expected and is not
    there.

    Counts of LR: "0", "between 0 and 10" (1 to 10), "between 10 and 100" (11 to 100), "between 100 and 1000",
    "more than 1000". Areas of HR the same in m2. Counts of HR are exact. A class, also spelt "between 1 and
    10" as elsewhere, maps to itself, so that models trained on classes are scored by the same function.
    """
    text = " ".join(answer.lower().replace("m²", "m2").rstrip(" .").split())
    if kind not in ("count", "area"):
        return text
    unit = "m2" if kind == "area" else ""
    bare = text.replace(" m2", "m2").replace("m2", "").replace(",", "")
    if len(bare) > 100:  # int() refuses 4,300 digits
        return None
    if variant == "hr" and kind == "count":
        return str(int(bare)) if re.fullmatch(r"[0-9]+", bare) else None
    if re.fullmatch(r"more than 1000", bare):
        return f"more than 1000{unit}"
    if match := re.fullmatch(r"between ([0-9]+) and ([0-9]+)", bare):
        value = float(match[2])
        if (int(match[1]), int(match[2])) not in {
            (a + d, b) for a, b in ((0, 10), (10, 100), (100, 1000)) for d in (0, 1)
        }:
            return None
    elif re.fullmatch(r"[0-9]+(\.[0-9]+)?", bare):
        value = float(bare)
    else:
        return None
    if value == 0:
        return f"0{unit}"
    for low, high in ((0, 10), (10, 100), (100, 1000)):
        if value <= high:
            return f"between {low}{unit} and {high}{unit}"
    return f"more than 1000{unit}"


# ---- LEVIR-CC ----


def _split_in(row: _Row, path: str) -> str:
    found = [part for part in path.split("/") if part in ("train", "val", "test")]
    if len(found) != 1:
        raise UserError(
            f"{row.where}: 'filepath' is {path!r:.60}, expected a folder train, val or test in it"
        )
    return found[0]


def levir_cc(path: str | Path, split: str = "test", images: str | Path | None = None) -> list[Item]:
    """Change captions: LevirCCcaptions.json or its folder; images/<split>/{A,B}/<file>. Two images an item.

    meta["changed"] is the file's `changeflag`; where a row has none, whether its first caption is outside
    RSICC's five stock sentences of no change (meta["changed_from"] says which). Captions come with a leading
    space, dropped. A row without `split` has it in its `filepath`: "test", or a path through such a folder.
    """
    file = _file(path, "LevirCCcaptions.json")
    root = Path(images) if images else file.parent / "images"
    by_split: dict[str, list[Item]] = {}
    for row in _read(file).rows("images"):
        name = row.text("filename")
        of = row.text("split") if "split" in row.value else _split_in(row, row.text("filepath"))
        references = tuple(sentence.text("raw") for sentence in row.rows("sentences"))
        if not references:
            raise UserError(f"{row.where}: {name} has no sentences")
        if "changeflag" in row.value:
            changed, source = bool(row.get("changeflag", (int, bool))), "changeflag"
        else:
            changed, source = references[0].rstrip(" .").lower() not in LEVIR_UNCHANGED, "stock sentences"
        pair = tuple(_image(row, root, f"{of}/{side}/{name}") for side in "AB")
        meta = {"changed": changed, "changed_from": source}
        by_split.setdefault(of, []).append(Item(name, pair, None, "caption", references, meta))
    return _split_of(by_split, split, file)
