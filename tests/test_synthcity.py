"""SynthCity: same seed same sample, and truth and text agree with the geometry computed another way."""

import hashlib
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmrstraj_jax.errors import UserError
from mmrstraj_jax.synthcity import sample as sample_module
from mmrstraj_jax.synthcity import traffic
from mmrstraj_jax.synthcity.blocks import content
from mmrstraj_jax.synthcity.canvas import CLASSES
from mmrstraj_jax.synthcity.city import SPECS, make_city
from mmrstraj_jax.synthcity.labels import KINDS
from mmrstraj_jax.synthcity.questions import Balancer
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.sample import (
    SPLITS,
    city_seed,
    ensure_sample,
    general_questions,
    samples,
    traffic_questions,
    write_sample,
)
from mmrstraj_jax.synthcity.tokenizer import SPECIAL, train_tokenizer
from mmrstraj_jax.synthcity.truth import BUILDINGS, CELL_NAMES


@pytest.fixture(scope="module")
def many():
    return list(samples("eval_base", 3, 48, "A")) + list(samples("eval_base", 4, 24, "B", "traffic"))


def all_things(sample):
    """Every thing of the whole city at the window's hour: no spatial index, no margin."""
    window = sample.view.window
    city = window.city
    things = [t for block in city.blocks for t in content(city, block).things]
    # Vehicles only of roads with a point within reach: vehicles of the others are far away by construction.
    from mmrstraj_jax.synthcity.vehicles import on_road

    reach = sum(window.size)
    for road in city.roads:
        if any(math.dist(p, (window.x, window.y)) < reach for p in road.points):
            things += on_road(city, road, window.hour)
    return things


def to_image(sample, x, y):
    """World metres -> pixels, by the pixel size alone."""
    w, h = sample.view.window.pixels
    gsd = sample.view.window.gsd
    return w / 2 + (x - sample.view.window.x) / gsd, h / 2 - (y - sample.view.window.y) / gsd


def test_same_seed_same_sample():
    one, two = (list(samples("base", 7, 3, "B", "traffic")) for _ in range(2))
    later = next(samples("base", 7, 1, "B", "traffic", start=2))
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.image, b.image) and a.truth == b.truth
    assert np.array_equal(later.image, one[2].image)
    other = next(samples("base", 8, 1, "B", "traffic"))
    assert not np.array_equal(other.image[:64, :64], one[0].image[:64, :64])


def test_sample_is_the_same_on_every_python(tmp_path):
    """A committed digest of decoded pixels and rows that Python 3.11 and 3.12 must both give.

    A change of pixels or words on purpose changes sample.VERSION and this digest.
    """
    digest = hashlib.sha256()
    digest.update(write_sample(tmp_path, "eval_stage2", 4, 9, "B", "eval_traffic").read_bytes())
    digest.update(write_sample(tmp_path, "base", 6, 9, "A", "base").read_bytes())
    digest.update(write_sample(tmp_path, "eval_stage1", 4, 9, "A", "eval_general").read_bytes())
    for name in sorted((tmp_path / "images").iterdir()):
        digest.update(np.asarray(Image.open(name)).tobytes())
    assert digest.hexdigest() == "f036446810f4661e7d7fa8d17976d42817281a385b775651fe92ca2c2e67d279"


def test_counts_match_the_geometry(many):
    for sample in many:
        w, h = sample.view.window.pixels
        inside, seen = Counter(), Counter()
        for thing in all_things(sample):
            u, v = to_image(sample, thing.x, thing.y)
            kinds = [thing.kind] + ["building"] * (thing.kind in BUILDINGS)
            if thing.kind == "car":
                kinds.append(f"{thing.tag} car")
            inside.update(k for k in kinds if 0 <= u < w and 0 <= v < h)
            reach = math.hypot(thing.length, thing.width) / 2 / sample.view.window.gsd
            seen.update(k for k in kinds if -reach < u < w + reach and -reach < v < h + reach)
        for kind in set(inside) | set(seen) | set(sample.truth.counts):
            count = sample.truth.count(kind)
            assert count.sure <= inside[kind] <= count.possible, (sample.id, kind)
            if count.exact is not None:
                assert count.exact == inside[kind], (sample.id, kind)
            if count.visible == 0:
                assert seen[kind] == 0, (sample.id, kind)


def test_objects_are_drawn_where_truth_says(many):
    """The pixel under each object's centre has the object's class, unless something taller stands there."""
    cls = {
        "car": "car",
        "pool": "pool",
        "tank": "tank",
        "ship": "ship",
        "tree": "tree",
        "field": "sports field",
    }
    cls |= {k: "building" for k in BUILDINGS} | {"airplane": "airplane"}
    hits = total = 0
    for sample in many:
        h, w = sample.classes.shape
        for item in sample.truth.items:
            if item.status == "inside":
                total += 1
                hits += CLASSES[sample.classes[int(item.v * h), int(item.u * w)]] == cls[item.kind]
    assert total > 1000 and hits / total > 0.985


