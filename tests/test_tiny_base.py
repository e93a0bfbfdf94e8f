"""What the making of the tiny base rests on: packed questions are single-turn questions, labels add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrstraj_jax import parallel
from mmrstraj_jax.config import MODEL_PRESETS, AnyResConfig
from mmrstraj_jax.data import anyres, chat
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.models.mmrstraj import Inputs, init_model
from mmrstraj_jax.synthcity.sample import samples
from mmrstraj_jax.training import dense, muon, pointing, run, shared_prefix, tiny_base, tiny_data, tiny_text
from mmrstraj_jax.training.shared_prefix import Prefix, pack, segment

POLICY = AnyResConfig().for_views(112, 14)
TURNS = [("Is there a car in the image?", "yes"), ("How many houses are there in the image?", "4")]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer((run.embedded_weights() / "tokenizer.json").read_text())


def test_packed_questions_are_single_turn_questions(tokenizer):
    model = init_model(MODEL_PRESETS["tiny"], jax.random.key(0))
    plan = anyres.plan(224, 224, POLICY)
    pixels = np.random.default_rng(0).integers(0, 256, (1, plan.num_views, 112, 112, 3), np.uint8)
    prefix = Prefix.of(plan, tokenizer)
    segments = pack([segment([turn], tokenizer, prefix.num_ids, "clean") for turn in TURNS], 26, 6)
    packed = segments.at((None,))
    features = model.encode_views(pixels[0])[None]
    pool = shared_prefix.image_tokens(model, features, plan.view_scale)
    (_, hidden), looks = shared_prefix.hidden_states(model, pool, prefix, [packed.ids], packed.positions)
    assert looks.shape == (3, 1, 2, 6, 3, len(prefix.ids)) and 0 < looks.sum(-1).max() < 1
    for number, turn in enumerate(TURNS):
        encoded = chat.encode_spans(shared_prefix.conversation([turn]), tokenizer)
        slot = int(np.flatnonzero(encoded.ids == tokenizer.image_id)[0])
        visual = np.full(plan.num_tokens, tokenizer.pad_id)
        ids = np.concatenate([encoded.ids[:slot], visual, encoded.ids[slot + 1 :]])[None].astype(np.int32)
        index = np.full(ids.shape, -1, np.int32)
        index[0, slot : slot + plan.num_tokens] = plan.index(0, plan.num_views)
        scale = np.full((1, plan.num_views), plan.view_scale, np.float32)
        alone = model.hidden_states(Inputs(ids, pixels, index, np.array([ids.shape[1]], np.int32), scale))
        at = segments.positions[number][segments.weights[number]]
        assert len(at) == encoded.answer.sum()
        start = len(prefix.ids)
        np.testing.assert_allclose(hidden[0, number, at], alone[0, start + at], rtol=1e-4, atol=1e-4)
        targets = segments.targets[number][segments.weights[number]]
        assert tokenizer.decode(targets.tolist()[:-1]) == turn[1]


@pytest.mark.parametrize("size", [(224, 224), (336, 224), (112, 112)])
def test_pointing_is_at_rest_where_attention_is_on_the_thing(tokenizer, size):
    """One head on the base view's token over the first thing, one on the crop's; anything else costs."""
    plan = anyres.plan(*size, POLICY)
    tokens = pointing.TokenPlaces.of(plan, len(Prefix.of(plan, tokenizer).ids))
    image = tokens.reach[:, 0] > 0
    newlines = plan.map_height
    assert image.sum() == plan.num_tokens - newlines and not image[-1] and tokens.is_crop[-1]
    for kind in (tokens.is_crop, ~tokens.is_crop):
        np.testing.assert_allclose(tokens.center[image & kind].mean(0), 0.5, atol=1e-6)
    place, other = (0.31, 0.68), (0.9, 0.1)
    places = pointing.pack_places([[[place]], [[place], [other]], [], [[place] * 9]])[None].astype(np.float32)
    weights = jnp.zeros((1, 4, 3), bool).at[:, :, :2].set(True)  # one token and the end

    def nearest(point, crop):
        distance = np.abs(tokens.center - point).max(-1) + 9.0 * (~image | (tokens.is_crop != crop))
        return int(distance.argmin())

    looks = np.zeros((1, 4, 3, 3, len(image)), np.float32)
    for question in range(4):
        for head, crop in ((0, False), (1, True)):
            looks[0, question, :, head, nearest(place, crop)] = 1.0
    loss = pointing.pointing_loss(looks, places, weights, tokens)
    np.testing.assert_allclose(loss, 0.0, atol=1e-3)
    looks[0, 1, 0, 1] = 0.0  # the crops are overlooked
    assert pointing.pointing_loss(looks, places, weights, tokens) > 1.0
    looks[0, 1, 0, 1, nearest(place, True)] = 1.0
    looks[0, :, 1:] = 0.0  # where the end is predicted, and where nothing is, is nobody's business
    looks[0, 2:] = 0.0
    np.testing.assert_allclose(pointing.pointing_loss(looks, places, weights, tokens), 0.0, atol=1e-3)


def test_short_questions_state_their_facts(tokenizer):
    short = tiny_text.stated_rows(tokenizer)
    assert len(short.ids) > 0.85 * tiny_text.STATED_ROWS and short.weights.any(-1).all()


def test_shown_words_stand_on_image_tokens_and_are_asked_about(tokenizer, monkeypatch):
    """Some images are shown words instead of what they hold; the others stay as they were."""
    monkeypatch.setattr(tiny_text, "SHOWN_ROWS", 40)
    prefix = Prefix.of(anyres.plan(224, 224, POLICY), tokenizer)
    shown = tiny_text.ShownFacts.of(tokenizer, prefix.num_ids, 3)
    assert len(shown.words) > 10 and shown.questions.weights.any(-1).all()
    assert all(tokenizer.decode(words[words >= 0].tolist()).strip() for words in shown.words)
    plain = pack([segment([turn], tokenizer, prefix.num_ids, "clean") for turn in [*TURNS, TURNS[0]]], 26, 6)
    rows = 200
    asked = type(plain)(*(np.tile(x[None], (rows, 1, 1)).astype(np.int32) for x in plain))
    talk = type(plain)(*(np.ones((rows, 1, 160), np.int32) for _ in plain))
    places = np.zeros((rows, 3, 4, 2), np.float32)
    image = np.flatnonzero(prefix.visual_index >= 0)
    said = shown.show((asked, places, talk), image, 0.2, np.random.default_rng(0))
    chosen = said.scale.any(-1)
    assert 0.12 < chosen.mean() < 0.28 and np.isin(said.slots, image).all()
    written = [
        tokenizer.decode(ids[size > 0].tolist()) for ids, size in zip(said.words, said.scale, strict=True)
    ]
    assert {bool(text.strip()) for text, was in zip(written, chosen, strict=True) if was} == {True}
    assert (talk.weights.any((1, 2)) == ~chosen).all() and (np.isnan(places).all((1, 2, 3)) == chosen).all()
    changed = (asked.ids != plain.ids).any((1, 2))
    assert (changed == chosen).all()


def test_segments_that_do_not_fit_weigh_nothing(tokenizer):
    found = pack([segment([("word " * 40, "yes")], tokenizer, 0, "clean")], 26, 6)
    assert not found.weights.any()


def test_muon_directions_are_orthogonal():
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 8)), jnp.float32)
    found = muon.orthogonal(stack, parallel.make_mesh())
    values = np.linalg.svd(np.asarray(found), compute_uv=False)
    assert (values > 0.6).all() and (values < 1.3).all(), values


def test_labels_add_up():
    sample = next(samples("base", 0, 1, "A", square=True))
    shares, counts = tiny_data.grid_labels(sample, 16, 16)
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-5)
    kind = {name: k for k, name in enumerate(tiny_data.COUNTS)}
    inside = [i for i in sample.truth.items if 0 <= i.u < 1 and 0 <= i.v < 1]
    for name in ("car", "house", "tree"):
        assert counts[..., kind[name]].sum() == sum(i.kind == name for i in inside)
    assert set(vars(sample.truth)) >= set(tiny_data.FACTS)


def test_pooling_is_the_mean_of_the_reduced_map():
    values = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    reduced = jax.image.resize(values, (5, 5), "linear", antialias=False)
    found = (dense.pooling_weights(8, 5) * values.reshape(-1)).sum()
    np.testing.assert_allclose(found, reduced.mean(), rtol=1e-5)


def test_a_stopped_phase_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_base, "SAVE_EVERY", 2)
    mesh, stops = parallel.make_mesh(), [3]

    def loss(weights, frozen, group, batch):
        error = batch @ weights["layers.weight"][0] - frozen["target"]
        return (error**2).mean(), {"error": jnp.abs(error).mean()}

    def batches(step):
        if step in stops:
            raise KeyboardInterrupt
        return 0, np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)

    def phase(name, steps=5):
        weights = {"layers.weight": jnp.ones((2, 3, 3)), "bias": jnp.ones(3)}
        optimizer = muon.Muon(mesh, steps, matrix_lr=1e-2, adam_lr=1e-2)
        frozen = {"target": jnp.zeros(3)}
        return tiny_base.fit(tmp_path / f"{name}.npz", loss, weights, frozen, optimizer, steps, batches)

    with pytest.raises(KeyboardInterrupt):
        phase("stopped")
    assert (tmp_path / "stopped.partial.npz").exists()
    stops.clear()
    with pytest.raises(UserError, match="stopped.partial.npz: of a phase of 5 steps, asked for are 6"):
        phase("stopped", 6)
    for name, leaf in phase("stopped").items():
        np.testing.assert_array_equal(leaf, phase("straight")[name])
    assert not (tmp_path / "stopped.partial.npz").exists()
    with pytest.raises(UserError, match="stopped.npz: of a phase of 5 steps, asked for are 6"):
        phase("stopped", 6)
