"""Images, dense truth and questions that the tiny base learns from: rendered once, kept as arrays.

Legend: N images of one size, V views an image, S view side, s patches per view side, T = s x s, C classes,
K kinds of counts, F facts.
"""

import itertools
import json
import math
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from PIL import Image
from tqdm import tqdm

from mmrstraj_jax.config import AnyResConfig
from mmrstraj_jax.data import anyres, images
from mmrstraj_jax.synthcity import captions, palette
from mmrstraj_jax.synthcity.canvas import CLASSES
from mmrstraj_jax.synthcity.city import SPECS
from mmrstraj_jax.synthcity.questions import Balancer
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.sample import WINDOWS_PER_CITY, Sample, city_seed, general_questions, samples
from mmrstraj_jax.synthcity.truth import BUILDINGS, DIRECTIONS, direction_of

_COLORS = {
    **dict.fromkeys(BUILDINGS, palette.ROOF_RGB),
    "car": palette.CAR_RGB,
    "tank": palette.TANK_RGB,
    "ship": palette.SHIP_RGB,
    "airplane": palette.PLANE_RGB,
}
OBJECTS = (
    "car", "moving car", "parked car", "building", *BUILDINGS, "pool", "tank", "ship", "tree", "field",
    "airplane",
    "crossroads", "T-junction", "roundabout", "dead end", "overpass",
)  # fmt: skip
# Counted in each patch: objects, objects of a color; road by class and by direction, in patch lengths.
COUNTS = (
    *OBJECTS,
    *(f"{color} {kind}" for kind, colors in _COLORS.items() for color in colors),
    *SPECS,
    *DIRECTIONS,
    "other",
)
_CHANNEL = {name: k for k, name in enumerate(COUNTS)}
# What is known of the whole image: attributes of Truth and their values.
FACTS = {
    "main_class": tuple(SPECS),
    "main_direction": tuple(DIRECTIONS),
    "density": ("sparse", "medium", "dense"),
    "scene": (
        "residential", "apartments", "commercial", "industrial", "park", "sports field", "farmland", "harbor",
        "river", "airport",
    ),
    "level": ("light", "moderate", "heavy"),
    "busiest": ("left", "right", "top", "bottom"),
    "modality": ("color", "panchromatic"),
    "sun": ("top left", "top right", "bottom left", "bottom right"),
}  # fmt: skip
CITIES_A_SHARD = 20
QUESTIONS = {True: 24, False: 12}  # an image, with and without drills
_ROAD_STEP = 1.0  # metres between the points that a road is measured by


class DenseLabels(NamedTuple):
    """Of B images of one size."""

    shares: Float[np.ndarray, "B V T C"]  # of each patch's pixels by class; rows sum to 1
    counts: Float[np.ndarray, "B V T K"]  # in each patch, by COUNTS
    facts: Int[np.ndarray, "B F"]  # of FACTS; -1 where nothing is clear


@dataclass
class Group:
    """Images of one size; all arrays are in step."""

    plan: anyres.Plan
    views: UInt8[np.ndarray, "N V S S 3"]
    shares: Float[np.ndarray, "N V T C"]
    counts: Float[np.ndarray, "N V T K"]
    facts: Int[np.ndarray, "N F"]  # index of the value, -1 where nothing is clear
    texts: list[list[tuple[str, str, str]]]  # (type, question, answer) of each image, the caption last
    places: list[list[list]]  # of the same questions: Question.places

    def labels(self, rows: Int[np.ndarray, " B"]) -> DenseLabels:
        shares, counts = (x[rows].astype(np.float32) for x in (self.shares, self.counts))
        return DenseLabels(shares, counts, self.facts[rows])


def grid_labels(
    sample: Sample, rows: int, columns: int
) -> tuple[Float[np.ndarray, "rows columns C"], Float[np.ndarray, "rows columns K"]]:
    """Class shares and COUNTS of every cell of a grid over the image; objects count where their centre is."""
    height, width = sample.classes.shape
    y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
    cell = (y[:, None] * columns + x) * len(CLASSES) + sample.classes
    shares = np.bincount(cell.ravel(), minlength=rows * columns * len(CLASSES)).astype(np.float32)
    shares = shares.reshape(rows, columns, len(CLASSES))
    counts = np.zeros((rows, columns, len(COUNTS)), np.float32)

    def add(name: str, u: float, v: float, amount: float = 1.0) -> None:
        if 0 <= u < 1 and 0 <= v < 1 and name in _CHANNEL:
            counts[int(v * rows), int(u * columns), _CHANNEL[name]] += amount

    for item in sample.truth.items:
        names = {item.kind, f"{item.tag} {item.kind}", f"{item.color} {item.kind}"}
        for name in names | ({"building"} if item.kind in BUILDINGS else set()):
            add(name, item.u, item.v)
    x0, y0, x1, y1 = sample.view.window.bounds
    for node in sample.view.nodes:
        add(node.kind, (node.x - x0) / (x1 - x0), (y1 - node.y) / (y1 - y0))
    step = _ROAD_STEP * columns / (x1 - x0)
    for road in sample.view.roads:
        for (ax, ay), (bx, by) in itertools.pairwise(road.points):
            number = max(1, round(math.hypot(bx - ax, by - ay) / _ROAD_STEP))
            for t in (np.arange(number) + 0.5) / number:
                u, v = (ax + t * (bx - ax) - x0) / (x1 - x0), (y1 - ay - t * (by - ay)) / (y1 - y0)
                add(road.cls, u, v, step)
                add(direction_of(bx - ax, by - ay), u, v, step)
    return shares / shares.sum(-1, keepdims=True), counts


