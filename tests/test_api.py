"""The Python API on a tiny checkpoint; against Hugging Face where torch is installed."""

import jax.numpy as jnp
import numpy as np
import pytest
import weights_case
from PIL import Image

import mmrstraj_jax
from mmrstraj_jax.config import AnyResConfig, Config, ImagePolicy
from mmrstraj_jax.data import anyres, images
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.weights.load import load_model

IMAGE, VIDEO = weights_case.IMAGE_ID, weights_case.VIDEO_ID
PNG = "tile.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An llava-hf folder whose weights are small enough to be tame."""
    where = tmp_path_factory.mktemp("hf")
    tensors = {name: 0.2 * value for name, value in weights_case.tensors().items()}
    weights_case.write_layout(where, "hub", tensors)
    picture(70, 40).save(where / PNG)
    return where


@pytest.fixture(scope="module")
def model(folder):
    return mmrstraj_jax.load(folder, dtype="float32")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_load_takes_policy_and_ids_from_the_folder(model, folder):
    assert model.anyres == load_model(folder).anyres
    assert model.anyres.policy == "anyres_max_9" and model.anyres.view_size == 28
    assert (model.config.image_token_id, model.config.video_token_id) == (IMAGE, VIDEO)
    assert model.tokenizer.image_id == IMAGE
    assert model.config.eos_token_ids == model.tokenizer.eos_ids


def test_dtypes_that_cannot_run_are_refused(folder, tmp_path):
    for dtype in ("bf17", "int8", np.int8, np.float64):
        with pytest.raises(UserError, match="dtype '.*': expected one of float32, bfloat16, float16, source"):
            mmrstraj_jax.load(folder, dtype=dtype)
    for dtype in (np.float32, np.dtype("float32"), jnp.float32, "bfloat16", jnp.bfloat16):
        mmrstraj_jax.load(folder, dtype=dtype)
    half = {name: value.astype(np.float16) for name, value in weights_case.tensors().items()}
    weights_case.write_layout(tmp_path, "hub", half)  # as llava-hf's are
    for dtype in ("source", "float16"):
        with pytest.raises(UserError, match="float16 does not run on a CPU"):
            mmrstraj_jax.load(tmp_path, dtype=dtype)


def test_a_projector_that_was_never_trained_is_refused(tmp_path):
    tensors = weights_case.tensors(tower_layers=4)
    tower = {f"vision_model.{key[6:]}": v for key, v in tensors.items() if key.startswith("tower|")}
    text = {f"model.{key[5:]}": v for key, v in tensors.items() if key.startswith("text|")}
    siglip = {"model_type": "siglip", "vision_config": weights_case.vision_json(4)}
    weights_case.write(tmp_path / "siglip", siglip, tower, with_tokenizer=False)
    weights_case.write(tmp_path / "qwen", weights_case.text_json(), text)
    with pytest.raises(UserError, match="the projector is fresh, its weights are random; run stage 0"):
        mmrstraj_jax.load(f"siglip={tmp_path / 'siglip'},qwen={tmp_path / 'qwen'},projector=fresh")


def test_anyres_may_be_overridden(folder, tmp_path):
    assert mmrstraj_jax.load(folder, anyres="tau").anyres == AnyResConfig().for_views(28, 14)
    # a name replaces the name alone
    config = weights_case.hf_json() | {"image_grid_pinpoints": [[28, 28], [28, 56], [56, 28]]}
    weights_case.write(tmp_path, config, weights_case.named(weights_case.tensors(), "hub"))
    few = mmrstraj_jax.load(tmp_path, anyres="anyres_max_4").anyres
    assert few.grid_pinpoints == ((28, 28), (28, 56), (56, 28)) and few.policy == "anyres_max_4"
    own = AnyResConfig("tau", tau=9.0).for_views(28, 14)
    assert mmrstraj_jax.load(folder, anyres=own).anyres == own
    with pytest.raises(UserError, match="views of 384 px.*the tower reads 28 px"):
        mmrstraj_jax.load(folder, anyres=AnyResConfig())


def test_one_question_a_list_and_a_stream_agree(model, folder):
    questions = ["Is there a bridge?", "How many?"]
    media = [[folder / PNG], [picture(28, 28), picture(40, 20)]]
    singles = [
        model.generate(text, images, max_new_tokens=8) for text, images in zip(questions, media, strict=True)
    ]
    assert all(isinstance(text, str) for text in singles)
    assert model.generate(questions, images=media, max_new_tokens=8) == singles
    assert model.generate([ask(text) for text in questions], images=media, max_new_tokens=8) == singles
    pieces = []
    assert model.generate(questions[0], media[0], max_new_tokens=8, stream=pieces.append) == singles[0]
    assert "".join(pieces) == singles[0]


