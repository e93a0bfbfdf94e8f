"""Random numbers that are the same on every Python: one PCG64 stream per key, read as plain uniform
doubles."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Stream:
    """Draws of one key (a tuple of non-negative integers). Only `Generator.random` is used: its stream is the
    one NumPy keeps stable across versions; everything else is derived from it here."""

    def __init__(self, *key: int):
        self.generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        self._buffer: list[float] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        if not self._buffer:
            self._buffer = self.generator.random(64).tolist()
        return low + (high - low) * self._buffer.pop()

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def integer(self, low: int, high: int) -> int:
        """A whole number in low..high, both ends included."""
        return low + int(self.uniform() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        return items[int(self.uniform() * len(items))]

    def weighted(self, weights: dict[T, float]) -> T:
        """A key of `weights`, drawn in proportion to its value."""
        point = self.uniform() * math.fsum(weights.values())
        for item, weight in weights.items():
            point -= weight
            if point < 0:
                return item
        return item

    def shuffled(self, items: Sequence[T]) -> list[T]:
        result = list(items)
        for i in range(len(result) - 1, 0, -1):
            j = int(self.uniform() * (i + 1))
            result[i], result[j] = result[j], result[i]
        return result
