"""The host batches of a schedule: read, decoded and collated ahead of the step that trains on them."""

import contextlib
import functools
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import grain
import numpy as np
from absl import flags

from mmrstraj_jax.config import AnyResConfig, LoaderConfig
from mmrstraj_jax.data import collate, images
from mmrstraj_jax.data.collate import Batch, Shape
from mmrstraj_jax.data.index import Index
from mmrstraj_jax.data.schedule import Schedule
from mmrstraj_jax.data.tokenizer import Tokenizer
from mmrstraj_jax.errors import UserError

_SLOTS = 4096  # more than batches that can be under way at once
_START = 120.0  # seconds more that the first batch may take: worker processes import all modules first
_END = 5.0  # seconds that closing may take after a batch did not come
Item = tuple[int, Shape, Batch]


class WorkerFailed(RuntimeError):
    """A data worker died, or gave no batch in time; the message names the rows it was reading."""


@dataclass(frozen=True)
class Loader:
    """Host batches: `loader(step)` is the one step, `loader.iterate(start, stop)` streams them in order."""

    index: Index
    schedule: Schedule
    tokenizer: Tokenizer
    policy: AnyResConfig
    mask: str = "original"
    image_policy: images.ImagePolicy = images.DEFAULT
    how: LoaderConfig = LoaderConfig()
    process_index: int = 0
    process_count: int = 1
    trace: str | None = None  # a file of _SLOTS int64: the row that a step under way is reading

    def __post_init__(self):
        if self.schedule.batch_size % self.process_count:
            raise UserError(
                f"batch_size {self.schedule.batch_size} cannot be split over {self.process_count} processes; "
                "choose a multiple of their number"
            )

    def ids(self, step: int) -> list[str | None]:
        """Row ids of the whole global batch, None for padding."""
        _, numbers = self.schedule.batch(step)
        rows = [row for number in numbers.tolist() for row in self.schedule.members(number) or [None]]
        return [None if row is None else self.index.rows[row].id for row in rows]

    def __call__(self, step: int) -> Item:
        """(step, bucket, this process's rows of the batch).

        Raises UserError naming the row: an image that can no longer be read, or changed since it was indexed.
        """
        bucket, numbers = self.schedule.batch(step)
        local = len(numbers) // self.process_count
        begin = self.process_index * local
        examples = [self._row(step, number) for number in numbers[begin : begin + local].tolist()]
        self._note(step, -1)
        # One number for each drawn row, whatever the process count; int32 as the dropout key wants it.
        return step, bucket, self._collate(bucket, examples, step * len(numbers) + begin)

    def blank(self, bucket: Shape) -> Batch:
        """A batch of padding in the shape of a bucket: to compile and run its program without data."""
        return self._collate(bucket, [None] * (self.schedule.batch_size // self.process_count), 0)

    def _collate(self, bucket: Shape, examples: list[collate.Example | None], first: int) -> Batch:
        order = (first + np.arange(len(examples))) & 0x7FFFFFFF
        pad, size, packed = self.tokenizer.pad_id, self.policy.view_size, self.schedule.packs is not None
        return collate.batch(examples, bucket, pad, size, order, packed=packed)

    def _row(self, step: int, number: int) -> collate.Example | None:
        samples = []
        for row in self.schedule.members(number):
            self._note(step, row)
            samples.append(self._example(row))
        return samples[0] if len(samples) == 1 else collate.join(samples) if samples else None

    def _example(self, row: int) -> collate.Example:
        item = self.index.rows[row]
        example = collate.example(
            item, self.tokenizer, self.policy, mask=self.mask, image_policy=self.image_policy
        )
        if example.shape != self.index.shape(row):
            raise UserError(
                f"{item.where}: its image changed since the data was indexed; empty the index cache "
                "(loader.cache_dir) and start again"
            )
        return example

    # ---- streaming ----

    def iterate(self, start: int, stop: int) -> Iterator[Item]:
        """Batches of steps start .. stop - 1, prepared ahead as `how` says.

        Raises:
          UserError: as __call__, also from a worker. WorkerFailed: a worker died, or no batch came within
          how.timeout seconds.
        """
        with tempfile.TemporaryDirectory(prefix="mmrstraj-loader-") as folder:
            trace = os.path.join(folder, "rows")
            np.full(_SLOTS, -1, np.int64).tofile(trace)
            stream = _Ahead(iter(replace(self, trace=trace)._dataset(start, stop)), self.how.timeout)
            with contextlib.closing(stream):
                for due in range(start, stop):
                    try:
                        yield stream.get(_START if due == start and self.how.workers else 0.0)
                    except (RuntimeError, TimeoutError) as error:  # RuntimeError: grain's, for a dead worker
                        what = "stopped" if isinstance(error, TimeoutError) else "died"
                        rows = self._under_way(trace, start, due) or self.ids(due)
                        raise WorkerFailed(
                            f"a data worker {what} at step {due} or soon after, reading "
                            f"{', '.join(map(str, rows))}: {error}"
                        ) from error

    def _dataset(self, start: int, stop: int) -> grain.IterDataset:
        how = self.how
        threads = 0 if how.workers else how.threads  # one row at a time in each worker process
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=how.prefetch if threads else 0)
        dataset = grain.MapDataset.range(start, stop).map(self).to_iter_dataset(reading)
        if not how.workers:
            return dataset
        if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=how.workers, per_worker_buffer_size=how.prefetch)
        return dataset.mp_prefetch(options, worker_init_fn=_start_worker)

    @functools.cached_property
    def _trace(self) -> np.ndarray:
        return np.memmap(self.trace, np.int64, "r+")

    def _note(self, step: int, row: int) -> None:
        if self.trace is not None:
            self._trace[step % _SLOTS] = row

    def _under_way(self, trace: str, start: int, due: int) -> list[str]:
        """What the worker of the step that is due was reading; of threads, what each of them was."""
        rows = np.fromfile(trace, np.int64)
        every = self.how.workers or 1
        steps = (step for step in range(due, due + _SLOTS) if (step - start) % every == (due - start) % every)
        found = (int(rows[step % _SLOTS]) for step in steps)
        return [self.index.rows[row].where for row in dict.fromkeys(found) if row >= 0]


