"""Every TFDS builder builds from files of its published schema and reads back through grain."""

import io
import json
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from datasets_builders import NAMES, base
from datasets_builders.__main__ import main
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.synthcity import sample

ROOT = Path(__file__).parent.parent


def picture(path: Path, seed: int = 0, size: int = 24) -> np.ndarray:
    """Writes pixels; the format follows from the name."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return np.asarray(Image.open(path))


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def dialogue(id: str, image: str, *texts: str) -> dict:
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"id": id, "image": image, "conversations": turns}


def text(value):
    """TFDS's bytes and dicts of columns as text and rows."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        columns = {name: [text(v) for v in values] for name, values in value.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    texts = isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype.kind in "OS")
    return [text(v) for v in value] if texts else value


def built(name: str, tmp_path: Path) -> dict[str, list[dict]]:
    """Builds, then reads every split through grain from the files alone."""
    builder = tfds.builder_cls(name)(data_dir=tmp_path / "data")
    manual = tmp_path / "manual"
    manual.mkdir(exist_ok=True)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
    again = tfds.builder_from_directory(str(builder.data_path))
    assert builder.info.redistribution_info.license and builder.info.description.startswith("# ")
    splits = {}
    for split in again.info.splits:
        source = again.as_data_source(split)
        rows = list(grain.MapDataset.source(source).map(lambda row: {k: text(v) for k, v in row.items()}))
        splits[split] = sorted(rows, key=lambda row: row["id"])
    return splits


def test_all_builders_are_registered_with_a_card():
    for name in NAMES:
        cls = tfds.builder_cls(name)
        card = (ROOT / "datasets_builders" / name / "README.md").read_text()
        assert "**Licence.**" in card and "| split | size |" in card
        assert cls.__doc__ and cls.MANUAL_DOWNLOAD_INSTRUCTIONS or name == "synthcity"
    folders = {path.parent.name for path in (ROOT / "datasets_builders").glob("*/*_dataset_builder.py")}
    assert set(NAMES) == folders and len(NAMES) == 11


def test_rsicap(tmp_path):
    folder = tmp_path / "manual/rsicap"
    pixels = picture(folder / "images/P0378_0001.png")
    row = {
        "image_id": "0",
        "filename": "P0378_0001.png",
        "text_input": "Describe it.",
        "text_output": "A pier.",
    }
    write(folder / "captions.json", {"annotations": [row]})
    (found,) = built("rsicap", tmp_path)["train"]
    assert np.array_equal(found.pop("image"), pixels)
    assert found == {"id": "0", "prompt": "Describe it.", "captions": ["A pier."]}


def test_rsieval(tmp_path):
    folder = tmp_path / "manual/rsieval"
    pairs = [{"question": "Is it?", "answer": "Yes.", "type": "presence"}]
    pairs += [{"question": "Where？", "answer": "Top left", "type": "ab_position"}]
    rows = [{"filename": "P1_2.png", "caption": "Ships.", "qa_pairs": pairs}]
    write(folder / "annotations.json", {"annotations": [*rows, {**rows[0], "filename": "P3.png"}]})
    picture(folder / "images/P1_2.png")
    picture(folder / "images/P3.png", 1)
    found = built("rsieval", tmp_path)["test"]
    assert [row["id"] for row in found] == ["P1_2.png", "P3.png"] and found[0]["captions"] == ["Ships."]
    keys = ("type", "question", "answer")
    asked = [tuple(question[key] for key in keys) for question in found[1]["questions"]]
    assert asked == [("presence", "Is it?", "Yes."), ("ab_position", "Where？", "Top left")]


@pytest.mark.parametrize("name", ["ucm_captions", "sydney_captions", "rsicd"])
def test_karpathy_sets(tmp_path, name):
    folder = tmp_path / "manual" / name
    rows, pixels = [], {}
    for number, split in enumerate(("train", "train", "val", "test")):
        file = f"{number}.tif"
        sentences = [{"tokens": [], "raw": f"Sentence {k} .", "imgid": number, "sentid": k} for k in range(5)]
        rows.append(
            {"filename": file, "imgid": number, "sentids": [], "split": split, "sentences": sentences}
        )
        pixels[file] = picture(folder / "imgs" / file, number)
    write(folder / f"dataset_{name.removesuffix('_captions')}.json", {"dataset": name, "images": rows})
    found = built(name, tmp_path)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 2, "val": 1, "test": 1}
    assert found["val"][0]["captions"] == [f"Sentence {k} ." for k in range(5)]
    assert all(np.array_equal(row["image"], pixels[row["id"]]) for row in found["train"])


