"""Whether two sides computed the same numbers. No figure is reported of sides that did not."""

import numpy as np

# Largest relative error ||a - b|| / ||b|| of an array. Float32: another order of additions. bfloat16 has 8
# bits, and 50 layers multiply what is rounded; a wrong scale, a missing layer or mask is far outside.
LIMITS = {"float32": 1e-3, "bfloat16": 0.06}


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||; infinite where shapes differ or anything is not finite."""
    if actual.shape != expected.shape or not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("inf")
    difference = np.linalg.norm(actual.astype(np.float64) - expected)
    return float(difference / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-30))


def disagreements(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], dtype: str
) -> tuple[list[str], float]:
    """(one line for every array whose sides disagree, the largest relative error of all).

    Integer arrays (token ids) must be equal. Both sides must have the same arrays, and at least one.
    """
    if ours.keys() != theirs.keys() or not ours:
        return [f"different arrays: {sorted(ours.keys() ^ theirs.keys())}"], float("inf")
    lines, worst = [], 0.0
    for name in sorted(ours):
        if np.issubdtype(ours[name].dtype, np.integer):
            same = np.array_equal(ours[name], theirs[name])
            lines += [] if same else [f"{name}: ids differ"]
            continue
        error = relative_error(ours[name], theirs[name])
        worst = max(worst, error)
        if not error <= LIMITS[dtype]:
            lines.append(f"{name}: relative error {error:.2g}, limit {LIMITS[dtype]:g}")
    return lines, worst
