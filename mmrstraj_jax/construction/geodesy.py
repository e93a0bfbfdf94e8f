"""Distances and local coordinates on the Earth, and the Chinese GCJ-02 offset. Degrees in, metres out."""

import math

import numpy as np
from jaxtyping import Float

EARTH_RADIUS = 6_371_008.8  # metres, the mean radius of WGS-84

Degrees = Float[np.ndarray, " N"]


def wrap(lon):
    """Longitudes (or differences of them) brought into [-180, 180)."""
    return (np.asarray(lon, np.float64) + 180.0) % 360.0 - 180.0


def distance(lat1, lon1, lat2, lon2):
    """Great-circle distance in metres (haversine); arrays broadcast. Safe across the antimeridian."""
    phi1, phi2 = np.radians(lat1), np.radians(lat2)
    dlon = np.radians(np.subtract(lon2, lon1))
    a = np.sin((phi2 - phi1) / 2) ** 2 + np.cos(phi1) * np.cos(phi2) * np.sin(dlon / 2) ** 2
    return 2 * EARTH_RADIUS * np.arcsin(np.sqrt(np.clip(a, 0.0, 1.0)))


def steps(lat: Degrees, lon: Degrees) -> Float[np.ndarray, " N-1"]:
    """Metres from each point to the next."""
    return distance(lat[:-1], lon[:-1], lat[1:], lon[1:])


def middle(lat: Degrees, lon: Degrees) -> tuple[float, float]:
    """A (lat, lon) amid the points: the mean of their unit vectors, so that no degrees are averaged."""
    phi, lam = np.radians(lat), np.radians(lon)
    x, y, z = np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)
    x, y, z = float(x.mean()), float(y.mean()), float(z.mean())
    return math.degrees(math.atan2(z, math.hypot(x, y))), math.degrees(math.atan2(y, x))


def to_metres(
    lat: Degrees, lon: Degrees, origin: tuple[float, float] | None = None
) -> Float[np.ndarray, "N 2"]:
    """East and north metres from `origin` (default: the points' middle), equirectangular.

    Of trips inside one city (100 km) distances are right to about 0.1 %. Safe across the antimeridian.
    """
    lat0, lon0 = middle(lat, lon) if origin is None else origin
    scale = math.radians(1.0) * EARTH_RADIUS
    east = wrap(np.asarray(lon) - lon0) * scale * math.cos(math.radians(lat0))
    return np.stack([east, (np.asarray(lat) - lat0) * scale], axis=1)


# ---- GCJ-02 ----

# China's box, in which the published implementations apply the offset
_WEST, _SOUTH, _EAST, _NORTH = 72.004, 0.8293, 137.8347, 55.8271
# The Krasovsky 1940 ellipsoid, on which the offset is defined
_AXIS, _ECCENTRICITY2 = 6_378_245.0, 0.006_693_421_622_965_943


def wgs84_to_gcj02(lat: Degrees, lon: Degrees) -> tuple[Degrees, Degrees]:
    """The offset (100 to 700 m) of Chinese maps, by its commonly published formula.

    Positions outside China's box stay as they are: there such maps have no offset, and the formula gives
    kilometres.
    """
    lat, lon = np.asarray(lat, np.float64), np.asarray(lon, np.float64)
    inside = (_WEST <= lon) & (lon <= _EAST) & (_SOUTH <= lat) & (lat <= _NORTH)
    x, y = lon - 105.0, lat - 35.0
    root = np.sqrt(np.abs(x))
    wave = 20 * np.sin(6 * np.pi * x) + 20 * np.sin(2 * np.pi * x)
    north = -100 + 2 * x + 3 * y + 0.2 * y * y + 0.1 * x * y + 0.2 * root + wave * 2 / 3
    north += (20 * np.sin(np.pi * y) + 40 * np.sin(np.pi / 3 * y)) * 2 / 3
    north += (160 * np.sin(np.pi / 12 * y) + 320 * np.sin(np.pi / 30 * y)) * 2 / 3
    east = 300 + x + 2 * y + 0.1 * x * x + 0.1 * x * y + 0.1 * root + wave * 2 / 3
    east += (20 * np.sin(np.pi * x) + 40 * np.sin(np.pi / 3 * x)) * 2 / 3
    east += (150 * np.sin(np.pi / 12 * x) + 300 * np.sin(np.pi / 30 * x)) * 2 / 3
    phi = np.radians(lat)
    w = 1 - _ECCENTRICITY2 * np.sin(phi) ** 2
    meridian = _AXIS * (1 - _ECCENTRICITY2) / (w * np.sqrt(w)) * np.pi / 180
    parallel = _AXIS / np.sqrt(w) * np.cos(phi) * np.pi / 180
    return lat + np.where(inside, north / meridian, 0.0), lon + np.where(inside, east / parallel, 0.0)


def gcj02_to_wgs84(lat: Degrees, lon: Degrees) -> tuple[Degrees, Degrees]:
    """The inverse, by fixed-point iteration: five rounds leave less than a millimetre."""
    lat, lon = np.asarray(lat, np.float64), np.asarray(lon, np.float64)
    guess_lat, guess_lon = lat, lon
    for _ in range(5):
        moved_lat, moved_lon = wgs84_to_gcj02(guess_lat, guess_lon)
        guess_lat, guess_lon = guess_lat + lat - moved_lat, guess_lon + lon - moved_lon
    return guess_lat, guess_lon
