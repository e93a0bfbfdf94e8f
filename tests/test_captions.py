"""Caption metrics against pycocoevalcap, our tokeniser against Stanford's, and everything that breaks METEOR.

Tests that need Java skip without it; tests/golden/{ptb_tokens,ptb_glued,caption_scores}.json hold what Java
answered. To write those again (pycocoevalcap, Java, 1 minute): `PYTHONPATH=. python tests/test_captions.py`.
"""

import json
import os
import random
import re
import stat
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import captions, java, ptb
from mmrstraj_jax.evaluation.captions import DocumentFrequencies, score

GOLDEN = Path(__file__).parent / "golden"
needs_java = pytest.mark.skipif(not java.available(), reason="no java command")

# Written here, in the manner of the sets: UCM's and RSICD's spaced full stop, RSIEval's long sentences.
SUBJECTS = (
    "many green trees", "a large airport", "two tennis courts", "There are several white planes",
    "a curved river",
    "the roof(s) of grey buildings", "an L-shaped house", "It's a dense residential area", "3.5 m wide lanes",
    "This is a high-resolution aerial image showing a harbor", "about 1,000 containers",
    "the farmer's field", "50% of the lawn",
    "A north-south road", "some cars and trucks", "the “old” stadium", "a baseball field (partially visible)",
)  # fmt: skip
VERBS = (
    "are around", "is next to", "can be seen near", "lies between", "don't reach", "isn't far from",
    "crosses", "surround",
    "is located in the upper-left corner, beside", "; behind it there is",
    "is separated -- by a fence -- from", "/ borders",
)  # fmt: skip
OBJECTS = (
    "a parking lot", "the sea with white waves", "a t-junction", "a number of 10x10 m plots",
    "the runway No. 5", "a bridge",
    "houses' gardens", "the criss_crossing railway", "lots of storage tanks",
    "a pond in the shape of \"8\"", "bare land",
    "the railway station's roof", "an east-west highway", "a blue-and-white building & its yard",
    "the U.S. base",
)  # fmt: skip
ENDS = (
    " .",
    ".",
    "",
    "!",
    " ...",
    ", etc.",
    "?",
    ". ",
    "。",
    " \\u00a0.",
    ":",
    " - ",
    ", e.g. here.",
    " 😀",
    "…",
    " |||",
)


def sentence(rnd: random.Random) -> str:
    text = f"{rnd.choice(SUBJECTS)} {rnd.choice(VERBS)} {rnd.choice(OBJECTS)}"
    if rnd.random() < 0.3:
        text += rnd.choice((" and ", ", ", " , while ", "; ", ". In the middle, ")) + rnd.choice(OBJECTS)
    return (text if rnd.random() < 0.5 else text[0].upper() + text[1:]) + rnd.choice(ENDS)


def caption(rnd: random.Random) -> str:
    return " ".join(sentence(rnd) for _ in range(rnd.choice((1, 1, 1, 2, 4))))


def dataset(n: int, seed: int = 7) -> tuple[dict[str, list[str]], dict[str, str]]:
    """References (1 to 5 an item) and predictions, some near a reference, some unrelated, one empty, one
    odd.
    """
    rnd = random.Random(seed)
    references = {str(i): [caption(rnd) for _ in range(rnd.randint(1, 5))] for i in range(n)}
    predictions = {}
    for i, refs in references.items():
        words = rnd.choice(refs).split(" ")
        words[rnd.randrange(len(words))] = rnd.choice(("tree", "|||", "water", "'s", "(", "1,5"))
        predictions[i] = rnd.choice((" ".join(words), caption(rnd)))
    predictions["0"], predictions["1"] = "", "\x0b a | ||| 'b'\u2028new line\r\nmore \x00 text"
    return references, predictions


# ---- tokeniser ----


def test_own_tokenizer_equals_the_recorded_answers_of_ptb():
    recorded = json.loads((GOLDEN / "ptb_tokens.json").read_text(encoding="utf-8"))
    wrong = {text: ptb.tokenize(text) for text, tokens in recorded.items() if ptb.tokenize(text) != tokens}
    assert len(recorded) >= 1000
    assert len(wrong) <= 0.005 * len(recorded), wrong


@needs_java
def test_own_tokenizer_equals_ptb_live():
    rnd = random.Random(time.time_ns())
    texts = sorted({caption(rnd) for _ in range(1500)})
    wrong = [
        (t, a, ptb.tokenize(t))
        for t, a in zip(texts, java.ptb_tokenize(texts), strict=True)
        if a != ptb.tokenize(t)
    ]
    assert len(wrong) <= 0.005 * len(texts), wrong[:5]


