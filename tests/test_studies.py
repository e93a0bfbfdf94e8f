"""Studies of evaluate: what was forgotten, what corruption costs, which description is better."""

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image
from test_evaluate import PLAIN, _write, picture
from test_judge import server  # noqa: F401

from mmrstraj_jax import evaluate, jsonl
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import corruption, pipeline, rubric, studies, tasks, traffic
from mmrstraj_jax.evaluation.compare import forgetting, read_result
from mmrstraj_jax.evaluation.judge import UNPARSED, Judge
from mmrstraj_jax.evaluation.readers import Item


def _folder(path, answers, kinds, truth, image="a.png", questions=None, task="rsieval-vqa"):
    rows = [
        {"id": str(i), "type": kinds[i], "question": (questions or ["Is there a car?"] * 99)[i],
         "image": str(image), "prediction": answers[i], "references": [truth[i]]}
        for i in range(len(answers))
    ]  # fmt: skip
    evaluate.main(["--predictions", str(_write(path / "predictions.jsonl", rows)), "--task", task, *PLAIN])
    return path


def test_forgetting_counts_flips_and_puts_the_largest_loss_first(tmp_path, capsys):
    kinds = ["presence"] * 6 + ["road_ori"] * 4
    truth = ["Yes."] * 6 + ["North-south"] * 4
    before = _folder(tmp_path / "s1", ["yes"] * 5 + ["no"] + ["west-east"] * 4, kinds, truth)
    after = _folder(
        tmp_path / "s2", ["no"] * 3 + ["yes"] * 3 + ["vertical"] + ["west-east"] * 3, kinds, truth
    )
    assert evaluate.main(["forgetting", str(before), str(after)]) == 0
    grid = forgetting(read_result(before), read_result(after))
    rows = {row[0]: dict(zip(grid.columns, row, strict=True)) for row in grid.rows}
    assert [row[0] for row in grid.rows] == ["presence", "road_ori", "all questions (micro)"]
    presence = rows["presence"]
    assert (presence["lost"], presence["gained"], presence["kept, %"]) == ("3", "1", "40.0")
    assert rows["road_ori"]["kept, %"] == "-" and rows["road_ori"]["gained"] == "1"
    assert rows["all questions (micro)"]["difference"] == "-10.0"
    assert "presence" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart(tmp_path):
    """exp1/run led to exp2/run: each of a suite's models has a folder of its own."""
    for number, start in ((1, None), (2, {"run": str(tmp_path / "exp1" / "run")})):
        folder = tmp_path / f"exp{number}" / "run"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "base.json").write_text(json.dumps({"init_from": start, "path": "w"}))
    found = studies._chain(tmp_path / "exp2" / "run")
    assert [name for name, _ in found] == ["base", "1-run", "2-run"]
    assert [source.run for _, source in found[1:]] == [str(tmp_path / f"exp{n}" / "run") for n in (1, 2)]


# ---- corruption ----


