"""Scores a model on a benchmark, or predictions of any model; every number can be repeated from its files.

python -m mmrstraj_jax.evaluate --run runs/stage2 --task synthtraffic-bench
python -m mmrstraj_jax.evaluate --weights DIR --task rsieval-vqa --data RSIEval/
python -m mmrstraj_jax.evaluate --model NAME --base-url http://localhost:8000/v1 --task ucm --data UCM/
python -m mmrstraj_jax.evaluate --predictions answers.jsonl --task rsieval-vqa
python -m mmrstraj_jax.evaluate --run DIR --task rsieval-caption --data RSIEval/ --select traffic --structured

Studies of one or several models, each with its own --help:
{studies}
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from mmrstraj_jax.errors import CommandParser, UserError, run_command
from mmrstraj_jax.inference.options import DecodeOptions

NUM = 200  # images of --select
STUDIES = {
    "compare": "DIR_A DIR_B: the same items, paired bootstrap",
    "forgetting": "BEFORE AFTER: what a later stage lost of an earlier one's right answers",
    "report": "[NAME=]DIR ... --out DIR: a page beside the paper's tables",
    "suite": "--run DIR --out DIR: the base and every stage of a run on what needs no data, and the page",
    "corruption": "--run DIR --task NAME --out DIR: haze, blur, stripes, noise, JPEG, and what each costs",
    "ablation": "--config NAME --task NAME --out DIR: training over tau, feature layer, LoRA targets",
    "prefer": "DIR_A DIR_B --judge NAME: the better description, asked in both orders",
    "rubric": "DIR ... --judge NAME | --sheet FILE | --filled FILE: descriptions graded by theme",
}
_DOC = __doc__.format(studies="\n".join(f"  evaluate {name:<11}{text}" for name, text in STUDIES.items()))


def folder(text: str) -> Path:
    """An --out DIR: argparse reports one that cannot be made."""
    path = Path(text)
    if file := next((p for p in (path, *path.parents) if p.is_file()), None):
        raise argparse.ArgumentTypeError(f"{file} is a file; expected a folder")
    return path


def source_options(parser: argparse.ArgumentParser) -> None:
    """The options that name a model, shared with the studies."""
    add = parser.add_argument
    add("--run", metavar="DIR", help="run directory of training")
    add("--weights", metavar="DIR", help="weights in our format, or an HF or lmms-lab folder")
    add("--model", metavar="NAME", help="a model of the OpenAI-compatible server at --base-url")
    add("--base-url", metavar="URL", help="its address; the key is read from OPENAI_API_KEY")
    add("--batch-size", type=int, default=8, help="images a device at a time, or requests (default 8)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on an accelerator, else float32")


def task_options(parser: argparse.ArgumentParser) -> None:
    """The options that name what is asked and how it is scored, shared with the studies."""
    from mmrstraj_jax.evaluation.tasks import TASKS

    add = parser.add_argument
    add("--task", required=True, metavar="NAME", help=", ".join(TASKS))
    add(
        "--data",
        metavar="PATH",
        type=Path,
        help="the data set's file or folder; SynthCity's tasks have their own",
    )
    add("--images", metavar="DIR", type=Path, help="its images, where they are not beside it")
    add("--limit", type=int, help="items evenly drawn, for a quick look")
    add("--select", choices=("traffic",), help="only images that show roads or traffic by their texts")
    add("--num", type=int, help="with --select: at most so many, drawn with --seed (default 200)")
    add("--structured", action="store_true", help="texts are asked for as semantic units in JSON")
    add(
        "--meteor",
        choices=("meteor15", "meteor_nltk", "none"),
        default="meteor15",
        help="default meteor15 (Java)",
    )
    add("--max-new-tokens", type=int, help="default: the task's")
    add("--temperature", type=float, default=0.0, help="default 0: greedy")
    add("--seed", type=int, default=0)


def judge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--judge", metavar="NAME", help="a model that judges what the rules leave undecided")
    parser.add_argument(
        "--judge-url", metavar="URL", help="its address; without it only cached replies are used"
    )
    parser.add_argument(
        "--judge-max-tokens", metavar="N", type=int, default=4096, help="of a reply, thinking included"
    )
    parser.add_argument(
        "--judge-extra",
        metavar="JSON",
        default="",
        help='more of a request\'s body, e.g. {"chat_template_kwargs": {"enable_thinking": false}}',
    )


def _arguments(args: list[str]) -> argparse.Namespace:
    """The checked command line. Raises UserError: unknown, missing or contradicting options."""
    parser = CommandParser("evaluate", _DOC)
    parser.add_argument(
        "--predictions", metavar="FILE", help="answers of any model, one JSON object a line: id, prediction"
    )
    source_options(parser)
    task_options(parser)
    judge_options(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=folder,
        help="default: RUN/evaluation/TASK, evaluation/TASK/NAME, or the folder of --predictions FILE",
    )
    options = parser.parse_args(args)
    check_source(options, options.predictions)
    if options.judge_url is not None and options.judge is None:
        raise UserError("--judge-url URL needs --judge NAME")
    return options


def check_source(options: argparse.Namespace, predictions: str | None = None) -> None:
    """Raises UserError unless exactly one model (or file of predictions) is named."""
    sources = [options.run, options.weights, options.model, predictions]
    if sum(source is not None for source in sources) != 1:
        raise UserError("expected one of --run DIR, --weights DIR, --predictions FILE and --model NAME")
    if (options.model is None) != (options.base_url is None):
        raise UserError("--model NAME and --base-url URL belong together")


def source(options: argparse.Namespace):
    """The named model, as pipeline.Source."""
    from mmrstraj_jax.evaluation.pipeline import Source

    return Source(*(getattr(options, name) for name in Source._fields))


def asked(options: argparse.Namespace) -> tuple[Any, list, DecodeOptions, dict[str, Any]]:
    """(task, items, decode options, protocol) of the command line; --predictions may bring the items.

    Raises UserError: no such task or data, or a selection that leaves nothing.
    """
    from mmrstraj_jax.evaluation import predict, tasks, traffic

    for name in ("limit", "num", "batch_size", "max_new_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected 1 or more")
    if options.num is not None and options.select is None:
        raise UserError(f"--num {options.num}: of what? It belongs to --select traffic; see also --limit")
    task, num = tasks.get(options.task), options.num or NUM
    own = getattr(options, "predictions", None)  # the rows of a file bring references along
    if own and options.data is None:
        items = predict.items_of(predict.load(Path(own)), Path(own))
    else:
        items = task.load(options.data, options.images)
    if options.structured:
        task = dataclasses.replace(task, ask=traffic.STRUCTURED, max_new_tokens=512, structured=True)
        items = [item for item in items if item.type in tasks.TEXTS]
    if options.select:
        items = traffic.select(items, num, options.seed)
    items = tasks.limited(items, options.limit)
    if getattr(options, "judge", None) is not None and items:
        if task.scorer.startswith("rsvqa") or all(item.type in tasks.TEXTS for item in items):
            raise UserError(
                f"--judge {options.judge}: --task {task.name} leaves nothing to a judge, which decides about "
                "answers that no rule decides; leave it out"
            )
    if not items:
        raise UserError(
            f"--task {options.task}: no item is left to ask about; --structured and --select need texts"
        )
    tokens = task.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
    decode = DecodeOptions(max_new_tokens=tokens, temperature=options.temperature, seed=options.seed)
    select = f"{options.select}, at most {num}, seed {options.seed}" if options.select else None
    protocol = {"limit": options.limit, "select": select, "data": str(options.data or "own")}
    return task, items, decode, protocol


def scoring(options: argparse.Namespace, task: Any, out: Path):
    """How the command line wants predictions scored, as pipeline.Scoring."""
    from mmrstraj_jax.evaluation import captions
    from mmrstraj_jax.evaluation.pipeline import Scoring

    if options.meteor == "meteor_nltk":  # before hours of answers, not after them
        captions.require_nltk()
    own = getattr(options, "predictions", None) and options.data is None
    judged = getattr(options, "judge", None) is not None
    return Scoring(
        meteor=None if options.meteor == "none" else options.meteor,
        judge=judge(options, out) if judged else None,
        train=_training(options, task) if task.train and not own else (),
    )


def judge(options: argparse.Namespace, out: Path):
    """The judge of `judge_options`, its cache in `out`. Raises UserError: a bad option or cache."""
    from mmrstraj_jax.evaluation.judge import Judge

    if options.judge_max_tokens < 1:
        raise UserError(f"--judge-max-tokens {options.judge_max_tokens}: expected 1 or more")
    return Judge(
        options.judge,
        options.judge_url,
        out / "judge.jsonl",
        max_tokens=options.judge_max_tokens,
        extra=options.judge_extra,
    )


def _training(options: argparse.Namespace, task: Any) -> list:
    """The training split; none where the file has none: the table then names what stands in for it."""
    from mmrstraj_jax.evaluation.readers import NoSplit

    try:
        return task.train(options.data, options.images)
    except NoSplit:
        return []


def _out(options: argparse.Namespace) -> Path:
    if options.out is not None:
        return options.out
    if options.predictions is not None:
        return Path(options.predictions).parent
    if options.run is not None:
        return Path(options.run) / "evaluation" / options.task
    return Path("evaluation") / options.task / Path(options.weights or options.model).name


def place():
    """This process among those of a SLURM step or Kubernetes Job, as predict.Place; they share --out."""
    import os

    from mmrstraj_jax.evaluation.predict import Place
    from mmrstraj_jax.training.distributed import find_place

    found = find_place((None, None, None), os.environ)
    return Place() if found is None else Place(found.index, found.count)


def main(args: list[str]) -> int:
    """The command. Raises UserError for whatever the user can put right."""
    if args and args[0] in STUDIES:
        from mmrstraj_jax.evaluation import studies

        return getattr(studies, args[0])(args[1:])
    options = _arguments(args)
    from mmrstraj_jax.evaluation import grids, pipeline

    task, items, decode, protocol = asked(options)
    out = _out(options)
    how = scoring(options, task, out)
    if options.predictions:
        partial = options.limit is not None or options.select is not None
        path = Path(options.predictions)
        scores = pipeline.score_file(task, items, path, out, how, protocol, complete=not partial)
    else:
        model = pipeline.answerer(source(options), task, decode)
        here = place()
        scores = pipeline.evaluate(task, items, out, model, how, protocol, here)
        if scores is None:
            print(f"process {here.index} of {here.count} has answered its share; process 0 writes the scores")
            return 0
    print(grids.plain_table(scores))
    print(f"{out / 'scores.json'}")
    return 0


if __name__ == "__main__":
    run_command(main)
