#!/usr/bin/env python3
"""Checks a cluster in a minute, before a job of hours: who is where, bandwidth, clocks, shared files.

    srun python3 launch/check.py --folder /shared/runs                    under SLURM
    launch/check --folder DIR                                             one process
    launch/check --folder DIR --coordinator HOST:PORT --num-processes N --process-id I

Exit code 0: all is well; 1: a check failed, each with a line; 2: bad input.
"""

import os
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np

from mmrstraj_jax.config import ClusterConfig
from mmrstraj_jax.errors import CommandParser, run_command
from mmrstraj_jax.training.distributed import OPTIONS, connect, find_place, leave

WIDTH = 64  # bytes of a host name in the rank map


def gather(values: np.ndarray) -> np.ndarray:
    """[n] of each process -> [processes, n]."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return values[None]
    return np.asarray(multihost_utils.process_allgather(values))


def rank_map() -> list[str]:
    """A line for each process: host, process id, its devices."""
    import jax

    name = socket.gethostname().encode()[:WIDTH].ljust(WIDTH, b"\0")
    facts = np.array([os.getpid(), jax.local_device_count()], np.int32)
    hosts, numbers = gather(np.frombuffer(name, np.uint8)), gather(facts)
    kind = jax.devices()[0].device_kind
    lines = []
    for rank, (host, (pid, count)) in enumerate(zip(hosts, numbers.tolist(), strict=True)):
        name = bytes(host.astype(np.uint8)).rstrip(b"\0").decode()
        lines.append(f"process {rank}: {name}, pid {pid}, {count} x {kind}")
    return lines


def clock_spread() -> float:
    """Seconds between the first and the last clock, read right after all processes met."""
    gather(np.zeros(1, np.int32))  # the meeting
    now = time.time_ns()
    clocks = gather(np.array([now // 10**9 % 10**6, now % 10**9 // 1000], np.int32)).astype(np.int64)
    seconds = clocks[:, 0] + clocks[:, 1] / 1e6
    return float(seconds.max() - seconds.min())


def all_reduce(megabytes: float) -> float:
    """Bus bandwidth in GB/s: 2 (n - 1) / n x bytes / seconds, as NCCL's tests count; the best of 5."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    count = int(megabytes * 1e6) // 4
    rows = NamedSharding(mesh, P("data"))
    mine = np.ones((jax.local_device_count(), count), np.float32)
    values = jax.make_array_from_process_local_data(rows, mine)
    total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, P()))
    if float(jax.block_until_ready(total(values)).addressable_data(0)[0]) != devices:
        raise RuntimeError("the all-reduce gives a wrong sum")
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(total(values))
        best = min(best, time.perf_counter() - begin)
    return 2 * (devices - 1) / devices * count * 4 / best / 1e9


def shared_files(folder: Path) -> tuple[list[str], str]:
    """(problems, a line of facts): every process writes a file and reads everyone's."""
    import jax

    rank, count = jax.process_index(), jax.process_count()
    token = gather(np.array([time.time_ns() % 2**31], np.int32))[0, 0]  # process 0's: no stale file fits
    names = [folder / f".check-{token}-{other}" for other in range(count)]
    try:
        begin = time.perf_counter()
        with names[rank].open("wb") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
        seconds, broken = time.perf_counter() - begin, False
    except OSError as error:
        print(f"process {rank}: {folder}: {error.strerror or error}", file=sys.stderr)
        seconds, broken = 0.0, True
    failed = gather(np.array([broken], np.int32))[:, 0]
    missing = [other for other in range(count) if not failed[other] and not names[other].is_file()]
    seen = gather(np.array([len(missing)], np.int32))[:, 0]
    names[rank].unlink(missing_ok=True)
    problems = [f"process {other}: {folder} cannot be written" for other in np.flatnonzero(failed)]
    problems += [
        f"process {other}: does not see the files of {unseen} other(s) in {folder}; name a shared folder"
        for other, unseen in enumerate(seen)
        if unseen
    ]
    free = shutil.disk_usage(folder).free / 2**30 if folder.is_dir() else 0.0
    return problems, f"{folder}: {free:.0f} GiB free, 1 MiB written and synced in {1e3 * seconds:.0f} ms"


def main(args: list[str]) -> int:
    parser = CommandParser("check", __doc__)
    parser.prog = "launch/check"
    parser.add_argument("--folder", type=Path, required=True, help="where runs are to lie")
    parser.add_argument(
        "--megabytes", type=float, default=64.0, help="of the all-reduce (default: %(default)s)"
    )
    parser.add_argument("--min-bandwidth", type=float, default=0.0, metavar="GB/S", help="less fails")
    parser.add_argument("--max-clock", type=float, default=1.0, metavar="SECONDS", help="more apart fails")
    for option in OPTIONS:
        parser.add_argument(option)
    options = parser.parse_args(args)
    place = find_place((options.coordinator, options.num_processes, options.process_id), os.environ)
    if place is not None:
        connect(place, ClusterConfig(start_timeout=120))

    import jax

    lines, apart = rank_map(), clock_spread()
    bandwidth = all_reduce(options.megabytes)
    problems, files = shared_files(options.folder)
    lines.append(f"clocks at most {apart:.3f} s apart")
    if jax.device_count() > 1:
        lines.append(
            f"all-reduce of {options.megabytes:g} MB over {jax.device_count()} devices: {bandwidth:.2f} GB/s"
        )
        if bandwidth < options.min_bandwidth:
            problems.append(f"all-reduce: {bandwidth:.2f} GB/s, expected {options.min_bandwidth:g} or more")
    if apart > options.max_clock:
        problems.append(f"clocks: {apart:.3f} s apart, expected {options.max_clock:g} or less; start NTP")
    if jax.process_index() == 0:
        print("\n".join([*lines, files, *(f"FAILED: {problem}" for problem in problems)]), flush=True)
    return leave(1 if problems else 0, at_once=place is not None)


if __name__ == "__main__":
    run_command(main)
