"""The command: its exit codes, its refusals, and tables that tell the truth."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights_case as case
from flax import nnx
from safetensors.numpy import load_file, save_file

from mmrstraj_jax import convert
from mmrstraj_jax.config import Config, LoRAConfig
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.lora import add_lora, merge_lora, train_in_full
from mmrstraj_jax.training import run as training_run
from mmrstraj_jax.weights import export, native
from mmrstraj_jax.weights.load import load_model, with_feature_layer

LORA = LoRAConfig(rank=2, alpha=4.0)


@pytest.fixture
def hub(tmp_path):
    return str(case.write_layout(tmp_path / "hub", "hub", case.tensors()))


def adapter(hub: str, out, scale: float = 0.3, train_full=(), lora=LORA) -> str:
    loaded = load_model(hub, dtype="float32")
    train_in_full(loaded.model, train_full)
    add_lora(loaded.model, lora, jax.random.key(0))
    random = np.random.default_rng(0)
    for _, module in nnx.iter_modules(loaded.model):
        if getattr(module, "lora_B", None) is not None:
            module.lora_B[...] = jnp.asarray(scale * random.standard_normal(module.lora_B.shape), jnp.float32)
    native.save_adapter(loaded.model, lora, out, train_full=train_full, base_fingerprint=loaded.fingerprint)
    return str(out)


def run(*words: str) -> int:
    return convert.main([str(word) for word in words])


def test_import_export_verify(hub, tmp_path, capsys):
    assert run("import", hub, tmp_path / "ours", "--dtype", "source") == 0
    assert run("export", tmp_path / "ours", tmp_path / "hf", "--dtype", "source") == 0
    assert run("verify", hub, tmp_path / "hf") == 0
    assert capsys.readouterr().out.endswith("equal\n")
    a, b = load_file(f"{hub}/model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def test_sharded_export(hub, tmp_path):
    assert run("export", hub, tmp_path / "hf", "--dtype", "source", "--max-shard-gb", "0.00005") == 0
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert run("verify", hub, tmp_path / "hf") == 0


def test_verify_finds_and_names_a_difference(hub, tmp_path, capsys):
    other = case.write_layout(tmp_path / "other", "lmms-lab", case.tensors())
    content = load_file(other / "model.safetensors")
    content["model.mm_projector.2.bias"][3] += 0.25
    save_file(content, other / "model.safetensors")
    assert run("verify", hub, other) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "0.25" in lines["multi_modal_projector"] and lines["multi_modal_projector"].endswith("differs")
    others = ("vision_tower.layers", "language_model.layers", "image_newline", "language_model.embed_tokens")
    assert all(lines[part].endswith(" equal") for part in others)
    assert run("verify", hub, other, "--tolerance", "0.3") == 0


def test_verify_sees_nan_and_other_settings(hub, tmp_path, capsys):
    neutral = case.tensors()
    neutral["newline"][0] = np.nan
    config = case.hf_json(image_grid_pinpoints=[[28, 28]])
    other = case.write(tmp_path / "other", config, case.named(neutral, "hub"))
    assert run("verify", hub, other) == 1
    out = capsys.readouterr().out
    assert "grid_pinpoints" in out and "nan" in out


def test_verify_confirms_an_export_with_a_policy_of_its_own(hub, tmp_path, capsys):
    assert run("import", hub, tmp_path / "ours", "--dtype", "source") == 0
    path = tmp_path / "ours" / "config.json"
    path.write_text(path.read_text().replace('"policy": "anyres_max_9"', '"policy": "tau"'))
    served = ("--serving-policy", "anyres_max_4")
    assert run("export", tmp_path / "ours", tmp_path / "hf", "--dtype", "source", *served) == 0
    assert run("verify", tmp_path / "ours", tmp_path / "hf") == 1
    assert "policy" in capsys.readouterr().out
    assert run("verify", tmp_path / "ours", tmp_path / "hf", *served) == 0


def test_verify_leaves_out_extra_vocabulary_rows_only(hub, tmp_path, capsys):
    neutral = case.tensors()
    neutral["text|embed_tokens.weight"] = neutral["text|embed_tokens.weight"][:300].copy()
    config = case.hf_json()
    config["text_config"]["vocab_size"] = 300
    other = case.write(tmp_path / "other", config, case.named(neutral, "hub"))
    assert run("verify", hub, other) == 0
    assert "20 extra vocabulary rows not compared" in capsys.readouterr().out
    neutral["text|embed_tokens.weight"][299] += 1
    other = case.write(tmp_path / "third", config, case.named(neutral, "hub"))
    assert run("verify", hub, other) == 1


def test_adapter_is_merged_as_the_model_merges_it(hub, tmp_path):
    """export's merge, a layer at a time, equals models.lora.merge_lora; verify agrees; import merges too."""
    lora = adapter(hub, tmp_path / "lora")
    assert run("export", hub, tmp_path / "hf", "--adapter", lora, "--dtype", "float32") == 0
    loaded = load_model(hub, dtype="float32")
    model, _ = native.load_adapter(loaded.model, lora)
    merge_lora(model)
    for path, value in native.leaves(load_model(tmp_path / "hf", dtype="float32").model).items():
        np.testing.assert_allclose(value, native.leaves(model)[path], atol=1e-6, err_msg=path)
    assert run("verify", hub, tmp_path / "hf") == 1
    assert run("verify", hub, tmp_path / "hf", "--adapter", lora, "--dtype", "float32") == 0
    assert run("import", hub, tmp_path / "ours", "--adapter", lora, "--dtype", "float32") == 0
    assert run("verify", tmp_path / "ours", tmp_path / "hf", "--tolerance", "1e-6") == 0


