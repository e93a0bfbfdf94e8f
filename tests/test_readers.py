"""Readers of the benchmarks, on fixtures made here to the published schemas (the data are not ours to
ship).
"""

import json
from pathlib import Path

import pytest

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import readers


def write(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def fails(message: str, function, *args, **kwargs) -> None:
    with pytest.raises(UserError, match=message) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)


# ---- RSIEval, RSICap ----


def rsieval(*pairs, name="P0001_0001.png", caption="An image of a harbor."):
    keys = ("question", "answer", "type")
    return {
        "filename": name,
        "caption": caption,
        "qa_pairs": [dict(zip(keys, p, strict=True)) for p in pairs],
    }


def test_rsieval(tmp_path):
    rows = [
        rsieval(
            ("Does this image contains habors？", "Yes.", "presence"),
            ("Where is the ship?", "No.", "ab_position"),
            ("Where is the ship?", "No.", "ab_position"),  # asked twice, as in P2342_0019
            ("Is this image a panchromatic image or a color image?", "Color image.", "color"),
            ("How many buildings?", "Many buildigns.", "quantity"),
        ),
        rsieval(("Is it urban?", " yes ", "scene"), name="P0002_0001.png"),
    ]
    write(tmp_path / "annotations.json", {"annotations": rows})
    captions = readers.rsieval_captions(tmp_path)
    assert [(i.id, i.question, i.type, i.references) for i in captions][0] == (
        "P0001_0001.png",
        None,
        "caption",
        ("An image of a harbor.",),
    )
    questions = readers.rsieval_questions(tmp_path / "annotations.json")
    assert [q.id for q in questions] == [f"P0001_0001.png#{i}" for i in range(5)] + ["P0002_0001.png#0"]
    assert questions[0].question.endswith("？") and questions[0].images == (
        tmp_path / "images/P0001_0001.png",
    )
    assert [q.type for q in questions][:4] == ["presence", "ab_position", "ab_position", "color"]
    assert questions[3].meta == {"filed_as": "image"} and questions[0].meta == {}
    assert questions[4].references == ("Many buildigns.",) and questions[5].references == ("yes",)
    fails("no such image; 2 of 2 are missing", readers.require_images, captions)
    for item in captions:
        write(item.images[0], "x")
    readers.require_images(captions)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [rsieval(("q", "a", "colour"))],
            r"annotations\[0\]: qa_pairs\[0\]: type 'colour', expected one of pres",
        ),
        ([rsieval(("q", "", "color"))], r"qa_pairs\[0\]: 'answer' is empty"),
        ([rsieval(("q", 3, "color"))], "'answer' is 3, expected str"),
        ([{"filename": "a.png"}], r"annotations\[0\]: lacks the key 'qa_pairs'; it has filename"),
        ([rsieval(("q", "a", "color"), name="../a.png")], r"annotations\[0\]: image '../a.png'"),
        ([rsieval(("q", "a", "color"))] * 2, "P0001_0001.png#0 occurs 2 times"),
        (["x"], "expected an object, found str"),
        ([], "holds no items"),
    ],
)
def test_rsieval_is_strict(tmp_path, rows, message):
    write(tmp_path / "annotations.json", {"annotations": rows})
    fails(message, readers.rsieval_questions, tmp_path)


def test_files_that_are_not_there_or_not_json(tmp_path):
    fails("annotations.json: no such file", readers.rsieval_captions, tmp_path)
    write(tmp_path / "annotations.json", '{"annotations": [\n{"filename": }]}')
    fails("line 2 is not JSON", readers.rsieval_captions, tmp_path)
    (tmp_path / "annotations.json").write_bytes(b"\xff\xfe\x00")
    fails("cannot be read", readers.rsieval_captions, tmp_path)
    write(tmp_path / "annotations.json", [])
    fails("expected an object, found list", readers.rsieval_captions, tmp_path)


def test_rsicap(tmp_path):
    row = {"image_id": "0", "filename": "P0378_0001.png", "text_input": "Describe.", "text_output": "A lot."}
    write(tmp_path / "captions.json", "\ufeff" + json.dumps({"annotations": [row, row | {"image_id": 1}]}))
    items = readers.rsicap(tmp_path)
    assert [(i.id, i.question, i.references) for i in items] == [(n, "Describe.", ("A lot.",)) for n in "01"]
    assert items[0].images == (tmp_path / "images/P0378_0001.png",)
    write(tmp_path / "captions.json", {"annotations": [row | {"image_id": True}]})
    fails("'image_id' is True, expected str or int", readers.rsicap, tmp_path)


# ---- Karpathy, NWPU ----


def karpathy_image(name, split, *raws):
    sentences = [{"tokens": raw.split(), "raw": raw, "imgid": 0, "sentid": i} for i, raw in enumerate(raws)]
    return {"filename": name, "imgid": 0, "sentids": [0], "split": split, "sentences": sentences}


