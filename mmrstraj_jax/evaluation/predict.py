"""Predictions as JSON Lines (docs/evaluation.md): written as they come, resumed after a kill."""

import base64
import dataclasses
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from mmrstraj_jax import jsonl
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.evaluation.readers import Item, require_images
from mmrstraj_jax.evaluation.tasks import Task

KEYS = ("id", "image", "question", "type", "prediction", "references", "prompt", "decode")
PATIENCE = 1800.0  # seconds that process 0 waits for another process's next answer
# asked for these items, the model yields (place in the list, answer, the whole prompt as the model saw it)
Ask = Callable[[Sequence[Item]], Iterator[tuple[int, str, str]]]


def load(path: Path, *, log: bool = False) -> dict[str, dict[str, Any]]:
    """Rows of a predictions file by id; log: as jsonl.read has it, a file that `run` may be writing.

    Raises UserError: keys that lack, or an id that occurs twice.
    """
    rows: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(jsonl.read(path, log=log), 1):
        if isinstance(row.get("id"), int) and not isinstance(row["id"], bool):
            row["id"] = str(row["id"])  # RSVQA's own ids are numbers
        missing = [key for key in ("id", "prediction") if not isinstance(row.get(key), str)]
        if missing:
            raise UserError(f"{path}: line {number} lacks {' and '.join(missing)} as text")
        if row["id"] in rows:
            raise UserError(
                f"{path}: line {number}: {row['id']} was predicted before; expected one row an item"
            )
        rows[row["id"]] = row
    return rows


def answer_of(text: str) -> str:
    """A prediction without what a thinking model thought before it."""
    return text.rpartition("</think>")[2].strip() if "</think>" in text else text


def items_of(rows: dict[str, dict[str, Any]], path: Path) -> list[Item]:
    """The items that a predictions file brings along. Raises UserError naming a row without references."""
    if not rows:
        raise UserError(f"{path}: holds no predictions; expected one JSON object a line")
    items = []
    for name, row in rows.items():
        references, kind, question = (row.get(key) for key in ("references", "type", "question"))
        images = row.get("image") or []
        images = images if isinstance(images, list) else [images]
        for what, good, expected in (
            ("type", isinstance(kind, str) and kind.strip(), "a text"),
            ("references", references and _texts(references, blank=False), "a list of texts, none empty"),
            ("question", question is None or isinstance(question, str), "a text, or none"),
            ("image", _texts(images), "a path or a list of paths, or none"),
        ):
            if not good:
                raise UserError(
                    f"{path}: {name}: {what} is {row.get(what)!r:.60}, expected {expected}; correct the row, "
                    "or name the data set with --data"
                )
        items.append(Item(name, tuple(map(Path, images)), question, kind, tuple(references)))
    return items


def _texts(values: Any, *, blank: bool = True) -> bool:
    return isinstance(values, list) and all(isinstance(v, str) and (blank or v.strip()) for v in values)


def fingerprint(items: Sequence[Item]) -> str:
    """SHA-256 of what is asked and what counts as right; images by name, so that a folder may be moved."""
    rows = [[i.id, i.question, i.type, list(i.references), [p.name for p in i.images]] for i in items]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


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


class Place(NamedTuple):
    """This process among those that share the work: it answers items index, index + count, ..."""

    index: int = 0
    count: int = 1


ALONE = Place()


def run(
    task: Task,
    items: Sequence[Item],
    path: Path,
    ask: Ask,
    decode: dict[str, Any],
    source: dict[str, Any],
    place: Place = ALONE,
) -> bool:
    """Asks for every item that has no answer yet, and appends each answer as it comes; True: all are there.

    `source` says which model answers; it is kept beside the file, so that a resumed file has one author.
    Several processes write a part file each, on a disk they share; no one waits for another but process 0 at
    the end, which joins the parts into `path`. The others return False. Parts that a killed call left, of
    whatever number of processes, count as answered.
    Raises UserError: the file holds another model's answers, answers to another prompt or of other decode
    settings, or other items; items that are still open at the end.
    """
    own = path if place.count == 1 else _part(path, *place)
    # as a file holds them, to which they are compared: a tuple comes back as a list
    decode, source = json.loads(json.dumps([decode, source]))
    with jsonl.writer(own) as file:
        _check_author(path, {"task": task.name, "ask": task.ask} | source, own.with_suffix(".model.tmp"))
        rows, known = _answered(path), {item.id: item for item in items}
        for name, row in rows.items():
            if name not in known:
                raise UserError(f"{path}: holds {name}, which is no item of this run; name another --out")
            if row.get("decode") != decode:
                raise UserError(
                    f"{path}: {name} was decoded otherwise ({row.get('decode')}); name another --out"
                )
            if changed := _changed(row, known[name]):
                raise UserError(
                    f"{path}: {name} was answered when its {changed} was another; name another --out"
                )
        mine = list(items)[place.index :: place.count]
        open_items = [item for item in mine if item.id not in rows]
        require_images(open_items)
        if rows:
            print(f"{path}: goes on after {len(rows)} of {len(items)} answers", file=sys.stderr)
        from tqdm import tqdm

        with tqdm(
            total=len(mine), initial=len(mine) - len(open_items), unit="answer", mininterval=1.0
        ) as bar:
            for at, text, prompt in ask(open_items):
                item = open_items[at]
                values = (item.id, image_of(item), item.question, item.type, text)
                row = dict(zip(KEYS, (*values, list(item.references), prompt, decode), strict=True))
                jsonl.append(file, row)
                bar.update()
    if place.index:
        return False
    return _join(items, path, place.count)


