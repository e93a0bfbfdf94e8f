"""The command `python -m mmrstraj_jax.evaluate`: predictions that survive kills, and scores that repeat."""

import json
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import weights_case
from PIL import Image
from test_judge import server  # noqa: F401  a fixture

from mmrstraj_jax import evaluate, jsonl
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import predict, tasks
from mmrstraj_jax.evaluation.readers import Item

VQA = tasks.TASKS["rsieval-vqa"]
PLAIN = ["--meteor", "none"]


def picture(path, seed=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def rsieval(tmp_path):
    """A made-up set in RSIEval's schema: 3 images, 12 questions."""
    rows = []
    for n in range(3):
        picture(tmp_path / "data" / "images" / f"P000{n}_0000.png", n)
        pairs = [
            ("Is there a bridge?", "Yes." if n else "No.", "presence"),
            ("How many ships are there?", str(n + 1), "quantity"),
            ("What is the direction of the road?", "North-south", "road_ori"),
            ("Is this a color or panchromatic image?", "Color.", "image"),
        ]
        qa = [dict(zip(("question", "answer", "type"), pair, strict=True)) for pair in pairs]
        caption = f"A harbor with {n + 1} ships near a road."
        rows.append({"filename": f"P000{n}_0000.png", "caption": caption, "qa_pairs": qa})
    (tmp_path / "data" / "annotations.json").write_text(json.dumps({"annotations": rows}), encoding="utf-8")
    return tmp_path / "data"


# ---- predictions ----


def _answers(items):
    for place, item in enumerate(items):
        yield place, f"answer to {item.id}", "prompt"


class Killed(Exception):
    pass


def _killed_after(number):
    def ask(items):
        for done, answer in enumerate(_answers(items)):
            if done == number:
                raise Killed
            yield answer

    return ask


def test_killed_ten_times_nothing_is_lost_or_doubled(tmp_path):
    image = picture(tmp_path / "a.png")
    items = [Item(str(i), (image,), "Is there a car?", "presence", ("Yes.",)) for i in range(60)]
    path, draw = tmp_path / "out" / "predictions.jsonl", random.Random(3)
    for _ in range(10):
        with pytest.raises(Killed):
            predict.run(VQA, items, path, _killed_after(draw.randint(0, 5)), {"seed": 0}, {})
        data = path.read_bytes()
        if data and draw.random() < 0.7:  # the last line was being written
            path.write_bytes(data[: len(data) - draw.randint(1, 40)])
    predict.run(VQA, items, path, _answers, {"seed": 0}, {})
    rows = jsonl.read(path)
    assert sorted(row["id"] for row in rows) == sorted(item.id for item in items)
    assert all(row["prediction"] == f"answer to {row['id']}" for row in rows)
    assert set(rows[0]) == set(predict.KEYS)
    before = path.read_bytes()
    predict.run(VQA, items, path, _killed_after(0), {"seed": 0}, {})  # finished: nobody is asked
    assert path.read_bytes() == before


def test_processes_share_the_items_and_a_restart_may_have_another_number(tmp_path):
    image = picture(tmp_path / "a.png")
    items = [Item(str(i), (image,), "Is there a car?", "presence", ("Yes.",)) for i in range(30)]
    path, asked = tmp_path / "out" / "predictions.jsonl", []

    def counted(items):
        for at, text, prompt in _answers(items):
            asked.append(items[at].id)
            yield at, text, prompt

    def run(index, count, ask=counted):
        return predict.run(VQA, items, path, ask, {"seed": 0}, {}, predict.Place(index, count))

    with pytest.raises(Killed):
        run(2, 3, _killed_after(4))
    assert run(1, 3) is False and len(asked) == 10
    with ThreadPoolExecutor(2) as pool:  # now two processes, the first of them waits for the second
        first = pool.submit(run, 0, 2)
        with pytest.raises(Killed):
            run(1, 2, _killed_after(3))
        second = pool.submit(run, 1, 2)
        assert first.result() is True and second.result() is False
    assert len(asked) == len(set(asked)) == 30 - 4 - 3
    rows = jsonl.read(path)
    assert [row["id"] for row in rows] == [item.id for item in items]  # joined in the items' order
    assert all(row["prediction"] == f"answer to {row['id']}" for row in rows)
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "predictions.jsonl",
        "predictions.model.json",
    ]


