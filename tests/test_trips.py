"""Trips, their flow and their files: against other ways to compute them, and through the readers."""

import csv
import heapq
import json
import math

import numpy as np
import pytest

from mmrstraj_jax.construction.cleaning import Cleaning, clean
from mmrstraj_jax.construction.readers import read
from mmrstraj_jax.construction.trajectories import Report
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.synthcity import flow, gps, traces, traffic, trips
from mmrstraj_jax.synthcity.city import STYLES, make_city
from mmrstraj_jax.synthcity.network import network_of
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.sample import samples

READER = {"geolife": "geolife", "grab": "grab", "grab-parquet": "grab", "porto": "porto"}


@pytest.fixture(scope="module")
def day():
    return trips.plan(make_city(4), 400)


def test_a_plan_is_a_function_of_city_and_seed(day):
    again, other = trips.plan(make_city(4), 400), trips.plan(make_city(4), 400, seed=1)
    assert all(map(np.array_equal, day.edges, again.edges)) and all(
        map(np.array_equal, day.enter, again.enter)
    )
    assert not all(map(np.array_equal, day.edges, other.edges))


@pytest.mark.parametrize("style", STYLES)
def test_trips_drive_along_the_network(style):
    city = make_city(31, style)
    day = trips.plan(city, 120)
    network = network_of(city)
    assert len(day) == 120
    for edges, enter in zip(day.edges, day.enter, strict=True):
        assert (network.head[edges[:-1]] == network.tail[edges[1:]]).all()
        assert (np.diff(enter) > 0).all() and 0 <= enter[0] < 24 * 3600
        speed = network.length[edges] / np.diff(enter)
        assert speed.max() < 45 and speed.min() > 0.3
        # Nobody turns from a street onto the motorway but by a slip road
        motorway = np.array([r >= 0 and city.roads[r].cls == "motorway" for r in network.road[edges]])
        for k in np.flatnonzero(motorway[1:] != motorway[:-1]):
            joint = network.head[edges[k]]
            slip = network.road[edges[k]] < 0 or network.road[edges[k + 1]] < 0
            assert slip or city.nodes[network.node[joint]].kind != "overpass"


def quickest(network, cost, start, end):
    """Dijkstra with a heap, the other way to compute the cost of a route."""
    best, queue = {}, [(0.0, start)]
    leaving: dict = {}
    for edge, tail in enumerate(network.tail.tolist()):
        leaving.setdefault(tail, []).append(edge)
    while queue:
        now, at = heapq.heappop(queue)
        if at in best:
            continue
        best[at] = now
        for edge in leaving.get(at, ()):
            heapq.heappush(queue, (now + cost[edge], int(network.head[edge])))
    return best[end]


def test_routes_are_the_quickest():
    network = network_of(make_city(9))
    vertices = np.flatnonzero(network.connected)
    draw = np.random.default_rng(0)
    start, end = draw.choice(vertices, 25), draw.choice(vertices, 25)
    cost = network.seconds(8, draw.uniform(0, 900, len(network.road)))
    for a, b, path in zip(start, end, network.routes(cost, start, end), strict=True):
        assert math.isclose(cost[path].sum(), quickest(network, cost, a, b), abs_tol=1e-6)


def test_flow_and_speed_are_those_of_the_trips(day):
    hourly = flow.hourly(day)
    number, metres, seconds = {}, {}, {}
    for edges, enter in zip(day.edges, day.enter, strict=True):
        for edge, t0, t1 in zip(edges.tolist(), enter[:-1].tolist(), enter[1:].tolist(), strict=True):
            road = int(day.network.road[edge])
            if road >= 0:
                key = road, int(t0 / 3600) % 24
                number[key] = number.get(key, 0) + 1
                metres[key] = metres.get(key, 0.0) + day.city.roads[road].length
                seconds[key] = seconds.get(key, 0.0) + t1 - t0
    assert (hourly.flow > 0).sum() == len(number)
    for (road, hour), count in number.items():
        assert math.isclose(hourly.flow[road, hour], count * trips.DEMAND / 400)
        speed = 3.6 * metres[road, hour] / seconds[road, hour]
        assert math.isclose(hourly.speed[road, hour], speed, rel_tol=1e-9)
    assert np.isnan(hourly.speed[hourly.flow == 0]).all()


def test_traffic_follows_hour_and_class():
    city = make_city(6)
    hourly = flow.of_city(city)
    assert flow.of_city(city) is hourly
    total = hourly.flow.sum(0)
    assert total[8] > 2 * total[5] > 0 and total[17] > 2 * total[3]
    mean = {c: hourly.flow[[r.id for r in city.roads if r.cls == c]].mean() for c in ("arterial", "local")}
    assert mean["arterial"] > 5 * mean["local"]
    worst = hourly.bottlenecks(city.roads, 17)
    assert worst == sorted(worst, key=lambda pair: pair[1])
    assert len(worst) > len(hourly.bottlenecks(city.roads, 3))
    for road, share in worst:
        assert share < flow.BOTTLENECK and hourly.speed[road, 17] < flow.BOTTLENECK * hourly.free[road]


