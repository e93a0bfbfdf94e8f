"""Readers on fixtures of the published schemas with their oddities; planted defects; sampling; anchors."""

import dataclasses
import json

import numpy as np
import pytest

from mmrstraj_jax.construction import geodesy, readers
from mmrstraj_jax.construction.cleaning import Cleaning, clean
from mmrstraj_jax.construction.trajectories import (
    Report,
    Stub,
    Trajectory,
    allocate,
    anchors,
    region_of,
    sample,
    stratum_of,
)
from mmrstraj_jax.errors import UserError

T0 = 1_224_730_384.0  # 2008-10-23 02:53:04 UTC
PLT = "Geolife trajectory\r\nWGS 84\r\nAltitude is in Feet\r\nReserved 3\r\n0,2,255,My Track,0,0,2,8\r\n0\r\n"


def read(path, format, **options):
    report = Report()
    return list(readers.read(path, format, report, **options)), report


def test_geolife_modes_and_oddities(tmp_path):
    folder = tmp_path / "Data" / "010" / "Trajectory"
    folder.mkdir(parents=True)
    rows = [
        f"39.98{i},116.31{i},0,{-777 if i else 492},39744.12,2008-10-23,02:53:{4 + i:02d}" for i in range(6)
    ]
    rows.insert(3, "39.98,116.31,0,492,39744.12,2008-10-23")  # cut off
    (folder / "20081023025304.plt").write_text(PLT + "\r\n".join(rows) + "\r\n", newline="")
    labels = (
        "Start Time\tEnd Time\tTransportation Mode\n2008/10/23 02:53:06\t2008/10/23 02:53:07\tbus\nbroken\n"
    )
    (tmp_path / "Data" / "010" / "labels.txt").write_text(labels)
    trips, report = read(tmp_path, "geolife")
    assert [(t.id, t.mode, len(t)) for t in trips] == [
        ("010/20081023025304#0", "", 2),
        ("010/20081023025304#1", "bus", 2),
        ("010/20081023025304#2", "", 2),
    ]
    assert trips[0].time.tolist() == [T0, T0 + 1] and trips[0].lat[1] == 39.981 and trips[0].user == "010"
    assert report.points == {"malformed row": 2} and "line 10" in report.first["malformed row"]
    (folder / "20081024025304.plt").write_text(
        PLT
    )  # the broken label stays one, however many traces it is for
    assert read(tmp_path, "geolife")[1].points == {"malformed row": 2}
    (folder / "x.plt").write_text("lat,lon\n")
    with pytest.raises(UserError, match="Geolife trajectory"):
        read(folder / "x.plt", "geolife")


def test_porto_quoted_polylines(tmp_path):
    header = "TRIP_ID,CALL_TYPE,ORIGIN_CALL,ORIGIN_STAND,TAXI_ID,TIMESTAMP,DAY_TYPE,MISSING_DATA,POLYLINE"
    long = json.dumps([[-8.6 - i * 1e-5, 41.1] for i in range(9000)])  # above csv's field limit
    rows = [
        '"T1","C","","","20000589","1372636858","A","False","[[-8.618643,41.141412],[-8.618499,41.141376]]"',
        '"T2","B","","7","20000589","1372637303","A","True","[[-8.6,41.1]]"',
        '"T3","B","","7","20000589","1372637303","A","False","[]"',
        '"T1","B","","7","20000320","1372637303","A","False","[[-8.6,41.1],[-8.6"',
        f'"T1","B","","7","20000320","1372637303","A","False","{long}"',
    ]
    path = tmp_path / "train.csv"
    path.write_text("\n".join([f'"{header}"'.replace(",", '","'), *rows]))
    trips, report = read(path, "porto")
    assert [(t.id, len(t)) for t in trips] == [("T1", 2), ("T1#6", 9000)]
    assert trips[0].time.tolist() == [1372636858, 1372636873] and trips[0].lon[0] == -8.618643
    assert report.trips == {"missing data": 2, "malformed row": 1}


