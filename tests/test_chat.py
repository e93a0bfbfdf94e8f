"""The template, the label masks, and the tokenizer's control tokens."""

import json
import pathlib
import pickle
import types

import data_case
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrstraj_jax.config import MODEL_PRESETS, ModelConfig, TextConfig
from mmrstraj_jax.data import chat
from mmrstraj_jax.data.tokenizer import CONTROL_TOKENS, StreamDecoder, Tokenizer, bind_token_ids
from mmrstraj_jax.errors import UserError

CASES = json.loads((pathlib.Path(__file__).parent / "golden" / "label_mask.json").read_text())
CASES.pop("_note")
TOKENIZER = data_case.tokenizer()


def character_tokenizer():
    """The fake tokenizer of the golden file: newline 198, any other character 1000 + code point."""
    return types.SimpleNamespace(
        encode=lambda text: [198 if char == "\n" else 1000 + ord(char) for char in text],
        image_id=-200,
        im_start=151644,
        im_end=151645,
        newline_id=198,
    )


@pytest.mark.parametrize("name", CASES)
def test_original_labels_are_the_reference_s(name):
    case = CASES[name]
    kind = "text" if name == "text_only" else "image"
    ids, labels = chat.encode(case["conversation"], character_tokenizer(), "original", kind)
    assert ids.tolist() == case["input_ids"]
    assert labels.tolist() == case["labels"]


@pytest.mark.parametrize("name", CASES)
def test_clean_labels_are_the_answers_and_their_end(name):
    case = CASES[name]
    kind = "text" if name == "text_only" else "image"
    ids, labels = chat.encode(case["conversation"], character_tokenizer(), "clean", kind)
    text = "".join(
        {198: "\n", 151645: "|"}.get(token, chr(max(token - 1000, 32))) for token in labels if token > 0
    )
    answers = [turn["value"] for turn in case["conversation"] if turn["from"] == "gpt"]
    assert text == "".join(f"{answer}|" for answer in answers)
    assert ((labels == chat.IGNORE) | (labels == ids)).all()


def test_first_turn_that_is_not_the_human_s_is_dropped():
    conversation = [{"from": "gpt", "value": "Welcome."}, *CASES["single"]["conversation"]]
    assert chat.encode(conversation, character_tokenizer())[0].tolist() == CASES["single"]["input_ids"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<image>\nA?", "<image>\nA?"),
        ("A? <image>", "<image>\nA?"),
        ("  A <image> b ", "<image>\nA  b"),
        ("\n<image>", "<image>"),
        ("a <image> b <image>", "a <image> b <image>"),
        ("no slot", "no slot"),
    ],
)
def test_clean_up_moves_a_single_slot_to_the_front(text, expected):
    assert chat.clean_up(text) == expected


def test_turns_are_checked():
    for turn in (
        {"from": "robot", "value": "x"},
        {"from": "human"},
        {"from": "human", "value": 3},
        {"from": []},
    ):
        with pytest.raises(UserError, match="turn 0"):
            chat.turns_of([turn])


def text_of(ids):
    return TOKENIZER.decode(ids, skip_special=False)


def test_rendering_with_a_real_tokenizer():
    conversation = [{"from": "human", "value": "How many?<image>"}, {"from": "gpt", "value": "Two."}]
    ids, labels = chat.encode(conversation, TOKENIZER)
    assert text_of(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nHow many?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
    )
    assert (ids == TOKENIZER.image_id).sum() == 1
    assert (labels[ids == TOKENIZER.image_id] == chat.IGNORE).all()
    clean = chat.encode(conversation, TOKENIZER, "clean")[1]
    assert text_of(clean[clean != chat.IGNORE]) == "Two.<|im_end|>"


@pytest.mark.parametrize("answer", ["\nTwo", "\n\nTwo", " Two", "assistant\n", "Two\n", "é😀"])
def test_clean_mask_with_answers_that_merge_with_the_header(answer):
    ids, labels = chat.encode(
        [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}], TOKENIZER, "clean"
    )
    assert text_of(labels[labels != chat.IGNORE]).endswith(f"{answer}<|im_end|>")
    assert ids[np.flatnonzero(labels != chat.IGNORE)[-1]] == TOKENIZER.im_end