def test_a_window_sums_up_its_roads():
    city = make_city(6)
    hourly = flow.of_city(city)
    low, high = network_of(city).xy.min(0) - 1, network_of(city).xy.max(0) + 1
    whole = flow.of_window(city, (*low, *high))
    for hour in (3, 8, 17):
        driven = {r.id: hourly.flow[r.id, hour] * r.length / 1000 for r in city.roads}
        assert math.isclose(whole.vehicle_km[hour], sum(driven.values()), rel_tol=1e-9)
        spent = sum(km / hourly.speed[i, hour] for i, km in driven.items() if km)
        assert math.isclose(whole.speed[hour], sum(driven.values()) / spent, rel_tol=1e-9)
        assert whole.bottlenecks[hour] == tuple(i for i, _ in hourly.bottlenecks(city.roads, hour))
    middle = (low + high) / 2
    halves = [(*low, middle[0], high[1]), (middle[0], low[1], *high)]
    parts = sum(flow.of_window(city, half).vehicle_km for half in halves)
    assert np.allclose(parts, whole.vehicle_km, rtol=1e-9)
    nowhere = flow.of_window(city, (1e5, 1e5, 2e5, 2e5))
    assert nowhere.vehicle_km.sum() == 0 and np.isnan(nowhere.speed).all()
    busiest = max(city.roads, key=lambda r: hourly.flow[r.id].sum()).id
    assert hourly.flow[busiest, hourly.peak_hour(busiest)] == hourly.flow[busiest].max()


def test_answers_agree_with_the_flow():
    """Stated counts and speeds, and the hour's phase, recomputed from the city's trips."""
    asked = set()
    for sample in samples("eval_base", 6, 48, "A", "traffic"):
        window = sample.view.window
        facts = traffic.facts_of(sample.truth, sample.view)
        for q in traffic.questions(facts, Stream(5)):
            hourly = flow.of_city(window.city)
            if "counts" in q.facts:
                counts = q.facts["counts"]
                assert all(f"{h} o'clock {c} vehicles" in q.question for h, c in counts.items())
                assert counts[int(q.answer)] == max(counts.values())
                assert sum(c > max(counts.values()) - 10 for c in counts.values()) == 1
                for hour, count in counts.items():
                    assert count == round(hourly.flow[q.facts["road"], hour] / 12)
                asked.add("counts")
            if "speeds" in q.facts:
                assert q.facts["speeds"][q.answer] == min(q.facts["speeds"].values())
                asked.add("speeds")
        if "phase" in facts:
            inside = flow.lengths_inside(window.city.roads, window.bounds)
            driven = sum(hourly.flow[i] * metres for i, metres in inside.items())
            busy = driven[window.hour] / driven.max()
            assert busy >= 0.7 if facts["phase"] == "peak hour" else busy <= 0.5
            asked.add("phase")
    assert asked == {"counts", "speeds", "phase"}


# ---- receivers and files ----


def to_line(points, x, y):
    """Metres from a point to a polyline."""
    a, b = points[:-1], points[1:]
    along = ((np.array([x, y]) - a) * (b - a)).sum(1) / np.maximum(((b - a) ** 2).sum(1), 1e-12)
    return np.hypot(*(a + np.clip(along, 0, 1)[:, None] * (b - a) - [x, y]).T).min()


def test_every_defect_is_recorded_and_nothing_else_is_wrong(day):
    receiver = gps.Receiver(day, 0)
    seen = set()
    for trip in range(0, 400, 2):
        fixes = receiver.fixes(trip, 1.0)
        city, defects = day.city, fixes.defects
        seen |= set(defects)
        x, y = gps.to_degrees(city, fixes.true_xy)
        scale = math.radians(1) * 6378137
        off = np.hypot((fixes.lat - x) * scale, (fixes.lon - y) * scale * math.cos(math.radians(city.lat)))
        far = {i for name in ("wrong", "null", "poor", "drift") for i in defects.get(name, ())}
        good = np.array([i not in far for i in range(len(off))])
        assert off[good].max() < 25
        assert all(off[i] > 290 for name in ("wrong", "null") for i in defects.get(name, ()))
        assert all(fixes.accuracy[i] >= 60 for i in defects.get("poor", ()))
        assert fixes.accuracy[good].max() <= 12
        step = np.diff(fixes.time)
        assert {int(i) + 1 for i in np.flatnonzero(step == 0)} == set(defects.get("duplicate", ()))
        assert (step < 0).sum() == len(defects.get("reordered", ())) // 2
        assert {int(i) + 1 for i in np.flatnonzero(step > 30)} == set(defects.get("gap", ()))
        times, points = receiver.path(trip)
        assert (np.diff(times) >= 0).all()
        assert max(to_line(points, *p) for p in fixes.true_xy[::40]) < 1e-6
    assert seen == set(gps.DEFECTS)