def test_main_direction_matches_the_markings(many):
    """Total chord of the main class, from densely walked points instead of clipped segments."""
    named = [s for s in many if s.truth.main_direction]
    assert len(named) > 20
    for sample in named:
        x0, y0, x1, y1 = sample.view.window.bounds
        # 45 and 135 degrees have one name: four-fold angles take them for the same.
        doubled, fold = np.zeros(2), 4 if sample.truth.main_direction == "diagonal" else 2
        for road in sample.view.window.city.roads:
            if road.cls == sample.truth.main_class:
                for (ax, ay), (bx, by) in itertools.pairwise(road.points):
                    t = np.linspace(0, 1, 60)
                    x, y = ax + (bx - ax) * t, ay + (by - ay) * t
                    part = ((x > x0) & (x < x1) & (y > y0) & (y < y1)).mean() * math.hypot(bx - ax, by - ay)
                    angle = fold * math.atan2(by - ay, bx - ax)
                    doubled += part * np.array([math.cos(angle), math.sin(angle)])
        angle = math.degrees(math.atan2(doubled[1], doubled[0])) / fold % (360 / fold)
        axis = {"east-west": (0, 180), "north-south": (90,), "diagonal": (45,)}[sample.truth.main_direction]
        assert min(abs(angle - a) for a in axis) < 30, (sample.id, angle)


