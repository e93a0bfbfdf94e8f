"""Every public layout -> our model: nothing dropped, nothing invented."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import weights_case as case
from safetensors.numpy import load_file

from mmrstraj_jax.config import AnyResConfig
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.weights import layouts, native
from mmrstraj_jax.weights.load import check, load_model, with_feature_layer

BF16 = np.dtype(ml_dtypes.bfloat16)


def as_numpy(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in native.leaves(model).items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a
    )


# Where the neutral names of weights_case go in our tree, spelled out by hand.
EXPECTED = {
    "tower|embeddings.patch_embedding.weight": ("vision_tower.patch_embedding.weight", None),
    "tower|embeddings.position_embedding.weight": ("vision_tower.position_embedding.weight", None),
    "tower|encoder.layers.2.self_attn.out_proj.bias": ("vision_tower.layers.self_attn.out_proj.bias", 2),
    "tower|encoder.layers.0.layer_norm2.weight": ("vision_tower.layers.layer_norm2.weight", 0),
    "tower|encoder.layers.1.mlp.fc2.weight": ("vision_tower.layers.mlp.fc2.weight", 1),
    "text|embed_tokens.weight": ("language_model.embed_tokens.weight", None),
    "text|layers.1.self_attn.k_proj.bias": ("language_model.layers.self_attn.k_proj.bias", 1),
    "text|layers.0.self_attn.o_proj.weight": ("language_model.layers.self_attn.o_proj.weight", 0),
    "text|layers.1.mlp.gate_proj.weight": ("language_model.layers.mlp.gate_proj.weight", 1),
    "text|layers.0.post_attention_layernorm.weight": (
        "language_model.layers.post_attention_layernorm.weight",
        0,
    ),
    "text|norm.weight": ("language_model.norm.weight", None),
    "projector|1.weight": ("multi_modal_projector.linear_1.weight", None),
    "projector|2.bias": ("multi_modal_projector.linear_2.bias", None),
    "newline": ("image_newline", None),
    "head": ("language_model.lm_head.weight", None),
}


@pytest.mark.parametrize("layout", case.PREFIXES)
def test_every_layout_fills_the_same_tree(layout, tmp_path):
    neutral = case.tensors(tied=False)
    loaded = load_model(case.write_layout(tmp_path / "x", layout, neutral, tied=False), dtype=jnp.float32)
    found = as_numpy(loaded.model)
    for name, (path, layer) in EXPECTED.items():
        value = found[path] if layer is None else found[path][layer]
        assert value.tobytes() == neutral[name].tobytes(), name
    # Together with the strict count of keys, equal sums of squares say that every other tensor is
    # somewhere, once.
    kept = [v for k, v in neutral.items() if "post_layernorm" not in k]
    assert sum(v.size for v in found.values()) == sum(v.size for v in kept)
    np.testing.assert_allclose(
        sum(float((v.astype(np.float64) ** 2).sum()) for v in found.values()),
        sum(float((v.astype(np.float64) ** 2).sum()) for v in kept),
        rtol=1e-12,
    )
    reference = load_model(case.write_layout(tmp_path / "hub", "hub", neutral, tied=False), dtype=jnp.float32)
    assert same(found, as_numpy(reference.model))
    assert (loaded.fingerprint, loaded.config) == (reference.fingerprint, reference.config)
    assert loaded.anyres == reference.anyres == AnyResConfig("anyres_max_9").for_views(28, 14)
    ids = (loaded.config.image_token_id, loaded.config.video_token_id, loaded.config.eos_token_ids)
    assert ids == (case.IMAGE_ID, case.VIDEO_ID, (262, 260))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, BF16])
@pytest.mark.parametrize("target", ["source", "bfloat16", "float32"])
def test_dtypes(dtype, target, tmp_path):
    neutral = case.tensors(dtype=dtype)
    loaded = load_model(case.write_layout(tmp_path / "x", "hub", neutral), dtype=target)
    wanted = np.dtype(dtype) if target == "source" else jnp.dtype(target)
    for name, (path, layer) in EXPECTED.items():
        if name != "head":
            leaf = as_numpy(loaded.model)[path]
            value = leaf if layer is None else leaf[layer]
            assert value.dtype == wanted
            assert value.tobytes() == neutral[name].astype(np.float32).astype(wanted).tobytes()


def test_the_loaded_model_runs(tmp_path):
    """The same logits after a round trip through our format."""
    model = case.model(tmp_path / "hub")
    native.save(model.model, model.config, model.anyres, tmp_path / "x", dtype=jnp.float32)
    loaded = load_model(tmp_path / "x", dtype=jnp.float32)
    assert (loaded.config, loaded.anyres) == (model.config, model.anyres)
    run = jax.jit(
        lambda model: model.logits(model.language_model(model.language_model.embed(jnp.ones((1, 4), int))))
    )
    assert np.array_equal(run(model.model), run(loaded.model))


def test_our_format_is_independent_of_the_source(tmp_path):
    """lmms-lab -> ours -> load equals lmms-lab -> load, fingerprint included; tokenizer with slots."""
    source = case.write_layout(tmp_path / "hub", "lmms-lab", case.tensors(dtype=BF16))
    loaded = load_model(source)
    out = native.save(
        loaded.model,
        loaded.config,
        loaded.anyres,
        tmp_path / "ours",
        tokenizer_dir=loaded.tokenizer_dir,
        unused=loaded.unused,
    )
    again = load_model(out)
    assert same(as_numpy(loaded.model), as_numpy(again.model))
    assert (again.fingerprint, again.config, again.anyres) == (
        loaded.fingerprint,
        loaded.config,
        loaded.anyres,
    )
    assert {k: v.tobytes() for k, v in again.unused.items()} == {
        k: v.tobytes() for k, v in loaded.unused.items()
    }
    assert '"<image>"' in (out / "tokenizer.json").read_text()
    with pytest.raises(UserError, match="nothing is overwritten"):
        native.save(loaded.model, loaded.config, loaded.anyres, out)


@pytest.mark.parametrize(
    "layers, feature, expected", [(4, -2, (3,)), (3, -1, (3,)), (4, 3, (3,)), (4, [-2, 2], (3, 2))]
)
def test_feature_layers(layers, feature, expected, tmp_path):
    """27 layers with -2 and 26 with -1 are the same model; what lies above is left out."""
    neutral = case.tensors(tower_layers=4)
    if layers == 3:
        neutral = {k: v for k, v in neutral.items() if "encoder.layers.3." not in k}
    else:
        neutral |= {"tower|head.probe": np.zeros((1, 1, 16), np.float32)}
    if isinstance(feature, list):
        neutral["projector|1.weight"] = np.ones((24, 32), np.float32)
    config = case.hf_json(layers=layers, feature_layer=feature)
    folder = case.write(tmp_path / "x", config, case.named(neutral, "hub"))
    loaded = load_model(folder, dtype=jnp.float32)
    assert loaded.config.vision.feature_layers == expected
    leaf = as_numpy(loaded.model)["vision_tower.layers.mlp.fc1.weight"]
    assert leaf.shape[0] == 3
    assert leaf[2].tobytes() == neutral["tower|encoder.layers.2.mlp.fc1.weight"].tobytes()


def parts(tmp_path, tied=True):
    """siglip, qwen and a OneVision checkpoint whose projector is used, and the whole they make."""
    neutral = case.tensors(tower_layers=4, tied=tied)
    tower = {f"vision_model.{k[6:]}": v for k, v in neutral.items() if k.startswith("tower|")}
    text = {f"model.{k[5:]}": v for k, v in neutral.items() if k.startswith("text|")}
    if not tied:
        text["lm_head.weight"] = neutral["head"]
    for name, shape in {
        "probe": (1, 1, 16),
        "mlp.fc1.bias": (24,),
        "attention.in_proj_weight": (48, 16),
    }.items():
        tower[f"vision_model.head.{name}"] = np.zeros(shape, np.float32)
    tower |= {
        "logit_scale": np.zeros(1, np.float32),
        "text_model.final_layer_norm.bias": np.zeros(9, np.float32),
    }
    siglip = case.write(
        tmp_path / "siglip", {"model_type": "siglip", "vision_config": case.vision_json(4)}, tower, False
    )
    qwen = case.write(tmp_path / "qwen", case.text_json(tied), text)
    other = case.tensors(seed=1) | {
        k: v for k, v in neutral.items() if k.startswith(("projector", "newline"))
    }
    projector = case.write_layout(tmp_path / "ov", "lmms-lab", other)
    whole = case.write(tmp_path / "whole", case.hf_json(tied, 4, -2), case.named(neutral, "hub"))
    return siglip, qwen, projector, whole


@pytest.mark.parametrize("tied", [True, False])
def test_composed_parts_equal_the_whole(tied, tmp_path):
    siglip, qwen, projector, whole = parts(tmp_path, tied)
    composed = load_model(f"siglip={siglip},qwen={qwen},projector={projector}", dtype=jnp.float32)
    reference = load_model(whole, dtype=jnp.float32)
    assert same(as_numpy(composed.model), as_numpy(reference.model))
    assert composed.config == reference.config and composed.anyres == reference.anyres
    assert composed.fingerprint == reference.fingerprint and composed.fresh == ()


def test_fresh_projector_is_named_and_random(tmp_path):
    siglip, qwen, _, _ = parts(tmp_path)
    loaded = load_model(f"siglip={siglip},qwen={qwen},projector=fresh", dtype=jnp.float32)
    found = as_numpy(loaded.model)
    assert set(loaded.fresh) == {path for path in found if path.startswith(("multi_modal", "image_newline"))}
    assert all(0.05 < found[path].std() < 0.5 for path in loaded.fresh)
    assert loaded.anyres == AnyResConfig().for_views(28, 14)  # the paper's tau


def test_siglip_written_by_transformers_5_has_no_prefix(tmp_path):
    siglip, qwen, projector, _ = parts(tmp_path)
    content = load_file(siglip / "model.safetensors")
    content = {
        k.removeprefix("vision_model."): v for k, v in content.items() if k.startswith("vision_model.")
    }
    bare = case.write(tmp_path / "bare", case.vision_json(4), content, False)
    a, b = (load_model(f"siglip={s},qwen={qwen},projector={projector}") for s in (siglip, bare))
    assert a.fingerprint == b.fingerprint


def test_qwen25_puts_image_after_its_own_tokens(tmp_path):
    """The id after Qwen2's three control tokens is `<|object_ref_start|>` in Qwen2.5: resolved by name."""
    siglip, qwen, projector, _ = parts(tmp_path)
    case.tokenizer(qwen, extra=("<|object_ref_start|>", "<|object_ref_end|>"))
    loaded = load_model(f"siglip={siglip},qwen={qwen},projector={projector}")
    assert loaded.config.image_token_id == case.IMAGE_ID + 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("siglip=a,qwen=b", "expected siglip=DIR"),
        ("siglip=a,siglip={s},qwen=b,projector=fresh", "expected siglip=DIR"),
        ("siglip={s}, qwen={s}, projector=fresh", "expected a qwen folder"),
        ("siglip={s},qwen={s},projector=fresh", "expected a qwen folder"),
    ],
)
def test_parts_that_are_not_parts(text, message, tmp_path):
    siglip, *_ = parts(tmp_path)
    with pytest.raises(UserError, match=message):
        load_model(text.format(s=siglip))


