"""Makes the table of docs/results.md: the two stages on SynthTraffic-Bench, beside what needs no image.

    python benchmarks/results.py                       about a quarter of an hour on two cores
    python benchmarks/results.py --steps 4 --limit 60  a quick look; prints the table, leaves the docs alone

Runs the ordinary commands as a user would: train stage 1 and stage 2 from the embedded base, both again on
blanked images (the blind twin), and evaluate each on the benchmark. The same command goes on after a stop.
The twin runs beside the real one, each on half of the cores.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

import mmrstraj_jax
from mmrstraj_jax.errors import UserError, run_command
from mmrstraj_jax.evaluation import score, stats, tasks
from mmrstraj_jax.evaluation.readers import Item
from mmrstraj_jax.synthcity import traffic
from mmrstraj_jax.synthcity.bench import ensure_bench
from mmrstraj_jax.synthcity.sample import ensure_sample

TASK = "synthtraffic-bench"
BASE = Path(mmrstraj_jax.__file__).parent / "assets" / "tiny"
DOC = Path(__file__).parent.parent / "docs" / "results.md"
MARK = "<!-- made by benchmarks/results.py -->"
MODELS = {  # row of the table -> what it is
    "majority": "the commonest answer of the type",
    "question": "the commonest answer to the question's words",
    "blind": "the same two stages, trained and tested on blanked images",
    "base": "the shipped base model",
    "stage1": "after stage 1",
    "stage2": "after stage 2",
}
Group = Callable[[Item], bool]
PARTS: dict[str, Group] = {
    "general, domain A": lambda i: i.type not in traffic.TYPES and i.meta["domain"] == "A",
    "general, domain B": lambda i: i.type not in traffic.TYPES and i.meta["domain"] == "B",
    "traffic, domain A": lambda i: i.type in traffic.TYPES and i.meta["domain"] == "A",
    "traffic, domain B": lambda i: i.type in traffic.TYPES and i.meta["domain"] == "B",
    "all general": lambda i: i.type not in traffic.TYPES,
    "all traffic": lambda i: i.type in traffic.TYPES,
}
# What each stage is for, and what it costs: (claim, part, before, after)
GAINS = (
    ("base over the question majority", "general, domain A", "question", "base"),
    ("stage 1, its new domain", "general, domain B", "base", "stage1"),
    ("stage 2, traffic", "all traffic", "stage1", "stage2"),
    ("stage 2, traffic in its own domain", "traffic, domain B", "stage1", "stage2"),
    ("stage 2 over the question majority", "all traffic", "question", "stage2"),
    ("stage 2 over its blind twin", "all traffic", "blind", "stage2"),
    ("forgetting in stage 2, general", "all general", "stage1", "stage2"),
    ("forgetting since the base, its own domain", "general, domain A", "base", "stage2"),
)


def command(module: str, *arguments: object, programs: Path | None = None) -> float:
    """Runs `python -m mmrstraj_jax.<module>`; returns its seconds. A failure ends this program too.

    programs: a folder that keeps what was compiled, for the commands after it.
    """
    words = [sys.executable, "-m", f"mmrstraj_jax.{module}", *map(str, arguments)]
    print("$", " ".join(["python", *words[1:]]), flush=True)
    start = time.perf_counter()
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    if programs is not None:
        env |= {"JAX_COMPILATION_CACHE_DIR": str(programs.absolute())}
    done = subprocess.run(words, env=env)
    if done.returncode:
        raise SystemExit(done.returncode)
    return time.perf_counter() - start


def side_by_side(*chains: Callable[[], None]) -> None:
    """Runs chains of commands at once, each on its share of the cores.

    Two tiny models on a core each take 0.85 s a step, one on both cores 0.55.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def run(number: int, chain: Callable[[], None]) -> None:
        if len(cores) >= len(chains):
            os.sched_setaffinity(0, cores[number :: len(chains)])  # of this thread, and so of its commands
        chain()

    with ThreadPoolExecutor(len(chains)) as pool:
        for done in [pool.submit(run, *numbered) for numbered in enumerate(chains)]:
            done.result()


def blanked(source: Path, folder: Path) -> Path:
    """A copy of a folder of data files whose images are grey, of their sizes."""
    if not folder.exists():
        work = folder.with_name(folder.name + ".tmp")
        (work / "images").mkdir(parents=True, exist_ok=True)
        for path in source.glob("images/*.png"):
            with Image.open(path) as image:
                Image.new("RGB", image.size, (127, 127, 127)).save(work / "images" / path.name)
        for path in source.glob("*.json"):
            shutil.copy(path, work)
        work.rename(folder)
    return folder


def claim(out: Path, settings: dict) -> None:
    """Keeps what the results are made from beside them. Raises UserError: they are of something else."""
    path = out / "made_from.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise UserError(f"--out {out}: holds results of another base, benchmark or setting; name another")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n")


