"""What we export is what transformers loads, and the reverse: same tensors, logits, greedy ids, prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import weights_case as case
from PIL import Image
from safetensors.numpy import load_file

from mmrstraj_jax.api import Model
from mmrstraj_jax.config import LoRAConfig
from mmrstraj_jax.data import anyres, chat, images
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.models.lora import add_lora, train_in_full
from mmrstraj_jax.weights import export, native
from mmrstraj_jax.weights.load import LoadedModel, load_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

REFERENCE = Path(__file__).parent / "parity" / "hf_reference.py"
LORA = LoRAConfig(rank=2, alpha=4.0, dropout=0.0, language_model=("q_proj", "down_proj"))
LORA_OF_TEXT = LoRAConfig(rank=2, vision_tower=(), projector=(), language_model=("q_proj",))


def with_adapters(loaded: LoadedModel, seed: int = 0) -> LoadedModel:
    """The model with random non-zero adapters on tower, projector and language model."""
    add_lora(loaded.model, LORA, jax.random.key(seed))
    random = np.random.default_rng(seed)
    from flax import nnx

    for _, module in nnx.iter_modules(loaded.model):
        if getattr(module, "lora_B", None) is not None:
            module.lora_B[...] = jax.numpy.asarray(
                0.3 * random.standard_normal(module.lora_B.shape), np.float32
            )
    return loaded


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_to_ours_and_back_is_bit_identical(tied, tmp_path):
    """A random model of transformers, saved by it; our export holds the same bits and it loads them all."""
    config = transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**case.text_json(tied), pad_token_id=260, eos_token_id=262),
        vision_config=transformers.SiglipVisionConfig(**case.vision_json(), vision_use_head=False),
        image_token_index=case.IMAGE_ID,
        video_token_index=case.VIDEO_ID,
        image_grid_pinpoints=case.PINPOINTS,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    theirs = transformers.LlavaOnevisionForConditionalGeneration(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    case.tokenizer(tmp_path / "theirs", slots=True)
    loaded = load_model(tmp_path / "theirs", dtype="source")
    assert loaded.config.text.tie_word_embeddings is tied
    export.export_hf(
        loaded.model,
        loaded.config,
        loaded.anyres,
        tmp_path / "ours",
        tokenizer_dir=loaded.tokenizer_dir,
        unused=loaded.unused,
    )
    again, info = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    wanted, found = theirs.state_dict(), again.state_dict()
    assert wanted.keys() == found.keys()
    assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in wanted.items())
    # and once more through our own format
    native.save(loaded.model, loaded.config, loaded.anyres, tmp_path / "n", unused=loaded.unused)
    second = load_model(tmp_path / "n")
    export.export_hf(
        second.model,
        second.config,
        second.anyres,
        tmp_path / "again",
        tokenizer_dir=loaded.tokenizer_dir,
        unused=second.unused,
    )
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again"))
    assert a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def request(loaded: LoadedModel, path: Path) -> tuple[list[int], Image.Image]:
    """A prompt with one wide image for both sides; the other side gets pixels and expanded ids."""
    random = np.random.default_rng(3)
    image = Image.fromarray(random.integers(0, 256, (40, 90, 3), dtype=np.uint8))
    plan = anyres.plan(*image.size, loaded.anyres)
    views = images.views(image, plan, loaded.anyres.view_size)
    tokenizer = Tokenizer.load(loaded.tokenizer_dir)
    ids = chat.prompt([{"role": "user", "content": "<image>\nthe thin anthem"}], tokenizer).tolist()
    at = ids.index(case.IMAGE_ID)
    expanded = ids[:at] + [case.IMAGE_ID] * plan.num_tokens + ids[at + 1 :]
    pixels = (views.astype(np.float32).transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5
    np.savez(path, input_ids=expanded, pixel_values=pixels, image_sizes=[image.height, image.width])
    return ids, image


def reference(python: str, *args: object) -> list[dict]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, str(REFERENCE), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check_exports(tmp_path: Path, python: str, runtime: str, tied: bool) -> dict:
    """Merged export, and PEFT adapter on the exported base: logits within 1e-4, the same greedy ids."""
    base = case.model(tmp_path / "hub", tied)
    assert not any("lora" in path for path in native.leaves(base.model))
    give = {"tokenizer_dir": base.tokenizer_dir, "unused": base.unused}
    export.export_hf(base.model, base.config, base.anyres, tmp_path / "base", **give)
    loaded = with_adapters(base)
    done = export.export_hf(loaded.model, loaded.config, loaded.anyres, tmp_path / "merged", **give)
    assert done.num_merged == 6 * 3 + 2 + 2 * 2 and done.num_unchanged == 0
    export.export_peft(
        loaded.model,
        loaded.config,
        loaded.anyres,
        LORA,
        tmp_path / "adapter",
        base=str(tmp_path / "base"),
        runtime=runtime,
    )
    ids, image = request(loaded, tmp_path / "request.npz")
    ours = Model(loaded.model, loaded.config, loaded.anyres, Tokenizer.load(loaded.tokenizer_dir))
    logits = ours.logits(ids, images=[image])
    greedy = ours.generate(ids, images=[image], max_new_tokens=8)
    folders = (tmp_path / "merged", f"{tmp_path}/base+{tmp_path}/adapter", tmp_path / "base")
    merged, adapted, plain = reference(python, tmp_path / "request.npz", *folders)
    for found in (merged, adapted):
        assert found["problems"] == {}
        np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
        assert found["greedy"][: len(greedy)] == greedy
    assert adapted["adapted"] == done.num_merged
    assert np.abs(np.array(plain["logits"]) - logits).max() > 0.1  # the adapters matter
    return merged


def test_exports_give_the_same_logits_in_the_installed_transformers(tmp_path):
    pytest.importorskip("peft")
    check_exports(tmp_path, sys.executable, "5", tied=False)


@pytest.mark.slow
def test_exports_give_the_same_logits_in_transformers_4_57(tmp_path):
    """In an environment of its own, made with uv and the package index that pip uses."""
    python = os.environ.get("TRANSFORMERS_4_57_PYTHON")
    if python is None:
        python = str(tmp_path / "env" / "bin" / "python")
        packages = ["transformers==4.57.6", f"torch=={torch.__version__}", "peft", "pillow"]
        for command in (["venv", tmp_path / "env"], ["pip", "install", "--python", python, *packages]):
            done = subprocess.run(["uv", *map(str, command)], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"uv {command[0]} failed: {done.stderr[-200:]}; set TRANSFORMERS_4_57_PYTHON")
    found = check_exports(tmp_path, python, "4.57", tied=True)
    assert found["version"].startswith("4.57")


@pytest.mark.parametrize("lora", [LoRAConfig(rank=2, vision_tower=(), projector=()), LORA_OF_TEXT], ids=str)
def test_peft_loads_a_projector_trained_in_full(lora, tmp_path):
    """With adapters beside it, and alone as stage 0 trains it: PEFT refuses an empty list of targets."""
    peft = pytest.importorskip("peft")
    base = case.model(tmp_path / "hub")
    sizes = base.config, base.anyres
    export.export_hf(base.model, *sizes, tmp_path / "base", tokenizer_dir=base.tokenizer_dir)
    train_in_full(base.model, ["projector"])
    add_lora(base.model, lora, jax.random.key(0))
    base.model.multi_modal_projector.linear_1.weight[...] += 1
    how = {"base": str(tmp_path / "base"), "train_full": ("projector",)}
    export.export_peft(base.model, *sizes, lora, tmp_path / "adapter", **how)
    theirs = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload()
    found = merged.model.multi_modal_projector.linear_1.weight.detach().numpy()
    np.testing.assert_array_equal(found, base.model.multi_modal_projector.linear_1.weight)


def test_a_tokenizer_that_transformers_5_wrote_is_exported_for_4_57_too(tmp_path):
    """5 writes a class and a list that 4.57, and vLLM with it, cannot read."""
    loaded = case.model(tmp_path / "hub")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "hub" / "tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    theirs.save_pretrained(tmp_path / "five")
    written = json.loads((tmp_path / "five" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "TokenizersBackend"
    assert written["extra_special_tokens"] == ["<|im_start|>"]
    given = {"tokenizer_dir": tmp_path / "five"}
    export.export_hf(loaded.model, loaded.config, loaded.anyres, tmp_path / "out", **given)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_start|>"]
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]  # no token_type_ids, as Qwen's
    assert not isinstance(settings.get("extra_special_tokens", {}), list)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.all_special_tokens == theirs.all_special_tokens


# ---- prompts and counts ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    loaded = case.model(path / "hub")
    export.export_hf(
        loaded.model, loaded.config, loaded.anyres, path / "out", tokenizer_dir=loaded.tokenizer_dir
    )
    return path / "out"


def conversations() -> list[list[dict]]:
    """20 conversations: one to five turns, one or no image, odd white space, other scripts."""
    words = [
        "the",
        "thin",
        "  anthem",
        "at\n\nnight",
        "Straße",
        "桥在哪里?",
        "is 12 a bridge?\n",
        "\tno",
        "{{ x }}",
        "'",
    ]
    random, out = np.random.default_rng(0), []
    for number in range(20):
        turns = []
        for turn in range(2 * random.integers(1, 4) - number % 2):
            text = " ".join(random.choice(words, random.integers(1, 7)))
            role = ("user", "assistant")[turn % 2]
            turns.append({"role": role, "content": f"<image>\n{text}" if turn == 0 and number % 3 else text})
        out.append(turns)
    return out


@pytest.mark.parametrize("number", range(20))
def test_exported_template_gives_our_ids(folder, number):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, messages = Tokenizer.load(folder), conversations()[number]
    if messages[-1]["role"] == "user":
        found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert found == chat.prompt(messages, ours).tolist()
        typed = [{**m, "content": parts(m["content"])} for m in messages]
        found = theirs.apply_chat_template(typed, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert found == chat.prompt(typed, ours).tolist()
        with_system = [{"role": "system", "content": "Be brief."}, *messages]
        found = theirs.apply_chat_template(with_system, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert found == chat.prompt(with_system, ours).tolist()
    else:
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, labels = chat.encode(messages, ours, mask="clean")
        assert found["input_ids"] == ids.tolist()
        assert found["assistant_masks"] == (labels != chat.IGNORE).astype(int).tolist()


def test_images_and_videos_come_first_in_any_number(folder):
    """Lists of parts, several slots among the texts, as an engine hands them on."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    kinds = {"i": {"type": "image"}, "v": {"type": "video"}, "t": {"type": "text", "text": "a thin"}}
    for order in ("t", "i", "it", "ti", "iit", "tit", "vt", "vit", "tt", "itt", "ivtit"):
        messages = [{"role": "user", "content": [kinds[kind] for kind in order]}]
        found = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        turn = "<image>" * order.count("i") + "<video>" * order.count("v")
        turn += "\n" * (turn != "" and "t" in order) + "\n".join(["a thin"] * order.count("t"))
        assert f"user\n{turn}<|im_end|>\n" in found
        if "v" not in order:
            ids = theirs.encode(found, add_special_tokens=False)
            assert ids == chat.prompt(messages, ours).tolist()


