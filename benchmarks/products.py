"""How fast XLA reads a weight [out, in] that a few rows are multiplied with, by how the product is written.

    python benchmarks/products.py --dtype bfloat16      on a CPU; GB/s of weights, read from memory each time

Decoding is nothing but such products. `models.layers.times` chooses among them; this is why it chooses so.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mmrstraj_jax.models import layers

SHAPES = ((4864, 896), (896, 4864), (896, 896), (151936, 896))  # of the 0.5B decoder: MLP, attention, head
AT_LEAST = 2**28  # bytes of different weights in turn: more than a processor's caches hold
ROUNDS = 9


def right(x: Array, w: Array) -> Array:
    return jnp.einsum("ni,oi->no", x, w)


def left(x: Array, w: Array) -> Array:
    return jax.lax.optimization_barrier(jnp.einsum("oi,ni->on", w, x)).T  # else it becomes x W^T


def doubled(x: Array, w: Array) -> Array:
    return right(jnp.concatenate([x, x]), w)[: len(x)]


def summed(x: Array, w: Array) -> Array:
    products = w.astype(jnp.float32) * x[:, None].astype(jnp.float32)
    return products.sum(-1).astype(x.dtype)


WAYS: dict[str, Callable[[Array, Array], Array]] = {
    "x W^T": right,
    "W x^T": left,
    "rows doubled": doubled,
    "multiplied, summed": summed,
    "layers.times": layers.times,
}


def rate(way: Callable[[Array, Array], Array], x: Array, weights: list[Array]) -> Callable[[], float]:
    """A function that times all products, each waiting for the one before, in bytes of weights a second."""

    @jax.jit
    def chain(x, weights):
        for w in weights:
            y = way(x, w)
            x = x + 0 * y[:, :1]
        return y

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(chain(x, weights))
        return sum(w.nbytes for w in weights) / (time.perf_counter() - start)

    once()
    return once


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {args.dtype}, GB/s\n")
    print("| rows | weight | " + " | ".join(WAYS) + " |")
    print("|---" * (2 + len(WAYS)) + "|")
    for rows in (1, 4):
        for out, width in SHAPES:
            weights, size = [], 0
            while size < AT_LEAST:
                weights.append(jax.random.normal(jax.random.key(size), (out, width)).astype(args.dtype))
                size += weights[-1].nbytes
            x = jax.random.normal(jax.random.key(1), (rows, width)).astype(args.dtype)
            timed = {name: rate(way, x, weights) for name, way in WAYS.items()}
            found = {name: [] for name in timed}
            for _ in range(ROUNDS):
                for name, once in timed.items():
                    found[name].append(once())
            cells = " | ".join(f"{statistics.median(each) / 1e9:.1f}" for each in found.values())
            print(f"| {rows} | {out} x {width} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
