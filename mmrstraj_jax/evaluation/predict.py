"""Predictions as JSON Lines (docs/evaluation.md): written as they come, resumed after a kill."""

import base64
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from mmrstraj_jax import jsonl
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation.readers import Item, require_images
from mmrstraj_jax.evaluation.tasks import Task

KEYS = ("id", "image", "question", "type", "prediction", "references", "prompt", "decode")
# asked for these items, the model yields (place in the list, answer, the whole prompt as the model saw it)
Ask = Callable[[Sequence[Item]], Iterator[tuple[int, str, str]]]


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a predictions file by id. Raises UserError: keys that lack, or an id that occurs twice."""
    rows: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(jsonl.read(path), 1):
        missing = [key for key in ("id", "prediction") if not isinstance(row.get(key), str)]
        if missing:
            raise UserError(f"{path}: line {number} lacks {' and '.join(missing)} as text")
        if row["id"] in rows:
            raise UserError(
                f"{path}: line {number}: {row['id']} was predicted before; expected one row an item"
            )
        rows[row["id"]] = row
    return rows


def items_of(rows: dict[str, dict[str, Any]], path: Path) -> list[Item]:
    """The items that a predictions file brings along. Raises UserError naming a row without references."""
    items = []
    for name, row in rows.items():
        references, kind = row.get("references"), row.get("type")
        if not isinstance(references, list) or not references or not isinstance(kind, str):
            raise UserError(f"{path}: {name} lacks references or type; name the data set with --data")
        images = row.get("image")
        images = images if isinstance(images, list) else [images] if images else []
        items.append(Item(name, tuple(map(Path, images)), row.get("question"), kind, tuple(references)))
    return items


def check_complete(items: Sequence[Item], rows: dict[str, Any], path: Path) -> None:
    """Raises UserError unless every item has a prediction and every prediction an item."""
    ids = {item.id for item in items}
    for text, extra in (
        ("no prediction for", ids - rows.keys()),
        ("no item of this task for", rows.keys() - ids),
    ):
        if extra:
            names = ", ".join(sorted(extra)[:3])
            raise UserError(f"{path}: {text} {len(extra)} of {len(ids)} ids, such as {names}")


def run(
    task: Task, items: Sequence[Item], path: Path, ask: Ask, decode: dict[str, Any], source: dict[str, Any]
) -> None:
    """Asks for every item that the file does not have yet, and appends each answer as it comes.

    `source` says which model answers; it is kept beside the file, so that a resumed file has one author.
    Raises UserError: the file holds another model's answers, answers to another prompt or of other decode
    settings, or other items.
    """
    with jsonl.writer(path) as file:
        source = {"task": task.name, "ask": task.ask} | source
        author = path.with_suffix(".model.json")
        if not path.stat().st_size:
            author.write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
        elif not author.is_file() or json.loads(author.read_text(encoding="utf-8")) != source:
            raise UserError(
                f"{path}: holds answers of another model or prompt ({author.name}); name another --out"
            )
        rows = load(path) if path.stat().st_size else {}
        wanted = {item.id: item for item in items}
        for name, row in rows.items():
            if name not in wanted:
                raise UserError(f"{path}: holds {name}, which is no item of this run; name another --out")
            if row.get("decode") != decode:
                raise UserError(
                    f"{path}: {name} was decoded otherwise ({row.get('decode')}); name another --out"
                )
        open_items = [item for item in items if item.id not in rows]
        require_images(open_items)
        if rows:
            print(f"{path}: goes on after {len(rows)} of {len(items)} answers", file=sys.stderr)
        from tqdm import tqdm

        with tqdm(total=len(items), initial=len(rows), unit="answer", mininterval=1.0) as bar:
            for place, text, prompt in ask(open_items):
                item = open_items[place]
                images = [str(p) for p in item.images]
                values = (item.id, images[0] if len(images) == 1 else images, item.question, item.type, text)
                row = dict(zip(KEYS, (*values, list(item.references), prompt, decode), strict=True))
                jsonl.append(file, row)
                bar.update()
    left = wanted.keys() - load(path).keys()
    if left:
        raise UserError(f"{path}: {len(left)} items have no answer yet; run the same command again")


def local(model: Any, task: Task, options: Any) -> Ask:
    """A model of `mmrstraj_jax.load`. The longest prompts go first (inference.engine)."""

    def ask(items: Sequence[Item]) -> Iterator[tuple[int, str, str]]:
        requests = []
        for number, item in enumerate(items):
            # Typed parts: an "<image>" inside a question is text.
            parts = [{"type": "image"} for _ in item.images] + [{"type": "text", "text": task.prompt(item)}]
            message = [{"role": "user", "content": parts}]
            requests.append(model.request(message, list(item.images), name=item.id, number=number))
        for done in model.engine.complete(requests, options):
            prompt = model.tokenizer.decode(requests[done.index].ids, skip_special=False)
            yield done.index, model.tokenizer.decode(done.ids), prompt

    return ask


def remote(
    name: str, base_url: str, task: Task, options: Any, *, workers: int = 8, timeout: float = 120.0
) -> Ask:
    """Any OpenAI-compatible server; images go as PNG data URLs. A failed request leaves its item open."""
    import openai

    client = openai.OpenAI(
        base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=timeout, max_retries=3
    )
    extra: dict[str, Any] = {"temperature": options.temperature, "max_tokens": options.max_new_tokens}
    if not options.greedy:
        extra |= {"top_p": options.top_p, "seed": options.seed}

    def one(item: Item) -> str | None:
        content = [{"type": "image_url", "image_url": {"url": _data_url(path)}} for path in item.images]
        content.append({"type": "text", "text": task.prompt(item)})
        try:
            reply = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": content}], **extra
            )
        except openai.APIError as error:
            print(f"{item.id}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            return None
        return reply.choices[0].message.content or ""

    def ask(items: Sequence[Item]) -> Iterator[tuple[int, str, str]]:
        with ThreadPoolExecutor(workers) as pool:
            places = {pool.submit(one, item): place for place, item in enumerate(items)}
            try:
                for done in as_completed(places):
                    if (text := done.result()) is not None:
                        yield places[done], text, task.prompt(items[places[done]])
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    return ask


def _data_url(path: Path) -> str:
    from mmrstraj_jax.data import images

    buffer = io.BytesIO()
    images.load(path).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def source_of(
    run: str | None, weights: str | None, model: str | None, base_url: str | None
) -> dict[str, Any]:
    """What tells one model from another when a file is resumed: path, newest checkpoint, bytes of weights."""
    if run is not None:
        steps = [int(p.name) for p in (Path(run) / "checkpoints").glob("*") if p.name.isdigit()]
        return {"run": run, "step": max(steps, default=None)}
    if weights is not None:
        return {
            "weights": weights,
            "bytes": sum(p.stat().st_size for p in Path(weights).glob("*.safetensors")),
        }
    return {"model": model, "base_url": base_url}


def settings(options: Any) -> dict[str, Any]:
    """Decode settings as they stand in every row."""
    return dataclasses.asdict(options)