CONTROL = (*CONTROL_TOKENS, "<image>", "<video>")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*CONTROL, "a", " ", "\n", "<|im_", "end|>", "é"]), max_size=8).map("".join))
def test_control_tokens_in_user_text_are_text(text):
    special = [TOKENIZER.im_start, TOKENIZER.im_end, TOKENIZER.pad_id, TOKENIZER.image_id, TOKENIZER.video_id]
    assert not np.isin(TOKENIZER.encode(text), special).any()
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    conversation = [{"from": "human", "value": text}, {"from": "gpt", "value": f"Yes. {text}"}]
    ids = chat.encode(conversation, TOKENIZER, kind="text")[0]
    assert np.isin(ids, special).sum() == 6  # three turns, each one start and one end
    ids = chat.prompt([{"role": "user", "content": [{"type": "text", "text": text}]}], TOKENIZER)
    assert np.isin(ids, special).sum() == 5


def test_an_answer_cannot_open_a_slot():
    conversation = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "It says <image>."}]
    assert (chat.encode(conversation, TOKENIZER)[0] == TOKENIZER.image_id).sum() == 1


def test_prompt_is_the_beginning_of_the_training_text():
    conversation = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "Two."}]
    training = chat.encode(conversation, TOKENIZER)[0]
    for content in (
        "<image>\nHow many?",
        "How many? <image>",
        [{"type": "text", "text": "How many?"}, {"type": "image"}],
    ):
        prompt = chat.prompt([{"role": "user", "content": content}], TOKENIZER)
        np.testing.assert_array_equal(prompt, training[: len(prompt)])
        assert text_of(prompt).endswith("<|im_start|>assistant\n")


def test_prompt_with_history_and_own_system_message():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": "B."},
        {"role": "user", "content": "C?"},
    ]
    assert text_of(chat.prompt(messages, TOKENIZER)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image><image>\nA?<|im_end|>\n"
        "<|im_start|>assistant\nB.<|im_end|>\n<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "x"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "system", "content": None}, {"role": "user", "content": "x"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "audio"}]}],
        [{"role": "system", "content": [{"type": "image"}]}, {"role": "user", "content": "x"}],
        [{"role": "user", "content": "x"}, "y"],
        [
            {"role": "user", "content": "x"},
            {"role": "system", "content": "y"},
            {"role": "user", "content": "z"},
        ],
    ],
)
def test_impossible_prompts_are_refused(messages):
    with pytest.raises(UserError):
        chat.prompt(messages, TOKENIZER)


def test_a_system_message_may_be_parts_and_counts_as_message_0():
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    asked = {"role": "user", "content": "A?"}
    plain = chat.prompt([{"role": "system", "content": "Be brief."}, asked], TOKENIZER)
    np.testing.assert_array_equal(chat.prompt([system, asked], TOKENIZER), plain)
    with pytest.raises(UserError, match="message 2: content is neither"):
        chat.prompt(
            [system, asked, {"role": "assistant", "content": 3}, asked],
            TOKENIZER,
        )


# ---- the tokenizer


def test_slot_tokens_get_the_next_free_ids():
    """Qwen2's 3 added tokens give 151646, Qwen2.5's 22 give 151665: one after the largest."""
    library = data_case.bpe()
    largest = max(library.get_vocab().values())
    assert (TOKENIZER.image_id, TOKENIZER.video_id) == (largest + 1, largest + 2)
    more = Tokenizer.from_library(data_case.bpe(extra=("<|object_ref_start|>", "<|box_start|>")))
    assert more.image_id == largest + 3
    known = data_case.bpe(extra=("<image>", "<tool>"))
    found = Tokenizer.from_library(known)
    assert found.image_id == known.token_to_id("<image>") and found.video_id == found.image_id + 2


def test_slot_token_that_is_not_marked_special_is_still_no_text():
    library = data_case.bpe()
    library.add_tokens([tokenizers.AddedToken("<image>", special=False)])
    found = Tokenizer.from_library(library)
    assert found.image_id not in found.encode("an <image> tag")


def test_control_tokens_by_name():
    library = data_case.bpe()
    assert TOKENIZER.im_end == library.token_to_id("<|im_end|>")
    assert TOKENIZER.eos_ids == (TOKENIZER.im_end, library.token_to_id("<|endoftext|>"))
    assert TOKENIZER.pad_id == library.token_to_id("<|endoftext|>")
    assert TOKENIZER.decode([TOKENIZER.newline_id]) == "\n"


