"""Folders of trip files as they come: equal names, parts that share trips, damaged and odd files."""

import gzip

import pytest

from mmrstraj_jax.construction import readers
from mmrstraj_jax.construction.trajectories import Report
from mmrstraj_jax.errors import UserError

PLT = "Geolife trajectory\r\nWGS 84\r\nAltitude is in Feet\r\nReserved 3\r\n0,2,255,My Track,0,0,2,8\r\n0\r\n"


def read(path, format, **options):
    report = Report()
    return list(readers.read(path, format, report, **options)), report


def test_equal_names_in_several_folders_stay_apart(tmp_path):
    gpx = (
        '<gpx version="1.1" xmlns="http://www.topografix.com/GPX/1/1"><trk><trkseg>'
        '<trkpt lat="1" lon="2"><time>2020-01-01T00:00:00Z</time></trkpt></trkseg></trk></gpx>'
    )
    bodies = {
        "gpx": ("gpx", gpx),
        "worldtrace": ("csv", "time,latitude,longitude\n0,1,2\n"),
        "csv": ("csv", "id,time,lat,lon\n7,0,1,2\n"),
        "tdrive": ("txt", "7,2008-02-02 15:36:08,116.5,39.9\n"),
    }
    found = {}
    for format, (suffix, body) in bodies.items():
        for place in ("a/track", "b/track", "b/single"):
            path = tmp_path / format / f"{place}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body.replace("7", "8") if format == "tdrive" and "single" in place else body)
        found[format] = [trip.id for trip in read(tmp_path / format, format)[0]]
    # in the order of the files; what is alone of its name keeps the id it always had
    assert found == {
        "gpx": ["a/track/0", "single/0", "b/track/0"],
        "worldtrace": ["a/track", "single", "b/track"],
        "csv": ["a/track/7", "single/7", "b/track/7"],
        "tdrive": ["a/track/7", "8", "b/track/7"],
    }


GRAB = "trj_id,driving_mode,pingtimestamp,rawlat,rawlng,accuracy\n"


def test_a_grab_trip_spread_over_parts_is_one(tmp_path):
    for city, lat in (("jakarta", -6.2), ("singapore", 1.3)):
        for part in range(3):
            rows = [f"{id},car,{10 * at + part},{lat},103.9,4\n" for id in (7, 8) for at in range(4)]
            (tmp_path / city).mkdir(exist_ok=True)
            (tmp_path / city / f"part-{part}.csv").write_text(GRAB + "".join(rows[: 8 if part < 2 else 4]))
    trips, _ = read(tmp_path / "jakarta", "grab")
    assert [(trip.id, len(trip)) for trip in trips] == [("7", 12), ("8", 8)]
    assert trips[0].source.endswith("part-0.csv") and set(trips[0].time) == {
        10 * at + part for at in range(4) for part in range(3)
    }
    trips, _ = read(tmp_path, "grab")  # the ids of another city are other trips
    assert [trip.id for trip in trips] == ["jakarta/7", "jakarta/8", "singapore/7", "singapore/8"]


def test_a_damaged_parquet_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {name: [1.0] * 50_000 for name in readers.GRAB_COLUMNS.values()}
    columns["trj_id"] = [str(number) for number in range(50_000)]
    path = tmp_path / "part.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    whole = path.read_bytes()
    middle = len(whole) // 3
    for body in (b"", b"PAR1", whole[:-100], whole[:middle] + bytes(9000) + whole[middle + 9000 :]):
        path.write_bytes(body)
        with pytest.raises(UserError, match="part.parquet: damaged or no parquet") as caught:
            read(path, "grab")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["[1,2,3,4]", "[[1,2,3,4]]", "[[[1,2]],[[3,4]]]", "5", "[[]]"])
def test_porto_lines_that_are_no_positions_are_malformed(tmp_path, line):
    path = tmp_path / "train.csv"
    head = "TRIP_ID,TAXI_ID,TIMESTAMP,MISSING_DATA,POLYLINE\n"
    path.write_text(head + f'T1,2,1372636858,False,"{line}"\nT2,2,1372636858,False,"[[1,2],[3,4]]"\n')
    trips, report = read(path, "porto")
    assert [trip.id for trip in trips] == ["T2"] and report.trips == {"malformed row": 1}


def test_the_outer_geolife_label_applies_again_behind_an_inner_one(tmp_path):
    folder = tmp_path / "010" / "Trajectory"
    folder.mkdir(parents=True)
    rows = [f"39.98,116.31,0,492,39744.12,2008-10-23,02:53:{at:02d}" for at in range(10)]
    (folder / "A.PLT").write_text(PLT + "\r\n".join(rows) + "\r\n", newline="")  # in capitals, too
    spans = [("02:53:01", "02:53:08", "walk"), ("02:53:03", "02:53:04", "bus")]
    labels = [f"2008/10/23 {a}\t2008/10/23 {b}\t{mode}\n" for a, b, mode in spans]
    (tmp_path / "010" / "labels.txt").write_text("Start Time\tEnd Time\tMode\n" + "".join(labels))
    trips, _ = read(tmp_path, "geolife")
    assert [(trip.mode, len(trip)) for trip in trips] == [
        ("", 1),
        ("walk", 2),
        ("bus", 2),
        ("walk", 4),
        ("", 1),
    ]


