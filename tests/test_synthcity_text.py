"""Every count, position and direction in captions and answers agrees with the world.

The sentences are read back with regular expressions and compared with the city's things, roads and junctions
themselves, by pixel coordinates: neither truth.py nor the facts that questions carry are used.
"""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest

from mmrstraj_jax.synthcity.blocks import content
from mmrstraj_jax.synthcity.canvas import CLASSES
from mmrstraj_jax.synthcity.captions import caption
from mmrstraj_jax.synthcity.questions import Balancer
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.sample import general_questions, samples
from mmrstraj_jax.synthcity.vehicles import on_road

KIND_OF = {
    "car": "car", "house": "house", "swimming pool": "pool", "storage tank": "tank", "ship": "ship",
    "tree": "tree", "sports field": "field", "apartment building": "apartment", "warehouse": "warehouse",
    "commercial building": "shop", "airplane": "airplane", "hangar": "hangar",
    "terminal building": "terminal", "building": "building", "parked car": "parked car",
}  # fmt: skip
KIND_OF |= {f"{name}s": kind for name, kind in KIND_OF.items()}
HOUSES = ("house", "apartment", "shop", "warehouse", "hangar", "terminal")
WORDS = "no one two three four five six seven eight nine ten eleven twelve".split()
COLORS = "red brown gray blue white black yellow"
PLACE = re.compile(
    r"The (.+?) is (?:in|on|at) the ([\w ]+?) of the image(?:, and the (.+) is (?:in|on|at) the ([\w ]+))?"
)
ROAD = re.compile(
    r"A (motorway|wide road|road|small road) (?:runs (\S+)|passes through)(?:, with an? (\w+))?"
)
COLOR = re.compile(
    r"What (?:is the )?color (?:is|of) the (?:roof of the )?(.+?)(?: in the (.+) part of the image)?\?"
)
PART = re.compile(r"How many (.+) are in the (.+) (part|half) of the image\?")
ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")


class World:
    """What the window shows, from the whole city: no index, no margin rule, no truth."""

    def __init__(self, sample):
        window = sample.view.window
        self.w, self.h = window.pixels
        self.gsd, self.x, self.y, self.city = window.gsd, window.x, window.y, window.city
        things = [t for block in self.city.blocks for t in content(self.city, block).things]
        reach = 300.0
        for road in self.city.roads:
            if any(math.dist(p, (self.x, self.y)) < reach for p in road.points):
                things += on_road(self.city, road, window.hour)
        self.things = [t for t in things if self.overlaps(t)]
        self.classes = Counter(CLASSES[k] for k in sample.classes.ravel())
        self.gray = bool((np.ptp(sample.image.astype(int), axis=2) == 0).all())
        self.roads = self.walk()

    def pixel(self, x, y):
        return self.w / 2 + (x - self.x) / self.gsd, self.h / 2 - (y - self.y) / self.gsd

    def holds(self, x, y):
        u, v = self.pixel(x, y)
        return 0 <= u < self.w and 0 <= v < self.h

    def overlaps(self, t):
        if math.dist((t.x, t.y), (self.x, self.y)) > 150 + t.length:
            return False
        cos, sin = math.cos(t.angle), math.sin(t.angle)
        a, b = np.meshgrid(np.linspace(-0.5, 0.5, 9) * t.length, np.linspace(-0.5, 0.5, 9) * t.width)
        u, v = self.pixel(t.x + cos * a - sin * b, t.y + sin * a + cos * b)
        return bool(((u >= 0) & (u < self.w) & (v >= 0) & (v < self.h)).any())

    def of(self, kind, color=None):
        """Things of a kind of which anything is in the image."""
        kinds = HOUSES if kind == "building" else (kind.removeprefix("parked "),)
        parked = kind.startswith("parked ")
        return [
            t
            for t in self.things
            if t.kind in kinds and (not color or t.color == color) and (not parked or t.tag == "parked")
        ]

    def count(self, kind, color=None):
        return sum(self.holds(t.x, t.y) for t in self.of(kind, color))

    def only(self, name):
        """The one thing that a name such as "red car" or "house with the blue roof" fits."""
        color, roof = None, re.fullmatch(r"house with the (\w+) roof", name)
        if roof:
            name, color = "house", roof[1]
        elif name.split(" ")[0] in COLORS.split():
            color, name = name.split(" ", 1)
        (thing,) = self.of(KIND_OF[name], color)
        return thing

    def cell(self, t):
        u, v = self.pixel(t.x, t.y)
        name = f"{ROWS[int(3 * v // self.h)]} {COLUMNS[int(3 * u // self.w)]}".strip()
        return name or "center"

    def walk(self):
        """Metres of centre line in the image, by class, with the angles (degrees) walked."""
        found: dict[str, list] = {}
        for road in self.city.roads:
            for (ax, ay), (bx, by) in itertools.pairwise(road.points):
                angle = math.degrees(math.atan2(by - ay, bx - ax)) % 180
                long = math.dist((ax, ay), (bx, by))
                t = (np.arange(80) + 0.5) / 80
                u, v = self.pixel(ax + (bx - ax) * t, ay + (by - ay) * t)
                seen = ((u >= 0) & (u < self.w) & (v >= 0) & (v < self.h)).mean() * long
                if seen:
                    found.setdefault(road.cls, []).append((angle, seen))
        return found

    def check_direction(self, name, cls=None):
        order = ("motorway", "arterial", "collector", "local")
        main = next(c for c in order if sum(m for _, m in self.roads.get(c, ())) > 38)
        assert cls in (None, main)
        axes = {"east-west": (0, 180), "north-south": (90,), "diagonal": (45, 135)}[name]
        total = sum(m for _, m in self.roads[main])
        along = sum(m for a, m in self.roads[main] if min(abs(a - x) for x in axes) < 22)
        assert along > 0.8 * total, (name, self.roads[main])

    def nodes(self, kind):
        return sum(n.kind == kind and self.holds(n.x, n.y) for n in self.city.nodes)


