"""One attention for the whole model: cuDNN on GPU, XLA elsewhere. No dense mask is ever an argument."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def uses_cudnn(dtype: jnp.dtype) -> bool:
    """Whether `attention` on arrays of this dtype is cuDNN's fused one. It takes no segment ids here: JAX's
    public interface would turn them into a dense [L, L] bias."""
    return jax.default_backend() == "gpu" and dtype in (jnp.bfloat16, jnp.float16)


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
    mask: Bool[Array, "B 1 Lq Lk"] | None = None
    if q_at is not None:
        assert is_causal
        mask, is_causal = (jnp.arange(k.shape[1]) <= q_at[..., None])[:, None], False
    if segment_ids is not None:
        assert not cudnn, "packed rows need XLA attention"
        asking = segment_ids if q_at is None else jnp.take_along_axis(segment_ids, q_at, axis=1)
        same = (asking[:, :, None] == segment_ids[:, None, :])[:, None]
        mask = same if mask is None else mask & same
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
