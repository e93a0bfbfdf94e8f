"""Whether two sides computed the same numbers. No figure is reported of sides that did not."""

import numpy as np

# Largest relative error ||a - b|| / ||b|| of an array. Float32: another order of additions. bfloat16 has 8
# bits, and 50 layers multiply what is rounded; a wrong scale, a missing layer or mask is far outside.
LIMITS = {"float32": 1e-3, "bfloat16": 0.06}
# The most that a rival's own rounding may take of one array, while all together are within the limit.
# Gradients of queries and keys are differences of nearly equal numbers: PyTorch's in bfloat16 are up to 0.25
# from float32's (0.5B; ours up to 0.064). A scale, layer or mask that is wrong takes more.
ROUNDING = 0.5


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||; infinite where shapes differ or anything is not finite."""
    if actual.shape != expected.shape or not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("inf")
    difference = np.linalg.norm(actual.astype(np.float64) - expected)
    return float(difference / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-30))


def disagreements(
    ours: dict[str, np.ndarray],
    theirs: dict[str, np.ndarray],
    dtype: str,
    truth: dict[str, np.ndarray] | None = None,
) -> tuple[list[str], float]:
    """(one line for every array whose sides disagree, the largest relative error of all).

    Integer arrays (token ids) must be equal. Both sides must have the same arrays, and at least one.

    Args:
        truth: the same arrays in float32, of the same weights. They decide where 16 bits differ by more than
            the limit: ours must be within the limit of them, or nearer than the rival; the rival within
            ROUNDING of each and within the limit of all together.
    """
    if ours.keys() != theirs.keys() or not ours:
        return [f"different arrays: {sorted(ours.keys() ^ theirs.keys())}"], float("inf")
    lines, worst, limit = [], 0.0, LIMITS[dtype]
    same_work = truth is not None and relative_error(_together(theirs), _together(truth)) <= limit
    for name in sorted(ours):
        if np.issubdtype(ours[name].dtype, np.integer):
            same = np.array_equal(ours[name], theirs[name])
            lines += [] if same else [f"{name}: ids differ"]
            continue
        error = relative_error(ours[name], theirs[name])
        worst = max(worst, error)
        if error <= limit:
            continue
        line = f"{name}: relative error {error:.2g}, limit {limit:g}"
        if truth is not None:
            mine, rival = (relative_error(side[name], truth[name]) for side in (ours, theirs))
            if same_work and mine <= max(limit, rival) and rival <= ROUNDING:
                continue
            line += f"; from float32 ours {mine:.2g}, the rival's {rival:.2g}"
        lines.append(line)
    return lines, worst


def _together(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """All numbers in one row, less single ones (the loss would outweigh the gradients)."""
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays) if arrays[name].size > 1])


def distance(found: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> float:
    """The largest relative error of a side's arrays from those of float32."""
    return max(
        relative_error(value, truth[name])
        for name, value in found.items()
        if not np.issubdtype(value.dtype, np.integer)
    )
