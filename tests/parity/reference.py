"""The reference side: transformers and peft, CPU, float32, with HF's own PIL image processor and counts.

Imports torch; only the live tests and the generator of the golden file use it.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from . import cases

torch.set_num_threads(1)  # the shapes are tiny


class Output(NamedTuple):
    """One sample's outputs; `features`: visual tokens of all its slots, as the language model gets them."""

    views: np.ndarray  # uint8 [V, S, S, 3]
    features: np.ndarray  # [N, H]
    logits: np.ndarray  # [L, W]
    loss: float
    input_ids: np.ndarray  # expanded


def load(folder: Path) -> LlavaOnevisionForConditionalGeneration:
    model, info = LlavaOnevisionForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    missing = set(info["missing_keys"]) - {"lm_head.weight"}  # tied
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def processor(name: str) -> LlavaOnevisionProcessor:
    size = cases.CHECKPOINTS[name].view_size
    pictures = LlavaOnevisionImageProcessorPil(
        size={"height": size, "width": size},
        image_grid_pinpoints=cases.pinpoints(name),
        image_mean=[0.5] * 3,  # the class default is CLIP's; SigLIP checkpoints carry these
        image_std=[0.5] * 3,
    )
    # Its constructor wants a tokenizer, and a video processor, which wants torchvision; counts need neither.
    hf = object.__new__(LlavaOnevisionProcessor)
    hf.image_processor, hf.image_token, hf.video_token = pictures, "<image>", "<video>"
    hf.num_image_tokens = (size // 14) ** 2
    hf.vision_feature_select_strategy = "full"
    hf.vision_aspect_ratio = cases.CHECKPOINTS[name].policy
    return hf


class Batch(NamedTuple):
    """Inputs of the HF model for some samples, padded on the right, and their expanded lengths."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    lengths: list[int]


def batch(name: str, samples: list[cases.Sample]) -> Batch:
    """All samples in one forward. Token counts of every slot are those of HF's processor."""
    hf = processor(name)
    inputs: dict[str, torch.Tensor] = {}
    counts: list[int] = []
    rows = [sample.images for sample in samples if sample.images]
    if rows:
        # 1-pixel images: HF cannot tell height from channels by itself
        found = hf.image_processor(images=rows, input_data_format="channels_last", return_tensors="pt")
        inputs |= found
        number = sum(map(len, rows))
        counts = [len(hf.replace_image_token(found, at)) // len("<image>") for at in range(number)]
    video_counts: list[int] = []
    clips = [sample.frames for sample in samples if sample.frames]
    if clips:
        inputs["pixel_values_videos"] = torch.stack([_frames(hf, clip) for clip in clips])
        sizes = [(len(clip), clip[0].height, clip[0].width) for clip in clips]
        video_counts = hf._get_num_multimodal_tokens(video_sizes=sizes)["num_video_tokens"]
    remaining = {cases.IMAGE_ID: list(counts), cases.VIDEO_ID: list(video_counts)}
    ids, labels = [], []
    for sample in samples:
        times = [remaining[token].pop(0) if token in remaining else 1 for token in sample.ids]
        ids.append(np.repeat(sample.ids, times))
        labels.append(np.repeat(np.where(sample.supervised, sample.ids, -100), times))
    lengths = [len(row) for row in ids]

    def pad(rows, value):
        padded = [np.pad(row, (0, max(lengths) - len(row)), constant_values=value) for row in rows]
        return torch.from_numpy(np.stack(padded)).long()

    inputs["input_ids"] = pad(ids, cases.PAD_ID)
    inputs["attention_mask"] = torch.arange(max(lengths))[None].lt(torch.tensor(lengths)[:, None]).long()
    return Batch(inputs, pad(labels, -100), lengths)


def _frames(hf: LlavaOnevisionProcessor, clip: list[Image.Image]) -> torch.Tensor:
    """HF's video processor needs torchvision; to a frame it does what the image processor does to a view."""
    pictures, views = hf.image_processor, []
    for frame in clip:
        pixels = np.asarray(frame).transpose(2, 0, 1)
        resized = pictures.resize(pixels, pictures.size, resample=pictures.resample)
        scaled = pictures.rescale(resized, 1 / 255)
        views.append(pictures.normalize(scaled, pictures.image_mean, pictures.image_std))
    return torch.from_numpy(np.stack(views)).float()


@torch.no_grad()
def run(model: LlavaOnevisionForConditionalGeneration, name: str, sample: cases.Sample) -> Output:
    inputs, labels, _ = batch(name, [sample])
    out = model(**inputs, labels=labels)
    features, views = torch.zeros(0, model.config.text_config.hidden_size), None
    if sample.images:
        keys = ("pixel_values", "image_sizes", "batch_num_images")
        packed = model.get_image_features(**{key: inputs[key] for key in keys}).pooler_output
        features, views = torch.cat(list(packed)), inputs["pixel_values"].flatten(0, 1)
    if sample.frames:
        features = model.get_video_features(inputs["pixel_values_videos"]).pooler_output[0]
        views = inputs["pixel_values_videos"][0]
    if views is None:
        views = torch.zeros(0, 3, *[cases.CHECKPOINTS[name].view_size] * 2)
    pixels = ((views + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return Output(
        pixels, features.numpy(), out.logits[0].numpy(), float(out.loss), inputs["input_ids"][0].numpy()
    )


@torch.no_grad()
def greedy(model, name: str, sample: cases.Sample, new_tokens: int) -> list[int]:
    inputs = batch(name, [sample]).inputs
    out = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, eos_token_id=None)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


# ---- LoRA ----


def with_adapters(
    model: LlavaOnevisionForConditionalGeneration,
) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """peft on the tower and the projector; (model, adapters by our path with the layer number left in)."""
    from peft import LoraConfig, get_peft_model

    tower, projector = "|".join(cases.TOWER_TARGETS), "|".join(cases.PROJECTOR_TARGETS)
    config = LoraConfig(
        r=cases.LORA_RANK,
        lora_alpha=cases.LORA_ALPHA,
        lora_dropout=0.0,
        bias="none",
        target_modules=rf".*vision_tower.*\.({tower})|.*multi_modal_projector\.({projector})",
    )
    adapted = get_peft_model(model, config)
    adapters = {}
    for key, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            continue
        path = key.removeprefix("base_model.model.model.").removesuffix(".default.weight")
        path = path.replace("vision_model.", "").replace("encoder.", "")
        adapters[path] = parameter
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(cases.adapter(path, tuple(parameter.shape))))
    return adapted, adapters


def first_gradients(adapted, adapters, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """Loss, and the gradient of every adapter that takes part (layers above the feature layer do not)."""
    adapted.zero_grad()
    loss = adapted(**batch.inputs, labels=batch.labels).loss
    loss.backward()
    return float(loss.detach()), {
        path: parameter.grad.numpy().copy()
        for path, parameter in adapters.items()
        if parameter.grad is not None
    }


def train(adapted, adapters, batch: Batch, *, steps: int, tower_lr: float, projector_lr: float, clip: float):
    """torch.optim.AdamW with the paper's betas and two groups; (gradient norms, change of every adapter)."""
    before = {path: parameter.detach().clone() for path, parameter in adapters.items()}
    groups = [
        {"params": [p for path, p in adapters.items() if path.startswith(part)], "lr": lr}
        for part, lr in (("vision_tower", tower_lr), ("multi_modal_projector", projector_lr))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    norms = []
    for _ in range(steps):
        optimizer.zero_grad()
        adapted(**batch.inputs, labels=batch.labels).loss.backward()
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(list(adapters.values()), clip if clip else float("inf")))
        )
        optimizer.step()
    changes = {path: (parameter.detach() - before[path]).numpy() for path, parameter in adapters.items()}
    with torch.no_grad():
        for path, parameter in adapters.items():
            parameter.copy_(before[path])
    return norms, changes