def test_tdrive_local_times_grab_mixed_rows_and_columns(tmp_path):
    (tmp_path / "1.txt").write_text("1,2008-02-02 15:36:08,116.51172,39.92123\n1,2008-02-02,1\n")
    (trip,), report = read(tmp_path / "1.txt", "tdrive")
    assert trip.time[0] == 1201937768  # 07:36:08 UTC
    assert (trip.lon[0], trip.lat[0]) == (116.51172, 39.92123) and report.points["malformed row"] == 1
    grab = "trj_id,driving_mode,osname,pingtimestamp,rawlat,rawlng,speed,bearing,accuracy\n"
    (tmp_path / "part-0.csv").write_text(
        grab + "7,car,ios,1554943236,1.34,103.9,1,2,4\n8,motorcycle,ios,1554943236,-6.2,106.8,1,2,90\n"
        "7,car,ios,1554943235,1.35,103.9,1,2,4\n7,car,ios,soon,1.35,103.9,1,2,4\n7,car,ios\n"
    )
    trips, report = read(tmp_path / "part-0.csv", "grab")
    assert [(t.id, t.mode, len(t)) for t in trips] == [("7", "car", 2), ("8", "motorcycle", 1)]
    assert trips[0].accuracy.tolist() == [4, 4] and report.points["malformed row"] == 2
    with pytest.raises(UserError, match="no column pingtimestamp"):
        (tmp_path / "bad.csv").write_text("trj_id,driving_mode,rawlat,rawlng,accuracy\n")
        read(tmp_path / "bad.csv", "grab")


def test_parquet_or_a_clear_error(tmp_path):
    path = tmp_path / "p.parquet"
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        path.write_bytes(b"PAR1")
        with pytest.raises(UserError, match="pyarrow"):
            read(path, "grab")
        return
    row = {
        "trj_id": "7",
        "driving_mode": "car",
        "pingtimestamp": 5,
        "rawlat": 1.0,
        "rawlng": 2.0,
        "accuracy": 3.0,
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    (trip,), _ = read(path, "grab")
    assert (trip.id, trip.time[0], trip.lat[0]) == ("7", 5, 1.0)


def test_gotrack_gpx_worldtrace_and_generic(tmp_path):
    (tmp_path / "go_track_tracks.csv").write_text(
        '"id","id_android","car_or_bus"\n"1","0","1"\n"2","1","2"\n'
    )
    points = '"id","latitude","longitude","track_id","time"\n"1","-10.9","-37.0","1","2014-09-13 07:24:32"\n'
    (tmp_path / "go_track_trackspoints.csv").write_text(
        points + '"2","-10.9","-37.1","2","2014-09-13 07:24:37"\n'
    )
    trips, _ = read(tmp_path, "gotrack")
    assert [(t.id, t.mode, t.user) for t in trips] == [("1", "car", "0"), ("2", "bus", "1")]
    assert trips[0].time[0] == 1410603872  # 10:24:32 UTC

    gpx = (
        '<gpx version="1.1" xmlns="http://www.topografix.com/GPX/1/1"><trk><type>bike</type><trkseg>'
        '<trkpt lat="1" lon="2"><time>2020-01-01T00:00:00Z</time></trkpt><trkpt lat="1" lon="2"/></trkseg>'
        '<trkseg><trkpt lat="3" lon="4"><time>2020-01-01T01:00:00+01:00</time></trkpt></trkseg></trk></gpx>'
    )
    (tmp_path / "a.gpx").write_text(gpx)
    trips, report = read(tmp_path / "a.gpx", "gpx")
    assert [(t.id, t.mode, t.time.tolist()) for t in trips] == [
        ("a/0", "bike", [1577836800]),
        ("a/1", "bike", [1577836800]),
    ]
    assert report.points == {"no time": 1}
    bomb = '<!DOCTYPE gpx [<!ENTITY a "aaaa">]><gpx>&a;</gpx>'
    (tmp_path / "b.gpx").write_text(bomb)
    with pytest.raises(UserError, match="document type"):
        read(tmp_path / "b.gpx", "gpx")

    (tmp_path / "w.csv").write_text(
        "time,latitude,longitude,altitude,osm_way_id\n2022-01-01 00:00:01,1,2,3,4\n"
    )
    (trip,), _ = read(tmp_path / "w.csv", "worldtrace")
    assert (trip.id, trip.time[0]) == ("w", 1640995201)

    (tmp_path / "g.csv").write_text("\ufeffwhen;x\n".replace(";", ",") + "1,2\n")
    with pytest.raises(UserError, match="no column y"):
        read(tmp_path / "g.csv", "csv", columns={"time": "when", "lat": "y", "lon": "x"})
    with pytest.raises(UserError, match="lat"):
        read(tmp_path / "g.csv", "csv", columns={"time": "when"})
    (tmp_path / "g.csv").write_text("when,x,y,who\n1640995201000,2,1,me\n")  # milliseconds
    (trip,), _ = read(
        tmp_path / "g.csv", "csv", columns={"time": "when", "lat": "y", "lon": "x", "user": "who"}
    )
    assert (trip.time[0], trip.user, trip.id, trip.line) == (1640995201, "me", "g", 2)
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "absent", "csv")
    with pytest.raises(UserError, match="expected one of"):
        read(tmp_path, "kml")


