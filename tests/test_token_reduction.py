import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrstraj_jax.config import AnyResConfig
from mmrstraj_jax.data import anyres
from mmrstraj_jax.models.token_reduction import merge_with_text, reduce_maps, visual_pool

# scale_and_translate gets float32 scales; the source coordinates of jax.image.resize are computed in float64.
ATOL = 2e-5
REDUCE = jax.jit(reduce_maps)
POOL = jax.jit(visual_pool)


def maps(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def torch_interpolate(image, size):
    image = np.array(image)
    torch = pytest.importorskip("torch", reason="compares with torch.nn.functional.interpolate")
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    out = torch.nn.functional.interpolate(tensor, size, mode="bilinear")
    return out[0].permute(1, 2, 0).numpy()


def resize(image, size):
    return jax.image.resize(image, (*size, image.shape[-1]), "linear", antialias=False)


def test_every_side_of_a_view_equals_image_resize():
    """All reductions of the tau policy (27 -> 27, 25, 22, ..., 7) and every side between, in one program."""
    image, sides = maps(27, 27, 5), np.arange(1, 28)
    scale = np.repeat((sides / 27).astype(np.float32)[:, None], 2, axis=1)
    out = REDUCE(jnp.broadcast_to(image, (27, 27, 27, 5)), scale)
    expected = jax.jit(lambda image: [resize(image, (side, side)) for side in range(1, 28)])(image)
    for side, reduced, wanted in zip(sides, out, expected, strict=True):
        np.testing.assert_allclose(reduced[:side, :side], wanted, atol=ATOL)
    np.testing.assert_array_equal(out[-1], image)  # scale 1 is the identity, bit for bit


def test_every_side_of_a_view_equals_torch():
    image, sides = maps(27, 27, 5), np.arange(1, 28)
    scale = np.repeat((sides / 27).astype(np.float32)[:, None], 2, axis=1)
    out = REDUCE(jnp.broadcast_to(image, (27, 27, 27, 5)), scale)
    for side, reduced in zip(sides, out, strict=True):
        np.testing.assert_allclose(reduced[:side, :side], torch_interpolate(image, (side, side)), atol=ATOL)


def canvas_cases():
    """Random (h', w') -> (h2, w2) of maps up to 6 x 6 views, shrinking both axes as anyres_max_N does."""
    random = np.random.default_rng(0)
    cases = [((162, 162), (81, 81)), ((81, 135), (60, 108)), ((7, 162), (3, 90))]
    for _ in range(7):
        before = random.integers(2, 163, 2)
        after = [int(random.integers(1, side + 1)) for side in before]
        cases.append((tuple(int(side) for side in before), tuple(after)))
    return cases


@pytest.mark.parametrize("oracle", [resize, torch_interpolate])
def test_canvas_with_replicated_edge(oracle):
    """A map that fills only a corner of the canvas is resized as if the canvas ended there."""
    for number, (before, after) in enumerate(canvas_cases()):
        image = maps(*before, 3, seed=number)
        rows, columns = (np.minimum(np.arange(162), side - 1) for side in before)
        canvas = image[rows[:, None], columns]
        scale = np.asarray([[new / old for old, new in zip(before, after, strict=True)]], np.float32)
        out = REDUCE(canvas[None], scale)[0, : after[0], : after[1]]
        np.testing.assert_allclose(out, oracle(image, after), atol=5 * ATOL, err_msg=f"{before} {after}")


def test_gradient_of_the_reduction_equals_image_resize():
    image, weight = maps(27, 27, 2), maps(11, 11, 2, seed=1)
    scale = jnp.full((1, 2), 11 / 27, jnp.float32)
    traced = jax.grad(lambda x: (reduce_maps(x[None], scale)[0, :11, :11] * weight).sum())(image)
    np.testing.assert_allclose(
        traced, jax.grad(lambda x: (resize(x, (11, 11)) * weight).sum())(image), atol=ATOL
    )


def test_bfloat16_maps_are_resized_in_float32():
    image = jnp.asarray(maps(1, 27, 27, 4), jnp.bfloat16)
    scale = jnp.full((1, 2), 20 / 27, jnp.float32)
    out = REDUCE(image, scale)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, REDUCE(image.astype(jnp.float32), scale).astype(jnp.bfloat16))


