"""Looks before a run starts: `python -m mmrstraj_jax.plan --config stage1`, with the options of the run.

Checks the data from image headers, counts views and tokens, and says what a step costs in memory, FLOPs and
wire bytes, which strategy fits which GPU, and why. Reads no weights and allocates nothing.

    --config NAME      as for train; every --FIELD VALUE of train works too
    --gpus NAMES       A100-40, A100-80, H100, H200, B200, L40S, RTX4090, ... (default A100-40,A100-80,H100)
    --devices N        how many of them (default 8, or fewer where the batch is smaller)
    --preview FILE     writes an HTML page of samples: views, token counts, coloured supervised tokens
    --samples N        on that page (default 6)
    --dry-run          compiles the real step for N CPU devices in a child process: the compiler's memory

Bad input: one line, exit code 2.
"""

import difflib
import math
import time
from pathlib import Path

from mmrstraj_jax.config import Config, load_config
from mmrstraj_jax.errors import UserError, run_command
from mmrstraj_jax.settings import take_flag, take_option

OPTIONS = ("--config", "--gpus", "--devices", "--preview", "--samples", "--dry-run")


def plan(
    config: Config,
    gpus: list[str],
    devices: int,
    preview: Path | None,
    samples: int,
    dry_run: bool,
    overridden: frozenset[str] = frozenset(),
) -> None:
    """Prints the plan. Raises UserError: whatever training would refuse to start with.

    Args:
        overridden: dotted names of fields that were set by hand.
    """
    from mmrstraj_jax.planning import dataset, dryrun, report, strategy
    from mmrstraj_jax.planning import preview as pages
    from mmrstraj_jax.planning.program import abstract_model
    from mmrstraj_jax.training import setup
    from mmrstraj_jax.training.optimizer import check_groups

    if config.batch_size % devices:
        raise UserError(f"--devices {devices}: expected a divisor of batch_size {config.batch_size}")
    if devices % config.fsdp:
        raise UserError(f"--fsdp {config.fsdp}: expected a divisor of --devices {devices}")
    setup.global_micro_batch(config, devices)
    setup.check_length(config, overridden)
    setup.check_start(config)
    began = time.monotonic()
    found = dataset.inspect(config, print)
    check_groups(abstract_model(config, found.model).trainable, overridden)
    setup.check_views(config, found.loader.policy, overridden)
    print(f"checked {len(found.shapes)} rows in {time.monotonic() - began:.1f} s")
    for note in found.notes:
        print(f"note: {note}")
    sections = [report.data(found), report.buckets(found, config)]
    sections += [report.parameters(found, config), report.work(found, config)]
    schedule = found.loader.schedule
    options = strategy.options(config, found.model, schedule.buckets, found.drawn, devices)
    sections.append(report.strategies(options, devices, gpus))
    chosen, _ = strategy.recommend(options, report.GPUS[gpus[0]])
    sections.append(report.buffers(chosen or options[-1]))
    sections.append(["recommended:", *(f"  {line}" for line in report.advice(options, gpus))])
    for section in sections:
        print("\n" + "\n".join(section))
    if config.dtype == "float32":
        print(f"  {report.cpu(found, config)}")
    if preview is not None:
        pages.write(preview, found, samples)
        print(f"\npreview: {preview}")
    if dry_run:
        shape = schedule.buckets[0]
        print(f"\ndry run of {tuple(shape)}", flush=True)
        print("\n".join(dryrun.run(config, found.model, shape, devices)))


def _take_number(args: list[str], option: str) -> tuple[int | None, list[str]]:
    value, args = take_option(args, option)
    if value is not None and (not value.isdecimal() or int(value) < 1):
        raise UserError(f"{option} {value}: expected a whole number, 1 or more")
    return (None if value is None else int(value)), args


def main(args: list[str]) -> int:
    if {"--help", "-h"} & set(args):
        print(__doc__)
        return 0
    name, args = take_option(args, "--config")
    given, args = take_option(args, "--gpus")
    devices, args = _take_number(args, "--devices")
    samples, args = _take_number(args, "--samples")
    page, args = take_option(args, "--preview")
    dry_run, args = take_flag(args, "--dry-run")
    for word in args:
        if near := difflib.get_close_matches(word.partition("=")[0], OPTIONS, 1, 0.85):
            raise UserError(f"unknown option {word}: did you mean {near[0]}?")
    config, overridden = load_config(name or "stage1", args)

    from mmrstraj_jax.planning.gpus import find

    gpus = [word.lower() for word in (given or "A100-40,A100-80,H100").split(",") if word]
    for gpu in gpus:
        find(gpu)
    if not gpus:
        raise UserError("--gpus: a name is missing")
    if devices is None:  # the small recipes' batches are smaller than a node
        devices = math.gcd(config.batch_size, 8)
    plan(config, gpus, devices, Path(page) if page else None, samples or 6, dry_run, overridden)
    return 0


if __name__ == "__main__":
    run_command(main)
