"""Which rows a step trains on, and in which bucket.

The order is a pure function of (seed, step): a cursor is one integer, and it survives a change of the process
count. One global batch has one bucket, so all hosts run the same program at the same step.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from mmrstraj_jax.data.collate import Shape, Sizes
from mmrstraj_jax.data.index import Index
from mmrstraj_jax.data.packing import pack
from mmrstraj_jax.data.shuffle import shuffled


def _cost(shape: Shape) -> float:
    """Rough work of a row in LLM tokens; a 384 px view is worth 50 (7B) to 900 (0.5B) of them."""
    return shape.length + 256 * shape.views + shape.canvas**2 / 16 + shape.supervised / 4


class Schedule:
    """Rows and bucket of every step.

    Without weights each epoch holds every row exactly once, in ceil(rows / batch_size) steps. With weights an
    epoch is as long, source i has its share of the draws, and no row is drawn again before all of its source
    were. With packing all of this is said of packs instead of rows: batch_size counts packs.

    Attributes:
      buckets: every shape a step can have, most expensive first.
      packs: the members of each pack; None without packing.
      steps_per_epoch.
    """

    def __init__(
        self,
        index: Index,
        sizes: Sizes,
        batch_size: int,
        seed: int,
        max_buckets: int = 12,
        *,
        packing: bool = False,
    ):
        assert batch_size > 0 and max_buckets > 0 and seed >= 0
        self.batch_size, self.seed = batch_size, seed
        self._sources = [(source.start, source.count) for source in index.sources]
        self._draws = _draws(
            [count for _, count in self._sources], [source.weight for source in index.sources]
        )
        shapes, self.packs = index.shapes, None
        if packing:
            self.packs = pack(index, sizes.max_length, sizes.view_buckets[-1], seed)
            shapes, rows = self.packs.shapes, self._sources
            self._sources = self.packs.sources
            self._draws = [
                max(1, round(draws * packs / count))
                for draws, (_, packs), (_, count) in zip(self._draws, self._sources, rows, strict=True)
            ]
        self.steps_per_epoch = -(-sum(self._draws) // batch_size)
        rounded, group_of = _rounded(shapes, sizes)
        # Not keyed on K: that would multiply the programs, while a larger K costs little.
        keys = sorted({shape._replace(supervised=0) for shape in rounded})
        place = {shape: at for at, shape in enumerate(keys)}
        number_of = np.asarray([place[shape._replace(supervised=0)] for shape in rounded])
        count_of = np.bincount(number_of[group_of], minlength=len(keys))
        joined = _merge_small(dict(zip(keys, count_of.tolist(), strict=True)), batch_size, max_buckets)
        final = [joined[shape._replace(supervised=0)] for shape in rounded]
        order = _with_supervised(final, rounded)
        place = {shape._replace(supervised=0): at for at, shape in enumerate(order)}
        self._bucket_of = np.asarray([place[shape] for shape in final], np.int32)[group_of]
        # Where the rows go that fill no batch of their own: the cheapest larger bucket, in the end one for
        # all (the last).
        self._next = [
            next((other for other in range(at + 1, len(order)) if shape.fits(order[other])), None)
            for at, shape in enumerate(order)
        ]
        self._shapes = [*order, functools.reduce(Shape.join, order)]
        self.buckets = sorted(set(self._shapes), key=_cost, reverse=True)
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def __reduce__(self):
        state = {key: value for key, value in self.__dict__.items() if key != "_epoch"}
        return _restore_schedule, (state,)

    def batch(self, step: int) -> tuple[Shape, Int[np.ndarray, " batch_size"]]:
        """(bucket, row numbers) of a step, from 0 over all epochs; -1 is a padding row of weight 0.

        With packing the numbers are those of packs; `members` names their rows.
        """
        epoch, at = divmod(step, self.steps_per_epoch)
        buckets, rows = self._epoch(epoch)
        return self._shapes[buckets[at]], rows[at]

    def members(self, number: int) -> list[int]:
        """Row numbers behind a number of `batch`: one, none for padding, several in a pack."""
        if number < 0:
            return []
        return [number] if self.packs is None else self.packs.members(number)

    def num_samples(self, step: int) -> int:
        """Samples of a step, padding left out."""
        return sum(len(self.members(number)) for number in self.batch(step)[1].tolist())

    def largest(self, start: int, stop: int) -> Shape | None:
        """The most expensive bucket of the steps start .. stop - 1 that lie in the epoch of `start`.

        Compiled and run before the first step, it shows at once whether memory suffices.
        """
        epoch, at = divmod(start, self.steps_per_epoch)
        buckets = self._epoch(epoch)[0][at : at + stop - start]
        return max((self._shapes[number] for number in set(buckets.tolist())), key=_cost, default=None)

    def _plan_epoch(self, epoch: int) -> tuple[Int[np.ndarray, " steps"], Int[np.ndarray, "steps batch"]]:
        drawn = []
        for stream, ((start, count), draws) in enumerate(zip(self._sources, self._draws, strict=True), 1):
            begin, end = epoch * draws, (epoch + 1) * draws
            for number in range(begin // count, -(-end // count)):
                order = start + shuffled(count, self.seed, number, stream)
                drawn.append(order[max(0, begin - number * count) : end - number * count])
        rows = np.concatenate(drawn)
        rows = rows[shuffled(len(rows), self.seed, epoch, 0)]
        bucket_of = self._bucket_of[rows]
        waiting = [rows[bucket_of == number] for number in range(len(self._next))]
        parts, left = [], [np.zeros(0, rows.dtype)]
        for number, target in enumerate(self._next):
            mine = waiting[number]
            whole = len(mine) // self.batch_size * self.batch_size
            parts.append(mine[:whole])
            if target is None:
                left.append(mine[whole:])
            else:
                waiting[target] = np.concatenate([mine[whole:], waiting[target]])
        padding = -sum(map(len, left)) % self.batch_size
        parts.append(np.concatenate([*left, np.full(padding, -1, rows.dtype)]))
        buckets = np.repeat(np.arange(len(parts)), [len(part) // self.batch_size for part in parts])
        batches = np.concatenate(parts).reshape(-1, self.batch_size)
        assert len(batches) == self.steps_per_epoch, (len(batches), self.steps_per_epoch)
        order = shuffled(len(batches), self.seed, epoch, (1 << 16) - 1)
        return buckets[order], batches[order]


def _restore_schedule(state: dict) -> Schedule:
    schedule = object.__new__(Schedule)
    schedule.__dict__.update(state)
    schedule._epoch = functools.lru_cache(maxsize=2)(schedule._plan_epoch)
    return schedule


def _draws(counts: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Draws an epoch from each source: all rows, or their sum split by weight (largest remainders)."""
    if any(weight is None for weight in weights):
        return list(counts)
    total, scale = sum(counts), sum(weights)
    exact = [total * weight / scale for weight in weights]
    draws = [int(value) for value in exact]
    for at in sorted(range(len(exact)), key=lambda at: draws[at] - exact[at])[: total - sum(draws)]:
        draws[at] += 1
    return [max(1, value) for value in draws]


