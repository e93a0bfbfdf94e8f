"""A real run to the hub's layout and back: train, export, verify, inspect, and transformers answers alike."""

import sys

import numpy as np
import pytest
import test_weights_hf as hub
from PIL import Image

from mmrstraj_jax import api, convert, train
from mmrstraj_jax.data import anyres, chat, images
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.training.run import embedded_weights

pytestmark = pytest.mark.slow


def _trained(folder, policy):
    options = ["--steps", "6", "--eval-samples", "4", "--optim.warmup-ratio", "0", "--dtype", "float32"]
    args = ["--config", "stage1", "--anyres.policy", policy, "--run-dir", str(folder), *options]
    assert train.main(args) == 0
    return str(folder)


def test_a_run_of_a_public_policy_means_the_same_in_transformers(tmp_path, capsys):
    pytest.importorskip("peft")
    run, base = _trained(tmp_path / "run", "anyres_max_9"), str(tmp_path / "base")
    merged, adapter = str(tmp_path / "merged"), str(tmp_path / "adapter")
    assert convert.main(["export", run, merged, "--dtype", "float32"]) == 0
    assert convert.main(["export", str(embedded_weights()), base, "--serving-policy", "anyres_max_9",
                         "--dtype", "float32"]) == 0  # fmt: skip
    assert convert.main(["export", run, adapter, "--peft", "--base", base]) == 0
    capsys.readouterr()
    assert convert.main(["verify", run, merged, "--dtype", "float32", "--tolerance", "1e-6"]) == 0
    assert "equal" in capsys.readouterr().out
    assert convert.main(["verify", base, merged]) == 1  # the adapters changed tower and projector
    assert convert.main(["inspect", merged]) == 0 and "anyres_max_9" in capsys.readouterr().out

    model = api.load(run, dtype="float32")
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (150, 260, 3), np.uint8))
    plan = anyres.plan(*image.size, model.anyres)
    ids = chat.prompt([{"role": "user", "content": "<image>\nIs there a bridge?"}], model.tokenizer).tolist()
    at = ids.index(model.config.image_token_id)
    expanded = ids[:at] + [ids[at]] * plan.num_tokens + ids[at + 1 :]
    views = images.views(image, plan, model.anyres.view_size).astype(np.float32).transpose(0, 3, 1, 2)
    request = {"input_ids": expanded, "pixel_values": views / 127.5 - 1, "image_sizes": [150, 260]}
    np.savez(tmp_path / "request.npz", **request)
    logits = model.logits(ids, images=[image])
    greedy = model.generate(ids, images=[image], max_new_tokens=8)
    for found in hub.reference(sys.executable, tmp_path / "request.npz", merged, f"{base}+{adapter}"):
        assert found["problems"] == {}
        np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
        assert found["greedy"][: len(greedy)] == greedy


def test_a_tau_run_needs_a_serving_policy(tmp_path):
    run = _trained(tmp_path / "run", "tau")
    with pytest.raises(UserError, match="serving-policy"):
        convert.main(["export", run, str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert convert.main(["export", run, str(tmp_path / "out"), "--serving-policy", "anyres_max_9"]) == 0
    assert "tau" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
