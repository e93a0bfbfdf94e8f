"""Do the crops of Higher AnyRes matter? Small objects under five policies, each trained alike.

    python benchmarks/anyres_policies.py               about a quarter of an hour on two cores
    python benchmarks/anyres_policies.py --steps 4 --images 20   a quick look; leaves the docs alone

Questions on cars, pools and tanks only (is there one, how many, where, what color). From the shipped base,
every policy trains the whole model for the same steps on the same rows in the same order; what differs is the
views that are cut from an image and how far their features are reduced. The base itself was trained at the
paper's tau, so short training favours that one.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
from results import BASE, DOC, claim, command, fingerprint, replace_section

from mmrstraj_jax.config import AnyResConfig
from mmrstraj_jax.data import anyres
from mmrstraj_jax.errors import run_command
from mmrstraj_jax.evaluation.stats import wilson
from mmrstraj_jax.synthcity import questions
from mmrstraj_jax.synthcity.questions import Balancer, Question
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.sample import Sample, balanced, conversation, samples

PLOT = DOC.parent / "images" / "anyres_policies.png"
MARK = "<!-- made by benchmarks/anyres_policies.py -->"
KINDS = {"car": "car", "parked car": "car", "pool": "pool", "tank": "tank"}
SEED = 50  # of both splits; the base has seen seed 0
SIDE = 224  # pixels: the base view halves it, a 2 x 2 grid of 112 px crops shows all of it
PAPER = AnyResConfig().for_views(112, 14)
ONE = ((112, 112),)  # the only grid: the crop of a square image is its base view again, nothing finer


class Policy(NamedTuple):
    label: str
    anyres: AnyResConfig


POLICIES = {
    "base": Policy("base view only (twice)", dataclasses.replace(PAPER, tau=1e6, grid_pinpoints=ONE)),
    "tau45": Policy("tau / 4", dataclasses.replace(PAPER, tau=PAPER.tau / 4)),
    "tau90": Policy("tau / 2", dataclasses.replace(PAPER, tau=PAPER.tau / 2)),
    "tau": Policy("tau of the paper", PAPER),
    "full": Policy("full tokens", dataclasses.replace(PAPER, tau=1e6)),
}


def asked(sample: Sample, s: Stream, balancer: Balancer) -> list[Question]:
    makers = (questions.presence, questions.quantity, questions.color, questions.ab_position)
    found = [q for make in makers for q in make(sample.truth, s) if q.facts.get("kind") in KINDS]
    return [q for q in s.shuffled(found) if balancer.accepts(q)]


def write_rows(folder: Path, split: str, images: int) -> Path:
    """Rows of several turns for training, of one turn with type and truth for evaluation."""
    path = folder / f"{split}.json"
    if path.exists():
        return path
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, balancer = [], Balancer()
    for k, sample in enumerate(samples(split, SEED, images, "A", square=True)):
        found = asked(sample, Stream(SEED, 13, k), balancer)
        image = f"images/{sample.id}.png"
        if found:
            Image.fromarray(sample.image).save(folder / image, compress_level=1)
        if split == "eval_base":
            rows += [
                {"id": f"{sample.id}-{n}", "image": image, "type": KINDS[q.facts["kind"]],
                 "conversations": conversation([(q.question, q.answer)]), "truth": {"answer": q.answer}}
                for n, q in enumerate(found)
            ]  # fmt: skip
        elif found:
            turns = [(q.question, q.answer) for q in found]
            rows.append({"id": sample.id, "image": image, "conversations": conversation(turns)})
    path.write_text(json.dumps(balanced(rows) if split == "eval_base" else rows, indent=1) + "\n")
    return path


def write_config(out: Path, name: str, steps: int, data: Path) -> Path:
    """A config file as a user would write one: the base's recipe with another policy."""
    policy = POLICIES[name].anyres
    path = out / f"{name}.py"
    path.write_text(f"""import dataclasses

from mmrstraj_jax.config import AnyResConfig, load_config


def get_config(model):
    config, _ = load_config("tiny_base", [], model=model)
    anyres = AnyResConfig().for_views(112, 14)
    return dataclasses.replace(
        config,
        name={name!r},
        weights={str(BASE)!r},
        data={str(data)!r},
        steps={steps},
        batch_size=4,
        micro_batch_size=4,
        eval_every=0,
        eval_samples=0,
        save_every={steps},
        anyres=dataclasses.replace(anyres, tau={policy.tau!r}, grid_pinpoints={policy.grid_pinpoints!r}),
    )
""")
    return path


