"""The whole model against itself: every route gives the same numbers. Against others: tests/parity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_samples import (
    CONFIG,
    MAX_9,
    TAU,
    TEXT,
    hidden_states,
    inputs,
    mixed_rows,
    model,
    text_config,
    vision_config,
    with_lora,
)

from mmrstraj_jax.data import anyres
from mmrstraj_jax.models import layers, qwen2, siglip
from mmrstraj_jax.models.layers import LoRAParam, Trainable, unstacked
from mmrstraj_jax.models.lora import train_in_full
from mmrstraj_jax.models.qwen2 import Qwen2, init_cache

ATOL = 2e-5  # of hidden states of size 1


@pytest.fixture(scope="module")
def built():
    return model()


@pytest.fixture(scope="module")
def mixed():
    return inputs(mixed_rows())


@pytest.fixture(scope="module")
def mixed_hidden(built, mixed):
    return hidden_states(built, mixed)


def assert_same_valid(actual, expected, lengths, **tolerance):
    """Hidden states agree at every valid position; the two may be padded differently."""
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            actual[row, :length],
            expected[row, :length],
            **{"atol": ATOL, "err_msg": f"row {row}", **tolerance},
        )


def test_scan_equals_unrolled(built, mixed, mixed_hidden):
    np.testing.assert_allclose(hidden_states(built, mixed, unroll=True), mixed_hidden, atol=ATOL)


def test_remat_equals_none():
    """Values and gradients of every trainable, through both scans, with the same dropout mask."""
    built = with_lora(model(), dropout=0.1, vision_tower=("fc2",), projector=())
    graphdef, trainable, frozen = nnx.split(built, Trainable, ...)
    batch = inputs([[anyres.plan(30, 60, TAU)]])

    @functools.partial(jax.jit, static_argnums=1)
    @jax.value_and_grad
    def step(trainable, remat):
        hidden = nnx.merge(graphdef, trainable, frozen).hidden_states(batch, jax.random.key(0), remat=remat)
        return jnp.square(hidden).mean() + jnp.sin(hidden).mean()

    value, gradient = step(trainable, "none")
    for remat in ("block", "dots"):
        other_value, other_gradient = step(trainable, remat)
        np.testing.assert_allclose(other_value, value, rtol=1e-6)
        for (path, one), other in zip(
            jax.tree.leaves_with_path(gradient), jax.tree.leaves(other_gradient), strict=True
        ):
            scale = np.abs(one).max()
            assert scale > 0, path
            np.testing.assert_allclose(other, one, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))


def test_prefill_and_decode_equal_the_full_forward(built):
    """Rows of different lengths, with and without images: prefill a part of each, decode the rest."""
    rows = [[], [anyres.plan(100, 60, TAU)], [anyres.plan_video(2, TAU)]]
    batch = inputs(rows, text=6)
    expected = hidden_states(built, batch)
    steps = 4
    prompt = batch.lengths - steps
    start = batch._replace(lengths=prompt)
    graphdef, state = nnx.split(built)
    cache = init_cache(CONFIG.text, len(rows), batch.input_ids.shape[1] + 3, jnp.float32)
    hidden, cache = jax.jit(lambda state, *x: nnx.merge(graphdef, state).prefill(*x))(state, start, cache)
    decode = jax.jit(lambda state, *x: nnx.merge(graphdef, state).decode(*x))
    row = jnp.arange(len(rows))
    np.testing.assert_allclose(hidden, expected[row, prompt - 1], atol=ATOL)
    for step in range(steps):
        position = prompt + step
        hidden, cache = decode(state, batch.input_ids[row, position], cache)
        np.testing.assert_allclose(hidden, expected[row, position], atol=ATOL, err_msg=f"step {step}")
    np.testing.assert_array_equal(cache.lengths, batch.lengths)


def test_prompts_are_read_without_a_copy_of_the_layers():
    """Stacked: of a slice at a time; as inference on a CPU holds them: of none."""
    config = dataclasses.replace(CONFIG.text, num_hidden_layers=6, intermediate_size=512)
    text = Qwen2(config, rngs=nnx.Rngs(params=jax.random.key(0)))
    stack = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.split(text.layers)[1]))
    x, lengths, found = jnp.ones((1, 4, config.hidden_size)), jnp.array([3]), []
    for share in (0.5, 0.1):
        graphdef, params = nnx.split(text)

        def read(params, x, lengths, graphdef=graphdef):
            return nnx.merge(graphdef, params).prefill(x, lengths, init_cache(config, 1, 4, jnp.float32))

        compiled = jax.jit(read).lower(params, x, lengths).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < share * stack
        found.append(compiled(params, x, lengths))
        text.layers = unstacked(text.layers)
    for stacked, apart in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(stacked, apart, atol=ATOL)


@pytest.mark.parametrize("padding", [{"length": 131}, {"num_views": 7, "canvas": (10, 9)}], ids=str)
def test_padding_changes_nothing(built, mixed, mixed_hidden, padding):
    padded = inputs(mixed_rows(), **padding)
    assert jax.tree.map(jnp.shape, padded) != jax.tree.map(jnp.shape, mixed)
    assert_same_valid(hidden_states(built, padded), mixed_hidden, mixed.lengths)


def test_a_row_alone_equals_the_row_in_a_batch(built, mixed, mixed_hidden):
    for number, row in enumerate(mixed_rows()):
        alone = inputs([row], first=number, length=128, num_views=7, canvas=(9, 9))
        np.testing.assert_array_equal(alone.lengths, mixed.lengths[number : number + 1])
        assert_same_valid(hidden_states(built, alone), mixed_hidden[number : number + 1], alone.lengths)


def test_padded_content_is_never_read(built, mixed, mixed_hidden):
    """Garbage in padded ids and unused views leaves every valid position bit for bit alone."""
    position = jnp.arange(mixed.input_ids.shape[1])
    ids = jnp.where(position < mixed.lengths[:, None], mixed.input_ids, 7)
    used = jnp.asarray([0] + [row[0].num_views if len(row) == 1 else 2 for row in mixed_rows()[1:]])
    unused = (jnp.arange(mixed.views.shape[1]) >= used[:, None])[:, :, None, None, None]
    changed = mixed._replace(input_ids=ids, views=jnp.where(unused, jnp.uint8(255), mixed.views))
    assert_same_valid(hidden_states(built, changed), mixed_hidden, mixed.lengths, atol=0, rtol=0)


def test_view_scale_one_equals_no_reduction(built):
    rows = [[anyres.plan(100, 60, MAX_9)], [anyres.plan_multi_image(MAX_9)] * 2]
    with_scale, without = inputs(rows), inputs(rows, reduced=False)
    assert without.view_scale is None
    np.testing.assert_array_equal(hidden_states(built, with_scale), hidden_states(built, without))


def test_one_program_serves_all_sizes_of_a_bucket(built):
    graphdef, state = nnx.split(built)
    program = jax.jit(lambda state, batch: nnx.merge(graphdef, state).hidden_states(batch))
    for width, height in ((30, 30), (100, 60), (10, 300), (210, 200), (336, 336)):
        program(state, inputs([[anyres.plan(width, height, TAU)]], length=96, num_views=37))
    assert program._cache_size() == 1


def test_packed_rows_equal_separate_rows(built):
    """Qwen2 with segment ids and per-segment positions: several samples in one row do not see each other."""
    random = np.random.default_rng(0)
    parts = [jnp.asarray(random.integers(0, 96, (1, length))) for length in (5, 9, 3)]
    text = built.language_model
    row = text.embed(jnp.concatenate(parts, axis=1))
    segments = jnp.concatenate([jnp.full_like(part, number) for number, part in enumerate(parts)], axis=1)
    positions = jnp.concatenate([jnp.arange(part.shape[1])[None] for part in parts], axis=1)
    together = jax.jit(text)(row, segment_ids=segments, positions=positions)
    apart = jnp.concatenate([jax.jit(text)(text.embed(part)) for part in parts], axis=1)
    np.testing.assert_allclose(together, apart, atol=ATOL)


# ---- the tower ----


def random_views(config, count=2):
    size = config.vision.image_size
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, size, size, 3)), jnp.uint8)


def test_a_list_of_feature_layers_concatenates():
    """In the order of the list, a repeated layer too; towers with a prefix of the layers give the parts."""
    config = vision_config(feature_layers=(3, 1, 3))
    together = model(config)
    views = random_views(config)
    features = jax.jit(together.encode_views)(views)
    assert together.multi_modal_projector.linear_1.weight.shape == (48, 96)
    parts = []
    for last in config.vision.feature_layers:
        single = model(vision_config(feature_layers=(last,)))
        state = nnx.state(together.vision_tower)
        layers = jax.tree.map(lambda leaf, last=last: leaf[:last], state["layers"])
        nnx.update(single.vision_tower, nnx.State({**state, "layers": layers}))
        parts.append(jax.jit(single.encode_views)(views))
    np.testing.assert_allclose(features, jnp.concatenate(parts, axis=-1), atol=ATOL)


def test_large_views_one_by_one_equal_views_together(monkeypatch):
    config = vision_config()
    built, views = model(config), random_views(config, count=3)
    encode = jax.jit(built.encode_views, static_argnames="one_by_one")
    together = encode(views)
    whole = encode.lower(views, one_by_one=True).as_text()
    assert whole == encode.lower(views).as_text(), "small views are computed together"
    monkeypatch.setattr(siglip, "LARGE_VIEW", 0)
    jax.clear_caches()
    text = encode.lower(views, one_by_one=True).as_text()
    assert text.count("stablehlo.while") == whole.count("stablehlo.while") + 1
    np.testing.assert_allclose(encode(views, one_by_one=True), together, atol=ATOL)
    assert encode(views[:0], one_by_one=True).shape == (0, *together.shape[1:])


def test_only_layers_that_run_are_held():
    """Feature layer 26 of the 27-layer file and of the 26-layer file are one model of 26 layers."""
    tower = model(vision_config(feature_layers=(2,))).vision_tower
    assert {leaf.shape[0] for leaf in jax.tree.leaves(nnx.state(tower.layers))} == {2}
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(tower))}
    assert not any("post_layernorm" in name or "head" in name for name in names)


def test_remainder_pixels_are_never_seen():
    """104 = 7 x 14 + 6, like 384 = 27 x 14 + 6: the right and bottom 6 pixels take no part."""
    config = vision_config(image_size=104)
    built, views = model(config), random_views(config)
    changed = views.at[:, 98:].set(0).at[:, :, 98:].set(255)
    encode = jax.jit(built.encode_views)
    assert encode(views).shape == (2, 49, 32)
    np.testing.assert_array_equal(encode(changed), encode(views))


def test_patches_are_row_major_and_normalised():
    """Patch t = 4 y + x sees its own 14 x 14 pixels, scaled to [-1, 1]."""
    built = model()
    tower = built.vision_tower
    views = random_views(CONFIG, 1)
    weight = np.float64(tower.patch_embedding.weight[...])
    pixels = np.float64(views[0]) / 127.5 - 1
    found = tower.patch_embedding(jnp.asarray(pixels[None], jnp.float32))[0]
    for y, x in ((0, 0), (0, 3), (2, 1)):
        patch = pixels[14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
        expected = np.einsum("yxc,dcyx->d", patch, weight) + np.float64(tower.patch_embedding.bias[...])
        np.testing.assert_allclose(found[4 * y + x], expected, atol=1e-4)


# ---- what trains, and in which dtype ----


def test_what_trains_is_a_type():
    built = with_lora(model(dtype=jnp.bfloat16), random_b=False)
    train_in_full(built, ("newline", "projector"))
    _, trainable, frozen = nnx.split(built, Trainable, ...)
    trained = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(trainable)}
    assert all(isinstance(leaf, Trainable) and leaf.dtype == jnp.float32 for leaf in trained.values())
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(frozen))
    in_full = {name for name, leaf in trained.items() if not isinstance(leaf, LoRAParam)}
    assert in_full == {
        "image_newline",
        *(f"multi_modal_projector.linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")),
    }
    towers = {name for name in trained if name.startswith("vision_tower")}
    assert towers == {
        f"vision_tower.layers.{module}.lora_{side}"
        for module in (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
        for side in "AB"
    }


@pytest.mark.parametrize("part", ["vision_tower", "projector", "newline", "language_model"])
def test_train_in_full_moves_the_whole_part(part):
    built = model(dtype=jnp.bfloat16)
    train_in_full(built, (part,))
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(built))}
    prefix = {"projector": "multi_modal_projector", "newline": "image_newline"}.get(part, part)
    assert any(name.startswith(prefix) for name in flat)
    for name, leaf in flat.items():
        assert isinstance(leaf, Trainable) == name.startswith(prefix), name
        assert leaf.dtype == (jnp.float32 if name.startswith(prefix) else jnp.bfloat16), name


def test_every_trainable_gets_a_gradient():
    """LoRA on every linear and all parts in full: nothing declared trainable is cut off from the loss."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    built = with_lora(model(text_config(tie_word_embeddings=False)), language_model=targets)
    train_in_full(built, ("vision_tower", "projector", "newline", "language_model"))
    graphdef, trainable, frozen = nnx.split(built, Trainable, ...)
    assert not jax.tree.leaves(frozen)
    batch = inputs([[anyres.plan(100, 60, TAU)], []])

    def loss(trainable):
        built = nnx.merge(graphdef, trainable, frozen)
        return jnp.square(built.logits(built.hidden_states(batch)[:, :-1])).mean()

    for path, gradient in nnx.to_flat_state(jax.jit(jax.grad(loss))(trainable)):
        layers = gradient.reshape(len(gradient), -1) if "layers" in path else gradient.reshape(1, -1)
        assert (np.abs(layers).max(axis=1) > 0).all(), path