def test_nwpu_captions(tmp_path):
    folder = tmp_path / "manual/nwpu_captions"
    rows = {}
    for kind, split in (("airport", "train"), ("beach", "val"), ("river", "test")):
        texts = {f"raw{end}": f"A {kind}\\u00a0here ." for end in ("", "_1", "_2", "_3", "_4")}
        rows[kind] = [{"filename": f"{kind}_1.jpg", "split": split, **texts}]
        picture(folder / "NWPU_images" / kind / f"{kind}_1.jpg")
    write(folder / "dataset_nwpu.json", rows)
    found = built("nwpu_captions", tmp_path)
    assert [row["id"] for row in found["train"]] == ["airport/airport_1.jpg"]
    assert found["test"][0]["captions"] == ["A river here ."] * 5


@pytest.mark.parametrize("variant", ["lr", "hr"])
def test_rsvqa(tmp_path, variant):
    folder = tmp_path / f"manual/rsvqa_{variant}"
    splits = ("train", "val", "test") + (("test_phili",) if variant == "hr" else ())
    prefix, images = ("LR", "Images_LR") if variant == "lr" else ("USGS", "Data")
    for number, split in enumerate(splits):
        questions = [
            {"id": k, "img_id": number, "type": t, "question": q, "answers_ids": [k], "active": True}
            for k, (t, q) in enumerate((("presence", "Is there a road?"), ("count", "How many?")))
        ]
        answers = [
            {"id": k, "question_id": k, "answer": a, "active": True} for k, a in enumerate(("yes", "17"))
        ]
        idle = [{"id": 2, "active": False}]
        write(folder / f"{prefix}_split_{split}_questions.json", {"questions": questions + idle})
        write(folder / f"{prefix}_split_{split}_answers.json", {"answers": answers + idle})
        picture(folder / images / f"{number}.tif", number)
    found = built(f"rsvqa_{variant}", tmp_path)
    assert set(found) == set(splits)
    (row,) = found["test"]
    assert row["id"] == "2.tif"
    count = {"lr": "between 10 and 100", "hr": "17"}[variant]
    assert [(q["answer"], q["reference"]) for q in row["questions"]] == [("yes", "yes"), ("17", count)]


@pytest.mark.parametrize("name", ["rsi_instruct", "rsi_traffic"])
def test_built_sets(tmp_path, name):
    folder = tmp_path / "manual" / name
    pixels = picture(folder / "images/a.png")
    write(folder / "images/a.json", {"provider": {"licence": "CC0-1.0"}})
    picture(folder / "images/b.png", 1)
    write(
        folder / f"{name}.json",
        [dialogue("a", "images/a.png", "<image>\nDescribe.", "Roads.", "Why?", "So.")],
    )
    write(folder / f"{name}_test.json", [dialogue("b", "images/b.png", "<image>\nDescribe.", "Houses.")])
    found = built(name, tmp_path)
    assert set(found) == {"train", "test"}
    (row,) = found["train"]
    assert (
        np.array_equal(row["image"], pixels) and json.loads(row["record"])["provider"]["licence"] == "CC0-1.0"
    )
    assert (
        row["conversations"]
        == dialogue("", "", "<image>\nDescribe.", "Roads.", "Why?", "So.")["conversations"]
    )
    assert found["test"][0]["record"] == ""