def _view_labels(sample: Sample, plan: anyres.Plan) -> list[Float[np.ndarray, "V T _"]]:
    """Labels of the base view and of the crops; the image is a whole number of views high and wide."""
    side, (rows, columns) = plan.side, plan.grid
    whole, parts = grid_labels(sample, side, side), grid_labels(sample, rows * side, columns * side)
    return [
        np.concatenate(
            [base.reshape(1, side**2, -1), rearrange(part, "(a y) (b x) c -> (a b) (y x) c", y=side, x=side)]
        ).astype(np.float16)
        for base, part in zip(whole, parts, strict=True)
    ]


def _shard(split: str, seed: int, number: int, policy: AnyResConfig, drilled: bool) -> dict[str, np.ndarray]:
    """Arrays "<width>x<height>/<field of Group>" of one shard's cities."""
    balancer, found = Balancer(), {}
    count = CITIES_A_SHARD * WINDOWS_PER_CITY
    for sample in samples(split, seed, count, "A", start=number * count):
        stream = Stream(city_seed(split, seed, 0), 9, int(sample.id.rsplit("-", 1)[1]))
        picture = Image.fromarray(sample.image)
        plan = anyres.plan(*picture.size, policy)
        facts = [
            values.index(vars(sample.truth)[name]) if vars(sample.truth)[name] in values else -1
            for name, values in FACTS.items()
        ]
        asked = general_questions(sample.truth, stream, balancer, QUESTIONS[drilled], with_drills=drilled)
        texts = [(q.type, q.question, q.answer) for q in asked]
        places = [[[(round(u, 3), round(v, 3)) for u, v in group] for group in q.places] for q in asked]
        texts.append(("caption", stream.choice(captions.PROMPTS), captions.caption(sample.truth, stream)))
        row = (
            images.views(picture, plan, policy.view_size),
            *_view_labels(sample, plan),
            facts,
            json.dumps(texts),
            json.dumps(places),
        )
        found.setdefault("{}x{}".format(*picture.size), []).append(row)
    names = ("views", "shares", "counts", "facts", "texts", "places")
    return {
        f"{size}/{name}": np.stack(column)
        for size, rows in found.items()
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def _write(job: tuple) -> None:
    path, *how = job
    temporary = path.with_name(f"_{path.name}")
    np.savez(temporary, **_shard(*how))
    temporary.replace(path)


def render(
    folder: Path, split: str, seed: int, num: int, policy: AnyResConfig, *, drilled: bool
) -> list[Group]:
    """At least `num` images of domain A, one group for each size; shards that lie in `folder` are read."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = range(-(-num // (CITIES_A_SHARD * WINDOWS_PER_CITY)))
    paths = [folder / f"{number:04d}.npz" for number in shards]
    jobs = [
        (p, split, seed, k, policy, drilled) for k, p in zip(shards, paths, strict=True) if not p.exists()
    ]
    if jobs:
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            list(tqdm(pool.imap_unordered(_write, jobs), total=len(jobs), desc=f"rendering {split}"))
    parts: dict[str, list[dict[str, np.ndarray]]] = {}
    for path in paths:
        with np.load(path) as arrays:
            for size in {key.split("/")[0] for key in arrays}:
                fields = {k.split("/")[1]: arrays[k] for k in arrays if k.startswith(f"{size}/")}
                parts.setdefault(size, []).append(fields)
    groups = []
    for size in sorted(parts):
        joined = {name: np.concatenate([part[name] for part in parts[size]]) for name in parts[size][0]}
        texts = [[tuple(text) for text in json.loads(row)] for row in joined.pop("texts")]
        places = [json.loads(row) for row in joined.pop("places")]
        joined["facts"] = joined["facts"].astype(np.int32)
        plan = anyres.plan(*map(int, size.split("x")), policy)
        groups.append(Group(plan, **joined, texts=texts, places=places))
    return groups


def draws(
    groups: list[Group], batch: int, steps: int, seed: int
) -> Iterator[tuple[int, Int[np.ndarray, " B"]]]:
    """(group, rows) of `steps` batches, each of one image size; an epoch shows every image at most once."""
    rng, queue = np.random.default_rng(seed), []
    for _ in range(steps):
        if not queue:
            for k, group in enumerate(groups):
                order = rng.permutation(len(group.views))
                queue += [
                    (k, rows)
                    for rows in np.split(order, range(batch, len(order), batch))
                    if len(rows) == batch
                ]
            rng.shuffle(queue)
        yield queue.pop()
