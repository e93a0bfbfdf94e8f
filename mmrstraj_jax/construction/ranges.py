"""Ranges of settings: a number out of its range is refused by name, before anything is read, sent or paid."""

import math
from typing import Any

from mmrstraj_jax.errors import UserError


def check(config: Any, low: float, high: float, *names: str, option: str = "--") -> None:
    """Raises UserError: one of these fields, or an element of a tuple, is below `low` or above `high`.

    `option`: what stands before the field's name on the command line.
    """
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high:
                wanted = f"{low} or more" if high == math.inf else f"{low} to {high}"
                raise UserError(f"{option}{name.replace('_', '-')} {number}: expected {wanted}")


def is_box(numbers: tuple[float, ...]) -> bool:
    """Whether they are west, south, east, north in degrees; west > east crosses the antimeridian."""
    if len(numbers) != 4 or not all(abs(number) <= 180 for number in numbers):
        return False
    return -90 <= numbers[1] < numbers[3] <= 90