def test_vllm_sees_that_the_template_takes_parts(folder):
    """It looks for a loop over message['content'], filters aside; without one it gives the template a string
    in which each slot is a line of its own, which is not the training layout of several images.
    """
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = (folder / "chat_template.jinja").read_text()
    found = []
    for loop in _compile_jinja_template(template).environment.parse(template).find_all(nodes.For):
        over = loop.iter
        while isinstance(over, nodes.Filter):
            over = over.node
        if isinstance(over, nodes.Getitem) and over.node.name == "message":
            found.append(over.arg.value)
    assert "content" in found


LONE = [
    "What is <image> this?",
    "What?\n<image>",
    "  <image> x ",
    "a <image> b <image>",
    "<image> x",
    "a<image>",
]


@pytest.mark.parametrize("text", LONE)
def test_a_lone_image_in_the_middle_moves_to_the_front(folder, text):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "an <image> b"}]
    messages = (
        [{"role": "user", "content": text}]
        if text == LONE[0]
        else messages[:1]
        + [
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": text},
        ]
    )
    found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert found == chat.prompt(messages, ours).tolist()


def test_tokens_that_are_not_special_stay_so(tmp_path):
    """Qwen's <tool_call> is ordinary text to skip_special_tokens; here only tokenizer.json says so."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    loaded = case.model(tmp_path / "hub")
    path = tmp_path / "hub" / "tokenizer.json"
    library = Library.from_file(str(path))
    library.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    library.save(str(path))
    given = {"tokenizer_dir": loaded.tokenizer_dir}
    export.export_hf(loaded.model, loaded.config, loaded.anyres, tmp_path / "out", **given)
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
        Tokenizer.load(tmp_path / "out"),
    )
    ids = [*ours.encode("a<tool_call>b"), ours.im_end]
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == "a<tool_call>b"


def parts(text: str) -> list[dict]:
    if text.startswith("<image>\n"):
        return [{"type": "image"}, {"type": "text", "text": text.removeprefix("<image>\n")}]
    return [{"type": "text", "text": text}]


@pytest.fixture(scope="module")
def processor(folder):
    """The real LlavaOnevisionProcessor on the exported files, without a video processor.

    transformers needs torchvision to build a video processor only, so that AutoProcessor fails without it;
    nothing that still images pass through does.
    """
    from transformers import LlavaOnevisionProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    class WithoutVideos(LlavaOnevisionProcessor):
        def check_argument_for_proper_class(self, name, value):
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, value)

    settings = json.loads((folder / "processor_config.json").read_text())
    names = ("num_image_tokens", "vision_feature_select_strategy", "vision_aspect_ratio")
    return WithoutVideos(
        LlavaOnevisionImageProcessorPil.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
        None,
        chat_template=(folder / "chat_template.jinja").read_text(),
        **{name: settings[name] for name in names},
    )


def test_exported_processor_gives_our_ids_and_views(folder, processor):
    """20 conversations, an image of another size each: expanded ids, token count, pixels."""
    policy, ours, random = load_model(folder).anyres, Tokenizer.load(folder), np.random.default_rng(0)
    sizes = [(1, 90), (90, 1), (28, 28), *random.integers(1, 300, (17, 2)).tolist()]
    for (width, height), messages in zip(sizes, conversations(), strict=True):
        messages = messages[: len(messages) - (messages[-1]["role"] == "assistant")]
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        text = processor.apply_chat_template(
            [{**m, "content": parts(m["content"])} for m in messages], add_generation_prompt=True
        )
        has_image = "<image>" in text
        found = processor(images=[image] if has_image else None, text=text, return_tensors="np")
        plan = anyres.plan(width, height, policy)
        ids = []
        for number in chat.prompt(messages, ours).tolist():
            ids += [number] * (plan.num_tokens if number == case.IMAGE_ID else 1)
        assert found["input_ids"][0].tolist() == ids
        if has_image:
            views = images.views(image, plan, 28).transpose(0, 3, 1, 2)
            np.testing.assert_allclose(found["pixel_values"][0], (views / 255 - 0.5) / 0.5, atol=1e-6)


def test_exported_settings_load_and_mean_what_ours_mean(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert config.text_config.rope_parameters["rope_theta"] == 1e6 and config.text_config.hidden_size == 24
    assert (config.image_token_index, config.vision_feature_layer, config.tie_word_embeddings) == (
        263,
        -1,
        True,
    )
    assert generation.eos_token_id == [262, 260] and generation.do_sample is False
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    expected = {
        "config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
        "processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "README.md", "LICENSE",
        "model.safetensors",
    }  # fmt: skip
    assert {path.name for path in folder.iterdir()} == expected
