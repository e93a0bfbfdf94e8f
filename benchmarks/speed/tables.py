"""From rounds of seconds to medians, intervals, a Markdown table and a plot."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from mmrstraj_jax.config import Config
from mmrstraj_jax.planning import flops
from speed import workloads
from speed.workloads import Item

EAGER, COMPILED, DEFAULTS = "PyTorch eager", "PyTorch compiled", "library defaults"
# (device, dtype) -> item -> the ratio ours / PyTorch, eager or compiled, that was set out for at 0.5B
GOALS = {
    ("cpu", "float32"): {
        "vision-1": 0.95,
        "prefill": 0.90,
        "decode-1": 0.55,
        "decode-4": 0.40,
        "train-block": 1.0,
        "train-dots": 1.0,
    },
    ("cpu", "bfloat16"): {"prefill": 1.05, "decode-1": 0.55, "train-block": 1.05},
}
PEAK_GOAL = 0.80  # peak memory of a training step, float32 on a CPU
GPU_GOALS = {COMPILED: 1 / 1.3, DEFAULTS: 1 / 1.8}  # of a training step


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
    if item.kind == "stream":
        rows = [dataclasses.replace(item, kind="train", views=views) for views in workloads.STREAM]
        return {"flops": sum(work(row)["flops"] for row in rows)}
    if item.kind == "transfer":
        return {"flops": 0.0, "bytes": float(workloads.pixels(item).nbytes)}
    if item.kind == "train":
        each = short_last_layer(item, item.sizes.supervised)
        config = Config(remat=item.remat, dtype=item.dtype)  # with the paper's LoRA
        return {"flops": item.batch * each.training(config)}
    if item.kind in ("decode", "answer"):
        tokens = workloads.ANSWER if item.kind == "answer" else tokens
        text = model.text
        slot = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        cache = slot * item.length * item.batch
        return {
            "flops": 2.0 * tokens * item.batch * (count.decoder + count.head),
            "bytes": float(tokens * itemsize * (count.decoder + count.head + cache)),
        }
    if item.kind == "vision":
        each = flops.of_row(model, item.views, 0, 0)
        return {"flops": each.tower_linear + each.tower_attention + each.projector}
    each = short_last_layer(item, 1)
    return {"flops": each.decoder_linear + each.decoder_attention + each.head}


def short_last_layer(item: Item, wanted: int) -> flops.Flops:
    """FLOPs of a row whose last decoder layer computes queries and MLP of `wanted` tokens alone."""
    text = item.model.text
    each = flops.of_row(item.model, item.views, item.length, wanted)
    if 4 * wanted > item.length:  # as training decides (training.step.last_layer_is_short)
        return each
    keys = 2 * text.hidden_size * text.num_key_value_heads * text.head_dim
    skipped = (1 - keys / flops.decoder_layer(text)) / text.num_hidden_layers
    rest = wanted / item.length
    return dataclasses.replace(
        each,
        decoder_linear=each.decoder_linear * (1 - skipped * (1 - rest)),
        decoder_attention=each.decoder_attention * (1 - (1 - 2 * rest) / text.num_hidden_layers),
    )


def bound(result: dict[str, Any]) -> tuple[str, float]:
    """What bounds an item on its machine, and the share of that measured limit that ours reaches."""
    seconds, needed, limits = result["sides"]["ours"]["median_s"], result["work"], result["run"]["limits"]
    floors = {"matrix rate": needed["flops"] / limits["matmul"]}
    if "bytes" in needed:
        floors["memory bandwidth"] = needed["bytes"] / max(limits["copy"], limits["read"])
    name = max(floors, key=floors.get)
    return name, floors[name] / seconds


def first_step(side: dict[str, float]) -> float:
    """Seconds of compilation: ours happens ahead of time, PyTorch's in its first pass, which is counted."""
    return side["lower_s"] + side["compile_s"] if "compile_s" in side else side["outputs_s"]


def warm(side: dict[str, Any]) -> str:
    """First steps of the processes that found the programs on disk: median, and the range of several."""
    found = sorted(first_step(each) for each in side["from_cache"])
    spread = f" ({found[0]:.2f}-{found[-1]:.2f})" if len(found) > 1 else ""
    return f"{statistics.median(found):.2f} s{spread}"


def first_steps(results: list[dict[str, Any]]) -> str:
    """Seconds until the first step is done, without and with programs on disk; where it was asked for."""
    rows = []
    for result in results:
        for side, found in result["sides"].items():
            if "from_cache" in found:
                rows.append(f"| {result['name']} | {side} | {first_step(found):.2f} s | {warm(found)} |")
    head = "\nCompilation, and for PyTorch its first pass:\n\n"
    head += "| item | side | cold | from cache |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n" if rows else ""