def test_a_part_trained_in_full_is_exported(hub, tmp_path):
    none = LoRAConfig(rank=2, vision_tower=(), projector=())
    full = adapter(hub, tmp_path / "full", train_full=("projector",), lora=none)
    content = load_file(f"{full}/adapter.safetensors")
    assert set(content) == {
        f"multi_modal_projector.linear_{n}.{p}" for n in (1, 2) for p in ("weight", "bias")
    }
    with pytest.raises(UserError, match="^projector: trained in full, but every parameter equals the base"):
        run("export", hub, tmp_path / "hf", "--adapter", full, "--dtype", "float32")
    content["multi_modal_projector.linear_1.bias"][0] += 1
    save_file(content, f"{full}/adapter.safetensors")
    assert run("export", hub, tmp_path / "hf", "--adapter", full, "--dtype", "float32") == 0
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert (
        found["multi_modal_projector.linear_1.bias"].tobytes()
        == content["multi_modal_projector.linear_1.bias"].tobytes()
    )
    assert run("export", hub, tmp_path / "peft", "--adapter", full, "--peft") == 0
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == ["multi_modal_projector"]


def test_each_part_trained_in_full_must_differ_from_the_base(hub, tmp_path):
    """Beside adapters that do change something, and beside another part that does."""
    lora = LoRAConfig(rank=2, vision_tower=(), projector=(), language_model=("q_proj",))
    mixed = adapter(hub, tmp_path / "mixed", train_full=("projector", "newline"), lora=lora)
    content = load_file(f"{mixed}/adapter.safetensors")
    content["multi_modal_projector.linear_1.bias"][0] += 1
    save_file(content, f"{mixed}/adapter.safetensors")
    with pytest.raises(UserError, match="^newline: trained in full"):
        run("export", hub, tmp_path / "hf", "--adapter", mixed, "--dtype", "float32")
    assert not (tmp_path / "hf").exists()
    content["image_newline"][0] += 1
    save_file(content, f"{mixed}/adapter.safetensors")
    assert run("export", hub, tmp_path / "hf", "--adapter", mixed, "--dtype", "float32") == 0


def test_a_run_directory_is_a_source(hub, tmp_path, monkeypatch):
    """export RUN, then verify RUN against the export; the run brings base, adapters, policy and tokenizer."""
    lora = adapter(hub, tmp_path / "lora")

    def open_run(path, *, dtype):
        loaded = load_model(hub, dtype=dtype)
        model, _ = native.load_adapter(loaded.model, lora)
        base = {"path": hub, "layout": "llava-hf", "rebuild": None}
        return training_run.OpenRun(
            model, loaded.config, loaded.anyres, loaded.tokenizer_dir, base, run_config=Config(lora=LORA)
        )

    monkeypatch.setattr(training_run, "is_run", lambda path: str(path) == "runs/stage1")
    monkeypatch.setattr(training_run, "open_run", open_run)
    assert run("export", "runs/stage1", tmp_path / "hf") == 0
    assert run("verify", "runs/stage1", tmp_path / "hf") == 0
    assert run("verify", hub, tmp_path / "hf") == 1
    assert run("export", "runs/stage1", tmp_path / "peft", "--peft") == 0
    assert (
        json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == hub
    )
    with pytest.raises(UserError, match="has its own; drop one"):
        run("export", "runs/stage1", tmp_path / "no", "--adapter", lora)


