"""SynthCity: tiles and samples a second on one core, and how far the question alone gives the answer away.

python benchmarks/synthcity.py --images 200
"""

import argparse
import time
from collections import Counter, defaultdict

from mmrstraj_jax.synthcity import tiles
from mmrstraj_jax.synthcity.city import STYLES, make_city
from mmrstraj_jax.synthcity.questions import Balancer
from mmrstraj_jax.synthcity.rand import Stream
from mmrstraj_jax.synthcity.sample import balanced, evaluation_rows, samples


def tile_speed() -> None:
    """CPU seconds of the 16 middle tiles of one city of each style, its first use included."""
    for z in tiles.ZOOMS:
        start, number = time.process_time(), 0
        for seed, style in enumerate(STYLES):
            city = make_city(40 + seed, style, lat=48.2, lon=16.37)
            look, (x, y) = tiles.tile_look(city), tiles.center_tile(city, z)
            for i in range(16):
                tiles.tile(city, z, x - 2 + i % 4, y - 2 + i // 4, look)
                number += 1
        print(f"zoom {z}: {number / (time.process_time() - start):.0f} tiles of 256 px a second")


def question_table(images: int) -> None:
    """Questions an image, and majority answers by type and by question string, of evaluation rows."""
    start, balancer, rows = time.process_time(), Balancer(), []
    for k, sample in enumerate(samples("eval_base", 5, images, "A", "eval_general")):
        rows += evaluation_rows(sample, Stream(3, k), "eval_general", balancer, 40)
    print(f"{images / (time.process_time() - start):.0f} samples with questions a second")
    by: dict = defaultdict(lambda: defaultdict(Counter))
    for row in balanced(rows):
        by[row["type"]][row["conversations"][0]["value"]][row["truth"]["answer"]] += 1
    print("| type | an image | majority of type | of question string | of yes/no strings |")
    print("|---|---|---|---|---|")
    for name, strings in sorted(by.items()):
        if name == "caption":
            continue
        total, closed = Counter(), [c for c in strings.values() if set(c) <= {"yes", "no"}]
        for counts in strings.values():
            total.update(counts)
        number = total.total()
        two_way = f"{_share(closed):.1f}" if closed else "-"
        print(
            f"| {name} | {number / images:.2f} | {100 * max(total.values()) / number:.1f} "
            f"| {_share(list(strings.values())):.1f} | {two_way} |"
        )


def _share(strings: list[Counter]) -> float:
    return 100 * sum(max(c.values()) for c in strings) / sum(c.total() for c in strings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    images = parser.parse_args().images
    tile_speed()
    question_table(images)