def test_tokenizers_that_cannot_serve_are_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(UserError, match="not a tokenizer definition"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{\x00}\x00")
    with pytest.raises(UserError, match="tokenizer.json: not UTF-8"):
        Tokenizer.load(tmp_path)
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(UserError, match=r"<\|im_start\|>"):
        Tokenizer.from_library(bare)
    with pytest.raises(UserError, match="Unicode"):
        TOKENIZER.encode("\ud800")


def test_saved_and_pickled_tokenizers_are_the_same(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer")
    text = "Two roads <|im_end|> and\n\n<image> é"
    for other in (Tokenizer.load(tmp_path / "tokenizer"), pickle.loads(pickle.dumps(TOKENIZER))):
        assert other.encode(text) == TOKENIZER.encode(text)
        assert other.fingerprint == TOKENIZER.fingerprint
        assert (other.image_id, len(other)) == (TOKENIZER.image_id, len(TOKENIZER))


def qwen2_files(folder, settings_=None):
    library = data_case.bpe()
    library.model.save(str(folder))
    if settings_ is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings_))


def test_vocabulary_and_merges_are_read_as_qwen2(tmp_path):
    transformers = pytest.importorskip("transformers")
    qwen2_files(tmp_path)
    mine = Tokenizer.load(tmp_path)
    assert "Qwen2's byte-level BPE" in mine.source
    theirs = transformers.Qwen2Tokenizer(
        vocab=str(tmp_path / "vocab.json"),
        merges=str(tmp_path / "merges.txt"),
        extra_special_tokens=list(CONTROL_TOKENS),
    )
    for text in (
        "Two roads, isn't it?\n\n  12345 IT'S",
        "é😀 e\u0301 \r\n tab\t",
        "Ａ １２ 道路。\n",
        "a" * 50,
    ):
        assert mine.encode(text) == theirs.encode(text), text


def test_added_tokens_of_the_configuration_keep_their_ids(tmp_path):
    first = data_case.bpe().get_vocab_size(with_added_tokens=False)
    names = [*CONTROL_TOKENS, "<|box_start|>", "<tool_call>"]
    added = {
        str(first + at): {"content": name, "special": name != "<tool_call>"} for at, name in enumerate(names)
    }
    qwen2_files(tmp_path, {"added_tokens_decoder": added})
    found = Tokenizer.load(tmp_path)
    assert found.pad_id == first and found.image_id == first + 5
    assert first + 3 not in found.encode("<|box_start|>")
    gap = {str(first + 9): {"content": "<|endoftext|>", "special": True}}
    qwen2_files(tmp_path, {"added_tokens_decoder": gap})
    with pytest.raises(UserError, match="gap"):
        Tokenizer.load(tmp_path)
    for settings_ in ("{broken", "[]", '{"added_tokens_decoder": {"x": {}}}'):
        (tmp_path / "tokenizer_config.json").write_text(settings_)
        with pytest.raises(UserError, match="tokenizer_config.json: not a tokenizer's settings"):
            Tokenizer.load(tmp_path)


def test_stream_never_breaks_a_character():
    text = "Zwei Straßen é 😀 道路 und <|im_end|>"
    ids = TOKENIZER.encode(text)
    stream, parts = StreamDecoder(TOKENIZER), []
    for number in ids:
        parts.append(stream.push(number))
        assert "\ufffd" not in parts[-1]
    assert "".join(parts) + stream.finish() == text
    assert "" in parts  # some characters take several tokens
    stream = StreamDecoder(TOKENIZER)
    assert stream.push(TOKENIZER.encode("😀")[0]) == "" and stream.finish() == "\ufffd"


def test_decode_equals_the_library_and_skips_control_tokens():
    ids = [TOKENIZER.im_start, *TOKENIZER.encode("Two  roads é"), TOKENIZER.im_end, 10_000]
    assert TOKENIZER.decode(ids) == "Two  roads é"
    assert TOKENIZER.decode(ids, skip_special=False) == "<|im_start|>Two  roads é<|im_end|>"


def test_ids_are_bound_to_the_model():
    tiny = MODEL_PRESETS["tiny"]
    bound = bind_token_ids(tiny, TOKENIZER)
    assert bound.image_token_id == TOKENIZER.image_id and bound.eos_token_ids == TOKENIZER.eos_ids
    assert bound.pad_token_id == TOKENIZER.pad_id and bound.text == tiny.text
    assert bind_token_ids(bound, TOKENIZER) == bound
    with pytest.raises(UserError, match="config says 5"):
        bind_token_ids(ModelConfig(image_token_id=5), TOKENIZER)
    with pytest.raises(UserError, match="embedding rows"):
        bind_token_ids(ModelConfig(text=TextConfig(vocab_size=300)), TOKENIZER)
