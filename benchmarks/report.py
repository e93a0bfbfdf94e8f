"""docs/performance.md, and README's table, from the JSON files of compare.py, pipeline.py and scaling.py.

    python benchmarks/report.py                    reads benchmarks/measured, writes docs/performance.md

Only what lies between `<!-- made by benchmarks/report.py: NAME -->` and `<!-- end -->` is replaced. A figure
that was taken on a CPU with other work on it is left out, and said to be.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from speed import tables

ROOT = Path(__file__).resolve().parent.parent
BUSY = 1.0  # load average before a run on a CPU; a measurement itself raises it only afterwards
NOTHING = "Not measured yet.\n"


def busy(record: dict) -> bool:
    """Whether other work ran on the CPU that was measured."""
    about = record.get("machine", record)
    return record.get("device", "cpu") == "cpu" and about["load_before"] > BUSY


def read(folder: Path, pattern: str) -> list[tuple[Path, dict]]:
    """Records of quiet machines, sorted by name; says on stderr which were left out."""
    found = []
    for path in sorted(folder.glob(pattern)):
        record = json.loads(path.read_text())
        if busy(record):
            load = record.get("machine", record)["load_before"]
            print(f"{path.name}: left out, the machine was busy (load {load:.1f})", file=sys.stderr)
        else:
            found.append((path, record))
    return found


def speed(folder: Path, images: Path) -> str:
    """Tables of compare.py, each with machine, versions, limits and command; plots beside the docs."""
    parts = []
    for path, record in read(folder, "speed-*.json"):
        about, limits = record["machine"], record["limits"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        rates = f"{limits['matmul'] / 1e12:.3g} TFLOP/s, copy {limits['copy'] / 1e9:.3g} GB/s"
        parts.append(
            f"### {record['size']}, {record['dtype']}, {about['device']}\n\n{record['date']}, {versions}; "
            f"measured limits of this machine: {rates}, read {limits['read'] / 1e9:.3g} GB/s.\n\n"
            f"```\n{record['command']}\n```\n\n{tables.markdown(record)}{first_steps(record)}"
        )
        if any(result["ratios"] for result in record["results"]):
            tables.plot(record, images / f"{path.stem}.png")
            parts[-1] += f"\n![ratios](images/{path.stem}.png)\n"
    return "\n".join(parts) or NOTHING


def first_steps(record: dict) -> str:
    """Seconds until the first step is done, without and with programs on disk; where it was asked for."""
    lines = []
    for result in record["results"]:
        for side, found in result["sides"].items():
            if "from_cache" not in found:
                continue
            cold, warm = (tables.first_step(each) for each in (found, found["from_cache"]))
            lines.append(f"| {result['name']} | {side} | {cold:.2f} s | {warm:.2f} s |")
    head = "\nCompilation, and for PyTorch its first pass:\n\n"
    head += "| item | side | cold | from cache |\n|---|---|---|---|\n"
    return head + "\n".join(lines) + "\n" if lines else ""


def pipeline(folder: Path) -> str:
    lines = []
    for _, record in read(folder, "pipeline.json"):
        image, loader = record["image"], record["loader"]
        lines.append(
            f"`{record['command']}`: one 2000 x 1500 image ({image['views']} views) "
            f"{image['image_ms']:.0f} ms on one core, "
            f"pixels equal to the reference's; {loader['size']} x {loader['size']} tiles "
            f"{loader['samples_per_s']:.1f} samples/s with {record['workers'] or 1} worker(s)."
        )
        if "feeding" in record:
            need = record["feeding"]
            lines.append(
                f"8 GPUs that train {need['gpu_samples_per_s']:g} samples/s each need "
                f"{need['cores']:.1f} such cores."
            )
    return "\n".join(lines) + "\n" if lines else NOTHING


def scaling(folder: Path) -> str:
    from scaling import COUNTS, Point, markdown

    parts = []
    for path in sorted(folder.glob("scaling-*.json")):
        record = json.loads(path.read_text())
        points = [Point(**one) for one in record["points"]]
        shown = [one for one in points if one.devices in COUNTS[::3] + COUNTS[-1:]]
        parts.append(f"{record['title']}:\n\n```\n{record['command']}\n```\n\n{markdown(shown)}")
    return "\n".join(parts) or NOTHING


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
        "scaling": scaling(args.measured),
    }
    for page in (ROOT / "docs" / "performance.md", ROOT / "README.md"):
        page.write_text(fill(page.read_text(), blocks))


if __name__ == "__main__":
    main()
