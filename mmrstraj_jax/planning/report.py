"""The plan as text: data, buckets, parameters, memory by strategy, floors by GPU, and what to choose."""

import numpy as np

from mmrstraj_jax.config import Config
from mmrstraj_jax.planning import flops, strategy
from mmrstraj_jax.planning.dataset import Dataset, histogram
from mmrstraj_jax.planning.gpus import GPUS
from mmrstraj_jax.planning.memory import estimate
from mmrstraj_jax.planning.program import Measured, abstract_model
from mmrstraj_jax.planning.strategy import GIB, Option


def size(count: float) -> str:
    """Bytes, in MiB below a GiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Aligned columns, the first to the left; the first row is the head."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    align = "<" + ">" * (len(widths) - 1)
    return [
        "  " + "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]


def data(found: Dataset) -> list[str]:
    """Histograms of the rows."""
    shapes = found.shapes
    lines = histogram(shapes[:, 0], "views a row (base view and crops)")
    lines += histogram(shapes[:, 1], "tokens a row (text and visual)")
    return lines + histogram(shapes[:, 2], "supervised tokens a row")


def buckets(found: Dataset, config: Config) -> list[str]:
    """The compiled programs of one epoch, how often each runs, and how much of it is padding."""
    schedule = found.loader.schedule
    steps = range(schedule.steps_per_epoch)
    drawn: dict = {}
    real = np.zeros(2)
    for step in steps:
        bucket, numbers = schedule.batch(step)
        drawn[bucket] = drawn.get(bucket, 0) + 1
        real += found.drawn[numbers[numbers >= 0], :2].sum(0)  # the last batch may have rows of padding
    rows = [("bucket", "views", "tokens", "supervised", "steps an epoch", "TFLOP a row")]
    for number, bucket in enumerate(schedule.buckets, 1):
        cost = flops.of_row(found.model, *bucket[:3]).training(config) / 1e12
        rows.append((str(number), *map(str, bucket[:3]), str(drawn.get(bucket, 0)), f"{cost:.3g}"))
    padded = sum(np.array(bucket[:2]) * count * config.batch_size for bucket, count in drawn.items())
    tokens, views = 100 * real[1] / padded[1], 100 * real[0] / padded[0]
    used = f"; {tokens:.0f} % of their tokens and {views:.0f} % of their views are real"
    return [f"buckets: {len(schedule.buckets)} programs, {len(steps)} steps an epoch{used}", *table(rows)]


def parameters(found: Dataset, config: Config) -> list[str]:
    """Parameters by part, and what trains."""
    tree = abstract_model(config, found.model)
    rows = [("parameters", "all", "trained")]
    for part in ("vision_tower", "multi_modal_projector", "image_newline", "language_model"):
        frozen, trained = (
            sum(leaf.size for name, leaf in leaves.items() if name.split(".")[0] == part)
            for leaves in (tree.frozen, tree.trainable)
        )
        rows.append((part, f"{frozen + trained:,}", f"{trained:,}"))
    return table(rows)


def work(found: Dataset, config: Config) -> list[str]:
    """FLOPs of a mean row and of a step."""
    mean = found.drawn[:, :3].mean(0)
    row = flops.of_row(found.model, *mean)
    four_n = flops.four_n(found.model, found.drawn).mean() / 1e12
    rows = [("TFLOP of a mean row", "tower", "projector", "decoder", "head", "forward", "training", "4N")]
    parts = (
        row.tower_linear + row.tower_attention,
        row.projector,
        row.decoder_linear + row.decoder_attention,
        row.head,
        row.forward,
        row.training(config),
    )
    cells = [f"{part / 1e12:.3g}" for part in parts]
    rows.append((f"{mean[0]:.1f} views, {mean[1]:.0f} tokens, remat {config.remat}", *cells, f"{four_n:.3g}"))
    step = row.training(config) * config.batch_size / 1e12
    return [*table(rows), f"  a step of {config.batch_size} rows: {step:.3g} TFLOP"]


def strategies(found: list[Option], devices: int, names: list[str]) -> list[str]:
    """Memory, wire and floor of every strategy, on every GPU asked for."""
    head = ("strategy", "memory a device", "wire a step", *(f"{name} floor" for name in names))
    rows = [head]
    for option in found:
        floors = (
            f"{option.floor(GPUS[name]) * 1e3:.3g} ms" if option.fits(GPUS[name]) else "does not fit"
            for name in names
        )
        rows.append((option.name, size(option.memory.peak), size(option.wire_bytes), *floors))
    return [
        f"{devices} device(s), fused attention; floors are at data-sheet rates: double them for a good run",
        *table(rows),
    ]


def buffers(option: Option) -> list[str]:
    """Where the memory of one strategy goes, at its peak."""
    rows = [(f"{option.name}: at its peak ({option.memory.peak_phase.name})", size(option.memory.peak))]
    rows += [(f"  {name}", size(count)) for name, count in option.memory.buffers.items()]
    return table(rows)


def advice(found: list[Option], names: list[str]) -> list[str]:
    """One line for each GPU."""
    lines = []
    for name in names:
        best, why = strategy.recommend(found, GPUS[name])
        flags = "" if best is None else f" (--remat {best.remat} --fsdp {best.fsdp})"
        lines.append(f"{name}: {best.name + flags + ': ' if best else ''}{why}")
    return lines


def cpu(found: Dataset, config: Config) -> str:
    """Peak memory of the same run on this CPU, where attention scores are materialised."""
    shapes = strategy.largest(found.loader.schedule.buckets)
    estimates = [estimate(config, found.model, shape, gpu=False) for shape in shapes]
    worst = max(estimates, key=lambda memory: memory.peak)
    return (
        f"one CPU device, remat {config.remat}, {config.dtype}: {size(worst.peak)} in arrays, "
        f"{size(worst.scratch)} in XLA's scratch"
    )


def measured(result: Measured, predicted: int, seconds: float, devices: int) -> list[str]:
    """What the compiler says, beside the prediction."""
    rows = [
        ("compiled for", f"{devices} CPU device(s) in {seconds:.1f} s"),
        ("arguments", size(result.arguments)),
        ("temporary", size(result.temporary)),
        ("results that need new memory", size(result.outputs - result.aliased)),
        ("peak of a device, compiler", size(result.peak)),
        ("peak of a device, predicted", f"{size(predicted)} ({100 * (predicted / result.peak - 1):+.1f} %)"),
    ]
    return table(rows)