def test_a_process_that_never_answers_is_named(tmp_path, monkeypatch):
    image = picture(tmp_path / "a.png")
    items = [Item(str(i), (image,), "q", "presence", ("Yes.",)) for i in range(4)]
    monkeypatch.setattr(predict, "PATIENCE", 0.1)
    with pytest.raises(UserError, match="2 items have no answer yet from process 1 in 0 s; run the same"):
        predict.run(VQA, items, tmp_path / "p.jsonl", _answers, {}, {}, predict.Place(0, 2))


def test_a_file_has_one_author(tmp_path):
    image = picture(tmp_path / "a.png")
    items = [Item(str(i), (image,), "Is there a car?", "presence", ("Yes.",)) for i in range(3)]
    path = tmp_path / "predictions.jsonl"
    predict.run(VQA, items, path, _answers, {"seed": 0}, {"run": "a"})
    for changed, message in (
        ({"source": {"run": "b"}}, "another model"),
        ({"decode": {"seed": 1}}, "decoded otherwise"),
        ({"items": items[:2]}, "no item of this run"),
        ({"task": tasks.TASKS["rsvqa-lr"]}, "another model or prompt"),
    ):
        how = {"task": VQA, "items": items, "decode": {"seed": 0}, "source": {"run": "a"}} | changed
        with pytest.raises(UserError, match=message):
            predict.run(how["task"], how["items"], path, _answers, how["decode"], how["source"])
    with jsonl.writer(path), pytest.raises(UserError, match="another process"):
        predict.run(VQA, items, path, _answers, {"seed": 0}, {"run": "a"})


def test_pods_with_equal_process_ids_may_begin_together(tmp_path, monkeypatch):
    """Each has written who answers before the first has put its file in place."""
    image = picture(tmp_path / "a.png")
    items = [Item(str(i), (image,), "Is there a car?", "presence", ("Yes.",)) for i in range(4)]
    both, write_text = threading.Barrier(2), Path.write_text

    def slow(self, *args, **kwargs):
        done = write_text(self, *args, **kwargs)
        if ".model." in self.name:
            both.wait(20)
        return done

    monkeypatch.setattr(Path, "write_text", slow)
    path = tmp_path / "out" / "predictions.jsonl"
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(predict.run, VQA, items, path, _answers, {}, {}, predict.Place(i, 2)) for i in (0, 1)
        ]
        assert [run.result() for run in runs] == [True, False]
    assert len(jsonl.read(path)) == 4


def test_unanswered_items_are_an_error(tmp_path):
    image = picture(tmp_path / "a.png")
    items = [Item(str(i), (image,), "q", "presence", ("Yes.",)) for i in range(3)]
    with pytest.raises(UserError, match="2 items have no answer yet"):
        predict.run(VQA, items, tmp_path / "p.jsonl", lambda items: [(1, "x", "p")], {}, {})


# ---- the command ----


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(jsonl.dump(row) for row in rows), encoding="utf-8")
    return path


def _scores(folder):
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


