"""RSVQA, high resolution: questions on aerial images."""

from datasets_builders import base


class Builder(base.RSVQA):
    """RSVQA-HR. train 625,340, val 102,843, test 222,684, test_phili 105,647 questions, 15 cm. CC-BY-4.0."""

    VARIANT = "hr"
    HOMEPAGE = "https://zenodo.org/records/6344367"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "manual_dir/rsvqa_hr/: USGS_split_{train,val,test,test_phili}_{questions,answers}.json and Data/."
    )
