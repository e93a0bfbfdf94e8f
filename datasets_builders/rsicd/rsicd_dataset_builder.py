"""RSICD: five sentences for every image."""

from datasets_builders import base


class Builder(base.Captions):
    """RSICD. train 8,734, val 1,094, test 1,093 images, five captions each. No licence stated."""

    FILE = "dataset_rsicd.json"
    LICENCE = "None stated; research use with citation"
    HOMEPAGE = "https://github.com/201528014227051/RSICD_optimal"
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir/rsicd/: dataset_rsicd.json and imgs/."