def _rounded(shapes: Int[np.ndarray, "rows 5"], sizes: Sizes) -> tuple[list[Shape], Int[np.ndarray, " rows"]]:
    """(distinct rounded shapes, which of them each row has). By columns: a million rows take a second."""
    columns = shapes.astype(np.int64).T.copy()
    for at in range(3):  # views, length, supervised
        distinct, place = np.unique(columns[at], return_inverse=True)
        zero = Shape(0, 0, 0, 0, False)
        name = Shape._fields[at]
        columns[at] = np.asarray(
            [sizes.round(zero._replace(**{name: value}))[at] for value in distinct.tolist()]
        )[place]
    radix = columns.max(1) + 1
    codes, group_of = np.unique(np.ravel_multi_index(tuple(columns), tuple(radix)), return_inverse=True)
    values = np.stack(np.unravel_index(codes, tuple(radix)), 1)
    return [Shape.of(value) for value in values], group_of


def _merge_small(counts: dict[Shape, int], batch_size: int, limit: int) -> dict[Shape, Shape]:
    """Joins groups that cannot fill a batch, or are too many to compile, with the one that costs least extra.

    Takes rows per shape, returns the shape that each becomes.
    """
    counts, becomes = dict(counts), {shape: shape for shape in counts}
    while len(counts) > 1:
        smallest = min(counts, key=lambda shape: (counts[shape], _cost(shape), shape))
        if len(counts) <= limit and counts[smallest] >= batch_size:
            break
        mine = counts.pop(smallest)

        def extra(other: Shape, shape: Shape = smallest, mine: int = mine) -> float:
            cost = _cost(shape.join(other))
            return mine * (cost - _cost(shape)) + counts[other] * (cost - _cost(other))

        other = min(counts, key=lambda shape: (extra(shape), _cost(shape), shape))
        joined = smallest.join(other)
        counts[joined] = mine + counts.pop(other) + counts.pop(joined, 0)
        becomes = {shape: joined if final in (smallest, other) else final for shape, final in becomes.items()}
    return becomes


def _with_supervised(final: Sequence[Shape], rounded: Sequence[Shape]) -> list[Shape]:
    """The buckets, cheapest first, each with room for the K of every bucket that may be promoted into it."""
    room: dict[Shape, int] = {}
    for bucket, shape in zip(final, rounded, strict=True):
        room[bucket] = max(room.get(bucket, 0), shape.supervised)
    buckets = [
        bucket._replace(supervised=max(room[other] for other in room if other.fits(bucket)))
        for bucket in room
    ]
    return sorted(buckets, key=lambda shape: (_cost(shape), shape))
