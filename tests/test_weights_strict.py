"""What does not fit is refused by name: keys, shapes, tied heads, settings that contradict the files."""

import json
import shutil

import numpy as np
import pytest
import weights_case as case
from safetensors.numpy import load_file, save_file

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.weights import layouts, native
from mmrstraj_jax.weights.load import load_model, open_source


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def changed(tmp_path, layout="hub", tied=True, **changes):
    """A checkpoint with tensors replaced; None removes one. Names as in the layout."""
    folder = case.write_layout(tmp_path / "bad", layout, case.tensors(tied=tied), tied)
    content = load_file(folder / "model.safetensors")
    for name, value in changes["tensors"].items():
        content.pop(name, None)
        if value is not None:
            content[name] = value
    save_file(content, folder / "model.safetensors")
    return folder


V, L = "vision_tower.vision_model.", "language_model.model."
WIDE = np.zeros((24, 17), np.float32)
BAD = {
    "missing": (
        {L + "layers.1.mlp.up_proj.weight": None},
        r"missing language_model.model.layers.\{1\}.mlp.up_proj.weight",
    ),
    "missing bias": (
        {V + "encoder.layers.0.layer_norm1.bias": None},
        "missing vision_tower.*layer_norm1.bias",
    ),
    "missing newline": ({"image_newline": None}, "missing image_newline"),
    "integers": (
        {"image_newline": np.zeros(24, np.int64)},
        "image_newline holds integers, expected BF16, F16, F32",
    ),
    "extra": ({"adapter.weight": WIDE}, "extra adapter.weight"),
    "extra layer": (
        {L + "layers.2.mlp.up_proj.weight": np.zeros((40, 24), np.float32)},
        r"extra .*layers.\{2\}.mlp.up",
    ),
    "extra tower layer": (
        {V + "encoder.layers.3.layer_norm1.bias": np.zeros(16, np.float32)},
        r"extra .*layers.\{3\}",
    ),
    "odd head": ({V + "head.unknown": WIDE}, "extra vision_tower.vision_model.head.unknown"),
    "wrong shape": ({"image_newline": WIDE}, r"image_newline has shape \[24, 17\], config.json gives \[24\]"),
    "projector of another size": (
        {"multi_modal_projector.linear_1.weight": np.zeros((24, 20), np.float32)},
        r"linear_1.weight has shape \[24, 20\], config.json gives \[24, 16\]",
    ),
    "the same parameter twice": ({"model.image_newline": np.zeros(24, np.float32)}, "same parameter"),
}


@pytest.mark.parametrize("name", BAD)
def test_keys_that_do_not_fit(name, tmp_path):
    tensors, message = BAD[name]
    with pytest.raises(UserError, match=message) as caught:
        load_model(changed(tmp_path, tensors=tensors))
    assert "\n" not in str(caught.value)


def test_swapped_projector_layers(tmp_path):
    content = case.tensors()
    swapped = {
        "model.mm_projector.0.weight": content["projector|2.weight"],
        "model.mm_projector.2.weight": content["projector|1.weight"],
    }
    with pytest.raises(UserError, match="mm_projector.2.weight has shape .*mm_projector.0.weight has shape"):
        load_model(changed(tmp_path, "lmms-lab", tensors=swapped))


def test_all_problems_in_one_message(tmp_path):
    tensors = {"image_newline": None, "x": WIDE, L + "norm.weight": WIDE}
    with pytest.raises(UserError) as caught:
        load_model(changed(tmp_path, tensors=tensors))
    assert all(
        word in str(caught.value) for word in ("missing image_newline", "extra x", "norm.weight has shape")
    )


