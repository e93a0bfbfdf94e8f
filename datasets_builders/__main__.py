"""Builds data sets for TFDS, without TensorFlow (which the command `tfds build` imports).

python -m datasets_builders rsicap ucm_captions --manual-dir downloads/ --data-dir ~/tensorflow_datasets
"""

import sys
from pathlib import Path

import tensorflow_datasets as tfds

import datasets_builders
from mmrstraj_jax.errors import CommandParser, UserError, run_command


def main(args: list[str]) -> int:
    """The command. Raises UserError: an unknown data set, files that are missing or broken."""
    parser = CommandParser("datasets_builders", __doc__)
    parser.prog = "python -m datasets_builders"
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(datasets_builders.NAMES))
    parser.add_argument("--manual-dir", metavar="DIR", help="holds a folder NAME with each set's files")
    parser.add_argument("--data-dir", metavar="DIR", help="default ~/tensorflow_datasets")
    options = parser.parse_args(args)
    for name in options.names:
        if name not in datasets_builders.NAMES:
            raise UserError(f"{name}: expected some of {', '.join(datasets_builders.NAMES)}")
        builder = tfds.builder_cls(name)(data_dir=options.data_dir)
        manual = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        if manual and (options.manual_dir is None or not (Path(options.manual_dir) / name).is_dir()):
            raise UserError(f"{name}: expected its files in --manual-dir: {manual}")
        if Path(builder.data_path).exists():
            # TFDS takes what is there, whatever became of the files it was made from
            print(
                f"{builder.data_path}: built before, not read again; remove it to build it anew",
                file=sys.stderr,
            )
        config = tfds.download.DownloadConfig(manual_dir=options.manual_dir)
        builder.download_and_prepare(download_config=config)
        counts = ", ".join(f"{split} {info.num_examples:,}" for split, info in builder.info.splits.items())
        print(f"{builder.data_path}: {counts}")
    return 0


if __name__ == "__main__":
    run_command(main)
