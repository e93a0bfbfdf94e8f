"""Caption metrics side by side with pycocoevalcap, in alternation, on the same captions.

    python benchmarks/captions.py            9 rounds, a few minutes

"tokens" is BLEU, ROUGE_L and CIDEr-D from tokenised captions; "captions" is all of it, PTB tokens and METEOR
included, and needs Java on both sides. Every score must agree to 1e-6, or nothing is reported.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from speed import machine, store, tables

from mmrstraj_jax.evaluation import captions, java, ptb

# name -> items, references each, words of a caption: as UCM-Captions and RSICD have them, and as RSIEval
SETS = {"1,000 items, 5 references": (1000, 5, (8, 16)), "100 items, long captions": (100, 1, (30, 60))}
Texts = tuple[dict[str, list[str]], dict[str, str]]


def texts(items: int, references: int, words: tuple[int, int]) -> Texts:
    """References and predictions: sentences of common and rare words."""
    random = np.random.default_rng(0)
    vocabulary = [
        f"{start}{end}" for start in "barn car dome lawn port road roof tree".split() for end in "abcdefghij"
    ]
    share = 1 / np.arange(1, len(vocabulary) + 1)

    def caption() -> str:
        drawn = random.choice(vocabulary, random.integers(*words, endpoint=True), p=share / share.sum())
        return " ".join(drawn).capitalize() + "."

    ids = [str(number) for number in range(items)]
    return {i: [caption() for _ in range(references)] for i in ids}, {i: caption() for i in ids}


def ours(given: Texts, whole: bool) -> dict[str, float]:
    tokenizer = java.PTB_NAME if whole else "ptb-python"
    return captions.score(*given, meteor="meteor15" if whole else None, tokenizer=tokenizer).metrics


def theirs(given: Texts, whole: bool) -> dict[str, float]:
    gts, res = given[0], {i: [text] for i, text in given[1].items()}
    if whole:
        as_asked = [
            {i: [{"caption": t} for t in all_of] for i, all_of in side.items()} for side in (gts, res)
        ]
        gts, res = (PTBTokenizer().tokenize(side) for side in as_asked)
    else:  # the same tokens as ours, without Java
        gts, res = (
            {i: [ptb.tokenize(t) for t in all_of] for i, all_of in side.items()} for side in (gts, res)
        )
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
    found = {f"bleu{n}": value for n, value in enumerate(bleu, 1)}
    if whole:
        found["meteor15"] = Meteor().compute_score(gts, res)[0]
    return found | {
        "rouge_l": Rouge().compute_score(gts, res)[0],
        "cider_d": Cider().compute_score(gts, res)[0],
    }


def timed(function: Callable, *args) -> tuple[float, dict[str, float]]:
    start = time.perf_counter()
    found = function(*args)
    return time.perf_counter() - start, found


def measure(given: Texts, whole: bool, pairs: int) -> dict:
    """Seconds of both sides in turn. Raises SystemExit where a score differs."""
    mine, rival = ours(given, whole), theirs(given, whole)
    if mine.keys() != rival.keys() or any(abs(mine[name] - rival[name]) > 1e-6 for name in mine):
        raise SystemExit(f"scores differ, so there is no figure: {mine} and {rival}")
    seconds = {"ours": [], "pycocoevalcap": []}
    for number in range(pairs):
        sides = [("ours", ours), ("pycocoevalcap", theirs)][:: -1 if number % 2 else 1]
        for name, side in sides:
            seconds[name].append(timed(side, given, whole)[0])
    return {
        "seconds": seconds,
        "median_s": {name: statistics.median(found) for name, found in seconds.items()},
        "ratio": tables.ratio(seconds["ours"], seconds["pycocoevalcap"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=9, help="rounds; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "measured")
    args = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    record = {
        "command": shlex.join(["python", "benchmarks/captions.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "host": f"{machine.processor()}, {len(cpus)} CPUs",
        "code": store.fingerprint(store.CAPTION_CODE),
        "other_work": machine.other_work(cpus, 1.0),
        "results": {},
    }
    for name, sizes in SETS.items():
        for what in ("tokens", "captions") if java.available() else ("tokens",):
            given = texts(*sizes)
            found = record["results"][f"{name}: {what}"] = measure(given, what == "captions", args.pairs)
            medians = ", ".join(f"{side} {value:.3g} s" for side, value in found["median_s"].items())
            print(f"{name}, {what}: {medians}, ratio {found['ratio']['median']:.2f}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "captions.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
