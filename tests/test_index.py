"""Rows by place, their caches, array_record, and what a start with a cache does not do again."""

import base64
import json
import logging
import os
import pickle
import tracemalloc

import data_case
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from mmrstraj_jax.data import index, records, rowfiles
from mmrstraj_jax.data.collate import Sizes, example
from mmrstraj_jax.data.index import build_index
from mmrstraj_jax.errors import UserError

TOKENIZER = data_case.tokenizer()
SIZES = Sizes((1, 2, 3, 5, 7, 10, 37), 32, 1024)
GOOD = data_case.chat_row(0, "a.png")


@pytest.fixture
def root(tmp_path):
    data_case.picture(20, 10).save(tmp_path / "a.png")
    return tmp_path


def write(root, *rows, name="rows.jsonl"):
    path = root / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def start(root, *rows, cache_dir=None, **how):
    path = write(root, *rows) if rows else str(root / "rows.jsonl")
    found = records.load(path, cache_dir=cache_dir)
    return build_index(found, TOKENIZER, data_case.TINY, SIZES, cache_dir=cache_dir, **how)


def same(left, right):
    np.testing.assert_array_equal(left.shapes, right.shapes)
    assert left.problems == right.problems and left.fingerprint == right.fingerprint
    assert list(left.rows) == list(right.rows) and left.sources == right.sources


def test_rows_lie_where_they_are_read(root):
    """BOM, CRLF, blank lines, white space of every kind, text beyond ASCII: the bytes are found again."""
    rows = [data_case.chat_row(n, "a.png", question=f"Wo? ü€😀 {'x' * n}") for n in range(5)]
    lines = b"\xef\xbb\xbf" + b"\r\n \r\n".join(json.dumps(r, ensure_ascii=False).encode() for r in rows)
    (root / "lines.jsonl").write_bytes(lines)
    listed = json.dumps(rows, ensure_ascii=False, indent=3).replace("},\n", "}\t,\r\n ")
    (root / "list.json").write_bytes(b"\xef\xbb\xbf \n" + listed.encode() + b"\n\n")
    for name in ("lines.jsonl", "list.json"):
        found = records.load(str(root / name)).rows
        assert [row.conversations for row in found] == [row["conversations"] for row in rows]
        assert [row.id for row in found.take(np.asarray([3, 1]))] == ["row3", "row1"]
        assert [row.id for row in pickle.loads(pickle.dumps(found))] == [row["id"] for row in rows]
    one = records.load(str(root / "lines.jsonl")).rows
    (root / "lines.jsonl").write_bytes(lines + b"\n")
    with pytest.raises(UserError, match="lines.jsonl: changed since it was read first"):
        one[0]


@pytest.mark.parametrize("text", ["[1, 2", "[", "[{},]", "[{} {}]", "[{}] x", "[,]", "[" * 100_000])
def test_a_broken_list_is_broken_as_a_whole(root, text):
    (root / "bad.json").write_text(text)
    with pytest.raises(UserError, match="bad.json.*not valid JSON"):
        records.load(str(root / "bad.json"))


def test_other_pixels_behind_the_same_rows_are_seen(root):
    """At a resume; `fingerprint` is that of older versions, so that their runs go on."""
    cache = root / "cache"
    first = start(root, GOOD, cache_dir=cache)
    data_case.picture(20, 10).save(root / "a.png")  # the same again, at another time
    os.utime(root / "a.png", (1, 1))
    again = start(root, cache_dir=cache)
    assert pickle.loads(pickle.dumps(again)).pixels == first.pixels
    data_case.picture(20, 10, 1).save(root / "a.png")
    other = start(root, cache_dir=cache)
    assert other.pixels != first.pixels and other.fingerprint == first.fingerprint
    (notes,) = [path for path in cache.glob("index-*.json") if other.pixels in path.read_text()]
    kept = json.loads(notes.read_text())
    del kept["pixels"]  # a cache of an older version
    notes.write_text(json.dumps(kept))
    same(start(root, cache_dir=cache), other)


def test_a_second_start_reads_and_measures_nothing(root, monkeypatch):
    rows = [GOOD, {"id": 3}, GOOD, data_case.chat_row(2, "a.png")]
    cache = root / "cache"
    fresh = start(root, *rows, cache_dir=cache)
    assert [problem.dropped for problem in fresh.problems] == [True, False]
    same(fresh, start(root))
    with monkeypatch.context() as patch:
        patch.setattr(rowfiles.RowFile, "scan", lambda *_: pytest.fail("read again"))
        patch.setattr(index, "_measure", lambda *_: pytest.fail("measured again"))
        again = start(root, cache_dir=cache)
    same(again, fresh)
    assert isinstance(again.shapes, np.memmap) and isinstance(again.rows.places, np.memmap)
    small = pickle.dumps(again)
    assert str(cache).encode() in small  # workers map the same files
    same(pickle.loads(small), fresh)
    with pytest.raises(UserError, match="rows.jsonl: line 2"):
        records.load(str(root / "rows.jsonl"), on_bad="error", cache_dir=cache)


