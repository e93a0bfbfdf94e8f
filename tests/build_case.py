"""A small world for the build command: trips, tiles and captions on disk, and the server that answers."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mmrstraj_jax.construction import tiles

LAT, LON, ZOOM = 1.30, 103.80, 18
TRIPS = 16
SOURCE = ("--title", "Test tiles", "--attribution", "(c) nobody", "--licence", "CC0-1.0")


def pixel(x, y):
    """World pixels of the map: textured ground, a road every 150 pixels, houses. Any tile of it agrees."""
    noise = ((x * 2654435761 + y * 40503) >> 7) % 37
    shade = 60 + noise + 40 * ((x // 61 + y // 47) % 3)
    road = (x % 150 < 14) | (y % 190 < 14)
    red = np.where(road, 150, shade)
    return np.stack([red, np.where(road, 150, shade + 20), np.where(road, 155, shade - 30)], -1).astype(
        np.uint8
    )


def write_tiles(root: Path, lat, lon, zooms=(ZOOM,)) -> None:
    """All tiles around some points."""
    for zoom in zooms:
        x, y = tiles.tile_at(lat, lon, zoom)
        wanted = {
            (a + i, b + j) for a, b in zip(x, y, strict=True) for i in (-1, 0, 1, 2) for j in (-1, 0, 1, 2)
        }
        for column, row in sorted(wanted):
            path = root / str(zoom) / str(column) / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            across, down = np.meshgrid(np.arange(256) + column * 256, np.arange(256) + row * 256)
            Image.fromarray(pixel(across, down)).save(path)


def write_world(root: Path, trips: int = TRIPS) -> None:
    """trips.csv (generic), tiles/, captions/ (RSICap's schema)."""
    rng = np.random.default_rng(0)
    rows, centres = ["id,time,lat,lon"], []
    for number in range(trips):
        lat, lon = LAT + 0.01 * (number // 4), LON + 0.01 * (number % 4)
        along = np.arange(80) * 12.0 / 111_195
        lats = lat + along + rng.normal(0, 1e-6, 80)
        lons = lon + np.where(np.arange(80) > 40, along - along[40], 0)
        rows += [
            f"t{number},{1_500_000_000 + number * 900 + i},{a:.7f},{o:.7f}"
            for i, (a, o) in enumerate(zip(lats, lons, strict=True))
        ]
        centres.append((lats[40], lons[40]))
    root.mkdir(parents=True, exist_ok=True)
    (root / "trips.csv").write_text("\n".join(rows) + "\n")
    write_tiles(root / "tiles", *np.array(centres).T)
    folder = root / "captions" / "images"
    folder.mkdir(parents=True)
    annotations = []
    for number in range(trips):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"P{number:04d}.png")
        text = f"This image shows {number + 2} white houses beside a road. Trees stand in the north."
        row = {"image_id": str(number), "filename": f"P{number:04d}.png"}
        annotations.append(row | {"text_input": "Describe this image in detail.", "text_output": text})
    (root / "captions" / "captions.json").write_text(json.dumps({"annotations": annotations}))


def config(root: Path, url: str, **traffic) -> Path:
    """A config file of the whole build."""
    model = f'model = "m"\nbase_url = "{url}"\nbackoff = 0.001\ntimeout = 30\nprompt_price = 1.0\n'
    model += "completion_price = 10.0\n"
    more = "".join(f"{name} = {json.dumps(value)}\n" for name, value in traffic.items())
    path = root / "city.toml"
    path.write_text(
        f'[trajectories]\nsource = ["csv:{root}/trips.csv"]\ntotal = 100\n'
        f'[imagery]\nprovider = "folder"\ntiles = "{root}/tiles"\nzooms = [{ZOOM}]\nsize = 128\n'
        'title = "Test tiles"\nattribution = "(c) nobody"\nlicence = "CC0-1.0"\n'
        "[quality]\nplace_zoom = 16\nmin_score = 2.0\n"
        f'[rsi-instruct]\ncaptions = "{root}/captions"\n{model}[rsi-traffic]\n{model}{more}'
    )
    return path


def files(folder: Path) -> dict[str, bytes]:
    """What a build wrote; logs of calls and of measures hold what came in which order, and locks nothing."""
    skip = ("calls.jsonl", "measures.jsonl", ".lock")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skip
    }