def matrix_products(jaxpr):
    """(dtype, shape) of the operands of every product with a weight in a jaxpr and everything it calls.

    Those have no batch axes; the products inside attention do, and cuDNN's kernels replace them on a GPU.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            batch_axes = equation.params["dimension_numbers"][1]
            if not batch_axes[0]:
                yield [(str(variable.aval.dtype), variable.aval.shape) for variable in equation.invars]
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from matrix_products(inner)


@pytest.mark.parametrize("tied", [True, False])
def test_a_bfloat16_model_multiplies_in_bfloat16(tied):
    """Frozen bf16, trainables fp32: forward and backward, no product with a weight has a float32 operand."""
    built = with_lora(model(text_config(tie_word_embeddings=tied), jnp.bfloat16))
    graphdef, trainable, frozen = nnx.split(built, Trainable, ...)
    batch = inputs([[anyres.plan(100, 60, MAX_9)], []], reduced=False)
    assert batch.canvas_index is None

    def loss(trainable):
        built = nnx.merge(graphdef, trainable, frozen)
        logits = built.logits(built.hidden_states(batch, remat="block")[:, :-1])
        assert logits.dtype == jnp.float32
        return jax.nn.logsumexp(logits, axis=-1).mean()

    gradient = jax.eval_shape(jax.grad(loss), trainable)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))
    found = list(matrix_products(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr))
    assert len(found) > 60, len(found)
    wide = [each for each in found if any(dtype != "bfloat16" for dtype, _ in each)]
    assert wide == []


def test_layers_compute_in_the_models_dtype():
    built = with_lora(model(dtype=jnp.bfloat16))
    train_in_full(built, ("vision_tower", "projector", "newline"))
    batch = inputs([[anyres.plan(100, 60, TAU)]])
    assert jax.eval_shape(lambda: built.encode_views(batch.views[0])).dtype == jnp.bfloat16
    assert jax.eval_shape(lambda: built.visual_pool(batch)).dtype == jnp.bfloat16
    assert jax.eval_shape(lambda: built.hidden_states(batch)).dtype == jnp.bfloat16


def test_a_bfloat16_gelu_is_rounded_once_until_it_is_differentiated():
    x = (3 * jax.random.normal(jax.random.key(0), (64, 8))).astype(jnp.bfloat16)
    once = jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(jnp.bfloat16)
    np.testing.assert_array_equal(siglip.gelu(x), once)
    by_step, back = jax.vjp(functools.partial(jax.nn.gelu, approximate=True), x)
    assert (by_step != once).any()
    found, its_back = jax.vjp(siglip.gelu, x)
    np.testing.assert_array_equal(found, by_step)
    np.testing.assert_array_equal(its_back(once), back(once))


@pytest.mark.parametrize("words", [80, 97])
def test_a_bfloat16_heads_gradients(words):
    """Also where the words do not divide into the parts that are summed."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 3, 16), (words, 16), (2, 3, words)
    hidden, head, weight = (jax.random.normal(*each) for each in zip(keys, shapes, strict=True))
    hidden, head = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    gradients = jax.grad(lambda x, w: (weight * qwen2._scores(x, w)).sum(), (0, 1))(hidden, head)
    expected = jnp.einsum("blv,vh->blh", weight, head), jnp.einsum("blv,blh->vh", weight, hidden)
    for gradient, exact in zip(gradients, expected, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert jnp.linalg.norm(gradient - exact) < 2**-7 * jnp.linalg.norm(exact)


def test_tied_head_is_the_embedding():
    tied = model(text_config(tie_word_embeddings=True))
    assert not hasattr(tied.language_model, "lm_head")
    untied = model(text_config(tie_word_embeddings=False))
    assert untied.language_model.lm_head.weight.shape == (TEXT.vocab_size, TEXT.hidden_size)
    hidden = jnp.ones((TEXT.hidden_size,))
    for built, head in ((tied, tied.language_model.embed_tokens), (untied, untied.language_model.lm_head)):
        np.testing.assert_allclose(built.logits(hidden), head.weight[...].sum(-1), atol=1e-4)


def test_rope_base_and_positions_matter():
    built = model()
    ids = jnp.asarray([[5, 5, 5, 9, 5]])
    other = model(dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, rope_theta=1e4)))
    text, changed = built.language_model, other.language_model
    states = [jax.jit(each)(each.embed(ids))[0, -1] for each in (text, changed)]
    assert np.abs(states[0] - states[1]).max() > 1e-3
    # RoPE is relative: shifting all positions of a row changes nothing.
    shifted = jax.jit(text)(text.embed(ids), positions=jnp.arange(5)[None] + 100)
    np.testing.assert_allclose(shifted[0, -1], states[0], atol=1e-4)