@pytest.mark.parametrize("kind", corruption.KINDS)
def test_corruption_is_a_function_of_its_name_and_grows(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    image = Image.fromarray(pixels).resize((96, 80), Image.Resampling.BICUBIC)
    clean = np.asarray(image, np.float32)
    distances = []
    for severity in corruption.SEVERITIES:
        once, again = (corruption.corrupt(image, kind, severity, "a.png") for _ in range(2))
        assert once.size == image.size and once.mode == "RGB" and once.tobytes() == again.tobytes()
        distances.append(np.abs(np.asarray(once, np.float32) - clean).mean())
    assert 0 < distances[0] < distances[1] < distances[2]


def test_the_corruption_study_asks_about_corrupted_files(tmp_path):
    """The model answers right on the clean picture only."""
    image = picture(tmp_path / "a.png", size=(64, 64))
    items = [Item(str(i), (image,), "Is there a car?", "presence", ("Yes.",)) for i in range(4)]

    def ask(found):
        for at, item in enumerate(found):
            yield at, "yes" if item.images == (image,) else "no", "prompt"

    out, task = tmp_path / "out", tasks.get("rsieval-vqa")
    model = pipeline.Answerer(ask, {"model": "stub"}, {})
    grid = corruption.study(
        task, items, out, model, pipeline.Scoring(meteor=None), {}, kinds=["haze", "jpeg"], severities=[1, 3]
    )
    assert [row[0] for row in grid.rows] == ["haze-1", "haze-3", "jpeg-1", "jpeg-3"]
    assert all(row[3:6] == ["100.0", "0.0", "-100.0"] for row in grid.rows)
    assert len(list((out / "images" / "haze-3").glob("*.png"))) == 1  # one file for four questions
    assert (out / "corruption.png").stat().st_size > 5000 and "jpeg-3" in (out / "corruption.md").read_text()


# ---- structured answers and selection ----

UNIT = {"kind": "flow density", "text": "Traffic is heavy.", "place": "centre", "evidence": "many cars"}


def test_structured_answers_are_counted_and_read(tmp_path, capsys):
    good, bad = json.dumps([UNIT, UNIT | {"kind": "bottlenecks", "evidence": ""}]), "Traffic is heavy."
    rows = [
        {"id": str(i), "type": "description", "question": None, "image": "a.png", "prediction": answer,
         "references": ["A road with heavy traffic."]}
        for i, answer in enumerate([good, bad])
    ]  # fmt: skip
    rows.append(
        rows[0] | {"id": "q", "type": "presence", "question": "Is there a road?", "prediction": "yes"}
    )
    path = _write(tmp_path / "predictions.jsonl", rows)
    options = ["--structured", "--select", "traffic", "--num", "5"]
    assert evaluate.main(["--predictions", str(path), "--task", "traffic-semantics", *options, *PLAIN]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    part = scores["semantics"]
    assert (part["n"], part["parsed"], part["with_place"], part["with_evidence"]) == (2, 1, 2, 1)
    assert part["units"]["flow density"] == part["units"]["bottlenecks"] == 1
    level = scores["captions"]["description"]["traffic"]["flow density"]
    assert (level["right"], level["missing"]) == (1, 1)  # prose where JSON was asked for says nothing
    assert "1 of 2 answers are the JSON array" in capsys.readouterr().out
    assert traffic.spoken(bad) == ""
    with pytest.raises(UserError, match="--num 0: expected 1 or more"):
        evaluate.main(["--predictions", str(path), "--task", "traffic-semantics", "--num", "0"])


# ---- rubric and pairs ----


def _described(tmp_path):
    truth = ["Heavy traffic on a motorway.", "A quiet local street with parked cars."]
    good = ["Traffic is heavy on the motorway.", "A local street."]
    bad = ["A harbor with ships and a stadium.", "A huge motorway."]
    kinds, asked = ["description"] * 2, ["Describe the traffic."] * 2
    more = {"questions": asked, "task": "traffic-semantics"}
    return [
        read_result(_folder(tmp_path / name, answers, kinds, truth, **more), name)
        for name, answers in (("good", good), ("bad", bad))
    ]


def _codes(messages):
    return dict(re.findall(r"([a-z_12 ]+): ([0-9A-F]{8})", messages[0]["content"].split("Code words")[1]))


def _grader(messages, lie=False):
    data = json.loads(messages[1]["content"])
    codes = {name.strip(): code for name, code in _codes(messages).items()}
    if "answer_1" in data:
        return json.dumps({"code": codes["answer_1" if "local street." in data["answer_1"].lower() + "."
                                         or "heavy on" in data["answer_1"] else "answer_2"]})  # fmt: skip
    text, truth = data["description"], data["truth"]
    if data["criterion"] == "unsupported claims":
        found, evidence = ("none", "") if "stadium" not in text else ("many", "a stadium")
    else:
        shared = [word for word in text.rstrip(".").split() if len(word) > 3 and word in truth]
        found, evidence = ("right", shared[0]) if shared else ("not mentioned", "")
    return json.dumps({"code": codes[found], "evidence": "invented words" if lie and evidence else evidence})


def test_the_rubric_needs_evidence_that_can_be_found(tmp_path, server):  # noqa: F811
    results = _described(tmp_path)
    url, requests = server(_grader)
    grid, rows = rubric.grade(results, Judge("stub", url, tmp_path / "judge.jsonl"))
    graded = {(row["model"], row["id"]): row["grades"] for row in rows}
    assert graded["good", "0"]["flow density"] == {"grade": "right", "evidence": "motorway"}
    assert graded["bad", "0"]["unsupported claims"]["grade"] == "many"
    assert len(grid.rows) == 2 * len(rubric.CRITERIA)
    asked = len(requests)
    rubric.grade(results, Judge("stub", None, tmp_path / "judge.jsonl"))
    assert len(requests) == asked  # replayed
    lying, _ = server(lambda messages: _grader(messages, lie=True))
    _, rows = rubric.grade(results, Judge("stub", lying, tmp_path / "lies.jsonl"))
    grades = [g["grade"] for row in rows for g in row["grades"].values()]
    assert UNPARSED in grades and not {"right", "many"} & set(grades)


def test_a_grader_that_fails_the_controls_is_not_believed(tmp_path, server):  # noqa: F811
    def praise(messages):
        codes = {name.strip(): code for name, code in _codes(messages).items()}
        first = json.loads(messages[1]["content"])["description"].split()[0]
        return json.dumps({"code": next(iter(codes.values())), "evidence": first})

    results, (url, _) = _described(tmp_path), server(praise)
    grid, rows = rubric.grade(results, Judge("stub", url, tmp_path / "judge.jsonl"))
    assert {g["grade"] for row in rows for g in row["grades"].values()} == {UNPARSED}
    assert "not believed" in grid.notes[0]


def test_pairs_are_asked_in_both_orders(tmp_path, server, capsys):  # noqa: F811
    _described(tmp_path)
    url, requests = server(_grader)
    args = [str(tmp_path / "good"), str(tmp_path / "bad"), "--judge", "stub", "--judge-url", url]
    assert evaluate.main(["prefer", *args, "--out", str(tmp_path / "out")]) == 0
    rows = list(jsonl.read(tmp_path / "out" / "prefer.jsonl"))
    assert [row["preferred"] for row in rows] == ["first", "first"] and len(requests) == 4
    assert "100.0" in capsys.readouterr().out
    url, _ = server(lambda messages: json.dumps({"code": _codes(messages)[" answer_1"]}))
    grid, _ = rubric.prefer(
        *_described(tmp_path / "again"), Judge("stub", url, tmp_path / "always_first.jsonl")
    )
    assert dict(zip(grid.columns, grid.rows[0], strict=True))["unparsed"] == "2"


def test_people_grade_without_seeing_names(tmp_path, capsys):
    _described(tmp_path)
    sheet = tmp_path / "sheet.csv"
    assert (
        evaluate.main(["rubric", str(tmp_path / "good"), str(tmp_path / "bad"), "--sheet", str(sheet)]) == 0
    )
    assert "good" not in sheet.read_text() and "bad" not in sheet.read_text()
    with sheet.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {name: grades[0] for name, grades in rubric.CRITERIA.items()}
    rows[0]["bottlenecks"] = ""
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    capsys.readouterr()
    assert evaluate.main(["rubric", "--filled", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert out.count("right 2") >= 6 and "none 2" in out and "right 1, partly right 0" in out
    sheet.write_text(sheet.read_text().replace("none", "plenty", 1))
    with pytest.raises(UserError, match="entry 1|entry 2"):
        rubric.read_sheet(sheet)


def test_an_ablation_with_a_bad_value_trains_nothing(tmp_path, capfd):
    with pytest.raises(UserError, match="--anyres.tau -5.0 .*--print-config: exit code 2"):
        evaluate.main(["ablation", "--task", "rsieval-vqa", "--tau", "-5", "--out", str(tmp_path / "out")])
    assert "anyres.tau -5.0: expected" in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_the_ablation_runs_the_ordinary_commands_a_factor_at_a_time(tmp_path, monkeypatch, capsys):
    calls = []

    def run(name, *args, quiet=False):
        calls.append((name, args))
        if name == "evaluate":
            folder = args[args.index("--out") + 1]
            right = 4 if "tau" in folder else 2
            truth = ["Yes."] * 4
            _folder(tmp_path / folder, ["yes"] * right + ["no"] * (4 - right), ["presence"] * 4, truth)

    monkeypatch.setattr(studies, "_run", run)
    args = ["--task", "rsieval-vqa", "--tau", "500", "--feature-layer", "-1", "--lora", "projector"]
    assert evaluate.main(["ablation", *args, "--out", str(tmp_path / "out"), "--train", "--steps", "5"]) == 0
    trained = [" ".join(args) for name, args in calls if name == "train"]
    checked, trained = trained[:4], trained[4:]  # every variant's options before the first run
    assert all(text.endswith("--steps 5 --print-config") for text in checked)
    assert len(trained) == 4 and all(text.endswith("--steps 5") for text in trained)
    assert "--anyres.tau 500" in trained[1] and "--lora.vision_tower --steps" in trained[3]
    assert "+50.0" in capsys.readouterr().out and (tmp_path / "out" / "report.html").exists()
