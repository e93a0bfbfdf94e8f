"""Where a city's airport and interchange go, and the interchange's ramps: plane geometry on the lattice."""

import math

from mmrstraj_jax.synthcity.geometry import Point, bezier

Line = tuple[int, int] | None  # axis and lattice line of the motorway, or axis and strip of the river


def airport_sites(cells: int, wide: bool, river: Line, motorway: Line) -> list[tuple[int, int, int, int]]:
    """Lattice rectangles i0, j0, i1, j1 of 4 x 2 cells (2 x 4 unless wide), clear of river and motorway."""
    across, along = (4, 2) if wide else (2, 4)
    free = []
    for i in range(1, cells - across):
        for j in range(1, cells - along):
            spans = ((i, i + across), (j, j + along))
            dry = not river or not spans[river[0]][0] <= river[1] < spans[river[0]][1]
            motor = motorway and spans[motorway[0]]
            if dry and not (motor and motor[0] < motorway[1] < motor[1]):
                free.append((i, j, i + across, j + along))
    return free


def interchange_sites(
    cells: int, motorway: Line, river: Line, airport, crossing: list[str]
) -> list[tuple[int, int]]:
    """Lattice crossings (i, j) of the motorway with an arterial whose four cells are free for ramps.

    crossing: class of each lattice line that crosses the motorway.
    """
    if not motorway:
        return []
    axis, line = motorway
    free = []
    for k in range(3, cells - 2):
        i, j = (line, k) if axis == 0 else (k, line)
        wet = bool(river) and river[0] != axis and river[1] in (k - 1, k)
        taken = airport and airport[0] - 1 <= i <= airport[2] + 1 and airport[1] - 1 <= j <= airport[3] + 1
        if crossing[k] == "arterial" and not wet and not taken:
            free.append((i, j))
    return free


def ramp(center: Point, merge: Point, far: Point, lane: float) -> tuple[tuple[Point, ...], bool]:
    """The ramp of one quadrant of a diamond, in driving order, and whether it enters the motorway.

    center: of the crossing; merge: on the motorway's centre line; far: on the arterial's; lane: metres from
    the motorway's centre line to its outer lane.
    """
    ex, ey = merge[0] - center[0], merge[1] - center[1]  # along the motorway, away from the crossing
    fl, el = math.dist(far, center), math.hypot(ex, ey)
    ox, oy = (far[0] - center[0]) / fl, (far[1] - center[1]) / fl  # along the arterial
    start = (merge[0] + ox * lane, merge[1] + oy * lane)
    bend = bezier(
        start,
        (start[0] - ex * 0.45 + ox * 2, start[1] - ey * 0.45 + oy * 2),
        (far[0] + ex / el * 26.0, far[1] + ey / el * 26.0),
        far,
        10,
    )
    points = (merge, *bend)
    # Right-hand traffic: the carriageway on this side has the arterial arm on its right, so it either leaves
    # the crossing behind (an entry) or comes towards it (an exit).
    entry = ex * oy - ey * ox < 0
    return (points[::-1] if entry else points), entry
