"""How much of a model's accuracy bad imagery costs: the same questions on hazy, blurred, striped pictures.

Severities 1 to 3 are mild, plain and heavy as one meets them in archives; the corrupted files are kept, so
that they can be looked at.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from mmrstraj_jax.data import images
from mmrstraj_jax.evaluation.compare import paired, read_result
from mmrstraj_jax.evaluation.grids import Grid, percent
from mmrstraj_jax.evaluation.pipeline import Answerer, Scoring, evaluate
from mmrstraj_jax.evaluation.readers import Item
from mmrstraj_jax.evaluation.tasks import TEXTS, Task

SEVERITIES = (1, 2, 3)


def _haze(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Veil of white-blue light, uneven over the picture: contrast sinks, brightness rises."""
    coarse = Image.fromarray((255 * rng.random((4, 4))).astype(np.uint8))
    uneven = np.asarray(coarse.resize(image.size, Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    veil = (0.15, 0.35, 0.55)[severity - 1] * (0.7 + 0.6 * uneven)
    pixels = np.asarray(image, np.float32)
    return Image.fromarray(
        (pixels + veil * (np.array([205, 212, 222]) - pixels)).clip(0, 255).astype(np.uint8)
    )


def _blur(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Gaussian of 1, 2 and 4 pixels: defocus, or resampling from a coarser ground resolution."""
    return image.filter(ImageFilter.GaussianBlur((1, 2, 4)[severity - 1]))


def _stripes(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Push-broom sensor: a gain per column that is off, and some columns that read nothing."""
    columns = image.width
    gain = 1 + (0.04, 0.08, 0.16)[severity - 1] * rng.standard_normal(columns)
    gain[rng.random(columns) < (0.01, 0.03, 0.06)[severity - 1]] = 0
    pixels = np.asarray(image, np.float32) * gain[None, :, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _noise(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise of 8, 20 and 40 grey levels in every band."""
    pixels = np.asarray(image, np.float32)
    pixels = pixels + (8, 20, 40)[severity - 1] * rng.standard_normal(pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Compressed at quality 40, 20 and 8."""
    import io

    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=(40, 20, 8)[severity - 1])
    return Image.open(buffer).convert("RGB")


KINDS: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    "haze": _haze, "blur": _blur, "stripes": _stripes, "noise": _noise, "jpeg": _jpeg,
}  # fmt: skip


def corrupt(image: Image.Image, kind: str, severity: int, name: str) -> Image.Image:
    """An RGB image, corrupted; what is random about it is a function of kind, severity and `name`."""
    digest = hashlib.sha256(f"{kind} {severity} {name}".encode()).digest()
    return KINDS[kind](image, severity, np.random.default_rng(int.from_bytes(digest[:8], "big")))


def corrupted_items(items: Sequence[Item], kind: str, severity: int, folder: Path) -> list[Item]:
    """The same items on corrupted copies of their images, written into the folder where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    copies: dict[Path, Path] = {}
    for path in (path for item in items for path in item.images):
        if path not in copies:
            name = f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
            copies[path] = folder / f"{name}.png"
            if not copies[path].exists():
                temporary = copies[path].with_suffix(".tmp")
                corrupt(images.load(path), kind, severity, path.name).save(temporary, "PNG")
                temporary.replace(copies[path])
    return [dataclasses.replace(item, images=tuple(copies[path] for path in item.images)) for item in items]


def study(
    task: Task,
    items: Sequence[Item],
    out: Path,
    model: Answerer,
    scoring: Scoring,
    protocol: dict[str, Any],
    *,
    kinds: Sequence[str] = tuple(KINDS),
    severities: Sequence[int] = SEVERITIES,
) -> Grid:
    """Evaluates clean and corrupted images, a folder each under `out`; the table of what was lost.

    Texts are compared by ROUGE_L, answers by accuracy (undecided counts as wrong).
    """
    evaluate(task, items, out / "clean", model, scoring, protocol)
    clean = read_result(out / "clean", "clean")
    rows, drops = [], {}
    for kind in kinds:
        for severity in severities:
            name = f"{kind}-{severity}"
            worse = corrupted_items(items, kind, severity, out / "images" / name)
            evaluate(task, worse, out / name, model, scoring, protocol | {"corruption": name})
            found = read_result(out / name, name)
            for what, texts in (("answers", False), ("texts", True)):
                ids = [i for i, row in clean.items.items() if (row["type"] in TEXTS) == texts]
                if not ids:
                    continue
                c = paired(clean, found, ids)
                drops[what, kind, severity] = 100 * c.difference
                rows.append([
                    name, what, str(c.n), percent(c.mean_a), percent(c.mean_b), f"{100 * c.difference:+.1f}",
                    f"{100 * c.low:+.1f} to {100 * c.high:+.1f}",
                ])  # fmt: skip
    _plot(drops, kinds, severities).savefig(out / "corruption.png", dpi=110, metadata={"Software": None})
    notes = ["95 % interval of the difference from 10,000 paired bootstrap draws of the items."]
    columns = ["corruption", "of", "n", "clean", "corrupted", "difference", "95 %"]
    grid = Grid(f"{task.title}: what corrupted images cost", columns, rows, notes)
    (out / "corruption.md").write_text(
        grid.markdown() + "\n\n![difference](corruption.png)\n", encoding="utf-8"
    )
    return grid


def _plot(drops: dict[tuple[str, str, int], float], kinds: Sequence[str], severities: Sequence[int]):
    from matplotlib.figure import Figure

    whats = sorted({what for what, _, _ in drops})
    figure = Figure(figsize=(4.5 * len(whats), 3.4), layout="constrained")
    for axes, what in zip(np.atleast_1d(figure.subplots(1, len(whats))), whats, strict=True):
        for kind in kinds:
            axes.plot(severities, [drops[what, kind, s] for s in severities], marker="o", label=kind)
        axes.axhline(0, color="k", linewidth=0.8)
        axes.set_xticks(severities)
        axes.set_xlabel("severity")
        axes.set_ylabel(f"{what}: difference to clean, points")
    axes.legend(fontsize=8)
    return figure
