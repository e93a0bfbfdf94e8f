"""Order of the rows, buckets, and the stream of host batches."""

import os
import pickle
import tempfile
import time
from dataclasses import replace

import data_case
import jax
import numpy as np
import pytest

from mmrstraj_jax.config import LoaderConfig
from mmrstraj_jax.data import records
from mmrstraj_jax.data.collate import Shape, Sizes
from mmrstraj_jax.data.index import Index, build_index
from mmrstraj_jax.data.loader import Loader
from mmrstraj_jax.data.records import Source
from mmrstraj_jax.data.schedule import Schedule
from mmrstraj_jax.errors import UserError

SIZES = Sizes((1, 2, 3, 5, 7, 10, 37), 32, 1024)


def fake_index(shapes, sources=None):
    shapes = np.asarray(shapes, np.int32).reshape(-1, 5)
    return Index([None] * len(shapes), shapes, [], sources or [Source("a", None, 0, len(shapes))], "", "")


def mixed_shapes(count, seed=0):
    rng = np.random.default_rng(seed)
    choices = [
        (2, 150, 20, 0, 0),
        (5, 190, 40, 0, 1),
        (10, 200, 70, 0, 1),
        (0, 60, 12, 0, 0),
        (13, 300, 9, 32, 0),
    ]
    return [choices[at] for at in rng.choice(len(choices), count, p=[0.4, 0.3, 0.15, 0.1, 0.05])]


