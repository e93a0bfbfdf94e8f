"""Higher AnyRes on the device: bilinear reduction with traced scales on static shapes, then a gather.

The host decides everything integer (`data/anyres.plan`); one compiled program serves every image size of a
bucket. Bilinear is torch's `interpolate(align_corners=False, antialias=False)`, which equals
`jax.image.resize(..., antialias=False)`, the oracle of the tests (LLaVA-NeXT `llava_arch.py`).
Legend: B rows, V views, s patches per view side, H hidden, P pool.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def reduce_maps(maps: Float[Array, "N Y X H"], scale: Float[Array, "N 2"]) -> Float[Array, "N Y X H"]:
    """Resizes map n to (Y scale[n,0], X scale[n,1]), kept in the top-left corner of the same shape.

    Cells outside that corner hold no meaning; the gather never reads them. Scale 1 is the identity, bit for
    bit. The arithmetic is float32.
    """

    def one(image: Float[Array, "Y X H"], scale: Float[Array, " 2"]) -> Float[Array, "Y X H"]:
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), scale, jnp.zeros(2), method="linear", antialias=False
        )

    return jax.vmap(one)(maps.astype(jnp.float32), scale).astype(maps.dtype)


def visual_pool(
    tokens: Float[Array, "B V T H"],
    newline: Float[Array, " H"],
    view_scale: Float[Array, "B V"] | None,
    canvas_index: Int[Array, "B Y X"] | None,
    canvas_scale: Float[Array, "B 2"] | None,
) -> Float[Array, "B P H"]:
    """Every vector a row's visual positions may name: view tokens, canvas tokens, newline, in this order.

    Args:
        tokens: projected features of each view.
        newline: image_newline.
        view_scale: bilinear scale of each view's map (tau policy, video), or None when no view is reduced.
        canvas_index: view tokens laid out as the unpadded crop map, its edge replicated (so that taps beyond
            the map clamp); only where anyres_max_N resizes.
        canvas_scale: scale per axis of that map.
    """
    rows, views, num_patches, hidden = tokens.shape
    flat = tokens.reshape(rows, views * num_patches, hidden)
    canvas = []
    if canvas_index is not None:
        laid = jax.vmap(lambda row, index: row[index])(flat, canvas_index)
        canvas = [reduce_maps(laid, canvas_scale).reshape(rows, -1, hidden)]
    if view_scale is not None:
        side = round(num_patches**0.5)
        maps = tokens.reshape(rows * views, side, side, hidden)
        scale = jnp.repeat(view_scale.reshape(-1, 1), 2, axis=1)
        flat = reduce_maps(maps, scale).reshape(rows, views * num_patches, hidden)
    newline = jnp.broadcast_to(newline.astype(tokens.dtype), (rows, 1, hidden))
    return jnp.concatenate([flat, *canvas, newline], axis=1)


def merge_with_text(
    text: Float[Array, "B L H"], pool: Float[Array, "B P H"], visual_index: Int[Array, "B L"]
) -> Float[Array, "B L H"]:
    """Text embeddings where visual_index is -1, else the pool vector it names, gathered within the row."""
    visual = jnp.take_along_axis(pool, jnp.maximum(visual_index, 0)[..., None], axis=1)
    return jnp.where((visual_index >= 0)[..., None], visual, text)
