"""What both sides of the parity tests get: tiny checkpoints, pictures and token ids, all from fixed seeds.

NumPy and PIL only. Weights are drawn by tensor name from NumPy's frozen legacy generator, so they need not be
stored, and are written in the hub layout of the public llava-onevision files.
"""

import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

VOCABULARY, IMAGE_ID, VIDEO_ID, PAD_ID = 96, 90, 91, 92
NUM_FILE_LAYERS = 3  # of the tower


class Checkpoint(NamedTuple):
    """What differs between the tiny checkpoints."""

    view_size: int
    feature_layer: int | list[int]
    num_layers_run: int
    tied: bool
    vision_hidden: int
    vision_heads: int
    text_hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    policy: str = "anyres_max_9"


CHECKPOINTS = {
    "tied": Checkpoint(56, -1, 3, True, 48, 3, 64, 4, 2, 16),
    # 104 = 7 x 14 + 6, as 384 = 27 x 14 + 6: an odd side, unseen pixels; head_dim is not hidden / heads
    "untied": Checkpoint(104, -2, 2, False, 32, 2, 48, 4, 1, 16),
    "list": Checkpoint(56, [-3, -1], 3, False, 32, 2, 48, 3, 3, 16, "anyres_max_2"),
}


def _random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def _shapes(case: Checkpoint) -> dict[str, tuple[int, ...]]:
    dim, mlp, text, text_mlp = case.vision_hidden, 80, case.text_hidden, 96
    heads, kv_heads = case.num_heads * case.head_dim, case.num_kv_heads * case.head_dim
    tower, language = "vision_tower.vision_model.", "language_model.model."
    features = len(case.feature_layer) if isinstance(case.feature_layer, list) else 1
    shapes = {
        f"{tower}embeddings.patch_embedding.weight": (dim, 3, 14, 14),
        f"{tower}embeddings.patch_embedding.bias": (dim,),
        f"{tower}embeddings.position_embedding.weight": ((case.view_size // 14) ** 2, dim),
        f"{tower}post_layernorm.weight": (dim,),
        f"{tower}post_layernorm.bias": (dim,),
        "multi_modal_projector.linear_1.weight": (text, dim * features),
        "multi_modal_projector.linear_1.bias": (text,),
        "multi_modal_projector.linear_2.weight": (text, text),
        "multi_modal_projector.linear_2.bias": (text,),
        "image_newline": (text,),
        f"{language}embed_tokens.weight": (VOCABULARY, text),
        f"{language}norm.weight": (text,),
    }
    if not case.tied:
        shapes["language_model.lm_head.weight"] = (VOCABULARY, text)
    for layer in range(NUM_FILE_LAYERS):
        prefix = f"{tower}encoder.layers.{layer}."
        linears = {f"self_attn.{part}_proj": (dim, dim) for part in ("q", "k", "v", "out")}
        linears |= {"mlp.fc1": (mlp, dim), "mlp.fc2": (dim, mlp)}
        for name, shape in linears.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{prefix}{name}.weight": (dim,), f"{prefix}{name}.bias": (dim,)}
    for layer in range(2):
        prefix = f"{language}layers.{layer}."
        for part, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shapes |= {f"{prefix}self_attn.{part}_proj.weight": (rows, text)}
            shapes |= {f"{prefix}self_attn.{part}_proj.bias": (rows,)}
        shapes |= {
            f"{prefix}self_attn.o_proj.weight": (text, heads),
            f"{prefix}mlp.gate_proj.weight": (text_mlp, text),
            f"{prefix}mlp.up_proj.weight": (text_mlp, text),
            f"{prefix}mlp.down_proj.weight": (text, text_mlp),
            f"{prefix}input_layernorm.weight": (text,),
            f"{prefix}post_attention_layernorm.weight": (text,),
        }
    return shapes


def weights(name: str) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint. Sizes are such that activations are of size 1 and logits of about 10."""
    tensors = {}
    for key, shape in _shapes(CHECKPOINTS[name]).items():
        value = _random(f"{name} {key}", shape)
        if "norm" in key and key.endswith("weight"):
            value = 1 + 0.2 * value
        elif key.endswith("bias"):
            value = 0.2 * value
        elif "embed_tokens" in key or "lm_head" in key:
            value = 0.6 * value
        elif len(shape) > 1:
            value = value * np.prod(shape[1:]) ** -0.5
        tensors[key] = value.astype(np.float32)
    return tensors


def config_json(name: str) -> dict:
    """config.json as the public llava-hf folders have it."""
    case = CHECKPOINTS[name]
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": IMAGE_ID,
        "video_token_index": VIDEO_ID,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": case.feature_layer,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": case.policy,
        "image_grid_pinpoints": pinpoints(name),
        "tie_word_embeddings": case.tied,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": case.vision_hidden,
            "intermediate_size": 80,
            "num_hidden_layers": NUM_FILE_LAYERS,
            "num_attention_heads": case.vision_heads,
            "image_size": case.view_size,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": case.text_hidden,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": case.num_heads,
            "num_key_value_heads": case.num_kv_heads,
            "head_dim": case.head_dim,
            "vocab_size": VOCABULARY,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": case.tied,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": PAD_ID,
        },
    }


def pinpoints(name: str) -> list[list[int]]:
    size = CHECKPOINTS[name].view_size
    return [[size * rows, size * columns] for rows in range(1, 7) for columns in range(1, 7)]


def write_folder(name: str, folder: Path) -> Path:
    """A checkpoint folder that both `mmrstraj_jax.load` and transformers open."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(name)))
    save_file(weights(name), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- samples ----


class Sample(NamedTuple):
    """One row. `ids` hold ONE image or video id per slot; `supervised` marks the ids that are targets."""

    name: str
    images: list[Image.Image]
    frames: list[Image.Image]
    ids: np.ndarray
    supervised: np.ndarray


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Colour waves and noise: neither resizing nor cropping leaves it as it is."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [
        np.sin(2 * np.pi * (random.uniform(-3, 3) * x + random.uniform(-3, 3) * y + random.uniform()))
        for _ in range(3)
    ]
    noise = random.uniform(-0.3, 0.3, (height, width, 3))
    values = 127.5 * (1 + 0.7 * np.stack(waves, axis=-1) + noise)
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


# Width and height for views of 56 pixels; larger views scale them. "resized" is resized by anyres_max_9.
IMAGE_SIZES = {
    "small_square": (40, 40),
    "square": (112, 112),
    "wide": (150, 60),
    "tall": (60, 150),
    "one_pixel_wide": (1, 200),
    "one_pixel_tall": (200, 1),
    "huge_aspect": (1500, 5),
    "resized": (214, 223),
}


# By view size: where the original's truncation and HF's rounding before it give different maps.
ROUNDED_SIZES = {56: (47, 376), 104: (49, 343)}


def samples(name: str) -> list[Sample]:
    """A row per image size, two multi-image rows, a video and a text row."""
    zoom = CHECKPOINTS[name].view_size / 56

    def size(width: int, height: int) -> tuple[int, int]:
        return tuple(side if side == 1 else round(side * zoom) for side in (width, height))

    visuals = [(key, [size(*value)], 0) for key, value in IMAGE_SIZES.items()]
    visuals += [("rounded", [ROUNDED_SIZES[CHECKPOINTS[name].view_size]], 0)]
    visuals += [("two_images", [size(80, 30), size(56, 56)], 0)]
    visuals += [("three_images", [size(20, 90), size(1, 33), size(140, 100)], 0)]
    visuals += [("video", [size(70, 44)] * 3, 3), ("text", [], 0)]
    rows = []
    for number, (key, sizes, num_frames) in enumerate(visuals):
        pictures = [picture(*one, seed=100 * number + at) for at, one in enumerate(sizes)]
        frames, images = (pictures, []) if num_frames else ([], pictures)
        random = np.random.RandomState(number)
        ids = random.randint(0, IMAGE_ID, 12 + number)
        slots = [VIDEO_ID] if frames else [IMAGE_ID] * len(images)
        at = np.sort(random.choice(np.arange(1, 5), len(slots), replace=False))
        ids = np.insert(ids, at, slots)
        supervised = np.zeros(len(ids), bool)
        supervised[-6:] = random.rand(6) < 0.8
        supervised[-1] = True
        rows.append(Sample(key, images, frames, ids, supervised))
    return rows


# ---- adapters ----

LORA_RANK, LORA_ALPHA = 8, 16.0
TOWER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PROJECTOR_TARGETS = ("linear_1", "linear_2")
LORA_ROWS = ("wide", "small_square", "tall")  # samples of the training batch


def adapter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An adapter matrix by its path, e.g. vision_tower.layers.1.mlp.fc1.lora_A; B is not zero either."""
    scale = shape[-1] ** -0.5 if name.endswith("lora_A") else 0.05
    return (scale * _random(name, shape)).astype(np.float32)


# ---- what is kept of the outputs in the golden file ----


def excerpt(values: np.ndarray, rows: int = 8) -> np.ndarray:
    """Evenly spread rows of a long output, the first and last among them."""
    return values[np.unique(np.linspace(0, max(len(values) - 1, 0), rows).round().astype(int))[: len(values)]]


NEW_TOKENS = 6
LEARNING_RATES = {"tower_lr": 2e-4, "projector_lr": 5e-3}
ATOL = 1e-4  # of values around 10
GRADIENT_TOLERANCE = 2e-5  # of a leaf's largest gradient
CHANGE_TOLERANCE = 0.02  # of a leaf's largest change after 5 steps


def assert_leaves_close(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float
) -> None:
    """Every leaf within a fraction of its own largest value; the same leaves on both sides."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    for path, value in expected.items():
        largest = np.abs(value).max()
        assert largest > 0, path
        np.testing.assert_allclose(actual[path], value, rtol=0, atol=tolerance * largest, err_msg=path)