def test_everything_it_depends_on_is_in_its_key(root):
    cache = root / "cache"
    fresh = start(root, GOOD, data_case.chat_row(1, "a.png"), cache_dir=cache)
    assert start(root, cache_dir=cache, mask="clean").fingerprint != fresh.fingerprint
    data_case.picture(300, 300).save(root / "a.png")
    changed = start(root, cache_dir=cache)
    assert changed.shape(0).views > fresh.shape(0).views
    assert len(start(root, GOOD, cache_dir=cache).rows) == 1


def test_a_row_that_was_mended_comes_back(root):
    cache = root / "cache"
    rows = [GOOD, data_case.chat_row(1, "late.png"), data_case.chat_row(2, "broken.png")]
    (root / "broken.png").write_bytes(b"x")
    assert len(start(root, *rows, cache_dir=cache).rows) == 1
    data_case.picture(9, 9).save(root / "late.png")
    assert [row.id for row in start(root, cache_dir=cache).rows] == ["row0", "row1"]
    data_case.picture(9, 9).save(root / "broken.png")
    assert len(start(root, cache_dir=cache).rows) == 3
    (root / "late.png").unlink()
    gone = start(root, cache_dir=cache)
    assert [row.id for row in gone.rows] == ["row0", "row2"] and "no such file" in gone.problems[0].message


def test_a_damaged_cache_only_costs_time(root, caplog):
    cache = root / "cache"
    start(root, GOOD, GOOD | {"id": 1}, cache_dir=cache)
    fresh = start(root)  # not mapped: a mapped file that is cut is no longer memory
    files = sorted(cache.iterdir())
    assert [path.suffix for path in files] == [".json", ".npy"] * 2
    for path in files:
        whole = path.read_bytes()
        for damage in (whole[: len(whole) // 2], b"", b"{}"):
            path.write_bytes(damage)
            with caplog.at_level(logging.WARNING):
                same(start(root, cache_dir=cache), fresh)
            assert "damaged" in caplog.text
            caplog.clear()
    with caplog.at_level(logging.WARNING):
        same(start(root, cache_dir=root / "a.png"), fresh)
    assert "cannot be written" in caplog.text


def test_a_cache_with_a_pickle_in_it_runs_nothing(root):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(root / "owned"),)

    cache = root / "cache"
    start(root, GOOD, cache_dir=cache)
    for path in cache.glob("*.npy"):
        np.save(path, np.asarray([Payload()], dtype=object), allow_pickle=True)
    same(start(root, cache_dir=cache), start(root))
    assert not (root / "owned").exists()


# ---- array_record


def records_file(path, rows):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()


def test_array_record_holds_the_same_rows(root):
    data = base64.b64encode((root / "a.png").read_bytes()).decode()
    rows = [GOOD, data_case.chat_row(1, "a.png") | {"image": {"bytes": data}}, data_case.chat_row(2, None)]
    (root / "shards").mkdir()
    data_case.picture(20, 10).save(root / "shards" / "a.png")
    records_file(root / "shards" / "rows.array_record-00000-of-00002", rows[:2])
    records_file(root / "shards" / "rows.array_record-00001-of-00002", rows[2:])
    write(root, *rows)
    lines = build_index(records.load(str(root / "rows.jsonl")), TOKENIZER, data_case.TINY, SIZES)
    for path in (root / "shards",):
        found = build_index(records.load(str(path)), TOKENIZER, data_case.TINY, SIZES)
        np.testing.assert_array_equal(found.shapes, lines.shapes)
        assert found.fingerprint == lines.fingerprint
        assert [(source.start, source.count) for source in found.sources] == [(0, 3)]
        made = [example(row, TOKENIZER, data_case.TINY) for row in found.rows]
        np.testing.assert_array_equal(made[0].views, made[1].views)
        assert [value["id"] for _, _, value in records.read_rows(path)] == ["row0", "row1", "row2"]
    again = pickle.loads(pickle.dumps(found))
    assert again.rows[2].id == "row2"


def test_the_rows_own_images_do_not_stay_in_memory(root):
    width = 600  # 1 MB as BMP
    data_case.picture(width, width).save(root / "a.bmp")
    picture = (root / "a.bmp").read_bytes()
    for number in range(24):  # each another file to the cache of sizes
        content = base64.b64encode(picture + bytes([number])).decode()
        row = data_case.chat_row(number, "a.bmp") | {"image": {"bytes": content}}
        with (root / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    found = records.load(str(root / "rows.jsonl"))
    tracemalloc.start()
    made = build_index(found, TOKENIZER, data_case.TINY, SIZES, threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(made.rows) == 24 and peak < 16e6


def test_array_record_that_is_none(root):
    (root / "bad.array_record").write_bytes(b"junk" * 100)
    with pytest.raises(UserError, match="bad.array_record: not an array_record file"):
        records.load(str(root / "bad.array_record"))
    (root / "empty").mkdir()
    with pytest.raises(UserError, match="a folder without .array_record files"):
        records.load(str(root / "empty"))
    wrong = [{"bytes": "not base64!"}, {"path": "a.png"}, [{"bytes": 3}]]
    path = write(root, GOOD, *(data_case.chat_row(1, "a.png") | {"image": image} for image in wrong))
    found = records.load(path)
    assert len(found.rows) == 1 and all("in base64" in problem.message for problem in found.problems)
