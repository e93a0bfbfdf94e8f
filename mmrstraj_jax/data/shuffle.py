"""The one source of randomness of the data order."""

import numpy as np
from jaxtyping import Int


def shuffled(count: int, seed: int, number: int, stream: int) -> Int[np.ndarray, " count"]:
    """A permutation from raw Philox bits: unlike Generator.permutation, the same in every NumPy."""
    bits = np.random.Philox(key=np.array([seed, number << 16 | stream], np.uint64))
    return np.argsort(bits.random_raw(count), kind="stable")
