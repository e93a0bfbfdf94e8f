"""Against transformers, live: features, logits, losses and greedy ids of one mixed batch of ours."""

import numpy as np
import pytest

from . import cases

pytest.importorskip("torch", reason="live parity needs CPU torch; the golden file covers machines without it")
pytest.importorskip("transformers", reason="live parity needs transformers")

import torch  # noqa: E402

import mmrstraj_jax  # noqa: E402
from mmrstraj_jax.weights.load import load_model  # noqa: E402

from . import reference  # noqa: E402


@pytest.fixture(scope="module")
def hf(folders):
    return {name: reference.load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def expected(hf):
    return {name: [reference.run(hf[name], name, s) for s in cases.samples(name)] for name in hf}


def test_values_are_around_ten(expected, name):
    """So that 1e-4 means five digits."""
    assert 3 < np.concatenate([out.logits for out in expected[name]]).std() < 30


def test_views_are_bit_equal(outputs, expected, name):
    for ours, theirs, sample in zip(outputs[name], expected[name], cases.samples(name), strict=True):
        np.testing.assert_array_equal(ours.views, theirs.views, err_msg=sample.name)


@pytest.mark.parametrize("what", ["features", "logits", "loss"])
def test_one_mixed_batch_equals_single_rows_of_the_reference(outputs, expected, name, what):
    for ours, theirs, sample in zip(outputs[name], expected[name], cases.samples(name), strict=True):
        actual, wanted = np.asarray(getattr(ours, what)), np.asarray(getattr(theirs, what))
        assert actual.shape == wanted.shape, sample.name
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=cases.ATOL, err_msg=sample.name)


def test_batched_reference(hf, outputs, name):
    """HF's own batch of image rows and image lists, padded right: logits, mean loss over all targets."""
    rows = [(s, out) for s, out in zip(cases.samples(name), outputs[name], strict=True) if s.images]
    batch = reference.batch(name, [sample for sample, _ in rows])
    with torch.no_grad():
        out = hf[name](**batch.inputs, labels=batch.labels)
    for row, (length, (sample, ours)) in enumerate(zip(batch.lengths, rows, strict=True)):
        np.testing.assert_allclose(
            ours.logits, out.logits[row, :length].numpy(), rtol=0, atol=cases.ATOL, err_msg=sample.name
        )
    targets = np.asarray([sample.supervised.sum() for sample, _ in rows])
    mean = sum(n * ours.loss for n, (_, ours) in zip(targets, rows, strict=True)) / targets.sum()
    np.testing.assert_allclose(mean, float(out.loss), atol=cases.ATOL)


def test_greedy_ids(hf, answers, name):
    for sample, ours in zip(cases.samples(name), answers[name], strict=True):
        assert ours == reference.greedy(hf[name], name, sample, cases.NEW_TOKENS), sample.name


def test_api_names(models, expected):
    """`.features` and `.logits` one sample at a time, as a user calls them, on the odd-sided checkpoint."""
    model, rows = models["untied"], cases.samples("untied")
    by_name = {sample.name: (sample, out) for sample, out in zip(rows, expected["untied"], strict=True)}
    sample, theirs = by_name["tall"]
    features = model.features(sample.images[0])
    np.testing.assert_allclose(features["packed"], theirs.features, rtol=0, atol=cases.ATOL)
    logits = model.logits([sample.ids], images=[sample.images])[0]
    np.testing.assert_allclose(logits, theirs.logits, rtol=0, atol=cases.ATOL)
    sample, theirs = by_name["video"]
    logits = model.logits(sample.ids, videos=[sample.frames])
    np.testing.assert_allclose(logits, theirs.logits, rtol=0, atol=cases.ATOL)


def test_tower_features(hf, models, expected):
    """The hidden states that vision_feature_layer names, before the projector."""
    for name, case in cases.CHECKPOINTS.items():
        views = expected[name][3].views
        pixels = torch.from_numpy(views).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            states = hf[name].model.vision_tower(pixels, output_hidden_states=True).hidden_states
        layers = case.feature_layer if isinstance(case.feature_layer, list) else [case.feature_layer]
        wanted = torch.cat([states[layer] for layer in layers], dim=-1)
        np.testing.assert_allclose(models[name].model.encode_views(views), wanted, rtol=0, atol=cases.ATOL)


def test_folder_that_transformers_saved(hf, folders, tmp_path, name):
    """save_pretrained writes other keys and another config.json; the tensors are the same bits."""
    hf[name].save_pretrained(tmp_path)
    saved = load_model(tmp_path, dtype="float32", progress=False)
    own = load_model(folders[name], dtype="float32", progress=False)
    assert saved.fingerprint == own.fingerprint
    assert (saved.config.vision, saved.config.text) == (own.config.vision, own.config.text)
    assert saved.anyres == own.anyres


def test_siglip_and_qwen_alone(tmp_path):
    """SiglipVisionModel with its head and one layer more than we run; Qwen2ForCausalLM; separate folders."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    siglip = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=48,
            patch_size=14,
        )
    ).eval()
    qwen = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            vocab_size=80,
            tie_word_embeddings=True,
            rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
            eos_token_id=None,
            bos_token_id=None,
        )
    ).eval()
    for module in (siglip, qwen):
        for parameter in module.parameters():  # the initial values are so small that every output is alike
            torch.nn.init.normal_(parameter, std=0.3)
    siglip.save_pretrained(tmp_path / "siglip")
    qwen.save_pretrained(tmp_path / "qwen")
    parts = f"siglip={tmp_path / 'siglip'},qwen={tmp_path / 'qwen'},projector=fresh"
    loaded = load_model(parts, dtype="float32", progress=False)
    assert loaded.config.vision.num_layers_run == 3

    random = np.random.RandomState(0)
    views = random.randint(0, 256, (2, 48, 48, 3)).astype(np.uint8)
    pixels = torch.from_numpy(views).permute(0, 3, 1, 2).float() / 127.5 - 1
    ids = random.randint(0, 80, (2, 11))
    with torch.no_grad():
        wanted = siglip(pixels, output_hidden_states=True).hidden_states[-2]
        logits = qwen(torch.from_numpy(ids)).logits
    np.testing.assert_allclose(loaded.model.encode_views(views), wanted, rtol=0, atol=cases.ATOL)
    text = loaded.model.language_model
    np.testing.assert_allclose(text.logits(text(text.embed(ids))), logits, rtol=0, atol=cases.ATOL)


def test_extreme_sizes_plan_as_the_processor_counts():
    """Sizes too costly to run: counts of HF's processor at both view sizes against the plan."""
    from mmrstraj_jax.data import anyres

    random = np.random.RandomState(0)
    sizes = [
        (1, 1),
        (10000, 1),
        (1, 10000),
        (3000, 2999),
        (57, 56),
        *random.randint(1, 1500, (300, 2)).tolist(),
    ]
    for name in cases.CHECKPOINTS:
        hf, view = reference.processor(name), cases.CHECKPOINTS[name].view_size
        policy = mmrstraj_jax.config.AnyResConfig(policy=cases.CHECKPOINTS[name].policy).for_views(view, 14)
        for width, height in sizes:
            plan = anyres.plan(width, height, policy)
            assert plan.num_tokens == hf._get_number_of_features(height, width, view, view), (width, height)
