"""Figure 3, Table 1 and Figure 2 on sets whose answers are known."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrstraj_jax import build
from mmrstraj_jax.construction import statistics, statistics_report
from mmrstraj_jax.construction.statistics import bandwidth, density, load, measure, regions, sentences, words
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Two ships, and a pier.", 7),
        ("It's a 3.5-km road", 6),
        ("a well-kept T-junction (north)", 6),
        ("1,000 houses", 2),
        ("", 0),
    ],
)
def test_tokens(text, count):
    assert words(text) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three? Four", 4),
        ("There is a piece of farmland .", 1),
        ("It is 3.5 m wide. Cars, e.g. taxis, pass approx. 20 times.", 2),
        ('He wrote "Stop." Then he left.', 2),
        ("1. Roads are wide.\n2. Houses are low.", 2),
        ("- roads\n- houses\n\n", 2),
        ("Point A. is north of B. There it ends.", 1),  # initials do not end a sentence
        ("道路很宽。房屋很低。", 2),
        ("Really?! Yes...", 2),
        ("No. The road is narrow. It is road no. 5 of the map.", 3),
        ("...", 0),
        ("", 0),
    ],
)
def test_sentences(text, count):
    assert sentences(text) == count


def test_density_is_that_of_scipy_and_integrates_to_one():
    from scipy.stats import gaussian_kde

    values = np.random.default_rng(0).poisson(60, 400)
    at = np.linspace(0, 140, 2001)
    found = density(values, at)
    np.testing.assert_allclose(found, gaussian_kde(values, "scott")(at), rtol=1e-9, atol=1e-300)
    assert np.trapezoid(found, at) == pytest.approx(1, abs=1e-6)
    assert bandwidth([4, 4, 4]) == bandwidth([4]) == 0.5
    assert density([4], np.array([4.0]))[0] == pytest.approx(1 / (0.5 * np.sqrt(2 * np.pi)))


def turns(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


@pytest.fixture
def traffic(tmp_path):
    """Three dialogues about two images, one row of text alone; one dialogue corrected by a person."""
    folder = tmp_path / "traffic"
    (folder / "images").mkdir(parents=True)
    for name, region, zoom in (("a", "Singapore", 18), ("b", "Jakarta", 19)):
        Image.new("RGB", (40, 30), (90, 120, 60)).save(folder / "images" / f"{name}.png")
        record = {"region": region, "window": {"zoom": zoom}, "provider": {"name": "Tiles"}}
        (folder / "images" / f"{name}.json").write_text(json.dumps(record))
    rows = [
        ("1", "images/a.png", turns("<image>\nDescribe it.", "A road. Two cars.", "Any bus?", "No bus.")),
        ("2", "images/b.png", turns("<image>\nDescribe it.", "One wide road with four lanes.")),
        ("3", "images/b.png", turns("<image>\nWhere is it?", "North.")),
        ("4", None, turns("What is a bus?", "A vehicle.")),
    ]
    keys = ("id", "image", "conversations")
    rows = [{k: v for k, v in zip(keys, row, strict=True) if v} for row in rows]
    (folder / "rsi_traffic.json").write_text(json.dumps(rows))
    model = {"by": "model:m"}
    made = [
        {"id": "1", "turns": [model, model], "score": 8.0, "zoom": 18, "region": "Singapore"},
        {"id": "2", "turns": [model | {"edited_by": ["kim"]}], "score": 5.0, "zoom": 19, "region": "Jakarta"},
        {"id": "3", "turns": [{"by": "caption"}], "score": 5.0, "zoom": 19, "region": "Jakarta"},
    ]
    (folder / "provenance.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder / "rsi_traffic.json"


def test_the_indicators_of_figure_3(traffic):
    found = measure(load(traffic))
    assert found.tokens == [6, 7, 2] and found.sentences == [2, 1, 1]
    # utterances: 4 + 2 + 2 + 2, tokens 3+6+3+3, 3+7, 4+2, 5+3, sentences 1+2+1+1, 1+1, 1+1, 1+1
    assert found.indicators == {
        "images": 2,
        "dialogues": 4,
        "turns": 4,
        "tokens": 39,
        "sentences": 11,
        "sentences_per_utterance": 11 / 10,
        "tokens_per_caption": 5.0,
        "sentences_per_caption": 4 / 3,
        "longest_caption_sentences": 2,
        "turns_per_image": 2.0,
        "expert_rows": 1,
        "expert_share": 1 / 3,
    }
    assert measure(load(traffic), len).tokens == [17, 30, 6]


def test_tokens_of_a_tokenizer(traffic, tmp_path):
    assets = Path(build.__file__).parent / "assets" / "tiny"
    statistics_report.command([f"t={traffic}", "--out", str(tmp_path / "o"), "--tokenizer", str(assets)])
    report = json.loads((tmp_path / "o" / "statistics.json").read_text())
    count = len(Tokenizer.load(assets).encode("One wide road with four lanes."))
    assert (
        report["token"] == "ids of the tokenizer"
        and str(count) in report["captions"]["t"]["tokens"]["counts"]
    )


def test_the_definitions_fit_the_papers_numbers():
    """Only with questions and answers as utterances its sentences per response come out."""
    paper = statistics.PAPER
    utterances = 2 * paper["turns_per_image"] * paper["images"]
    assert paper["sentences"] / utterances == pytest.approx(paper["sentences_per_utterance"], abs=0.01)
    assert paper["images"] == 2585 + 2344 and f"{paper['expert_share']:.4f}" == "0.0853"


def test_table_1(traffic):
    assert regions(load(traffic), {"Jakarta": "Congested."}) == [
        {
            "region": region,
            "imagery": ["Tiles"],
            "images": 1,
            "zooms": zooms,
            "score": score,
            "description": text,
        }
        for region, zooms, score, text in (
            ("Jakarta", {"19": 1}, 5.0, "Congested."),
            ("Singapore", {"18": 1}, 8.0, ""),
        )
    ]


def test_other_files(tmp_path):
    rsicap = {
        "image_id": "0",
        "filename": "a.png",
        "text_input": "Describe.",
        "text_output": "A pier. A ship.",
    }
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": [rsicap]}))
    assert measure(load(tmp_path / "captions.json")).indicators["sentences"] == 3
    (row,) = regions(load(tmp_path / "captions.json"))
    assert (row["region"], row["images"], row["zooms"], row["score"]) == ("place unknown", 1, {}, None)
    image = {"filename": "1.tif", "split": "test", "sentences": [{"raw": "A field ."}, {"raw": "Farmland ."}]}
    (tmp_path / "ucm.json").write_text(
        json.dumps({"images": [image, image | {"split": "val", "filename": "2"}]})
    )
    found = measure(load(tmp_path / "ucm.json")).indicators
    assert (found["images"], found["turns"], found["tokens"], found["turns_per_image"]) == (2, 4, 10, 2.0)
    rsieval = {"filename": "a.png", "caption": "One ship.", "qa_pairs": []}
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": [rsieval]}))
    assert measure(load(tmp_path / "annotations.json")).tokens == [3]
    line = {"id": "1", "image": "a.png", "conversations": turns("<image>", "Yes.")}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n")
    assert measure(load(tmp_path / "rows.jsonl")).tokens == [2]


def test_pngs_json_and_a_page_without_outside_references(traffic, tmp_path):
    captions = tmp_path / "captions.json"
    row = {"image_id": "0", "filename": "a.png", "text_input": "Q?", "text_output": "<b>$5 & $6</b>"}
    captions.write_text(json.dumps({"annotations": [row]}))
    out = tmp_path / "out"
    (tmp_path / "d.json").write_text('{"Jakarta": "Congested."}')
    words = ["statistics", f"traffic={traffic}", f"cap={captions}", "--out", str(out)]
    assert build.main([*words, "--descriptions", str(tmp_path / "d.json")]) == 0
    report = json.loads((out / "statistics.json").read_text())
    assert list(report["indicators"]) == ["traffic", "cap", "together"]
    assert report["indicators"]["together"]["images"] == 3
    assert report["captions"]["traffic"]["tokens"]["counts"] == {"2": 1, "6": 1, "7": 1}
    assert report["panel"]["traffic"]["id"] == "1"  # 2, 6, 7 tokens: the middle one
    for name in ("figure2.png", "figure3.png"):
        with Image.open(out / name) as image:
            image.load()
            assert image.width > 600 and len(image.convert("L").getcolors()) > 10
    page = (out / "statistics.html").read_text()
    assert not re.search(r"(?:src|href)=(?!'data:)|https?:|@import|url\(", page)
    assert "&lt;b&gt;$5 &amp; $6&lt;/b&gt;" in page and "Congested." in page and "592,765" in page
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    build.main([*words, "--descriptions", str(tmp_path / "d.json")])
    assert first == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "o"], "expected NAME=FILE"),
        (["a=b"], "expected NAME=FILE ... --out DIR"),
        (["a", "--out", "o"], "statistics a: expected NAME=FILE"),
        (["a=x.json", "--plan", "--out", "o"], "expected NAME=FILE"),
        (["a=x.json", "--out", "o"], "x.json: No such file or directory; expected a data set"),
    ],
)
def test_wrong_words_are_named(words, message):
    with pytest.raises(UserError, match=message) as error:
        statistics_report.command(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "beside", ["[]", "{", '{"shapes": [], "window": [1]}', '{"shapes": [], "region": 3}']
)
def test_json_of_another_tool_beside_an_image_is_no_record(traffic, beside):
    for name in "ab":
        (traffic.parent / "images" / f"{name}.json").write_text(beside)
    (traffic.parent / "provenance.jsonl").unlink()
    assert [row["region"] for row in regions(load(traffic))] == ["place unknown"]


def test_a_bad_row_is_an_error_and_not_left_out(tmp_path):
    (tmp_path / "a.json").write_text('[{"id": "1", "image": "a.png", "conversations": []}]')
    with pytest.raises(UserError, match="row 0"):
        load(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps([{"id": "1", "conversations": turns("Q?", "A.")}]))
    with pytest.raises(UserError, match="no row has an image"):
        measure(load(tmp_path / "b.json"))
