"""Where a city lies on the globe: metres of the city <-> longitude, latitude <-> pixels of Web Mercator.

Web Mercator is conformal, so a city's metres are its Mercator metres times the cosine of the city's latitude.
Over two kilometres the scale changes by less than 0.03 %. The city's centre is the pixel corner of zoom 17
next to its longitude and latitude, so that the pixel grids of all zooms from 17 on share it.
"""

import math

from mmrstraj_jax.synthcity.city import City

_RADIUS = 6378137.0  # metres, of the sphere that Web Mercator uses
_BASE = 17  # the zoom whose pixel grid holds the centre
TILE = 256  # pixels a side


def metres_a_pixel(city: City, zoom: int) -> float:
    """Ground size of a pixel at the city's latitude."""
    return 2 * math.pi * _RADIUS * math.cos(math.radians(city.lat)) / (TILE << zoom)


def center_pixel(city: City, zoom: int) -> tuple[int, int]:
    """(column, row) of the city's centre on the world's pixel grid at a zoom of 17 or more."""
    column, row = to_pixel(city.lon, city.lat, _BASE)
    return round(column) << (zoom - _BASE), round(row) << (zoom - _BASE)


def to_lonlat(city: City, x: float, y: float) -> tuple[float, float]:
    """(longitude, latitude) in degrees of a point of the city (metres east and north of its centre)."""
    column, row = center_pixel(city, _BASE)
    side, gsd = TILE << _BASE, metres_a_pixel(city, _BASE)
    north = (0.5 - (row - y / gsd) / side) * 2 * math.pi
    return ((column + x / gsd) / side - 0.5) * 360, math.degrees(2 * math.atan(math.exp(north)) - math.pi / 2)


def to_metres(city: City, lon: float, lat: float) -> tuple[float, float]:
    """(x, y) in metres of a longitude and latitude in degrees."""
    column, row = center_pixel(city, _BASE)
    gsd, (u, v) = metres_a_pixel(city, _BASE), to_pixel(lon, lat, _BASE)
    return (u - column) * gsd, (row - v) * gsd


def to_pixel(lon: float, lat: float, zoom: int) -> tuple[float, float]:
    """(column, row) on the world's pixel grid at a zoom; tile numbers are the whole parts of a 256th."""
    side = TILE << zoom
    north = math.log(math.tan(math.pi / 4 + math.radians(lat) / 2))
    return (lon / 360 + 0.5) * side, (0.5 - north / (2 * math.pi)) * side
