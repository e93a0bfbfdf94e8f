"""Decoding, sampling and batching on a random tiny model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from inference_samples import CONFIG, IMAGE, TAU, VIDEO, random_model, with_text
from PIL import Image

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.inference import decoding, prompts
from mmrstraj_jax.inference.engine import Engine
from mmrstraj_jax.inference.options import DecodeOptions
from mmrstraj_jax.inference.prompts import Request
from mmrstraj_jax.inference.sampling import SamplingValues, filter_logits, next_tokens

SIZES = [(50, 50), (30, 56), (100, 40)]


@pytest.fixture(scope="module")
def model():
    return random_model()


def picture(number: int) -> Image.Image:
    width, height = SIZES[number]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def requests() -> list[Request]:
    """Prompts of different lengths: one image, none, two, a video."""
    return [
        Request([1, IMAGE, 5, 7, 9], [picture(1)]),
        Request([4, 4, 8]),
        Request([2, IMAGE, IMAGE, 3], [picture(0), picture(2)]),
        Request([6, VIDEO, 11, 12, 13, 14, 15], videos=[np.full((2, 40, 30, 3), 77, np.uint8)]),
    ]


def engine(model, eos: tuple[int, ...] = (), batch_size: int = 4) -> Engine:
    return Engine(model, dataclasses.replace(CONFIG, eos_token_ids=eos), TAU, batch_size=batch_size)


def answers(built: Engine, asked: list[Request], options: DecodeOptions) -> list[list[int]]:
    found = sorted(built.complete(asked, options))
    assert [done.index for done in found] == list(range(len(asked)))
    return [done.ids for done in found]


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, inputs):
    model = nnx.merge(graphdef, params)
    return model.logits(model.hidden_states(inputs))


def full_forward(model, asked: list[Request], count: int, penalty: float) -> list[list[int]]:
    """Greedy ids by the definition: whole sequences again for each token, penalty and argmax in NumPy."""
    examples = [prompts.read(request, CONFIG, TAU) for request in asked]
    inputs = prompts.model_batch(examples, CONFIG, TAU, length_multiple=64)
    graphdef, params = nnx.split(model)
    lengths, written = [len(example.input_ids) for example in examples], [[] for _ in asked]
    for step in range(count):
        all_logits = np.array(forward(graphdef, params, inputs))
        inputs = inputs._replace(input_ids=inputs.input_ids.copy())
        for row, (request, ids) in enumerate(zip(asked, written, strict=True)):
            logits = all_logits[row, lengths[row] + step - 1]
            for seen in {*request.ids, *ids}:
                logits[seen] = logits[seen] * penalty if logits[seen] < 0 else logits[seen] / penalty
            ids.append(int(logits.argmax()))
            inputs.input_ids[row, lengths[row] + step] = ids[-1]
    return written


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_prefill_and_decode_equal_the_full_forward(model, penalty):
    options = DecodeOptions(max_new_tokens=12, repetition_penalty=penalty)
    assert answers(engine(model), requests(), options) == full_forward(model, requests(), 12, penalty)


def test_a_decoder_of_one_layer_writes_too():
    """Prefill runs no layer before its last one."""
    config = with_text(num_hidden_layers=1)
    model, options = random_model(config), DecodeOptions(max_new_tokens=4)
    found = answers(Engine(model, config, TAU, batch_size=4), requests(), options)
    assert found == full_forward(model, requests(), 4, 1.0)


def test_a_batch_of_different_prompts_equals_its_singles(model):
    options = DecodeOptions(max_new_tokens=40)  # longer than one chunk
    singles = [answers(engine(model), [request], options)[0] for request in requests()]
    assert answers(engine(model), requests(), options) == singles


def test_end_tokens_and_budgets_are_each_rows_own(model):
    options = DecodeOptions(max_new_tokens=10)
    free = answers(engine(model), requests(), options)
    eos = free[0][4]
    asked = [dataclasses.replace(request, max_new_tokens=3 + at) for at, request in enumerate(requests())]
    for done in engine(model, eos=(eos,)).complete(asked, options):
        expected = free[done.index][: 3 + done.index]
        stopped = eos in expected
        assert done.ids == (expected[: expected.index(eos) + 1] if stopped else expected)
        assert done.reason == ("stop" if stopped else "length")


def test_short_answers_come_first(model):
    asked = [dataclasses.replace(requests()[1], max_new_tokens=count) for count in (80, 2, 40)]
    order = [done.index for done in engine(model).complete(asked, DecodeOptions())]
    assert order == [1, 2, 0]


def test_streaming_gives_the_same_ids(model):
    built, options = engine(model, eos=(17,)), DecodeOptions(max_new_tokens=9)
    for request in requests():
        assert list(built.stream(request, options)) == answers(built, [request], options)[0]


def test_a_frame_that_lacks_shows_before_the_first_answer(model):
    """Not when its batch is due, hours later."""
    asked = [Request([IMAGE], [picture(2)]), Request([VIDEO], videos=[[picture(0), "missing.png"]])]
    with pytest.raises(UserError, match="missing.png: no such image"):
        next(engine(model, batch_size=1).complete(asked, DecodeOptions(max_new_tokens=1)))


def test_a_prompt_that_is_too_long_is_refused_before_its_frames_are_decoded(model, monkeypatch):
    monkeypatch.setattr(prompts, "read", lambda *_, **__: pytest.fail("decoded"))
    request = Request([6, VIDEO, 9], videos=[[picture(0)] * 200])
    with pytest.raises(UserError, match="tokens with its visual ones, more than the model's 512"):
        next(engine(model).stream(request, DecodeOptions()))


def test_samples_depend_on_seed_and_number_but_not_on_neighbours(model):
    prompt = requests()[1]
    options = DecodeOptions(max_new_tokens=10, temperature=1.5, top_k=40, top_p=0.95)

    def sampled(numbers: list[int], options: DecodeOptions = options) -> list[list[int]]:
        asked = [dataclasses.replace(prompt, number=number) for number in numbers]
        return answers(engine(model), asked, options)

    found = sampled([0, 1, 2, 3])
    assert len({tuple(ids) for ids in found}) == 4
    assert sampled([7, 2, 9, 0])[1::2] == [found[2], found[0]]
    assert answers(engine(model), [prompt] * 4, options) == found
    assert sampled([0, 1, 2, 3], dataclasses.replace(options, seed=1)) != found


def test_questions_about_one_image_share_its_tower_pass(model, monkeypatch):
    """Seven prompts about two pictures and a video: the same answers as one by one, from fewer views."""
    video = [np.full((2, 40, 30, 3), 77, np.uint8)]
    first, second = picture(0), picture(2)
    asked = [Request([1, IMAGE, 5 + at], [first]) for at in range(3)]
    asked += [Request([2, IMAGE, 3 + at], [second]) for at in range(2)]
    asked += [Request([2, IMAGE, IMAGE, 3], [second, first]), Request([6, VIDEO, 9], videos=video)]
    options, rows = DecodeOptions(max_new_tokens=6), []
    singles = [answers(engine(model), [request], options)[0] for request in asked]
    shared = prompts.share_views

    def watched(*args):
        inputs = shared(*args)
        rows.append((len(inputs.views), len(inputs.input_ids)))
        return inputs

    monkeypatch.setattr(prompts, "share_views", watched)
    assert answers(engine(model, batch_size=4), asked, options) == singles
    assert rows == [(2, 4), (4, 4)]  # the second picture has the most views
    rows.clear()
    assert answers(engine(model, batch_size=8), asked, options) == singles
    assert rows == [(4, 8)]


def test_few_programs_serve_many_prompts(model):
    programs = decoding._prefill, decoding._decode
    before = [program._cache_size() for program in programs]
    asked = [Request([1] * count) for count in range(1, 60, 5)]
    for penalty in (1.0, 1.1):
        answers(engine(model), asked, DecodeOptions(max_new_tokens=20, repetition_penalty=penalty))
    # twelve lengths, in batches of four rows
    assert all(program._cache_size() - known <= 1 for program, known in zip(programs, before, strict=True))


def reference_filter(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Ids that HF's TopKLogitsWarper and TopPLogitsWarper keep, by their definition."""
    logits = logits.astype(np.float64)
    order = [int(at) for at in np.argsort(-logits)][: top_k or None]
    probabilities = np.exp(logits[order] - logits.max())
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    return {at for at, mass in zip(order, before, strict=True) if mass < top_p - 1e-12}


