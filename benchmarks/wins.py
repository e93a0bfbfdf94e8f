"""What each saving is worth: this package beside itself without it, in alternation and behind the same gate.

    python benchmarks/wins.py                                    size mini, float32, 9 rounds, on a CPU
    python benchmarks/wins.py --size 0.5b --only scan,remat      some of them, at real shapes

Each saving is one pair of processes that must compute the same numbers. Results are merged into a file for
each device, size, dtype and machine, which `python benchmarks/report.py` makes a table of.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from speed import measure, session, tables, workloads
from speed.workloads import Item

from mmrstraj_jax.config import SMALL_MODELS


class Win(NamedTuple):
    """A saving: what is timed, and the sides that lack it: name -> options of speed.variants."""

    item: dict
    before: dict[str, list[str]]
    from_cache: bool = False


ROW = {"kind": "train", "views": 1}
WINS = {
    "supervised-positions": Win(
        ROW | {"remat": "dots"}, {"logits of every position": ["--without", "supervised-positions"]}
    ),
    "frozen-weights": Win(
        ROW | {"remat": "dots"}, {"gradients of frozen weights": ["--without", "frozen-weights"]}
    ),
    "last-layer": Win(ROW | {"remat": "dots"}, {"last layer of every token": ["--without", "last-layer"]}),
    "remat": Win(
        ROW | {"remat": "block"}, {"remat none": ["--remat", "none"], "remat dots": ["--remat", "dots"]}
    ),
    "adapters": Win(ROW | {"remat": "dots"}, {"adapters' products kept": ["--without", "adapters"]}),
    "attention-kept": Win(ROW | {"remat": "dots"}, {"attention twice": ["--without", "attention-kept"]}),
    "queries-turned": Win(ROW | {"remat": "dots"}, {"scores turned": ["--without", "queries-turned"]}),
    "narrow-scale": Win(ROW | {"remat": "dots"}, {"adapters' scale behind B": ["--without", "narrow-scale"]}),
    "one-chunk": Win(ROW | {"remat": "dots"}, {"logits twice": ["--without", "one-chunk"]}),
    "scan": Win(ROW | {"remat": "dots"}, {"layers unrolled": ["--without", "scan"]}, from_cache=True),
    "narrow-gradients": Win(
        ROW | {"remat": "block"}, {"adapters' gradients of all rows": ["--without", "narrow-gradients"]}
    ),
    "back-by-head": Win(ROW | {"remat": "block"}, {"heads go back together": ["--without", "back-by-head"]}),
    "head-in-parts": Win(ROW | {"remat": "block"}, {"the head in one piece": ["--without", "head-in-parts"]}),
    "buckets": Win(
        {"kind": "stream", "remat": "dots"}, {"padded to the longest row": ["--without", "buckets"]}
    ),
    "last-token": Win({"kind": "prefill"}, {"last layer of every token": ["--without", "last-token"]}),
    "query-blocks": Win(
        {"kind": "prefill"}, {"scores of all queries at once": ["--without", "query-blocks"]}
    ),
    "own-masks": Win({"kind": "prefill"}, {"masks shared by all layers": ["--without", "own-masks"]}),
    "rounded-apart": Win({"kind": "prefill"}, {"products that round": ["--without", "rounded-apart"]}),
    "activations": Win({"kind": "prefill"}, {"activations in bfloat16": ["--without", "activations"]}),
    "compiled-loop": Win({"kind": "decode"}, {"a host loop, cache copied": ["--without", "compiled-loop"]}),
    "layout": Win({"kind": "decode"}, {"layers in one stack": ["--without", "layout"]}),
    "tower-layout": Win({"kind": "vision", "views": 1}, {"tower in one stack": ["--without", "layout"]}),
    "few-rows": Win(
        {"kind": "decode", "batch": 4}, {"weights on the right of every product": ["--without", "few-rows"]}
    ),
    "one-query": Win({"kind": "decode"}, {"a product for each key head": ["--without", "one-query"]}),
    "early-stop": Win({"kind": "answer", "batch": 4}, {"the loop runs on": ["--without", "early-stop"]}),
    "fused-attention": Win(
        ROW | {"views": 5, "remat": "dots"}, {"scores in memory": ["--without", "fused-attention"]}
    ),
    "one-by-one": Win({"kind": "vision", "views": 5}, {"views all at once": ["--without", "one-by-one"]}),
    "uint8": Win({"kind": "transfer", "views": 25}, {"float32 pixels": ["--without", "uint8"]}),
}


def offered(device: str, size: str, dtype: str) -> list[str]:
    """Savings that this device has with such models; without the others both sides are the same."""
    in_bfloat16 = {"one-query", "rounded-apart", "back-by-head", "head-in-parts"}
    on_cpu = {"one-by-one", "layout", "tower-layout", "few-rows", "own-masks"} | in_bfloat16
    on_cpu |= {"attention-kept", "queries-turned"}
    absent = {"fused-attention"} if device == "cpu" else on_cpu
    absent |= {"one-by-one"} if size in SMALL_MODELS else set()
    absent |= {"activations", *in_bfloat16} if dtype == "float32" else {"queries-turned"}
    return [name for name in WINS if name not in absent]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(workloads.SIZES), default="mini")
    parser.add_argument("--only", help="default: all that device and size have")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32; GPU: bfloat16")
    parser.add_argument("--pairs", type=int, default=9, help="rounds; default: %(default)s")
    parser.add_argument("--again", action="store_true", help="also what is measured already")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "measured")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "gpu" else "float32")
    names = offered(args.device, args.size, args.dtype)
    args.only = names if args.only is None else [name for name in args.only.split(",") if name]
    if not args.only or set(args.only) - set(names):
        parser.error(f"--only {','.join(args.only)}: expected some of {', '.join(names)}")
    if args.pairs < 5:
        parser.error(f"--pairs {args.pairs}: a median of fewer than 5 rounds says nothing")
    return args


def main() -> int:
    args = arguments()
    variants = [sys.executable, "-m", "speed.variants"]
    jobs, commands = [], {measure.OURS: variants}
    for win in (WINS[name] for name in args.only):
        commands |= {name: [*variants, *options] for name, options in win.before.items()}
        item = Item(size=args.size, dtype=args.dtype, **win.item)
        jobs.append(session.Job(item, list(win.before), win.from_cache))
    how = session.setting(commands, args.device, args.dtype, args.pairs, session.all_cpus())
    results = session.run(jobs, how, args.out, kind="wins", device=args.device, again=args.again)
    if results:
        print(tables.wins(results))
    return int(any(result["refused"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
