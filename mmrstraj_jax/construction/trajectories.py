"""One type for every trip, the count of what was dropped and why, sampling by region and stratum, anchors.

Readers of the published formats are in readers.py, cleaning is in cleaning.py.
"""

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from mmrstraj_jax.construction import geodesy
from mmrstraj_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A trip: N fixes of one moving thing. Times are UTC seconds since 1970, positions WGS-84 degrees."""

    id: str
    time: Float[np.ndarray, " N"]
    lat: Float[np.ndarray, " N"]
    lon: Float[np.ndarray, " N"]
    user: str = ""
    mode: str = ""  # "" where the source says nothing
    source: str = ""  # the file
    line: int = 0  # of its first fix, counted from 1; 0 where the file has no lines
    region: str = ""
    accuracy: Float[np.ndarray, " N"] | None = None  # metres

    def __post_init__(self):
        lengths = {len(self.time), len(self.lat), len(self.lon)}
        lengths |= set() if self.accuracy is None else {len(self.accuracy)}
        assert len(lengths) == 1, lengths

    def __len__(self) -> int:
        return len(self.time)

    def take(self, index, **changes) -> "Trajectory":
        """The fixes of an index, mask or slice; other fields may change along."""
        accuracy = None if self.accuracy is None else self.accuracy[index]
        arrays = {"time": self.time[index], "lat": self.lat[index], "lon": self.lon[index]}
        return dataclasses.replace(self, **arrays, accuracy=accuracy, **changes)

    @property
    def length(self) -> float:
        """Metres along the path."""
        return float(geodesy.steps(self.lat, self.lon).sum())

    @property
    def duration(self) -> float:
        """Seconds from the first fix to the last."""
        return float(self.time[-1] - self.time[0]) if len(self) else 0.0


@dataclass
class Report:
    """What reading and cleaning did: every dropped fix and trip has a reason, with the first place of each.

    `points_in == points_out + sum(points.values())` always holds for cleaning.
    """

    points: Counter = field(default_factory=Counter)  # dropped fixes (or rows), by reason
    trips: Counter = field(default_factory=Counter)  # dropped whole trips, by reason
    remarks: Counter = field(default_factory=Counter)  # repaired, nothing dropped
    first: dict[str, str] = field(default_factory=dict)
    points_in: int = 0
    points_out: int = 0
    once: set[str] = field(default_factory=set)  # places of files that are read several times

    def drop(self, reason: str, count: int = 1, where: str = "") -> None:
        """Counts dropped fixes."""
        if count:
            self.points[reason] += count
            self.first.setdefault(reason, where)

    def drop_once(self, reason: str, where: str) -> None:
        """Counts a row of a file that is read beside several others, GeoLife's labels, the first time."""
        if where not in self.once:
            self.once.add(where)
            self.drop(reason, 1, where)

    def drop_trip(self, reason: str, points: int, where: str = "") -> None:
        """Counts a dropped trip and its fixes."""
        self.trips[reason] += 1
        self.drop(reason, points, where)
        self.first.setdefault(reason, where)

    def to_dict(self) -> dict:
        """For a manifest: plain dicts with sorted keys."""
        named = {"points": self.points, "trips": self.trips, "remarks": self.remarks, "first": self.first}
        counts = {name: dict(sorted(values.items())) for name, values in named.items()}
        return {"points_in": self.points_in, "points_out": self.points_out, **counts}


# ---- regions, strata, sampling ----

# west, south, east, north: generous boxes around the regions of the paper's Table 1, and Porto
REGIONS: dict[str, tuple[float, float, float, float]] = {
    "Los Angeles": (-119.0, 33.4, -117.4, 34.9),
    "Singapore": (103.55, 1.13, 104.15, 1.50),
    "Beijing": (115.4, 39.4, 117.6, 41.1),
    "Jakarta": (106.3, -6.75, 107.3, -5.85),
    "Aracaju": (-37.4, -11.3, -36.8, -10.6),
    "Porto": (-8.9, 40.9, -8.2, 41.5),
}


def region_of(trip: Trajectory, regions: Mapping[str, tuple[float, float, float, float]] = REGIONS) -> str:
    """The first box that holds the trip's middle fix, or "". With west > east a box crosses 180 degrees."""
    at = len(trip) // 2
    lat, lon = float(trip.lat[at]), float(geodesy.wrap(trip.lon[at]))
    for name, (west, south, east, north) in regions.items():
        if south <= lat <= north and (west <= lon <= east if west <= east else lon >= west or lon <= east):
            return name
    return ""


def stratum_of(trip: Trajectory) -> str:
    """Mode and length class: "car/medium". Short is below 2 km, long from 10 km."""
    length = trip.length
    return f"{trip.mode or 'unknown'}/{'short' if length < 2e3 else 'medium' if length < 1e4 else 'long'}"


class Stub(NamedTuple):
    """What sampling needs to know of a trip."""

    id: str
    region: str
    stratum: str


