"""Scores a model on a benchmark, or predictions of any model; every number can be repeated from its files.

python -m mmrstraj_jax.evaluate --run runs/stage2 --task synthcity
python -m mmrstraj_jax.evaluate --weights DIR --task rsieval-vqa --data RSIEval/
python -m mmrstraj_jax.evaluate --model NAME --base-url http://localhost:8000/v1 --task ucm --data UCM/
python -m mmrstraj_jax.evaluate --predictions answers.jsonl --task rsieval-vqa
python -m mmrstraj_jax.evaluate compare DIR_A DIR_B            same items, paired bootstrap
python -m mmrstraj_jax.evaluate report DIR [DIR ...] --out DIR   a page beside the paper's tables
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, NoReturn

from mmrstraj_jax.errors import UserError, run_command
from mmrstraj_jax.inference.options import DecodeOptions


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def _arguments(args: list[str]) -> argparse.Namespace:
    """The checked command line. Raises UserError: unknown, missing or contradicting options."""
    from mmrstraj_jax.evaluation.tasks import TASKS

    parser = _Parser(
        prog="python -m mmrstraj_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", metavar="DIR", help="run directory of training")
    add("--weights", metavar="DIR", help="weights in our format, or an HF or lmms-lab folder")
    add("--predictions", metavar="FILE", help="answers of any model, one JSON object a line: id, prediction")
    add("--model", metavar="NAME", help="a model of the OpenAI-compatible server at --base-url")
    add("--base-url", metavar="URL", help="its address; the key is read from OPENAI_API_KEY")
    add("--task", required=True, metavar="NAME", help=", ".join(TASKS))
    add("--data", metavar="PATH", type=Path, help="the data set's file or folder; synthcity has its own")
    add("--images", metavar="DIR", type=Path, help="its images, where they are not beside it")
    add("--out", metavar="DIR", type=Path, help="default: RUN/evaluation/TASK, or evaluation/TASK/NAME")
    add("--limit", type=int, help="items evenly drawn, for a quick look")
    add(
        "--meteor",
        choices=("meteor15", "meteor_nltk", "none"),
        default="meteor15",
        help="default meteor15 (Java)",
    )
    add("--judge", metavar="NAME", help="a model that judges what the rules leave undecided")
    add("--judge-url", metavar="URL", help="its address; without it only cached replies are used")
    add("--batch-size", type=int, default=8, help="images at a time, or requests at a time (default 8)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on an accelerator, else float32")
    add("--max-new-tokens", type=int, help="default: the task's")
    add("--temperature", type=float, default=0.0, help="default 0: greedy")
    add("--seed", type=int, default=0)
    options = parser.parse_args(args)
    sources = [options.run, options.weights, options.predictions, options.model]
    if sum(source is not None for source in sources) != 1:
        raise UserError("expected one of --run DIR, --weights DIR, --predictions FILE and --model NAME")
    if (options.model is None) != (options.base_url is None):
        raise UserError("--model NAME and --base-url URL belong together")
    if options.judge_url is not None and options.judge is None:
        raise UserError("--judge-url URL needs --judge NAME")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: expected 1 or more")
    return options


def _out(options: argparse.Namespace) -> Path:
    if options.out is not None:
        return options.out
    if options.predictions is not None:
        return Path(options.predictions).parent
    if options.run is not None:
        return Path(options.run) / "evaluation" / options.task
    return Path("evaluation") / options.task / Path(options.weights or options.model).name


def _predict(options: argparse.Namespace, task, items, path: Path) -> dict[str, Any]:
    """Writes what is not written yet; returns what the protocol is."""
    from mmrstraj_jax.evaluation import predict

    tokens = options.max_new_tokens or task.max_new_tokens
    decode = DecodeOptions(max_new_tokens=tokens, temperature=options.temperature, seed=options.seed)
    source = predict.source_of(options.run, options.weights, options.model, options.base_url)
    if options.model is not None:
        ask = predict.remote(options.model, options.base_url, task, decode, workers=options.batch_size)
    else:
        from mmrstraj_jax.api import load  # JAX takes seconds: --help and typing errors must not wait for it

        model = load(options.run or options.weights, dtype=options.dtype, batch_size=options.batch_size)
        source["anyres"] = dataclasses.asdict(model.anyres)
        ask = predict.local(model, task, decode)
    settings = predict.settings(decode)
    predict.run(task, items, path, ask, settings, source)
    return {"source": source, "decode": settings}


def main(args: list[str]) -> int:
    """The command. Raises UserError for whatever the user can put right."""
    if args[:1] in (["compare"], ["report"]):
        from mmrstraj_jax.evaluation import report

        return report.compare_command(args[1:]) if args[0] == "compare" else report.report_command(args[1:])
    options = _arguments(args)
    from mmrstraj_jax import jsonl
    from mmrstraj_jax.evaluation import predict, report, score, tasks
    from mmrstraj_jax.evaluation.judge import Judge

    task, out = tasks.get(options.task), _out(options)
    path = Path(options.predictions) if options.predictions else out / "predictions.jsonl"
    own = options.predictions is not None and options.data is None  # the rows bring references along
    if own:
        items = predict.items_of(predict.load(path), path)
    else:
        items = task.load(options.data, options.images)
    items = tasks.limited(items, options.limit)
    protocol: dict[str, Any] = {
        "prompt": task.ask,
        "limit": options.limit,
        "data": str(options.data or "own"),
    }
    if options.predictions is None:
        protocol |= _predict(options, task, items, path)
    rows = predict.load(path)
    if options.limit is None:
        predict.check_complete(items, rows, path)
    elif missing := [item.id for item in items if item.id not in rows]:
        raise UserError(f"{path}: no prediction for {missing[0]}")
    train = task.train(options.data, options.images) if task.train and not own else []
    judge = Judge(options.judge, options.judge_url, out / "judge.jsonl") if options.judge else None
    scores, per_item = score.score(
        task,
        items,
        {item.id: rows[item.id]["prediction"] for item in items},
        train=train,
        judge=judge,
        meteor=None if options.meteor == "none" else options.meteor,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "items.jsonl").write_text("".join(map(jsonl.dump, per_item)), encoding="utf-8")
    text = json.dumps({"protocol": protocol} | scores, indent=1, ensure_ascii=False) + "\n"
    temporary = out / "scores.json.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(out / "scores.json")
    print(report.plain_table(scores))
    print(f"{out / 'scores.json'}")
    return 0


if __name__ == "__main__":
    run_command(main)
