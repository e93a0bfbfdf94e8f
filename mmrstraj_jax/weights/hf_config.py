"""config.json of the public layouts -> ModelConfig and AnyResConfig. Sizes always come from the file.

Known: llava_onevision (transformers 4.45 to 5.x), lmms-lab's flat `llava` config, siglip, qwen2. A setting
that our model does not implement is an error that names its key; a key that a config leaves out has the
default of the transformers class, because transformers omits such keys when it saves a nested config.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from mmrstraj_jax.config import AnyResConfig, TextConfig, VisionConfig
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.weights.files import optional_json, read_json
from mmrstraj_jax.weights.tokens import find_tokenizer

_VISION_DEFAULTS = {  # SiglipVisionConfig
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
_TEXT_DEFAULTS = {  # Qwen2Config
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
# lmms-lab's config names the tower instead of describing it; these are that repository's config.json.
_NAMED_TOWERS = {
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
}


@dataclass(frozen=True)
class Described:
    """What a folder's JSON files say, before the tensors are looked at."""

    layout: str  # llava-hf | lmms-lab | siglip | qwen
    vision: VisionConfig | None
    text: TextConfig | None
    anyres: AnyResConfig | None
    num_file_layers: int  # tower layers in the file
    tied: bool | None  # None: no file says
    image_token_id: int | None
    video_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


def detect_layout(config: dict, where: Path) -> str:
    """The layout that a config.json belongs to.

    Raises:
        UserError: none of the known ones.
    """
    kind, names = config.get("model_type"), config.get("architectures") or []
    if kind == "llava_onevision":
        return "llava-hf"
    if "mm_vision_tower" in config and (kind in ("llava", "llava_qwen") or "LlavaQwenForCausalLM" in names):
        return "lmms-lab"
    if kind in ("siglip", "siglip_vision_model"):
        return "siglip"
    if kind == "qwen2":
        return "qwen"
    raise UserError(
        f"{where}: model_type {kind!r} is not supported; expected llava_onevision, lmms-lab's llava "
        "(Qwen2 text), "
        "siglip or qwen2"
    )


def describe(folder: Path) -> Described:
    """Reads config.json, generation_config.json, preprocessor_config.json and the tokenizer of a folder.

    Raises:
        UserError: a setting the model does not implement, or files that contradict each other.
    """
    where = folder / "config.json"
    config = read_json(where)
    layout = detect_layout(config, where)
    generation = optional_json(folder / "generation_config.json")
    if layout == "siglip":
        raw = _object(where, config, "vision_config", config)
        vision, num_layers = _vision(raw, where, features=-2)
        return Described(layout, vision, None, None, num_layers, None, None, None, (), None)
    if layout == "llava-hf":
        raw_text = _object(where, config, "text_config", {})
        _require(where, config, "projector_hidden_act", "gelu", default="gelu")
        _require(where, config, "multimodal_projector_bias", True, default=True)
        _require(where, config, "vision_feature_select_strategy", "full", default="full")
        layer = config.get("vision_feature_layer", -1)
        vision, num_layers = _vision(_object(where, config, "vision_config", {}), where, features=layer)
        pinpoints = config.get("image_grid_pinpoints")
        anyres = _anyres(where, config.get("vision_aspect_ratio", "anyres_max_9"), pinpoints, vision, "hw")
        tied = _tied(where, config, raw_text)
        image = config.get("image_token_index", config.get("image_token_id", 151646))
        video = config.get("video_token_index", config.get("video_token_id", 151647))
        _check_preprocessors(folder, vision)
    elif layout == "lmms-lab":
        raw_text, tied, image, video = config, _tied(where, config), None, None
        _require(where, config, "mm_projector_type", "mlp2x_gelu")
        _require(where, config, "mm_patch_merge_type", "spatial_unpad")
        _require(where, config, "mm_newline_position", "one_token", default="one_token")
        # The wrapper deletes the last encoder layer and never reads mm_vision_select_layer (spec section 2).
        vision, num_layers = _vision(_named_tower(config["mm_vision_tower"], folder), where, features=-2)
        pinpoints = config.get("image_grid_pinpoints")
        anyres = _anyres(where, config.get("image_aspect_ratio"), pinpoints, vision, "wh")
    else:
        raw_text, tied, image, video = config, _tied(where, config), None, None
        vision, anyres, num_layers = None, None, 0
    text = _text(raw_text, where)
    eos = generation.get("eos_token_id", raw_text.get("eos_token_id"))
    eos = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    pad = generation.get("pad_token_id", raw_text.get("pad_token_id", config.get("pad_token_id")))
    # Only llava-hf's own ids: in the others no row is read for a slot, and there may be none.
    ids = [("image_token_index", image), ("video_token_index", video)] if layout == "llava-hf" else []
    ids += [("eos_token_id", number) for number in eos]
    for key, value in ids if pad is None else [*ids, ("pad_token_id", pad)]:
        if type(value) is not int or not 0 <= value < text.vocab_size:
            file = folder / "generation_config.json" if key in generation else where
            raise UserError(
                f"{file}: {key} {value!r} is outside the vocabulary of {text.vocab_size} rows; correct it"
            )
    tokenizer = find_tokenizer(folder)
    if tokenizer is not None:
        image, video, eos, pad = _from_tokenizer(tokenizer, where, layout, image, video, eos, pad)
    return Described(layout, vision, text, anyres, num_layers, tied, image, video, eos, pad)


