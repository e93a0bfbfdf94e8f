"""The command `python -m mmrstraj_jax.generate` on a tiny HF folder."""

import json
import subprocess
import sys

import numpy as np
import pytest
import weights_case
from PIL import Image

import mmrstraj_jax
from mmrstraj_jax import generate
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.synthcity import sample

SHORT = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights, a folder of images of two sizes, a broken one beside it."""
    where = tmp_path_factory.mktemp("generate")
    tensors = {name: 0.2 * value for name, value in weights_case.tensors().items()}
    weights_case.write_layout(where / "weights", "hub", tensors)
    (where / "images").mkdir()
    random = np.random.default_rng(0)
    for number, size in enumerate([(28, 28), (60, 30), (28, 28)]):
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(where / "images" / f"{number}.png")
    whole = (where / "images" / "1.png").read_bytes()
    (where / "broken").mkdir()
    (where / "broken" / "a.png").write_bytes(whole)
    (where / "broken" / "b.png").write_bytes(whole[: len(whole) // 2])
    return where


@pytest.fixture(scope="module")
def model(folder):
    return mmrstraj_jax.load(folder / "weights")


@pytest.fixture
def command(folder, model, monkeypatch, capsys):
    """Runs the command on the model that is loaded already; returns what it prints."""

    def run(*args: object) -> str:
        asked = {}

        def load(path, **how):
            asked[path] = how
            return model

        monkeypatch.setattr("mmrstraj_jax.api.load", load)
        assert generate.main(["--weights", str(folder / "weights"), *map(str, args)]) == 0
        assert list(asked) == [str(folder / "weights")]
        return capsys.readouterr().out

    return run


def test_an_answer_is_what_the_model_generates(command, model, folder):
    image = folder / "images" / "1.png"
    found = command("--image", image, "--prompt", "Is there a bridge?", *SHORT)
    assert found == model.generate("Is there a bridge?", [image], max_new_tokens=6) + "\n"


def test_options_reach_the_decoder(command, model, folder):
    args = [
        "--temperature",
        "2",
        "--top-p",
        "0.9",
        "--top-k",
        "50",
        "--seed",
        "3",
        "--repetition-penalty",
        "1.2",
    ]
    how = {"temperature": 2.0, "top_p": 0.9, "top_k": 50, "seed": 3, "repetition_penalty": 1.2}
    found = command("--prompt", "What?", *args, *SHORT)
    assert found == model.generate("What?", max_new_tokens=6, **how) + "\n"


def test_a_folder_of_frames_is_a_video(command, model, folder):
    frames = sorted((folder / "images").iterdir())
    found = command("--video", folder / "images", "--prompt", "What moves?", *SHORT)
    assert found == model.generate("What moves?", videos=[frames], max_new_tokens=6) + "\n"


def test_chat_keeps_images_and_turns(command, model, folder, monkeypatch):
    lines = iter(["And a <image>?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    image = folder / "images" / "0.png"
    found = command("--image", image, "--prompt", "A bridge?", "--chat", *SHORT)
    first = model.generate("A bridge?", [image], max_new_tokens=6)
    turns = [
        {"role": "user", "content": "A bridge?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": [{"type": "text", "text": "And a <image>?"}]},  # typed text, no slot
    ]
    assert found == f"{first}\n{model.generate(turns, [image], max_new_tokens=6)}\n"


def test_a_folder_becomes_predictions(command, model, folder, tmp_path):
    out = tmp_path / "answers.jsonl"
    command("--folder", folder / "images", "--prompt", "Describe it.", "--out", out, *SHORT)
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert sorted(rows) == ["0.png", "1.png", "2.png"]
    keys = ["id", "image", "question", "type", "prediction", "references", "prompt", "decode"]
    for row in rows.values():
        assert list(row) == keys
        assert row["question"] == "Describe it." and row["decode"]["max_new_tokens"] == 6
        assert row["prompt"].endswith("<image>\nDescribe it.<|im_end|>\n<|im_start|>assistant\n")
        assert row["prediction"] == model.generate("Describe it.", [row["image"]], max_new_tokens=6)


def test_hidden_files_of_a_folder_are_no_images(command, folder, tmp_path):
    """macOS puts a ._ file beside each one on foreign disks."""
    (tmp_path / "images" / "scene.tif").mkdir(parents=True)
    (tmp_path / "images" / "._0.png").write_bytes(b"Mac OS X")
    (tmp_path / "images" / "0.png").write_bytes((folder / "images" / "0.png").read_bytes())
    command("--folder", tmp_path / "images", "--prompt", "Q", "--out", tmp_path / "out.jsonl", *SHORT)
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").open()] == ["0.png"]


def test_answers_that_could_not_be_written_are_not_asked_for(folder, tmp_path):
    (tmp_path / "old.jsonl").touch()
    for out, message in (("old.jsonl", "exists already"), ("no/out.jsonl", "no such folder as")):
        with pytest.raises(UserError, match=message):  # and not that there are no such weights
            generate.main(
                ["--weights", "w", "--folder", str(folder / "images"), "--prompt", "Q"]
                + ["--out", str(tmp_path / out)]
            )


def test_nothing_is_written_when_an_image_is_broken(command, folder, tmp_path):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(UserError, match=r"b\.png: damaged or truncated image"):
        command("--folder", folder / "broken", "--prompt", "Q", "--out", out, *SHORT)
    assert not out.exists()


def test_held_out_images_with_their_truth(command, tmp_path, monkeypatch):
    source = sample.write_sample(tmp_path, "eval_stage1", 2, 0, "B", "eval_general")
    monkeypatch.setattr(sample, "ensure_sample", lambda: {"eval_stage1": source})
    found = command("--held-out", 2, "--max-new-tokens", 2).splitlines()
    rows = json.loads(source.read_text())
    images = [line for line in found if line.endswith(".png")]
    assert images == [str(tmp_path / "images" / f"eval_stage1-{at:06d}.png") for at in range(2)]
    truths = [line.removeprefix("  truth     ") for line in found if line.startswith("  truth")]
    assert len(truths) == 4 and set(truths) <= {row["truth"]["answer"] for row in rows}
    captions = [row["truth"]["answer"] for row in rows if row["type"] == "caption"]
    assert truths[0::2] == captions


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "Q"], "one of --run DIR and --weights DIR"),
        (["--run", "a", "--weights", "b", "--prompt", "Q"], "one of --run DIR and --weights DIR"),
        (["--run", "nowhere", "--prompt", "Q"], "--run nowhere is no run directory"),
        (["--weights", "w"], "what should the model answer"),
        (["--weights", "w", "--prompt", "Q", "--image", "no.png"], "--image no.png: no such file"),
        (["--weights", "w", "--prompt", "Q", "--folder", "f"], "belong together"),
        (["--weights", "w", "--held-out", "1", "--chat"], "expected one of these"),
        (["--weights", "w", "--held-out", "0"], "--held-out 0"),
        (["--weights", "w", "--held-out", "1", "--prompt", "Q"], "--prompt: --held-out asks"),
        (["--weights", "w", "--prompt", "Q", "--image", "a", "--video", "b"], "--image and --video"),
        (["--weights", "w", "--prompt", "Q", "--anyres", "anyres"], "anyres.policy 'anyres'"),
        (["--weights", "w", "--prompt", "Q", "--batch-size", "0"], "--batch-size 0"),
        (["--weights", "w", "--prompt", "Q", "--temprature", "1"], "--temprature"),
        (["--weights", "w", "--prompt", "Q", "--max-new-tokens", "x"], "--max-new-tokens"),
        (["--weights", "w", "--prompt", "Q", "--top-p", "2"], "top_p 2.0"),
        (["--weights", "no-weights", "--prompt", "Q"], "no-weights"),
        # before weights are looked for
        (["--weights", "w", "--prompt", "Q", "--folder", "f", "--out", "o"], "--folder f: no such folder"),
        (["--weights", "w", "--prompt", "Q", "--video", "v"], "--video v: no such folder"),
    ],
)
def test_wrong_words_are_named(args, message):
    with pytest.raises(UserError, match=message) as error:
        generate.main(args)
    assert "\n" not in str(error.value)


def test_from_the_shell(folder):
    words = [sys.executable, "-m", "mmrstraj_jax.generate", "--weights", folder / "weights"]
    bad = subprocess.run([*words, "--image", "no.png", "--prompt", "Q"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "") and bad.stderr == "error: --image no.png: no such file\n"
