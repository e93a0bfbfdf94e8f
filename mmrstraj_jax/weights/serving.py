"""The JSON and text files of an exported checkpoint. Class defaults of transformers' LlavaOnevision classes
are not what SigLIP and Qwen2.5 need, so everything is explicit."""

import json
import shutil
from pathlib import Path

from mmrstraj_jax.config import AnyResConfig, ModelConfig
from mmrstraj_jax.data import anyres as anyres_plans
from mmrstraj_jax.data.chat import SYSTEM_MESSAGE
from mmrstraj_jax.data.tokenizer import CONTROL_TOKENS, SLOT_TOKENS
from mmrstraj_jax.weights.files import optional_json, read_json
from mmrstraj_jax.weights.safetensors_io import write_text
from mmrstraj_jax.weights.tokens import copy_tokenizer

# chat.prompt and chat.encode as a template: the training layout, a default system turn, slots before the
# text, also a single one in the middle of a string (chat.clean_up). The loops over the content's parts tell
# vLLM that it takes parts; to other templates it gives one string, with a newline after each slot.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\n" + SYSTEM_MESSAGE + "<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}"
    "{%- set text = message['content'] -%}"
    "{%- set slot = '<image>' if '<image>' in text else '<video>' -%}"
    "{%- if message['role'] == 'user' and text.count('<image>') + text.count('<video>') == 1 "
    "and not text.startswith(slot) -%}"
    "{%- set text = (slot + '\\n' + text.replace(slot, '').strip()).strip() -%}"
    "{%- endif -%}"
    "{%- else -%}"
    "{%- set texts = message['content'] | selectattr('type', 'equalto', 'text') "
    "| map(attribute='text') | list -%}"
    "{%- set text = texts | join('\\n') -%}"
    "{%- for _ in message['content'] | selectattr('type', 'equalto', 'image') -%}"
    "{{- '<image>' -}}{%- endfor -%}"
    "{%- for _ in message['content'] | selectattr('type', 'equalto', 'video') -%}"
    "{{- '<video>' -}}{%- endfor -%}"
    "{%- if text and message['content'] | selectattr('type', 'in', ['image', 'video']) | list -%}"
    "{{- '\\n' -}}{%- endif -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- text + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- text + '<|im_end|>' -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
# Sizes of the model card's table: DOTA-like tiles, screens, and both ends.
CARD_SIZES = (
    (256, 256),
    (512, 512),
    (640, 480),
    (800, 600),
    (1024, 1024),
    (1280, 720),
    (1920, 1080),
    (4000, 4000),
)


def hf_config(config: ModelConfig, policy: AnyResConfig, dtype: str) -> dict:
    """config.json of a LlavaOnevisionForConditionalGeneration with this model's sizes."""
    vision, text = config.vision, config.text
    num_layers = vision.num_layers_run
    features = [layer - num_layers - 1 for layer in vision.feature_layers]
    text_config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size,
        "rope_theta": text.rope_theta,
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": text.max_position_embeddings,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "max_window_layers": text.num_hidden_layers,
        "tie_word_embeddings": text.tie_word_embeddings,
        "eos_token_id": config.eos_token_ids[0] if config.eos_token_ids else None,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
    }
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "torch_dtype": dtype,
        "image_token_index": config.image_token_id,
        "video_token_index": config.video_token_id,
        "image_grid_pinpoints": [list(pair) for pair in policy.grid_pinpoints],
        "vision_aspect_ratio": policy.policy,
        "vision_feature_layer": features[0] if len(features) == 1 else features,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": text.tie_word_embeddings,
        "use_image_newline_parameter": True,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "hidden_act": "gelu_pytorch_tanh",
            "vision_use_head": False,
        },
        "text_config": text_config,
    }