def test_synthcity(tmp_path, monkeypatch):
    files = {}
    for name, kind in (("stage1", "general"), ("eval_stage1", "eval_general")):
        files[name] = sample.write_sample(tmp_path / "city", name, 1, 0, "B", kind)
    monkeypatch.setattr(sample, "EMBEDDED", {name: sample.EMBEDDED[name] for name in files})
    monkeypatch.setattr(sample, "ensure_sample", lambda: files)
    found = built("synthcity", tmp_path)
    assert set(found) == set(files) and len(found["stage1"]) == 1
    rows = {row["id"]: row for row in json.loads(files["eval_stage1"].read_text())}
    assert rows.keys() == {row["id"] for row in found["eval_stage1"]}
    for row in found["eval_stage1"]:
        assert json.loads(row["truth"]) == rows[row["id"]]["truth"] and row["type"] == rows[row["id"]]["type"]
        image = Image.open(tmp_path / "city" / rows[row["id"]]["image"])
        assert np.array_equal(row["image"], np.asarray(image))


# ---- what they share ----


def test_images_keep_their_bytes_where_they_can(tmp_path):
    for file in ("a.png", "a.jpg"):
        picture(tmp_path / file)
        assert base.image_of(tmp_path / file) == (tmp_path / file).read_bytes()
    pixels = picture(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(base.image_of(tmp_path / "a.tif")), pixels)
    Image.new("L", (8, 8), 7).save(tmp_path / "gray.png")
    assert base.image_of(tmp_path / "gray.png").getpixel((0, 0)) == (7, 7, 7)
    turned, exif = Image.new("RGB", (8, 4), (9, 9, 9)), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned.save(buffer := io.BytesIO(), "JPEG", exif=exif)
    (tmp_path / "turned.jpg").write_bytes(buffer.getvalue())
    assert not isinstance(base.image_of(tmp_path / "turned.jpg"), bytes)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("rsicap", {}, "captions.json: no such file"),
        ("rsi_traffic", {}, "no rsi_traffic.json; manual_dir/rsi_traffic/"),
        ("rsi_traffic", {"rsi_traffic.json": [dialogue("a", "no.png", "<image>", "A.")]}, "no.png"),
        ("ucm_captions", {"dataset_ucm.json": {"images": []}}, "no images of split 'train'"),
    ],
)
def test_missing_files_are_named(tmp_path, name, files, message):
    (tmp_path / "manual" / name).mkdir(parents=True)
    for file, value in files.items():
        write(tmp_path / "manual" / name / file, value)
    with pytest.raises(UserError, match=message):
        built(name, tmp_path)


def test_the_command_needs_no_tensorflow(tmp_path):
    folder = tmp_path / "manual/rsicap"
    picture(folder / "images/a.png")
    row = {"image_id": "0", "filename": "a.png", "text_input": "Describe it.", "text_output": "A pier."}
    write(folder / "captions.json", {"annotations": [row]})
    code = "import sys; from datasets_builders.__main__ import main; main(sys.argv[1:]); "
    code += "assert 'tensorflow' not in sys.modules"
    words = ["rsicap", "--manual-dir", tmp_path / "manual", "--data-dir", tmp_path / "data"]
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("rsicap/1.0.0: train 1\n")
    assert list((tmp_path / "data/rsicap/1.0.0").glob("*.array_record*"))


def test_a_set_that_was_built_before_says_so(tmp_path, capsys):
    folder = tmp_path / "manual/rsicap"
    picture(folder / "images/a.png")
    row = {"image_id": "0", "filename": "a.png", "text_input": "Describe it.", "text_output": "A pier."}
    write(folder / "captions.json", {"annotations": [row]})
    words = ["rsicap", "--manual-dir", str(tmp_path / "manual"), "--data-dir", str(tmp_path / "data")]
    main(words)
    assert "built before" not in capsys.readouterr().err
    write(folder / "captions.json", {"annotations": [row, row | {"image_id": "1"}]})
    main(words)
    shown = capsys.readouterr()
    assert "rsicap/1.0.0: built before, not read again; remove it" in shown.err and "train 1" in shown.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rsicab"], "rsicab: expected some of nwpu_captions, rsi_instruct"),
        (["rsicap"], "rsicap: expected its files in --manual-dir: manual_dir/rsicap/: captions.json and"),
        (["rsicap", "--manual-dir", "."], "rsicap: expected its files in --manual-dir"),
    ],
)
def test_wrong_words_are_named(words, message):
    with pytest.raises(UserError, match=message):
        main(words)