def image_of(item: Item) -> str | list[str]:
    images = [str(path) for path in item.images]
    return images[0] if len(images) == 1 else images


def _changed(row: dict[str, Any], item: Item) -> str | None:
    """What of the data differs from the row's; of the image the name, since a folder may be moved."""

    def names(image: str | list[str]) -> list[str]:
        return [Path(path).name for path in ([image] if isinstance(image, str) else image)]

    now = {"question": item.question, "references": list(item.references), "type": item.type}
    changed = next((key for key, value in now.items() if row.get(key) != value), None)
    return changed or (None if names(row.get("image") or []) == names(image_of(item)) else "image")


def _part(path: Path, index: int, count: int) -> Path:
    return path.with_name(f"{path.stem}.part-{index}-of-{count}{path.suffix}")


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}.part-*{path.suffix}"))


def _answered(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of the file and of all parts by id; one that is in both was joined already."""
    rows: dict[str, dict[str, Any]] = {}
    for found in (*_parts(path), path):
        if found.is_file() and found.stat().st_size:
            rows |= load(found, log=True)
    return rows


def _check_author(path: Path, source: dict[str, Any], temporary: Path) -> None:
    """Raises UserError where answers are there already, of another model or to another prompt.

    temporary: this process's own; pods have equal process ids.
    """
    author = path.with_suffix(".model.json")
    if any(found.is_file() and found.stat().st_size for found in (path, *_parts(path))):
        if not author.is_file() or not _same_author(json.loads(author.read_text(encoding="utf-8")), source):
            raise UserError(
                f"{path}: holds answers of another model or prompt ({author.name}); name another --out"
            )
        return
    temporary.write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
    temporary.replace(author)


def _same_author(saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """What a file of an older version does not tell (the content of the weights) is not compared."""
    told = {key: value for key, value in now.items() if key in saved or key != "content"}
    return saved == told


def _join(items: Sequence[Item], path: Path, count: int) -> bool:
    """Waits for the other processes' parts, then makes one file of all. Raises UserError: items left open."""
    rows, quiet_since = _answered(path), time.monotonic()
    while count > 1 and len(rows) < len(items) and time.monotonic() - quiet_since < PATIENCE:
        time.sleep(1.0)
        before, rows = len(rows), _answered(path)
        if len(rows) > before:
            quiet_since = time.monotonic()
    open_numbers = [number for number, item in enumerate(items) if item.id not in rows]
    if open_numbers:
        waited = f" from process {open_numbers[0] % count} in {PATIENCE:.0f} s" if count > 1 else ""
        raise UserError(
            f"{path}: {len(open_numbers)} items have no answer yet{waited}; run the same command again"
        )
    if parts := _parts(path):
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(jsonl.dump(rows[item.id]) for item in items), encoding="utf-8")
        temporary.replace(path)
        for part in parts:
            part.unlink()
    return True


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
            raw = client.chat.completions.with_raw_response.create(
                model=name, messages=[{"role": "user", "content": content}], **extra
            )
        except openai.APIError as error:
            print(f"{item.id}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            return None
        text = raw.http_response.text
        try:  # a web page, or {"error": ...} with status 200, is no answer
            return json.loads(text)["choices"][0]["message"]["content"] or ""
        except (ValueError, KeyError, IndexError, TypeError):
            print(f"{item.id}: the server's reply is not a chat completion: {text[:200]}", file=sys.stderr)
        return None

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
    """What tells one model from another when a file is resumed: path, newest checkpoint, its content."""
    if run is not None:
        steps = [int(p.name) for p in (Path(run) / "checkpoints").glob("*") if p.name.isdigit()]
        step = max(steps, default=None)
        return {"run": run, "step": step, "content": _sealed(Path(run) / "checkpoints" / str(step))}
    if weights is not None:
        files = sorted(Path(weights).glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        return {"weights": weights, "bytes": size, "content": _sampled(files)}
    return {"model": model, "base_url": base_url}


def _sealed(checkpoint: Path) -> str:
    """The hash of the hashes of a checkpoint's files; "" where it has no manifest."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def _sampled(files: Sequence[Path], blocks: int = 256, block: int = 1 << 16) -> str:
    """A hash of blocks all over every file: other weights of the same size have another."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        step = max(block, -(-size // blocks))
        with path.open("rb") as file:
            for at in range(0, size, step):
                file.seek(at)
                digest.update(file.read(block))
    return digest.hexdigest()[:16]


def settings(options: Any) -> dict[str, Any]:
    """Decode settings as they stand in every row."""
    return dataclasses.asdict(options)
