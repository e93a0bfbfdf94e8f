"""Which rows a step trains on, and the host batches themselves.

The order is a pure function of (seed, step): a cursor is one integer, and it survives a change of the process
count. One global batch has one bucket, so all hosts run the same program at the same step.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from mmrstraj_jax.config import AnyResConfig
from mmrstraj_jax.data import collate, images
from mmrstraj_jax.data.collate import Batch, Shape, Sizes
from mmrstraj_jax.data.index import Index
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.errors import UserError


def shuffled(count: int, seed: int, number: int, stream: int) -> Int[np.ndarray, " count"]:
    """A permutation from raw Philox bits: unlike Generator.permutation, the same in every NumPy."""
    bits = np.random.Philox(key=np.array([seed, number << 16 | stream], np.uint64))
    return np.argsort(bits.random_raw(count), kind="stable")


def _cost(shape: Shape) -> float:
    """Rough work of a row in LLM tokens; a 384 px view is worth 50 (7B) to 900 (0.5B) of them."""
    return shape.length + 256 * shape.views + shape.canvas**2 / 16 + shape.supervised / 4


class Schedule:
    """Rows and bucket of every step.

    Without weights each epoch holds every row exactly once, in ceil(rows / batch_size) steps. With weights an
    epoch is as long, source i has its share of the draws, and no row is drawn again before all of its source
    were.

    Attributes:
      buckets: every shape a step can have, most expensive first.
      steps_per_epoch.
    """

    def __init__(self, index: Index, sizes: Sizes, batch_size: int, seed: int, max_buckets: int = 12):
        assert batch_size > 0 and max_buckets > 0 and seed >= 0
        self.batch_size, self.seed = batch_size, seed
        self._sources = [(source.start, source.count) for source in index.sources]
        self._draws = _draws(
            [count for _, count in self._sources], [source.weight for source in index.sources]
        )
        self.steps_per_epoch = -(-sum(self._draws) // batch_size)
        rounded, group_of = _rounded(index.shapes, sizes)
        # Not keyed on K: that would multiply the programs, while a larger K costs little.
        keys = sorted({shape._replace(supervised=0) for shape in rounded})
        place = {shape: at for at, shape in enumerate(keys)}
        number_of = np.asarray([place[shape._replace(supervised=0)] for shape in rounded])
        count_of = np.bincount(number_of[group_of], minlength=len(keys))
        joined = _merge_small(dict(zip(keys, count_of.tolist(), strict=True)), batch_size, max_buckets)
        final = [joined[shape._replace(supervised=0)] for shape in rounded]
        self._order = _with_supervised(final, rounded)
        place = {shape._replace(supervised=0): at for at, shape in enumerate(self._order)}
        self._bucket_of = np.asarray([place[shape] for shape in final], np.int32)[group_of]
        # Where the rows go that fill no batch of their own: the cheapest larger bucket, in the end one for
        # all.
        self._top = functools.reduce(Shape.join, self._order)
        self._next = [
            next((other for other in range(at + 1, len(self._order)) if shape.fits(self._order[other])), None)
            for at, shape in enumerate(self._order)
        ]
        self.buckets = sorted({*self._order, self._top}, key=_cost, reverse=True)
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def __reduce__(self):
        state = {key: value for key, value in self.__dict__.items() if key != "_epoch"}
        return _restore_schedule, (state,)

    def batch(self, step: int) -> tuple[Shape, Int[np.ndarray, " batch_size"]]:
        """(bucket, row numbers) of a step, from 0 over all epochs; -1 is a padding row of weight 0."""
        epoch, at = divmod(step, self.steps_per_epoch)
        bucket, rows = self._epoch(epoch)[at]
        return bucket, rows

    def _plan_epoch(self, epoch: int) -> list[tuple[Shape, np.ndarray]]:
        drawn = []
        for stream, ((start, count), draws) in enumerate(zip(self._sources, self._draws, strict=True), 1):
            places = np.arange(epoch * draws, (epoch + 1) * draws)
            for number in range(places[0] // count, places[-1] // count + 1):
                order = shuffled(count, self.seed, number, stream)
                drawn.append(start + order[places[places // count == number] % count])
        rows = np.concatenate(drawn)
        rows = rows[shuffled(len(rows), self.seed, epoch, 0)]
        buckets = self._bucket_of[rows]
        batches: list[tuple[Shape, np.ndarray]] = []
        waiting = [rows[buckets == number] for number in range(len(self._order))]
        left = [np.zeros(0, rows.dtype)]
        for number, shape in enumerate(self._order):
            mine = waiting[number]
            whole = len(mine) // self.batch_size * self.batch_size
            batches += [(shape, part) for part in mine[:whole].reshape(-1, self.batch_size)]
            target = self._next[number]
            if target is None:
                left.append(mine[whole:])
            else:
                waiting[target] = np.concatenate([mine[whole:], waiting[target]])
        rest = np.concatenate(left)
        for begin in range(0, len(rest), self.batch_size):
            part = rest[begin : begin + self.batch_size]
            padded = np.full(self.batch_size, -1, rows.dtype)
            padded[: len(part)] = part
            batches.append((self._top, padded))
        assert len(batches) == self.steps_per_epoch, (len(batches), self.steps_per_epoch)
        return [batches[at] for at in shuffled(len(batches), self.seed, epoch, (1 << 16) - 1)]


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
    values = np.stack(np.unravel_index(codes, tuple(radix)), 1).tolist()
    return [Shape(*value[:4], bool(value[4])) for value in values], group_of


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


@dataclass(frozen=True)
class Loader:
    """Host batches: `loader(step)` is the one step, `loader.iterate(start)` streams them in order."""

    index: Index
    schedule: Schedule
    tokenizer: Tokenizer
    policy: AnyResConfig
    mask: str = "original"
    image_policy: images.ImagePolicy = images.DEFAULT
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self):
        if self.schedule.batch_size % self.process_count:
            raise UserError(
                f"batch_size {self.schedule.batch_size} cannot be split over {self.process_count} processes; "
                "choose a multiple of their number"
            )

    def ids(self, step: int) -> list[str | None]:
        """Row ids of the whole global batch, None for padding."""
        _, rows = self.schedule.batch(step)
        return [None if row < 0 else self.index.rows[row].id for row in rows]

    def __call__(self, step: int) -> tuple[int, Shape, Batch]:
        """(step, bucket, this process's rows of the batch).

        Raises UserError naming the row: an image that can no longer be read, or changed since it was indexed.
        """
        bucket, rows = self.schedule.batch(step)
        local = len(rows) // self.process_count
        begin = self.process_index * local
        examples = [None if row < 0 else self._example(row) for row in rows[begin : begin + local]]
        # One number for each drawn row, whatever the process count; int32 as the dropout key wants it.
        number = (step * len(rows) + begin + np.arange(local)) & 0x7FFFFFFF
        pad, size = self.tokenizer.pad_id, self.policy.view_size
        return step, bucket, collate.batch(examples, bucket, pad, size, number)

    def _example(self, row: int) -> collate.Example:
        example = collate.example(
            self.index.rows[row], self.tokenizer, self.policy, mask=self.mask, image_policy=self.image_policy
        )
        if example.shape != self.index.shape(row):
            raise UserError(
                f"{self.index.rows[row].where}: its image changed since the data was indexed; start again"
            )
        return example

    def iterate(
        self, start: int, stop: int, *, workers: int = 0, threads: int = 4, prefetch: int = 4
    ) -> Iterator[tuple[int, Shape, Batch]]:
        """Batches of steps start .. stop - 1, prepared ahead.

        Args:
          workers: processes; 0 prepares in this one, in `threads` threads.
          prefetch: batches that may wait, for each worker.
        Raises:
          UserError: as __call__, also from a worker. RuntimeError: a worker died; names the step.
        """
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
        dataset = grain.MapDataset.range(start, stop).map(self).to_iter_dataset(reading)
        if workers:
            if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)
            dataset = dataset.mp_prefetch(options)
        due = start
        try:
            for item in dataset:
                yield item
                due += 1
        except RuntimeError as error:  # grain's report of a worker that was killed
            raise RuntimeError(
                f"a data worker died at step {due} or soon after (rows {self.ids(due)}): {error}"
            ) from error
