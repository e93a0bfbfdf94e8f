"""The subcommands of `python -m mmrstraj_jax.evaluate`: several models, or one model several times."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mmrstraj_jax import evaluate as command
from mmrstraj_jax import jsonl
from mmrstraj_jax.errors import CommandParser, UserError
from mmrstraj_jax.evaluation import compare as comparing
from mmrstraj_jax.evaluation import pipeline
from mmrstraj_jax.evaluation import report as pages
from mmrstraj_jax.evaluation.grids import Grid, percent
from mmrstraj_jax.evaluation.tasks import TEXTS


def _parser(name: str) -> CommandParser:
    return CommandParser(f"evaluate {name}", f"evaluate {name} {command.STUDIES[name]}")


def _pair(name: str, args: list[str], *, judged: bool = False):
    parser = _parser(name)
    parser.add_argument("a", metavar="DIR_A", type=Path, help="a folder that evaluate wrote")
    parser.add_argument("b", metavar="DIR_B", type=Path)
    if judged:
        command.judge_options(parser)
        parser.add_argument(
            "--out", metavar="DIR", type=command.folder, required=True, help="the replies and the table"
        )
    options = parser.parse_args(args)
    return options, comparing.read_result(options.a), comparing.read_result(options.b)


def compare(args: list[str]) -> int:
    _, a, b = _pair("compare", args)
    print(comparing.compare(a, b).text())
    return 0


def forgetting(args: list[str]) -> int:
    _, before, after = _pair("forgetting", args)
    print(comparing.forgetting(before, after).text())
    return 0


def _named(texts: Sequence[str]) -> list[comparing.Result]:
    pairs = [text.partition("=")[::2] if "=" in text else (None, text) for text in texts]
    return [comparing.read_result(Path(folder), name) for name, folder in pairs]


def report(args: list[str]) -> int:
    parser = _parser("report")
    parser.add_argument("results", metavar="[NAME=]DIR", nargs="+", help="folders that evaluate wrote")
    parser.add_argument("--out", metavar="DIR", type=command.folder, required=True)
    options = parser.parse_args(args)
    print(pages.write(_named(options.results), options.out))
    return 0


# ---- judged by a model or by people ----


def _judge(options):
    if options.judge is None:
        raise UserError("--judge NAME: which model judges?")
    return command.judge(options, options.out)


def _write_judged(out: Path, name: str, grid: Grid, rows: list[dict]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.jsonl").write_text("".join(map(jsonl.dump, rows)), encoding="utf-8")
    (out / f"{name}.md").write_text(grid.markdown() + "\n", encoding="utf-8")
    print(grid.text())


def prefer(args: list[str]) -> int:
    from mmrstraj_jax.evaluation import rubric as grading

    options, a, b = _pair("prefer", args, judged=True)
    _write_judged(options.out, "prefer", *grading.prefer(a, b, _judge(options)))
    return 0


def rubric(args: list[str]) -> int:
    from mmrstraj_jax.evaluation import rubric as grading

    parser = _parser("rubric")
    parser.add_argument("results", metavar="[NAME=]DIR", nargs="*", help="folders that evaluate wrote")
    command.judge_options(parser)
    parser.add_argument(
        "--out", metavar="DIR", type=command.folder, help="with --judge: the replies and the table"
    )
    parser.add_argument("--sheet", metavar="FILE", type=Path, help="write a CSV for people, names hidden")
    parser.add_argument("--filled", metavar="FILE", type=Path, help="read such a sheet, filled in")
    options = parser.parse_args(args)
    if sum(x is not None for x in (options.judge, options.sheet, options.filled)) != 1:
        raise UserError("expected one of --judge NAME, --sheet FILE and --filled FILE")
    if options.filled is not None:
        print(grading.read_sheet(options.filled).text())
        return 0
    if not options.results or (options.judge is not None and options.out is None):
        raise UserError("expected folders that evaluate wrote, and --out DIR with --judge")
    results = _named(options.results)
    if options.sheet is not None:
        print(grading.write_sheet(results, options.sheet))
        return 0
    _write_judged(options.out, "rubric", *grading.grade(results, _judge(options)))
    return 0


# ---- several evaluations ----


def corruption(args: list[str]) -> int:
    from mmrstraj_jax.evaluation import corruption as corrupting

    parser = _parser("corruption")
    command.source_options(parser)
    command.task_options(parser)
    parser.add_argument("--out", metavar="DIR", type=command.folder, required=True)
    parser.add_argument("--kinds", nargs="+", choices=corrupting.KINDS, default=list(corrupting.KINDS))
    parser.add_argument(
        "--severities", nargs="+", type=int, choices=corrupting.SEVERITIES, default=corrupting.SEVERITIES
    )
    options = parser.parse_args(args)
    command.check_source(options)
    task, items, decode, protocol = command.asked(options)
    model = pipeline.answerer(command.source(options), task, decode)
    grid = corrupting.study(
        task, items, options.out, model, command.scoring(options, task, options.out), protocol,
        kinds=options.kinds, severities=options.severities,
    )  # fmt: skip
    print(grid.text())
    return 0


def _chain(run: Path) -> list[tuple[str, pipeline.Source]]:
    """The base weights of a run, then every run that led to it, then itself. Raises UserError."""
    from mmrstraj_jax.training.run import EMBEDDED, embedded_weights, is_run, read_json

    runs: list[Path] = []
    while True:
        if not is_run(run):
            raise UserError(f"{run}: not a run directory (of --run, or one that it started from)")
        base = read_json(run / "base.json")
        runs.insert(0, run)
        if base["init_from"] is None:
            break
        run = Path(base["init_from"]["run"])
    names = ["base", *(run.absolute().name for run in runs)]  # of folders: a/run and b/run need two
    found = [
        (name if names.count(name) == 1 else f"{number}-{name}", pipeline.Source(run=str(run)))
        for number, (name, run) in enumerate(zip(names[1:], runs, strict=True), 1)
    ]
    weights = str(embedded_weights()) if base["path"] == EMBEDDED else base["path"]
    return [("base", pipeline.Source(weights=weights)), *found]


SUITE = ("synthcity", "synthtraffic-bench")  # tasks that need no data


def suite(args: list[str]) -> int:
    """Base and stages in order, each task's folder under out/<task>/<name>, then the page."""
    parser = _parser("suite")
    parser.add_argument("--run", metavar="DIR", type=Path, required=True, help="the last stage")
    parser.add_argument("--out", metavar="DIR", type=command.folder, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(SUITE), choices=SUITE)
    parser.add_argument(
        "--limit", type=int, default=400, help="items of each task, evenly drawn (default 400)"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args(args)
    results, first = [], command.place().index == 0  # others answer their share, and process 0 tells
    for task in options.tasks:
        for name, source in _chain(options.run):
            folder = options.out / task / name
            who = ["--run", source.run] if source.run else ["--weights", source.weights]
            more = ["--task", task, "--out", str(folder), "--limit", str(options.limit)]
            command.main([*who, *more, "--batch-size", str(options.batch_size)])
            if first:
                results.append(comparing.read_result(folder, name))
    if first:
        print(pages.write(results, options.out))
    return 0


def ablation(args: list[str]) -> int:
    """Trains the config once as it is and once per changed value, one factor at a time; scores each run.

    Every point is the ordinary train command and the ordinary evaluate command, so that a killed study goes
    on where it was.
    """
    parser = _parser("ablation")
    parser.add_argument("--config", default="stage1")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", help="of the task")
    parser.add_argument("--tau", nargs="*", type=float, default=[], help="e.g. 1000 2000 4000")
    parser.add_argument("--feature-layer", nargs="*", type=int, default=[], help="e.g. -1 -2")
    parser.add_argument("--lora", nargs="*", default=[], choices=("vision_tower", "projector"), help="alone")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", metavar="DIR", type=command.folder, required=True)
    parser.add_argument(
        "--train", nargs="...", default=[], help="last: more options of train, e.g. --steps 50"
    )
    options = parser.parse_args(args)
    points = {"as configured": []}
    points |= {f"tau {v:g}": ["--anyres.tau", str(v)] for v in options.tau}
    points |= {f"feature layer {v}": ["--feature-layer", str(v)] for v in options.feature_layer}
    other = {"vision_tower": "projector", "projector": "vision_tower"}
    points |= {f"LoRA on {part} alone": [f"--lora.{other[part]}"] for part in options.lora}
    for changes in points.values():  # a bad value shows before hours of training, not after them
        _run("train", "--config", options.config, *changes, *options.train, "--print-config", quiet=True)
    results = []
    for name, changes in points.items():
        run = options.out / "runs" / name.replace(" ", "-")
        _run("train", "--config", options.config, "--run-dir", str(run), *changes, *options.train)
        more = ["--data", options.data] if options.data else []
        more += ["--limit", str(options.limit)] if options.limit is not None else []
        _run("evaluate", "--run", str(run), "--task", options.task, "--out", str(run / "evaluation"), *more)
        results.append(comparing.read_result(run / "evaluation", name))
    rows = []
    for result in results:
        for what, texts in (("answers", False), ("texts", True)):
            ids = [i for i, row in result.items.items() if (row["type"] in TEXTS) == texts]
            if ids:
                c = comparing.paired(results[0], result, ids)
                rows.append([
                    result.name, what, str(c.n), percent(c.mean_b), f"{100 * c.difference:+.1f}",
                    f"{100 * c.low:+.1f} to {100 * c.high:+.1f}",
                ])  # fmt: skip
    notes = [
        "Answers: accuracy, undecided as wrong; texts: ROUGE_L. Differences to the config as it is, paired."
    ]
    grid = Grid(
        f"Ablation of {options.config}", ["changed", "of", "n", "score", "difference", "95 %"], rows, notes
    )
    (options.out / "ablation.md").write_text(grid.markdown() + "\n", encoding="utf-8")
    print(grid.text())
    print(pages.write(results, options.out))
    return 0


def _run(name: str, *args: str, quiet: bool = False) -> None:
    """One of our commands, in a process of its own. Raises UserError where it fails; it has said why."""
    output = subprocess.DEVNULL if quiet else None
    done = subprocess.run([sys.executable, "-m", f"mmrstraj_jax.{name}", *args], stdout=output)
    if done.returncode:
        raise UserError(f"mmrstraj_jax.{name} {' '.join(args)}: exit code {done.returncode}; see above")
