"""What both data sets share: talking to the model, and writing rows in the LLaVA-OneVision form.

A folder holds NAME.json (and NAME_val.json, NAME_test.json), images/, provenance.jsonl (who or what made each
turn, from which draws), quarantine.jsonl (what was left out and why) and calls.jsonl (the log of replies).
"""

import dataclasses
import hashlib
import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmrstraj_jax.construction.calls import Conversation, Prices, plan
from mmrstraj_jax.construction.files import dump, lines_writer, write_atomic
from mmrstraj_jax.construction.llm import Client
from mmrstraj_jax.construction.manifest import Step
from mmrstraj_jax.construction.ranges import check
from mmrstraj_jax.errors import UserError

CALLS = "calls.jsonl"
_RUN = {"run": True}


def _check_extra(text: str) -> None:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"--extra-body {text[:60]}: expected a JSON object")
    ours = {"model", "messages", "max_tokens", "temperature", "top_p", "seed", "n", "stream"}
    if known := sorted(value.keys() & ours):
        raise UserError(f"--extra-body: {', '.join(known)}: set by the build itself; leave it out")


@dataclass(frozen=True)
class ModelSettings:
    """Which model answers, and what it may cost. The key is read from the variable `key_variable`."""

    model: str = ""
    temperature: float = 0.7
    seed: int = 0
    max_tokens: int = 0  # of a reply, thoughts included; 0: the prompt's own, 256 to 1024
    extra_body: str = ""  # JSON object that goes with each call (docs/building.md, thinking models)
    base_url: str = field(default="http://localhost:8000/v1", metadata=_RUN)
    key_variable: str = field(default="OPENAI_API_KEY", metadata=_RUN)
    concurrency: int = field(default=8, metadata=_RUN)
    tries: int = field(default=6, metadata=_RUN)
    timeout: float = field(default=120.0, metadata=_RUN)  # seconds a call
    backoff: float = field(default=1.0, metadata=_RUN)  # seconds before the first repetition
    prompt_price: float = field(default=0.0, metadata=_RUN)  # dollars for a million tokens
    completion_price: float = field(default=0.0, metadata=_RUN)
    image_tokens: int = field(default=1500, metadata=_RUN)  # what an image counts, at most
    max_cost: float = field(default=0.0, metadata=_RUN)  # dollars; 0: no cap

    def __post_init__(self):
        check(self, 1, math.inf, "concurrency", "tries", "timeout")
        check(self, 0, math.inf, "backoff", "prompt_price", "completion_price", "image_tokens", "max_cost")
        check(self, 0, math.inf, "max_tokens")
        check(self, 0, 2, "temperature")
        check(self, 0, 2**31 - 1, "seed")  # it goes to the server, where -1 may mean none
        _check_extra(self.extra_body)
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_variable):
            # not shown: it may be the key itself
            raise UserError("--key-variable: expected an environment variable's name, like OPENAI_API_KEY")
        if self.max_cost and not (self.prompt_price or self.completion_price):
            raise UserError("--max-cost: without --prompt-price and --completion-price no cost is known")

    @property
    def prices(self) -> Prices:
        return Prices(self.prompt_price, self.completion_price, self.image_tokens)

    def client(self, log: Path) -> Client:
        """Raises UserError: no model is named."""
        if not self.model:
            raise UserError("--model: expected the name of a model of the server at --base-url")
        return Client(
            self.model,
            self.base_url,
            log,
            concurrency=self.concurrency,
            tries=self.tries,
            timeout=self.timeout,
            backoff=self.backoff,
            prices=self.prices,
            max_cost=self.max_cost or None,
            key_variable=self.key_variable,
        )


@dataclass(frozen=True)
class Look:
    """Looking before a run: `plan` sends nothing, `preview` makes so many samples and prints them."""

    plan: bool = False
    preview: int = 0

    def __bool__(self) -> bool:
        return self.plan or self.preview > 0


@dataclass
class Sample:
    """One image's conversation as it grows."""

    id: str
    image: Path
    split: str
    turns: list[tuple[str, str]]  # (question, answer)
    made: list[dict[str, Any]]  # of each turn: who or what made it
    about: dict[str, Any]
    problems: list[dict[str, str]] = field(default_factory=list)  # what was left out
    record: Path | None = None  # of the image: where it is from and on what terms
    file: str = ""  # the image's name in the data set

    def row(self) -> dict[str, Any]:
        """A row of the training file; the first question holds the image's slot."""
        conversations = []
        for number, (question, answer) in enumerate(self.turns):
            slot = "" if number else "<image>\n"
            conversations.append({"from": "human", "value": slot + question})
            conversations.append({"from": "gpt", "value": answer})
        return {"id": self.id, "image": f"images/{self.file}", "conversations": conversations}

    def provenance(self) -> dict[str, Any]:
        """Who made what, and from which draws."""
        return {"id": self.id, "split": self.split, "turns": self.made} | self.about


