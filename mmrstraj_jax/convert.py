"""Weights in, weights out.

    python -m mmrstraj_jax.convert import SOURCE OUT    any layout -> our format
    python -m mmrstraj_jax.convert export SOURCE OUT    merged Hugging Face checkpoint (--peft: only the
    adapter)
    python -m mmrstraj_jax.convert verify A B           are these the same weights? exit code 1 if not
    python -m mmrstraj_jax.convert inspect PATH         what is in this file or folder

SOURCE, A and B: a run directory, a folder in our format, of llava-hf or of lmms-lab, or
"siglip=DIR,qwen=DIR,projector=DIR" (or projector=fresh). See docs/weights.md.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mmrstraj_jax.config import AnyResConfig, LoRAConfig, ModelConfig
from mmrstraj_jax.errors import UserError, run_command
from mmrstraj_jax.models.lora import merge_lora
from mmrstraj_jax.models.mmrstraj import MMRSTraj
from mmrstraj_jax.training import run
from mmrstraj_jax.weights import export, native, verify
from mmrstraj_jax.weights.load import load_model, open_source, source_dtype
from mmrstraj_jax.weights.safetensors_io import Reader

DTYPES = ("source", "bfloat16", "float16", "float32")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; see python -m mmrstraj_jax.convert --help")


def _parser() -> _Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m mmrstraj_jax.convert", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("import", "any layout -> our format"),
        ("export", "merged Hugging Face checkpoint, or a PEFT adapter"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("source")
        command.add_argument("out", help="must not exist")
        command.add_argument("--adapter", help="adapter folder that belongs to SOURCE")
        command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    command.add_argument(
        "--serving-policy", metavar="anyres_max_N", help="needed for models trained with tau"
    )
    command.add_argument("--tokenizer", metavar="DIR", help="if it is not beside the weights")
    command.add_argument("--title", default="MM-RSTraj", help="of the model card; default: %(default)s")
    command.add_argument("--max-shard-gb", type=float, default=5.0, help="default: %(default)s")
    command.add_argument(
        "--peft", action="store_true", help="write only the adapter, for transformers + peft"
    )
    command.add_argument("--base", help="with --peft: repository, or folder (compared), of the base")
    command.add_argument("--transformers", choices=tuple(export.RUNTIMES), default="5", help="with --peft")
    command = commands.add_parser("verify", help="compare two sets of weights")
    command.add_argument("a")
    command.add_argument("b")
    command.add_argument("--adapter", help="adapter folder that belongs to A")
    command.add_argument(
        "--serving-policy", help="of the export B, if it was made with one: A is asked so too"
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="a run or adapter is rounded to it"
    )
    command.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference that counts as equal"
    )
    commands.add_parser("inspect", help="what is in a file or folder").add_argument("path")
    return parser


@dataclass
class _Opened:
    model: MMRSTraj
    config: ModelConfig
    anyres: AnyResConfig
    tokenizer_dir: Path | None
    base: str
    layout: str  # of the base
    unused: Mapping = field(default_factory=dict)
    lora: LoRAConfig | None = None
    train_full: tuple[str, ...] = ()
    rebuild: Mapping | None = None  # the run that was merged into the base
    feature_layer: int = 0  # where the base's tower was cut


def _open(source: str, adapter_dir: str | None, dtype: str) -> _Opened:
    if run.is_run(source):
        if adapter_dir is not None:
            raise UserError(
                f"--adapter {adapter_dir}: {source} is a run directory and has its own; drop one of them"
            )
        found = run.open_run(source, dtype=dtype)
        settings, base = found.run_config, found.base["path"]
        return _Opened(
            found.model,
            found.config,
            found.anyres,
            found.tokenizer_dir,
            base,
            found.base["layout"],
            found.unused,
            settings.lora,
            settings.train_full,
            found.base["rebuild"],
            found.base.get("feature_layer", 0),
        )
    loaded = load_model(source, dtype=dtype)
    beside = loaded.tokenizer_dir, source, loaded.layout, loaded.unused
    opened = _Opened(loaded.model, loaded.config, loaded.anyres, *beside)
    if adapter_dir is not None:
        opened.model, adapter = native.load_adapter(
            loaded.model, adapter_dir, base_fingerprint=loaded.fingerprint
        )
        opened.lora, opened.train_full = adapter.lora, adapter.train_full
    return opened


def _peft_base(named: str | None, found: _Opened) -> str:
    """The base that a PEFT adapter names: transformers loads it, and it is what was trained on.

    Raises UserError where that cannot be said of any, or not of the one that was named.
    """
    if named is None:
        why = None
        if found.rebuild is not None:
            why = f"the base is the run {found.rebuild['run']}, merged; export that run"
        elif found.feature_layer:
            why = (
                f"--feature-layer {found.feature_layer} cut the tower of {found.base}; give a llava-hf copy "
                "of it that vision_feature_layer in its config.json"
            )
        elif found.layout != "llava-hf":
            why = f"transformers cannot load the base {found.base}; export it"
        if why:
            raise UserError(f"--peft: {why} and name it with --base DIR, or export merged, without --peft")
        return found.base
    if Path(named).is_dir():
        tensors = export.merged_slices(found.model, found.model.language_model.embed_tokens.weight.dtype)
        # PEFT replaces a part that was trained in full: what the base holds there does not matter.
        full = ("multi_modal_projector.",) if found.train_full else ()
        outputs = (plain or merged for key, merged, plain in tensors if not key.startswith(full))
        if found.rebuild is not None:  # as the export of that run writes it, in the folder's own dtype
            dtype = source_dtype(open_source(named))
            origin = run.open_run(found.rebuild["run"], step=found.rebuild["step"], dtype=dtype)
            outputs = (merged for _, merged, _ in export.merged_slices(origin.model, dtype))
        export.check_base(named, outputs, found.config)
    elif found.rebuild is not None or found.feature_layer:
        raise UserError(
            f"--base {named}: no such folder; this run's base is not the published one, so it is compared"
        )
    return named


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.command == "inspect":
        print(verify.inspect(args.path))
        return 0
    if args.command == "verify":
        return _verify(args)
    if Path(args.out).exists():
        raise UserError(f"{args.out}: exists; nothing is overwritten, name a new folder")
    found = _open(args.source, args.adapter, args.dtype)
    sizes = found.config, found.anyres
    dtype = found.model.language_model.embed_tokens.weight.dtype
    if args.command == "import":
        merge_lora(found.model)
        beside = {"tokenizer_dir": found.tokenizer_dir, "unused": found.unused}
        native.save(found.model, *sizes, args.out, dtype=dtype, **beside)
        print(f"{args.out}: our format, {dtype}, from {args.source}")
    elif args.peft:
        if found.lora is None:
            raise UserError(
                f"--peft: {args.source} has no adapter; expected a run directory, or --adapter DIR"
            )
        base = _peft_base(args.base, found)
        how = {"policy": args.serving_policy, "runtime": args.transformers}
        full = found.train_full
        done = export.export_peft(
            found.model, *sizes, found.lora, args.out, base=base, train_full=full, **how
        )
        print(f"{args.out}: PEFT adapter of {done.num_tensors} tensors for {base}")
    else:
        tokenizer = Path(args.tokenizer) if args.tokenizer else found.tokenizer_dir
        how = {"policy": args.serving_policy, "max_shard_bytes": int(args.max_shard_gb * 1e9)}
        note = f"Base weights: `{found.base}`."
        base = str(run.embedded_weights()) if found.base == run.EMBEDDED else found.base
        done = export.export_hf(
            found.model, *sizes, args.out, tokenizer_dir=tokenizer, dtype=dtype, unused=found.unused,
            title=args.title, notes=(note,), base=base, train_full=found.train_full, **how
        )  # fmt: skip
        lost = f", {done.num_unchanged} of them unchanged by rounding" if done.num_unchanged else ""
        print(
            f"{args.out}: {done.num_tensors} tensors, {done.num_merged} with an adapter merged{lost}; "
            "read back"
        )
    return 0


def _verify(args: argparse.Namespace) -> int:
    with Reader() as reader:
        sides = []
        for path, adapter in ((args.a, args.adapter), (args.b, None)):
            if adapter is None and not run.is_run(path):
                sides.append(verify.tensors_of_files(path, reader))
                continue
            found = _open(path, adapter, args.dtype)
            dtype = np.dtype(found.model.language_model.embed_tokens.weight.dtype)
            sizes = found.config, found.anyres
            sides.append(verify.tensors_of_model(path, found.model, *sizes, dtype, found.tokenizer_dir))
        if args.serving_policy is not None:
            served = export.serving_policy(sides[0].anyres, args.serving_policy)
            sides[0] = replace(sides[0], anyres=served)
        rows = verify.compare(*sides)
    print(verify.table(rows, args.tolerance))
    same = all(row.is_equal(args.tolerance) for row in rows)
    print("equal" if same else "NOT equal")
    return 0 if same else 1


if __name__ == "__main__":
    run_command(main)
