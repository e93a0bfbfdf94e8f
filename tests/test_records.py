"""Rows from files, the path policy, mixtures, and the index of shapes."""

import codecs
import json
import os

import data_case
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrstraj_jax.data import images, records
from mmrstraj_jax.data.collate import Sizes, example
from mmrstraj_jax.data.index import build_index
from mmrstraj_jax.errors import UserError

GOOD = data_case.chat_row(0, "a.png")
TOKENIZER = data_case.tokenizer()
SIZES = Sizes((1, 2, 3, 5, 7, 10, 37), 32, 1024)


@pytest.fixture
def root(tmp_path):
    data_case.picture(20, 10).save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    data_case.picture(30, 30).save(tmp_path / "sub" / "b.png")
    return tmp_path


def write(root, *lines, name="rows.jsonl"):
    path = root / name
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    return str(path)


def test_json_list_and_json_lines_hold_the_same_rows(root):
    rows = [GOOD, data_case.chat_row(1, "sub/b.png"), data_case.chat_row(2, None)]
    (root / "rows.json").write_text(json.dumps(rows, indent=1))
    listed, lines = records.load(str(root / "rows.json")), records.load(write(root, *rows))
    assert [row.conversations for row in listed.rows] == [row.conversations for row in lines.rows]
    assert [row.kind for row in listed.rows] == ["image", "image", "text"]
    assert [row.line for row in listed.rows] == [0, 1, 2] and [row.line for row in lines.rows] == [1, 2, 3]
    assert listed.rows[1].image_paths() == [root / "sub" / "b.png"]
    assert listed.rows[1].where == f"{root}/rows.json: row 1 (counted from 0) (id row1)"
    assert "rows.jsonl: line 2 (id row1)" in lines.rows[1].where


def test_a_bad_row_of_a_list_is_named_by_file_and_count(root):
    (root / "rows.json").write_text(json.dumps([GOOD, GOOD, {"id": "bad"}]))
    again, bad = sorted(records.load(str(root / "rows.json")).problems, key=lambda problem: problem.line)
    assert str(bad).startswith(f"{root}/rows.json: row 2 (counted from 0): conversations")
    assert records.rowfiles.place("a/b.array_record", 2) == "a/b.array_record: record 2 (counted from 0)"
    assert f"already used in {root}/rows.json: row 0 (counted from 0);" in again.message


def test_byte_order_mark_crlf_and_blank_lines_are_tolerated(root):
    raw = codecs.BOM_UTF8 + b"\r\n".join(
        [json.dumps(GOOD).encode(), b"", json.dumps(GOOD | {"id": 7}).encode()]
    )
    (root / "rows.jsonl").write_bytes(raw + b"\r\n")
    found = records.load(str(root / "rows.jsonl"))
    assert [(row.id, row.line) for row in found.rows] == [("row0", 1), ("7", 3)] and not found.problems
    (root / "list.json").write_bytes(codecs.BOM_UTF8 + b"\r\n " + json.dumps([GOOD]).encode())
    assert len(records.load(str(root / "list.json")).rows) == 1


def changed(**how):
    return GOOD | how


def talk(*pairs):
    return [{"from": role, "value": text} for role, text in pairs]