def rates(limits: dict[str, float]) -> str:
    return (
        f"{limits['matmul'] / 1e12:.3g} TFLOP/s, copy {limits['copy'] / 1e9:.3g} GB/s, "
        f"read {limits['read'] / 1e9:.3g} GB/s"
    )


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def goal(result: dict[str, Any], rival: str) -> str:
    """The goal of an item and whether it is reached: the interval's lower end is at or under it.

    Where it is missed, the ratio that ours would have at the measured limit of the machine stands beside it.
    """
    item, device = result["item"], result["run"]["device"]
    wanted = GOALS.get((device, item["dtype"]), {}).get(result["name"])
    if device == "gpu" and item["kind"] == "train":
        wanted = GPU_GOALS.get(rival)
    elif item["size"] != "0.5b" or rival == DEFAULTS:
        wanted = None
    if wanted is None:
        return ""
    if result["ratios"][rival]["low"] <= wanted:
        text = f"{wanted:.2f} reached"
    else:
        share, ours, theirs = bound(result)[1], result["sides"]["ours"], result["sides"][rival]
        text = f"{wanted:.2f} missed, limit {share * ours['median_s'] / theirs['median_s']:.2f}"
    if device == "cpu" and item["kind"] == "train" and item["dtype"] == "float32":
        peak = result["sides"]["ours"]["peak"] / result["sides"][rival]["peak"]
        text += f"; memory {PEAK_GOAL:.2f} {'reached' if peak <= PEAK_GOAL else 'missed'}"
    return text


HEAD = (
    "| item | rival | ours | rival's | ours / rival (95 %) | goal | peak memory, both | ours reaches |\n"
    "|---|---|---|---|---|---|---|---|"
)


def lines(result: dict[str, Any]) -> list[str]:
    """Table rows of a result: one for every rival."""
    name = result["name"]
    if result["item"]["kind"] == "train":
        name += f", {result['item']['batch']} x {result['item']['views']} views"
    found = [
        f"| {name} | {rival} | refused: {why[0]} | | | | | |" for rival, why in result["refused"].items()
    ]
    if not result["ratios"]:
        return found
    ours, (limit, share) = result["sides"]["ours"], bound(result)
    for rival, ratio in result["ratios"].items():
        theirs = result["sides"][rival]
        found.append(
            f"| {name} | {rival} | {seconds(ours['median_s'])} | {seconds(theirs['median_s'])} "
            f"| **{ratio['median']:.2f}** ({ratio['low']:.2f}-{ratio['high']:.2f}) | {goal(result, rival)} "
            f"| {ours['peak'] / 2**20:,.0f} / {theirs['peak'] / 2**20:,.0f} MiB "
            f"= {ours['peak'] / theirs['peak']:.2f} | {100 * share:.0f} % of {limit} |"
        )
    return found


def markdown(results: list[dict[str, Any]]) -> str:
    return "\n".join([HEAD, *(line for result in results for line in lines(result))]) + "\n"


def wins(results: list[dict[str, Any]]) -> str:
    """Table of wins.py: time, peak memory and first step with and without each saving."""
    rows = [
        "| item | instead | with the saving | without | with / without (95 %) | peak memory | compiles in |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        name = result["name"]
        for rival, why in result["refused"].items():
            rows.append(f"| {name} | {rival} | refused: {why[0]} | | | | |")
        for rival, ratio in result["ratios"].items():
            after, before = result["sides"]["ours"], result["sides"][rival]
            rows.append(
                f"| {name} | {rival} | {seconds(after['median_s'])} | {seconds(before['median_s'])} "
                f"| **{ratio['median']:.2f}** ({ratio['low']:.2f}-{ratio['high']:.2f}) "
                f"| {after['peak'] / 2**20:,.0f} / {before['peak'] / 2**20:,.0f} MiB "
                f"| {_compiling(after)} / {_compiling(before)} |"
            )
    return "\n".join(rows) + "\n"


def _compiling(side: dict[str, Any]) -> str:
    """Seconds of the first step, and from the disk cache."""
    if "compile_s" not in side:
        return "-"
    cached = f"; {warm(side)} from cache" if "from_cache" in side else ""
    return f"{first_step(side):.1f} s{cached}"


def plot(results: list[dict[str, Any]], title: str, path: Path) -> None:
    """Ratios with their intervals, one row an item; left of the line ours is faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rivals = list(dict.fromkeys(name for result in results for name in result["ratios"]))
    names = list(dict.fromkeys(result["name"] for result in results if result["ratios"]))
    figure, axes = pyplot.subplots(figsize=(7, 1.4 + 0.42 * len(names)), layout="constrained")
    for number, rival in enumerate(rivals):
        shown = [(one["name"], one["ratios"][rival]) for one in results if rival in one["ratios"]]
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
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
