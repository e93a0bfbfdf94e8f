"""From rounds of seconds to medians, intervals, a Markdown table and a plot."""

from pathlib import Path
from typing import Any

import numpy as np

from mmrstraj_jax.planning import flops
from speed.workloads import Item


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median of the paired ratios ours / theirs (below 1: ours is faster), 95 % bootstrap interval of it."""
    paired = np.asarray(ours) / np.asarray(theirs)
    drawn = np.random.default_rng(0).choice(paired, (10_000, len(paired)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return {"median": float(np.median(paired)), "low": float(low), "high": float(high)}


def work(item: Item, tokens: int = 1) -> dict[str, float]:
    """FLOPs of one step as the model's arithmetic needs them, and for decoding the bytes that must be read.

    Args:
        tokens: written by one timed decode; its context is then longest.
    """
    model, count = item.model, flops.parameters(item.model)
    itemsize = 4 if item.dtype == "float32" else 2
    if item.kind == "train":
        from mmrstraj_jax.config import Config  # with the paper's LoRA, as Item says

        each = flops.of_row(model, item.views, item.length, item.sizes.supervised)
        return {"flops": item.batch * each.training(Config(remat=item.remat, dtype=item.dtype))}
    if item.kind == "decode":
        text = model.text
        slot = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        cache = slot * item.length * item.batch
        return {
            "flops": 2.0 * tokens * item.batch * (count.decoder + count.head),
            "bytes": float(tokens * itemsize * (count.decoder + count.head + cache)),
        }
    each = flops.of_row(model, item.views, item.length if item.kind == "prefill" else 0, 1)
    if item.kind == "vision":
        return {"flops": each.tower_linear + each.tower_attention + each.projector}
    return {"flops": each.decoder_linear + each.decoder_attention + each.head}


def bound(result: dict[str, Any], limits: dict[str, float]) -> tuple[str, float]:
    """What bounds an item on this machine, and the share of that limit that ours reaches."""
    seconds, needed = result["sides"]["ours"]["median_s"], result["work"]
    floors = {"matrix rate": needed["flops"] / limits["matmul"]}
    if "bytes" in needed:
        floors["memory bandwidth"] = needed["bytes"] / max(limits["copy"], limits["read"])
    name = max(floors, key=floors.get)
    return name, floors[name] / seconds


def first_step(side: dict[str, float]) -> float:
    """Seconds of compilation: ours happens ahead of time, PyTorch's in its first pass, which is counted."""
    return side["lower_s"] + side["compile_s"] if "compile_s" in side else side["outputs_s"]


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def markdown(run: dict[str, Any]) -> str:
    """The table of one run of compare.py: a line for every item and rival."""
    lines = [
        "| item | rival | ours | rival's | ours / rival (95 %) | peak memory, ours / rival | ours reaches |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in run["results"]:
        for name, why in result["refused"].items():
            lines.append(f"| {result['name']} | {name} | refused: {why[0]} | | | | |")
        if not result["ratios"]:
            continue
        ours, (limit, share) = result["sides"]["ours"], bound(result, run["limits"])
        for name, found in result["ratios"].items():
            theirs = result["sides"][name]
            lines.append(
                f"| {result['name']} | {name} "
                f"| {_seconds(ours['median_s'])} | {_seconds(theirs['median_s'])} "
                f"| **{found['median']:.2f}** ({found['low']:.2f}-{found['high']:.2f}) "
                f"| {ours['peak'] / 2**20:,.0f} / {theirs['peak'] / 2**20:,.0f} MiB "
                f"| {100 * share:.0f} % of {limit} |"
            )
    return "\n".join(lines) + "\n"


def plot(run: dict[str, Any], path: Path) -> None:
    """Ratios with their intervals, one row an item; left of the line ours is faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rivals = list(dict.fromkeys(name for result in run["results"] for name in result["ratios"]))
    names = [result["name"] for result in run["results"] if result["ratios"]]
    figure, axes = pyplot.subplots(figsize=(7, 1.4 + 0.42 * len(names)), layout="constrained")
    for number, rival in enumerate(rivals):
        shown = [(one["name"], one["ratios"][rival]) for one in run["results"] if rival in one["ratios"]]
        y = [names.index(name) + 0.2 * (number - (len(rivals) - 1) / 2) for name, _ in shown]
        x = [found["median"] for _, found in shown]
        spread = [
            [found["median"] - found["low"] for _, found in shown],
            [found["high"] - found["median"] for _, found in shown],
        ]
        axes.errorbar(x, y, xerr=spread, fmt="o", capsize=3, label=rival)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("time of ours / time of the rival (below 1: ours is faster)")
    axes.set_title(f"{run['size']}, {run['dtype']}, {run['machine']['device']}", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