def test_predictions_of_any_model(rsieval, tmp_path, capsys):
    said = ["Yes", "There are two ships.", "The road runs vertically.", "panchromatic"]
    rows = [{"id": f"P000{n}_0000.png#{i}", "prediction": said[i]} for n in range(3) for i in range(4)]
    path = _write(tmp_path / "mine" / "answers.jsonl", rows)
    args = ["--predictions", str(path), "--task", "rsieval-vqa", "--data", str(rsieval)]
    assert evaluate.main(args) == 0
    found = {row["type"]: row for row in _scores(path.parent)["questions"]["types"]}
    assert {kind: (r["correct"], r["wrong"], r["n"]) for kind, r in found.items()} == {
        "presence": (2, 1, 3), "quantity": (1, 2, 3), "road_ori": (3, 0, 3), "image": (0, 3, 3),
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "all (micro)" in printed and "mean of 4 types (macro)" in printed and "undecided" in printed
    assert len(jsonl.read(path.parent / "items.jsonl")) == 12

    _write(path, rows[1:])
    with pytest.raises(UserError, match="no prediction for 1 of 12 ids, such as P0000_0000.png#0"):
        evaluate.main(args)
    _write(path, [*rows, {"id": "other", "prediction": ""}])
    with pytest.raises(UserError, match="no item of this task for 1"):
        evaluate.main(args)
    _write(path, [*rows, rows[0]])
    with pytest.raises(UserError, match="line 13: P0000_0000.png#0 was predicted before"):
        evaluate.main(args)


def test_scores_repeat_from_the_predictions_alone(tmp_path):
    rows = [
        {
            "id": str(i),
            "type": "caption",
            "prediction": f"a road and {i} trees",
            "references": [f"{i} trees near a road"],
        }
        for i in range(4)
    ]
    rows += [
        {
            "id": "q",
            "type": "presence",
            "question": "Is there a car?",
            "prediction": "no",
            "references": ["No."],
        }
    ]
    path = _write(tmp_path / "p.jsonl", rows)
    assert evaluate.main(["--predictions", str(path), "--task", "synthcity", *PLAIN]) == 0
    first = _scores(tmp_path)
    part = first["captions"]["caption"]
    assert part["n"] == 4 and 0 < part["metrics"]["rouge_l"] < 1
    assert "constant" in part["baselines"] and "hindsight" in part["baselines"]["constant"]["from"]
    assert first["questions"]["micro"]["correct"] == 1
    assert evaluate.main(["--predictions", str(path), "--task", "synthcity", *PLAIN]) == 0
    assert _scores(tmp_path) == first


def test_caption_baselines_come_from_the_training_split(tmp_path):
    images = []
    for n in range(6):
        picture(tmp_path / "imgs" / f"{n}.png", n % 3)  # test image n looks like training image n % 3
        sentences = [{"raw": f"there are {n % 3} planes on the airport ."}]
        images.append({"filename": f"{n}.png", "split": "train" if n < 3 else "test", "sentences": sentences})
    data = tmp_path / "dataset_ucm.json"
    data.write_text(json.dumps({"images": images}), encoding="utf-8")
    path = _write(
        tmp_path / "p" / "p.jsonl", [{"id": f"{n}.png", "prediction": "some planes"} for n in (3, 4, 5)]
    )
    evaluate.main(["--predictions", str(path), "--task", "ucm", "--data", str(data), *PLAIN])
    baselines = _scores(path.parent)["captions"]["caption"]["baselines"]
    assert baselines["nearest"]["metrics"]["rouge_l"] == pytest.approx(1.0)
    assert 0 < baselines["constant"]["metrics"]["rouge_l"] < 1
    assert baselines["constant"]["from"] == "training captions"
    data.write_text(json.dumps({"images": images[3:]}), encoding="utf-8")  # no training split
    evaluate.main(["--predictions", str(path), "--task", "ucm", "--data", str(data), *PLAIN])
    baselines = _scores(path.parent)["captions"]["caption"]["baselines"]
    assert "hindsight" in baselines["constant"]["from"] and "nearest" not in baselines


def test_a_server_answers_and_failed_requests_are_asked_again(rsieval, tmp_path, server):  # noqa: F811
    pytest.importorskip("openai")
    seen = []

    def vision(messages):
        image, text = messages[0]["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        seen.append(text["text"])
        return "Yes."

    url, requests = server(vision)
    out = tmp_path / "out"
    args = [
        "--model",
        "stub",
        "--base-url",
        url,
        "--task",
        "rsieval-vqa",
        "--data",
        str(rsieval),
        "--out",
        str(out),
    ]
    assert evaluate.main(args) == 0
    assert len(jsonl.read(out / "predictions.jsonl")) == 12 == len(requests)
    assert requests[0]["temperature"] == 0 and requests[0]["max_tokens"] == 64
    path = out / "predictions.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    assert evaluate.main(args) == 0
    assert len(requests) == 14
    assert _scores(out)["protocol"]["decode"]["temperature"] == 0


@pytest.mark.parametrize(
    "raw", [b'{"error": {"message": "no credit"}}', b"<html>", b'{"choices": []}', b"[]"]
)
def test_a_reply_that_is_none_leaves_the_item_open(rsieval, tmp_path, server, raw, capsys):  # noqa: F811
    pytest.importorskip("openai")
    url, _ = server(None, raw=raw)
    args = ["--model", "stub", "--base-url", url, "--task", "rsieval-vqa", "--data", str(rsieval)]
    with pytest.raises(UserError, match="12 items have no answer yet; run the same command again"):
        evaluate.main([*args, "--out", str(tmp_path / "out")])
    assert "P0000_0000.png#0: the server's reply is not a chat completion" in capsys.readouterr().err


def test_a_damaged_training_image_is_named(tmp_path):
    images = []
    for n in range(2):
        picture(tmp_path / "imgs" / f"{n}.png", n)
        row = {"filename": f"{n}.png", "split": ("train", "test")[n], "sentences": [{"raw": "a road ."}]}
        images.append(row)
    (tmp_path / "imgs" / "0.png").write_bytes(b"no picture")
    data = tmp_path / "dataset_ucm.json"
    data.write_text(json.dumps({"images": images}), encoding="utf-8")
    path = _write(tmp_path / "p" / "p.jsonl", [{"id": "1.png", "prediction": "a road"}])
    with pytest.raises(UserError, match="0.png: cannot be read as an image .*restore it, or remove it"):
        evaluate.main(["--predictions", str(path), "--task", "ucm", "--data", str(data), *PLAIN])


def test_a_local_model_answers(tmp_path):
    tensors = {name: 0.2 * value for name, value in weights_case.tensors().items()}
    weights_case.write_layout(tmp_path / "weights", "hub", tensors)
    rows = []
    for n in range(2):
        picture(tmp_path / f"{n}.png", n, (28, 28))
        turns = [{"from": "human", "value": "<image>\nIs there a bridge?"}, {"from": "gpt", "value": "yes"}]
        rows.append(
            {"id": f"s-{n}", "image": f"{n}.png", "conversations": turns, "type": "presence", "truth": {}}
        )
    data = tmp_path / "eval.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    out = tmp_path / "out"
    args = [
        "--weights",
        str(tmp_path / "weights"),
        "--task",
        "synthcity",
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    args += ["--max-new-tokens", "4", "--batch-size", "2"]
    assert evaluate.main(args) == 0
    written = {row["id"]: row for row in jsonl.read(out / "predictions.jsonl")}
    assert written.keys() == {"eval/s-0", "eval/s-1"}
    assert "Is there a bridge?" in written["eval/s-0"]["prompt"]
    assert written["eval/s-0"]["decode"]["max_new_tokens"] == 4
    assert _scores(out)["questions"]["micro"]["n"] == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "ucm"], "expected one of --run DIR"),
        (["--task", "ucm", "--model", "x"], "belong together"),
        (["--task", "nothing", "--predictions", "p"], "expected one of synthcity"),
        (["--task", "ucm", "--predictions", "/nowhere.jsonl"], "nowhere.jsonl"),
        (["--task", "rsicd", "--weights", "w"], "--data PATH"),
        (["--task", "rsicd", "--weights", "w", "--data", "/nowhere"], "no such file"),
        (["--predictions", "p"], "--task"),
        (["compare", "/nowhere", "/nowhere"], "scores.json"),
        (["report"], "--out"),
        (["--task", "synthcity", "--weights", "w", "--batch-size", "0"], "--batch-size 0: expected 1"),
        (
            ["--task", "synthcity", "--weights", "w", "--max-new-tokens", "0"],
            "--max-new-tokens 0: expected 1",
        ),
        (["--task", "synthcity", "--weights", "w", "--out", f"{__file__}/x"], "is a file; expected a folder"),
        (["report", "x", "--out", __file__], "is a file; expected a folder"),
        (
            ["--task", "synthtraffic-bench", "--run", "/usr"],
            "--run /usr: not a run directory of training; weights",
        ),
    ],
)
def test_mistakes_are_one_line(args, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(args)
    assert "\n" not in str(error.value)


def test_a_metric_that_cannot_run_is_told_before_the_first_question(rsieval, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.translate.meteor_score", None)
    args = ["--weights", str(tmp_path), "--task", "rsieval-caption", "--data", str(rsieval)]
    with pytest.raises(UserError, match="meteor_nltk needs the package nltk"):
        evaluate.main([*args, "--meteor", "meteor_nltk", "--out", str(tmp_path / "out")])


def test_help_needs_no_jax():
    code = "import sys; from mmrstraj_jax import evaluate\n"
    code += "try: evaluate.main(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rsieval-vqa" in done.stdout