def write_serving_files(
    directory: Path,
    config: ModelConfig,
    trained: AnyResConfig,
    served: AnyResConfig,
    dtype: str,
    tokenizer_dir: Path,
    title: str,
    notes: list[str],
) -> None:
    """Writes everything beside the weights.

    Args:
        directory: existing folder.
        trained, served: the policy of the training run and the one the engines will use.
        tokenizer_dir: copied; `<image>` and `<video>` added where missing.
        title: of the model card.
        notes: paragraphs of the model card.
    """
    copy_tokenizer(tokenizer_dir, directory)
    size = {"height": served.view_size, "width": served.view_size}
    normalise = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],  # the classes' default is CLIP's
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaOnevisionProcessor",
        "resample": 3,  # PIL bicubic
        "rescale_factor": 1 / 255,
        "size": size,
    }
    image = normalise | {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "do_pad": True,
        "image_grid_pinpoints": [list(pair) for pair in served.grid_pinpoints],
    }
    video = normalise | {"video_processor_type": "LlavaOnevisionVideoProcessor", "do_sample_frames": False}
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": served.side**2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": served.policy,
        "image_token": SLOT_TOKENS[0],
        "video_token": SLOT_TOKENS[1],
    }
    end_of_text, im_start, im_end = CONTROL_TOKENS
    generation = {
        "eos_token_id": list(config.eos_token_ids),
        "pad_token_id": config.pad_token_id,
        "do_sample": False,
    }
    # Its own chat template must not stay: Qwen2.5's has another system line than the one trained with.
    settings = optional_json(directory / "tokenizer_config.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": im_end,
        "pad_token": end_of_text,
        "model_max_length": config.text.max_position_embeddings,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        # The class's default has token_type_ids too, which `generate` of transformers 4.57 refuses
        "model_input_names": ["input_ids", "attention_mask"],
        "added_tokens_decoder": {},
    } | settings
    settings |= {"chat_template": CHAT_TEMPLATE, "processor_class": "LlavaOnevisionProcessor"}
    # As transformers 4.57 and vLLM know them, and 5 too: 5 writes a class and a list of its own.
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings.setdefault("additional_special_tokens", settings.pop("extra_special_tokens"))
    added = read_json(directory / "tokenizer.json").get("added_tokens", [])
    for token in added:
        flags = {name: value for name, value in token.items() if name != "id"}
        settings["added_tokens_decoder"].setdefault(str(token["id"]), flags)
    files = {
        "config.json": hf_config(config, served, dtype),
        "generation_config.json": generation,
        "preprocessor_config.json": image,
        "video_preprocessor_config.json": video,
        "processor_config.json": processor,
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "tokenizer_config.json": settings,
        "special_tokens_map.json": {
            "eos_token": im_end,
            "pad_token": end_of_text,
            "additional_special_tokens": [im_start, *SLOT_TOKENS],
        },
        "added_tokens.json": {token["content"]: token["id"] for token in added},
    }
    for name, content in files.items():
        write_text(directory / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_text(directory / "chat_template.jinja", CHAT_TEMPLATE)
    write_text(directory / "README.md", model_card(title, trained, served, notes))
    if (tokenizer_dir / "LICENSE").is_file():
        shutil.copyfile(tokenizer_dir / "LICENSE", directory / "LICENSE")
    else:
        write_text(directory / "LICENSE", _LICENSE)


_LICENSE = """These weights derive from the base model that README.md names, under its publisher's licence.
The files that mmrstraj-jax adds (configuration, chat template, model card) are under the Apache License 2.0,
https://www.apache.org/licenses/LICENSE-2.0
"""


def model_card(title: str, trained: AnyResConfig, served: AnyResConfig, notes: list[str]) -> str:
    """README.md; a table of visual-token counts where training and serving differ."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "tags: [remote-sensing, llava-onevision, mmrstraj]",
        "---",
        "",
        f"# {title}",
        "",
        "Exported by mmrstraj-jax (MM-RSTraj: LLaVA-OneVision with SigLIP and Qwen2.5) for "
        "transformers and vLLM.",
        f'Prompts are ChatML with the system line "{SYSTEM_MESSAGE}".',
        "Decode greedily: transformers does (generation_config.json), vLLM samples unless a request has "
        "`temperature` 0.",
        "",
    ]
    for note in notes:
        lines += [note, ""]
    if trained != served:
        lines += [
            "## Trained and served policies differ",
            "",
            f"Training reduced images with the policy `{_name(trained)}`. Neither transformers nor "
            "vLLM can express it:",
            f"they serve this model as `{_name(served)}`, so it sees other numbers of visual tokens "
            "than in training:",
            "",
            "| image | trained | served | ratio |",
            "|---|---|---|---|",
        ]
        # The difference of the two roundings shows in 34 of the 2.25 million sizes up to 1500: name one.
        for width, height in CARD_SIZES + ((1125, 1375),) * (trained.rounding != served.rounding):
            a, b = (anyres_plans.plan(width, height, policy).num_tokens for policy in (trained, served))
            lines.append(f"| {width} x {height} | {a:,} | {b:,} | {b / a:.2f} |")
        lines += ["", "Evaluate under the served policy before you rely on scores of the training run.", ""]
    return "\n".join(lines)


def _name(policy: AnyResConfig) -> str:
    name = f"tau {policy.tau:g}" if policy.policy == "tau" else policy.policy
    return name if policy.rounding == "hf" else f"{name}, rounding {policy.rounding}"
