"""The road network of a city as a directed graph, with travel times by class, hour and load.

Shortest paths are SciPy's (`scipy.sparse.csgraph`, which JAX installs anyway): its compiled Dijkstra solves
all origins at once, and a path is read off its predecessor matrix for all trips together.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, dijkstra

from mmrstraj_jax.synthcity.city import City
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.vehicles import HOUR_LEVEL

FREE_KMH = {"motorway": 100.0, "arterial": 55.0, "collector": 45.0, "local": 30.0, "ramp": 45.0}
# A direction, hourly
CAPACITY = {"motorway": 5400.0, "arterial": 1700.0, "collector": 800.0, "local": 400.0, "ramp": 1200.0}
NODE_SECONDS = {"crossroads": 6.0, "T-junction": 4.0, "roundabout": 5.0}  # lost in passing
SLIP_SECONDS = 15.0  # from one level of an interchange to the other
_FRICTION = 0.1  # share of the free speed that the peak hour's turning and crossing traffic takes
_ALPHA, _BETA = 2.0, 3.0  # of the volume-delay function (Bureau of Public Roads 1964, parameters of a city)
_FULL = 1.3  # of the capacity: more does not fit on a road and comes an hour later


@dataclass(frozen=True)
class Network:
    """One directed edge per road and direction, and slip roads (road -1) between the levels of interchanges.

    An overpass of the motorway over an arterial is an interchange; other roads do not reach the motorway.
    """

    xy: Float[np.ndarray, "V 2"]  # metres; a node with two levels is two vertices
    node: Int[np.ndarray, " V"]  # index into city.nodes
    upper: Bool[np.ndarray, " V"]  # the motorway's level of an overpass
    tail: Int[np.ndarray, " E"]
    head: Int[np.ndarray, " E"]
    road: Int[np.ndarray, " E"]  # index into city.roads; -1: slip road
    forward: Bool[np.ndarray, " E"]  # in the direction of the road's points
    length: Float[np.ndarray, " E"]  # metres
    free: Float[np.ndarray, " E"]  # metres a second
    capacity: Float[np.ndarray, " E"]  # vehicles an hour
    delay: Float[np.ndarray, " E"]  # seconds lost at the head

    def seconds(self, hour: int, load: Float[np.ndarray, " E"] | float = 0.0) -> Float[np.ndarray, " E"]:
        """Travel time of every edge at an hour. load: vehicles an hour on each edge."""
        queue = 1 + _ALPHA * np.minimum(load / self.capacity, _FULL) ** _BETA
        speed = self.free * (1 - _FRICTION * HOUR_LEVEL[hour]) / queue
        return self.length / speed + self.delay * (0.8 + 0.4 * HOUR_LEVEL[hour])

    @cached_property
    def edge_between(self) -> Int[np.ndarray, "V V"]:
        """The edge from one vertex to another, or -1. Of parallel roads the quickest."""
        table = np.full((len(self.xy), len(self.xy)), -1)
        order = np.argsort(-self.length / self.free, kind="stable")
        table[self.tail[order], self.head[order]] = order
        return table

    @cached_property
    def connected(self) -> Bool[np.ndarray, " V"]:
        """Vertices of the largest part in which every vertex can be reached from every other."""
        _, part = connected_components(self._graph(self.length), connection="strong")
        return part == np.bincount(part).argmax()

    def _graph(self, cost: Float[np.ndarray, " E"]) -> csr_array:
        used = self.edge_between[self.edge_between >= 0]
        size = len(self.xy)
        return csr_array((cost[used], (self.tail[used], self.head[used])), shape=(size, size))

    def routes(
        self, cost: Float[np.ndarray, " E"], start: Int[np.ndarray, " N"], end: Int[np.ndarray, " N"]
    ) -> list[Int[np.ndarray, " steps"]]:
        """Edges of the cheapest path of each (start, end), in driving order; none where start is end."""
        sources, row = np.unique(start, return_inverse=True)
        _, before = dijkstra(self._graph(cost), indices=sources, return_predecessors=True)
        steps, at = [], end.copy()
        while (moving := at != start).any():
            previous = np.where(moving, before[row, at], at)
            assert (previous >= 0).all(), "no path"
            steps.append(np.where(moving, self.edge_between[previous, at], -1))
            at = previous
        if not steps:
            return [np.zeros(0, int) for _ in start]
        return [path[path >= 0] for path in np.stack(steps[::-1], 1)]


def network_of(city: City) -> Network:
    """The network of a city, made once."""
    if "network" not in city.cache:
        city.cache["network"] = _network(city)
    return city.cache["network"]


def _network(city: City) -> Network:
    s = Stream(city.seed, 21)
    vertex: dict[tuple[int, bool], int] = {}
    edges: list[tuple] = []

    def at(node: int, cls: str) -> int:
        upper = cls == "motorway" and city.nodes[node].kind == "overpass"
        return vertex.setdefault((node, upper), len(vertex))

    arterial = {n for r in city.roads if r.cls == "arterial" for n in (r.start, r.end)}
    for number, road in enumerate(city.roads):
        assert road.id == number
        start, end = at(road.start, road.cls), at(road.end, road.cls)
        # Not quite the same speed everywhere: in a lattice many paths would be equally quick otherwise
        facts = (road.length, FREE_KMH[road.cls] / 3.6 * s.uniform(0.95, 1.05), CAPACITY[road.cls])
        ways = ((start, end, road.end, True), (end, start, road.start, False))
        for tail, head, node, forward in ways[:1] if road.cls == "ramp" else ways:
            through = road.cls == "motorway" or city.nodes[node].kind == "overpass"
            delay = 0.0 if through else NODE_SECONDS.get(city.nodes[node].kind, 0.0)
            edges.append((tail, head, number, forward, *facts, delay))
    for (node, upper), number in list(vertex.items()):
        if upper and node in arterial and node != city.interchange:  # which has ramps of its own
            below = vertex[node, False]
            edges += [
                (a, b, -1, True, 60.0, 60.0 / SLIP_SECONDS, CAPACITY["arterial"], 0.0)
                for a, b in ((number, below), (below, number))
            ]
    node, upper = map(np.array, zip(*vertex, strict=True))
    xy = np.array([(city.nodes[n].x, city.nodes[n].y) for n in node])
    return Network(xy, node, upper, *map(np.array, zip(*edges, strict=True)))