def odd(rnd: random.Random) -> str:
    """Words glued by whatever stands between words: what a caption never is, and a rule must survive."""
    words = "trees houses two well planned lane road T and roofed 3 10 1,000 U.S. No. etc. c# a@b.com it's B"
    glue = ["-", ",", "/", ".", ", ", ". ", "--", "_", ";", "!", " ", " ", " "]
    return "".join(rnd.choice(words.split()) + rnd.choice(glue) for _ in range(rnd.randint(2, 5))) + "end"


def test_own_tokenizer_on_words_that_are_glued_together():
    """97 % of these are equal; of the rules for commas and slashes between words every one is."""
    recorded = json.loads((GOLDEN / "ptb_glued.json").read_text(encoding="utf-8"))
    wrong = {text: ptb.tokenize(text) for text, tokens in recorded.items() if ptb.tokenize(text) != tokens}
    assert len(recorded) >= 1000 and len(wrong) <= 0.03 * len(recorded), wrong
    tokens = json.loads((GOLDEN / "ptb_tokens.json").read_text(encoding="utf-8"))
    for text in (
        "trees,well-planned houses", "houses,two-lane road", "road,T-junction here", "white-roofed,two-lane",
        "road.and/or path", "a/b/c/d e", "C# code", "rock 'n' roll", "mail a@b.com, then", "mail a@b.com! x",
        "U.S.-based firm", "cannot-do",
    ):  # fmt: skip
        assert ptb.tokenize(text) == tokens[text]


@needs_java
def test_own_tokenizer_on_glued_words_live():
    rnd = random.Random(time.time_ns())
    texts = sorted({odd(rnd) for _ in range(2000)})
    wrong = sum(a != ptb.tokenize(t) for t, a in zip(texts, java.ptb_tokenize(texts), strict=True))
    assert wrong <= 0.05 * len(texts)


def test_tokens_are_one_line_and_lower_case():
    for line_break in "\n\r\x0b\x0c\x85\u2028\u2029":
        assert ptb.tokenize(f"A road{line_break}and Trees.") == "a road and trees"
    assert ptb.tokenize("") == ptb.tokenize(" .,; ") == ""
    assert ptb.tokenize("It's 1,000 m (north-south).") == "it 's 1,000 m -lrb- north-south -rrb-"


def test_tokens_of_markdown_smileys_and_entities():
    """As the tokeniser of pycocoevalcap answered on 2026-11-24."""
    for text, tokens in {
        "### Scene: roads": "### scene roads", "a##b #5": "a ## b # 5", "C# ##x": "c# ## x",
        "note :) (a:) ;-( :] x=( b": "note :-rrb- -lrb- a :-rrb- ;--lrb- :] x =-lrb- b",
        "following:(1) trees, Type:Dock": "following -lrb- 1 -rrb- trees type dock",
        "the '90 plan of '5 in the '90s, 5'10\" tall": "the '90 plan of 5 in the '90s 5 10 tall",
        "&lt;b&gt; a&lt;b": "< b > a < b",
    }.items():  # fmt: skip
        assert ptb.tokenize(text) == tokens


# ---- metrics ----


