"""Frozen dataclasses as dotted names: the command line's overrides, config.json, tables and differences.

Knows nothing of the package's own settings (config.py): works on any nest of frozen dataclasses whose leaves
are int, float, bool, str, `str | None` or tuples of these.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import math
import textwrap
import traceback
import typing
from pathlib import Path
from typing import Any

from mmrstraj_jax.errors import UserError

# ---- one value ----


def leaf_fields(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> annotation of every leaf field of a config dataclass, in the order of declaration."""
    leaves = {}
    for name, annotation in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            leaves |= leaf_fields(annotation, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = annotation
    return leaves


def get(config: Any, name: str) -> Any:
    """The leaf behind a dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def replace(config: Any, values: dict[str, Any]) -> Any:
    """A copy with the values of these dotted names; all at once: __post_init__ checks the result only."""
    flat, nested = {}, {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            flat[head] = value
    nested = {head: replace(getattr(config, head), rest) for head, rest in nested.items()}
    return dataclasses.replace(config, **flat, **nested)


def _type_name(annotation: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}
    if typing.get_origin(annotation) is tuple:
        element = typing.get_args(annotation)[0]
        return "a list of pairs" if typing.get_args(element) else f"a list, each {_type_name(element)}"
    return names.get(annotation) or " or ".join(_type_name(part) for part in typing.get_args(annotation))


def _parse(name: str, annotation: Any, values: list[str]) -> Any:
    """The words after `--name` as a value of the field's type, by tyro; its boxed report becomes one line."""
    import tyro

    given = " ".join(values) or "(nothing)"
    if typing.get_origin(annotation) is tuple:
        values = [word for value in values for word in value.split(",") if word]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            value = tyro.cli(annotation, args=values, console_outputs=False)
    except SystemExit:
        raise UserError(f"--{name} {given}: expected {_type_name(annotation)}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{name} {given}: expected a finite number")
    return value


def check_range(config: Any, low: float, high: float, *names: str, key: str = "", hint: str = "") -> None:
    """Raises UserError: one of these fields, or an element of a tuple, is below `low` or above `high`.

    Args:
        key: what stands before the field's name: "optim." in a config, "--" for the words of a command.
        hint: follows what was expected.
    """
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high:
                wanted = f"{low} or more" if high == math.inf else f"{low} to {high}"
                field = name.replace("_", "-") if key.startswith("--") else name
                raise UserError(f"{key}{field} {number}: expected {wanted}{hint}")


# ---- the command line ----


def take_option(args: list[str], name: str) -> tuple[str | None, list[str]]:
    """Takes `--name VALUE` or `--name=VALUE` out of the words; (None, args) where it is absent."""
    if sum(word.partition("=")[0] == name for word in args) > 1:
        raise UserError(f"{name}: given more than once; expected it once")
    for i, word in enumerate(args):
        if word.startswith(f"{name}="):
            return word.partition("=")[2], args[:i] + args[i + 1 :]
        if word == name:
            if i + 1 == len(args) or args[i + 1].startswith("--"):
                raise UserError(f"{name}: a value is missing behind it")
            return args[i + 1], args[:i] + args[i + 2 :]
    return None, args


def take_flag(args: list[str], name: str) -> tuple[bool, list[str]]:
    """Takes the word `--name` out of the words, and tells whether it was there."""
    for word in args:
        if word.startswith(f"{name}="):
            raise UserError(f"{word}: expected {name} alone, it takes no value")
    return name in args, [word for word in args if word != name]


def overrides(args: list[str], cls: type) -> dict[str, Any]:
    """`--name VALUE` words as {dotted field name: value}, in words or with `=`; names with - or _.

    Lists are separate words, or have commas, or come with the option repeated. Of a repeated single value the
    last one counts. Raises UserError: unknown option (with a near name), value of another type.
    """
    leaves = leaf_fields(cls)
    words: dict[str, list[str]] = {}
    name = None
    for word in args:
        if not word.startswith("--"):
            if name is None:
                raise UserError(f"{word!r}: expected --FIELD VALUE, e.g. --steps 100")
            words[name].append(word)
            continue
        key, _, value = word[2:].partition("=")
        name = key.replace("-", "_")
        if name.removeprefix("no_") in leaves and leaves[name.removeprefix("no_")] is bool and not value:
            value = str(not name.startswith("no_"))
            name = name.removeprefix("no_")
        if name not in leaves:
            nearest = {leaf.rpartition(".")[2]: leaf for leaf in leaves} | {leaf: leaf for leaf in leaves}
            near = [nearest[each].replace("_", "-") for each in difflib.get_close_matches(name, nearest, 1)]
            hint = f": did you mean --{near[0]}?" if near else ";"
            raise UserError(f"unknown option --{key}{hint} --help lists all of them")
        if typing.get_origin(leaves[name]) is not tuple:
            words[name] = []  # the last one counts, as everywhere; lists grow
        words.setdefault(name, []).extend([value] if value else [])
    # `--merge-init` is already True; a value behind it replaces that
    words = {name: w[-1:] if leaves[name] is bool else w for name, w in words.items()}
    return {name: _parse(name.replace("_", "-"), leaves[name], values) for name, values in words.items()}


# ---- a file that makes settings ----


def call_file(path: Path, name: str, *args: Any) -> Any:
    """`name(*args)` of a Python file; None where it has no such function.

    Raises UserError: the file cannot be run, or the function fails; names the line of the file.
    """
    spec = importlib.util.spec_from_file_location(f"mmrstraj_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, name)(*args) if hasattr(module, name) else None
    except UserError:  # a setting with a bad value: the message names it
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
        line = lines[-1] if lines else getattr(error, "lineno", 1)  # a SyntaxError comes before any frame
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} line {line}: {said}; correct the file") from error


# ---- a run's config.json ----


def to_dict(config: Any) -> Any:
    """A config dataclass as what json.load gives back: nested dicts, lists for tuples."""
    if isinstance(config, tuple):
        return [to_dict(value) for value in config]
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return config


def _from_json(value: Any, annotation: Any, where: str) -> Any:
    if dataclasses.is_dataclass(annotation):
        return from_dict(value, annotation, where)
    kind, args = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is tuple and isinstance(value, list):
        elements = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(elements) == len(value):
            pairs = zip(value, elements, strict=True)
            return tuple(_from_json(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(pairs))
    elif kind is not tuple and args and type(value) in args:
        return value
    elif annotation is float and type(value) in (int, float):
        return float(value)
    elif type(value) is annotation:
        return value
    raise UserError(f"{where}: {value!r}, expected {_type_name(annotation)}")


def from_dict(data: dict[str, Any], cls: type, where: str) -> Any:
    """The inverse of `to_dict`, strict: every field, none else, of its type, or UserError naming the key."""
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected an object with the fields of {cls.__name__}")
    annotations = typing.get_type_hints(cls)
    missing, unknown = annotations.keys() - data.keys(), data.keys() - annotations.keys()
    for problem, names in (("missing", missing), ("unknown", unknown)):
        if names:
            raise UserError(f"{where}: {problem} {', '.join(sorted(names))}: edited, or of another version")
    return cls(**{name: _from_json(data[name], a, f"{where}: {name}") for name, a in annotations.items()})


def diff(old: Any, new: Any) -> list[str]:
    """One line per leaf that differs: "optim.projector_lr: 5e-05 -> 0.0001"."""
    pairs = [(name, get(old, name), get(new, name)) for name in leaf_fields(type(old))]
    return [f"{name}: {_text(a)} -> {_text(b)}" for name, a, b in pairs if a != b]


def _text(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return " ".join("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value) or "(none)"


def format_config(config: Any) -> str:
    """The table of --print-config: an aligned line per field in the order of declaration; long lists wrap."""
    names = leaf_fields(type(config))
    width = max(map(len, names)) + 2
    lines = []
    for name in names:
        wrapped = textwrap.wrap(_text(get(config, name)), 100 - width) or [""]
        labels = [name] + [""] * (len(wrapped) - 1)
        lines += [f"{a:<{width}}{b}".rstrip() for a, b in zip(labels, wrapped, strict=True)]
    return "\n".join(lines)