def test_slots_may_be_written_or_left_out(model):
    pictures = [picture(28, 28), picture(40, 20)]
    by_hand = model.generate(ask("<image><image>\nWhat changed?"), images=pictures, max_new_tokens=4)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What changed?"}]
    assert model.generate("What changed?", images=pictures, max_new_tokens=4) == by_hand
    assert model.generate(ask(parts), images=pictures, max_new_tokens=4) == by_hand
    assert model.generate(ask(parts[2:]), images=pictures, max_new_tokens=4) == by_hand
    human = [{"role": "human", "content": "What changed?"}]
    assert model.generate(human, images=pictures, max_new_tokens=4) == by_hand


def test_a_video_is_frames_or_an_array(model):
    frames = [picture(30, 20, seed) for seed in range(3)]
    array = np.stack([np.asarray(frame) for frame in frames])
    found = model.generate("What moves?", videos=[array], max_new_tokens=4)
    assert model.generate("What moves?", videos=[frames], max_new_tokens=4) == found
    ids = [5, VIDEO, 7]
    logits = model.logits(ids, videos=[array])
    assert logits.shape == (2 + anyres.plan_video(3, model.anyres).num_tokens, model.config.text.vocab_size)
    np.testing.assert_array_equal(logits, model.logits(ids, videos=[frames]))


def test_an_image_may_be_an_array_or_the_content_of_a_file(model, folder):
    array, content = np.asarray(Image.open(folder / PNG)), (folder / PNG).read_bytes()
    expected = model.generate("What is this?", folder / PNG, max_new_tokens=4)
    for image in (array, [array], content, [content]):
        assert model.generate("What is this?", image, max_new_tokens=4) == expected
    known = model.features(folder / PNG)["packed"]
    np.testing.assert_array_equal(model.features(array)["packed"], known)
    np.testing.assert_array_equal(model.features([array])[0]["packed"], known)
    np.testing.assert_array_equal(
        model.logits([3, IMAGE], array), model.logits([3, IMAGE], images=[folder / PNG])
    )


def test_a_run_is_asked_with_the_image_policy_it_was_trained_with(tmp_path, folder, monkeypatch):
    from mmrstraj_jax.training import run

    exif = Image.Exif()
    exif[0x0112] = 6
    picture(70, 40).save(tmp_path / "turned.png", exif=exif)
    deep = np.linspace(0, 4000, 70 * 40).reshape(40, 70).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    (tmp_path / "base.json").write_text("{}")
    settings = Config(images=ImagePolicy(exif=True, deep="stretch"))

    def open_run(path, *, dtype):
        loaded = load_model(folder, dtype=dtype)
        beside = loaded.config, loaded.anyres, loaded.tokenizer_dir, {}
        return run.OpenRun(loaded.model, *beside, run_config=settings)

    monkeypatch.setattr(run, "open_run", open_run)
    trained, plain = mmrstraj_jax.load(tmp_path, dtype="float32"), mmrstraj_jax.load(folder, dtype="float32")
    upright = images.load(tmp_path / "turned.png", settings.images)
    assert upright.size == (40, 70)
    for name, same in (
        ("turned.png", upright),
        ("deep.png", images.load(tmp_path / "deep.png", settings.images)),
    ):
        for given in (tmp_path / name, Image.open(tmp_path / name)):
            expected = plain.logits([3, IMAGE, 9], [same])
            np.testing.assert_array_equal(trained.logits([3, IMAGE, 9], [given]), expected)
        found = trained.generate("What is this?", [tmp_path / name], max_new_tokens=4)
        assert found == plain.generate("What is this?", [same], max_new_tokens=4)
        packed = plain.features(same)["packed"]
        np.testing.assert_array_equal(trained.features(tmp_path / name)["packed"], packed)
    with pytest.raises(UserError, match="more than 8 bits.*in load"):
        plain.generate("What is this?", [tmp_path / "deep.png"])
    told = mmrstraj_jax.load(folder, dtype="float32", image_policy=settings.images)
    for name in ("turned.png", "deep.png"):
        found = told.logits([3, IMAGE, 9], [tmp_path / name])
        np.testing.assert_array_equal(found, trained.logits([3, IMAGE, 9], [tmp_path / name]))


def test_ids_give_ids_and_their_logits(model):
    image, ids = picture(60, 30), [3, IMAGE, 9, 10, 11]
    new = model.generate(ids, images=[image], max_new_tokens=6, stream=None)
    assert all(isinstance(number, int) for number in new)
    logits = model.logits([*ids, *new], images=[image])
    plan = anyres.plan(60, 30, model.anyres)
    assert logits.dtype == np.float32 and len(logits) == len(ids) + len(new) + plan.num_tokens - 1
    assert logits.argmax(-1)[-len(new) - 1 : -1].tolist() == new
    seen = []
    assert model.generate(np.array(ids), image, max_new_tokens=6, stream=seen.append) == new == seen
    assert model.generate([ids, [4, 4]], images=[[image], None], max_new_tokens=6)[0] == new
    both = model.logits([[*ids, *new], [4, 4]], images=[[image], []])
    np.testing.assert_array_equal(both[0], logits)
    assert both[1].shape == (2, model.config.text.vocab_size)


