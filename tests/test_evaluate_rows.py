"""Rows that any tool wrote, scored by `evaluate --predictions`: what is accepted, what counts as right."""

import json

import pytest
from test_evaluate import _scores, _write

from mmrstraj_jax import evaluate, jsonl
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import tasks

QUESTION = {"id": "q", "type": "presence", "question": "Is there a car?", "prediction": "no"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"references": [1, 2]}, r"q: references is \[1, 2\], expected a list of texts, none empty"),
        ({"references": ["  "]}, "q: references is"),
        ({"references": "No."}, "q: references is"),
        ({}, "q: references is None"),
        ({"references": ["No."], "type": 3}, "q: type is 3, expected a text"),
        ({"references": ["No."], "question": 5}, "q: question is 5, expected a text, or none"),
        ({"references": ["No."], "image": 5}, "q: image is 5, expected a path"),
        (None, "p.jsonl: holds no predictions"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(tmp_path, row, message):
    path = _write(tmp_path / "p.jsonl", [] if row is None else [QUESTION | row])
    with pytest.raises(UserError, match=message):
        evaluate.main(["--predictions", str(path), "--task", "synthcity"])


def test_a_last_row_without_a_line_break_counts(tmp_path):
    rows = [QUESTION | {"id": str(n), "references": ["No."]} for n in range(3)]
    path = _write(tmp_path / "p.jsonl", rows)
    path.write_bytes(path.read_bytes().rstrip())
    evaluate.main(["--predictions", str(path), "--task", "synthcity"])
    assert _scores(tmp_path)["n"] == 3
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="line 3 is not JSON"):
        evaluate.main(["--predictions", str(path), "--task", "synthcity"])


@pytest.mark.parametrize("task", ["rsieval-vqa", "synthtraffic-bench"])
def test_a_verdict_does_not_depend_on_the_other_items(tmp_path, task):
    """The closed set is SynthCity's own, and fixed."""
    rows = [
        {"id": str(n), "type": "traffic_density", "question": "What is the traffic level?",
         "prediction": "heavy", "references": [reference]}
        for n, reference in enumerate(["light", "moderate", "heavy", "flowing"])
    ]  # fmt: skip
    path, found = tmp_path / "p.jsonl", []
    for part in (rows, rows[1:2]):
        evaluate.main(["--predictions", str(_write(path, part)), "--task", task])
        found.append(
            {row["id"]: (row["verdict"], row["rule"]) for row in jsonl.read(tmp_path / "items.jsonl")}
        )
    assert found[0]["1"] == found[1]["1"]
    assert found[0]["1"] == (("wrong", "closed set") if "synth" in task else ("undecided", "open"))


def test_the_closed_set_holds_every_answer_of_synthcity():
    for name in ("synthcity", "synthtraffic-bench"):
        task = tasks.get(name)
        asked = [item for item in task.load(None, None) if item.type not in tasks.TEXTS]
        assert len(asked) > 500 and {item.references[0] for item in asked} <= task.closed


def test_rsvqa_is_scored_in_bins(tmp_path):
    def row(i, kind, reference, prediction):
        return {
            "id": str(i),
            "type": kind,
            "question": "q",
            "prediction": prediction,
            "references": [reference],
        }

    rows = [
        row(0, "presence", "yes", "Yes."), row(1, "presence", "No.", "yes"),
        row(2, "count", "12", "between 10 and 100"),  # a row of another tool: the number itself
        row(3, "count", "more than 1000", "many"), row(4, "rural_urban", "rural", "Rural"),
        row(5, "comp", "no", ""),
    ]  # fmt: skip
    path = _write(tmp_path / "p.jsonl", rows)
    evaluate.main(["--predictions", str(path), "--task", "rsvqa-lr"])
    part = _scores(tmp_path)["questions"]
    by = {r["type"]: (r["correct"], r["wrong"], r["undecided"]) for r in part["types"]}
    # spec 1.4: what cannot be read is no match, and is in the denominator of OA and AA
    assert by == {"presence": (1, 1, 0), "count": (1, 1, 0), "rural_urban": (1, 0, 0), "comp": (0, 1, 0)}
    assert part["unparsed"] == 2 and part["rules"]["unparsed: wrong"] == 2
    assert part["micro"]["accuracy"] == 3 / 6 and part["macro"] == (0.5 + 0.5 + 1 + 0) / 4
    assert part["non_numeric"]["n"] == 4
    _write(path, [row(0, "count", "some", "7")])
    with pytest.raises(UserError, match="0: reference 'some' of type 'count': expected a number or a bin"):
        evaluate.main(["--predictions", str(path), "--task", "rsvqa-lr"])


