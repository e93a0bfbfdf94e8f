"""The report page: our row beside the paper's, plots and panels inside one file."""

import json
import re
from html.parser import HTMLParser

import pytest
from test_evaluate import PLAIN, _write, picture

from mmrstraj_jax import evaluate, jsonl
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import compare, report


def _result(folder, task, answers, image, name="caption", question=None, references=()):
    rows = [
        {"id": str(i), "type": name if isinstance(name, str) else name[i], "question": question,
         "image": str(image), "prediction": answer, "references": [references[i]]}
        for i, answer in enumerate(answers)
    ]  # fmt: skip
    path = _write(folder / "predictions.jsonl", rows)
    evaluate.main(["--predictions", str(path), "--task", task, *PLAIN])
    return folder


@pytest.fixture
def results(tmp_path):
    """Two models on ten questions, and one on four captions."""
    image = picture(tmp_path / "a.png")
    kinds = ["presence"] * 8 + ["road_ori"] * 2
    truth = ["Yes.", "No."] * 4 + ["North-south", "West-east"]
    good = ["yes", "no"] * 4 + ["vertical", "vertical <b>"]
    bad = ["no", "no"] * 4 + ["horizontal", "I don't know | maybe"]
    question = "Is there a car <script>?"
    return [
        _result(tmp_path / "good", "rsieval-vqa", good, image, kinds, question, truth),
        _result(tmp_path / "bad", "rsieval-vqa", bad, image, kinds, question, truth),
        _result(tmp_path / "text", "rsieval-caption", ["two ships in a harbor"] * 4, image,
                references=[f"{i} ships lie in a harbor ." for i in range(4)]),
    ]  # fmt: skip


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href")]


def test_one_page_with_everything_in_it(results, tmp_path, capsys):
    out = tmp_path / "out"
    named = [f"Ours={results[0]}", f"Base={results[1]}", str(results[2])]
    assert evaluate.main(["report", *named, "--out", str(out)]) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    text = (out / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert "script" not in page.tags and "&lt;script&gt;" in text
    assert page.tags.count("table") >= 5 and "Table 4 of the paper" in text and "MM-RSTraj (paper)" in text
    assert re.search(r"<td>Ours</td><td>100\.00 \(n 8\)</td>", text)
    assert "✓" in text and "✗" in text and ">? <b>Base" in text
    markdown = (out / "report.md").read_text(encoding="utf-8")
    assert "| Ours |" in markdown and "Table 2 of the paper" in markdown and "](rsieval-vqa.png)" in markdown
    assert (out / "rsieval-vqa.png").read_bytes().startswith(b"\x89PNG")
    widths = {line.count("|") for line in markdown.split("### Table 4")[1].split("\n\n")[1].splitlines()}
    assert len(widths) == 1  # a bar inside a cell is no column


def test_compare_names_the_difference(results, capsys):
    assert evaluate.main(["compare", str(results[1]), str(results[0])]) == 0
    line = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("all questions"))
    assert "+50.0" in line and re.search(r"\b10\b", line)
    with pytest.raises(UserError, match="not scores of the same items"):
        compare.compare(compare.read_result(results[0]), compare.read_result(results[2]))


def test_the_denominator_is_of_the_accuracy(results):
    """Two of "bad"'s answers are undecided: of the other eight its accuracy is."""
    grid = report.beside_paper([compare.read_result(results[1], "Base")], "rsieval-vqa")
    ours = dict(zip(grid.columns, grid.rows[-1], strict=True))
    assert ours["presence"] == "50.00 (n 8)" and ours["road_ori"] == "0.00 (n 1 of 2)"


def test_answers_of_another_tool_are_in_the_page(tmp_path):
    """Its rows hold no more than id and prediction; the rest is the data set's."""
    picture(tmp_path / "data" / "images" / "a.png")
    pair = {"question": "Is there a car?", "answer": "Yes.", "type": "presence"}
    row = {"filename": "a.png", "caption": "A car.", "qa_pairs": [pair]}
    (tmp_path / "data" / "annotations.json").write_text(json.dumps({"annotations": [row]}))
    path = _write(tmp_path / "mine" / "answers.jsonl", [{"id": "a.png#0", "prediction": "a red car"}])
    args = ["--predictions", str(path), "--task", "rsieval-vqa", "--data", str(tmp_path / "data")]
    evaluate.main(args)
    evaluate.main(["report", f"Other={path.parent}", "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<b>Other</b>: a red car" in page and "(no answer)" not in page and "reference: Yes." in page


def test_a_row_without_a_type_prints_a_dash(results):
    grid = report.beside_paper([compare.read_result(results[0], "Ours")], "rsieval-vqa")
    ours = dict(zip(grid.columns, grid.rows[-1], strict=True))
    assert ours["presence"] == "100.00 (n 8)" and ours["quantity"] == "-"
    assert len(grid.rows) == 7


def test_protocol_is_in_the_scores(results, tmp_path):
    scores = json.loads((results[2] / "scores.json").read_text(encoding="utf-8"))
    protocol = scores["protocol"]
    assert protocol["prompt"] is None and protocol["decode"] is None  # nobody knows how others asked
    assert set(protocol["versions"]) == {"mmrstraj_jax", "pycocoevalcap", "evaluation_code"}
    rows = jsonl.read(results[2] / "predictions.jsonl")
    for number, row in enumerate(rows):
        row |= {"prompt": "What is it?", "decode": {"temperature": number}}

    def again(rows):
        path = _write(tmp_path / "again" / "p.jsonl", rows)
        evaluate.main(["--predictions", str(path), "--task", "rsieval-caption", *PLAIN])
        return json.loads((tmp_path / "again" / "scores.json").read_text())["protocol"]

    told = again(rows)
    assert told["prompt"] == "What is it?" and told["decode"] == "4 different ones, see p.jsonl"
    assert told["dataset"] == protocol["dataset"]
    rows[1]["references"] = ["two ships"]
    assert again(rows)["dataset"] != protocol["dataset"]
    assert scores["captions"]["caption"]["tokenizer"] in ("ptb-python", "ptb-corenlp-3.4.1")


def test_descriptions_have_no_row_in_the_papers_caption_table(tmp_path):
    image, told = picture(tmp_path / "a.png"), ["a road with cars"] * 2
    folder = _result(tmp_path / "d", "rsieval-caption", told, image, "description", references=told)
    assert evaluate.main(["report", f"Ours={folder}", "--out", str(tmp_path / "out")]) == 0
    assert "| Ours (n 0) | - |" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", [{"type": "presence", "verdict": "correct"}, {"id": "0", "type": "presence"}])
def test_a_damaged_result_is_named(results, tmp_path, row):
    (results[0] / "items.jsonl").write_text(jsonl.dump(row))
    for command in (["compare", *map(str, results[:2])], ["report", str(results[0]), "--out", str(tmp_path)]):
        with pytest.raises(UserError, match=r"items.jsonl: line 1: expected id, type and verdict or rouge_l"):
            evaluate.main(command)
    (results[0] / "scores.json").write_text("[]")
    with pytest.raises(UserError, match="names no task of ours"):
        evaluate.main(["compare", *map(str, results[:2])])