def packed(tokens, newline, plan):
    """The packing of LLaVA-NeXT, step by step on whole maps: the oracle of the gather."""
    side, (rows, columns) = plan.side, plan.grid
    views = tokens.reshape(len(tokens), side, side, -1)
    if plan.reduced_side != side:
        views = np.stack([resize(view, (plan.reduced_side,) * 2) for view in views])
    size, hidden = views.shape[1], views.shape[-1]
    crops = views[1:].reshape(rows, columns, size, size, hidden).transpose(0, 2, 1, 3, 4)
    merged = crops.reshape(rows * size, columns * size, hidden)
    height, width = plan.resize[0] if plan.resize else (plan.map_height, plan.map_width)
    merged = merged[plan.top : plan.top + height, plan.left : plan.left + width]
    if plan.resize:
        merged = np.asarray(resize(merged, plan.resize[1]))
    lines = np.concatenate([merged, np.broadcast_to(newline, (len(merged), 1, hidden))], axis=1)
    return np.concatenate([views[0].reshape(-1, hidden), lines.reshape(-1, hidden)])


@pytest.mark.parametrize("policy", ["tau", "anyres_max_9", "anyres_max_2"])
@pytest.mark.parametrize("view_size", [56, 104])
def test_gathered_tokens_equal_the_step_by_step_packing(policy, view_size):
    policy = AnyResConfig(policy=policy).for_views(view_size, 14)
    sizes = [
        (40, 40),
        (200, 60),
        (60, 200),
        (1, 300),
        (300, 1),
        (5000, 3),
        (336, 330),
        (500, 470),
        (640, 480),
    ]
    newline = maps(4, seed=9)
    num_views, offset, side = 40, 2, policy.side
    canvas = (6 * side, 6 * side)
    for number, size in enumerate(sizes):
        plan = anyres.plan(*size, policy)
        tokens = maps(num_views, side**2, 4, seed=number)
        scale = np.ones((1, num_views), np.float32)
        scale[0, offset : offset + plan.num_views] = plan.view_scale or 1.0
        canvas_index, canvas_scale = np.zeros((1, *canvas), np.int32), np.ones((1, 2), np.float32)
        if plan.resize:
            canvas_index[0] = plan.canvas_index(offset, canvas)
            canvas_scale[0] = np.divide(*plan.resize[::-1])
        pool = np.asarray(POOL(tokens[None], newline, scale, canvas_index, canvas_scale)[0])
        expected = packed(tokens[offset : offset + plan.num_views], newline, plan)
        assert len(expected) == plan.num_tokens, size
        gathered = pool[plan.index(offset, num_views, canvas)]
        np.testing.assert_allclose(gathered, expected, atol=3 * ATOL, err_msg=str(size))


def test_without_reduction_tokens_are_untouched():
    tokens = maps(2, 3, 16, 4)
    newline = maps(4, seed=1)
    pool = POOL(tokens, newline, None, None, None)
    np.testing.assert_array_equal(pool[:, :-1], tokens.reshape(2, 48, 4))
    np.testing.assert_array_equal(pool[:, -1], np.stack([newline, newline]))
    np.testing.assert_array_equal(POOL(tokens, newline, np.ones((2, 3), np.float32), None, None), pool)


def test_merge_stays_within_a_row():
    text, pool = maps(2, 5, 3), maps(2, 4, 3, seed=1)
    index = np.asarray([[-1, 3, 0, -1, -1], [2, 2, -1, 1, 0]], np.int32)
    merged = np.asarray(merge_with_text(text, pool, index))
    for row in range(2):
        for position, slot in enumerate(index[row]):
            expected = text[row, position] if slot < 0 else pool[row, slot]
            np.testing.assert_array_equal(merged[row, position], expected)
