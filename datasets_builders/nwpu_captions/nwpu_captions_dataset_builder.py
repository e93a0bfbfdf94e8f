"""NWPU-Captions: five sentences for every image."""

from datasets_builders import base
from mmrstraj_jax.evaluation import readers


class Builder(base.Captions):
    """NWPU-Captions. train 25,200, val 3,150, test 3,150 images, five captions each. No licence stated."""

    FILE = "dataset_nwpu.json"
    READER = staticmethod(readers.nwpu)
    LICENCE = "None stated"
    HOMEPAGE = "https://github.com/HaiyanHuang98/NWPU-Captions"
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir/nwpu_captions/: dataset_nwpu.json and NWPU_images/<class>/."