def test_names_from_files_stay_on_one_line(tmp_path):
    folder = changed(tmp_path, tensors={"x\n\x1b[31m" + "y" * 10_000: WIDE})
    with pytest.raises(UserError, match="extra") as caught:
        load_model(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_layers_are_folded():
    keys = [f"a.layers.{i}.b" for i in (0, 1, 2, 5)] + ["c"]
    assert layouts.fold(keys) == "a.layers.{0-2,5}.b, c"
    assert layouts.fold(f"k{i:02}" for i in range(20)).endswith("k11 and 8 more names")


# ---- tied heads ----


def test_tied_head_that_repeats_the_embedding_is_dropped(tmp_path):
    embedding = case.tensors()["text|embed_tokens.weight"]
    folder = changed(tmp_path, tensors={"language_model.lm_head.weight": embedding.copy()})
    loaded = load_model(folder)
    assert loaded.config.text.tie_word_embeddings and "language_model.lm_head.weight" not in native.leaves(
        loaded.model
    )


def test_tied_head_may_differ_in_padded_vocabulary_rows_only(tmp_path):
    """llava-hf drew the padded rows of both matrices separately; a row of a token must agree."""
    head = case.tensors()["text|embed_tokens.weight"].copy()
    head[265:] += 1  # 265 tokens, rows 256..319 are the padding to a multiple of 64
    folder = changed(tmp_path, tensors={"language_model.lm_head.weight": head})
    assert load_model(folder).config.text.tie_word_embeddings
    tokens = (folder / "tokenizer.json").rename(folder / "elsewhere.json")
    assert load_model(folder).config.text.tie_word_embeddings
    tokens.rename(folder / "tokenizer.json")
    head[264] += 1
    save_file(
        load_file(folder / "model.safetensors") | {"language_model.lm_head.weight": head},
        folder / "model.safetensors",
    )
    with pytest.raises(
        UserError, match="tie_word_embeddings is true but language_model.lm_head.weight differs"
    ):
        load_model(folder)


def test_untied_without_a_head(tmp_path):
    folder = changed(tmp_path, tied=False, tensors={"language_model.lm_head.weight": None})
    with pytest.raises(UserError, match="tie_word_embeddings is false but the weights hold no lm_head"):
        load_model(folder)


@pytest.mark.parametrize("has_head", [True, False])
def test_without_a_flag_the_file_decides(has_head, tmp_path):
    neutral = case.tensors(tied=not has_head)
    folder = case.write(tmp_path / "x", case.hf_json(tied=None), case.named(neutral, "hub"))
    assert load_model(folder).config.text.tie_word_embeddings is not has_head


def test_flag_on_top_as_transformers_5_writes_it(tmp_path):
    folder = case.write(
        tmp_path / "x", case.hf_json(False, tie_word_embeddings=True), case.named(case.tensors(), "hub")
    )
    assert load_model(folder).config.text.tie_word_embeddings


# ---- config.json ----

WRONG = {
    "unknown model": ({"model_type": "llava_next"}, "llava_next"),
    "CLS strategy": (
        {"vision_feature_select_strategy": "default"},
        "vision_feature_select_strategy 'default'",
    ),
    "projector act": ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
    "feature layer": ({"vision_feature_layer": 7}, "vision_feature_layer 7"),
    "policy": ({"vision_aspect_ratio": "pad"}, "'pad' is not implemented"),
    "pinpoints": ({"image_grid_pinpoints": [[28, 30]]}, "multiples of the view size 28"),
    "image id of another token": (
        {"image_token_index": 262},
        r"image_token_index 262 is '<\|im_end\|>'.* has id 263",
    ),
    "image id outside": ({"image_token_index": 99999}, "image_token_index 99999"),
    "text size": (
        {"text_config": case.text_json() | {"hidden_size": 32}},
        "weights and config.json do not fit",
    ),
    "text type": ({"text_config": case.text_json() | {"model_type": "llama"}}, "'llama'; expected qwen2"),
    "rope scaling": ({"text_config": case.text_json() | {"rope_scaling": {"type": "yarn"}}}, "rope_scaling"),
    "rope type": (
        {"text_config": case.text_json() | {"rope_parameters": {"rope_type": "yarn"}}},
        "rope_type",
    ),
    "a size of text": (
        {"text_config": case.text_json() | {"num_hidden_layers": "2"}},
        "num_hidden_layers '2'",
    ),
    "endless layers": (
        {"vision_config": case.vision_json() | {"num_hidden_layers": 10**9}},
        "vision num_hidden_layers is 1000000000",
    ),
    "endless positions": (
        {"vision_config": case.vision_json() | {"image_size": 10**9}, "image_grid_pinpoints": None},
        "image_size / patch_size is 71428571",
    ),
    "policy without a view": ({"vision_aspect_ratio": "anyres_max_0"}, "'anyres_max_0' is not implemented"),
    "layer types": (
        {"text_config": case.text_json() | {"layer_types": ["full_attention", "sliding_attention"]}},
        "layer_types .*sliding_attention",
    ),
    "vision act": ({"vision_config": case.vision_json() | {"hidden_act": "gelu"}}, "hidden_act 'gelu'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_contradict_or_are_not_implemented(name, tmp_path):
    folder = case.write_layout(tmp_path / "x", "hub", case.tensors())
    edit(folder, **WRONG[name][0])
    with pytest.raises(UserError, match=WRONG[name][1]):
        load_model(folder)


def test_image_id_without_a_tokenizer_must_be_in_the_vocabulary(tmp_path):
    folder = case.write(
        tmp_path / "x", case.hf_json(), case.named(case.tensors(), "hub"), with_tokenizer=False
    )
    assert load_model(folder).config.image_token_id == case.IMAGE_ID
    edit(folder, image_token_index=320)
    with pytest.raises(UserError, match="image_token_index 320 is outside the vocabulary of 320 rows"):
        load_model(folder)


TEXT, ODD = case.text_json(), (None, "x", [], -1, 10**12, 1.5, True)
MISTYPED = [("image_token_index", {"image_token_index": value}) for value in ODD]
MISTYPED += [("video_token_index", {"video_token_index": value}) for value in ODD]
MISTYPED += [(key, {key: value}) for key in ("text_config", "vision_config") for value in (None, "x", [], 3)]
MISTYPED += [
    ("rope_theta", {"text_config": TEXT | {"rope_theta": value}})
    for value in (None, "x", 0, -1, float("nan"), float("inf"), True)
]
MISTYPED += [
    ("rope_parameters", {"text_config": TEXT | {"rope_parameters": value}}) for value in ([], "x", 1)
]
MISTYPED += [
    ("eos_token_id", {"text_config": TEXT | {"eos_token_id": value}}) for value in ("x", -1, 1.5, [1.5])
]
MISTYPED += [("tie_word_embeddings", {"tie_word_embeddings": value}) for value in (None, "x", 1)]
MISTYPED += [("rms_norm_eps", {"text_config": TEXT | {"rms_norm_eps": True}})]


@pytest.mark.parametrize(("key", "change"), MISTYPED, ids=str)
def test_values_of_another_type(key, change, tmp_path):
    folder = case.write_layout(tmp_path / "x", "hub", case.tensors())
    edit(folder, **change)
    with pytest.raises(UserError, match=f"config.json: {key} ") as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)


def test_values_of_another_type_in_the_files_beside(tmp_path):
    folder = case.write_layout(tmp_path / "x", "hub", case.tensors())
    for size in (None, [], "28", 29, {"height": "28"}):
        settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match="preprocessor_config.json: size .* contradicts"):
            open_source(folder)
    (folder / "preprocessor_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [262, 1.5]}))
    with pytest.raises(UserError, match="generation_config.json: eos_token_id 1.5"):
        open_source(folder)
    lmms = case.write_layout(tmp_path / "y", "lmms-lab", case.tensors())
    for name in (None, 7, "", []):
        edit(lmms, mm_vision_tower=name)
        with pytest.raises(UserError, match="mm_vision_tower .*expected a name or a folder"):
            open_source(lmms)


def test_a_vocabulary_may_end_before_the_slots(tmp_path):
    """Their rows are read by nothing outside transformers: lmms-lab and Qwen folders need none."""
    neutral = case.tensors()
    neutral["text|embed_tokens.weight"] = neutral["text|embed_tokens.weight"][:263].copy()
    folder = case.write_layout(tmp_path / "x", "lmms-lab", neutral)
    edit(folder, vocab_size=263)
    loaded = load_model(folder)
    assert (loaded.config.image_token_id, loaded.config.text.vocab_size) == (263, 263)


def test_clip_normalisation_is_refused(tmp_path):
    """transformers' class default is CLIP's mean; a model served with it is wrong, silently."""
    folder = case.write_layout(tmp_path / "x", "hub", case.tensors())
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.48, 0.46, 0.41], "image_std": [0.5] * 3})
    )
    with pytest.raises(UserError, match="image_mean"):
        load_model(folder)


