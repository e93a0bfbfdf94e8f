"""A model, not a measurement: time, memory and wire bytes of LoRA training on 1 to 1,024 GPUs, by strategy.

    python benchmarks/scaling.py --assume-mfu 0.45 --gpu a100-40
    python benchmarks/scaling.py --measured benchmarks/measured/FILE.json --gpu h100

Compute is the measured step of one device (compare.py, item train-<remat>), or its FLOPs at an assumed share
of the data sheet's rate. Memory and wire bytes are those of the plan command. Every device keeps its rows
(weak scaling). A step lies between full overlap, max(compute, wire), and none, compute + wire. Wire time is
bytes over the slowest link that the group crosses: the node's own up to --node devices, the network beyond,
plus --latency for every level of a tree.
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from speed.workloads import SIZES, Item

from mmrstraj_jax.config import Config
from mmrstraj_jax.data.collate import Shape
from mmrstraj_jax.planning import flops, memory, strategy
from mmrstraj_jax.planning.gpus import GPUS, NODE_LINK

COUNTS = tuple(2**power for power in range(11))
PAPER = "8 x A100 40 GB, ZeRO-3 (the paper's setting)"


@dataclass(frozen=True)
class Links:
    """What joins devices; rates of one device in one direction.

    Attributes:
        node: devices of a node.
        inside: GB/s between the devices of a node.
        between: GB/s between nodes.
        latency: seconds for each level of a tree, and back.
    """

    node: int
    inside: float
    between: float
    latency: float

    def seconds(self, wire_bytes: float, devices: int) -> float:
        """Time to send this many bytes in collectives over a group of consecutive devices."""
        if devices == 1:
            return 0.0
        rate = self.inside if devices <= self.node else self.between
        return wire_bytes / (rate * 1e9) + 2 * math.ceil(math.log2(devices)) * self.latency


@dataclass(frozen=True)
class Point:
    """One strategy on one number of devices."""

    strategy: str
    devices: int
    memory_gib: float  # of one device
    wire_bytes: float  # that one device sends in a step
    compute_s: float
    wire_s: float
    rows: int  # of one device and step

    @property
    def overlapped_s(self) -> float:
        return max(self.compute_s, self.wire_s)

    @property
    def serial_s(self) -> float:
        return self.compute_s + self.wire_s

    @property
    def samples_per_s(self) -> tuple[float, float]:
        """Without and with overlap."""
        return self.devices * self.rows / self.serial_s, self.devices * self.rows / self.overlapped_s


def point(item: Item, compute_s: float, links: Links, devices: int, fsdp: int) -> Point:
    """One device of `devices`, its weights shared by groups of `fsdp` (1: replicated)."""
    text = item.model.text
    shape = Shape(
        item.views, item.length, item.sizes.supervised, 0, item.reduced_side < item.model.vision.grid_side
    )
    config = Config(dtype=item.dtype, remat=item.remat, batch_size=item.batch, micro_batch_size=item.batch)
    assert item.length <= text.max_position_embeddings
    needed = memory.estimate(config, item.model, shape, fsdp=fsdp)
    reduced = strategy.wire_bytes(config, item.model, devices, 1)
    gathered = strategy.wire_bytes(config, item.model, devices, fsdp) - reduced
    wire_s = links.seconds(reduced, devices) + links.seconds(gathered, fsdp)
    name = "data parallel" if fsdp == 1 else "fsdp, all devices" if fsdp == devices else f"fsdp {fsdp}"
    return Point(name, devices, needed.peak / 2**30, reduced + gathered, compute_s, wire_s, item.batch)


def curve(item: Item, compute_s: float, links: Links, counts: tuple[int, ...] = COUNTS) -> list[Point]:
    """Replicated, sharded inside a node, and sharded over all devices (as ZeRO-3)."""
    points = [point(item, compute_s, links, count, 1) for count in counts]
    points += [point(item, compute_s, links, count, links.node) for count in counts if count > links.node]
    return points + [point(item, compute_s, links, count, count) for count in counts if count > 1]


def assumed_seconds(item: Item, tflops: float, share: float) -> float:
    """A step's FLOPs at a share of the rate."""
    row = flops.of_row(item.model, item.views, item.length, item.sizes.supervised)
    return item.batch * row.training(Config(remat=item.remat, dtype=item.dtype)) / (share * tflops * 1e12)


