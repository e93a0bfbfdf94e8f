"""RSI-Instruct: dialogues grown from captions (paper, Algorithm 1)."""

from datasets_builders import base


class Builder(base.Built):
    """RSI-Instruct. The paper's has 2,585 images; yours has what your build kept.

    Licence: the images' and captions' own.
    """

    FILE = "rsi_instruct"
    MANUAL_DOWNLOAD_INSTRUCTIONS = base.built_instructions("rsi_instruct", "rsi-instruct")
