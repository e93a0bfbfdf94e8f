"""`load`, `.logits`, `.generate` against Hugging Face, on the pixels of its own processor."""

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mmrstraj_jax  # noqa: E402
from mmrstraj_jax.data import anyres  # noqa: E402

IMAGE, VIDEO, EOS, VIEW = 90, 91, 7, 28
PINPOINTS = [[VIEW * i, VIEW * j] for i in range(1, 7) for j in range(1, 7)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(HF's model, HF's image processor, ours loaded from what HF saved)."""
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**vision, image_size=VIEW, patch_size=14),
        text_config=transformers.Qwen2Config(
            **text, num_key_value_heads=2, vocab_size=96, max_position_embeddings=1024, eos_token_id=EOS
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )
    reference = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # no plain zeros or ones
            parameter.add_(0.3 * torch.randn_like(parameter) / max(parameter.shape[-1], 4) ** 0.25)
        reference.lm_head.weight.mul_(5)  # logits of around 10
    folder = tmp_path_factory.mktemp("hf")
    reference.generation_config.eos_token_id = EOS
    reference.generation_config.pad_token_id = 0
    reference.save_pretrained(folder)
    size = {"height": VIEW, "width": VIEW}
    half = [0.5] * 3
    processor = LlavaOnevisionImageProcessorPil(
        size=size, image_grid_pinpoints=PINPOINTS, image_mean=half, image_std=half
    )
    processor.save_pretrained(folder)
    return reference, processor, mmrstraj_jax.load(folder, dtype="float32")


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


CASES = {
    "text": ([1, 2, 3, 4], [], 0),
    "square": ([5, IMAGE, 6, 8], [picture(28, 28)], 0),
    "wide": ([5, IMAGE, 6, 8, 9], [picture(140, 30)], 0),
    "resized": ([IMAGE, 2], [picture(200, 190)], 0),  # 6 x 6 views: the map is shrunk on the canvas
    "several": ([1, IMAGE, 10, IMAGE, 3], [picture(50, 30), picture(20, 60)], 0),
    "video": ([1, VIDEO, 12], [], 3),
}


def hf_inputs(case: str, policy, processor) -> dict:
    """What HF's processors give: ids with one placeholder per visual token, normalised pixels."""
    ids, images, frames = CASES[case]
    plans = anyres.plan_row([image.size for image in images], frames, policy)
    counts = iter(plan.num_tokens for plan in plans)
    expanded = [
        number for token in ids for number in [token] * (next(counts) if token in (IMAGE, VIDEO) else 1)
    ]
    out = {"input_ids": torch.tensor([expanded])}
    if images:
        out |= dict(processor([images], return_tensors="pt"))
    if frames:
        video = np.stack([np.asarray(frame.resize((VIEW, VIEW), Image.BICUBIC)) for frame in clip(frames)])
        out["pixel_values_videos"] = torch.tensor((video / 255 - 0.5) / 0.5).float().permute(0, 3, 1, 2)[None]
    return out


def clip(frames: int) -> list[Image.Image]:
    return [picture(30 + at, 40) for at in range(frames)]


def media(case: str) -> dict:
    _, images, frames = CASES[case]
    return {"images": images, "videos": [clip(frames)] if frames else []}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_hf(both, case):
    reference, processor, model = both
    with torch.no_grad():
        expected = reference(**hf_inputs(case, model.anyres, processor)).logits[0].numpy()
    found = model.logits(CASES[case][0], **media(case))
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_ids_equal_hf_generate(both, penalty):
    reference, processor, model = both
    cases = list(CASES)
    found = model.generate(
        [CASES[case][0] for case in cases],
        images=[media(case)["images"] for case in cases],
        videos=[media(case)["videos"] for case in cases],
        max_new_tokens=16,
        repetition_penalty=penalty,
    )
    for case, ids in zip(cases, found, strict=True):
        inputs = hf_inputs(case, model.anyres, processor)
        expected = reference.generate(
            **inputs, max_new_tokens=16, do_sample=False, repetition_penalty=penalty, use_cache=True
        )
        assert ids == expected[0, inputs["input_ids"].shape[1] :].tolist(), case