def test_answers_follow_from_the_items(many):
    """Colors, cells, counts and sides of answers, recomputed from pixels of object centres."""
    checked = Counter()
    for sample in many:
        truth = sample.truth
        found = general_questions(truth, Stream(1), Balancer(), 60, with_drills=True)
        for q in found:
            words = q.question
            if q.type == "quantity":
                kinds = BUILDINGS if q.facts["kind"] == "building" else (q.facts["kind"].split(" ")[-1],)
                parked = q.facts["kind"] == "parked car"
                number = sum(
                    i.kind in kinds and 0 <= i.u < 1 and 0 <= i.v < 1 and (not parked or i.tag == "parked")
                    for i in truth.items
                )
                assert q.answer == str(number), (sample.id, words)
            elif q.type == "ab_position":
                column, row = int(q.facts["u"] * 3), int(q.facts["v"] * 3)
                assert CELL_NAMES[row * 3 + column] == q.answer
            elif q.type == "image":
                flat = np.ptp(sample.image.astype(int), axis=2).max() == 0
                assert q.answer == ("panchromatic" if flat else "color")
            elif q.type == "color" and "cell" in q.facts:
                k = CELL_NAMES.index(q.facts["cell"])
                here = [
                    i
                    for i in truth.items
                    if i.kind == q.facts["kind"]
                    and (int(i.u * 3), int(i.v * 3)) == (k % 3, k // 3)
                    and i.status == "inside"
                ]
                assert [i.color for i in here] == [q.answer], (sample.id, words)
            else:
                continue
            checked[q.type] += 1
    assert min(checked[t] for t in ("quantity", "ab_position", "image", "color")) > 25, checked


def test_sun_matches_the_shadows():
    """A tree's shadow lies on the side away from the named corner: compare brightness on both sides."""
    good = total = 0
    for sample in samples("eval_base", 5, 24, "A", square=True):
        h, w, _ = sample.image.shape
        vertical, horizontal = sample.truth.sun.split(" ")
        dx, dy = (1 if horizontal == "right" else -1), (-1 if vertical == "top" else 1)
        gray = sample.image.mean(2)
        for item in sample.truth.items:
            if item.kind == "tree" and item.status == "inside":
                step = (item.length / 2 + 1.0) / sample.view.window.gsd * 0.75
                x, y = item.u * w, item.v * h
                points = [(int(y + s * dy * step), int(x + s * dx * step)) for s in (1, -1)]
                if all(2 < a < h - 3 and 2 < b < w - 3 for a, b in points):
                    bright, dark = (gray[a - 1 : a + 2, b - 1 : b + 2].mean() for a, b in points)
                    total += 1
                    good += bright > dark
    assert total > 60 and good / total > 0.85


def test_traffic_levels_and_lanes(many):
    for sample in many:
        facts = traffic.facts_of(sample.truth)
        answers = {q.question: q.answer for q in traffic_questions(facts, Stream(2), Balancer(), 60)}
        moving = sum(i.tag == "moving" and 0 <= i.u < 1 and 0 <= i.v < 1 for i in sample.truth.items)
        for text in ("How heavy is the traffic?", "What is the traffic level?"):
            if text in answers:
                assert answers[text] == ("light" if moving <= 3 else "moderate" if moving <= 9 else "heavy")
        if "side" in facts:
            half = {"left": "u", "right": "u", "top": "v", "bottom": "v"}[facts["side"]]
            at = [getattr(i, half) for i in sample.truth.items if i.kind == "car" and i.status == "inside"]
            low = sum(p < 0.5 for p in at)
            assert (low > len(at) - low) == (facts["side"] in ("left", "top"))


def test_labels_sum_up(many):
    for sample in many[::7]:
        labels = sample.labels(8)
        assert labels.shares.shape == (8, 8, len(CLASSES)) and labels.counts.shape == (8, 8, len(KINDS))
        assert np.allclose(labels.shares.sum(-1), 1, atol=1e-5)
        cars = sum(i.kind == "car" and 0 <= i.u < 1 and 0 <= i.v < 1 for i in sample.truth.items)
        assert labels.counts[..., KINDS.index("car")].sum() == cars
        for cls in SPECS:
            metres = math.fsum(sample.truth.road_lengths.get(cls, {}).values())
            here = 10 * float(labels.counts[..., KINDS.index(cls)].sum())
            assert abs(here - metres) <= 3 + 0.03 * metres, (sample.id, cls)
        met = sum(kind != "overpass" and kind != "interchange" for kind, _, _ in sample.truth.nodes)
        assert labels.counts[..., KINDS.index("junction")].sum() >= met


def test_splits_share_no_city():
    seeds = {city_seed(s, k, i) for s in SPLITS for k in range(4) for i in range(50)}
    assert len(seeds) == len(SPLITS) * 4 * 50


def test_written_rows(tmp_path):
    for split, kind in (("base", "base"), ("stage2", "traffic")):
        rows = json.loads(write_sample(tmp_path, split, 8, 1, "A", kind).read_text())
        assert sum("image" in r for r in rows) == 8
        for row in rows:
            turns = row["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert turns[0]["value"].startswith("<image>\n") == ("image" in row)
            assert sum(t["value"].count("<image>") for t in turns) == ("image" in row)
            if "image" in row:
                assert Image.open(tmp_path / row["image"]).mode == "RGB"
    first = (tmp_path / "base.json").read_bytes()
    assert write_sample(tmp_path / "again", "base", 8, 1, "A", "base").read_bytes() == first


def test_evaluation_is_balanced(tmp_path):
    for split, kind in (("eval_stage1", "eval_general"), ("eval_stage2", "eval_traffic")):
        rows = json.loads(write_sample(tmp_path, split, 24, 2, "B", kind).read_text())
        truths = json.loads((tmp_path / f"{split}_truth.json").read_text())
        answers: dict = {}
        for row in rows:
            assert (
                len(row["conversations"]) == 2 and row["truth"]["answer"] == row["conversations"][1]["value"]
            )
            assert row["id"].rsplit("-", 1)[0] in truths
            if row["truth"]["answer"] in ("yes", "no"):
                text = row["conversations"][0]["value"]
                answers.setdefault(text, Counter())[row["truth"]["answer"]] += 1
        assert answers and all(c["yes"] == c["no"] for c in answers.values())


def test_embedded_sample_is_made_once(tmp_path, monkeypatch):
    small = {"stage1": (2, "B", "general"), "eval_stage1": (3, "B", "eval_general")}
    monkeypatch.setattr(sample_module, "EMBEDDED", small)
    paths = ensure_sample(tmp_path)
    before = paths["stage1"].stat().st_mtime_ns
    assert ensure_sample(tmp_path) == paths and paths["stage1"].stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == [paths["stage1"].parent.name]
    # a cache that several users share: as open as any folder made in it
    (paths["stage1"].parent / "plain").mkdir()
    assert paths["stage1"].parent.stat().st_mode == (paths["stage1"].parent / "plain").stat().st_mode
    (paths["stage1"].parent / "stamp.json").write_text("{}")  # another version's: made again
    ensure_sample(tmp_path)
    assert json.loads((paths["stage1"].parent / "stamp.json").read_text()) != {}


def test_bad_names_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="split"):
        next(samples("nowhere", 0, 1, "A"))
    with pytest.raises(UserError, match="domain"):
        next(samples("base", 0, 1, "Z"))
    with pytest.raises(UserError, match="kind"):
        write_sample(tmp_path, "base", 1, 0, "A", "odd")
    with pytest.raises(UserError, match="style"):
        make_city(1, "baroque")


def test_tokenizer(tmp_path):
    from tokenizers import Tokenizer

    path = train_tokenizer(tmp_path / "one", num=12)
    assert train_tokenizer(tmp_path / "two", num=12).read_bytes() == path.read_bytes()
    tokenizer = Tokenizer.from_file(str(path))
    assert tokenizer.get_vocab_size() <= 1005
    ids = [tokenizer.token_to_id(name) for name in SPECIAL]
    assert None not in ids and len(set(ids)) == len(ids)
    text = "<|im_start|>user\n<image>\nHow many cars? 12, naïve – ok<|im_end|>\n"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert "12" not in encoded.tokens and tokenizer.token_to_id("<image>") in encoded.ids