def _start_worker(number: int, count: int) -> None:
    """Ctrl-C is for the training process, which then saves and ends its workers; so is the accelerator."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, name="parent", daemon=True).start()


def _follow_parent() -> None:
    """After kill -9 of the training process nobody else would end this one."""
    multiprocessing.parent_process().join()
    os._exit(1)


class _Ahead:
    """Pulls an iterator in a thread, so that waiting for it can end."""

    def __init__(self, items: Iterator[Item], timeout: float):
        self._items, self._timeout = items, timeout
        self._ready: queue.Queue = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._late = False
        threading.Thread(target=self._pull, name="loader", daemon=True).start()

    def _pull(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
        except BaseException as error:  # raised again by get
            self._put((None, error))

    def _put(self, answer: tuple[Item | None, BaseException | None]) -> bool:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(answer, timeout=0.2)
                return True
        return False

    def get(self, patience: float = 0.0) -> Item:
        """Raises what the iterator raised, or TimeoutError."""
        try:
            item, error = self._ready.get(timeout=self._timeout + patience)
        except queue.Empty:
            self._late = True
            for child in multiprocessing.active_children():
                if child.name.startswith("grain-"):
                    child.kill()  # closing would wait long for one that hangs
            raise TimeoutError(f"no batch for {self._timeout + patience:g} s (loader.timeout)") from None
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        self._closed.set()
        if not self._late:
            self._items.close()
            return
        # grain joins its threads, and one that waits for a row that never ends, or for a worker that left
        # with exit code 0, does not come back
        ending = threading.Thread(target=self._items.close, name="loader end", daemon=True)
        ending.start()
        ending.join(_END)
