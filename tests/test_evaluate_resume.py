"""A command that was killed goes on where it was, alone, among processes and inside a study."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import weights_case
from test_evaluate import PLAIN, _scores, picture

from mmrstraj_jax import evaluate, jsonl
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation import pipeline, predict, studies


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Tiny weights with AnyRes settings, whose grid is a tuple of tuples in memory and lists in a file."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    tensors = {name: 0.2 * value for name, value in weights_case.tensors().items()}
    weights_case.write_layout(folder, "hub", tensors)
    return folder


@pytest.fixture
def data(tmp_path):
    """Six questions in the schema of SynthCity's samples."""
    rows = []
    for n in range(6):
        picture(tmp_path / "data" / f"{n}.png", n, (28, 28))
        turns = [{"from": "human", "value": f"<image>\nIs car {n} red?"}, {"from": "gpt", "value": "yes"}]
        rows.append(
            {"id": str(n), "image": f"{n}.png", "conversations": turns, "type": "presence", "truth": {}}
        )
    path = tmp_path / "data" / "eval.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def _args(weights, data, out):
    named = ["--weights", str(weights), "--task", "synthcity", "--data", str(data), "--out", str(out)]
    return [*named, "--max-new-tokens", "4", *PLAIN]


def _cut(path, rows):
    """What a kill leaves: whole rows, and half of the next."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:rows]) + lines[rows][:20])


def test_the_command_goes_on_after_a_kill_in_mid_row(weights, data, tmp_path, capsys):
    args, path = _args(weights, data, tmp_path / "out"), tmp_path / "out" / "predictions.jsonl"
    assert evaluate.main(args) == 0
    before, scores = path.read_bytes(), _scores(tmp_path / "out")
    _cut(path, 3)
    kept = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
    assert evaluate.main(args) == 0
    assert "goes on after 3 of 6 answers" in capsys.readouterr().err
    assert path.read_bytes().startswith(kept) and sorted(jsonl.read(path), key=str) == sorted(
        map(json.loads, before.splitlines()), key=str
    )
    assert _scores(tmp_path / "out") == scores
    assert evaluate.main(args) == 0  # finished: scored once more
    assert _scores(tmp_path / "out") == scores


def test_answers_to_data_that_changed_are_refused(weights, data, tmp_path):
    args = _args(weights, data, tmp_path / "out")
    evaluate.main(args)
    rows = json.loads(data.read_text())
    rows[2]["conversations"][1]["value"] = "no"
    data.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="eval/2 was answered when its references was another"):
        evaluate.main(args)
    rows[2]["conversations"][1]["value"] = "yes"
    rows[4]["image"] = "0.png"
    data.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="eval/4 was answered when its image was another"):
        evaluate.main(args)


def test_other_weights_of_the_same_size_are_another_model(weights, data, tmp_path):
    """An export over the old one: its answers must not be taken for the new model's."""
    moved = tmp_path / "weights"
    shutil.copytree(weights, moved)
    args = _args(moved, data, tmp_path / "out")
    evaluate.main(args)
    for file in moved.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(UserError, match="holds answers of another model or prompt"):
        evaluate.main(args)
    author = tmp_path / "out" / "predictions.model.json"
    old = json.loads(author.read_text())
    del old["content"]  # written by an older version
    author.write_text(json.dumps(old))
    evaluate.main(args)


def test_a_run_trained_anew_to_the_same_step_is_another_model(tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "5"
    folder.mkdir(parents=True)
    found = []
    for hashes in ({"a": "1"}, {"a": "2"}):
        (folder / "manifest.json").write_text(json.dumps({"meta": {}, "files": hashes, "sha256": "x"}))
        found.append(predict.source_of(str(tmp_path / "run"), None, None, None))
    assert found[0]["step"] == found[1]["step"] == 5 and found[0] != found[1]
    (folder / "manifest.json").write_text(json.dumps({"meta": {"kept": 1}, "files": {"a": "2"}}))
    assert predict.source_of(str(tmp_path / "run"), None, None, None) == found[1]  # meta is no content


def test_processes_of_a_job_share_a_suite(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(studies, "_chain", lambda run: [("base", pipeline.Source(weights=str(weights)))])
    out = tmp_path / "out"
    args = ["suite", "--run", "any", "--out", str(out), "--limit", "4", "--tasks", "synthtraffic-bench"]
    for index in "10":
        for name, value in zip(
            ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), ("x:1", "2", index), strict=True
        ):
            monkeypatch.setenv(f"JAX_{name}", value)
        assert evaluate.main(args) == 0
        assert (out / "report.html").exists() == (index == "0")
    assert _scores(out / "synthtraffic-bench" / "base")["n"] == 4


def test_two_processes_share_the_items(weights, data, tmp_path):
    """One after the other, so that the second meets what the first has written."""
    args, out = _args(weights, data, tmp_path / "out"), tmp_path / "out"
    for index in "10":
        place = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": index}
        command = [sys.executable, "-m", "mmrstraj_jax.evaluate", *args]
        done = subprocess.run(command, env=os.environ | place, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert [row["id"] for row in jsonl.read(out / "predictions.jsonl")] == [f"eval/{n}" for n in range(6)]
    assert _scores(out)["questions"]["micro"]["n"] == 6


@pytest.mark.parametrize("study", ["corruption", "suite"])
def test_a_study_goes_on_after_a_kill(weights, data, tmp_path, monkeypatch, study):
    out = tmp_path / "out"
    if study == "corruption":
        args = [study, *_args(weights, data, out), "--kinds", "haze", "--severities", "1"]
        path = out / "haze-1" / "predictions.jsonl"
    else:
        monkeypatch.setattr(studies, "_chain", lambda run: [("base", pipeline.Source(weights=str(weights)))])
        args = [study, "--run", "any", "--out", str(out), "--limit", "4", "--tasks", "synthtraffic-bench"]
        path = out / "synthtraffic-bench" / "base" / "predictions.jsonl"
    assert evaluate.main(args) == 0
    scores = _scores(path.parent)
    _cut(path, 2)
    assert evaluate.main(args) == 0
    assert _scores(path.parent) == scores