def resolve_tied(where: Path, tied: bool | None, has_head: bool) -> bool:
    """Whether the model is built tied.

    Args:
        tied: what the config says; None if it says nothing, then the file decides.
        has_head: whether the file has an lm_head.
    Raises:
        UserError: untied in the config, no head in the file.
    """
    if tied is None:
        return not has_head
    if not tied and not has_head:
        raise UserError(
            f"{where}: tie_word_embeddings is false but the weights hold no lm_head.weight; set it to "
            "true if the "
            "head is the embedding, or download the missing file"
        )
    return tied


def feature_layers(value: int | list[int], num_layers: int, where: Path) -> tuple[int, ...]:
    """vision_feature_layer as hidden-state indices counted from 0 (the embeddings): -1 of 26 layers is 26.

    Raises:
        UserError: outside the tower's hidden states.
    """
    values = value if isinstance(value, list) else [value]
    out = tuple(v + num_layers + 1 if type(v) is int and v < 0 else v for v in values)
    if not out or not all(type(v) is int and 1 <= v <= num_layers for v in out):
        raise UserError(
            f"{where}: vision_feature_layer {value}; expected layers of a tower with {num_layers} layers"
        )
    return out


def _vision(raw: dict, where: Path, features: int | list[int]) -> tuple[VisionConfig, int]:
    if raw.get("model_type", "siglip_vision_model") != "siglip_vision_model":
        raise UserError(
            f"{where}: vision_config.model_type {raw['model_type']!r}; expected siglip_vision_model"
        )
    _require(where, raw, "hidden_act", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    _require(where, raw, "num_channels", 3, default=3)
    sizes = _sizes(raw, _VISION_DEFAULTS, where)
    num_layers = sizes.pop("num_hidden_layers")
    layers = feature_layers(features, num_layers, where)
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise UserError(f"{where}: vision hidden_size is not a multiple of num_attention_heads")
    return VisionConfig(**sizes, feature_layers=layers), num_layers


def _text(raw: dict, where: Path) -> TextConfig:
    if raw.get("model_type", "qwen2") not in ("qwen2", "llava", "llava_qwen"):
        raise UserError(f"{where}: text_config.model_type {raw['model_type']!r}; expected qwen2")
    _require(where, raw, "hidden_act", "silu", default="silu")
    _require(where, raw, "use_sliding_window", False, default=False)
    _require(where, raw, "rope_scaling", None, default=None)
    kinds = ["full_attention"] if raw.get("layer_types") is None else raw["layer_types"]
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{where}: layer_types {kinds!r:.60} is not implemented; expected full_attention")
    rope = {} if raw.get("rope_parameters") is None else _object(where, raw, "rope_parameters", {})
    _require(where, rope, "rope_type", "default", default="default")
    sizes = _sizes(raw, _TEXT_DEFAULTS, where)
    heads = sizes["num_attention_heads"]
    head_dim = raw.get("head_dim") or sizes["hidden_size"] // heads
    split = "head_dim" in raw or head_dim * heads == sizes["hidden_size"]
    if (
        type(head_dim) is not int
        or head_dim < 1
        or head_dim % 2
        or not split
        or heads % sizes["num_key_value_heads"]
    ):
        raise UserError(
            f"{where}: hidden_size, num_attention_heads, num_key_value_heads and head_dim do not fit"
        )
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        raise UserError(f"{where}: rope_theta {theta!r}; expected a positive number")
    return TextConfig(**sizes, head_dim=head_dim, rope_theta=float(theta))


def _sizes(raw: dict, defaults: dict, where: Path) -> dict:
    sizes = {key: raw.get(key, default) for key, default in defaults.items()}
    for key, default in defaults.items():
        good = type(sizes[key]) in (int, float) if isinstance(default, float) else type(sizes[key]) is int
        if not good or not 0 < sizes[key] < 2**31:
            raise UserError(f"{where}: {key} {sizes[key]!r}; expected a positive {type(default).__name__}")
    return sizes


def _tied(where: Path, *configs: dict) -> bool | None:
    # Old files keep the flag in text_config, and transformers 5 copies it up: one true is enough.
    values = [config["tie_word_embeddings"] for config in configs if "tie_word_embeddings" in config]
    if not all(type(value) is bool for value in values):
        raise UserError(f"{where}: tie_word_embeddings {values}; expected true or false")
    return any(values) if values else None


def _anyres(where: Path, policy: object, pinpoints: object, vision: VisionConfig, order: str) -> AnyResConfig:
    if not isinstance(policy, str) or not re.fullmatch(r"anyres_max_[1-9]\d*", policy):
        raise UserError(f"{where}: aspect ratio policy {policy!r} is not implemented; expected anyres_max_N")
    base = AnyResConfig(policy=policy).for_views(vision.image_size, vision.patch_size)
    if pinpoints is None:
        return base
    if isinstance(pinpoints, str):  # "(1x1),...,(6x6)": first and last pair are the ends of a range
        pairs = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if len(pairs) < 2:
            raise UserError(f"{where}: image_grid_pinpoints {pinpoints!r}; expected '(1x1),...,(6x6)'")
        (a, b), (c, d) = pairs[0], pairs[-1]
        size = vision.image_size
        pinpoints = [[i * size, j * size] for i in range(a, c + 1) for j in range(b, d + 1)]
    size = vision.image_size
    valid = isinstance(pinpoints, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(v) is int and v > 0 and v % size == 0 for v in pair)
        for pair in pinpoints
    )
    if not valid or not pinpoints:
        raise UserError(f"{where}: image_grid_pinpoints; expected pairs of multiples of the view size {size}")
    grid = tuple((a, b) for a, b in pinpoints)
    if order == "wh" and {(b, a) for a, b in grid} != set(grid):  # order matters only in lopsided sets
        grid = tuple((b, a) for a, b in grid)
    return AnyResConfig(
        policy=policy, tau=base.tau, view_size=size, patch_size=vision.patch_size, grid_pinpoints=grid
    )


