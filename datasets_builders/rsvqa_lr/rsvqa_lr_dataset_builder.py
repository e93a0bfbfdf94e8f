"""RSVQA, low resolution: questions on Sentinel-2 images."""

from datasets_builders import base


class Builder(base.RSVQA):
    """RSVQA-LR. train 57,223, val 10,005, test 10,004 questions on 772 images of 256 px, 10 m. CC-BY-4.0."""

    VARIANT = "lr"
    HOMEPAGE = "https://zenodo.org/records/6344334"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "manual_dir/rsvqa_lr/: LR_split_{train,val,test}_{questions,answers}.json and Images_LR/."
    )
