"""Calls to any OpenAI-compatible server that are paid once: every reply is kept in an append-only log.

A request is known by the SHA-256 of everything that shapes its answer, so a run that was killed replays its
log and asks only for the rest. A call that was under way at the kill carries the same Idempotency-Key when it
is sent again; a server that ignores this header may bill it twice, and nothing on this side could prevent it.
"""

import asyncio
import base64
import dataclasses
import hashlib
import json
import math
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from mmrstraj_jax import jsonl
from mmrstraj_jax.errors import UserError

_REPAIR = (
    "Your last reply was not usable: {problem} Reply again with one JSON object in the form that was asked "
    "for, and nothing else."
)
_RETRYABLE = (408, 409, 425, 429)  # and 5xx


@dataclass(frozen=True)
class Text:
    """A text field of an answer."""

    max_chars: int = 4000
    min_chars: int = 1
    choices: tuple[str, ...] = ()

    def problem(self, value: Any) -> str:
        """What is wrong with the value, or ""."""
        if not isinstance(value, str):
            return f"a {type(value).__name__}, expected a string"
        if self.choices and value not in self.choices:
            return f"not one of {', '.join(self.choices)}"
        if not self.min_chars <= len(value.strip()) <= self.max_chars:
            return f"{len(value.strip())} characters, expected {self.min_chars} to {self.max_chars}"
        return ""


@dataclass(frozen=True)
class Request:
    """One question to a model.

    Names, captions and other foreign text go into the prompt as JSON data, called data there; the schema then
    bounds what an instruction hidden in them could do.
    """

    version: str  # of the prompt's wording
    system: str
    prompt: str  # rendered
    schema: Mapping[str, Text] = field(default_factory=lambda: {"answer": Text()})
    image: bytes | None = None  # PNG or JPEG
    max_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 0
    repair: tuple[str, str] | None = None  # the unusable reply and what was wrong with it

    def key(self, model: str) -> str:
        """SHA-256 of model, prompt version, rendered prompt, image and sampling."""
        image = None if self.image is None else hashlib.sha256(self.image).hexdigest()
        sampling = [self.max_tokens, self.temperature, self.top_p, self.seed]
        parts = [model, self.version, self.system, self.prompt, image, sampling, self.repair]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def messages(self) -> list[dict[str, Any]]:
        """In the form of the chat completions interface; images as base64."""
        content: Any = self.prompt
        if self.image is not None:
            kind = "png" if self.image.startswith(b"\x89PNG") else "jpeg"
            url = f"data:image/{kind};base64,{base64.b64encode(self.image).decode()}"
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": self.prompt},
            ]
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": content}]
        if self.repair is not None:
            reply, problem = self.repair
            messages.append({"role": "assistant", "content": reply})
            messages.append({"role": "user", "content": _REPAIR.replace("{problem}", problem)})
        return messages


@dataclass(frozen=True)
class Prices:
    """Dollars for a million tokens, and what an image counts."""

    prompt: float = 0.0
    completion: float = 0.0
    image_tokens: int = 1500

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


class Outcome(NamedTuple):
    """What came of a request: `values` or, with None, why not."""

    key: str
    values: dict[str, str] | None
    problem: str = ""
    quarantined: bool = False  # unusable twice, or rejected: not asked again. Otherwise the next run asks


class Plan(NamedTuple):
    """What a run would do: the estimate behind --plan. `most` is what a cost cap has to allow for."""

    calls: int
    logged: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    most: float


def parse(reply: str, schema: Mapping[str, Text]) -> tuple[dict[str, str] | None, str]:
    """(values, "") of a reply that is one JSON object with exactly the schema's fields, else (None, why).

    A code fence around it and a reasoning model's <think> block before it are tolerated, nothing else.
    """
    text = re.sub(r"\A\s*<think>.*?</think>", "", reply, flags=re.DOTALL).strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, flags=re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None, "it was not one JSON object."
    if not isinstance(value, dict) or set(value) != set(schema):
        return None, f"it must be a JSON object with exactly the fields {', '.join(schema)}."
    problems = [f"{name}: {found}." for name, rule in schema.items() if (found := rule.problem(value[name]))]
    return (None, " ".join(problems)) if problems else ({name: value[name].strip() for name in schema}, "")


def _size(request: Request, prices: Prices) -> tuple[int, int]:
    """(typical, most) prompt tokens. Byte-level tokenisers never make more tokens than bytes."""
    texts = [request.system, request.prompt, *(request.repair or ())]
    count = sum(len(text.encode()) for text in texts)
    image = prices.image_tokens if request.image is not None else 0
    return math.ceil(count / 4) + 16 + image, count + 256 + image


