"""The host batches of a schedule: read, decoded and collated ahead of the step that trains on them."""

import contextlib
import functools
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
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
_POLL = 0.2  # seconds between two looks at whether to go on waiting
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

    def iterate(
        self, start: int, stop: int, interrupted: Callable[[], bool] = lambda: False
    ) -> Iterator[Item]:
        """Batches of steps start .. stop - 1, prepared ahead as `how` says.

        Ends early when interrupted() turns true while it waits for a batch.

        Raises:
          UserError: as __call__, also from a worker. WorkerFailed: a worker died, or no batch came within
          how.timeout seconds.
        """
        with _trace_file() as trace:
            stream = _Ahead(iter(replace(self, trace=trace)._dataset(start, stop)), self.how.timeout)
            with contextlib.closing(stream):
                for due in range(start, stop):
                    try:
                        item = stream.get(_START if due == start and self.how.workers else 0.0, interrupted)
                        if item is None:
                            return
                        yield item
                    except (RuntimeError, TimeoutError) as error:  # RuntimeError: grain's, for a dead worker
                        if interrupted():  # a signal to all processes found a worker that was just starting
                            return
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
        try:
            return np.memmap(self.trace, np.int64, "r+")
        except OSError:  # removed meanwhile
            return np.empty(_SLOTS, np.int64)

    def _note(self, step: int, row: int) -> None:
        if self.trace is not None:
            self._trace[step % _SLOTS] = row

    def _under_way(self, trace: str | None, start: int, due: int) -> list[str]:
        """What the worker of the step that is due was reading; of threads, what each of them was."""
        try:
            rows = np.fromfile(trace or os.devnull, np.int64)
        except OSError:
            return []
        if len(rows) < _SLOTS:
            return []
        every = self.how.workers or 1
        steps = (step for step in range(due, due + _SLOTS) if (step - start) % every == (due - start) % every)
        found = (int(rows[step % _SLOTS]) for step in steps)
        return [self.index.rows[row].where for row in dict.fromkeys(found) if row >= 0]


@contextlib.contextmanager
def _trace_file() -> Iterator[str | None]:
    """Where rows under way are noted. Only a message needs it: no disk for it is no reason to stop."""
    with contextlib.ExitStack() as stack:
        try:
            made = tempfile.TemporaryDirectory(prefix="mmrstraj-loader-", ignore_cleanup_errors=True)
            path = os.path.join(stack.enter_context(made), "rows")
            np.full(_SLOTS, -1, np.int64).tofile(path)
        except OSError:
            path = None
        yield path


def _start_worker(number: int, count: int) -> None:
    """Signals to a whole process group (Ctrl-C, schedulers) are for the training process, which saves and
    then ends its workers; so is the accelerator.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
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
                self._ready.put(answer, timeout=_POLL)
                return True
        return False

    def get(self, patience: float, interrupted: Callable[[], bool]) -> Item | None:
        """None when interrupted. Raises what the iterator raised, or TimeoutError."""
        end = time.monotonic() + self._timeout + patience
        while True:
            try:
                item, error = self._ready.get(timeout=_POLL)
                break
            except queue.Empty:
                if not (asked := interrupted()) and time.monotonic() < end:
                    continue
            self._late = True
            for child in multiprocessing.active_children():
                if child.name.startswith("grain-"):
                    child.kill()  # closing would wait long for one that hangs
            if asked:
                return None
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