def opened(hub, lora, dtype, **base) -> training_run.OpenRun:
    loaded = load_model(hub, dtype=dtype)
    model, _ = native.load_adapter(loaded.model, lora)
    base = {"path": hub, "layout": loaded.layout, "rebuild": None} | base
    beside = loaded.config, loaded.anyres, loaded.tokenizer_dir, base
    return training_run.OpenRun(model, *beside, run_config=Config(lora=LORA))


def test_a_peft_adapter_of_a_merged_run_names_the_merged_base(hub, tmp_path, monkeypatch, capsys):
    """train -> one; train --init-from one --merge-init -> two: hub is not the base of two's adapters."""
    lora = adapter(hub, tmp_path / "lora")

    def open_run(path, *, dtype, step=None):
        if path == "one":
            return opened(hub, lora, dtype)
        found = opened(hub, lora, dtype, rebuild={"run": "one", "step": 4})
        kept = native.leaves(found.model)
        merge_lora(found.model)
        add_lora(found.model, LORA, jax.random.key(1))
        for name, module in ((".".join(map(str, path)), m) for path, m in nnx.iter_modules(found.model)):
            if getattr(module, "lora_B", None) is not None:
                module.lora_B[...] = kept[f"{name}.lora_B"]
        return found

    monkeypatch.setattr(training_run, "is_run", lambda path: path in ("one", "two"))
    monkeypatch.setattr(training_run, "open_run", open_run)
    how = ("export", "two", tmp_path / "peft", "--peft")
    with pytest.raises(UserError, match="the base is the run one, merged; export that run and name it"):
        run(*how)
    with pytest.raises(UserError, match="weight differs from what the adapters were trained on"):
        run(*how, "--base", hub)
    with pytest.raises(UserError, match="some/repository: no such folder"):
        run(*how, "--base", "some/repository")
    for dtype in ("float32", "bfloat16"):
        assert run("export", "one", tmp_path / dtype, "--dtype", dtype) == 0
        assert run("export", "two", tmp_path / f"{dtype}-peft", "--peft", "--base", tmp_path / dtype) == 0
    assert not (tmp_path / "peft").exists()


def test_a_peft_adapter_names_only_what_transformers_loads(hub, tmp_path, monkeypatch):
    assert run("import", hub, tmp_path / "ours", "--dtype", "source") == 0
    ours = adapter(str(tmp_path / "ours"), tmp_path / "lora")
    how = ("export", tmp_path / "ours", tmp_path / "peft", "--adapter", ours, "--peft")
    with pytest.raises(UserError, match="transformers cannot load the base .*ours; export it and name it"):
        run(*how)
    with pytest.raises(UserError, match="in the layout native; expected llava-hf"):
        run(*how, "--base", tmp_path / "ours")
    other = case.write_layout(tmp_path / "other", "hub", case.tensors(seed=1))
    with pytest.raises(UserError, match="differs from what the adapters were trained on"):
        run(*how, "--base", other)
    assert run(*how, "--base", hub) == 0
    # --feature-layer -2: the folder still runs all three layers
    monkeypatch.setattr(training_run, "is_run", lambda path: path == "cut")

    def open_run(path, *, dtype):
        cut = with_feature_layer(load_model(hub, dtype=dtype), -2)
        lora_of = LoRAConfig(rank=2, vision_tower=())
        add_lora(cut.model, lora_of, jax.random.key(0))
        cut.model.multi_modal_projector.linear_1.lora_B[...] += 1
        base = {"path": hub, "layout": "llava-hf", "rebuild": None, "feature_layer": -2}
        beside = cut.config, cut.anyres, cut.tokenizer_dir, base
        return training_run.OpenRun(cut.model, *beside, run_config=Config(lora=lora_of))

    monkeypatch.setattr(training_run, "open_run", open_run)
    with pytest.raises(UserError, match="--feature-layer -2 cut the tower"):
        run("export", "cut", tmp_path / "cut", "--peft")
    with pytest.raises(UserError, match="another vision_feature_layer"):
        run("export", "cut", tmp_path / "cut", "--peft", "--base", hub)
    named = case.named(case.tensors(), "hub")
    same = case.write(tmp_path / "same", case.hf_json(feature_layer=-2), named)
    assert run("export", "cut", tmp_path / "cut", "--peft", "--base", same) == 0


