"""Trips through a city: who drives where and when, along which roads, and how fast.

Demand follows land use and hour: people leave homes in the morning and work in the evening, and a part of
the traffic comes from or goes to the edge of the city. Routes are the quickest at the traffic of their hour;
speeds then answer the load. What a GPS receiver makes of a trip is in gps.py.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mmrstraj_jax.synthcity.city import CELLS, City
from mmrstraj_jax.synthcity.network import Network, network_of
from mmrstraj_jax.synthcity.vehicles import HOUR_LEVEL

DEMAND = 80_000.0  # vehicles a day in the square kilometre of a city, through traffic included
_PERIOD = [0] * 6 + [1] * 4 + [2] * 6 + [3] * 4 + [4] * 4  # night, morning, midday, evening, late
# use -> share of trips that leave, and that arrive, in each period
_LEAVES = {
    "residential": (1, 4, 2, 1, 1), "apartments": (2, 8, 4, 2, 2), "commercial": (1, 1, 5, 8, 4),
    "industrial": (1, 1, 2, 5, 1), "park": (0, 0, 1, 1, 1), "sports": (0, 0, 1, 2, 3),
    "farmland": (1, 1, 1, 1, 0), "harbor": (1, 1, 1, 2, 0), "airport": (1, 3, 4, 4, 3),
}  # fmt: skip
_ARRIVES = {
    "residential": (2, 1, 2, 4, 3), "apartments": (4, 2, 4, 8, 6), "commercial": (1, 7, 5, 2, 3),
    "industrial": (1, 5, 2, 1, 1), "park": (0, 0, 1, 1, 0), "sports": (0, 0, 1, 3, 1),
    "farmland": (1, 1, 1, 1, 0), "harbor": (1, 2, 1, 1, 0), "airport": (2, 4, 4, 3, 1),
}  # fmt: skip
_GATEWAYS = {"motorway": 60.0, "arterial": 14.0}  # weight of a road's end at the edge of the city
_LEAST = (
    2000  # trips that the load of the roads is counted from; fewer would jam the roads they happen to use
)
_LEGS = (1, 1, 1, 2, 2, 3)  # destinations of a trip, equally likely
_SHORTEST = 400.0  # metres between the ends of a leg


@dataclass(frozen=True)
class Trips:
    """Trips of one day. Trip k drives edges[k] of the network, entering edge j at second enter[k][j]."""

    city: City
    network: Network
    edges: list[Int[np.ndarray, " steps"]]
    enter: list[Float[np.ndarray, " steps+1"]]  # seconds since midnight; the last is the arrival
    weight: float  # vehicles that a trip stands for

    def __len__(self) -> int:
        return len(self.edges)


def plan(city: City, num: int, seed: int = 0) -> Trips:
    """`num` trips of a day; the same for the same city and arguments."""
    network = network_of(city)
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence((city.seed, 20, seed)))).random
    drawn = max(num, _LEAST)
    cumulative = np.cumsum(HOUR_LEVEL) / np.sum(HOUR_LEVEL)
    hour = np.minimum(np.searchsorted(cumulative, draw(drawn)), 23)
    depart = np.sort(3600.0 * (hour + draw(drawn)))
    hour = (depart // 3600).astype(int)
    legs = np.array(_LEGS)[(draw(drawn) * len(_LEGS)).astype(int)]
    stops = _stops(city, network, hour, draw)
    routes = _routes(network, hour, stops, legs)
    steps = np.array([len(r) for r in routes])
    edges, trip = np.concatenate(routes), np.repeat(np.arange(drawn), steps)
    # Loads of the hour of departure: a trip takes minutes
    load = np.zeros((24, len(network.road)))
    np.add.at(load, (hour[trip], edges), DEMAND / drawn)
    times = np.stack([network.seconds(h, load[h]) for h in range(24)])
    pace = 0.85 + 0.3 * draw(drawn)  # of the driver
    taken = np.split(times[hour[trip], edges] * pace[trip], np.cumsum(steps)[:-1])
    kept = np.arange(num) * drawn // num
    enter = [depart[k] + np.concatenate([[0.0], np.cumsum(taken[k])]) for k in kept]
    return Trips(city, network, [routes[k] for k in kept], enter, DEMAND / num)


def _routes(network: Network, hour, stops, legs) -> list[Int[np.ndarray, " steps"]]:
    """The edges of each trip, leg after leg. Quiet, middle and busy hours share a search each."""
    state = np.digitize(np.array(HOUR_LEVEL), (0.25, 0.65))[hour]
    typical = (2, 12, 8)  # an hour of each state
    legs_of: list[list] = [[] for _ in hour]
    for s, example in enumerate(typical):
        cost = network.seconds(example, 0.6 * network.capacity if s == 2 else 0.0)
        for leg in range(stops.shape[1] - 1):
            who = np.flatnonzero((state == s) & (legs > leg))
            if len(who):
                found = network.routes(cost, stops[who, leg], stops[who, leg + 1])
                for k, path in zip(who, found, strict=True):
                    legs_of[k].append(path)
    return [np.concatenate(parts) for parts in legs_of]


def _stops(city: City, network: Network, hour, draw) -> Int[np.ndarray, "N legs+1"]:
    """Vertices where trips start, call and end; neighbours in a row lie _SHORTEST apart where they can."""
    leaves, arrives = _weights(city, network)
    period = np.array(_PERIOD)[hour]
    stops = np.zeros((len(hour), max(_LEGS) + 1), int)

    def choose(weights, who):
        """A vertex for each of `who`, by the weights [periods, V] of its period."""
        cumulative = np.cumsum(weights, 1)
        cumulative /= cumulative[:, -1:]
        u, found = draw(len(who)), np.zeros(len(who), int)
        for p in range(len(weights)):
            mine = period[who] == p
            found[mine] = np.searchsorted(cumulative[p], u[mine], side="right")
        return found

    everyone = np.arange(len(hour))
    stops[:, 0] = choose(leaves, everyone)
    for leg in range(1, stops.shape[1]):
        who = everyone
        for _ in range(20):
            stops[who, leg] = choose(arrives, who)
            apart = np.hypot(*(network.xy[stops[who, leg]] - network.xy[stops[who, leg - 1]]).T)
            who = who[apart < _SHORTEST]
            if not len(who):
                break
        assert (stops[:, leg] != stops[:, leg - 1]).all(), "a city too small for trips"
    return stops


def _weights(city: City, network: Network) -> tuple[np.ndarray, np.ndarray]:
    """[periods, V] weights of leaving from and of arriving at each vertex."""
    inside = network.connected
    leaves, arrives = np.zeros((2, 5, len(inside)))
    streets = np.flatnonzero(inside & ~network.upper)
    for block in city.blocks:
        if block.use in _LEAVES:
            offset = network.xy[streets][:, None] - np.array(block.corners)
            for vertex in streets[np.hypot(*offset.transpose(2, 0, 1)).argmin(0)]:
                leaves[:, vertex] += _LEAVES[block.use]
                arrives[:, vertex] += _ARRIVES[block.use]
    row, column = np.divmod(network.node, CELLS + 1)
    border = (network.node < (CELLS + 1) ** 2) & ((row % CELLS == 0) | (column % CELLS == 0))
    for cls, weight in _GATEWAYS.items():
        of_class = [n for n, road in enumerate(city.roads) if road.cls == cls]
        ends = np.isin(np.arange(len(inside)), network.tail[np.isin(network.road, of_class)])
        leaves[:, inside & border & ends] += weight
        arrives[:, inside & border & ends] += weight
    return leaves, arrives