def test_ids_of_several_files_stay_apart_and_the_datum_moves(tmp_path):
    for part in ("a", "b"):
        (tmp_path / f"{part}.csv").write_text("id,time,lat,lon\n1,0,39.9,116.4\n")
    trips, _ = read(tmp_path, "csv")
    assert [trip.id for trip in trips] == ["a/1", "b/1"]
    (moved, _), _ = read(tmp_path, "csv", datum="gcj02")
    assert 300 < geodesy.distance(moved.lat, moved.lon, trips[0].lat, trips[0].lon)[0] < 700
    (late, _), _ = read(tmp_path, "csv", utc_offset=8)
    assert late.time[0] == 0  # epoch seconds have no zone


def test_gcj02_offset_inverts():
    lat, lon = np.array([39.9, 31.2, 22.5]), np.array([116.4, 121.5, 114.1])
    moved = geodesy.wgs84_to_gcj02(lat, lon)
    offset = geodesy.distance(lat, lon, *moved)
    assert ((offset > 100) & (offset < 800)).all()
    # Beijing's offset is well known: 6e-3 degrees to the east, 1.4e-3 to the north
    assert abs(moved[0][0] - 39.9) < 2e-3 and 5e-3 < moved[1][0] - 116.4 < 7e-3
    assert geodesy.distance(lat, lon, *geodesy.gcj02_to_wgs84(*moved)).max() < 1e-3


def test_gcj02_is_that_of_the_published_implementations():
    # a pair of the JavaScript package coordtransform
    lat, lon = geodesy.wgs84_to_gcj02(39.915, 116.404)
    assert (lat, lon) == (pytest.approx(39.91640428150164), pytest.approx(116.41024449916938))
    # outside China's box nothing moves: Los Angeles, Jakarta, Tokyo, and a mixed array
    lats, lons = np.array([34.05, -6.2, 35.7, 39.9]), np.array([-118.2, 106.8, 139.7, 116.4])
    for change in (geodesy.wgs84_to_gcj02, geodesy.gcj02_to_wgs84):
        moved = geodesy.distance(lats, lons, *change(lats, lons))
        assert moved[:3].tolist() == [0, 0, 0] and 300 < moved[3] < 700


# ---- cleaning ----


def drive(n=200, speed=10.0, lat=1.3, lon=103.8):
    """A straight drive to the east, a fix every second."""
    metres = np.arange(n) * speed
    return Trajectory(
        "t", T0 + np.arange(n), np.full(n, lat), lon + metres / (111_195 * np.cos(np.radians(lat)))
    )


def run(trip, **limits):
    report = Report()
    parts = clean(trip, Cleaning(**limits), report)
    assert report.points_in == report.points_out + sum(report.points.values())
    return parts, report


def test_a_clean_trip_stays_as_it_is():
    (part,), report = run(drive())
    assert len(part) == 200 and not report.points and not report.remarks


