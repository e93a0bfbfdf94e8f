"""TFDS builders of every data set of this project, without TensorFlow; docs/datasets.md says how to use them.

import datasets_builders  # registers them
builder = tfds.builder_cls("rsicap")(data_dir=DIR)
"""

import importlib

NAMES = (
    "nwpu_captions",
    "rsi_instruct",
    "rsi_traffic",
    "rsicap",
    "rsicd",
    "rsieval",
    "rsvqa_hr",
    "rsvqa_lr",
    "sydney_captions",
    "synthcity",
    "ucm_captions",
)
for _name in NAMES:
    importlib.import_module(f"{__name__}.{_name}.{_name}_dataset_builder")