def _named_tower(name: object, folder: Path) -> dict:
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder / 'config.json'}: mm_vision_tower {name!r}; expected a name or a folder")
    local = Path(name) if Path(name).is_absolute() else folder / name
    if (local / "config.json").is_file():
        config = read_json(local / "config.json")
        return _object(local / "config.json", config, "vision_config", config)
    for known, sizes in _NAMED_TOWERS.items():
        if name.rstrip("/").endswith(known):
            return sizes
    raise UserError(
        f"{folder / 'config.json'}: mm_vision_tower {name!r} is neither a folder with a config.json "
        "nor one of "
        f"{', '.join(_NAMED_TOWERS)}; set it to a local copy of the tower's repository"
    )


def _check_preprocessors(folder: Path, vision: VisionConfig) -> None:
    old, new = folder / "preprocessor_config.json", folder / "processor_config.json"
    _check_preprocessor(old, optional_json(old), vision)
    # transformers 5 writes the image processor into the other file
    _check_preprocessor(new, _object(new, optional_json(new), "image_processor", {}), vision)


def _check_preprocessor(path: Path, settings: dict, vision: VisionConfig) -> None:
    for key in ("image_mean", "image_std"):
        if settings and settings.get(key) != [0.5, 0.5, 0.5]:
            raise UserError(
                f"{path}: {key} {settings.get(key)}; expected [0.5, 0.5, 0.5], what SigLIP was trained on"
            )
    size = settings.get("size", {})
    keys = ("height", "width", "shortest_edge")
    sides = [size[k] for k in keys if size.get(k) is not None] if isinstance(size, dict) else [size]
    if any(side != vision.image_size for side in sides):
        raise UserError(f"{path}: size {size} contradicts the tower's image_size {vision.image_size}")


def _from_tokenizer(folder: Path, where: Path, layout: str, image, video, eos, pad):
    tokenizer = Tokenizer.load(folder)
    pairs = (
        ("image_token_index", image, tokenizer.image_id),
        ("video_token_index", video, tokenizer.video_id),
    )
    for key, config_id, own in pairs:
        # Only here is the id data: the original replaces it by -200, and its config may hold anything.
        if layout == "llava-hf" and config_id != own:
            text = tokenizer.decode([config_id], skip_special=False)
            raise UserError(
                f"{where}: {key} {config_id} is {text!r} in {tokenizer.source}, where the visual "
                f"token has id {own}; correct the config or take the tokenizer that belongs to it"
            )
    return (
        tokenizer.image_id,
        tokenizer.video_id,
        eos or tokenizer.eos_ids,
        tokenizer.pad_id if pad is None else pad,
    )


def _object(where: Path, raw: dict, key: str, default: dict) -> dict:
    value = raw.get(key, default)
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} {value!r:.40}; expected an object")
    return value


def _require(where: Path, raw: dict, key: str, expected: object, **default: object) -> None:
    value = raw[key] if key in raw else default.get("default", "missing")
    if value != expected:
        raise UserError(f"{where}: {key} {value!r} is not implemented; expected {expected!r}")