def test_gotrack_points_of_another_name_are_refused(tmp_path):
    (tmp_path / "points.csv").write_text("id,latitude,longitude,track_id,time\n")
    with pytest.raises(UserError, match="points.csv: expected the name go_track_trackspoints.csv"):
        read(tmp_path / "points.csv", "gotrack")


def test_the_same_id_in_several_parts_is_several_trips(tmp_path):
    head = "TRIP_ID,TAXI_ID,TIMESTAMP,MISSING_DATA,POLYLINE\n"
    bodies = {
        "porto": [head + f'T{n},2,1372636858,False,"[[1,2],[3,4]]"\n' for n in (1, 1, 2)],
        "tdrive": [f"{n},2008-02-02 15:36:08,116.5,39.9\n" for n in ("T1", "T1", "T2")],
    }
    for format, parts in bodies.items():
        for name, body in zip("abc", parts, strict=True):
            path = tmp_path / format / f"{name}.{'csv' if format == 'porto' else 'txt'}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(body)
        trips, _ = read(tmp_path / format, format)
        assert [trip.id for trip in trips] == ["T1", "b/T1", "T2"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (gzip.compress(b"id,time,lat,lon\n1,0,1,2\n"), "packed with gzip; unpack it first"),
        (b"PK\x03\x04" + bytes(30), "packed with zip; unpack it first"),
        ("id,time,lat,lon\n1,0,1,2\n".encode("utf-16"), "UTF-16; save it again as UTF-8"),
    ],
    ids=["gzip", "zip", "utf-16"],
)
@pytest.mark.parametrize("format", ["csv", "porto", "tdrive", "geolife"])
def test_a_packed_file_is_called_that(tmp_path, body, message, format):
    (tmp_path / "t").write_bytes(body)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "t", format)
    assert str(caught.value).isprintable()


def test_semicolons_tabs_quoted_breaks_and_a_byte_order_mark(tmp_path):
    for mark in ",;\t":
        rows = [
            'id,time,lat,lon,"note, of\r\nall"',
            '7,2020-01-01T00:00:00Z,1.5,2.5,"a\r\nb"',
            "7,1,1.5,2.5,c",
        ]
        (tmp_path / "t.csv").write_bytes(("\ufeff" + "\r\n".join(rows)).replace(",", mark).encode())
        (trip,), report = read(tmp_path / "t.csv", "csv")
        assert trip.time.tolist() == [1577836800, 1] and trip.lat.tolist() == [1.5, 1.5]
        assert trip.id == "7" and not report.points
    (tmp_path / "t.csv").write_text('id, time, lat, lon\n7, "2020-01-01 00:00:00", 1.5, "2.5"\n')
    (trip,), _ = read(tmp_path / "t.csv", "csv")
    assert (trip.time[0], trip.lon[0]) == (1577836800, 2.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1500000000", 1.5e9),
        ("1500000000123", 1500000000.123),
        ("1500000000123456", 1500000000.123456),
        ("1500000000000000000", 1.5e9),
        ("2017-07-14 02:40:00 UTC", 1.5e9),
        ("2017/07/14 02:40:00 GMT", 1.5e9),
        ("2017-07-14 10:40:00+08:00", 1.5e9),
        ("2017-07-14 03:40:00", 1.5e9),  # on the clock of the test, an hour ahead
    ],
)
def test_times(text, expected):
    assert readers.seconds(text, 3600) == pytest.approx(expected, abs=1e-6)


def test_geolife_labels_are_on_the_clock_of_the_traces(tmp_path, monkeypatch):
    folder = tmp_path / "010" / "Trajectory"
    folder.mkdir(parents=True)
    rows = [f"39.98,116.31,0,492,39744.12,2008-10-23,02:53:{at:02d}" for at in range(10)]
    (folder / "a.plt").write_text(PLT + "\r\n".join(rows) + "\r\n", newline="")
    (folder / "._a.plt").write_bytes(b"\x00\x05\x16\x07")  # macOS's companion of a file
    (tmp_path / "010" / "labels.txt").write_text(
        "Start Time\tEnd Time\tMode\n2008/10/23 02:53:00\t2008/10/23 02:53:09\tbus\n"
    )
    for offset in (None, 8):
        (trip,), _ = read(tmp_path, "geolife", utc_offset=offset)
        assert trip.mode == "bus" and len(trip) == 10
    monkeypatch.chdir(folder)
    (trip,), _ = read("a.plt", "geolife")
    assert (trip.id, trip.user, trip.mode) == ("010/a", "010", "bus")
