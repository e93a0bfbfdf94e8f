"""Writes images.json: SHA-256 of views, checked against transformers: python tests/golden/make_images.py"""

import hashlib
import json
import pathlib
import sys

import numpy as np
from transformers.models.llava_onevision import image_processing_pil_llava_onevision as reference

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import data_case  # noqa: E402

from mmrstraj_jax.config import AnyResConfig  # noqa: E402
from mmrstraj_jax.data import anyres, images  # noqa: E402

SIZES = [(1, 40), (120, 9), (97, 103), (150, 220), (384, 385)]


def main() -> None:
    cases = []
    for view_size, kind in [(104, "anyres"), (112, "anyres"), (104, "square")]:
        policy = AnyResConfig(policy="anyres_max_9").for_views(view_size, 14)
        processor = reference.LlavaOnevisionImageProcessorPil(
            size={"height": view_size, "width": view_size},
            image_grid_pinpoints=[list(pair) for pair in policy.grid_pinpoints],
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            do_rescale=False,
            do_normalize=False,
        )
        for width, height in SIZES:
            picture = data_case.picture(width, height)
            square = kind == "square"
            plan = anyres.plan_multi_image(policy) if square else anyres.plan(width, height, policy)
            views = images.views(picture, plan, view_size)
            # two images in one row: the reference pads each to a square
            expected = processor([[picture, picture]] if square else picture, return_tensors="np")
            np.testing.assert_array_equal(views.transpose(0, 3, 1, 2), expected["pixel_values"][0])
            digest = hashlib.sha256(views.tobytes()).hexdigest()
            case = {"width": width, "height": height, "view_size": view_size, "kind": kind}
            cases.append(case | {"shape": list(views.shape), "sha256": digest})
    (HERE / "images.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
