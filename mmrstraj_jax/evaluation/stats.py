"""Accuracies with their uncertainty: Wilson intervals, paired bootstrap, tables per type, blind baselines."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation.readers import Item

Z95 = 1.959963984540054


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); (0, 1) when n is 0."""
    if not 0 <= successes <= n:
        raise UserError(f"wilson: {successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Comparison:
    """B minus A on the same items, with a 95 % percentile interval and a two-sided bootstrap p-value."""

    n: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], *, draws: int = 10_000, seed: int = 0
) -> Comparison:
    """Draws items with replacement, the same ones for both. p is that of a difference of the other sign.

    Raises UserError: different lengths, or no items.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise UserError(
            f"paired bootstrap: scores of shape {a.shape} and {b.shape}; expected one each per item"
        )
    delta, rng = b - a, np.random.default_rng(seed)
    # in portions: a draw of 10,000 items is 80 kB
    means = np.concatenate(
        [delta[rng.integers(0, len(delta), (100, len(delta)))].mean(1) for _ in range(-(-draws // 100))]
    )[:draws]
    low, high = np.percentile(means, [2.5, 97.5])
    tail = min((means <= 0).mean(), (means >= 0).mean())
    p = min(1.0, 2 * max(tail, 1 / draws))
    return Comparison(
        len(a), float(a.mean()), float(b.mean()), float(delta.mean()), float(low), float(high), p
    )


@dataclass(frozen=True)
class TypeRow:
    """One line of a table of answers. `accuracy` is of decided answers; `floor` counts undecided as wrong."""

    type: str
    n: int
    correct: int
    wrong: int
    undecided: int  # neither a rule nor a judge could tell
    accuracy: float | None  # None: nothing was decided
    low: float
    high: float
    floor: float
    majority: float | None = None  # the type's commonest answer, correct / n
    blind: float | None = None  # the commonest other answer to the same question string, correct / n


def row(
    name: str, verdicts: Sequence[str], majority: Sequence[str] = (), blind: Sequence[str] = ()
) -> TypeRow:
    """Counts verdicts ("correct", "wrong", anything else is undecided)."""
    count = Counter(verdicts)
    correct, wrong, n = count["correct"], count["wrong"], len(verdicts)
    decided = correct + wrong
    return TypeRow(
        type=name,
        n=n,
        correct=correct,
        wrong=wrong,
        undecided=n - decided,
        accuracy=correct / decided if decided else None,
        low=wilson(correct, decided)[0],
        high=wilson(correct, decided)[1],
        floor=correct / n if n else 0.0,
        majority=list(majority).count("correct") / n if majority else None,
        blind=list(blind).count("correct") / n if blind else None,
    )


@dataclass(frozen=True)
class Table:
    """Rows per type; `micro` pools all questions, `macro` is the plain mean of the types' accuracies."""

    rows: list[TypeRow]
    micro: TypeRow
    macro: float | None
    macro_types: int  # how many types that mean is of


def table(
    items: Sequence[Item],
    verdicts: Mapping[str, str],
    majority: Mapping[str, str] | None = None,
    blind: Mapping[str, str] | None = None,
) -> Table:
    """Verdicts by item id, and those of the two baselines, as a table. Types in the order of the items."""
    groups: dict[str, list[str]] = defaultdict(list)
    for item in items:
        groups[item.type].append(item.id)

    def of(name: str, ids: list[str]) -> TypeRow:
        base, other = ([source[i] for i in ids] if source else [] for source in (majority, blind))
        return row(name, [verdicts[i] for i in ids], base, other)

    rows = [of(name, ids) for name, ids in groups.items()]
    known = [r.accuracy for r in rows if r.accuracy is not None]
    micro = of("all (micro)", [item.id for item in items])
    return Table(rows, micro, sum(known) / len(known) if known else None, len(known))


def majority_answers(items: Sequence[Item], same: Mapping[str, str]) -> dict[str, str]:
    """For each item its type's commonest answer (ties: the first). `same`: id -> what makes answers equal."""
    counts: dict[str, Counter] = defaultdict(Counter)
    spelling: dict[tuple[str, str], str] = {}
    for item in items:
        counts[item.type][same[item.id]] += 1
        spelling.setdefault((item.type, same[item.id]), item.references[0])
    best = {kind: count.most_common(1)[0][0] for kind, count in counts.items()}
    return {item.id: spelling[item.type, best[item.type]] for item in items}


def blind_answers(items: Sequence[Item], same: Mapping[str, str]) -> dict[str, str]:
    """What one can answer without the image: the commonest *other* answer to the same question string.

    Leave-one-out; a question asked once gets its type's majority without its own answer.
    """
    by_question: dict[str, Counter] = defaultdict(Counter)
    by_type: dict[str, Counter] = defaultdict(Counter)
    spelling: dict[str, str] = {}
    for item in items:
        by_question[_key(item)][same[item.id]] += 1
        by_type[item.type][same[item.id]] += 1
        spelling.setdefault(same[item.id], item.references[0])
    answers = {}
    for item in items:
        own = Counter({same[item.id]: 1})
        others = by_question[_key(item)] - own or by_type[item.type] - own
        answers[item.id] = spelling[others.most_common(1)[0][0]] if others else ""
    return answers


def _key(item: Item) -> str:
    return " ".join((item.question or "").lower().split()).rstrip(" ?？.")