@pytest.mark.parametrize("rows", [0, 1, 2, layers.FEW_ROWS, layers.FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_of_any_number_of_rows(rows, dtype):
    """XLA for CPUs gets a few rows, and a single one, in other forms than many."""
    x = jax.random.normal(jax.random.key(0), (rows, 1, 24)).astype(dtype)
    weight = jax.random.normal(jax.random.key(1), (16, 24)).astype(dtype)
    found = layers.times(x, weight, jnp.float32)
    expected = np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_array_equal(layers.times(x, weight).shape, (rows, 1, 16))


def test_a_large_product_in_bfloat16_has_the_plain_one_s_derivatives():
    """XLA for CPUs does not round it; then nothing may turn the weight into float32 on the way back."""
    x = jax.random.normal(jax.random.key(0), (layers.FEW_ROWS + 1, 24)).astype(jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(1), (16, 24)).astype(jnp.bfloat16)

    def score(product, x, weight):
        return jnp.square(product(x, weight).astype(jnp.float32)).sum()

    plain = functools.partial(jnp.einsum, "ni,oi->no")
    found, expected = (jax.value_and_grad(functools.partial(score, f), (0, 1)) for f in (layers.times, plain))
    for one, other in zip(*(jax.tree.leaves(f(x, weight)) for f in (found, expected)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=2**-6, atol=2**-6)
    lowered = jax.jit(jax.grad(lambda x, weight: score(layers.times, x, weight))).lower(x, weight).as_text()
    assert "16x24xbf16" in lowered and "16x24xf32" not in lowered


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_activation_is_rounded_once_and_keeps_nothing_in_float32(dtype):
    gate, up = (3 * jax.random.normal(jax.random.key(seed), (64, 8)).astype(dtype) for seed in (0, 1))

    exact, exact_back = jax.vjp(qwen2.gated, gate.astype(jnp.float32), up.astype(jnp.float32))
    found, back = jax.vjp(qwen2.gated, gate, up)
    np.testing.assert_array_equal(found, exact.astype(dtype))
    for one, other in zip(back(jnp.ones_like(found)), exact_back(jnp.ones_like(exact)), strict=True):
        np.testing.assert_array_equal(one, other.astype(dtype))
    if dtype == "bfloat16":
        assert {leaf.dtype for leaf in jax.tree.leaves(back) if leaf.size > 1} == {jnp.dtype(dtype)}