def measured_seconds(path: Path, remat: str) -> tuple[Item, float]:
    """The training item of a file of compare.py and ours' median; of several that with most views."""
    found = [
        (Item(**result["item"]), result["sides"]["ours"]["median_s"])
        for result in json.loads(path.read_text())["results"]
        if result["name"] == f"train-{remat}" and result["ratios"]
    ]
    if not found:
        raise SystemExit(f"{path}: no figure of train-{remat}; run compare.py --only train-{remat}")
    return max(found, key=lambda one: (one[0].views, one[0].batch))


def markdown(points: list[Point]) -> str:
    lines = [
        "| GPUs | strategy | memory | sent a GPU and step | compute | wire | samples/s, no - full overlap |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in points:
        low, high = one.samples_per_s
        lines.append(
            f"| {one.devices:,} | {one.strategy} | {one.memory_gib:.1f} GiB | {one.wire_bytes / 1e6:,.0f} MB "
            f"| {1e3 * one.compute_s:.0f} ms | {1e3 * one.wire_s:.1f} ms | {low:,.1f} - {high:,.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(points: list[Point], title: str, path: Path) -> None:
    """Samples a second and device; each band reaches from no overlap to full overlap."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name in dict.fromkeys(one.strategy for one in points):
        mine = [one for one in points if one.strategy == name]
        counts = [one.devices for one in mine]
        rates = [[rate / one.devices for rate in one.samples_per_s] for one in mine]
        low, high = zip(*rates, strict=True)
        (line,) = axes.plot(counts, low, marker="o", markersize=3, label=name)
        axes.fill_between(counts, low, high, color=line.get_color(), alpha=0.25)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("samples a second and GPU (model)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def arguments() -> argparse.Namespace:
    folder = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--measured", type=Path, help="JSON of compare.py: one device's measured step")
    source.add_argument("--assume-mfu", type=float, help="share of the data sheet's rate, 0 to 1")
    parser.add_argument("--size", choices=tuple(SIZES), default="7b", help="with --assume-mfu")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="a100-40")
    parser.add_argument("--remat", choices=("none", "dots", "block"), default="block")
    parser.add_argument("--views", type=int, default=5, help="with --assume-mfu")
    parser.add_argument("--batch", type=int, default=1, help="rows a device, with --assume-mfu")
    parser.add_argument("--node", type=int, default=8, help="devices of a node")
    parser.add_argument("--inside", type=float, help="GB/s a device inside a node; default: the data sheet's")
    parser.add_argument("--between", type=float, default=NODE_LINK, help="GB/s a device between nodes")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds a level of a tree")
    parser.add_argument("--out", type=Path, default=folder / "measured")
    parser.add_argument("--image", type=Path, default=folder.parent / "docs" / "images" / "scaling.png")
    args = parser.parse_args()
    if args.assume_mfu is not None and not 0 < args.assume_mfu <= 1:
        parser.error(f"--assume-mfu {args.assume_mfu}: expected a share, more than 0 and at most 1")
    return args


def main() -> None:
    args = arguments()
    gpu = GPUS[args.gpu]
    if args.measured:
        item, compute_s = measured_seconds(args.measured, args.remat)
        source = f"measured step {1e3 * compute_s:.0f} ms"
    else:
        item = Item("train", args.size, "bfloat16", args.batch, args.views, args.remat)
        compute_s = assumed_seconds(item, gpu.tflops, args.assume_mfu)
        source = f"assumed {100 * args.assume_mfu:.0f} % of {gpu.tflops:g} TFLOP/s"
    links = Links(args.node, args.inside or gpu.link, args.between, args.latency)
    points = curve(item, compute_s, links)
    paper_gpu = GPUS["a100-40"]
    paper_links = Links(8, paper_gpu.link, NODE_LINK, args.latency)
    share = args.assume_mfu or compute_s and assumed_seconds(item, gpu.tflops, 1.0) / compute_s
    paper = point(item, assumed_seconds(item, paper_gpu.tflops, share), paper_links, 8, 8)
    paper = dataclasses.replace(paper, strategy=PAPER)
    title = f"{item.size}, {item.views} views, remat {item.remat}, {args.gpu}, {source}"
    record = {
        "command": shlex.join(["python", "benchmarks/scaling.py", *sys.argv[1:]]),
        "title": title,
        "links": dataclasses.asdict(links),
        "points": [dataclasses.asdict(one) for one in (*points, paper)],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"scaling-{item.size}-{args.gpu}"
    (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(points, title, args.image)
    print(title)
    print(markdown([*points, paper]))


if __name__ == "__main__":
    main()