BAD = {
    "broken line": (b'{"id": "x", ', "not valid JSON"),
    "not utf-8": (b'{"id": "\xff"}', "not valid JSON"),
    "number": (3, "expected an object"),
    "nan id": (b'{"id": true, "conversations": []}', "id True"),
    "deep": (b"[" * 100_000, "nested too deeply|not valid JSON"),
    "no conversations": ({"id": "x"}, "conversations: expected a list"),
    "empty conversations": (changed(conversations=[]), "conversations: expected a list"),
    "text conversations": (changed(conversations="hi"), "conversations: expected a list"),
    "turn without value": (changed(conversations=[{"from": "human"}]), "turn 0"),
    "value not text": (changed(conversations=talk(("human", 3), ("gpt", "x"))), "turn 0"),
    "unknown role": (changed(conversations=talk(("robot", "x"))), "turn 0"),
    "two questions": (
        changed(conversations=talk(("human", "<image>"), ("human", "y"), ("gpt", "z"))),
        "in turn",
    ),
    "no answer": (changed(conversations=talk(("human", "<image>"))), "last turn is not an answer"),
    "only an answer": (changed(conversations=talk(("gpt", "x"))), "last turn is not an answer"),
    "empty answer": (changed(conversations=talk(("human", "<image>"), ("gpt", "  "))), "empty answer"),
    "lone surrogate": (
        changed(conversations=talk(("human", "<image>\ud800"), ("gpt", "x"))),
        "not valid Unicode",
    ),
    "no slot": (changed(conversations=talk(("human", "?"), ("gpt", "x"))), r"0 <image>.* but 1"),
    "two slots": (
        changed(conversations=talk(("human", "<image><image>"), ("gpt", "x"))),
        r"2 <image>.* but 1",
    ),
    "slot in answer": (changed(conversations=talk(("human", "<image>"), ("gpt", "<image>"))), "in an answer"),
    "slot in text row": (data_case.chat_row(1, None, question="<image> ?"), r"1 <image>.* but 0"),
    "slot was dropped": (
        changed(conversations=talk(("gpt", "<image>"), ("human", "?"), ("gpt", "x"))),
        r"0 <image>.* but 1",
    ),
    "image missing": (changed(image="none.png"), "no such file"),
    "image a folder": (changed(image="sub"), "not a file"),
    "image a number": (changed(image=3), "expected a path"),
    "image list of numbers": (changed(image=[3]), "expected a path"),
    "image and images": (changed(images=["a.png"]), "expected one of them"),
    "image and video": (changed(video="sub"), "expected one of them"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_quarantined_with_their_line(root, name):
    bad, message = BAD[name]
    path = write(root, GOOD, bad, GOOD | {"id": "last"})
    found = records.load(path)
    assert [row.id for row in found.rows] == ["row0", "last"]
    (problem,) = found.problems
    assert problem.dropped and problem.line == 2 and str(problem).startswith(f"{path}: line 2: ")
    assert "\n" not in str(problem)
    with pytest.raises(UserError, match=message):
        records.load(path, on_bad="error")
    with pytest.raises(UserError, match="no valid row|not valid JSON"):
        records.load(write(root, bad, name="all_bad.jsonl"))


def test_duplicate_ids_are_remarked_on_and_kept(root):
    found = records.load(write(root, GOOD, GOOD))
    assert (
        len(found.rows) == 2 and not found.problems[0].dropped and "already used" in found.problems[0].message
    )
    assert len(records.load(write(root, GOOD, GOOD), on_bad="error").rows) == 2


def test_odd_but_harmless_rows(root):
    huge = data_case.chat_row(3, "a.png", question="word " * 2_000_000)
    other = b'{"score": NaN, "image": "a.png", "conversations": [{"role": "user", "content": "<image>"}, ' + (
        b'{"role": "assistant", "content": "x"}]}'
    )
    found = records.load(write(root, huge, other))
    assert [row.id for row in found.rows] == ["row3", "row-2"] and not found.problems
    assert found.rows[1].conversations == talk(("human", "<image>"), ("gpt", "x"))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "file is empty"),
        (b"[", "not valid JSON"),
        (b"[]", "file is empty"),
        (b'{"annotations": []}', "conversations"),
        (codecs.BOM_UTF16_LE + b"[\0]\0", "UTF-16"),
        (b"[1, 2", "not valid JSON"),
    ],
)
def test_files_that_are_broken_as_a_whole(root, content, message):
    (root / "bad.json").write_bytes(content)
    with pytest.raises(UserError, match=f"bad.json.*{message}"):
        records.load(str(root / "bad.json"))