@pytest.mark.parametrize("format", traces.FORMATS)
def test_the_readers_read_them_unchanged(tmp_path, format):
    if format == "grab-parquet":
        pytest.importorskip("pyarrow")
    path = traces.write(tmp_path, format, make_city(5), 45, seed=3)
    truth = {row["id"]: row for row in map(json.loads, (tmp_path / "truth.jsonl").open())}
    report = Report()
    found = {trip.id: trip for trip in read(path, READER[format], report)}
    lost = {i for i, row in truth.items() if format == "porto" and "gap" in row["defects"]}
    assert set(found) == set(truth) - lost
    assert set(report.trips) <= {"missing data"} and set(report.points) <= {"missing data"}
    start = traces.DAY.timestamp()
    for name, trip in found.items():
        row = truth[name]
        assert len(trip) == row["fixes"]
        assert abs(trip.time.min() - start - row["enter"][0]) < 2
        wild = {i for d in ("wrong", "null", "poor") for i in row["defects"].get(d, ())}
        calm = np.array([i not in wild for i in range(len(trip))])
        assert np.abs(trip.lat[calm] - 45).max() < 0.01 and np.abs(trip.lon[calm] - 8).max() < 0.015
    modes = {trip.mode for trip in found.values()}
    assert modes == {
        "geolife": {"car", "taxi", "bus", ""}, "grab": {"car", "motorcycle"}, "porto": {"taxi"},
    }[READER[format]]  # fmt: skip
    again = traces.write(tmp_path / "again", format, make_city(5), 45, seed=3)
    if path.suffix == ".csv":
        assert again.read_bytes() == path.read_bytes()


def test_cleaning_finds_the_recorded_defects(tmp_path):
    path = traces.write(tmp_path, "grab", make_city(7), 120, seed=1)
    truth = {row["id"]: row["defects"] for row in map(json.loads, (tmp_path / "truth.jsonl").open())}
    limits = Cleaning(min_points=2, min_length=0, min_duration=0, gap_seconds=30)
    report = Report()
    bad = caught = good = lost = 0
    for trip in read(path, "grab", Report()):
        kept = {(t, lat, lon) for part in clean(trip, limits, report) for t, lat, lon in
                zip(part.time, part.lat, part.lon, strict=True)}  # fmt: skip
        defects = truth[trip.id]
        wild = {i for name in ("wrong", "null", "poor", "duplicate") for i in defects.get(name, ())}
        drift = set(defects.get("drift", ()))
        for i in range(len(trip)):
            gone = (trip.time[i], trip.lat[i], trip.lon[i]) not in kept
            if i in wild:
                bad, caught = bad + 1, caught + gone
            elif i not in drift:
                good, lost = good + 1, lost + gone
    assert bad > 30 and caught / bad > 0.97
    # Stay points also take a few fixes of the slow arrival before a stay
    assert lost / good < 0.01
    assert report.points["drift"] + report.points["stay point"] > 0.9 * sum(
        len(d.get("drift", ())) for d in truth.values()
    )
    assert report.remarks["split at a gap"] == sum(len(d.get("gap", ())) for d in truth.values())
    assert report.remarks["reordered"] == sum(len(d.get("reordered", ())) // 2 for d in truth.values())


def test_speeds_in_the_file_are_those_of_vehicles(tmp_path):
    """Beside a gap too, where neighbours lie a minute apart; a doubled time stamp doubles one of them."""
    path = traces.write(tmp_path, "grab", make_city(7), 120, seed=1)
    found = {row["trj_id"]: [] for row in csv.DictReader(path.open())}
    for row in csv.DictReader(path.open()):
        found[row["trj_id"]].append(float(row["speed"]))
    truth = {row["id"]: row["defects"] for row in map(json.loads, (tmp_path / "truth.jsonl").open())}
    assert sum("gap" in defects for defects in truth.values()) > 5
    for name, speeds in found.items():
        assert max(speeds) < (2 if "duplicate" in truth[name] else 1) * 35 and max(speeds) > 1, name


def test_bad_arguments_are_user_errors(tmp_path):
    for arguments, word in (
        (("tdrive", make_city(1), 5), "format"),
        (("porto", make_city(1), 0), "trips"),
        (("porto", make_city(1), 5, -1), "--seed -1"),
    ):
        with pytest.raises(UserError, match=word):
            traces.write(tmp_path, *arguments)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        traces.write(tmp_path, "porto", make_city(1), 5)
    for words in (("--lat", "100"), ("--lat", "90"), ("--lon", "999"), ("--lat", "nan"), ("--city", "-1")):
        name = "seed" if words[0] == "--city" else words[0][2:]
        with pytest.raises(UserError, match=f"{name} {words[1]}.*lat -85 to 85, lon -180 to 180"):
            traces.main(["--format", "porto", "--out", str(tmp_path / "new"), "--trips", "1", *words])
    assert not (tmp_path / "new").exists()
