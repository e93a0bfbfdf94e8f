"""One attention for the whole model: cuDNN on GPU, XLA elsewhere. No dense mask is ever an argument."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mmrstraj_jax.models.layers import ATTENTION


def uses_cudnn(dtype: jnp.dtype) -> bool:
    """Whether `attention` on arrays of this dtype is cuDNN's fused one. It takes no segment ids here: JAX's
    public interface would turn them into a dense [L, L] bias."""
    return jax.default_backend() == "gpu" and dtype in (jnp.bfloat16, jnp.float16)


def block_length(length: int, is_causal: bool, dtype: jnp.dtype) -> int:
    """Queries that XLA's attention of whole rows of this length scores at once: their scores stay in the
    processor's cache. Each block is code to compile, so a long row has larger ones as well as more.

    Smaller ones also leave more keys out where it is causal. In bfloat16 (XLA of JAX 0.12) an image's
    rows are fastest in one piece, in float32 in two.
    """
    if is_causal:
        per_root = 8
    else:
        per_root = 14 if dtype == jnp.float32 else 28
    return max(128, per_root * math.ceil(math.sqrt(length)))


def attention(
    q: Float[Array, "B Lq Hq D"],
    k: Float[Array, "B Lk Hkv D"],
    v: Float[Array, "B Lk Hkv D"],
    *,
    is_causal: bool,
    kv_lengths: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    q_at: Int[Array, "B Lq"] | None = None,
) -> Float[Array, "B Lq Hq D"]:
    """Dot-product attention, scale D^-0.5, softmax in float32; query head g reads KV head g // (Hq / Hkv).

    Args:
        q, k, v: queries, keys and values, heads on axis 2.
        is_causal: query i sees keys 0..i. Right padding then needs no mask: no valid query sees it.
        kv_lengths: valid keys per row (decoding from a cache).
        segment_ids: packed rows: a token sees its own segment only (not where `uses_cudnn`).
        q_at: which tokens ask, where not all do; each sees the keys up to its own. For few of them: XLA's
            scores [B, Hq, Lq, Lk] are cheaper then than all queries of cuDNN.
    """
    cudnn = uses_cudnn(q.dtype) and q_at is None
    if not cudnn and q_at is None and kv_lengths is None:
        return _in_blocks(q, k, v, is_causal, segment_ids)
    if kv_lengths is not None:
        assert not is_causal and segment_ids is None and q_at is None, "a cache is read up to its length"
        if not cudnn and q.shape[1] == 1 and q.dtype == jnp.bfloat16:  # float32 is up to 6 % slower so
            return _one_query(q, k, v, kv_lengths)
    mask: Bool[Array, "B 1 Lq Lk"] | None = None
    if q_at is not None:
        assert is_causal
        mask, is_causal = (jnp.arange(k.shape[1]) <= q_at[..., None])[:, None], False
    if segment_ids is not None:
        assert not cudnn, "packed rows need XLA attention"
        asking = jnp.take_along_axis(segment_ids, q_at, axis=1)
        mask = mask & (asking[:, :, None] == segment_ids[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=is_causal,
        key_value_seq_lengths=kv_lengths,
        query_seq_lengths=None if kv_lengths is None else jnp.full_like(kv_lengths, q.shape[1]),
        implementation="cudnn" if cudnn else "xla",
    )


def _in_blocks(
    q: Float[Array, "B L Hq D"],
    k: Float[Array, "B L Hkv D"],
    v: Float[Array, "B L Hkv D"],
    is_causal: bool,
    segment_ids: Int[Array, "B L"] | None,
) -> Float[Array, "B L Hq D"]:
    """XLA's attention of whole rows. Rows and key heads are one axis throughout: with two, XLA for CPUs takes
    twice as long for the gradients."""
    heads = k.shape[2]
    groups = q.shape[2] // heads
    q = rearrange(q, "b l (k g) d -> (b k) (l g) d", k=heads)
    k, v = (rearrange(x, "b l k d -> (b k) l d") for x in (k, v))
    if segment_ids is not None:
        segment_ids = repeat(segment_ids, "b l -> (b k) l", k=heads)
    by_head = jax.default_backend() == "cpu" and q.dtype == jnp.bfloat16
    if by_head:  # from without, names within are not seen
        found = checkpoint_name(_blocks_and_back_by_head(q, k, v, segment_ids, is_causal), ATTENTION)
    else:
        found = _blocks(q, k, v, segment_ids, is_causal)
    return rearrange(found, "(b k) (l g) d -> b l (k g) d", k=heads, g=groups)


def _blocks(
    q: Float[Array, "N LG D"],
    k: Float[Array, "N L D"],
    v: Float[Array, "N L D"],
    segment_ids: Int[Array, "N L"] | None,
    is_causal: bool,
) -> Float[Array, "N LG D"]:
    """A block of queries at a time; keys behind a causal block are not read."""
    groups = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5
    in_float32 = q.dtype == jnp.float32
    if in_float32:  # 16 bits would round it. A scale of scores is written out as large as they are, see below
        q = q * scale
    found = []
    for begin, end, seen in _bounds(k.shape[1], is_causal, q.dtype):
        asking = q[:, begin * groups : end * groups]
        query = repeat(jnp.arange(begin, end), "q -> (q g)", g=groups)
        unseen = _penalty(query[:, None] >= jnp.arange(seen)) if is_causal else None
        # Tied to these queries. XLA for CPUs would write out what blocks and layers share as large as the
        # scores are, keep it, and read it in each
        own_scale, unseen, _ = lax.optimization_barrier(
            (jnp.float32(scale), unseen, lax.stop_gradient(asking))
        )
        if in_float32:
            scores = _scores(asking, k[:, :seen])
        else:
            scores = jnp.einsum("nqd,nsd->nqs", asking, k[:, :seen], preferred_element_type=jnp.float32)
            scores = scores * own_scale
        # Added, not selected: the backward pass has no select, and XLA for CPUs a shorter forward one
        if unseen is not None:
            scores = scores + unseen
        if segment_ids is not None:
            own = jnp.repeat(segment_ids[:, begin:end], groups, axis=1)
            scores = scores + _penalty(own[:, :, None] == segment_ids[:, None, :seen])
        weights = jnp.exp(scores - lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        total = weights.sum(axis=-1, keepdims=True)
        if in_float32:  # the backward pass keeps one array of scores, not two
            found.append(checkpoint_name(_weighted(weights, v[:, :seen]), ATTENTION) / total)
        else:  # with a rounded product, gradients of queries and keys would be several times less exact
            product = jnp.einsum("nqs,nsd->nqd", (weights / total).astype(v.dtype), v[:, :seen])
            found.append(checkpoint_name(product, ATTENTION))
    return jnp.concatenate(found, axis=1)


def _with_keys(q: Float[Array, "N Q D"], k: Float[Array, "N S D"]) -> Float[Array, "N Q S"]:
    return lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,))))  # an einsum takes longer to trace


def _with_values(weights: Float[Array, "N Q S"], v: Float[Array, "N S D"]) -> Float[Array, "N Q D"]:
    return lax.batch_matmul(weights, v)


def _over_queries(scores: Float[Array, "N Q S"], queries: Float[Array, "N Q D"]) -> Float[Array, "N S D"]:
    """scores^T queries, as (queries^T scores)^T: XLA for CPUs would turn the larger of the two."""
    narrow = lax.optimization_barrier(queries.mT)
    return lax.optimization_barrier(lax.batch_matmul(narrow, scores)).mT


_scores = jax.custom_vjp(_with_keys)
_scores.defvjp(
    lambda q, k: (_with_keys(q, k), (q, k)),
    lambda kept, dscores: (_with_values(dscores, kept[1]), _over_queries(dscores, kept[0])),
)
_weighted = jax.custom_vjp(_with_values)
_weighted.defvjp(
    lambda weights, v: (_with_values(weights, v), (weights, v)),
    lambda kept, dfound: (_with_keys(dfound, kept[1]), _over_queries(kept[0], dfound)),
)


def _bounds(length: int, is_causal: bool, dtype: jnp.dtype) -> list[tuple[int, int, int]]:
    """First and last query of each block, and the number of keys that it reads."""
    block = block_length(length, is_causal, dtype)
    blocks = [(begin, min(begin + block, length)) for begin in range(0, length, block)]
    return [(begin, end, end if is_causal else length) for begin, end in blocks]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks_and_back_by_head(
    q: Array, k: Array, v: Array, segment_ids: Array | None, is_causal: bool
) -> Array:
    """`_blocks`, with a backward pass for processors that multiply bfloat16 fast.

    A key head at a time, whose scores then stay in the cache. Gradients of keys and values come from scores
    made anew as [keys, queries]: for a product over the first axis XLA for CPUs takes several times as long
    as for both. All but products is float32.
    """
    return _blocks(q, k, v, segment_ids, is_causal)


def _kept(q: Array, k: Array, v: Array, segment_ids: Array | None, is_causal: bool) -> tuple[Array, tuple]:
    return _blocks(q, k, v, segment_ids, is_causal), (q, k, v, segment_ids)


def _back_by_head(is_causal: bool, kept: tuple, dfound: Array) -> tuple[Array, Array, Array, None]:
    return *lax.map(lambda head: _back(*head, is_causal), (*kept, dfound)), None


_blocks_and_back_by_head.defvjp(_kept, _back_by_head)


def _back(
    q: Float[Array, "LG D"],
    k: Float[Array, "L D"],
    v: Float[Array, "L D"],
    segment_ids: Int[Array, " L"] | None,
    dfound: Float[Array, "LG D"],
    is_causal: bool,
) -> tuple[Float[Array, "LG D"], Float[Array, "L D"], Float[Array, "L D"]]:
    """Gradients of the queries, keys and values of one key head."""
    times = partial(jnp.einsum, preferred_element_type=jnp.float32)
    length, groups, dtype = k.shape[0], q.shape[0] // k.shape[0], q.dtype
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    # A query's dscores sum to 0, so a key that all have in common moves nothing but rounding errors
    apart = (k - k.astype(jnp.float32).mean(axis=0)).astype(dtype)

    def masked(scores, query, key):
        if is_causal:
            scores = scores + _penalty(query >= key)
        if segment_ids is not None:
            scores = scores + _penalty(segment_ids[query] == segment_ids[key])
        return scores

    for begin, end, seen in _bounds(length, is_causal, dtype):
        queries = slice(begin * groups, end * groups)
        asking, dblock, keys, values = q[queries], dfound[queries], k[:seen], v[:seen]
        query, key = repeat(jnp.arange(begin, end), "q -> (q g)", g=groups), jnp.arange(seen)
        query, key, _ = lax.optimization_barrier((query, key, asking))  # masks made anew, as in `_blocks`
        scale = q.shape[-1] ** -0.5

        scores = masked(times("qd,sd->qs", asking, keys), query[:, None], key)
        largest = scores.max(axis=1)
        weights, dweights = jnp.exp(scale * (scores - largest[:, None])), times("qd,sd->qs", dblock, values)
        total = weights.sum(axis=1)
        mean = (weights * dweights).sum(axis=1) / total
        dscores = weights * (dweights - mean[:, None]) * (scale / total)[:, None]
        dq.append(times("qs,sd->qd", dscores.astype(dtype), apart[:seen]).astype(dtype))

        scores = masked(times("sd,qd->sq", keys, asking), query, key[:, None])
        weights = jnp.exp(scale * scores - (scale * largest + jnp.log(total)))
        dscores = (weights * (times("sd,qd->sq", values, dblock) - mean) * scale).astype(dtype)
        dk = dk.at[:seen].add(times("sq,qd->sd", dscores, asking))
        dv = dv.at[:seen].add(times("sq,qd->sd", weights.astype(dtype), dblock))
    return jnp.concatenate(dq), dk.astype(dtype), dv.astype(dtype)


def _one_query(
    q: Float[Array, "B 1 Hq D"],
    k: Float[Array, "B Lk Hkv D"],
    v: Float[Array, "B Lk Hkv D"],
    kv_lengths: Int[Array, " B"],
) -> Float[Array, "B 1 Hq D"]:
    """XLA's attention of one token per row to a cache, which is read as it lies.

    With a product for each key head, XLA for CPUs first copies the whole cache into another order. Instead
    every query is multiplied with the keys of all heads, as a vector that is zero for those it does not read.
    """
    heads, dim = k.shape[2:]
    own = jnp.repeat(jnp.eye(heads, dtype=q.dtype), q.shape[2] // heads, axis=0)[..., None]  # [Hq, Hkv, 1]
    asking = rearrange(q[:, 0, :, None] * own, "b h k d -> b h (k d)")
    k, v = (rearrange(x, "b s k d -> b s (k d)") for x in (k, v))
    scores = jnp.einsum("bhc,bsc->bhs", asking, k, preferred_element_type=jnp.float32) * dim**-0.5
    scores = scores + _penalty(jnp.arange(k.shape[1]) < kv_lengths[:, None])[:, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    found = rearrange(jnp.einsum("bhs,bsc->bhc", weights, v), "b h (k d) -> b h k d", k=heads)
    return (found * own).sum(axis=2)[:, None]


def _penalty(visible: Bool[Array, "*N Lq Lk"]) -> Float[Array, "*N Lq Lk"]:
    return jnp.where(visible, 0.0, -jnp.inf)


def reference_attention(
    q: Float[Array, "B Lq Hq D"],
    k: Float[Array, "B Lk Hkv D"],
    v: Float[Array, "B Lk Hkv D"],
    mask: Bool[Array, "B Lq Lk"],
) -> Float[Array, "B Lq Hq D"]:
    """The definition, with a dense mask, in float32: the oracle of the tests."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x.astype(jnp.float32), groups, axis=2) for x in (k, v))
    scores = jnp.einsum("blhd,bshd->bhls", q.astype(jnp.float32), k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhls,bshd->blhd", weights, v).astype(q.dtype)