def test_missing_files_and_roots(root):
    with pytest.raises(UserError, match="nowhere.json: No such file"):
        records.load(str(root / "nowhere.json"))
    with pytest.raises(UserError, match="no such folder"):
        records.load(write(root, GOOD), image_root=root / "nowhere")
    with pytest.raises(UserError, match="sub: "):
        records.load(str(root / "sub"))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["id", "image", "video", "conversations", "from", "value"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_no_value_breaks_the_reader(tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    data_case.picture(4, 4).save(folder / "a.png")
    found = records.load(write(folder, GOOD, value))
    assert found.rows[0].id == "row0" and len(found.rows) + sum(p.dropped for p in found.problems) == 2


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.binary(max_size=12)
        | st.sampled_from(
            [b"[", b"]", b",", b"{", b"}", b'"', b"\\", b"\xef\xbb\xbf", b"\r\n", b"NaN", b"\x00"]
        )
        | st.just(json.dumps(GOOD).encode()),
        max_size=8,
    )
)
def test_no_bytes_break_the_reader(tmp_path_factory, parts):
    """Lists and lines torn apart anywhere: rows, problems with a line, or one error naming the file."""
    folder = tmp_path_factory.getbasetemp() / "torn"
    folder.mkdir(exist_ok=True)
    data_case.picture(4, 4).save(folder / "a.png")
    path = folder / "rows.json"
    path.write_bytes(b"".join(parts))
    try:
        found = records.load(str(path))
    except UserError as error:
        assert "rows.json" in str(error)
        return
    for row in found.rows:
        assert row.id == "row0" or row.conversations


# ---- paths


@pytest.mark.parametrize(
    "name",
    [
        "../a.png",
        "sub/../../a.png",
        "/etc/passwd",
        "~/a.png",
        "file:///etc/passwd",
        "http://example.org/a.png",
        "C:\\a.png",
        "c:/a.png",
        "\\\\host\\share\\a.png",
        "..\\a.png",
        "a.png\0.jpg",
        "a\n.png",
        "\uff0e\uff0e/a.png",
        "\u2025/a.png",
        "\uff0fetc\uff0fpasswd",
        "link.png",
        "folder_link/secret.png",
        "loop.png",
        "x" * 5000,
    ],
)
def test_paths_that_leave_the_root_are_refused_in_validation_and_at_load(root, tmp_path_factory, name):
    outside = tmp_path_factory.mktemp("outside")
    data_case.picture(9, 9).save(outside / "secret.png")
    data_case.picture(9, 9).save(root.parent / "a.png")
    os.symlink(outside / "secret.png", root / "link.png")
    os.symlink(outside, root / "folder_link")
    os.symlink(root / "loop.png", root / "loop.png")
    found = records.load(write(root, GOOD, data_case.chat_row(1, name)))
    assert len(found.rows) == 1 and found.problems[0].line == 2
    row = records.Row("x", (name,), (), GOOD["conversations"], "s", 1, str(root))
    with pytest.raises(UserError):
        row.image_paths()
    with pytest.raises(UserError, match=r"s: line 1 \(id x\)"):
        example(row, TOKENIZER, data_case.TINY)


def test_links_inside_the_root_and_ordinary_names_are_fine(root):
    os.symlink(root / "sub" / "b.png", root / "inner link – ü.png")
    assert records.resolve_inside(root, "inner link – ü.png") == root / "sub" / "b.png"
    assert records.resolve_inside(root, "./sub/b.png") == root / "sub" / "b.png"
    assert records.resolve_inside(root, "not_there_yet.png", must_exist=False).name == "not_there_yet.png"


# ---- mixtures and videos


def test_mixtures(tmp_path):
    strange = tmp_path / "run:1,a.json"
    strange.write_text("[]")
    assert records.parse_mixture("A.json:0.7, B.json:0.3") == [("A.json", 0.7), ("B.json", 0.3)]
    assert records.parse_mixture("A.json,B.json") == [("A.json", None), ("B.json", None)]
    assert records.parse_mixture("C:\\data\\a.json:2") == [("C:\\data\\a.json", 2.0)]
    assert records.parse_mixture("C:\\data\\a.json") == [("C:\\data\\a.json", None)]
    assert records.parse_mixture(str(strange)) == [(str(strange), None)]
    for spec in (
        "",
        " , ",
        "A.json:0,B.json:1",
        "A.json:-1,B.json:2",
        "A.json:1,B.json",
        "A.json:1e",
        "A.json:1e999",
    ):
        with pytest.raises(UserError, match="data"):
            records.parse_mixture(spec)


def test_sources_of_a_mixture(root):
    first, second = write(root, GOOD, 3, GOOD | {"id": 2}), write(root, GOOD | {"id": 3}, name="b.jsonl")
    found = records.load(f"{first}:3,{second}:1")
    assert [(source.start, source.count, source.weight) for source in found.sources] == [
        (0, 2, 3.0),
        (2, 1, 1.0),
    ]


