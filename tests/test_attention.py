import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrstraj_jax.models import attention as module

attention = jax.jit(module.attention, static_argnames="is_causal")
reference_attention = jax.jit(module.reference_attention)

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}


def qkv(query_heads, kv_heads, query_len=7, key_len=7, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (3, query_len, query_heads, 8), (3, key_len, kv_heads, 8), (3, key_len, kv_heads, 8)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def close(actual, expected):
    tolerance = TOLERANCE[actual.dtype.type]
    np.testing.assert_allclose(np.float32(actual), np.float32(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "heads, is_causal, dtype",
    [
        ((4, 4), False, jnp.float32),
        ((4, 2), True, jnp.float32),
        ((4, 1), False, jnp.bfloat16),
        ((4, 2), True, jnp.bfloat16),
    ],
)
def test_plain_and_grouped(heads, is_causal, dtype):
    q, k, v = qkv(*heads, dtype=dtype)
    mask = jnp.ones((3, 7, 7), bool)
    mask = jnp.tril(mask) if is_causal else mask
    actual = attention(q, k, v, is_causal=is_causal)
    assert actual.dtype == dtype
    close(actual, reference_attention(q, k, v, mask))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("query_len", [1, 7])
def test_kv_lengths(query_len, dtype):
    q, k, v = qkv(4, 2, query_len=query_len, dtype=dtype)
    lengths = jnp.asarray([1, 4, 7])
    mask = jnp.broadcast_to((jnp.arange(7) < lengths[:, None])[:, None], (3, query_len, 7))
    actual = attention(q, k, v, is_causal=False, kv_lengths=lengths)
    close(actual, reference_attention(q, k, v, mask))
    # What lies behind a row's length is never read.
    beyond = (jnp.arange(7) >= lengths[:, None])[..., None, None]
    changed = attention(
        q, jnp.where(beyond, 1e4, k), jnp.where(beyond, 1e4, v), is_causal=False, kv_lengths=lengths
    )
    np.testing.assert_array_equal(changed, actual)


@pytest.mark.parametrize("is_causal", [False, True])
def test_segments(is_causal):
    q, k, v = qkv(4, 2)
    segments = jnp.asarray([[0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6], [0] * 7])
    mask = segments[:, :, None] == segments[:, None]
    mask = mask & jnp.tril(jnp.ones((7, 7), bool)) if is_causal else mask
    close(attention(q, k, v, is_causal=is_causal, segment_ids=segments), reference_attention(q, k, v, mask))


def test_head_groups_are_consecutive():
    """Query head g reads KV head g // (Hq / Hkv), not g % Hkv."""
    q, k, v = qkv(4, 2)
    v = v.at[:, :, 0].set(1.0).at[:, :, 1].set(2.0)
    out = attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(out[:, :, :, 0], np.broadcast_to([1.0, 1.0, 2.0, 2.0], (3, 7, 4)), rtol=1e-6)


def test_gradients():
    q, k, v = qkv(4, 2)
    mask = jnp.tril(jnp.ones((3, 7, 7), bool))
    weight = jax.random.normal(jax.random.key(1), q.shape)
    actual = jax.grad(lambda *x: (weight * attention(*x, is_causal=True)).sum(), (0, 1, 2))(q, k, v)
    expected = jax.grad(lambda *x: (weight * reference_attention(*x, mask)).sum(), (0, 1, 2))(q, k, v)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


@pytest.mark.parametrize("is_causal, packed", [(True, False), (False, False), (True, True)])
def test_rows_of_several_blocks_of_queries(is_causal, packed):
    length = 300 if is_causal else 600
    block = module.block_length(length, is_causal, jnp.float32)
    assert (2 if is_causal else 1) * block < length < 3 * block
    q, k, v = qkv(4, 2, length, length)
    segments = jnp.searchsorted(jnp.asarray([100, 250]), jnp.arange(length), side="right") if packed else None
    segments = None if segments is None else jnp.broadcast_to(segments, (3, length))
    mask = jnp.ones((3, length, length), bool)
    mask = jnp.tril(mask) if is_causal else mask
    mask = mask & (segments[:, :, None] == segments[:, None]) if packed else mask
    weight = jax.random.normal(jax.random.key(1), q.shape)

    def ours(*x):
        out = attention(*x, is_causal=is_causal, segment_ids=segments)
        return (weight * out).sum(), out

    def definition(*x):
        out = reference_attention(*x, mask)
        return (weight * out).sum(), out

    actual, out = jax.grad(ours, (0, 1, 2), has_aux=True)(q, k, v)
    expected, reference = jax.grad(definition, (0, 1, 2), has_aux=True)(q, k, v)
    close(out, reference)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


@pytest.mark.parametrize("is_causal, packed", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("common", [0, 4])  # to all keys, as a key's bias is in Qwen2
def test_bfloat16_gradients_are_as_exact_as_the_rounding_allows(is_causal, packed, common):
    """The two terms of a softmax's gradient cancel only where both come from the same rounded numbers."""
    length = 300
    assert not is_causal or 2 * module.block_length(length, True, jnp.bfloat16) < length
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(4, 2, length, length))
    k, v = 0.3 * k + common, 0.3 * v + 1
    weight = jax.random.normal(jax.random.key(1), q.shape).astype(jnp.bfloat16)
    segments = jnp.broadcast_to(jnp.arange(length) // 110, (3, length)) if packed else None

    def gradients(dtype):
        def score(*x):
            out = attention(*x, is_causal=is_causal, segment_ids=segments)
            return (weight.astype(jnp.float32) * out.astype(jnp.float32)).sum()

        found = jax.grad(score, (0, 1, 2))(*(x.astype(dtype) for x in (q, k, v)))
        return [np.asarray(x, np.float32) for x in found]

    for rounded, exact in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert np.linalg.norm(rounded - exact) < 2**-7 * np.linalg.norm(exact)


def test_layers_do_not_share_masks():
    """XLA for CPUs would write each block's out, as large as its scores, and keep it for all layers."""
    length, heads, groups = 1_100, 2, 2
    q, k, v = (jnp.zeros((1, length, count, 8)) for count in (heads * groups, heads, heads))

    @jax.jit
    def three_layers(q, k, v):
        for _ in range(3):
            q = module.attention(q, k, v, is_causal=True)
        return q

    # Bytes of the largest block's
    scores = 4 * heads * groups * module.block_length(length, True, q.dtype) * length
    assert three_layers.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes < 7 * scores


def test_no_rows_at_all():
    """The tower's of a text-only prompt."""
    none = jnp.zeros((0, 5, 4, 8))
    assert attention(none, none, none, is_causal=False).shape == none.shape


def test_long_rows_have_few_blocks():
    """Each is code to compile."""
    lengths = range(1, 8_000, 7)
    assert max(-(-length // module.block_length(length, True, jnp.float32)) for length in lengths) == 12