def test_the_image_processor_in_the_file_of_transformers_5(tmp_path):
    """5 nests it in processor_config.json and writes no preprocessor_config.json."""
    folder = case.write_layout(tmp_path / "x", "hub", case.tensors())
    good = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 28, "width": 28}}
    for change, message in (
        ({}, None),
        ({"image_mean": [0.48, 0.46, 0.41]}, "processor_config.json: image_mean .0.48"),
        ({"size": {"height": 384, "width": 384}}, "processor_config.json: size .* contradicts"),
    ):
        text = json.dumps({"num_image_tokens": 4, "image_processor": good | change})
        (folder / "processor_config.json").write_text(text)
        if message is None:
            open_source(folder)
            continue
        with pytest.raises(UserError, match=message):
            open_source(folder)


def test_position_ids_of_older_files_are_not_parameters(tmp_path):
    content = case.named(case.tensors(), "hub")
    content["vision_tower.vision_model.embeddings.position_ids"] = np.arange(4)[None]
    config = case.hf_json()
    config["text_config"] |= {"layer_types": ["full_attention"] * 2}
    folder = case.write(tmp_path / "x", config, content)
    plain = case.write_layout(tmp_path / "y", "hub", case.tensors())
    assert load_model(folder).fingerprint == load_model(plain).fingerprint


