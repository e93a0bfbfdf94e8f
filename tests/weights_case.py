"""Tiny checkpoints in every public layout, written without the package's own key table.

The key names are spelled out from the public files' indexes (shared weight_names.json), so that an error in
mmrstraj_jax/weights/layouts.py cannot hide in a round trip.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from mmrstraj_jax.config import ModelConfig, TextConfig, VisionConfig
from mmrstraj_jax.weights.load import LoadedModel, load_model

VOCABULARY = 320
VISION = VisionConfig(16, 24, 2, 28, 14, 1e-6, (3,))
TEXT = TextConfig(24, 40, 2, 4, 2, 6, VOCABULARY, 1e6, 1e-6, True, 512)
CONFIG = ModelConfig(VISION, TEXT)
PINPOINTS = [[28 * i, 28 * j] for i in range(1, 7) for j in range(1, 7)]


def tokenizer(folder: Path, extra: tuple[str, ...] = (), slots: bool = False) -> None:
    """A byte-level BPE of 256 bytes and four merges, Qwen's control tokens, `extra`, slots if asked."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("i", "n"), ("a", "n"), ("th", "e")]
    vocabulary = {char: i for i, char in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    library = Library(models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *extra,
        *(["<image>", "<video>"] if slots else []),
    ]
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))


IMAGE_ID, VIDEO_ID = 263, 264  # 260 merges and bytes, three control tokens

_SIGLIP_LAYER = [
    *(f"layer_norm{n}.{p}" for n in (1, 2) for p in ("weight", "bias")),
    *(f"self_attn.{x}_proj.{p}" for x in ("q", "k", "v", "out") for p in ("weight", "bias")),
    *(f"mlp.fc{n}.{p}" for n in (1, 2) for p in ("weight", "bias")),
]
_QWEN_LAYER = [
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{x}_proj.{p}" for x in ("q", "k", "v") for p in ("weight", "bias")),
    "self_attn.o_proj.weight",
    *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
]


def tensors(
    seed: int = 0, tied: bool = True, tower_layers: int = 3, dtype=np.float32
) -> dict[str, np.ndarray]:
    """Random tensors under neutral names: `tower|...`, `text|...`, `projector|...`, `newline`, `head`."""
    random, v, t = np.random.default_rng(seed), VISION, TEXT
    kv, heads = t.num_key_value_heads * t.head_dim, t.num_attention_heads * t.head_dim
    shapes = {
        "tower|embeddings.patch_embedding.weight": (v.hidden_size, 3, 14, 14),
        "tower|embeddings.patch_embedding.bias": (v.hidden_size,),
        "tower|embeddings.position_embedding.weight": (v.num_patches, v.hidden_size),
        "tower|post_layernorm.weight": (v.hidden_size,),
        "tower|post_layernorm.bias": (v.hidden_size,),
        "text|embed_tokens.weight": (t.vocab_size, t.hidden_size),
        "text|norm.weight": (t.hidden_size,),
        "projector|1.weight": (t.hidden_size, v.hidden_size),
        "projector|1.bias": (t.hidden_size,),
        "projector|2.weight": (t.hidden_size, t.hidden_size),
        "projector|2.bias": (t.hidden_size,),
        "newline": (t.hidden_size,),
    }
    if not tied:
        shapes["head"] = (t.vocab_size, t.hidden_size)
    widths = {"fc1.weight": (v.intermediate_size, v.hidden_size), "fc1.bias": (v.intermediate_size,)}
    widths |= {"fc2.weight": (v.hidden_size, v.intermediate_size)}
    for name in _SIGLIP_LAYER:
        shape = (v.hidden_size,) * (2 if "proj.weight" in name else 1)
        shape = widths.get(name.removeprefix("mlp."), shape)
        shapes |= {f"tower|encoder.layers.{i}.{name}": shape for i in range(tower_layers)}
    widths = {
        "q_proj.weight": (heads, t.hidden_size),
        "k_proj.weight": (kv, t.hidden_size),
        "v_proj.weight": (kv, t.hidden_size),
        "o_proj.weight": (t.hidden_size, heads),
        "q_proj.bias": (heads,),
        "k_proj.bias": (kv,),
        "v_proj.bias": (kv,),
        "gate_proj.weight": (t.intermediate_size, t.hidden_size),
        "up_proj.weight": (t.intermediate_size, t.hidden_size),
        "down_proj.weight": (t.hidden_size, t.intermediate_size),
    }
    for name in _QWEN_LAYER:
        shape = widths.get(name.split(".", 1)[1], (t.hidden_size,))
        shapes |= {f"text|layers.{i}.{name}": shape for i in range(t.num_hidden_layers)}
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