def allocate(available: Mapping[str, int], total: int, equal: bool = True) -> dict[str, int]:
    """Shares of `total` among groups, none above what it has; what a small group cannot take, others get.

    Args:
      equal: the same for every group; otherwise in proportion to what each has (largest remainders).
    """
    total = min(total, sum(available.values()))
    if not equal:
        whole = sum(available.values())
        shares = {name: count * total // whole if whole else 0 for name, count in available.items()}
        order = sorted(available, key=lambda name: (-(available[name] * total % max(whole, 1)), name))
        for name in order[: total - sum(shares.values())]:
            shares[name] += 1
        return shares
    shares, left = {}, total
    for rank, name in enumerate(sorted(available, key=lambda name: (available[name], name))):
        shares[name] = min(available[name], left // (len(available) - rank))
        left -= shares[name]
    return {name: shares[name] for name in available}


def sample(
    stubs: Iterable[Stub],
    total: int,
    seed: int,
    *,
    quotas: Mapping[str, int] | None = None,
    equal: bool = True,
) -> list[str]:
    """Ids of a stratified sample (the paper's 5,000 of 70,000, section 3.2.1), sorted.

    A trip's rank is a hash of seed and id: the sample is independent of the order of files, and a trip
    that is added changes only its own stratum.

    Args:
      quotas: trips per region; None shares `total` among the regions.
      equal: equal shares for regions and, within one, for strata; otherwise proportional ones.
    Raises:
      UserError: two trips of one id, or a quota for a region that no trip lies in or that has too few.
    """
    groups: dict[str, dict[str, list[tuple[bytes, str]]]] = defaultdict(lambda: defaultdict(list))
    seen = set()
    for stub in stubs:
        if stub.id in seen:
            raise UserError(f"trip {stub.id!r}: the id is used twice; expected unique ids")
        seen.add(stub.id)
        rank = hashlib.sha256(f"{seed}\0{stub.id}".encode()).digest()
        groups[stub.region][stub.stratum].append((rank, stub.id))
    available = {region: sum(map(len, strata.values())) for region, strata in groups.items()}
    for region, quota in (quotas or {}).items():
        if available.get(region, 0) < quota:
            raise UserError(
                f"region {region!r}: {quota} trips asked for, {available.get(region, 0)} available"
            )
    shares = allocate(available, total, equal) if quotas is None else quotas
    chosen = []
    for region, share in shares.items():
        counts = {stratum: len(ranked) for stratum, ranked in groups[region].items()}
        for stratum, count in allocate(counts, share, equal).items():
            chosen += [identity for _, identity in sorted(groups[region][stratum])[:count]]
    return sorted(chosen)


# ---- anchors: where the windows go ----


class Anchor(NamedTuple):
    """A fix of the trip that a window is centred on."""

    lat: float
    lon: float
    index: int
    kind: str


_CANDIDATES = 1000  # medoid and densest window look at so many fixes, evenly spread: n * 1000, never n * n


def _centroid(xy, trip, **_) -> list[int]:
    """Length-weighted mean of the path in metres, snapped to the nearest fix (a curve's mean is off-road)."""
    steps = np.linalg.norm(np.diff(xy, axis=0), axis=1)
    weight = np.concatenate([steps, [0.0]]) + np.concatenate([[0.0], steps])
    centre = np.average(xy, axis=0, weights=weight) if weight.sum() > 0 else xy[0]
    return [int(np.argmin(((xy - centre) ** 2).sum(1)))]


def _candidates(xy) -> np.ndarray:
    return np.unique(np.linspace(0, len(xy) - 1, min(len(xy), _CANDIDATES)).round().astype(int))


def _medoid(xy, trip, **_) -> list[int]:
    """The fix with the least sum of distances to all others."""
    at = _candidates(xy)
    return [int(at[np.argmin([np.hypot(*(xy - xy[i]).T).sum() for i in at])])]


def _densest(xy, trip, *, side: float, **_) -> list[int]:
    """The fix whose window of `side` metres holds most fixes."""
    at = _candidates(xy)
    return [int(at[np.argmax([(np.abs(xy - xy[i]).max(1) <= side / 2).sum() for i in at])])]


def _along(xy, trip, *, step: float, **_) -> list[int]:
    """A fix about every `step` metres of path, from the origin on; never the same twice."""
    walked = np.concatenate([[0.0], np.cumsum(geodesy.steps(trip.lat, trip.lon))])
    marks = np.arange(0.0, walked[-1] + 1e-9, step)
    after = np.clip(np.searchsorted(walked, marks), 0, len(walked) - 1)
    before = np.maximum(after - 1, 0)
    nearest = np.where(marks - walked[before] < walked[after] - marks, before, after)
    return np.unique(nearest).tolist()


ANCHORS: dict[str, Callable[..., list[int]]] = {
    "centroid": _centroid,
    "medoid": _medoid,
    "origin": lambda xy, trip, **_: [0],
    "destination": lambda xy, trip, **_: [len(trip) - 1],
    "along": _along,
    "densest": _densest,
}


def anchors(trip: Trajectory, kind: str, *, step: float = 250.0, side: float = 250.0) -> list[Anchor]:
    """Window centres of a trip: fixes of the trip itself, found in local metres, never averaged degrees.

    Args:
      kind: centroid, medoid, origin, destination, along (several) or densest.
      step: metres between anchors "along" the path.
      side: metres of the window that "densest" counts in.
    Raises:
      UserError: an unknown kind, a step or side that is not positive, or a trip without fixes.
    """
    if kind not in ANCHORS:
        raise UserError(f"anchor {kind!r}: expected one of {', '.join(ANCHORS)}")
    if not (step > 0 and side > 0):
        raise UserError(f"anchor {kind}: step {step} and side {side}, expected positive metres")
    if not len(trip):
        raise UserError(f"trip {trip.id!r}: no fixes, so no anchor")
    found = ANCHORS[kind](geodesy.to_metres(trip.lat, trip.lon), trip, step=step, side=side)
    return [Anchor(float(trip.lat[i]), float(trip.lon[i]), i, kind) for i in found]