def test_karpathy(tmp_path):
    images = [
        karpathy_image("1.tif", "train", "a field ."),
        karpathy_image("2.tif", "test", "a road .", "a road .", "the road ."),
    ]
    file = write(tmp_path / "dataset_rsicd.json", {"dataset": "rsicd", "images": images})
    (item,) = readers.karpathy(file)
    assert item.references == ("a road .", "a road .", "the road .")
    assert item.meta == {"distinct_references": 2} and item.images == (tmp_path / "images/2.tif",)
    (tmp_path / "imgs").mkdir()
    assert readers.karpathy(file, "train")[0].images == (tmp_path / "imgs/1.tif",)
    assert readers.karpathy(file, images=tmp_path / "x")[0].images == (tmp_path / "x/2.tif",)
    fails("no images of split 'val'; it has test, train", readers.karpathy, file, "val")
    write(file, {"images": [karpathy_image("1.tif", "test")]})
    fails("1.tif has no sentences", readers.karpathy, file)
    write(file, {"images": [karpathy_image("1.tif", "test", " ")]})
    fails(r"images\[0\]: sentences\[0\]: 'raw' is empty", readers.karpathy, file)


def test_nwpu(tmp_path):
    row = {f"raw_{i}": f"caption {i}" for i in range(1, 5)}
    row |= {"raw": "the plane\\u00a0is white .", "filename": "airplane_001.jpg", "split": "test", "imgid": 0}
    file = write(tmp_path / "dataset_nwpu.json", {"airplane": [row], "airport": [row | {"split": "train"}]})
    (item,) = readers.nwpu(file)
    assert item.id == "airplane/airplane_001.jpg" and item.images[0].parent.name == "airplane"
    assert item.references == ("the plane is white .", "caption 1", "caption 2", "caption 3", "caption 4")
    assert item.meta == {"class": "airplane", "distinct_references": 5, "repaired": 1}
    # and the character itself, beside the escaped one
    write(file, {"airplane": [row | {"raw_1": "two\u00a0planes", "raw_2": "a  \u00a0 b\\u00a0c"}]})
    (item,) = readers.nwpu(file)
    assert item.references[1:3] == ("two planes", "a b c") and item.meta["repaired"] == 3
    write(file, {"airplane": [{k: v for k, v in row.items() if k != "raw_3"}]})
    fails(r"airplane\[0\]: lacks the key 'raw_3'", readers.nwpu, file)


def test_folders_as_they_were_published(tmp_path):
    """UCM_captions/dataset.json, RSICD_images/ and, of NWPU, a plain images/."""
    from mmrstraj_jax.evaluation import tasks

    rows = {"images": [karpathy_image("1.tif", "test", "a field .")]}
    write(tmp_path / "ucm" / "dataset.json", rows)
    (item,) = tasks.get("ucm").load(tmp_path / "ucm", None)
    assert item.references == ("a field .",)
    fails("dataset_sydney.json: no such file", tasks.get("sydney").load, tmp_path, None)
    (tmp_path / "ucm" / "RSICD_images").mkdir()
    (item,) = readers.karpathy(tmp_path / "ucm" / "dataset.json")
    assert item.images == (tmp_path / "ucm/RSICD_images/1.tif",)
    fails("1 of 1 are missing; name their folder with --images", readers.require_images, [item])
    row = {key: "a plane" for key in ("raw", "raw_1", "raw_2", "raw_3", "raw_4")}
    row |= {"filename": "airplane_001.jpg", "split": "test"}
    file = write(tmp_path / "nwpu" / "dataset_nwpu.json", {"airplane": [row]})
    for name in ("images", "NWPU_images"):
        (tmp_path / "nwpu" / name).mkdir()
        assert readers.nwpu(file)[0].images == (tmp_path / f"nwpu/{name}/airplane/airplane_001.jpg",)


# ---- RSVQA ----


def rsvqa_files(folder: Path, prefix: str, rows: list[tuple[str, str]]) -> None:
    """Question 2i of each (type, answer), with an inactive row after each."""
    questions, answers = [], []
    for i, (kind, answer) in enumerate(rows):
        n = 2 * i
        questions.append(
            {"id": n, "img_id": 7, "type": kind, "question": f"q{n}?", "answers_ids": [n], "active": True}
        )
        answers.append({"id": n, "question_id": n, "answer": answer, "active": True, "people_id": 0})
        questions.append({"id": n + 1, "active": False})
        answers.append({"id": n + 1, "active": False})
    write(folder / f"{prefix}_questions.json", {"questions": questions})
    write(folder / f"{prefix}_answers.json", {"answers": answers})


