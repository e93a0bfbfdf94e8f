"""Where measured items are kept: one JSON file for each command, device, size, dtype and machine.

A file is {device, size, dtype, machine, host, results}. A result is one item and its rivals in one run, with
its own `run`: command, date, versions, limits, pairs, share of other work, and `code`, the fingerprint of the
package's code that was timed.
"""

import ast
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mmrstraj_jax
from speed.machine import slug

_PACKAGE = Path(mmrstraj_jax.__file__).parent
_MODEL = ("models/layers.py", "models/attention.py")
_TOWER = ("models/siglip.py", "models/projector.py")
_DECODER = ("models/qwen2.py",)
CODE = {  # what of the package an item's time depends on
    "vision": (*_MODEL, *_TOWER),
    "prefill": (*_MODEL, *_DECODER),
    "decode": (*_MODEL, *_DECODER, "inference/decoding.py", "inference/sampling.py"),
    "train": (
        *(*_MODEL, *_TOWER, *_DECODER, "models/lora.py", "models/token_reduction.py", "models/mmrstraj.py"),
        *("training/loss.py", "training/step.py", "training/optimizer.py"),
    ),
}
CODE |= {"stream": CODE["train"], "answer": CODE["decode"], "transfer": ("models/siglip.py",)}
HOST_CODE = (
    *("data/anyres.py", "data/images.py", "data/collate.py", "data/loader.py", "data/records.py"),
    *("data/rowfiles.py", "data/chat.py", "data/schedule.py"),
)
CAPTION_CODE = ("evaluation/captions.py", "evaluation/ptb.py", "evaluation/java.py")


def _tree(node: Any) -> Any:
    """Code as nested lists, without comments, docstrings and what only some Python versions' ast has."""
    if isinstance(node, list):
        docstring = (
            bool(node)
            and isinstance(node[0], ast.Expr)
            and isinstance(node[0].value, ast.Constant)
            and isinstance(node[0].value.value, str)
        )
        return [_tree(each) for each in node[docstring:]]
    if isinstance(node, ast.AST):
        fields = [_tree(value) for _, value in ast.iter_fields(node) if value not in (None, [])]
        return [type(node).__name__, *fields]
    return repr(node)


def fingerprint(files: Iterable[str]) -> str:
    """12 hex digits that change where the code of the package's files does."""
    trees = [_tree(ast.parse((_PACKAGE / name).read_text(encoding="utf-8"))) for name in sorted(files)]
    return hashlib.sha256(json.dumps(trees).encode()).hexdigest()[:12]


@functools.cache
def code_of(kind: str) -> str:
    """The fingerprint of what an item of this kind runs."""
    return fingerprint(CODE[kind])


def file_of(folder: Path, kind: str, device: str, size: str, dtype: str, machine: str) -> Path:
    """kind: of the command, "speed" or "wins"."""
    return folder / f"{kind}-{device}-{size}-{dtype}-{slug(machine)}.json"


def read(path: Path) -> list[dict[str, Any]]:
    """The results of a file; none where there is no file yet."""
    return json.loads(path.read_text())["results"] if path.exists() else []


def fresh(result: dict[str, Any]) -> bool:
    """Whether the code that was timed is still what the package has."""
    return result["run"]["code"] == code_of(result["item"]["kind"])


def missing(path: Path, item: dict, rivals: list[str], run: dict[str, Any]) -> list[str]:
    """The rivals of which this file has no figure by the same code and versions, of as many rounds."""
    have = set()
    for result in read(path):
        there = result["run"]
        same = result["item"] == item and fresh(result) and there["versions"] == run["versions"]
        if same and there["pairs"] >= run["pairs"]:
            have |= set(result["ratios"])
    return [rival for rival in rivals if rival not in have]


def add(path: Path, head: dict[str, Any], result: dict[str, Any]) -> None:
    """Writes a result into its file, in place of the same item's older figures of the same rivals."""
    kept, measured = [], {*result["ratios"], *result["refused"]}
    for old in read(path):
        if old["item"] == result["item"]:
            for part in ("sides", "ratios", "refused", "relative_error", "from_float32"):
                old[part] = {name: value for name, value in old.get(part, {}).items() if name not in measured}
            if not old["ratios"] and not old["refused"]:
                continue
        kept.append(old)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = json.dumps(head | {"results": [*kept, result]}, indent=1) + "\n"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(whole)
    unfinished.replace(path)