def number(word):
    return WORDS.index(word.lower()) if word.lower() in WORDS else int(word)


def check_list(world, text, tally):
    """ "two houses with red roofs, one ship and several cars" """
    for part in re.split(r", | and ", text):
        part, least = re.subn(r"^[Aa]t least ", "", part)
        count, rest = part.split(" ", 1)
        match = re.fullmatch(r"(.+?)(?: with (?:a )?(\w+) roofs?)?", rest)
        kind, real = KIND_OF[match[1]], world.count(KIND_OF[match[1]])
        if count.lower() == "several":
            assert real >= 2, part
        elif least:
            assert real >= number(count), part
        else:
            assert real == number(count), part
        if match[2]:
            assert {t.color for t in world.of(kind) if world.holds(t.x, t.y)} == {match[2]}, part
        tally["count"] += 1


def check_caption(world, text, tally):
    assert ("panchromatic" in text) == world.gray
    for sentence in re.split(r"(?<=\.) ", text)[1:]:
        s = sentence.rstrip(".")
        if m := re.fullmatch(r"There (?:is|are) (.+)|(.+) can be seen", s):
            if s != "There is no road in the image":
                check_list(world, m[1] or m[2], tally)
            else:
                assert not world.roads
        elif m := PLACE.fullmatch(s):
            for name, cell in ((m[1], m[2]), (m[3], m[4])):
                if name:
                    assert world.cell(world.only(name)) == cell, sentence
                    tally["position"] += 1
        elif m := ROAD.fullmatch(s):
            cls = {"wide road": "arterial", "road": "collector", "small road": "local"}.get(m[1], m[1])
            if m[2]:
                world.check_direction(m[2].removesuffix("ly"), cls)
                tally["direction"] += 1
            if m[3]:
                assert world.nodes(m[3]) == 1
                tally["count"] += 1
        elif m := re.fullmatch(r"(\w+) cars? (?:is|are) in the image(?:: (.+))?", s):
            assert m[1] == "Many" and world.count("car") > 9 or world.count("car") == number(m[1]), sentence
            for part in re.split(r", | and ", m[2]) if m[2] else ():
                amount, color = part.split(" ")
                assert world.count("car", color) == number(amount), sentence
            tally["count"] += 1
        elif m := re.fullmatch(r"(\w+) trees? grows? here", s):
            assert m[1] == "Many" and world.count("tree") > 9 or world.count("tree") == number(m[1]), sentence
            tally["count"] += 1
        elif s == "No car is in sight":
            assert not world.of("car")
        elif s == "A bridge crosses the water":
            assert world.classes["water"] and any(r.bridge for r in world.city.roads)
        else:
            assert re.fullmatch(r"The area is \w+ built up|The image is taken from above", s), sentence