def test_means_of_the_non_numeric_types(tmp_path):
    """As big_vision's acc_avg_nonum: a mean of types, whatever their sizes."""
    kinds = ["presence"] * 3 + ["comp"] + ["rural_urban"] * 2 + ["count"]
    answers = ["yes", "no", "no", "yes", "urban", "urban", "12"]
    truth = ["yes", "yes", "yes", "yes", "urban", "rural", "0"]
    rows = [
        {"id": n, "type": kind, "question": "q", "prediction": answer, "references": [reference]}
        for n, (kind, answer, reference) in enumerate(zip(kinds, answers, truth, strict=True))
    ]  # ids are numbers, as RSVQA's are
    evaluate.main(["--predictions", str(_write(tmp_path / "p.jsonl", rows)), "--task", "rsvqa-lr"])
    part = _scores(tmp_path)["questions"]
    assert (
        part["non_numeric_macro"] == pytest.approx((1 / 3 + 1 + 1 / 2) / 3) and part["non_numeric_types"] == 3
    )
    assert part["macro"] == pytest.approx((1 / 3 + 1 + 1 / 2 + 0) / 4)
    assert part["non_numeric"]["accuracy"] == pytest.approx(3 / 6)


def test_of_several_references_the_best_counts(tmp_path):
    rows = [
        {"id": str(n), "type": "scene", "question": "What is it?", "prediction": answer,
         "references": ["a harbor", "an industrial area"]}
        for n, answer in enumerate(["industrial", "a port", "farmland", "a place"])
    ]  # fmt: skip
    evaluate.main(["--predictions", str(_write(tmp_path / "p.jsonl", rows)), "--task", "rsieval-vqa"])
    found = [row["verdict"] for row in jsonl.read(tmp_path / "items.jsonl")]
    assert found == ["correct", "correct", "wrong", "undecided"]


def test_thoughts_are_not_read(tmp_path):
    said = "<think>Is there a car? Yes, maybe there are cars.</think>\n\nNo."
    rows = [QUESTION | {"references": ["No."], "prediction": said}]
    rows += [
        {"id": f"c{n}", "type": "caption", "prediction": f"<think>hm</think>{n} trees",
         "references": [f"{n} trees"]}
        for n in range(2)
    ]  # fmt: skip
    path = _write(tmp_path / "p.jsonl", rows)
    evaluate.main(["--predictions", str(path), "--task", "synthcity", "--meteor", "none"])
    scores = _scores(tmp_path)
    assert scores["questions"]["micro"]["correct"] == 1
    assert scores["captions"]["caption"]["metrics"]["rouge_l"] == pytest.approx(1.0)
    items = jsonl.read(tmp_path / "items.jsonl")
    assert {row["prediction"] for row in items} == {row["prediction"] for row in rows}  # as it was said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "rsvqa-lr", "--judge", "x"], "--judge x: --task rsvqa-lr leaves nothing to a judge"),
        (["--task", "ucm", "--judge", "x"], "--judge x: --task ucm leaves nothing to a judge"),
        (["--task", "rsieval-vqa", "--num", "5"], "--num 5: of what"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, args, message):
    kind = "caption" if "ucm" in args else "presence"
    path = _write(tmp_path / "p.jsonl", [QUESTION | {"type": kind, "references": ["no"]}])
    with pytest.raises(UserError, match=message):
        evaluate.main(["--predictions", str(path), *args])


@pytest.mark.parametrize(
    "text",
    ['{"annotations": [{"filename": "a.png", "qa_pairs": [{"question": "q"}]}]}', "[]", "{", '{"a": 1}'],
)
def test_another_file_as_bench_is_named(tmp_path, text):
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(UserError, match="annotations.json: row 0: expected filename, domain and qa_pairs"):
        tasks.get("synthtraffic-bench").load(tmp_path, None)


def test_philadelphia_is_a_task_of_its_own(tmp_path):
    question = {
        "id": 1,
        "active": True,
        "type": "count",
        "question": "How many?",
        "img_id": 7,
        "answers_ids": [3],
    }
    answer = {"id": 3, "active": True, "question_id": 1, "answer": "12"}
    for name, row in (("questions", question), ("answers", answer)):
        (tmp_path / f"USGS_split_test_phili_{name}.json").write_text(json.dumps({name: [row]}))
    path = _write(tmp_path / "p" / "p.jsonl", [{"id": "1", "prediction": "12"}])
    evaluate.main(["--predictions", str(path), "--task", "rsvqa-hr-phili", "--data", str(tmp_path)])
    assert _scores(path.parent)["questions"]["micro"]["correct"] == 1