def plan(requests: Sequence[Request], model: str, log: Path, prices: Prices) -> Plan:
    """Calls, tokens and dollars that a run over these requests would still take; sends nothing."""
    known = {row.get("key") for row in jsonl.read(log)} if log.exists() else set()
    fresh = {request.key(model): request for request in requests}
    todo = [request for key, request in fresh.items() if key not in known]
    typical = sum(_size(request, prices)[0] for request in todo)
    answers = sum(request.max_tokens // 2 for request in todo)
    most = sum(prices.cost(_size(r, prices)[1], r.max_tokens) for r in todo)
    return Plan(len(todo), len(fresh) - len(todo), typical, answers, prices.cost(typical, answers), most)


class Client:
    """Asks `model` at `base_url`, each request once in the life of the log file."""

    def __init__(
        self,
        model: str,
        base_url: str,
        log: Path,
        *,
        concurrency: int = 8,
        tries: int = 6,
        timeout: float = 120.0,
        backoff: float = 1.0,
        prices: Prices = Prices(),  # noqa: B008 - frozen
        max_cost: float | None = None,
        key_variable: str = "OPENAI_API_KEY",
    ):
        """
        Args:
          base_url: e.g. http://localhost:8000/v1. The key comes from the environment variable `key_variable`;
            local servers need none.
          tries: of one call, the first included; pauses grow from `backoff` s to a minute, with jitter.
          max_cost: dollars for this log, earlier runs included; a call whose worst case could exceed it is
            not sent.
        """
        self.model, self.base_url, self.log = model, base_url, Path(log)
        self.concurrency, self.tries, self.timeout, self.backoff = concurrency, tries, timeout, backoff
        self.prices, self.max_cost = prices, max_cost
        self._secret = os.environ.get(key_variable, "").strip()
        self._jitter = random.Random()
        self._replies: dict[str, dict[str, Any]] = {}
        self.spent = (
            0.0  # by the log, with the worst case of calls that may have been billed without an answer
        )
        self._reserved = 0.0
        self._stopped = ""

    def run(
        self, requests: Sequence[Request], progress: Callable[[int, float], None] | None = None
    ) -> list[Outcome]:
        """Outcomes in the order of the requests; equal requests are asked once.

        Args:
          progress: called with (outcomes so far, dollars spent).
        Raises:
          UserError: another process writes the log, a damaged log, a refused key (401, 403), an unknown model
            or address (404), or the cost cap. Replies that came before are in the log; run again to go on.
        """
        with jsonl.writer(self.log) as file:
            self._replies, self.spent, self._reserved, self._stopped = {}, 0.0, 0.0, ""
            for row in jsonl.read(self.log):
                self._count(row)
            outcomes = asyncio.run(self._run(requests, file, progress))
        if self._stopped:
            raise UserError(self._stopped)
        return outcomes

    def _count(self, row: dict[str, Any]) -> None:
        key, cost = row.get("key"), row.get("cost")
        if not isinstance(key, str) or isinstance(cost, bool) or not isinstance(cost, int | float):
            raise UserError(f"{self.log}: a row without key or cost; expected a log of language-model calls")
        self.spent += cost
        if "lost" not in row:
            self._replies[key] = row

    async def _run(self, requests: Sequence[Request], file: IO[bytes], progress) -> list[Outcome]:
        import openai

        unique = {request.key(self.model): request for request in requests}
        done: dict[str, Outcome] = {}
        waiting = iter(unique.items())

        async def work(client) -> None:
            # workers share one iterator: memory does not grow with the number of requests
            for key, request in waiting:
                outcome = await self._settle(client, key, request, file)
                if outcome is None:
                    return
                done[key] = outcome
                if progress is not None:
                    progress(len(done), self.spent)

        # our own retries, which know the cost cap and log what may have been billed
        async with openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self._secret or "none", max_retries=0, timeout=self.timeout
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(max(1, min(self.concurrency, len(unique)))):
                        group.create_task(work(client))
            except ExceptionGroup as failures:
                # a full disk or a failing progress bar, not a failed call: its own kind of error
                raise failures.exceptions[0] from None
        if self._stopped:
            return []
        return [done[request.key(self.model)] for request in requests]

    async def _settle(self, client, key: str, request: Request, file: IO[bytes]) -> Outcome | None:
        """The outcome, after at most one repair; None where the run has to stop."""
        problem = ""
        for repair in (False, True):
            call = dataclasses.replace(request, repair=problem) if repair else request
            row = await self._reply(client, call.key(self.model), call, file)
            if row is None:
                return None
            if "failed" in row:
                return Outcome(key, None, row["failed"])
            if "rejected" in row:
                return Outcome(key, None, row["rejected"], quarantined=True)
            values, why = parse(row["reply"], request.schema)
            if row["finish"] == "length":
                values, why = None, f"it was cut off after {request.max_tokens} tokens; be shorter."
            if values is not None:
                return Outcome(key, values)
            # a reply of megabytes would be paid again as a prompt
            problem = (row["reply"][:2000], why)
        return Outcome(key, None, why, quarantined=True)

    async def _reply(self, client, key: str, call: Request, file: IO[bytes]) -> dict[str, Any] | None:
        """The log's row of a call, or a new one; {"failed"} if no try succeeded; None to stop."""
        if key in self._replies:
            return self._replies[key]
        worst = self.prices.cost(_size(call, self.prices)[1], call.max_tokens)
        why = ""
        for attempt in range(1, self.tries + 1):
            while not self._stopped and self.max_cost is not None and self._over(worst):
                if self.spent + worst <= self.max_cost:
                    # calls under way may turn out cheaper than their worst case
                    await asyncio.sleep(0.02)
                    continue
                self._stopped = (
                    f"--max-cost {self.max_cost:g}: {self.spent:.4g} are spent, the next call may cost up to "
                    f"{worst:.4g}; every reply so far is in {self.log}; raise --max-cost to go on"
                )
            if self._stopped:
                return None
            self._reserved += worst
            try:
                row, why, pause = await self._send(client, key, call, worst)
            finally:
                self._reserved -= worst
            if row is not None:
                jsonl.append(file, row)
                self._count(row)
                if "lost" not in row:
                    return row
            if self._stopped:
                return None
            if attempt < self.tries:
                wait = self.backoff * 2 ** (attempt - 1) * self._jitter.uniform(0.5, 1.5)
                await asyncio.sleep(min(max(wait, pause), 60.0))
        return {"failed": f"no usable reply from the server in {self.tries} tries: {why}"}

    def _over(self, worst: float) -> bool:
        return self.spent + self._reserved + worst > self.max_cost

    async def _send(self, client, key: str, call: Request, worst: float):
        """(row for the log or None, why it failed, seconds the server asked to wait)."""
        import openai

        sampling = {"temperature": call.temperature, "top_p": call.top_p, "seed": call.seed}
        lost = {"key": key, "lost": True, "cost": worst}
        try:
            completion = await client.chat.completions.create(
                model=self.model,
                messages=call.messages(),
                max_tokens=call.max_tokens,
                extra_headers={"Idempotency-Key": key},
                **sampling,
            )
            choice = completion.choices[0]
            reply, finish = choice.message.content, choice.finish_reason
            if not isinstance(reply, str):
                raise ValueError("no text")
            usage = completion.usage
            tokens = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
            known = all(type(count) is int and count >= 0 for count in tokens)
            cost = self.prices.cost(*tokens) if known else worst
        except openai.APIStatusError as error:
            return self._refused(error, key)
        except openai.APITimeoutError:
            # it may have been answered and billed all the same
            return (lost if worst else None), "no answer in time", 0.0
        except openai.APIConnectionError:
            return (lost if worst else None), "the connection failed or broke off", 0.0
        except (openai.APIError, AttributeError, IndexError, TypeError, ValueError):
            # a 200 whose body is no chat completion
            return (lost if worst else None), "a reply that is no chat completion", 0.0
        return {"key": key, "reply": reply, "finish": finish, "cost": cost, "tokens": tokens}, "", 0.0

    def _refused(self, error, key: str):
        """An HTTP error: to be tried again, the request's own fault, or the end of the run."""
        status = error.status_code
        if status in _RETRYABLE or status >= 500:
            after = error.response.headers.get("retry-after") or ""
            return None, f"HTTP status {status}", float(after) if after.isdecimal() else 0.0
        # some servers repeat the key in their message
        message = " ".join(str(error.message).split())[:300]
        message = message.replace(self._secret, "***") if self._secret else message
        if status in (400, 413, 422):
            return {"key": key, "rejected": f"HTTP status {status}: {message}", "cost": 0.0}, "", 0.0
        self._stopped = f"{self.base_url}: HTTP status {status}: {message}; check the address, model and key"
        return None, "", 0.0
