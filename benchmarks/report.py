"""docs/performance.md, and README's table, from the JSON files of the benchmarks alone.

    python benchmarks/report.py                    reads benchmarks/measured, writes docs/performance.md

Only what lies between `<!-- made by benchmarks/report.py: NAME -->` and `<!-- end -->` is replaced. What has
not been measured, was measured on other code than the package has now, or while other work took the CPUs,
reads "Not measured"; the reason is printed.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from speed import machine, store, tables

ROOT = Path(__file__).resolve().parent.parent
NOTHING = "Not measured.\n"
_LINES = ["vision-1", "vision-5", "vision-10", "prefill", "decode-1", "decode-4", "decode-16"]
_TRAIN = ["train-block", "train-dots", "train-none"]


class Section(NamedTuple):
    """A table of the page: what it must have, so that a gap is seen."""

    device: str
    size: str
    dtype: str
    items: list[str]

    @property
    def title(self) -> str:
        return f"{self.size.replace('b', 'B')}, {self.dtype}, one {self.device.upper()}"

    def rivals(self, item: str) -> list[str]:
        defaults = item.startswith("train") and self.device == "gpu"
        return [tables.EAGER, tables.COMPILED] + [tables.DEFAULTS] * defaults


SECTIONS = [
    Section("cpu", "0.5b", "float32", [*_LINES, *_TRAIN]),
    Section("cpu", "0.5b", "bfloat16", ["vision-1", "prefill", "decode-1", "decode-4", "train-block"]),
    Section("gpu", "0.5b", "bfloat16", [*_LINES, *_TRAIN]),
    Section("gpu", "7b", "bfloat16", [*_LINES, *_TRAIN]),
]


class Found(NamedTuple):
    """A file of compare.py or wins.py, less the results that may not be shown."""

    path: Path
    head: dict[str, Any]
    results: list[dict[str, Any]]


def why_not(result: dict[str, Any]) -> str:
    """Why a result may not be shown; empty where it may."""
    if not store.fresh(result):
        return "the package's code is another one now"
    if result["run"]["device"] == "cpu" and result.get("other_work", 0) > machine.BUSY:
        return f"other work took {100 * result['other_work']:.0f} % of the CPUs"
    return ""


def read(folder: Path, pattern: str) -> Iterator[Found]:
    """Files by name; says on stderr what is left out."""
    for path in sorted(folder.glob(pattern)):
        head = json.loads(path.read_text())
        shown = []
        for result in head.pop("results"):
            if why := why_not(result):
                print(f"{path.name}: {result['name']} is left out, {why}", file=sys.stderr)
            else:
                shown.append(result)
        yield Found(path, head, shown)


def section(want: Section, found: Found, images: Path) -> str:
    """One table with its machine, versions, limits, plot and commands."""
    rows, shown = [tables.HEAD], []
    for name in want.items:
        mine = [result for result in found.results if result["name"] == name]
        shown += mine
        rows += [line for result in mine for line in tables.lines(result)]
        have = {rival for result in mine for rival in (*result["ratios"], *result["refused"])}
        gaps = [rival for rival in want.rivals(name) if rival not in have]
        rows += [f"| {name} | {rival} | Not measured | | | | | |" for rival in gaps]
    text = f"{found.head['host']}.\n\n" if want.device == "cpu" else f"{found.head['machine']}.\n\n"
    text += "\n".join(rows) + "\n"
    if any(result["ratios"] for result in shown):
        name = f"{found.path.stem}.png"
        tables.plot(shown, f"{want.title}: {found.head['machine']}", images / name)
        text += f"\n![time of ours over the rival's](images/{name})\n"
    return text + tables.first_steps(shown) + how(shown)


def how(results: list[dict[str, Any]]) -> str:
    """When, with what, at which measured limits and by which commands results were taken."""
    lines, commands = {}, {}
    for result in results:
        run = result["run"]
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        lines[f"{run['date']}, {versions}"] = tables.rates(run["limits"])
        commands[run["command"]] = None
    if not lines:
        return ""
    text = "\n".join(f"- {line}; measured limits: {limits}" for line, limits in lines.items())
    return f"\n{text}\n\n```\n" + "\n".join(commands) + "\n```\n"


def speed(folder: Path, images: Path) -> str:
    """The tables of SECTIONS, and of any other size that was measured."""
    parts, seen = [], set()
    for want in SECTIONS:
        files = list(read(folder, f"speed-{want.device}-{want.size}-{want.dtype}-*.json"))
        seen |= {found.path for found in files}
        parts.append(f"### {want.title}\n")
        parts += [section(want, found, images) for found in files if found.results] or [NOTHING]
    for found in read(folder, "speed-*.json"):
        if found.path not in seen and found.results:
            head = found.head
            names = list(dict.fromkeys(result["name"] for result in found.results))
            want = Section(head["device"], head["size"], head["dtype"], names)
            parts += [f"### {want.title}\n", section(want, found, images)]
    return "\n".join(parts)


def pipeline(folder: Path) -> str:
    path = folder / "pipeline.json"
    if not path.exists():
        return NOTHING
    record = json.loads(path.read_text())
    if record["code"] != store.fingerprint(store.HOST_CODE):
        print(f"{path.name}: left out, the package's code is another one now", file=sys.stderr)
        return NOTHING
    image, loader, need = record["image"], record["loader"], record["feeding"]
    return (
        f"{record['host']}, {record['date']}:\n\n```\n{record['command']}\n```\n\n"
        f"- One 2000 x 1500 image, {image['views']} views: {image['image_ms']:.0f} ms of one core (goal "
        f"105), decoding the JPEG {image['decode_ms']:.0f} ms of them; the pixels are the reference's.\n"
        f"- The loader, {loader['size']} x {loader['size']} tiles of {loader['views']} views: "
        f"{loader['samples_per_s']:.1f} samples a second of one core, so 8 cores make "
        f"{8 * loader['samples_per_s']:.0f} samples/s.\n"
        f"- 8 GPUs that train {need['gpu_samples_per_s']:.1f} samples/s each ({need['source']}) ask for "
        f"{8 * need['gpu_samples_per_s']:.0f} samples/s: {need['cores']:.1f} such cores.\n"
    )


def wins(folder: Path) -> str:
    """What each saving is worth, a table for every size and machine."""
    parts = []
    for found in read(folder, "wins-*.json"):
        if found.results:
            head = found.head
            parts.append(f"{head['size'].replace('b', 'B')}, {head['dtype']}, {head['host']}:\n")
            parts.append(tables.wins(found.results) + how(found.results))
    return "\n".join(parts) or NOTHING


def captions(folder: Path) -> str:
    path = folder / "captions.json"
    if not path.exists():
        return NOTHING
    record = json.loads(path.read_text())
    why = ""
    if record["code"] != store.fingerprint(store.CAPTION_CODE):
        why = "the package's code is another one now"
    elif record["other_work"] > machine.BUSY:
        why = f"other work took {100 * record['other_work']:.0f} % of the CPUs"
    if why:
        print(f"{path.name}: left out, {why}", file=sys.stderr)
        return NOTHING
    rows = ["| captions | ours | pycocoevalcap | ours / pycocoevalcap (95 %) |", "|---|---|---|---|"]
    for name, found in record["results"].items():
        ours, theirs = (tables.seconds(found["median_s"][side]) for side in ("ours", "pycocoevalcap"))
        ratio = found["ratio"]
        spread = f"**{ratio['median']:.2f}** ({ratio['low']:.2f}-{ratio['high']:.2f})"
        rows.append(f"| {name} | {ours} | {theirs} | {spread} |")
    return f"{record['host']}, {record['date']}, `{record['command']}`:\n\n" + "\n".join(rows) + "\n"


def scaling(folder: Path) -> str:
    from scaling import COUNTS, Point, markdown

    parts = []
    for path in sorted(folder.glob("scaling-*.json")):
        record = json.loads(path.read_text())
        points = [Point(**one) for one in record["points"]]
        shown = [one for one in points if one.devices in COUNTS[::3] + COUNTS[-1:]]
        parts.append(f"{record['title']}:\n\n```\n{record['command']}\n```\n\n{markdown(shown)}")
    return "\n".join(parts) or NOTHING


def stored() -> str:
    """What the plan says of 7B with its language model in fewer bits; computed here, nothing is measured.

    What the backward pass keeps without remat depends on JAX, so its version is said.
    """
    import jax

    from mmrstraj_jax.config import MODEL_PRESETS, Config
    from mmrstraj_jax.data.collate import Shape
    from mmrstraj_jax.planning import memory

    rows = ["| stored as | weights, GiB | peak, remat block | dots | none |", "|---|---|---|---|---|"]
    for kind in ("none", "int8", "nf4"):
        found = [
            memory.estimate(
                Config(dtype="bfloat16", remat=remat, batch_size=1, micro_batch_size=1, quantize_llm=kind),
                MODEL_PRESETS["7b"],
                Shape(5, 2176, 64, 0, False),
            )
            for remat in ("block", "dots", "none")
        ]
        figures = [found[0].resident["frozen weights"], *(one.peak for one in found)]
        cells = " | ".join(f"{figure / 2**30:.1f}" for figure in figures)
        rows.append(f"| {'bfloat16' if kind == 'none' else kind} | {cells} |")
    return f"JAX {jax.__version__}:\n\n" + "\n".join(rows) + "\n"


README_ITEMS = {
    "vision-1": "vision tower, one view",
    "prefill": "prompt of 2,100 tokens",
    "decode-1": "answer, batch 1",
    "decode-4": "answer, batch 4",
    "train-block": "LoRA step, layers recomputed",
}


def summary(folder: Path) -> str:
    """README's table: ours over PyTorch, a column for each section; one machine in each."""
    titles, columns = [], []
    for want in SECTIONS:
        title, items = want.title, {}
        for found in read(folder, f"speed-{want.device}-{want.size}-{want.dtype}-*.json"):
            shown = {}
            for one in found.results:  # the rivals of an item may be of several runs
                if one["name"] in README_ITEMS:
                    shown.setdefault(one["name"], {}).update(one["ratios"])
            if len(shown) > len(items):
                title, items = f"{want.title.rpartition(', ')[0]}, {found.head['machine']}", shown
        titles.append(title)
        columns.append(items)
    rows = ["| time of ours / PyTorch eager, compiled | " + " | ".join(titles) + " |"]
    rows.append("|---" * (1 + len(SECTIONS)) + "|")
    for name, label in README_ITEMS.items():
        rows.append(f"| {label} | " + " | ".join(_eager_and_compiled(each.get(name, {})) for each in columns))
        rows[-1] += " |"
    return "\n".join(rows) + "\n"


def _eager_and_compiled(ratios: dict[str, dict[str, float]]) -> str:
    found = [ratios.get(rival) for rival in (tables.EAGER, tables.COMPILED)]
    if not any(found):
        return "Not measured"
    return ", ".join(f"{each['median']:.2f}" if each else "-" for each in found)


def fill(page: str, blocks: dict[str, str]) -> str:
    """The page with its named blocks replaced. Raises KeyError for a block that nothing makes."""

    def block(match: re.Match) -> str:
        return f"{match[1]}\n{blocks[match[2]]}{match[3]}"

    pattern = r"(<!-- made by benchmarks/report\.py: (\w+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, block, page, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measured", type=Path, default=Path(__file__).parent / "measured")
    args = parser.parse_args()
    blocks = {
        "speed": speed(args.measured, ROOT / "docs" / "images"),
        "pipeline": pipeline(args.measured),
        "wins": wins(args.measured),
        "captions": captions(args.measured),
        "stored": stored(),
        "scaling": scaling(args.measured),
        "summary": summary(args.measured),
    }
    for page in (ROOT / "docs" / "performance.md", ROOT / "README.md"):
        page.write_text(fill(page.read_text(), blocks))


if __name__ == "__main__":
    main()