def test_videos_are_frames(root):
    for number in range(40):
        data_case.picture(8, 8).save(root / "sub" / f"frame{number:02}.png")
    (root / "sub" / "b.png").unlink()
    rows = [
        {"id": 1, "video": "sub", "conversations": talk(("human", "<image>\n?"), ("gpt", "x"))},
        {"id": 2, "video": ["a.png", "a.png"], "conversations": talk(("human", "<video>\n?"), ("gpt", "x"))},
    ]
    found = records.load(write(root, *rows))
    assert [row.kind for row in found.rows] == ["video", "video"] and not found.problems
    names = [path.name for path in found.rows[0].image_paths()]
    assert names == [f"frame{at:02}.png" for at in np.linspace(0, 39, 32, dtype=int)]
    assert len(found.rows[1].image_paths()) == 2


# ---- the index


def build(root, *rows, **how):
    path = write(root, *rows)
    return build_index(records.load(path), TOKENIZER, data_case.TINY, how.pop("sizes", SIZES), **how)


def test_shapes_of_the_index_are_those_of_the_examples(root):
    data_case.picture(200, 150).save(root / "c.png")
    rows = [
        GOOD,
        data_case.chat_row(1, "c.png"),
        data_case.chat_row(2, None),
        data_case.chat_row(3, ["a.png", "c.png"]),
    ]
    rows.append(
        {"id": 4, "video": ["a.png", "c.png"], "conversations": talk(("human", "<image>"), ("gpt", "x"))}
    )
    for policy in (data_case.TINY, data_case.TINY_MAX):
        for mask in ("original", "clean"):
            found = build_index(records.load(write(root, *rows)), TOKENIZER, policy, SIZES, mask=mask)
            assert len(found.rows) == 5
            for at, row in enumerate(found.rows):
                assert found.shape(at) == example(row, TOKENIZER, policy, mask=mask).shape, (
                    row.id,
                    policy,
                    mask,
                )
    assert "5 rows" in found.report()


def test_rows_that_cannot_be_trained_on_are_found_before_training(root):
    (root / "broken.png").write_bytes(b"<html>")
    whole = (root / "a.png").read_bytes()
    (root / "cut.png").write_bytes(whole[:-30])
    rows = [GOOD, data_case.chat_row(1, "broken.png"), data_case.chat_row(2, "cut.png")]
    rows += [data_case.chat_row(3, "a.png", question="roads " * 900), data_case.chat_row(4, ["a.png"] * 38)]
    found = build(root, *rows)
    assert [row.id for row in found.rows] == ["row0"]
    assert [(problem.line, problem.dropped) for problem in found.problems] == [
        (at, True) for at in (2, 3, 4, 5)
    ]
    for problem, words in zip(
        found.problems,
        ("broken.png: not an image", "cut.png", "more than max_length 1024", "38 views|tokens"),
        strict=True,
    ):
        assert any(word in problem.message for word in words.split("|")), problem
    with pytest.raises(UserError, match=r"line 2 \(id row1\).*broken.png"):
        build(root, *rows, on_bad="error")
    with pytest.raises(UserError, match="no row can be used"):
        build(root, rows[1])


def test_index_reads_headers_only(root, monkeypatch):
    monkeypatch.setattr(images, "_decode", lambda *_: pytest.fail("decoded"))
    assert len(build(root, GOOD).rows) == 1


def test_sources_follow_the_rows_that_stay(root):
    (root / "broken.png").write_bytes(b"x")
    first = write(root, GOOD, data_case.chat_row(1, "broken.png"))
    second = write(root, GOOD | {"id": 3}, name="b.jsonl")
    found = build_index(records.load(f"{first},{second}"), TOKENIZER, data_case.TINY, SIZES)
    assert [(source.start, source.count) for source in found.sources] == [(0, 1), (1, 1)]
    third = write(root, data_case.chat_row(1, "broken.png"), name="c.jsonl")
    with pytest.raises(UserError, match="c.jsonl: none of its rows"):
        build_index(records.load(f"{first},{third}"), TOKENIZER, data_case.TINY, SIZES)