def test_rope_theta_of_both_generations(tmp_path):
    old = case.write_layout(tmp_path / "old", "hub", case.tensors())
    new = case.write_layout(tmp_path / "new", "hub", case.tensors())
    text = case.text_json()
    text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), "rope_type": "default"}
    edit(new, text_config=text)
    assert open_source(old).config == open_source(new).config
    assert open_source(new).config.text.rope_theta == 1e6


def test_pinpoints_as_a_range(tmp_path):
    a, b = (case.write_layout(tmp_path / name, "lmms-lab", case.tensors()) for name in "ab")
    edit(b, image_grid_pinpoints="(1x1),...,(6x6)")
    assert open_source(a).anyres == open_source(b).anyres


def test_lmms_lab_pinpoints_are_width_height(tmp_path):
    a = case.write_layout(tmp_path / "a", "lmms-lab", case.tensors())
    edit(a, image_grid_pinpoints=[[28, 56]])
    assert open_source(a).anyres.grid_pinpoints == ((56, 28),)


def test_unknown_tower_name(tmp_path):
    a = case.write_layout(tmp_path / "a", "lmms-lab", case.tensors())
    edit(a, mm_vision_tower="somebody/clip-large")
    with pytest.raises(UserError, match="neither a folder with a config.json nor"):
        load_model(a)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(name, tmp_path):
    folder = case.write_layout(tmp_path / "x", "hub", case.tensors())
    (folder / name).unlink()
    with pytest.raises(UserError, match=name.split(".")[0]):
        load_model(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such file or folder"):
        load_model(folder)