@pytest.mark.parametrize(
    ("plant", "reason", "count"),
    [
        (lambda t: (t.lat.__setitem__(5, 91), t.lon.__setitem__(6, np.nan)), "invalid position", 2),
        (lambda t: (t.lat.__setitem__(5, 0), t.lon.__setitem__(5, 0)), "invalid position", 1),
        (lambda t: t.time.__setitem__(7, t.time[6]), "duplicate timestamp", 1),
        (lambda t: t.lat.__setitem__(9, 2.0), "impossible speed", 1),
        (lambda t: t.lat.__setitem__(slice(0, 2), 2.0), "impossible speed", 2),  # the first fixes are wrong
        (lambda t: t.lat.__setitem__(199, 2.0), "impossible speed", 1),
        (lambda t: t.lat.__setitem__(50, 1.3 + 45 / 111_195), "spike", 1),
        # the fix between two bad ones is good
        (lambda t: t.lat.__setitem__([50, 52], 2.0), "impossible speed", 2),
        (lambda t: t.lat.__setitem__([50, 52], 1.3 + 45 / 111_195), "spike", 2),
    ],
)
def test_planted_defects_are_caught_and_counted(plant, reason, count):
    trip = drive()
    plant(trip)
    (part,), report = run(trip)
    assert report.points == {reason: count} and len(part) == 200 - count


def test_accuracy_box_order_and_gaps():
    trip = dataclasses.replace(drive(), accuracy=np.where(np.arange(200) == 3, 80.0, 5.0))
    assert run(trip)[1].points == {"poor accuracy": 1}
    shuffled = drive().take(np.r_[0:50, 60:200, 50:60])
    (part,), report = run(shuffled)
    assert (np.diff(part.time) == 1).all() and report.remarks == {"reordered": 1}
    _, report = run(drive(), box=(103.8, 1.0, 103.81, 2.0))
    assert set(report.points) == {"outside the box"}
    assert len(run(drive(), box=(-180.0, 0.0, 180.0, 90.0))[0][0]) == 200  # the northern half of the Earth
    trip = drive()
    trip.time[100:] += 400
    parts, report = run(trip)
    assert [(p.id, len(p)) for p in parts] == [("t~0", 100), ("t~1", 100)]
    assert report.remarks == {"split at a gap": 1}
    trip = drive()
    trip.lat[100:] += 0.005  # 556 m in a second, and it stays there
    parts, report = run(trip)
    assert len(parts) == 2 and report.remarks == {"split at an impossible speed": 1}


def test_stays_drift_and_scraps():
    still = drive(700)
    still.lon[300:] -= still.lon[300] - still.lon[299]
    still.lon[300:700] = still.lon[299]
    (part,), report = run(still)
    assert set(report.points) == {"stay point"} and 390 <= report.points["stay point"] <= 410
    assert part.time[-1] == still.time[-1]
    noise = np.random.default_rng(0).normal(0, 4e-5, (2, 400))
    still.lat[300:] += noise[0]
    still.lon[300:] += noise[1]
    _, report = run(still)
    assert report.points["drift"] > 350 and not report.points["stay point"]
    for trip, reason in (
        (drive(9), "too few points"),
        (drive(40), "too short"),
        (drive(50, 20.0), "too brief"),
        (drive(0), "too few points"),
        (drive(1), "too few points"),
    ):
        parts, report = run(trip)
        assert not parts and (not len(trip) or report.trips == {reason: 1})


def test_cleaning_survives_pure_noise():
    rng = np.random.default_rng(1)
    for n in (0, 1, 2, 3, 60):
        trip = Trajectory(
            "n", rng.integers(0, 50, n) * 1.0, rng.uniform(-95, 95, n), rng.uniform(-190, 190, n)
        )
        run(trip)


# ---- sampling and anchors ----


