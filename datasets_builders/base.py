"""What the builders share: array_record, images as their own bytes, an example per image.

A builder says which splits there are and yields (id, image file, values) of each; the files are parsed by
mmrstraj_jax.evaluation.readers and mmrstraj_jax.data.records, as everywhere else.
"""

import abc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from mmrstraj_jax.data import images, records
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import readers
from mmrstraj_jax.evaluation.readers import Item

Text = tfds.features.Text
QUESTIONS = tfds.features.Sequence(
    {"id": Text(), "type": Text(), "question": Text(), "answer": Text(), "reference": Text()}
)
CONVERSATIONS = tfds.features.Sequence({"from": Text(), "value": Text()})
Example = tuple[str, Path, dict[str, Any]]


class ImageText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of the builders. Subclasses set LICENCE, HOMEPAGE and FEATURES and implement `examples`."""

    VERSION = tfds.core.Version("1.0.0")
    LICENCE: str
    HOMEPAGE: str
    FEATURES: dict[str, Any]

    def __init__(self, *, file_format: str = "array_record", **options):
        """array_record unless asked otherwise: the one format that is read without TensorFlow, at random."""
        super().__init__(file_format=file_format, **options)

    @abc.abstractmethod
    def examples(self, folder: Path) -> dict[str, Callable[[], Iterable[Example]]]:
        """split -> its (id, image file, values of FEATURES), from manual_dir/NAME."""

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"id": Text(), "image": tfds.features.Image(shape=(None, None, 3)), **self.FEATURES}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), homepage=self.HOMEPAGE, license=self.LICENCE
        )

    def _folder(self, dl_manager: tfds.download.DownloadManager) -> Path:
        return Path(dl_manager.manual_dir) / self.name

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        splits = self.examples(self._folder(dl_manager))
        return {name: self._generate_examples(start) for name, start in splits.items()}

    def _generate_examples(self, start: Callable[[], Iterable[Example]]) -> Iterator[tuple[str, dict]]:
        for name, path, values in start():
            yield name, {"id": name, "image": image_of(path), **values}


def image_of(path: Path) -> bytes | Image.Image:
    """The file's own bytes where they are an 8-bit RGB PNG or JPEG, else its RGB pixels (stored as PNG).

    Raises UserError: missing, damaged, or not a picture of three 8-bit channels at most.
    """
    pixels = images.load(path)
    with Image.open(path) as header:
        plain = header.format in ("PNG", "JPEG") and header.mode == "RGB" and header.size == pixels.size
        # a rotation of EXIF is no pixel of the file: readers without it would see another image
        if plain and not header.getexif():
            return path.read_bytes()
    return pixels


def captions(items: Iterable[Item]) -> Iterator[Example]:
    """An example per item: all its references are "captions"."""
    for item in items:
        yield item.id, item.images[0], {"captions": list(item.references)}


def by_image(items: Iterable[Item]) -> Iterator[tuple[Path, list[dict[str, str]]]]:
    """(image, its questions) in the order in which images first appear."""
    found: dict[Path, list[dict[str, str]]] = {}
    for item in items:
        answer = item.meta.get("answer", item.references[0])
        question = {"id": item.id, "type": item.type, "question": item.question}
        question |= {"answer": answer, "reference": item.references[0]}
        found.setdefault(item.images[0], []).append(question)
    yield from found.items()


def conversations(file: Path, more: Callable[[records.Row, Path], dict[str, Any]]) -> Iterator[Example]:
    """An example per row of a LLaVA-OneVision file. Raises UserError: a bad row, or one without one image."""
    for row in records.load(str(file), on_bad="error").rows:
        if row.kind != "image" or len(row.images) != 1:
            raise UserError(f"{row.where}: {len(row.images)} images; expected one")
        (path,) = row.image_paths()
        yield row.id, path, {"conversations": row.conversations, **more(row, path)}


# ---- families of builders ----


class Captions(ImageText, skip_registration=True):
    """Sets of captions with splits train, val and test in one file, FILE, read by READER(file, split)."""

    FILE: str
    READER: Callable = staticmethod(readers.karpathy)
    FEATURES = {"captions": tfds.features.Sequence(Text())}

    def examples(self, folder: Path):
        file, read = folder / self.FILE, type(self).READER
        return {split: lambda split=split: captions(read(file, split)) for split in ("train", "val", "test")}


class RSVQA(ImageText, skip_registration=True):
    """RSVQA: an image with its questions. `answer` is the file's, `reference` the class that is scored."""

    VARIANT: str
    LICENCE = "CC-BY-4.0"
    FEATURES = {"questions": QUESTIONS}

    def examples(self, folder: Path):
        def read(split: str):
            for path, questions in by_image(readers.rsvqa(folder, self.VARIANT, split)):
                yield path.name, path, {"questions": questions}

        return {split: lambda split=split: read(split) for split in readers.RSVQA_SPLITS[self.VARIANT]}


class Built(ImageText, skip_registration=True):
    """Sets that `python -m mmrstraj_jax.build` made: FILE.json, and FILE_val.json, FILE_test.json if any."""

    FILE: str
    LICENCE = "That of the images and texts it was built from; each example's record names it"
    HOMEPAGE = ""
    FEATURES = {"conversations": CONVERSATIONS, "record": Text()}

    def examples(self, folder: Path):
        files = {
            "train": f"{self.FILE}.json",
            "val": f"{self.FILE}_val.json",
            "test": f"{self.FILE}_test.json",
        }
        found = {split: folder / name for split, name in files.items() if (folder / name).is_file()}
        if not found:
            raise UserError(f"{folder}: no {files['train']}; {self.MANUAL_DOWNLOAD_INSTRUCTIONS}")

        def record(row, path: Path) -> dict[str, str]:
            beside = path.with_suffix(".json")
            return {"record": beside.read_text(encoding="utf-8") if beside.is_file() else ""}

        return {split: lambda file=file: conversations(file, record) for split, file in found.items()}


def built_instructions(name: str, step: str) -> str:
    """Where a built set has to lie."""
    return f"manual_dir/{name}/: the folder that `python -m mmrstraj_jax.build {step}` or `review` wrote."
