"""Several samples in one row: which of them, decided once from their shapes.

A pack is formed once and keeps its members in every epoch; the schedule then treats it like a row. That keeps
the steps of an epoch a constant, so the order stays a function of (seed, step).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mmrstraj_jax.data.index import Index
from mmrstraj_jax.data.shuffle import shuffled

OPEN = 32  # packs that are tried before a new one is begun
_NUMBER = 1 << 32  # of the shuffle: no epoch has this number


@dataclass(frozen=True)
class Packs:
    """Members of each pack, and what a pack needs (index.shapes of rows)."""

    rows: Int[np.ndarray, " rows"]  # pack after pack
    ends: Int[np.ndarray, " packs"]  # pack p has rows[ends[p - 1] : ends[p]]
    shapes: Int[np.ndarray, "packs 5"]
    sources: list[tuple[int, int]]  # (first pack, packs) of each source: a pack never mixes sources

    def members(self, pack: int) -> list[int]:
        begin = self.ends[pack - 1] if pack else 0
        return self.rows[begin : self.ends[pack]].tolist()


def pack(index: Index, max_length: int, max_views: int, seed: int) -> Packs:
    """First fit over the rows of each source in a shuffled order.

    A pack has at most max_length tokens, max_views views and one image that needs the row's canvas.
    """
    views, lengths, supervised, canvas, reduced = np.asarray(index.shapes).T.tolist()
    members: list[list[int]] = []
    shapes: list[list[int]] = []
    sources = []
    for stream, source in enumerate(index.sources, 1):
        first, opened = len(members), []
        for row in (source.start + shuffled(source.count, seed, _NUMBER, stream)).tolist():
            for at in opened:
                used = shapes[at]
                if (
                    used[1] + lengths[row] <= max_length
                    and used[0] + views[row] <= max_views
                    and not (used[3] and canvas[row])
                ):
                    break
            else:
                at = len(members)
                members.append([])
                shapes.append([0] * 5)
                opened = [*opened[-OPEN + 1 :], at]
            members[at].append(row)
            used = shapes[at]
            shapes[at] = [
                used[0] + views[row],
                used[1] + lengths[row],
                used[2] + supervised[row],
                max(used[3], canvas[row]),
                max(used[4], reduced[row]),
            ]
        sources.append((first, len(members) - first))
    rows = np.concatenate([np.asarray(one, np.int32) for one in members])
    ends = np.cumsum([len(one) for one in members])
    return Packs(rows, ends, np.asarray(shapes, np.int32), sources)