Starts = Sequence[Callable[[], Conversation]]


def build(step: Step, name: str, config: ModelSettings, starts: Starts, dropped: Counter) -> None:
    """Runs the conversations, each of which ends in a Sample, and writes the set.

    Args:
      dropped: what was left out before, by reason.
    Raises:
      UserError: see Client.run.
    """
    samples, _ = _talk(step.folder, name, config, starts)
    outputs = write(step.folder, name, samples)
    lacking = [problem for sample in samples for problem in sample.problems]
    if lacking:
        first, log = lacking[0], step.folder / "quarantine.jsonl"
        print(
            f"{name}: {len(lacking)} of {len(samples)} samples lack a turn, the first {first['id']} "
            f"({first['stage']}: {first['problem']}); all are in {log}",
            file=sys.stderr,
        )
    step.finish(counts(samples) | {"dropped": dict(sorted(dropped.items()))}, outputs)


def look_first(folder: Path, name: str, config: ModelSettings, starts: Starts, look: Look) -> None:
    """--plan and --preview: print, and leave nothing in the folder but the log of what was paid."""
    if look.plan:
        print(plan(starts, config.model, folder / CALLS, config.prices))
        return
    samples, spent = _talk(folder, name, config, starts[: look.preview])
    for sample in samples:
        print(_text(sample))
    print(f"{len(samples)} samples, ${spent:.4f} by the log; the run will not ask for them again")


def _talk(folder: Path, name: str, config: ModelSettings, starts: Starts) -> tuple[list[Sample], float]:
    """(samples, dollars spent by the log)."""
    client = config.client(folder / CALLS)
    with tqdm(total=len(starts), desc=name, unit=" samples", disable=None) as bar:

        def progress(done: int, spent: float) -> None:
            bar.set_postfix_str(f"${spent:.4f}", refresh=False)
            bar.update(done - bar.n)

        return client.run(starts, progress), client.spent


def _text(sample: Sample) -> str:
    lines = [f"--- {sample.id} ({sample.image})"]
    for question, answer in sample.turns:
        lines += [f"Q: {question}", f"A: {answer}"]
    return "\n".join(lines + [f"left out: {problem['problem']}" for problem in sample.problems])


def write(folder: Path, name: str, samples: Sequence[Sample]) -> list[Path]:
    """Writes the data set; the files that make it up. The images' records go along."""
    splits: dict[str, list[dict]] = defaultdict(list)
    outputs: list[Path] = []
    taken: set[str] = set()
    for sample in tqdm(samples, "copying images", unit=" images", disable=None):
        if sample.turns:
            # two folders of images may use a name twice
            mark = hashlib.sha256(sample.id.encode()).hexdigest()[:8]
            given = sample.image.name
            sample.file = given if given not in taken else f"{mark}-{given}"
            taken.add(sample.file)
            splits[sample.split].append(sample.row())
            outputs += _copy(sample, folder / "images" / sample.file)
    for split, rows in sorted(splits.items()):
        path = folder / (f"{name}.json" if split == "train" else f"{name}_{split}.json")
        write_atomic(path, dump(rows))
        outputs.append(path)
    problems = [problem for sample in samples for problem in sample.problems]
    for file, rows in (
        ("provenance.jsonl", [sample.provenance() for sample in samples if sample.turns]),
        ("quarantine.jsonl", problems),
    ):
        with lines_writer(folder / file) as put:
            for row in rows:
                put(row)
        outputs.append(folder / file)
    return outputs


def _copy(sample: Sample, target: Path) -> list[Path]:
    """The image and its record in the data set's folder: the set stands for itself."""
    pairs = [(sample.image, target)]
    if sample.record is not None:
        pairs.append((sample.record, target.with_suffix(".json")))
    for source, to in pairs:
        write_atomic(to, source.read_bytes())
    return [to for _, to in pairs]


def counts(samples: Sequence[Sample]) -> dict[str, Any]:
    """For the manifest: samples and turns by split, and what was left out."""
    kept = [sample for sample in samples if sample.turns]
    found: dict[str, Any] = {"samples": dict(sorted(Counter(sample.split for sample in kept).items()))}
    found["turns"] = dict(sorted(Counter(str(len(sample.turns)) for sample in kept).items()))
    problems = Counter(problem["stage"] for sample in samples for problem in sample.problems)
    return found | {"quarantined": dict(sorted(problems.items()))}


def by_model(request_version: str, model: str, key: str, **draw: Any) -> dict[str, Any]:
    """A turn that a model made."""
    return {"by": f"model:{model}", "prompt": request_version, "call": key} | draw


def seeded(request, config: ModelSettings):
    """The request with the run's sampling."""
    sampling = {"temperature": config.temperature, "seed": config.seed, "extra": config.extra_body}
    return dataclasses.replace(request, **sampling, max_tokens=config.max_tokens or request.max_tokens)