def measure(out: Path, name: str, steps: int, data: Path, eval_data: Path) -> dict:
    """One row of the table: trains and evaluates a policy, unless that is done."""
    run, scores = out / name, out / "scores" / name
    config = write_config(out, name, steps, data)
    if not (run / "summary.json").exists():
        command("train", "--config", config, "--model", "tiny", "--run-dir", run)
    if not (scores / "scores.json").exists():
        command(
            "evaluate", "--run", run, "--task", "synthcity", "--data", eval_data, "--out", scores,
            "--meteor", "none", "--batch-size", 32,
        )  # fmt: skip
    verdicts = [json.loads(line) for line in (scores / "items.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(row["samples_per_s"] for row in metrics[len(metrics) // 2 :])
    right = {}
    for kind in ("all", *dict.fromkeys(KINDS.values())):
        mine = [row["verdict"] == "correct" for row in verdicts if kind in ("all", row["type"])]
        right[kind] = [sum(mine), len(mine)]
    tokens = anyres.plan(SIDE, SIDE, POLICIES[name].anyres).num_tokens
    return {"policy": name, "tokens": tokens, "ms_per_sample": 1000 / speed, "right": right}


def table(rows: list[dict]) -> str:
    kinds = list(rows[0]["right"])
    lines = [
        "| policy | visual tokens | ms a training sample | " + " | ".join(
            f"{kind}, n = {rows[0]['right'][kind][1]}" for kind in kinds
        ) + " |",
        "|---|---|---|" + "---|" * len(kinds),
    ]  # fmt: skip
    for row in rows:
        cells = []
        for right, n in row["right"].values():
            low, high = wilson(right, n)
            share = 100 * right / n if n else float("nan")
            cells.append(f"{share:.1f} ({100 * low:.0f}-{100 * high:.0f})")
        head = f"| {POLICIES[row['policy']].label} | {row['tokens']} | {row['ms_per_sample']:.0f} | "
        lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


def named(rows: list[dict], key: str, near: float) -> list[tuple[float, list[str]]]:
    """(place on the axis, policies there), so that the names of neighbours do not cover each other."""
    places: list[tuple[float, list[str]]] = []
    for row in sorted(rows, key=lambda row: row[key]):
        if places and row[key] - places[-1][0] < near:
            places[-1][1].append(row["policy"])
        else:
            places.append((row[key], [row["policy"]]))
    return places


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy over visual tokens, and over time; vertical bars are 95 % Wilson intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, key, text in (
        (axes[0], "tokens", "visual tokens an image"),
        (axes[1], "ms_per_sample", "milliseconds a training sample"),
    ):
        span = max(row[key] for row in rows)
        for shift, kind in enumerate(rows[0]["right"]):
            shares = [row["right"][kind] for row in rows]
            y = [100 * right / max(n, 1) for right, n in shares]
            low, high = zip(*(wilson(right, n) for right, n in shares), strict=True)
            x = [row[key] + 0.012 * shift * span for row in rows]  # side by side, not on top of each other
            bars = (
                [max(a - 100 * b, 0) for a, b in zip(y, low, strict=True)],
                [max(100 * b - a, 0) for a, b in zip(y, high, strict=True)],
            )
            axis.errorbar(x, y, yerr=bars, fmt="o", capsize=2, markersize=4, label=kind)
        for at, names in named(rows, key, 0.03 * span):
            axis.annotate(
                "\n".join(names), (at, 1.02), xycoords=("data", "axes fraction"), fontsize=7, ha="center",
                annotation_clip=False,
            )  # fmt: skip
        axis.set_xlabel(text)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("answers right, %")
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/anyres_policies"))
    parser.add_argument("--steps", type=int, default=200, help="of each policy (default 200)")
    parser.add_argument("--images", type=int, default=800, help="to train on (default 800); a third to test")
    options = parser.parse_args(args)
    made = {"base": fingerprint(BASE), "steps": options.steps, "images": options.images}
    claim(options.out, made)
    data = write_rows(options.out / "data", "base", options.images)
    eval_data = write_rows(options.out / "data", "eval_base", options.images // 3)
    rows = [measure(options.out, name, options.steps, data, eval_data) for name in POLICIES]
    text = table(rows)
    print(text)
    whole = options.steps >= 200 and options.images >= 800
    picture = PLOT if whole else options.out / PLOT.name
    plot(rows, picture)
    print(picture, file=sys.stderr)
    if whole:
        replace_section(DOC, MARK, f"![accuracy over tokens and time](images/{PLOT.name})\n\n{text}")


if __name__ == "__main__":
    run_command(main)