def test_features_are_what_the_language_model_gets(model, folder):
    one = model.features(folder / PNG)
    plan = anyres.plan(70, 40, model.anyres)
    vision, text = model.config.vision, model.config.text
    assert one["tower"].shape == (plan.num_views, vision.num_patches, vision.hidden_size)
    assert one["packed"].shape == (plan.num_tokens, text.hidden_size)
    several = model.features([folder / PNG, picture(28, 28)])
    np.testing.assert_array_equal(several[0]["packed"], one["packed"])
    # the last token of a map is the newline; the first is the projected first patch of the base view
    np.testing.assert_allclose(one["packed"][-1], model.model.image_newline[...], atol=1e-6)
    first = model.model.multi_modal_projector(one["tower"][:1])[0, 0]
    np.testing.assert_allclose(one["packed"][0], first, atol=1e-5)


def test_without_a_tokenizer_ids_still_work(tmp_path):
    weights_case.write(
        tmp_path,
        weights_case.hf_json(),
        weights_case.named(weights_case.tensors(), "hub"),
        with_tokenizer=False,
    )
    model = mmrstraj_jax.load(tmp_path)
    assert model.tokenizer is None
    with pytest.raises(UserError, match="need a tokenizer"):
        model.generate("What is this?")
    assert model.logits([1, 2]).shape == (2, model.config.text.vocab_size)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate("Q", ["missing.png"]), "missing.png: no such image"),
        (lambda m: m.generate("<image>\nQ"), "1 image slots for 0 images"),
        (lambda m: m.generate(ask("<image>\nQ"), [picture(9, 9)] * 2), "1 image slots for 2 images"),
        (lambda m: m.generate(["Q", "Q"], images=[picture(9, 9)]), "1 entries for 2 conversations"),
        (lambda m: m.generate(["Q", "Q"], stream=print), "expected one conversation"),
        (lambda m: m.generate("Q", [picture(9, 9)], videos=[[picture(9, 9)]]), "one kind of slot"),
        (lambda m: m.generate([{"role": "gpt", "content": "A"}]), "nothing to answer"),
        (lambda m: m.generate("Q", temperature=-1), "temperature -1"),
        (lambda m: m.generate("Q", max_new_tokens=2.5), "max_new_tokens 2.5: expected a whole number"),
        (lambda m: m.generate("Q", max_new_tokens=None), "max_new_tokens None: expected a whole number"),
        (lambda m: m.generate("Q", temperature="1"), "temperature '1': expected a number"),
        (lambda m: m.request("Q", max_new_tokens=0), "max_new_tokens 0: expected 1 or more"),
        (lambda m: m.generate("Q", videos=["clip.mp4"]), "video given as 'clip.mp4': expected the list of"),
        (lambda m: m.generate("Q", videos=[picture(9, 9)]), "video given as Image: expected the list of"),
        (lambda m: m.generate("Q", videos=np.zeros((2, 4, 4, 3), np.uint8)), "video given as ndarray"),
        (lambda m: m.generate([*ask("Q"), "A"]), "message 1: expected"),
        (lambda m: m.logits([1, IMAGE]), "1 image slots for 0 images"),
        (lambda m: m.logits("text"), "expected token ids"),
        (lambda m: m.logits([1, 5000]), "expected 0..319"),
        (lambda m: m.generate(np.zeros(0, int)), "not empty"),
        (lambda m: m.generate(None), "found NoneType"),
        (lambda m: m.logits([1.0, 2.5]), "expected a list of token ids"),
        (
            lambda m: m.generate("Q", [np.zeros((4, 4, 3), np.float32)]),
            r"float32 \[4, 4, 3\]: expected a path",
        ),
        (lambda m: m.generate("Q", [np.zeros((4, 4), np.uint8)]), r"uint8 \[4, 4\]"),
        (lambda m: m.generate("Q", videos=[np.zeros((2, 4, 4, 3))]), r"float64 \[4, 4, 3\]"),
        (lambda m: m.generate("Q", images=[None]), "image given as NoneType"),
        (lambda m: m.features(5.0), "image given as float"),
        (lambda m: mmrstraj_jax.load(None), "expected a path, found NoneType"),
    ],
)
def test_bad_calls_are_one_line(model, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)