def test_sample_is_stratified_seeded_and_independent_of_order():
    stubs = [
        Stub(f"{r}{i}", r, "car" if i % 10 else "bus") for r, n in (("A", 500), ("B", 40)) for i in range(n)
    ]
    chosen = sample(stubs, 100, seed=3)
    assert chosen == sample(stubs[::-1], 100, seed=3) and chosen != sample(stubs, 100, seed=4)
    assert len(chosen) == 100 == len(set(chosen))
    assert sum(c.startswith("B") for c in chosen) == 40  # what B lacks, A gives
    assert sum(not int(c[1:]) % 10 for c in chosen if c[0] == "A") == 30
    assert sum(c[0] == "A" for c in sample(stubs, 54, 0, equal=False)) == 50
    assert sum(c[0] == "B" for c in sample(stubs, 0, 0, quotas={"A": 5, "B": 7})) == 7
    with pytest.raises(UserError, match="41 trips asked for, 40 available"):
        sample(stubs, 0, 0, quotas={"B": 41})
    with pytest.raises(UserError, match="used twice"):
        sample([stubs[0], stubs[0]], 1, 0)


def test_allocate_never_exceeds_and_always_sums():
    rng = np.random.default_rng(0)
    for _ in range(200):
        have = {str(i): int(n) for i, n in enumerate(rng.integers(0, 20, rng.integers(1, 6)))}
        total = int(rng.integers(0, 70))
        for equal in (True, False):
            shares = allocate(have, total, equal)
            assert sum(shares.values()) == min(total, sum(have.values()))
            assert all(0 <= shares[name] <= have[name] for name in have)


def test_regions_and_strata():
    assert region_of(drive()) == "Singapore" and region_of(drive(lat=50.0)) == ""
    across = Trajectory("x", np.zeros(1), np.zeros(1), np.array([-179.9]))
    assert region_of(across, {"Fiji": (177.0, -20.0, -178.0, 1.0)}) == "Fiji"
    assert stratum_of(drive(100)) == "unknown/short" and stratum_of(drive(1500)).endswith("long")


def test_anchors_are_fixes_of_the_trip():
    n = 181
    angle = np.radians(np.arange(n))
    bend = Trajectory("u", np.arange(n) * 1.0, 1.3 + 0.01 * np.sin(angle), 103.8 + 0.01 * np.cos(angle))
    (centroid,) = anchors(bend, "centroid")
    assert centroid.lat == bend.lat[centroid.index] and abs(centroid.index - 90) < 3
    assert anchors(bend, "origin")[0].index == 0 and anchors(bend, "destination")[0].index == n - 1
    along = anchors(bend, "along", step=500)
    gaps = [geodesy.distance(a.lat, a.lon, b.lat, b.lon) for a, b in zip(along, along[1:], strict=False)]
    assert along[0].index == 0 and len(along) == 7 and 450 < min(gaps) and max(gaps) < 550
    line = drive(300)
    (medoid,) = anchors(line, "medoid")
    assert medoid.index in (149, 150)
    crowded = line.take(np.r_[0:200, np.full(100, 180), 200:300])
    assert abs(anchors(crowded, "densest", side=100)[0].lon - line.lon[180]) < 1e-3
    with pytest.raises(UserError, match="expected one of"):
        anchors(line, "middle")
    with pytest.raises(UserError, match="no fixes"):
        anchors(drive(0), "origin")


def test_anchors_and_distances_cross_the_antimeridian():
    lon = geodesy.wrap(179.95 + np.arange(101) * 0.001)
    trip = Trajectory("f", np.arange(101) * 10.0, np.full(101, -17.0), lon)
    assert anchors(trip, "centroid")[0].index == 50 == anchors(trip, "medoid")[0].index
    assert abs(trip.length - 0.1 * 111_195 * np.cos(np.radians(17))) < 1


def test_motorcycles_have_their_own_limit_of_speed():
    trip = dataclasses.replace(drive(), mode="motorcycle")
    trip.lat[50] += 39 / 111_195  # 40 m/s there and back
    assert run(trip, spike_speed=99)[1].points == {"impossible speed": 1}
    assert not run(dataclasses.replace(trip, mode="car"), spike_speed=99)[1].points
    assert not run(trip, spike_speed=99, max_motorcycle_speed=50)[1].points


def test_fixes_beyond_the_map_are_dropped():
    trip = drive(lat=85.0505)
    trip.lat[150:] = 85.052
    (part,), report = run(trip)
    assert report.points == {"off the map": 50} and len(part) == 150
