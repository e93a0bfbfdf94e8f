"""RSICap: detailed captions of aerial images."""

from pathlib import Path

from datasets_builders import base
from mmrstraj_jax.evaluation import readers


class Builder(base.ImageText):
    """RSICap (RSGPT). train: 2,585 images with one caption each. No licence stated; images from DOTA."""

    LICENCE = "None stated; images from DOTA: academic use only"
    HOMEPAGE = "https://github.com/Lavender105/RSGPT"
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir/rsicap/: captions.json and images/ of RSGPT."
    FEATURES = {"prompt": base.Text(), "captions": base.tfds.features.Sequence(base.Text())}

    def examples(self, folder: Path):
        def train():
            for item in readers.rsicap(folder):
                yield item.id, item.images[0], {"prompt": item.question, "captions": list(item.references)}

        return {"train": train}