def pycocoevalcap_scores(refs: list[list[str]], hyps: list[str]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    gts, res = dict(enumerate(refs)), {i: [hyp] for i, hyp in enumerate(hyps)}
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    rouge, rouge_items = Rouge().compute_score(gts, res)
    cider, cider_items = Cider().compute_score(gts, res)
    totals = {f"bleu{n}": value for n, value in enumerate(bleu, 1)} | {"rouge_l": rouge, "cider_d": cider}
    return totals, {"rouge_l": rouge_items, "cider_d": cider_items}


def test_metrics_equal_pycocoevalcap_without_java():
    references, predictions = dataset(1000)
    mine = score(references, predictions, meteor=None, tokenizer="ptb-python")
    refs = [[ptb.tokenize(r) for r in rs] for rs in references.values()]
    totals, items = pycocoevalcap_scores(refs, [ptb.tokenize(p) for p in predictions.values()])
    assert mine.metrics == pytest.approx(totals, abs=1e-9)
    for name, values in items.items():
        np.testing.assert_allclose(mine.per_item[name], values, atol=1e-9)
    assert mine.n == 1000 and mine.references_per_item[0] == 1 and mine.references_per_item[2] == 5
    assert mine.tokenizer == "ptb-python" and mine.mean_length > 5
    assert any("1 of 1000 predictions have no word" in note for note in mine.notes)


def meteor_processes() -> int:
    return subprocess.run(["ps", "-e", "-o", "args"], capture_output=True, text=True).stdout.count(
        "meteor-1.5"
    )


@needs_java
def test_scores_of_1000_captions_equal_the_recorded_ones_of_pycocoevalcap(monkeypatch):
    # a decimal comma is what METEOR would write in this locale, and nobody could read
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    recorded = json.loads((GOLDEN / "caption_scores.json").read_text())
    before, start = meteor_processes(), os.times()
    mine = score(*dataset(1000))
    end = os.times()
    assert mine.notes == ["1 of 1000 predictions have no word and count as 0"]
    assert mine.tokenizer == java.PTB_NAME
    assert list(mine.metrics) == list(captions.METRICS)
    assert mine.metrics == pytest.approx(recorded["metrics"], abs=1e-6)
    assert mine.per_item["meteor15"] == pytest.approx(recorded["meteor15"], abs=1e-6)
    assert meteor_processes() == before
    # processor time of all processes: on an idle machine with two cores it is more than the time on the clock
    assert sum(end[:4]) - sum(start[:4]) < 25.0


def test_separators_of_meteors_protocol_are_kept_out_of_captions():
    assert java._field("a ||| b\nc\u2028d") == "a b c d"


@pytest.mark.slow  # a clock on a shared machine is no default test
def test_1000_captions_take_less_than_two_seconds_of_one_core():
    references, predictions = dataset(1000)
    start = time.process_time()  # not the clock: the machine may be busy
    score(references, predictions, meteor=None, tokenizer="ptb-python")
    assert time.process_time() - start < 2.0


def test_lcs_equals_the_textbook():
    rnd = random.Random(1)
    for _ in range(200):
        a, b = ([rnd.choice("abcd") for _ in range(rnd.randint(0, 12))] for _ in "ab")
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        assert captions._lcs(a, b) == table[-1, -1]


def test_frozen_document_frequencies_make_subsets_comparable(tmp_path):
    references, predictions = dataset(200)
    options = {"meteor": None, "tokenizer": "ptb-python"}
    full = score(references, predictions, **options)
    refs = [[ptb.tokenize(r) for r in rs] for rs in references.values()]
    DocumentFrequencies.of(refs, "train").save(tmp_path / "df.json.gz")
    frozen = DocumentFrequencies.load(tmp_path / "df.json.gz")
    half = {i: references[i] for i in list(references)[:50]}
    part = score(half, {i: predictions[i] for i in half}, frequencies=frozen, **options)
    np.testing.assert_allclose(part.per_item["cider_d"], full.per_item["cider_d"][:50], atol=1e-12)
    assert part.document_frequencies == "train"
    own = score(half, {i: predictions[i] for i in half}, **options)
    assert abs(own.metrics["cider_d"] - part.metrics["cider_d"]) > 1e-3
    alone = score({"a": ["a house by a road"]}, {"a": "a house by a road"}, **options)
    assert alone.metrics["cider_d"] == 0.0 and "single image" in alone.notes[0]
    for content in (b"{}", b"\x1f\x8bxx", b""):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(UserError, match="bad: "):
            DocumentFrequencies.load(tmp_path / "bad")


def test_items_must_match():
    for references, predictions, message in (
        ({}, {}, "no captions"),
        ({"a": ["x"]}, {}, "no prediction for 1 of 1 items, such as a"),
        ({"a": ["x"]}, {"a": "x", "b": "y"}, "no references for 1"),
        ({"a": []}, {"a": "x"}, "no references for 1"),
        ({"a": "x"}, {"a": "x"}, "no references for 1"),
    ):
        with pytest.raises(UserError, match=message):
            score(references, predictions, meteor=None, tokenizer="ptb-python")
    with pytest.raises(UserError, match="meteor"):
        score({"a": ["x"]}, {"a": "x"}, meteor="meteor")


# ---- METEOR that fails ----


def fake_java(tmp_path: Path, monkeypatch, script: str) -> None:
    program = tmp_path / "java"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


ONE = ({"a": ["a house by a road"], "b": ["x y"]}, {"a": "a house ||| by a road", "b": "x"})


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'Error: Could not create the Java Virtual Machine.' >&2; exit 1", "Java Virtual Machine"),
        ("exit 0", "it printed nothing"),
        ("while read line; do echo '0,61 x'; done", "'0,61 x' where a number"),
        ("read line; echo '1.0'; read line; exit 3", "METEOR 1.5 stopped"),
        ("yes noise >&2", "METEOR 1.5 stopped|did not finish"),
        ("sleep 60", "did not finish in 1 s"),
    ],
)
def test_a_broken_java_is_one_line_and_the_rest_still_comes(tmp_path, monkeypatch, script, message):
    fake_java(tmp_path, monkeypatch, script)
    monkeypatch.setattr(java.Meteor.__init__, "__defaults__", (1.0,))
    start = time.monotonic()
    scores = score(*ONE, tokenizer="ptb-python")
    assert "meteor15" not in scores.metrics and set(scores.metrics) == set(captions.METRICS) - {"meteor15"}
    assert time.monotonic() - start < 20  # a grandchild that holds the pipe (`sleep 60`) is stopped too
    (note,) = scores.notes
    assert note.startswith("meteor15 was not computed: ") and "\n" not in note
    assert re.search(message, note)


