"""SynthTraffic-Bench: a fixed benchmark whose answers, traffic included, follow from the world's own truth.

    python -m mmrstraj_jax.synthcity.bench --check           every image and question is the published one
    python -m mmrstraj_jax.synthcity.bench --write FOLDER    images/ and annotations.json, in RSIEval's schema
                                                             plus eight types; read by
                                                             --task synthtraffic-bench

320 images, half of them in the base model's domain A and half in B (dry season, haze, smaller objects), from
cities that no training or evaluation split has. Images are not shipped: they are drawn from the seed, and
bench.json lists a hash of the decoded pixels and of the annotation of each.
"""

import argparse
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmrstraj_jax.errors import UserError, run_command
from mmrstraj_jax.synthcity.questions import Balancer
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.sample import balanced, cache_root, city_seed, evaluation_rows, samples

VERSION = "1"
HASHES = Path(__file__).with_name("bench.json")
DOMAINS = {"A": 0, "B": 1}  # -> seed of the split
IMAGES = 160  # of each domain
GENERAL, TRAFFIC = 5, 4  # questions of an image at most, before the yes/no answers are evened out


def annotations(images: int = IMAGES) -> Iterator[tuple[UInt8[np.ndarray, "H W 3"], dict]]:
    """(image, annotation) of every image; fewer of each domain for a quick look, with other questions.

    An annotation has filename, caption, qa_pairs ({question, answer, type, truth}), traffic (a description),
    domain and truth.
    """
    pictures, rows = [], []
    for domain, seed in DOMAINS.items():
        balancers = Balancer(), Balancer()
        for k, sample in enumerate(samples("bench", seed, images, domain, "eval_traffic")):
            s = Stream(city_seed("bench", seed, 0), 12, k)
            name = f"{domain}{k:03d}.png"
            pictures.append((name, sample.image, domain, sample.truth.as_json()))
            for kind, balancer, limit in zip(
                ("eval_general", "eval_traffic"), balancers, (GENERAL, TRAFFIC), strict=True
            ):
                rows += [row | {"id": name} for row in evaluation_rows(sample, s, kind, balancer, limit)]
    found: dict[str, dict] = {name: {"qa_pairs": []} for name, *_ in pictures}
    for row in balanced(rows):
        question, answer = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
        if row["type"] in ("caption", "description"):
            found[row["id"]][row["type"]] = answer
        else:
            facts = {k: v for k, v in row["truth"].items() if k != "answer"}
            pair = {"question": question, "answer": answer, "type": row["type"], "truth": facts}
            found[row["id"]]["qa_pairs"].append(pair)
    for name, image, domain, truth in pictures:
        row = found[name]
        yield (
            image,
            {
                "filename": name, "caption": row["caption"], "qa_pairs": row["qa_pairs"],
                "traffic": row["description"], "domain": domain, "truth": truth,
            },
        )  # fmt: skip


def digests(image: UInt8[np.ndarray, "H W 3"], annotation: dict) -> list[str]:
    """[of the decoded pixels and their shape, of the annotation], 16 hexadecimal digits each."""
    pixels = hashlib.sha256(str(image.shape).encode() + image.tobytes())
    text = json.dumps(annotation, sort_keys=True, ensure_ascii=False)
    return [pixels.hexdigest()[:16], hashlib.sha256(text.encode()).hexdigest()[:16]]


def published() -> dict:
    """bench.json: version, counts per question type, and name -> digests."""
    return json.loads(HASHES.read_text(encoding="utf-8"))


def check(found: dict[str, list[str]]) -> None:
    """Raises UserError naming the first of the images that are not what was published."""
    known = published()["digests"]
    wrong = sorted(name for name in known.keys() | found.keys() if known.get(name) != found.get(name))
    if wrong:
        pixels = [n for n in wrong if (known.get(n) or [""])[0] != (found.get(n) or [""])[0]]
        raise UserError(
            f"SynthTraffic-Bench {VERSION}: {len(wrong)} of {len(known)} entries ({len(pixels)} in their "
            f"pixels) are not the published ones, {wrong[0]} first; expected those of bench.json. Another "
            "version of NumPy, SciPy or Pillow? Scores on other images must not be compared"
        )


def write(folder: str | os.PathLike) -> Path:
    """Writes folder/images and folder/annotations.json, checked; returns the latter.

    Raises UserError: this machine draws something other than what was published.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, found = [], {}
    for image, row in annotations():
        path = folder / "images" / row["filename"]
        Image.fromarray(image).save(path, compress_level=1)
        found[row["filename"]] = digests(np.asarray(Image.open(path)), row)
        rows.append(row)
    check(found)
    path = folder / "annotations.json"
    text = json.dumps({"version": VERSION, "annotations": rows}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def ensure_bench(cache_dir: str | os.PathLike | None = None) -> Path:
    """annotations.json in the user's cache, drawn and checked on first use (half a minute)."""
    root = Path(cache_dir) if cache_dir else cache_root()
    name = hashlib.sha256(HASHES.read_bytes()).hexdigest()[:8]
    folder = root / f"synthtraffic-bench-{VERSION}-{name}"
    if not folder.exists():
        work = root / f".bench-{uuid.uuid4().hex}"
        work.mkdir(parents=True)
        try:
            write(work)
            work.rename(folder)  # complete under its name, or not there
        except OSError:
            if not folder.exists():  # if it does, another process was first
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder / "annotations.json"


def counts(rows: list[dict]) -> dict[str, int]:
    """Questions by type, the most first."""
    return dict(Counter(pair["type"] for row in rows for pair in row["qa_pairs"]).most_common())


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mmrstraj_jax.synthcity.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FOLDER")
    what.add_argument("--check", action="store_true", help="draw everything and compare, write nothing")
    what.add_argument("--publish", action="store_true", help="a new version: write bench.json")
    options = parser.parse_args(args)
    if options.write:
        path = write(options.write)
        rows = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        print(path)
    else:
        drawn = list(annotations())
        rows = [row for _, row in drawn]
        found = {row["filename"]: digests(image, row) for image, row in drawn}
        if options.publish:
            data = {"version": VERSION, "questions": counts(rows), "digests": found}
            HASHES.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        check(found)
    per_type = counts(rows)
    print(f"SynthTraffic-Bench {VERSION}: {len(rows)} images, {sum(per_type.values())} questions")
    for name, number in per_type.items():
        print(f"  {name:<16}{number:>5}")


if __name__ == "__main__":
    run_command(main)
