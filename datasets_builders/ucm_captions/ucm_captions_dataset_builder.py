"""UCM-Captions: five sentences for every image."""

from datasets_builders import base


class Builder(base.Captions):
    """UCM-Captions. train 1,680, val 210, test 210 images, five captions each.

    Images: USGS, public domain; captions: no licence stated.
    """

    FILE = "dataset_ucm.json"
    LICENCE = "Images public domain (USGS); captions: none stated"
    HOMEPAGE = "https://github.com/201528014227051/RSICD_optimal"
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir/ucm_captions/: dataset_ucm.json and imgs/."
