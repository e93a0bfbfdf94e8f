"""The report page: our row beside the paper's, plots and panels inside one file."""

import json
import re
from html.parser import HTMLParser

import pytest
from test_evaluate import PLAIN, _write, picture

from mmrstraj_jax import evaluate
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


def test_a_row_without_a_type_prints_a_dash(results):
    grid = report.beside_paper([compare.read_result(results[0], "Ours")], "rsieval-vqa")
    ours = dict(zip(grid.columns, grid.rows[-1], strict=True))
    assert ours["presence"] == "100.00 (n 8)" and ours["quantity"] == "-"
    assert len(grid.rows) == 7


def test_protocol_is_in_the_scores(results):
    scores = json.loads((results[2] / "scores.json").read_text(encoding="utf-8"))
    assert scores["protocol"]["prompt"] == "Describe this image in detail."
    assert scores["captions"]["caption"]["tokenizer"] in ("ptb-python", "ptb-corenlp-3.4.1")