# layout -> neutral prefix -> prefix in the file
PREFIXES = {
    "hub": ("vision_tower.vision_model.", "language_model.model.", "language_model.lm_head.weight", ""),
    "runtime": ("model.vision_tower.", "model.language_model.", "lm_head.weight", "model."),
    "runtime_4.52": ("model.vision_tower.vision_model.", "model.language_model.", "lm_head.weight", "model."),
    "mixture_5": ("vision_tower.", "language_model.model.", "language_model.lm_head.weight", ""),
    "lmms-lab": ("model.vision_tower.vision_tower.vision_model.", "model.", "lm_head.weight", "model."),
}


def named(neutral: dict[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """The same tensors under a layout's names."""
    tower, text, head, rest = PREFIXES[layout]
    projector = {"1": "linear_1", "2": "linear_2"}
    prefix = rest + "multi_modal_projector."
    if layout == "lmms-lab":
        projector, prefix = {"1": "0", "2": "2"}, "model.mm_projector."
    out = {}
    for name, value in neutral.items():
        kind, _, tail = name.partition("|")
        if kind == "tower":
            out[tower + tail] = value
        elif kind == "text":
            out[text + tail] = value
        elif kind == "projector":
            out[f"{prefix}{projector[tail[0]]}{tail[1:]}"] = value
        else:
            out[head if kind == "head" else rest + "image_newline"] = value
    return out


def text_json(tied: bool | None = True) -> dict:
    flag = {} if tied is None else {"tie_word_embeddings": tied}
    return {
        "model_type": "qwen2",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        **flag,
    }


def vision_json(layers: int = 3) -> dict:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }


def hf_json(tied: bool | None = True, layers: int = 3, feature_layer: int | list[int] = -1, **other) -> dict:
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": IMAGE_ID,
        "video_token_index": VIDEO_ID,
        "image_grid_pinpoints": PINPOINTS,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": feature_layer,
        "vision_feature_select_strategy": "full",
        "text_config": text_json(tied),
        "vision_config": vision_json(layers),
        **other,
    }


def lmms_json(tied: bool = True) -> dict:
    return text_json(tied) | {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": PINPOINTS,
        "mm_hidden_size": 16,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower",
        "image_token_index": 151646,
    }


def write(folder: Path, config: dict, content: dict[str, np.ndarray], with_tokenizer: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    if with_tokenizer:
        tokenizer(folder, slots=config["model_type"] == "llava_onevision")
    return folder


def write_layout(folder: Path, layout: str, neutral: dict[str, np.ndarray], tied: bool = True) -> Path:
    """A folder in one of PREFIXES' layouts."""
    if layout != "lmms-lab":
        return write(folder, hf_json(tied), named(neutral, layout))
    write(folder, lmms_json(tied), named(neutral, layout))
    (folder / "tower").mkdir()
    (folder / "tower" / "config.json").write_text(
        json.dumps({"model_type": "siglip", "vision_config": vision_json(4)})
    )
    return folder


def model(folder: Path, tied: bool = True, seed: int = 0, dtype: str = "float32") -> LoadedModel:
    """A random model of ours: values small enough for smooth logits, every norm and bias random too."""
    neutral = {
        name: 0.2 * value + ("norm" in name and name.endswith("weight"))
        for name, value in tensors(seed, tied).items()
    }
    neutral = {name: value.astype(np.float32) for name, value in neutral.items()}
    return load_model(write_layout(folder, "hub", neutral, tied), dtype=dtype)
