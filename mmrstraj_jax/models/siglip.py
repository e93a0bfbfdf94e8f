"""SigLIP vision tower: pre-norm ViT, no class token, no final norm, no pooling head (HF modeling_siglip.py).

Legend: N views, T patches, D hidden, L layers run.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt8

from mmrstraj_jax.config import VisionConfig
from mmrstraj_jax.models.attention import attention
from mmrstraj_jax.models.layers import LayerNorm, Linear, normal, rounded_once, scan_layers

# Activations of a view's MLP: with more, a CPU's caches do not hold several views' (wins.py, one-by-one)
LARGE_VIEW = 2**20


class Attention(nnx.Module):
    def __init__(self, config: VisionConfig, **init):
        dim = config.hidden_size
        self.q_proj = Linear(dim, dim, **init)
        self.k_proj = Linear(dim, dim, **init)
        self.v_proj = Linear(dim, dim, **init)
        self.out_proj = Linear(dim, dim, **init)
        self.num_heads = config.num_attention_heads

    def __call__(self, x: Float[Array, "N T D"], keys: Key[Array, " N"] | None) -> Float[Array, "N T D"]:
        heads = [
            rearrange(proj(x, keys, tag), "n t (h d) -> n t h d", h=self.num_heads)
            for tag, proj in enumerate((self.q_proj, self.k_proj, self.v_proj))
        ]
        return self.out_proj(rearrange(attention(*heads, is_causal=False), "n t h d -> n t (h d)"), keys, 3)


class MLP(nnx.Module):
    def __init__(self, config: VisionConfig, **init):
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, **init)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, **init)

    def __call__(self, x: Float[Array, "N T D"], keys: Key[Array, " N"] | None) -> Float[Array, "N T D"]:
        return self.fc2(gelu(self.fc1(x, keys, 4)), keys, 5)


class EncoderLayer(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, stack: tuple[int, ...], dtype: jnp.dtype):
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps, stack=stack, dtype=dtype)
        self.self_attn = Attention(config, rngs=rngs, stack=stack, dtype=dtype)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps, stack=stack, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, stack=stack, dtype=dtype)

    def __call__(self, x: Float[Array, "N T D"], keys: Key[Array, " N"] | None) -> Float[Array, "N T D"]:
        x = x + self.self_attn(self.layer_norm1(x), keys)
        return x + self.mlp(self.layer_norm2(x), keys)


@jax.custom_jvp
def gelu(x: Float[Array, "*N I"]) -> Float[Array, "*N I"]:
    """GELU's tanh form. In 16 bits it is rounded once where it is not differentiated, else step by step, as
    PyTorch does: rounded once, one adapter's gradient is further from float32 than the benchmarks' gate lets
    pass, though all together are nearer."""
    return rounded_once(jax.nn.gelu, x)


gelu.defjvp(lambda primals, tangents: jax.jvp(jax.nn.gelu, primals, tangents))


class PatchEmbedding(nnx.Module):
    """The stride-14 VALID convolution as one matrix product; its weight keeps the file's OIHW shape."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        patch, dim = config.patch_size, config.hidden_size
        self.weight = nnx.Param(normal(rngs.params(), (dim, 3, patch, patch), (3 * patch**2) ** -0.5, dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), dtype))
        self.patch_size = patch

    def __call__(self, x: Float[Array, "N S S 3"]) -> Float[Array, "N T D"]:
        side = x.shape[1] // self.patch_size * self.patch_size  # the right and bottom remainder is never seen
        patches = rearrange(
            x[:, :side, :side], "n (y p) (x q) c -> n (y x) (c p q)", p=self.patch_size, q=self.patch_size
        )
        weight = rearrange(self.weight[...], "d c p q -> d (c p q)").astype(x.dtype)
        return jnp.einsum("ntp,dp->ntd", patches, weight) + self.bias[...].astype(x.dtype)


class PositionEmbedding(nnx.Module):
    """A learned table [T, D], started from 2-D sines: from small noise, tiny models never learn position."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.asarray(_sincos_2d(config.grid_side, config.hidden_size), dtype))


def _sincos_2d(side: int, dim: int) -> Float[np.ndarray, "T D"]:
    quarter = dim // 4
    frequency = 10000.0 ** (-np.arange(quarter) / max(quarter, 1))
    y, x = np.divmod(np.arange(side**2), side)
    angles = [axis[:, None] * frequency for axis in (y, x)]
    table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return np.pad(table, ((0, 0), (0, dim - table.shape[1]))).astype(np.float32)


class SiglipVisionTower(nnx.Module):
    """Patch features of views: hidden states after config.feature_layers layers, before any final norm."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.dtype = jnp.dtype(dtype)  # of the computation; trainables are stored in float32 whatever it is
        self.patch_embedding = PatchEmbedding(config, rngs=rngs, dtype=dtype)
        self.position_embedding = PositionEmbedding(config, dtype=dtype)
        self.layers = EncoderLayer(config, rngs=rngs, stack=(config.num_layers_run,), dtype=dtype)

    def __call__(
        self,
        pixels: UInt8[Array, "N S S 3"],
        keys: Key[Array, " N"] | None = None,
        *,
        one_by_one: bool = False,
        **how,
    ) -> Float[Array, "N T F"]:
        """Features of N views; F = hidden_size x number of feature layers, in the order of the config.

        Args:
            pixels: RGB, 0..255; normalised here with mean and std 0.5 (a quarter of the host-device traffic).
            keys: one LoRA dropout key per view, or None.
            one_by_one: views that are large take turns, for inference on a CPU.
            how: remat, unroll, mesh of layers.scan_layers.
        """
        large = self.config.num_patches * self.config.intermediate_size > LARGE_VIEW
        if one_by_one and large and len(pixels) > 1:
            assert keys is None, "training computes its views together"
            return lax.map(lambda view: self(view[None], **how)[0], pixels)
        x = ((pixels.astype(jnp.float32) / 255 - 0.5) / 0.5).astype(self.dtype)
        x = self.patch_embedding(x) + self.position_embedding.weight[...].astype(self.dtype)

        def body(layer: EncoderLayer, x: Float[Array, "N T D"], index: Int[Array, ""]):
            layer_keys = None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
            return layer(x, layer_keys), None

        outputs, first = {}, 0
        for last in sorted(set(self.config.feature_layers)):
            x, _ = scan_layers(body, self.layers, x, first=first, last=last, **how)
            outputs[last], first = x, last
        return jnp.concatenate([outputs[index] for index in self.config.feature_layers], axis=-1)
