"""Speed side by side with PyTorch (transformers and peft): same weights, shapes and inputs, in alternation.

    python benchmarks/compare.py --size 0.5b                         a CPU: 9 alternated rounds, float32
    python benchmarks/compare.py --size 7b --device gpu --compile --defaults

Every side is a process of its own. Before anything is timed both compute features, logits, loss and the
gradient of every adapter: sides that disagree get no figure. Writes JSON, a Markdown table and a plot below
--out; `python benchmarks/report.py` makes docs/performance.md of them. Needs jax, flax, optax, einops,
jaxtyping, numpy, torch, transformers, peft; matplotlib for the plot.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

from speed import measure, tables, workloads

ENVIRONMENT = {
    "cpu": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    # both live on one card: neither takes memory that it does not use
    "gpu": {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(workloads.SIZES), default="tiny")
    parser.add_argument(
        "--what",
        default=",".join(workloads.KINDS),
        help="some of vision, prefill, decode, train, and compile: first steps again, from the disk cache",
    )
    parser.add_argument("--only", default="", help="single items of these, e.g. decode-1,train-block")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32; GPU: bfloat16")
    parser.add_argument("--pairs", type=int, help="rounds; default: 9, on a GPU 5")
    parser.add_argument("--compile", action="store_true", help="also against torch.compile")
    parser.add_argument(
        "--defaults", action="store_true", help="training also against the libraries' defaults"
    )
    parser.add_argument("--views", type=int, help="of a training row; default: 1, on a GPU 5")
    parser.add_argument("--batch", type=int, default=1, help="rows of a training step; default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPUs of each side; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "measured")
    args = parser.parse_args()
    gpu = args.device == "gpu"
    args.what = args.what.split(",")
    args.only = [name for name in args.only.split(",") if name]
    args.dtype = args.dtype or ("bfloat16" if gpu else "float32")
    args.pairs = args.pairs or (5 if gpu else 9)
    args.views = args.views or (5 if gpu else 1)
    if wrong := set(args.what) - {*workloads.KINDS, "compile"}:
        parser.error(
            f"--what {', '.join(sorted(wrong))}: expected some of {', '.join(workloads.KINDS)}, compile"
        )
    if args.pairs < 5:
        parser.error(f"--pairs {args.pairs}: a median of fewer than 5 rounds says nothing")
    return args


def setting(args: argparse.Namespace) -> measure.Setting:
    cpus = sorted(os.sched_getaffinity(0))[: args.threads]
    theirs = [sys.executable, "-m", "speed.theirs", "--threads", str(len(cpus))]
    theirs += ["--device", "cuda"] if args.device == "gpu" else []
    commands = {measure.OURS: [sys.executable, "-m", "speed.ours"], "PyTorch eager": theirs}
    if args.compile:
        commands["PyTorch compiled"] = [*theirs, "--compile"]
    if args.defaults:
        commands["library defaults"] = [*theirs, "--defaults"]
    environment = ENVIRONMENT[args.device] | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return measure.Setting(commands, environment, cpus, args.pairs)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace, how: measure.Setting) -> dict:
    """Everything that was asked for, as one JSON-able record."""
    machine, limits = measure.machine(how, args.dtype, args.size)
    record = {
        "command": shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "size": args.size,
        "dtype": args.dtype,
        "device": args.device,
        "platform": platform.platform(),
        "machine": machine,
        "limits": limits,
        "results": [],
    }
    kinds = [kind for kind in args.what if kind != "compile"]
    items = workloads.items(args.size, args.dtype, kinds, args.views, args.batch)
    for item in items:
        if args.only and item.name not in args.only:
            continue
        mine = how
        if item.kind != "train":  # defaults differ in the loss and the adapters only
            commands = {side: command for side, command in how.commands.items() if side != "library defaults"}
            mine = dataclasses.replace(how, commands=commands)
        cached = "compile" in args.what and item.kind == "train"
        record["results"].append(measure.measure(item, mine, say, from_cache=cached))
    record["machine"]["load_after"] = os.getloadavg()[0]
    return record


def write(record: dict, folder: Path, name: str) -> str:
    """JSON, Markdown and plot of a run; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    table = tables.markdown(record)
    (folder / f"{name}.md").write_text(f"`{record['command']}`\n\n{table}")
    if not any(result["ratios"] for result in record["results"]):
        return table
    if importlib.util.find_spec("matplotlib"):
        tables.plot(record, folder / f"{name}.png")
    else:
        say(f"no matplotlib here, so no plot: benchmarks/report.py draws it from {name}.json")
    return table


def main() -> int:
    args = arguments()
    record = run(args, setting(args))
    parts = [args.device, args.size, args.dtype, *(args.only or args.what)]
    print(write(record, args.out, "speed-" + "-".join(parts)))
    limits = record["limits"]
    print(
        f"measured limits: {limits['matmul'] / 1e9:,.0f} GFLOP/s, copy {limits['copy'] / 1e9:.1f} GB/s, "
        f"read {limits['read'] / 1e9:.1f} GB/s"
    )
    # a refused side is a failure of the comparison, whatever else was measured
    return int(any(result["refused"] for result in record["results"]))


if __name__ == "__main__":
    sys.exit(main())