def test_a_part_alone_says_what_is_missing(tmp_path):
    siglip, *_ = parts(tmp_path)
    with pytest.raises(UserError, match="only a part of this one"):
        load_model(siglip)


def test_sharding_by_function_of_path_and_shape(tmp_path):
    """Every leaf goes where the table says, and the values are those of the default placement."""
    folder = case.write_layout(tmp_path / "x", "hub", case.tensors())
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    asked = {}

    def sharding(path, shape):
        asked[path] = shape
        axes = [None] * len(shape)
        axes[-1] = "fsdp"
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    placed, plain = load_model(folder, sharding=sharding), load_model(folder)
    leaves = native.leaves(placed.model)
    assert asked == {path: leaf.shape for path, leaf in leaves.items()}
    assert all(leaf.sharding.spec[-1] == "fsdp" for leaf in leaves.values())
    assert same(as_numpy(placed.model), as_numpy(plain.model))


# ---- real sizes, from the contract's list of tensors ----


@pytest.mark.parametrize("tied", [True, False])
def test_real_key_lists_fill_the_real_models(tied):
    """Every tensor of the public 0.5B and 7B files, by name and shape, without a byte of weights."""
    import dataclasses
    from pathlib import Path

    from flax import nnx

    from mmrstraj_jax.config import MODEL_PRESETS
    from mmrstraj_jax.models.mmrstraj import init_model
    from mmrstraj_jax.weights.load import Source, leaf_shapes
    from mmrstraj_jax.weights.safetensors_io import Entry

    config = MODEL_PRESETS["0.5b" if tied else "7b"]
    listed = json.loads((Path(__file__).parent / "golden" / "weight_names.json").read_text())
    for layout, name in (("llava-hf", "hf_hub"), ("lmms-lab", "lmms_lab")):
        key = next(k for k in listed if k.startswith(f"{name}_{'0.5b' if tied else '7b'}"))
        text = dataclasses.replace(config.text, vocab_size=152000 if tied else 152128)
        model = dataclasses.replace(config, text=text)
        entries = {}
        for pattern, info in listed[key].items():
            for i in range(info["count"]):
                file_key = pattern.replace("{i}", str(i))
                if not layouts.is_unused(file_key, layout, 26, 26) and not (tied and "lm_head" in file_key):
                    hub = layouts.to_hub(file_key, layout)
                    entries[hub] = Entry(file_key, Path("x"), BF16, tuple(info["shape"]), 0)
        source = Source(key, layout, model, AnyResConfig("anyres_max_9"), None, entries)
        abstract = nnx.eval_shape(lambda model=model: init_model(model, jax.random.key(0), jnp.bfloat16))
        check(source, leaf_shapes(nnx.split(abstract)[1]))


def test_features_can_be_taken_earlier(tmp_path):
    """The last layer but one: as where the file names it (vision_feature_layer -2)."""
    loaded = case.model(tmp_path / "hub")
    last = loaded.config.vision.num_layers_run
    folder = tmp_path / "hub"
    config = json.loads((folder / "config.json").read_text())
    earlier = with_feature_layer(loaded, -2)
    assert earlier.config.vision.feature_layers == (last - 1,)
    (folder / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -2}))
    named = load_model(folder, dtype="source")
    found, expected = native.leaves(earlier.model), native.leaves(named.model)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[path], expected[path]) for path in expected)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 3), np.uint8)
    features = [item.model.encode_views(jax.numpy.asarray(pixels)) for item in (earlier, named)]
    np.testing.assert_array_equal(*features)
    with pytest.raises(UserError, match=f"feature_layer -9: expected -1 to -{last - 1}"):
        with_feature_layer(earlier, -9)