def check_side(world, one, two, side):
    a, b = (world.pixel(t.x, t.y) for t in (world.only(one), world.only(two)))
    angle = math.degrees(math.atan2((b[1] - a[1]) / world.h, (a[0] - b[0]) / world.w)) % 360
    names = ("right", "top right", "above", "top left", "left", "bottom left", "below", "bottom right")
    away = abs((angle - 45 * names.index(side) + 180) % 360 - 180)
    assert away < 22.5, (one, two, side, angle)


def check_answer(world, q, tally):
    """Checks a question of a type that a rule below covers; every count, position and direction is."""
    text, answer = q.question, q.answer
    if q.type == "quantity":
        name = re.search(r"(?:How many|number of) (.+?)(?: are there| can be seen|\?)", text)[1]
        assert world.count(KIND_OF[name]) == int(answer), text
        tally["count"] += 1
    elif q.type == "ab_position":
        name = re.search(r".*(?:is|of) the (.+?)(?: in the image)?\?$", text)[1]
        assert world.cell(world.only(name)) == answer, text
        tally["position"] += 1
    elif q.type == "re_position":
        one, two = re.search(r".*(?:is|of) the (.+?) relative to the (.+)\?", text).groups()
        check_side(world, one, two, answer)
        tally["direction"] += 1
    elif q.type == "road_ori":
        world.check_direction(answer)
        tally["direction"] += 1
    elif q.type == "presence":
        name = re.search(r"(?:any|an?|contain) (.+?)(?: in the image)?\?", text)[1]
        if name in KIND_OF:
            there = world.count(KIND_OF[name]) > 0
            assert (answer == "yes") == there, text
            assert there or not world.of(KIND_OF[name]), text
            tally["presence"] += 1
        elif name.rstrip("s") == "roundabout":
            assert (answer == "yes") == (world.nodes("roundabout") > 0), text
    elif q.type == "color" and (m := COLOR.fullmatch(text)):
        seen = world.of(KIND_OF[m[1]])
        here = [t for t in seen if world.holds(t.x, t.y) and (not m[2] or world.cell(t) == m[2])]
        assert [t.color for t in here] == [answer], text
        tally["color"] += 1
    elif q.type == "area_comp":
        cls = {"buildings": "building", "roads": "road", "trees": "tree"}
        m = re.search(r"area, (\w+) or (\w+)\?|area of (\w+) larger than that of (\w+)\?", text)
        one, two = (world.classes[cls.get(n, n)] for n in (m[1] or m[3], m[2] or m[4]))
        assert answer in ("yes", m[1]) if one > two else answer in ("no", m[2]), text
        tally["area"] += 1
    elif "live" in text:
        homes = world.of("house") + world.of("apartment")
        assert sum(world.holds(t.x, t.y) for t in homes) >= 2 if answer == "yes" else not homes, text
    elif text == "Do ships moor here?":
        assert (answer == "yes") == bool(world.of("ship")), text
    elif q.type == "image":
        assert answer == ("panchromatic" if world.gray else "color")
    elif q.type == "cell" and (m := PART.fullmatch(text)):
        items = [t for t in world.of(KIND_OF[m[1]]) if world.holds(t.x, t.y)]
        if m[3] == "part":
            real = sum(world.cell(t) == m[2] for t in items)
        else:
            axis, low = (0 if m[2] in ("left", "right") else 1), m[2] in ("left", "top")
            middle = (world.w, world.h)[axis] / 2
            real = sum((world.pixel(t.x, t.y)[axis] < middle) == low for t in items)
        assert real == int(answer), text
        tally["count"] += 1


@pytest.mark.parametrize(("domain", "kind"), [("A", "general"), ("B", "traffic")])
def test_texts_agree_with_the_world(domain, kind):
    tally, texts = Counter(), 0
    for k, sample in enumerate(samples("eval_base", 17, 50, domain, kind)):
        world, s = World(sample), Stream(31, k)
        for _ in range(3):
            text = caption(sample.truth, s)
            check_caption(world, text, tally)
            texts += 1
        for q in general_questions(sample.truth, s, Balancer(), 60, with_drills=True):
            check_answer(world, q, tally)
            texts += 1
    assert texts > 1000 and tally["count"] > 150 and tally["position"] > 60 and tally["direction"] > 40, tally
