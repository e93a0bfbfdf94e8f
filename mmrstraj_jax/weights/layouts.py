"""One table: names of every public layout <-> paths of our parameter tree.

Every key is first normalised to the "hub" layout (llava-hf files, transformers 4.4x names), then looked up.
Sources: transformers conversion_mapping.py; the checkpoints' own index files.
"""

import re
from collections.abc import Iterable

_VISION = "vision_tower.vision_model."
LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")

# prefix of our path -> prefix of the hub key; first match wins. {i} is the layer, the leading axis of our
# leaf.
TREE_TO_HUB: tuple[tuple[str, str], ...] = (
    ("vision_tower.layers.", _VISION + "encoder.layers.{i}."),
    ("vision_tower.", _VISION + "embeddings."),
    ("multi_modal_projector.", "multi_modal_projector."),
    ("image_newline", "image_newline"),
    ("language_model.layers.", "language_model.model.layers.{i}."),
    ("language_model.lm_head.", "language_model.lm_head."),
    ("language_model.", "language_model.model."),
)

# layout -> (pattern at the start of a key, its hub replacement); first match wins.
TO_HUB: dict[str, tuple[tuple[str, str], ...]] = {
    # hub; runtime names of transformers >= 4.52 (model.*, lm_head); the mixture written by 5.x (no
    # vision_model.)
    "llava-hf": (
        (r"(language_model\.)?lm_head\.", "language_model.lm_head."),
        (r"(model\.)?language_model\.(model\.)?", "language_model.model."),
        (r"(model\.)?vision_tower\.(vision_model\.)?", _VISION),
        (r"(model\.)?multi_modal_projector\.", "multi_modal_projector."),
        (r"(model\.)?image_newline$", "image_newline"),
    ),
    "lmms-lab": (
        (r"lm_head\.", "language_model.lm_head."),
        (r"model\.vision_tower\.vision_tower\.vision_model\.", _VISION),
        (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
        (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
        (r"model\.image_newline$", "image_newline"),
        (r"model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model.model."),
    ),
    # a whole SigLIP, its vision model alone, and the latter as transformers 5 writes it (no prefix)
    "siglip": (
        (r"vision_model\.", _VISION),
        (r"(?=embeddings\.|encoder\.|post_layernorm\.|head\.)", _VISION),
    ),
    "qwen": (
        (r"lm_head\.", "language_model.lm_head."),
        (r"model\.(?=embed_tokens\.|layers\.|norm\.)", "language_model.model."),
    ),
}

# Declared exceptions: known keys that the model never uses, so their presence and their absence are both
# fine.
POST_LAYERNORM = (_VISION + "post_layernorm.weight", _VISION + "post_layernorm.bias")
_POOLING_HEAD = frozenset(
    f"{_VISION}head.{name}"
    for name in (
        *("probe", "attention.in_proj_weight", "attention.in_proj_bias"),
        *("attention.out_proj.weight", "attention.out_proj.bias", "layernorm.weight", "layernorm.bias"),
        *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
    )
)
_TOWER_LAYER = re.compile(
    re.escape(_VISION) + r"encoder\.layers\.(\d+)\."
    r"(layer_norm[12]|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.(weight|bias)"
)
_SIGLIP_TEXT = re.compile(r"text_model\.|logit_(scale|bias)$")
_POSITIONS = _VISION + "embeddings.position_ids"  # 0, 1, 2, ...: a buffer that older files hold


def hub_keys(path: str, num_layers: int | None) -> list[str]:
    """Hub keys of a leaf: one, or one per layer.

    Args:
        path: dotted path of our tree.
        num_layers: length of the leading axis; only read for stacked leaves.
    """
    for prefix, target in TREE_TO_HUB:
        if path.startswith(prefix):
            key = target + path[len(prefix) :]
            break
    else:
        raise AssertionError(f"no rule for {path}")
    return [key.replace("{i}", str(i)) for i in range(num_layers)] if "{i}" in key else [key]


def is_stacked(path: str) -> bool:
    """Whether the leaf's leading axis is the layer."""
    return ".layers." in path


def to_hub(key: str, layout: str) -> str | None:
    """The hub name of a key, None for a key that the layout does not know."""
    for pattern, replacement in TO_HUB[layout]:
        if match := re.match(pattern, key):
            return replacement + key[match.end() :]
    return None


def is_unused(key: str, layout: str, num_layers_run: int, num_file_layers: int) -> bool:
    """Whether a key of a file is a declared exception.

    Args:
        key: name in the file.
        layout: of the file.
        num_layers_run: tower layers that the model holds.
        num_file_layers: tower layers that the file's config declares; a higher one is no exception.
    """
    if layout == "siglip" and _SIGLIP_TEXT.match(key):
        return True
    hub = to_hub(key, layout)
    if hub is None:
        return False
    layer = _TOWER_LAYER.fullmatch(hub)
    return (
        hub in POST_LAYERNORM
        or hub in _POOLING_HEAD
        or hub == _POSITIONS
        or (layer is not None and num_layers_run <= int(layer[1]) < num_file_layers)
    )


def fold(keys: Iterable[str]) -> str:
    """Keys for a message, the layers of one name folded: `a.layers.{0-25}.b, c` (at most 12 names)."""
    layers: dict[str, list[int]] = {}
    # Names come from files: a message stays one line of bounded length whatever they hold.
    for key in sorted(key[:200] if key.isprintable() else ascii(key[:200]) for key in keys):
        match = LAYER.search(key)
        name = key if match is None else f"{key[: match.start()]}\0{key[match.end() :]}"
        layers.setdefault(name, []).extend([int(match[0])] if match else [])
    names = [name.replace("\0", "{" + _ranges(sorted(found)) + "}") for name, found in layers.items()]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more names" if len(names) > 12 else "")


def _ranges(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
