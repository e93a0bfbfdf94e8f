"""Ranges of settings: a number out of its range is refused by name, before anything is read, sent or paid."""

import functools

from mmrstraj_jax.settings import check_range

check = functools.partial(check_range, key="--")


def is_box(numbers: tuple[float, ...]) -> bool:
    """Whether they are west, south, east, north in degrees; west > east crosses the antimeridian."""
    if len(numbers) != 4 or not all(abs(number) <= 180 for number in numbers):
        return False
    return -90 <= numbers[1] < numbers[3] <= 90
