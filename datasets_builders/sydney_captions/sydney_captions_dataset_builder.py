"""Sydney-Captions: five sentences for every image."""

from datasets_builders import base


class Builder(base.Captions):
    """Sydney-Captions. train 497, val 58, test 58 images, five captions each. No licence stated."""

    FILE = "dataset_sydney.json"
    LICENCE = "None stated"
    HOMEPAGE = "https://github.com/201528014227051/RSICD_optimal"
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir/sydney_captions/: dataset_sydney.json and imgs/."
