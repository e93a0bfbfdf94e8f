"""The command's options and output folders: nothing is ignored, nothing half written stays."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights_case as case
from safetensors.numpy import load_file, save_file

from mmrstraj_jax import convert
from mmrstraj_jax.config import Config, LoRAConfig
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.lora import add_lora
from mmrstraj_jax.training import run as training_run
from mmrstraj_jax.weights import safetensors_io
from mmrstraj_jax.weights.load import load_model

LORA = LoRAConfig(rank=2, alpha=4.0)


@pytest.fixture
def hub(tmp_path):
    return str(case.write_layout(tmp_path / "hub", "hub", case.tensors()))


def run(*words: object) -> int:
    return convert.main([str(word) for word in words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--base", "some/repository"), "--base: belongs to an adapter; give --peft"),
        (("--transformers", "4.57"), "--transformers: belongs to an adapter; give --peft"),
        (("--peft", "--title", "x"), "--title: belongs to a merged checkpoint"),
        (("--peft", "--tokenizer", "x"), "--tokenizer: belongs to a merged checkpoint"),
        (("--peft", "--max-shard-gb", "1"), "--max-shard-gb: belongs to a merged checkpoint"),
        (("--max-shard-gb", "nan"), "--max-shard-gb: 'nan': expected a number of 0 or more"),
        (("--max-shard-gb", "-1"), "expected a number of 0 or more"),
        (("--max-shard-gb", "five"), "'five': expected a number of 0 or more"),
        (("--serving", "anyres_max_9"), "unrecognized arguments: --serving"),
        (("--weights", "DIR"), "is no run directory, and names its weights itself"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(hub, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run("export", hub, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["nan", "-1", "inf"])
def test_a_tolerance_that_could_not_be_met_is_refused(hub, value):
    with pytest.raises(UserError, match="--tolerance: .*expected a number of 0 or more"):
        run("verify", hub, hub, f"--tolerance={value}")


def test_a_fresh_projector_is_not_made_to_look_trained(hub, tmp_path, capsys):
    """Stage 1 would train adapters on random weights: an import is as fresh, an export says it."""
    folders = {}
    tower = {f"vision_model.{k[6:]}": v for k, v in case.tensors(tower_layers=4).items() if k[:6] == "tower|"}
    text = {f"model.{k[5:]}": v for k, v in case.tensors().items() if k.startswith("text|")}
    config = {"model_type": "siglip", "vision_config": case.vision_json(4)}
    folders["siglip"] = case.write(tmp_path / "siglip", config, tower, with_tokenizer=False)
    folders["qwen"] = case.write(tmp_path / "qwen", case.text_json(), text)
    parts = ",".join(f"{name}={folder}" for name, folder in folders.items())
    source = f"{parts},projector=fresh"
    assert run("import", source, tmp_path / "ours", "--dtype", "source") == 0
    assert "fresh: nothing has trained it, stage 0 does" in capsys.readouterr().out
    before, after = (load_model(path, dtype="source") for path in (source, tmp_path / "ours"))
    assert set(after.fresh) == set(before.fresh) != set() and after.fingerprint == before.fingerprint
    assert run("verify", source, tmp_path / "ours") == 0
    with pytest.raises(UserError, match="the projector is fresh, and LoRA cannot align it: run stage 0"):
        training_run.start(Config(weights=str(tmp_path / "ours"), lora=LORA))
    policy = ("--serving-policy", "anyres_max_9", "--dtype", "source")
    assert run("export", tmp_path / "ours", tmp_path / "hf", *policy) == 0
    assert "fresh: nothing has trained it" in capsys.readouterr().out
    assert "The projector is fresh" in (tmp_path / "hf" / "README.md").read_text()
    assert run("verify", source, tmp_path / "hf", *policy[:2]) == 0
    assert run("import", f"{parts},projector={hub}", tmp_path / "whole") == 0
    assert load_model(tmp_path / "whole").fresh == () and "nothing has" not in capsys.readouterr().out
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fresh": ["language_model.norm.weight"]}))
    with pytest.raises(UserError, match="config.json: fresh .*expected leaves of the projector"):
        load_model(tmp_path / "ours")


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_is_one_line_and_leaves_nothing(hub, tmp_path, monkeypatch, command):
    """`write` reports a full disk without the name of the file."""
    write_file = safetensors_io.write_file

    def full(path, *rest):
        write_file(path, *rest)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_io, "write_file", full)
    with pytest.raises(UserError, match="out: cannot be written .No space left on device., and nothing of"):
        run(command, hub, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]
    monkeypatch.undo()
    assert run(command, hub, tmp_path / "out") == 0


def test_an_interrupted_import_can_be_given_again(hub, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors_io, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("import", hub, tmp_path / "out")
    monkeypatch.undo()
    assert run("import", hub, tmp_path / "out") == 0


def test_a_link_that_leads_nowhere_is_in_the_way(hub, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    for command in ("import", "export"):
        with pytest.raises(UserError, match="out: exists"):
            run(command, hub, tmp_path / "out")


def test_a_missing_embedding_is_named_whatever_the_dtype(hub, tmp_path):
    content = load_file(f"{hub}/model.safetensors")
    del content["language_model.model.embed_tokens.weight"]
    save_file(content, f"{hub}/model.safetensors")
    for dtype in convert.DTYPES:
        with pytest.raises(UserError, match="missing language_model.model.embed_tokens.weight"):
            run("import", hub, tmp_path / "out", "--dtype", dtype)
    content["language_model.model.embed_tokens.weight"] = np.zeros((case.VOCABULARY, 24), np.int64)
    save_file(content, f"{hub}/model.safetensors")
    with pytest.raises(UserError, match="language_model.model.embed_tokens.weight holds integers"):
        run("import", hub, tmp_path / "out", "--dtype", "source")


def test_a_peft_folder_is_not_our_adapter(hub, tmp_path):
    folder = tmp_path / "peft"
    folder.mkdir()
    with pytest.raises(UserError, match="peft: no adapter.json; expected a folder of native.save_adapter$"):
        run("import", hub, tmp_path / "out", "--adapter", folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(UserError, match="peft: is a PEFT adapter; merge it with peft"):
        run("import", hub, tmp_path / "out", "--adapter", folder)
    key = "base_model.model.model.multi_modal_projector.linear_1.lora_A.weight"
    save_file({key: np.zeros((2, 16), np.float32)}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="peft: is a PEFT adapter, not a model; merge it with peft"):
        run("import", folder, tmp_path / "out")


def test_a_run_whose_base_was_moved(hub, tmp_path, monkeypatch):
    """--weights reaches the run, and the base that a PEFT adapter names is the new place."""

    def open_run(path, *, dtype, weights=None):
        loaded = load_model(weights or hub, dtype=dtype)
        add_lora(loaded.model, LORA, jax.random.key(0))
        module = loaded.model.multi_modal_projector.linear_1
        module.lora_B[...] = jnp.asarray(np.ones(module.lora_B.shape), jnp.float32)
        base = {"path": weights or hub, "layout": "llava-hf", "rebuild": None}
        beside = loaded.config, loaded.anyres, loaded.tokenizer_dir, base
        return training_run.OpenRun(loaded.model, *beside, run_config=Config(lora=LORA))

    monkeypatch.setattr(training_run, "is_run", lambda path: str(path) == "runs/stage1")
    monkeypatch.setattr(training_run, "open_run", open_run)
    moved = shutil.move(hub, tmp_path / "moved")
    with pytest.raises(UserError, match="hub: no such file or folder"):
        run("export", "runs/stage1", tmp_path / "hf")
    assert run("export", "runs/stage1", tmp_path / "hf", "--weights", moved) == 0
    assert run("verify", "runs/stage1", tmp_path / "hf", "--weights", moved) == 0
    assert run("export", "runs/stage1", tmp_path / "peft", "--peft", "--weights", moved) == 0
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(moved)


def test_the_embedded_weights_have_a_name(tmp_path):
    """As base.json and the messages call them."""
    policy = ("--serving-policy", "anyres_max_9")
    assert run("export", training_run.EMBEDDED, tmp_path / "hf", *policy) == 0
    assert run("verify", training_run.EMBEDDED, tmp_path / "hf", *policy) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 112


def test_a_repository_of_the_hub_cache_is_not_its_snapshot(hub, tmp_path):
    """Files of a snapshot are links to blobs; they are read as files."""
    repository = tmp_path / "models--llava-hf--x"
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(hub, repository / "blobs")
    snapshot.mkdir(parents=True)
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    with pytest.raises(UserError, match="repository of the hub's cache; name a folder below .*snapshots"):
        run("import", repository, tmp_path / "out")
    assert run("export", snapshot, tmp_path / "out", "--dtype", "source") == 0
    assert run("verify", hub, tmp_path / "out") == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_values_that_float16_cannot_hold_are_not_exported_as_infinite(hub, tmp_path):
    content = load_file(f"{hub}/model.safetensors")
    content["language_model.model.norm.weight"][0] = 1e6
    save_file(content, f"{hub}/model.safetensors")
    with pytest.raises(UserError, match="language_model.model.norm.weight: holds values that float16 cannot"):
        run("export", hub, tmp_path / "out", "--dtype", "float16")
    assert not (tmp_path / "out").exists()
    assert run("export", hub, tmp_path / "out", "--dtype", "bfloat16") == 0