def test_an_export_stops_at_im_end_whatever_the_base_s_files_say(tmp_path, capsys):
    """A base Qwen ends at <|endoftext|> only; what was trained writes <|im_end|>."""
    config = case.hf_json()
    config["text_config"] |= {"eos_token_id": 260, "pad_token_id": 261}
    base = case.write(tmp_path / "base", config, case.named(case.tensors(), "hub"))
    assert run("export", base, tmp_path / "hf", "--dtype", "source") == 0
    read = [json.loads((tmp_path / "hf" / f"{n}.json").read_text()) for n in ("generation_config", "config")]
    assert read[0]["eos_token_id"] == [262, 260] and read[1]["text_config"]["eos_token_id"] == 262
    assert read[0]["pad_token_id"] == 261
    assert run("verify", base, tmp_path / "hf") == 0


def test_the_served_rounding_is_transformers_own(tmp_path, hub):
    loaded = load_model(hub, dtype="float32")
    policy = dataclasses.replace(loaded.anyres, rounding="original")
    native.save(loaded.model, loaded.config, policy, tmp_path / "old", tokenizer_dir=loaded.tokenizer_dir)
    assert run("export", tmp_path / "old", tmp_path / "hf", "--dtype", "source") == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "`anyres_max_9, rounding original`" in card and "| 1125 x 1375 |" in card


def test_export_needs_rows_for_the_slots_import_does_not(tmp_path, capsys):
    """lmms-lab replaces <image> by -200 and reads no row of it; transformers does."""
    neutral, config = case.tensors(), case.lmms_json() | {"vocab_size": 263}
    neutral["text|embed_tokens.weight"] = neutral["text|embed_tokens.weight"][:263].copy()
    folder = case.write_layout(tmp_path / "exact", "lmms-lab", neutral)
    (folder / "config.json").write_text(json.dumps(config))
    assert run("import", folder, tmp_path / "ours") == 0
    with pytest.raises(UserError, match="<image> and <video> have ids up to 264, the embedding has 263 rows"):
        run("export", folder, tmp_path / "hf")


# ---- refusals ----


def test_adapters_that_change_nothing_are_refused(hub, tmp_path):
    zero = adapter(hub, tmp_path / "zero", scale=0.0)
    with pytest.raises(UserError, match="merged weights equal the base in all 20 adapted tensors"):
        run("export", hub, tmp_path / "hf", "--adapter", zero)
    with pytest.raises(UserError, match="no adapters, or they are zero"):
        run("export", hub, tmp_path / "hf", "--adapter", zero, "--peft")
    assert not (tmp_path / "hf").exists() and not (tmp_path / "hf.partial").exists()


def test_changes_below_the_rounding_are_refused_or_counted(hub, tmp_path):
    tiny = adapter(hub, tmp_path / "tiny", scale=1e-7)
    with pytest.raises(UserError, match="--dtype float32"):
        run("export", hub, tmp_path / "hf", "--adapter", tiny)
    assert run("export", hub, tmp_path / "hf", "--adapter", tiny, "--dtype", "float32") == 0


def test_tau_needs_a_serving_policy_and_the_card_states_the_difference(tmp_path, hub):
    loaded = load_model(hub, dtype="float32")
    tau = loaded.anyres.__class__().for_views(28, 14)
    native.save(loaded.model, loaded.config, tau, tmp_path / "tau", tokenizer_dir=loaded.tokenizer_dir)
    for word in ((), ("--serving-policy", "tau")):
        with pytest.raises(UserError, match="serving-policy"):
            run("export", tmp_path / "tau", tmp_path / "hf", *word)
    assert run("export", tmp_path / "tau", tmp_path / "hf", "--serving-policy", "anyres_max_9") == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "trained" in card and "| 512 x 512 |" in card
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vision_aspect_ratio"] == "anyres_max_9"