@pytest.mark.parametrize("top_k", [0, 1, 5, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_top_k_and_top_p_keep_what_hf_keeps(top_k, top_p):
    for seed in range(5):
        logits = np.random.default_rng(seed).standard_normal(50).astype(np.float32) * 3
        kept = jax.jit(filter_logits)(jnp.asarray(logits), jnp.int32(top_k), jnp.float32(top_p))
        assert set(np.flatnonzero(np.isfinite(kept)).tolist()) == reference_filter(logits, top_k, top_p)


def test_of_equal_logits_top_p_keeps_as_many_as_the_mass_allows():
    """HF's TopPLogitsWarper cuts by place in the sorted order: of four equal tokens two hold 0.4."""
    kept = filter_logits(jnp.array([1.0, 1.0, -9.0, 1.0, 1.0]), jnp.int32(0), jnp.float32(0.4))
    assert np.isfinite(kept).sum() == 2 and not np.isfinite(kept[2])
    kept = filter_logits(jnp.array([1.0, 0.0, 0.0]), jnp.int32(2), jnp.float32(1.0))
    assert np.isfinite(kept).all()  # top_k keeps all that equal the k-th, as HF's TopKLogitsWarper does


def test_samples_follow_the_softmax_at_the_temperature():
    options = DecodeOptions(temperature=2.0)
    logits = np.array([2.0, 0.0, -1.0, 1.0], np.float32)
    keys = decoding.row_keys(0, range(20000))
    rows = jnp.broadcast_to(logits, (20000, 4))
    seen = jnp.zeros((20000, 4), bool)
    drawn = next_tokens(rows, seen, keys, SamplingValues.of(options), greedy=False, filtered=False)
    expected = np.exp(logits / 2) / np.exp(logits / 2).sum()
    # five standard deviations of a count
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20000, expected, atol=5 * 0.5 / 20000**0.5)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"top_p": 0.0, "temperature": 1.0},
        {"top_k": -1},
        {"repetition_penalty": 0.0},
        {"max_new_tokens": 0},
        {"top_p": 0.9},  # greedy
        {"seed": -1},
        {"max_new_tokens": 2.5},
        {"top_k": 1.5, "temperature": 1.0},
        {"temperature": None},
    ],
)
def test_bad_options_are_named(values):
    with pytest.raises(UserError, match=next(iter(values))):
        DecodeOptions(**values)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1, 2], [picture(0)]), r"0 image slots for 1 images; expected one image id \(90\)"),
        (Request([IMAGE]), "1 image slots for 0 images"),
        (Request([VIDEO, IMAGE], [picture(0)]), "1 video slots for 0 videos"),
        (Request([96]), r"token ids 96..96, expected 0..95"),
        (Request([]), "not empty"),
        (Request([1] * 600), "600 tokens.*512 positions"),
        (Request([1] * 500), "500 prompt tokens and max_new_tokens 20"),
        (Request([IMAGE], ["missing.png"]), "missing.png: no such image"),
    ],
)
def test_bad_requests_are_named_before_anything_runs(model, request_, message):
    with pytest.raises(UserError, match=message):
        next(engine(model).complete([Request([1]), request_], DecodeOptions(max_new_tokens=20)))


def test_a_slot_id_behind_the_vocabulary_writes_the_same(model):
    """96 rows, <image> is 96: the id stands for no row, in the prompt as in the repetition penalty."""
    options = DecodeOptions(max_new_tokens=6, repetition_penalty=1.3)
    behind = dataclasses.replace(CONFIG, image_token_id=CONFIG.text.vocab_size)
    built = Engine(model, behind, TAU, batch_size=4)
    found = answers(built, [Request([1, behind.image_token_id, 5, 7, 9], [picture(1)])], options)
    # a seen <image> weakens only its own row, which the other vocabulary does not have: it is never best
    assert found == answers(engine(model), [Request([1, IMAGE, 5, 7, 9], [picture(1)])], options)
    assert IMAGE not in found[0]
