"""RSI-Traffic: dialogues about traffic on images along GPS trips (paper, Algorithm 2)."""

from datasets_builders import base


class Builder(base.Built):
    """RSI-Traffic. The paper's has 2,344 images; yours has what your build kept, in splits by place.

    Licence: that of the imagery, which stands in every example's "record".
    """

    FILE = "rsi_traffic"
    MANUAL_DOWNLOAD_INSTRUCTIONS = base.built_instructions("rsi_traffic", "rsi-traffic")
