"""Where a city lies on the globe: metres of the city <-> longitude, latitude <-> pixels of Web Mercator.

Web Mercator is conformal, so a city's metres are its Mercator metres times the cosine of the city's latitude.
Over two kilometres the scale changes by less than 0.03 %.
"""

import math

from mmrstraj_jax.synthcity.city import City

_RADIUS = 6378137.0  # metres, of the sphere that Web Mercator uses
TILE = 256  # pixels a side


def metres_a_pixel(city: City, zoom: int) -> float:
    """Ground size of a pixel at the city's latitude."""
    return 2 * math.pi * _RADIUS * math.cos(math.radians(city.lat)) / (TILE << zoom)


def to_lonlat(city: City, x: float, y: float) -> tuple[float, float]:
    """(longitude, latitude) in degrees of a point of the city (metres east and north of its centre)."""
    scale = _RADIUS * math.cos(math.radians(city.lat))
    north = _mercator(city.lat) + y / scale
    lat = math.degrees(2 * math.atan(math.exp(north)) - math.pi / 2)
    return city.lon + math.degrees(x / scale), lat


def to_metres(city: City, lon: float, lat: float) -> tuple[float, float]:
    """(x, y) in metres of a longitude and latitude in degrees."""
    scale = _RADIUS * math.cos(math.radians(city.lat))
    return math.radians(lon - city.lon) * scale, (_mercator(lat) - _mercator(city.lat)) * scale


def to_pixel(lon: float, lat: float, zoom: int) -> tuple[float, float]:
    """(column, row) on the world's pixel grid at a zoom; tile numbers are the whole parts of a 256th."""
    side = TILE << zoom
    return (lon / 360 + 0.5) * side, (0.5 - _mercator(lat) / (2 * math.pi)) * side


def _mercator(lat: float) -> float:
    """Radians of Mercator's y."""
    return math.log(math.tan(math.pi / 4 + math.radians(lat) / 2))