def fingerprint(folder: Path) -> str:
    """Of all files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_all(out: Path, steps: int | None, limit: int | None) -> dict[str, float]:
    """All training and evaluation below `out`; returns the seconds of each command that did something."""
    bench = ensure_bench().parent
    claim(out, {"base": fingerprint(BASE), "bench": bench.name, "steps": steps, "limit": limit})
    grey = blanked(ensure_sample()["stage1"].parent, out / "blank")
    grey_bench = blanked(bench, out / "blank_bench")
    recipe = ("--eval-samples", 0, *(() if steps is None else ("--steps", steps)))
    part = ("--meteor", "none", "--batch-size", 64, *(() if limit is None else ("--limit", limit)))
    seconds, programs = {}, out / "compiled"

    def train(name: str, config: str, *more: object) -> None:
        if not (out / name / "summary.json").exists():
            seconds[f"train {name}"] = command(
                "train", "--config", config, "--run-dir", out / name, *recipe, *more, programs=programs
            )

    def evaluate(name: str, *source: object) -> None:
        if not (out / "scores" / name / "scores.json").exists():
            seconds[f"evaluate {name}"] = command(
                "evaluate", *source, "--task", TASK, "--out", out / "scores" / name, *part, programs=programs
            )

    def seeing() -> None:
        train("stage1", "stage1")
        evaluate("stage1", "--run", out / "stage1")
        train("stage2", "stage2", "--init-from", out / "stage1")
        evaluate("stage2", "--run", out / "stage2")

    def blind() -> None:
        for stage, more in (("stage1", ()), ("stage2", ("--init-from", out / "blind_stage1"))):
            train(f"blind_{stage}", stage, "--data", grey / f"{stage}.json", *more)
        evaluate("blind", "--run", out / "blind_stage2", "--images", grey_bench / "images")
        evaluate("base", "--weights", BASE)

    side_by_side(seeing, blind)
    return seconds


# ---- the table ----


def question_majority(items: Sequence[Item]) -> dict[str, str]:
    """The commonest answer to the same question of the type, the item's own included; to a question that is
    asked once, the commonest of its type. Better than any real guess: it has seen the answers."""
    by_question, by_type = defaultdict(Counter), defaultdict(Counter)
    for item in items:
        by_question[item.type, item.question][item.references[0]] += 1
        by_type[item.type][item.references[0]] += 1
    guess = {}
    for item in items:
        same = by_question[item.type, item.question]
        best = same if same.total() > 1 else by_type[item.type]
        guess[item.id] = best.most_common(1)[0][0]
    return guess


def right_answers(items: Sequence[Item], scores: Path) -> dict[str, np.ndarray]:
    """Row of the table -> [items] 1.0 where the answer is right; undecided is not."""
    task = tasks.get(TASK)
    plain = {item.id: item.references[0] for item in items}
    guesses = {"majority": stats.majority_answers(items, plain), "question": question_majority(items)}
    verdicts = {name: score.score(task, items, answers)[1] for name, answers in guesses.items()}
    for name in ("blind", "base", "stage1", "stage2"):
        lines = (scores / name / "items.jsonl").read_text(encoding="utf-8").splitlines()
        verdicts[name] = [json.loads(line) for line in lines]
    return {
        name: np.array([{row["id"]: row for row in rows}[i.id]["verdict"] == "correct" for i in items], float)
        for name, rows in verdicts.items()
    }


def cell(right: np.ndarray) -> str:
    low, high = stats.wilson(int(right.sum()), len(right))
    return f"{100 * right.mean():.1f} ({100 * low:.0f}-{100 * high:.0f})"


def tables(items: Sequence[Item], right: dict[str, np.ndarray]) -> str:
    """Markdown: accuracy by type and part with Wilson intervals, then the gains of the stages."""
    kinds = list(dict.fromkeys(sorted((i.type for i in items), key=lambda t: (t in traffic.TYPES, t))))
    groups: dict[str, Group] = {t: (lambda i, t=t: i.type == t) for t in kinds}
    lines = [
        "| type | n | " + " | ".join(MODELS[name] for name in MODELS) + " |",
        "|---|---" + "|---" * len(MODELS) + "|",
    ]
    for name, member in (groups | {f"**{k}**": v for k, v in PARTS.items()}).items():
        mask = np.array([member(i) for i in items])
        if mask.any():
            cells = [cell(right[model][mask]) for model in MODELS]
            lines.append(f"| {name} | {mask.sum()} | " + " | ".join(cells) + " |")
    lines += ["", "| difference | on | n | points | 95 % interval |", "|---|---|---|---|---|"]
    for claim, part, before, after in GAINS:
        mask = np.array([PARTS[part](i) for i in items])
        if mask.any():
            c = stats.paired_bootstrap(right[before][mask], right[after][mask])
            points = f"{100 * c.difference:+.1f} | {100 * c.low:+.1f} to {100 * c.high:+.1f}"
            lines.append(f"| {claim} | {part} | {c.n} | {points} |")
    return "\n".join(lines)


def replace_section(doc: Path, mark: str, text: str) -> None:
    """Puts text between `mark` and the next "<!-- end -->" of a page."""
    head, found, rest = doc.read_text(encoding="utf-8").partition(mark)
    _, end, tail = rest.partition("<!-- end -->")
    assert found and end, f"{doc}: no section {mark}"
    doc.write_text(f"{head}{mark}\n\n{text}\n\n{end}{tail}", encoding="utf-8")
    print(f"{doc}: section replaced", file=sys.stderr)


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="default runs/results")
    parser.add_argument("--steps", type=int, help="of each stage; default: the recipe's")
    parser.add_argument("--limit", type=int, help="questions, for a quick look")
    options = parser.parse_args(args)
    start = time.perf_counter()
    seconds = run_all(options.out, options.steps, options.limit)
    items = tasks.limited(tasks.get(TASK).load(None, None), options.limit)
    text = tables(items, right_answers(items, options.out / "scores"))
    total = time.perf_counter() - start
    times = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
    text += f"\n\nMade in {total / 60:.1f} minutes on {os.cpu_count()} cores ({times or 'all was there'})."
    print(text)
    if options.steps is None and options.limit is None:
        replace_section(DOC, MARK, text)


if __name__ == "__main__":
    run_command(main)