def test_the_card_of_the_paper_s_policy_has_the_known_counts():
    from mmrstraj_jax.config import AnyResConfig
    from mmrstraj_jax.weights.serving import model_card

    card = model_card("x", AnyResConfig(), AnyResConfig("anyres_max_9"), [])
    assert "| 512 x 512 | 2,040 | 3,699 | 1.81 |" in card
    assert "differ" not in model_card("x", AnyResConfig(), AnyResConfig(), [])


def test_nothing_is_overwritten(hub, tmp_path):
    (tmp_path / "there").mkdir()
    for command in ("import", "export"):
        with pytest.raises(UserError, match="nothing is overwritten"):
            run(command, hub, tmp_path / "there")


def test_export_without_a_tokenizer(tmp_path):
    folder = case.write(
        tmp_path / "x", case.hf_json(), case.named(case.tensors(), "hub"), with_tokenizer=False
    )
    with pytest.raises(UserError, match="needs a tokenizer"):
        run("export", folder, tmp_path / "hf")
    case.tokenizer(tmp_path / "tok", extra=("<|object_ref_start|>",))
    with pytest.raises(UserError, match="<image> is token 264"):
        run("export", folder, tmp_path / "hf", "--tokenizer", tmp_path / "tok")
    case.tokenizer(tmp_path / "good")
    assert run("export", folder, tmp_path / "hf", "--tokenizer", tmp_path / "good") == 0


def test_adapters_that_do_not_belong(hub, tmp_path):
    lora = adapter(hub, tmp_path / "lora")
    other = case.write_layout(tmp_path / "other", "hub", case.tensors(seed=1))
    with pytest.raises(UserError, match="trained on other base weights"):
        run("export", other, tmp_path / "hf", "--adapter", lora)
    content = load_file(f"{lora}/adapter.safetensors")
    content["vision_tower.layers.mlp.fc1.lora_A"] = np.zeros((3, 2, 99), np.float32)
    content.pop("multi_modal_projector.linear_1.lora_B")
    save_file(content, f"{lora}/adapter.safetensors")
    with pytest.raises(
        UserError, match="missing multi_modal_projector.linear_1.lora_B.*fc1.lora_A is float32"
    ):
        run("export", hub, tmp_path / "hf", "--adapter", lora)


def test_peft_cannot_hold_everything(hub, tmp_path):
    full = adapter(hub, tmp_path / "full", train_full=("newline",))
    with pytest.raises(UserError, match="PEFT cannot hold newline"):
        run("export", hub, tmp_path / "peft", "--adapter", full, "--peft")
    with pytest.raises(UserError, match="has no adapter"):
        run("export", hub, tmp_path / "peft", "--peft")


def test_written_bytes_are_read_back(hub, tmp_path, monkeypatch):
    """A disk that lies is noticed before the export takes its name."""
    write = export.write_sharded

    def lying(folder, *rest):
        write(folder, *rest)
        path = folder / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(export, "write_sharded", lying)
    with pytest.raises(UserError, match="was not written as intended"):
        run("export", hub, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


# ---- inspect and the process ----


def test_inspect_says_what_is_there(hub, tmp_path, capsys):
    assert run("inspect", hub) == 0
    out = capsys.readouterr().out
    assert (
        "llava-hf layout" in out
        and "<image> 263" in out
        and "post_layernorm" in out
        and "every key used" in out
    )
    assert run("inspect", f"{hub}/model.safetensors") == 0
    assert "encoder.layers.{0-2}.mlp.fc1.weight  float32 [24, 16]" in capsys.readouterr().out
    content = load_file(f"{hub}/model.safetensors")
    content.pop("image_newline")
    save_file(content, f"{hub}/model.safetensors")
    assert run("inspect", hub) == 0
    assert "PROBLEM" in capsys.readouterr().out


def test_errors_are_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mmrstraj_jax.convert", "inspect", str(tmp_path / "nothing")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such file or folder" in done.stderr
    with pytest.raises(UserError, match="invalid choice"):
        run("exprot", "a", "b")
