"""Speed side by side with PyTorch (transformers and peft): same weights, shapes and inputs, in alternation.

    python benchmarks/compare.py --size 0.5b --only vision-1,prefill     a CPU: 9 alternated rounds, float32
    python benchmarks/compare.py --size 7b --device gpu --only train-block --rivals eager,defaults

Every side is a process of its own. Before anything is timed both compute features, logits, loss and the
gradient of every adapter: sides that disagree get no figure, and the exit code is 1. Each item is merged into
one JSON file for its device, size, dtype and machine as soon as it is measured; a command that was stopped
goes on with what is missing. `python benchmarks/report.py` makes docs/performance.md and README's table of
these files. Needs jax, flax, optax, einops, jaxtyping, numpy, torch, transformers, peft.
"""

import argparse
import shutil
import sys
from pathlib import Path

from speed import measure, session, tables, workloads

RIVALS = {  # --rivals -> (name in tables, options of speed.theirs)
    "eager": ("PyTorch eager", []),
    "compiled": ("PyTorch compiled", ["--compile"]),
    "defaults": ("library defaults", ["--defaults"]),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(workloads.SIZES), default="tiny")
    parser.add_argument(
        "--what", default=",".join(workloads.KINDS), help="kinds of items; default: %(default)s"
    )
    parser.add_argument("--only", default="", help="single items of these, e.g. decode-1,train-block")
    parser.add_argument(
        "--rivals", default="eager", help="some of eager, compiled (torch.compile), defaults (training only)"
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32; GPU: bfloat16")
    parser.add_argument("--pairs", type=int, help="rounds; default: 9, on a GPU 5")
    parser.add_argument("--views", type=int, help="of a training row; default: 1, on a GPU 5")
    parser.add_argument("--batch", type=int, default=1, help="rows of a training step; default: %(default)s")
    parser.add_argument(
        "--from-cache", action="store_true", help="training: the first step again, from the disk cache"
    )
    parser.add_argument("--again", action="store_true", help="also what is measured already")
    parser.add_argument("--threads", type=int, help="CPUs of each side; default: all")
    parser.add_argument(
        "--rival-python",
        default=sys.executable,
        help="Python that has torch; default: this one",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "measured")
    args = parser.parse_args()
    gpu = args.device == "gpu"
    for name, known in (("what", workloads.KINDS), ("rivals", tuple(RIVALS))):
        given = [each for each in getattr(args, name).split(",") if each]
        setattr(args, name, given)
        if not given or set(given) - set(known):
            parser.error(f"--{name} {','.join(given)}: expected some of {', '.join(known)}")
    if not shutil.which(args.rival_python):
        parser.error(f"--rival-python {args.rival_python}: expected a Python that can be run")
    args.dtype = args.dtype or ("bfloat16" if gpu else "float32")
    args.pairs = args.pairs or (5 if gpu else 9)
    args.views = args.views or (5 if gpu else 1)
    if args.pairs < 5:
        parser.error(f"--pairs {args.pairs}: a median of fewer than 5 rounds says nothing")
    args.items = workloads.items(args.size, args.dtype, args.what, args.views, args.batch)
    only = [name for name in args.only.split(",") if name]
    if unknown := set(only) - {item.name for item in args.items}:
        known = ", ".join(item.name for item in args.items)
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {known}")
    args.items = [item for item in args.items if item.name in only or not only]
    if not jobs(args):
        parser.error("--rivals defaults: only training items have it; name some, or another rival")
    return args


def setting(args: argparse.Namespace) -> measure.Setting:
    cpus = session.all_cpus()[: args.threads]
    theirs = [args.rival_python, "-m", "speed.theirs", "--threads", str(len(cpus))]
    theirs += ["--device", "cuda"] if args.device == "gpu" else []
    commands = {measure.OURS: [sys.executable, "-m", "speed.ours"]}
    commands |= {name: [*theirs, *options] for name, options in (RIVALS[each] for each in args.rivals)}
    return session.setting(commands, args.device, args.dtype, args.pairs, cpus)


def jobs(args: argparse.Namespace) -> list[session.Job]:
    """The items, each against the rivals that it has: defaults differ from eager in training only."""
    found = []
    for item in args.items:
        rivals = [RIVALS[each][0] for each in args.rivals if each != "defaults" or item.kind == "train"]
        found.append(session.Job(item, rivals, args.from_cache and item.kind == "train"))
    return [job for job in found if job.rivals]


def main() -> int:
    args = arguments()
    results = session.run(
        jobs(args), setting(args), args.out, kind="speed", device=args.device, again=args.again
    )
    if results:
        print(tables.markdown(results))
        print(f"measured limits: {tables.rates(results[-1]['run']['limits'])}")
    # a refused side is a failure of the comparison, whatever else was measured
    return int(any(result["refused"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
