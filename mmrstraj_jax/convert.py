"""Weights in, weights out.

    python -m mmrstraj_jax.convert import SOURCE OUT    any layout -> our format
    python -m mmrstraj_jax.convert export SOURCE OUT    merged Hugging Face checkpoint (--peft: only the
    adapter)
    python -m mmrstraj_jax.convert verify A B           are these the same weights? exit code 1 if not
    python -m mmrstraj_jax.convert inspect PATH         what is in this file or folder

SOURCE, A and B: a run directory, a folder in our format, of llava-hf or of lmms-lab, or
"siglip=DIR,qwen=DIR,projector=DIR" (or projector=fresh), or embedded:tiny. See docs/weights.md.
"""

import argparse
import math
import os
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
from mmrstraj_jax.weights.safetensors_io import Reader, whole_folder

DTYPES = ("source", "bfloat16", "float16", "float32")
# Options of `export` that mean something without --peft only, and with it only.
MERGED_ONLY, PEFT_ONLY = ("tokenizer", "title", "max_shard_gb"), ("base", "transformers")


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs):
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see python -m mmrstraj_jax.convert --help")


def _number(text: str) -> float:
    """0 or more, and finite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of 0 or more")
    return value


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
        command.add_argument("--weights", help="where the base weights of the run SOURCE are now, if moved")
        command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    command.add_argument(
        "--serving-policy", metavar="anyres_max_N", help="needed for models trained with tau"
    )
    command.add_argument("--tokenizer", metavar="DIR", help="if it is not beside the weights")
    command.add_argument("--title", help="of the model card; default: MM-RSTraj")
    command.add_argument("--max-shard-gb", type=_number, help="of a weight file; default: 5")
    command.add_argument(
        "--peft", action="store_true", help="write only the adapter, for transformers + peft"
    )
    command.add_argument("--base", help="with --peft: repository, or folder (compared), of the base")
    command.add_argument(
        "--transformers", choices=tuple(export.RUNTIMES), help="with --peft: who loads it; default: 5"
    )
    command = commands.add_parser("verify", help="compare two sets of weights")
    command.add_argument("a")
    command.add_argument("b")
    command.add_argument("--adapter", help="adapter folder that belongs to A")
    command.add_argument("--weights", help="where the base weights of the run A are now, if moved")
    command.add_argument(
        "--serving-policy", help="of the export B, if it was made with one: A is asked so too"
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="a run or adapter is rounded to it"
    )
    command.add_argument(
        "--tolerance", type=_number, default=0.0, help="largest difference that counts as equal"
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
    fresh: tuple[str, ...] = ()  # leaves that nothing has filled


def _place(source: str) -> str:
    """The embedded weights by the name that a run's base.json and the messages give them."""
    return str(run.embedded_weights()) if source == run.EMBEDDED else source


def _open(source: str, adapter_dir: str | None, dtype: str, weights: str | None = None) -> _Opened:
    if weights is not None and not run.is_run(source):
        raise UserError(f"--weights {weights}: {source} is no run directory, and names its weights itself")
    source = _place(source)
    if run.is_run(source):
        if adapter_dir is not None:
            raise UserError(
                f"--adapter {adapter_dir}: {source} is a run directory and has its own; drop one of them"
            )
        moved = {} if weights is None else {"weights": weights}
        found = run.open_run(source, dtype=dtype, **moved)
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
            found.fresh,
        )
    loaded = load_model(source, dtype=dtype)
    beside = loaded.tokenizer_dir, source, loaded.layout, loaded.unused
    opened = _Opened(loaded.model, loaded.config, loaded.anyres, *beside, fresh=loaded.fresh)
    if adapter_dir is not None:
        opened.model, adapter = native.load_adapter(
            loaded.model, adapter_dir, base_fingerprint=loaded.fingerprint
        )
        opened.lora, opened.train_full = adapter.lora, adapter.train_full
    return opened


def _peft_base(named: str | None, found: _Opened, weights: str | None) -> str:
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
            moved = {} if weights is None else {"weights": weights}
            origin = run.open_run(found.rebuild["run"], step=found.rebuild["step"], dtype=dtype, **moved)
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
    if os.path.lexists(args.out):
        raise UserError(f"{args.out}: exists; nothing is overwritten, name a new folder")
    if args.command == "export":
        _check_options(args)
    found = _open(args.source, args.adapter, args.dtype, args.weights)
    is_fresh = any(name.startswith("multi_modal_projector.") for name in found.fresh)
    untrained = "; its projector is fresh: nothing has trained it, stage 0 does" if is_fresh else ""
    sizes = found.config, found.anyres
    dtype = found.model.language_model.embed_tokens.weight.dtype
    if args.command == "import":
        merge_lora(found.model)
        beside = {"tokenizer_dir": found.tokenizer_dir, "unused": found.unused}
        beside["fresh"] = found.fresh if is_fresh else ()
        with whole_folder(args.out) as folder:
            native.save(found.model, *sizes, folder, dtype=dtype, **beside)
        print(f"{args.out}: our format, {dtype}, from {args.source}{untrained}")
    elif args.peft:
        if found.lora is None:
            raise UserError(
                f"--peft: {args.source} has no adapter; expected a run directory, or --adapter DIR"
            )
        base = _peft_base(args.base, found, args.weights)
        how = {"policy": args.serving_policy, "runtime": args.transformers or "5"}
        full = found.train_full
        done = export.export_peft(
            found.model, *sizes, found.lora, args.out, base=base, train_full=full, **how
        )
        print(f"{args.out}: PEFT adapter of {done.num_tensors} tensors for {base}")
    else:
        tokenizer = Path(args.tokenizer) if args.tokenizer else found.tokenizer_dir
        shard_gb = 5.0 if args.max_shard_gb is None else args.max_shard_gb
        how = {"policy": args.serving_policy, "max_shard_bytes": int(shard_gb * 1e9)}
        notes = [f"Base weights: `{found.base}`."]
        if is_fresh:
            notes.append("The projector is fresh: nothing has trained it, and answers are noise.")
        base = _place(found.base)
        done = export.export_hf(
            found.model, *sizes, args.out, tokenizer_dir=tokenizer, dtype=dtype, unused=found.unused,
            title=args.title or "MM-RSTraj", notes=tuple(notes), base=base, train_full=found.train_full, **how
        )  # fmt: skip
        lost = f", {done.num_unchanged} of them unchanged by rounding" if done.num_unchanged else ""
        print(
            f"{args.out}: {done.num_tensors} tensors, {done.num_merged} with an adapter merged{lost}; "
            f"read back{untrained}"
        )
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raises UserError: an option that the other kind of export would not look at."""
    for name in MERGED_ONLY if args.peft else PEFT_ONLY:
        if getattr(args, name) is not None:
            how = (
                "belongs to a merged checkpoint, and --peft writes none; drop one of them"
                if args.peft
                else "belongs to an adapter; give --peft too, or drop it"
            )
            raise UserError(f"--{name.replace('_', '-')}: {how}")


def _verify(args: argparse.Namespace) -> int:
    with Reader() as reader:
        sides = []
        for path, adapter, weights in ((args.a, args.adapter, args.weights), (args.b, None, None)):
            if adapter is weights is None and not run.is_run(path):
                sides.append(verify.tensors_of_files(_place(path), reader))
                continue
            found = _open(path, adapter, args.dtype, weights)
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