def test_a_java_of_another_processor(tmp_path, monkeypatch):
    program = tmp_path / "java"
    program.write_bytes(b"\x7fELF no program of this machine")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = score(*ONE)
    assert scores.tokenizer == "ptb-python" and "meteor15" not in scores.metrics
    assert all("java cannot be run (Exec format error)" in note for note in scores.notes)
    assert len(scores.notes) == 2


def test_no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = score(*ONE)
    assert scores.tokenizer == "ptb-python"
    assert scores.notes == [
        "meteor15 was not computed: no `java` command was found; install a Java runtime, version 8 or newer"
    ]
    with pytest.raises(UserError, match="or score with the tokenizer ptb-python"):
        score(*ONE, tokenizer=java.PTB_NAME)


def test_a_tokenizer_that_loses_lines_is_an_error(tmp_path, monkeypatch):
    fake_java(tmp_path, monkeypatch, "echo one line")
    with pytest.raises(UserError, match="1 lines for 2 captions"):
        score(*ONE, meteor=None, tokenizer=java.PTB_NAME)


def test_a_broken_java_that_nobody_asked_for_leaves_six_metrics(tmp_path, monkeypatch):
    fake_java(tmp_path, monkeypatch, "echo 'no such VM' >&2; exit 1")
    scores = score(*ONE)
    assert list(scores.metrics) == [name for name in captions.METRICS if name != "meteor15"]
    assert scores.tokenizer == "ptb-python"
    assert scores.notes[0] == "tokens are ptb-python's: PTBTokenizer failed: no such VM"
    assert scores.notes[1].startswith("meteor15 was not computed: ")


# ---- baselines ----


def test_constant_caption_is_the_typical_one():
    pool = [["there are many trees in the forest", f"odd words {i} here"] for i in range(20)]
    pool += [["an airport with two planes"], []]
    assert captions.constant_caption(pool) == "there are many trees in the forest"
    with pytest.raises(UserError, match="pool is empty"):
        captions.constant_caption([[]])


def test_nearest_captions():
    pool = [["first"], ["second"], ["third"]]
    features = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    got = captions.nearest_captions(pool, features, np.array([[0.1, 5], [-3, 0.1], [0, 0]], np.float32))
    assert got == ["second", "third", "first"]
    with pytest.raises(UserError, match="same width"):
        captions.nearest_captions(pool, features, np.zeros((1, 3)))


def write_golden() -> None:
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokens(texts: dict[str, list[str]]) -> dict[str, list[str]]:
        rows = {i: [{"caption": ptb.one_line(text)} for text in group] for i, group in texts.items()}
        return PTBTokenizer().tokenize(rows)

    rnd = random.Random(3)
    probes = (GOLDEN / "ptb_probes.txt").read_text(encoding="utf-8").split("\n")
    texts = sorted({caption(rnd) for _ in range(900)}) + [probe for probe in probes if probe]
    groups = tokens({str(i): [text] for i, text in enumerate(texts)}).values()
    recorded = dict(zip(texts, (group[0] for group in groups), strict=True))
    (GOLDEN / "ptb_tokens.json").write_text(
        json.dumps(recorded, ensure_ascii=False, indent=0) + "\n", "utf-8"
    )

    texts = sorted({odd(rnd) for _ in range(1000)})
    groups = tokens({str(i): [text] for i, text in enumerate(texts)}).values()
    glued = dict(zip(texts, (group[0] for group in groups), strict=True))
    (GOLDEN / "ptb_glued.json").write_text(json.dumps(glued, ensure_ascii=False, indent=0) + "\n", "utf-8")

    references, predictions = dataset(1000)
    refs = list(tokens(references).values())
    hyps = [group[0] for group in tokens({i: [text] for i, text in predictions.items()}).values()]
    totals, _ = pycocoevalcap_scores(refs, hyps)
    meteor, items = Meteor().compute_score(dict(enumerate(refs)), {i: [hyp] for i, hyp in enumerate(hyps)})
    data = {"metrics": totals | {"meteor15": meteor}, "meteor15": [round(float(item), 9) for item in items]}
    (GOLDEN / "caption_scores.json").write_text(json.dumps(data) + "\n")


if __name__ == "__main__":
    write_golden()