def test_rsvqa_lr(tmp_path):
    rows = [("count", "12"), ("comp", "Yes"), ("rural_urban", "rural"), ("count", "0"), ("presence", "no")]
    rsvqa_files(tmp_path, "LR_split_test", rows)
    items = readers.rsvqa(tmp_path, "lr")
    assert [i.references[0] for i in items] == ["between 10 and 100", "yes", "rural", "0", "no"]
    assert [i.meta["numeric"] for i in items] == [True, False, False, True, False]
    assert items[0].meta["answer"] == "12" and items[0].images == (tmp_path / "Images_LR/7.tif",)
    assert [i.id for i in items] == ["0", "2", "4", "6", "8"]
    fails("LR_split_val_questions|LR_split_val_answers", readers.rsvqa, tmp_path, "lr", "val")
    fails(
        "RSVQA lr test_phili: expected a variant and split of lr: train",
        readers.rsvqa,
        tmp_path,
        "lr",
        "test_phili",
    )
    rsvqa_files(tmp_path, "LR_split_test", [("area", "1m2")])
    fails(r"questions\[0\]: type 'area', expected one of presence", readers.rsvqa, tmp_path)
    rsvqa_files(tmp_path, "LR_split_test", [("count", "some")])
    fails(r"answers\[0\]: answer 'some' to a question of type 'count'", readers.rsvqa, tmp_path)


def test_rsvqa_answers_must_belong_to_their_question(tmp_path):
    rsvqa_files(tmp_path, "LR_split_test", [("count", "12"), ("comp", "yes")])
    file = tmp_path / "LR_split_test_answers.json"
    data = json.loads(file.read_text())
    data["answers"][0]["question_id"] = 2
    write(file, data)
    fails(r"questions\[0\]: answers_ids is \[0\], expected the id", readers.rsvqa, tmp_path)


def test_rsvqa_hr(tmp_path):
    rsvqa_files(tmp_path, "USGS_split_test_phili", [("area", "0m2"), ("area", "4316m2"), ("count", "12")])
    items = readers.rsvqa(tmp_path, "hr", "test_phili")
    assert [i.references[0] for i in items] == ["0m2", "more than 1000m2", "12"]
    assert items[0].images == (tmp_path / "Data/7.tif",)


@pytest.mark.parametrize(
    ("answer", "kind", "variant", "expected"),
    [
        ("1", "count", "lr", "between 0 and 10"),
        ("10", "count", "lr", "between 0 and 10"),
        ("11", "count", "lr", "between 10 and 100"),
        ("1000", "count", "lr", "between 100 and 1000"),
        ("1,001", "count", "lr", "more than 1000"),
        ("Between 1 and 10.", "count", "lr", "between 0 and 10"),
        ("between 101 and 1000", "count", "lr", "between 100 and 1000"),
        ("between 10 and 1000", "count", "lr", None),
        ("more than 1000", "count", "lr", "more than 1000"),
        ("ten", "count", "lr", None),
        ("10 m²", "area", "hr", "between 0m2 and 10m2"),
        ("between 10m2 and 100m2", "area", "hr", "between 10m2 and 100m2"),
        ("0.5m2", "area", "hr", "between 0m2 and 10m2"),
        ("007", "count", "hr", "7"),
        ("-1", "count", "hr", None),
        ("9" * 5000, "count", "hr", None),
        ("between 0 and " + "9" * 5000, "count", "lr", None),
        (" Yes. ", "presence", "lr", "yes"),
    ],
)
def test_rsvqa_bins(answer, kind, variant, expected):
    assert readers.rsvqa_bin(answer, kind, variant) == expected


# ---- LEVIR-CC ----


def test_levir_cc(tmp_path):
    changed = karpathy_image("test_1.png", "test", " a house is built .", " houses appear .")
    same = karpathy_image("test_2.png", "test", " there is no difference .", " no change has occurred .")
    train = karpathy_image("train_1.png", "train", " x")
    flagged = [changed | {"changeflag": 1}, same | {"changeflag": 0}, train]
    write(tmp_path / "LevirCCcaptions.json", {"images": flagged})
    first, second = readers.levir_cc(tmp_path)
    assert first.references == ("a house is built .", "houses appear .")
    assert first.images == (tmp_path / "images/test/A/test_1.png", tmp_path / "images/test/B/test_1.png")
    assert (first.meta["changed"], second.meta["changed"]) == (True, False)
    assert first.meta["changed_from"] == "changeflag"
    write(tmp_path / "LevirCCcaptions.json", {"images": [changed, same]})
    assert [i.meta for i in readers.levir_cc(tmp_path)] == [
        {"changed": True, "changed_from": "stock sentences"},
        {"changed": False, "changed_from": "stock sentences"},
    ]
    write(tmp_path / "LevirCCcaptions.json", {"images": [changed | {"changeflag": "1"}]})
    fails("'changeflag' is '1', expected int or bool", readers.levir_cc, tmp_path)


@pytest.mark.parametrize("place", ["test", "images/test", "test/A"])
def test_levir_rows_with_their_split_in_filepath(tmp_path, place):
    row = karpathy_image("test_1.png", "", " a house .")
    del row["split"]
    write(tmp_path / "LevirCCcaptions.json", {"images": [row | {"filepath": place}]})
    (item,) = readers.levir_cc(tmp_path)
    assert item.images == (tmp_path / "images/test/A/test_1.png", tmp_path / "images/test/B/test_1.png")
    write(tmp_path / "LevirCCcaptions.json", {"images": [row | {"filepath": "A"}]})
    fails(r"images\[0\]: 'filepath' is 'A', expected a folder train, val or test", readers.levir_cc, tmp_path)