@pytest.mark.parametrize("count, batch", [(1, 8), (7, 8), (8, 8), (101, 8), (64, 1), (333, 16)])
def test_every_row_once_an_epoch_in_ceil_steps(count, batch):
    index = fake_index(mixed_shapes(count))
    schedule = Schedule(index, SIZES, batch, seed=3)
    assert schedule.steps_per_epoch == -(-count // batch)
    orders = []
    for epoch in range(3):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        rows = np.concatenate([schedule.batch(step)[1] for step in steps])
        assert sorted(rows[rows >= 0]) == list(range(count))
        assert (rows < 0).sum() == schedule.steps_per_epoch * batch - count
        orders.append(rows.tolist())
    if count > 8:
        assert orders[0] != orders[1] != orders[2]


def test_a_batch_has_one_bucket_with_room_for_all_its_rows():
    index = fake_index(mixed_shapes(400))
    schedule = Schedule(index, SIZES, 8, seed=0)
    promoted = 0
    for step in range(schedule.steps_per_epoch):
        bucket, rows = schedule.batch(step)
        assert bucket in schedule.buckets
        for row in rows[rows >= 0]:
            assert index.shape(row).fits(bucket)
            assert bucket.length in (32, 64, 96, 128, 160, 192, 224, 256, 320)
        promoted += len({SIZES.round(index.shape(row)).views for row in rows[rows >= 0]}) > 1
    assert promoted <= len(schedule.buckets)
    costs = [(bucket.views, bucket.length) for bucket in schedule.buckets]
    assert costs[0] == (37, 320)  # the most expensive first, so that it is compiled and fitted first


def test_number_of_programs_is_bounded():
    rng = np.random.default_rng(1)
    shapes = [(int(rng.integers(1, 37)), int(rng.integers(40, 900)), 20, 0, 1) for _ in range(500)]
    assert len(Schedule(fake_index(shapes), SIZES, 4, 0, max_buckets=6).buckets) <= 7
    # A group that cannot fill a batch gets no program of its own.
    schedule = Schedule(fake_index([(2, 100, 5, 0, 0)] * 40 + [(3, 100, 5, 0, 0)]), SIZES, 8, 0)
    assert len(schedule.buckets) == 1


def test_order_depends_on_seed_and_step_only():
    index = fake_index(mixed_shapes(100))
    first, again, other = (Schedule(index, SIZES, 8, seed) for seed in (5, 5, 6))
    steps = list(range(3 * first.steps_per_epoch))
    forward = [first.batch(step)[1].tolist() for step in steps]
    backward = [again.batch(step)[1].tolist() for step in reversed(steps)][::-1]
    assert forward == backward
    assert forward != [other.batch(step)[1].tolist() for step in steps]
    assert forward == [pickle.loads(pickle.dumps(first)).batch(step)[1].tolist() for step in steps]


def test_order_is_the_same_on_every_machine():
    """Golden: a change here breaks the resume of runs that exist."""
    schedule = Schedule(fake_index([(2, 100, 5, 0, 0)] * 10), SIZES, 4, seed=7)
    assert [schedule.batch(step)[1].tolist() for step in range(3)] == [
        [6, 1, 8, 5],
        [7, 3, -1, -1],
        [0, 2, 9, 4],
    ]


def test_mixture_weights_share_the_draws():
    sources = [Source("a", 3.0, 0, 100), Source("b", 1.0, 100, 20)]
    schedule = Schedule(fake_index([(2, 100, 5, 0, 0)] * 120, sources), SIZES, 8, seed=0)
    assert schedule.steps_per_epoch == 15
    drawn = np.zeros(120, int)
    for epoch in range(10):
        rows = np.concatenate([schedule.batch(15 * epoch + at)[1] for at in range(15)])
        assert (rows < 100).sum() == 90 and (rows >= 100).sum() == 30
        np.add.at(drawn, rows, 1)
    assert set(drawn[:100]) == {9} and set(drawn[100:]) == {15}  # none again before all its source were drawn


def build(tmp_path, sizes, batch=4, max_buckets=12, **how):
    path = data_case.dataset(tmp_path, sizes)
    tokenizer = data_case.tokenizer()
    found = records.load(str(path))
    index = build_index(found, tokenizer, data_case.TINY, SIZES)
    schedule = Schedule(index, SIZES, batch, seed=1, max_buckets=max_buckets)
    return Loader(index, schedule, tokenizer, data_case.TINY, **how)


MIXED = [(100, 100), (200, 150), None, (112, 300), (90, 110), (230, 230), (50, 60), (100, 90), (30, 40)]


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_stream_starts_anywhere_and_does_not_depend_on_workers(tmp_path):
    loader = build(tmp_path, MIXED)
    expected = [loader(step) for step in range(5)]
    for how in ({"threads": 0}, {"threads": 3}, {"workers": 2}):
        got = list(replace(loader, how=LoaderConfig(**how)).iterate(2, 5))
        assert [step for step, _, _ in got] == [2, 3, 4]
        assert all(type(bucket) is Shape for _, bucket, _ in got)
        for mine, other in zip(expected[2:], got, strict=True):
            assert mine[1] == other[1]
            equal(mine[2], other[2])


def test_processes_share_one_global_batch(tmp_path):
    whole = build(tmp_path, MIXED)
    parts = [
        Loader(whole.index, whole.schedule, whole.tokenizer, whole.policy, process_index=at, process_count=2)
        for at in range(2)
    ]
    for step in range(3):
        _, bucket, batch = whole(step)
        pieces = [part(step) for part in parts]
        assert all(piece[1] == bucket for piece in pieces)
        equal(batch, jax.tree.map(lambda *leaves: np.concatenate(leaves), *[piece[2] for piece in pieces]))
    with pytest.raises(UserError, match="cannot be split over 3 processes"):
        build(tmp_path, MIXED, process_count=3)


def test_padding_rows_weigh_nothing_and_ids_are_known(tmp_path):
    loader = build(tmp_path, MIXED)
    seen = []
    for step in range(loader.schedule.steps_per_epoch):
        ids, (_, _, batch) = loader.ids(step), loader(step)
        seen += [name for name in ids if name]
        assert (batch["weights"].sum(1) > 0).tolist() == [name is not None for name in ids]
        assert batch["inputs"].sample_index.tolist() == list(range(4 * step, 4 * step + 4))
        assert batch["inputs"].lengths.min() >= 1
    assert sorted(seen) == sorted(f"row{number}" for number in range(9))


def test_a_mixed_stream_compiles_no_more_programs_than_buckets(tmp_path):
    """Image sizes of every kind; the first program is that of the largest bucket, run on padding."""
    random = np.random.default_rng(0)
    sizes = [tuple(random.integers(20, 400, 2).tolist()) for _ in range(30)]
    loader = build(tmp_path, sizes, max_buckets=4)
    schedule = loader.schedule
    steps = schedule.steps_per_epoch
    order = [schedule.batch(step)[1].tolist() for step in range(steps)]
    program = jax.jit(lambda batch: jax.tree.map(lambda leaf: leaf.ravel()[0], batch))
    largest = schedule.largest(0, steps)
    program(loader.blank(largest))
    used = set()
    for step in range(2 * steps):
        _, bucket, batch = loader(step)
        program(batch)
        used.add(bucket)
        if step < steps:
            assert largest.views >= bucket.views and largest.length >= bucket.length
    assert (
        len(set(map(tuple, sizes))) == 30 and program._cache_size() == len(used) <= len(schedule.buckets) <= 5
    )
    assert order == [schedule.batch(step)[1].tolist() for step in range(steps)]
    assert schedule.largest(steps, steps) is None


def test_without_room_for_temporary_files_the_stream_goes_on(tmp_path, monkeypatch):
    loader = build(tmp_path, MIXED)

    def gone(*_, **__):
        raise FileNotFoundError(2, "No such file or directory")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryDirectory", gone)
        assert len(list(loader.iterate(0, 3))) == 3
    stream = loader.iterate(0, 3)
    with monkeypatch.context() as patch:  # it vanishes before the first row is noted
        patch.setattr(np, "memmap", gone)
        assert len(list(stream)) == 3
    assert loader._under_way(str(tmp_path / "gone"), 0, 0) == loader._under_way(None, 0, 0) == []


class Stuck(Loader):
    def __call__(self, step):
        if step == 1:
            time.sleep(30)
        return super().__call__(step)


def test_who_waits_for_a_batch_can_be_told_to_stop(tmp_path):
    loader, got, begin = build(tmp_path, MIXED), [], time.monotonic()
    stuck = Stuck(loader.index, loader.schedule, loader.tokenizer, loader.policy)
    for step, _, _ in stuck.iterate(0, 3, lambda: bool(got)):
        got.append(step)
    assert got == [0] and time.monotonic() - begin < 25


class Deadly(Loader):
    def __call__(self, step):
        if step == 1:
            os._exit(9)
        return super().__call__(step)


def test_a_worker_that_dies_ends_the_stream_with_the_rows_at_hand(tmp_path):
    loader = build(tmp_path, MIXED)
    how = LoaderConfig(workers=1, prefetch=1)
    deadly = Deadly(loader.index, loader.schedule, loader.tokenizer, loader.policy, how=how)
    with pytest.raises(RuntimeError, match=r"step \d .*row\d.*exit code 9"):
        list(deadly.iterate(0, 3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_damaged_after_indexing_is_named(tmp_path, workers):
    loader = build(tmp_path, MIXED)
    victim = next(path for path in tmp_path.iterdir() if path.name.endswith("-3.png"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"row 3 \(counted from 0\) \(id row3\).*damaged or truncated"):
        list(replace(loader, how=LoaderConfig(workers=workers)).iterate(0, 3))
    data_case.picture(40, 40).save(victim)
    with pytest.raises(UserError, match="changed since the data was indexed"):
        list(loader.iterate(0, 3))
