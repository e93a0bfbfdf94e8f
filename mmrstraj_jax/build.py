"""Builds RSI-Instruct and RSI-Traffic: from GPS trips, imagery and captions to instruction data.

    python -m mmrstraj_jax.build STEP --out DIR [--config city.toml] [--FIELD VALUE ...]

    trajectories   reads trips of eight formats, cleans them, keeps a stratified sample
    imagery        an image with its record for every anchor of every trip
    quality        scores, rejects and splits the images by place
    rsi-instruct   captions -> conversations (Algorithm 1)
    rsi-traffic    images -> conversations about traffic (Algorithm 2)
    review         people's verdicts: export, import, agreement, the accepted set
    statistics     Figures 2, 3 and Table 1 of the paper for any data sets: NAME=FILE ... --out DIR
    all            the five steps before review, of which the config has a table

    --plan         of rsi-*: calls, tokens and cost; sends nothing
    --preview N    of rsi-*: makes the first N samples and prints them
    --print-config shows the step's settings and stops

A config is a TOML file with a table per step; options win over it. A step that is finished does nothing, a
killed one goes on, one with other settings is refused. Keys come from the environment only.
"""

import difflib
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrstraj_jax import settings
from mmrstraj_jax.construction import (
    candidates,
    review,
    rsi_instruct,
    rsi_traffic,
    selection,
    statistics_report,
    windows,
)
from mmrstraj_jax.construction.candidates import Trajectories
from mmrstraj_jax.construction.dataset import Look
from mmrstraj_jax.construction.manifest import load
from mmrstraj_jax.construction.review import Review
from mmrstraj_jax.construction.rsi_instruct import Instruct
from mmrstraj_jax.construction.rsi_traffic import Traffic
from mmrstraj_jax.construction.selection import Quality
from mmrstraj_jax.construction.windows import Imagery
from mmrstraj_jax.errors import UserError, run_command
from mmrstraj_jax.settings import take_flag, take_option


@dataclass(frozen=True)
class Build:
    """A whole build: the settings of every step."""

    trajectories: Trajectories = Trajectories()
    imagery: Imagery = Imagery()
    quality: Quality = Quality()
    rsi_instruct: Instruct = Instruct()
    rsi_traffic: Traffic = Traffic()
    review: Review = Review()


# step -> what it does with (folder of the build, its settings, look)
STEPS: dict[str, Callable[[Path, Any, Look], None]] = {
    "trajectories": lambda out, config, look: candidates.run(out / "trajectories", config),
    "imagery": lambda out, config, look: windows.run(out / "imagery", out / "trajectories", config),
    "quality": lambda out, config, look: selection.run(
        out / "quality", out / "trajectories", out / "imagery", config
    ),
    "rsi-instruct": lambda out, config, look: rsi_instruct.run(out / "rsi-instruct", config, look),
    "rsi-traffic": lambda out, config, look: rsi_traffic.run(
        out / "rsi-traffic", out / "imagery", out / "quality", config, look
    ),
    "review": lambda out, config, look: review.run(out, config),
}


def _words(path: str, step: str) -> tuple[list[str], set[str]]:
    """A config file as words of the command line (one parser for both), and the steps it has a table for."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; expected a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {error}; expected TOML") from None
    for name, table in tables.items():
        if name not in STEPS or not isinstance(table, dict):
            raise UserError(f"--config {path}: [{name}] is no step; expected tables {', '.join(STEPS)}")
        known = settings.leaf_fields(type(getattr(Build(), name.replace("-", "_"))))
        for key in (word[2:] for word in _flat(table, "") if word.startswith("--")):
            if key.replace("-", "_") not in known:
                (best,) = difflib.get_close_matches(key, known, 1, 0.0)
                raise UserError(f"--config {path}: [{name}] has no setting {key}; did you mean {best}?")
    chosen = tables if step == "all" else tables.get(step, {})
    return list(_flat(chosen, "")), set(tables)


def _flat(table: dict[str, Any], prefix: str):
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}"
            yield from (str(item) for item in (value if isinstance(value, list) else [value]))


def main(args: list[str]) -> int:
    """The command. Raises UserError for whatever the user can put right."""
    help_wanted, args = take_flag(["--help" if word == "-h" else word for word in args], "--help")
    step = args[0] if args and not args[0].startswith("--") else ""
    kind = Build if step in ("all", "") else type(getattr(Build(), step.replace("-", "_"), None))
    if help_wanted or not args:
        print(statistics_report.__doc__ if step == "statistics" else __doc__)
        if kind is not type(None):
            print(f"Settings of {step or 'all'} and their defaults:\n\n{settings.format_config(kind())}")
        return 0
    if step == "statistics":
        statistics_report.command(args[1:])
        return 0
    if step not in (*STEPS, "all"):
        raise UserError(
            f"step {step!r}: expected one of {', '.join(STEPS)}, statistics, all; --help explains them"
        )
    args = args[1:]
    out, args = take_option(args, "--out")
    config_path, args = take_option(args, "--config")
    preview, args = take_option(args, "--preview")
    plan, args = take_flag(args, "--plan")
    show, args = take_flag(args, "--print-config")
    words, tables = _words(config_path, step) if config_path else ([], set(STEPS))
    # not the words of both in one: a list's words would add up, and options win
    config = settings.replace(kind(), settings.overrides(words, kind) | settings.overrides(args, kind))
    if show:
        print(settings.format_config(config))
        return 0
    if out is None:
        raise UserError("--out DIR: expected the folder of the build")
    if (plan or preview) and step not in ("rsi-instruct", "rsi-traffic"):
        raise UserError("--plan and --preview: go with the steps rsi-instruct and rsi-traffic")
    if preview is not None and not (preview.isdecimal() and int(preview)):
        raise UserError(f"--preview {preview}: expected a number of samples")
    look = Look(plan, int(preview or 0))
    steps = [name for name in STEPS if name in tables and name != "review"] if step == "all" else [step]
    for name in steps:
        part = getattr(config, name.replace("-", "_")) if step == "all" else config
        report = Path(out) / name / "manifest.json"
        before = report.exists() and load(report)["status"] == "finished"
        try:
            STEPS[name](Path(out), part, look)
        except KeyboardInterrupt:
            raise UserError(f"{name}: interrupted; the same command goes on where it was") from None
        except OSError as error:
            raise UserError(f"{error.filename or out}: {error.strerror}; mend it and run again") from None
        if not look and name != "review":
            print(f"{name}: {'finished before, nothing to do: ' if before else ''}{report}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_command(main)
