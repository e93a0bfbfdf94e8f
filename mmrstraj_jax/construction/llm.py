"""Conversations with any OpenAI-compatible server that are paid once: every reply is kept in a log.

A request is known by the SHA-256 of everything that shapes its answer, so a run that was killed replays its
log and asks only for the rest. A call that was under way at the kill was noted before it was sent, and goes
out again with the same Idempotency-Key. A server that honours this header bills it once. One that ignores it
may bill it twice, at most `concurrency` calls a kill; the log counts those at their worst case, so that a
cost cap holds all the same.
"""

import asyncio
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from mmrstraj_jax import jsonl
from mmrstraj_jax.construction.calls import Conversation, Log, Outcome, Prices
from mmrstraj_jax.construction.request import Request
from mmrstraj_jax.errors import UserError

_RETRYABLE = (408, 409, 425, 429)  # and 5xx


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
        self._reset()

    def _reset(self) -> None:
        self._known: Log | None = None
        self._under_way: dict[str, asyncio.Future] = {}
        self._reserved = 0.0
        self._stopped = ""
        self._failed: list[str] = []  # why, of the calls that failed since the last success
        self._rejected = 0
        self._unanswered = ""

    @property
    def spent(self) -> float:
        """Dollars, by the log."""
        return self._known.spent if self._known else 0.0

    def run(
        self,
        conversations: Sequence[Callable[[], Conversation]],
        progress: Callable[[int, float], None] | None = None,
    ) -> list[Any]:
        """The results of the conversations, in order; equal requests are asked once.

        Args:
          conversations: functions that start one. They are started as others end, so that memory does not
            grow with their number.
          progress: called with (conversations done, dollars spent).
        Raises:
          UserError: another process writes the log, a damaged log, a refused key (401, 403), an unknown model
            or address (404), the cost cap, or calls that failed in all their tries. Replies that came before
            are in the log; run again to go on.
        """
        with jsonl.writer(self.log) as file:
            self._reset()
            self._known = Log(self.log)
            results = asyncio.run(self._run(conversations, file, progress))
        if self._stopped or self._unanswered:
            raise UserError(self._stopped or self._unanswered)
        return results

    async def _run(self, conversations, file: IO[bytes], progress) -> list[Any]:
        import openai

        results: list[Any] = [None] * len(conversations)
        waiting = iter(enumerate(conversations))
        done = missing = 0

        async def work(client) -> None:
            nonlocal done, missing
            for number, start in waiting:
                try:
                    results[number] = await self._converse(client, start(), file)
                    done += 1
                except _Unanswered as failure:
                    missing += 1
                    if self._stopped:
                        return
                    self._unanswered = (
                        f"{missing} of {len(conversations)} conversations have no answer ({failure}); "
                        f"what came is in {self.log}: run again to ask for the rest"
                    )
                if progress is not None:
                    progress(done, self.spent)

        # our own retries, which know the cost cap and log what may have been billed
        async with openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self._secret or "none", max_retries=0, timeout=self.timeout
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(max(1, min(self.concurrency, len(conversations)))):
                        group.create_task(work(client))
            except ExceptionGroup as failures:
                # a full disk or a failing progress bar, not a failed call: its own kind of error
                raise failures.exceptions[0] from None
        return results

    async def _converse(self, client, conversation: Conversation, file: IO[bytes]) -> Any:
        try:
            request = next(conversation)
            while True:
                request = conversation.send(await self._settle(client, request, file))
        except StopIteration as end:
            return end.value

    async def _settle(self, client, request: Request, file: IO[bytes]) -> Outcome:
        """The outcome, after at most one repair. Raises _Unanswered."""
        while True:
            outcome, call = self._known.settled(self.model, request)
            if outcome is not None:
                return outcome
            key = call.key(self.model)
            if key in self._under_way:
                # two captions of one wording make one request
                await asyncio.wait([self._under_way[key]])
                if key not in self._known.replies:
                    raise _Unanswered("the same call failed elsewhere")
                continue
            self._under_way[key] = asyncio.get_running_loop().create_future()
            try:
                await self._reply(client, key, call, file)
            finally:
                self._under_way.pop(key).set_result(None)

    async def _reply(self, client, key: str, call: Request, file: IO[bytes]) -> None:
        """Brings a reply into the log. Raises _Unanswered: no try succeeded, or the run has to stop."""
        worst, why = self.prices.worst(call), ""
        for attempt in range(1, self.tries + 1):
            await self._wait_for_budget(worst)
            if self._stopped:
                raise _Unanswered(self._stopped)
            self._write(file, {"key": key, "sent": True, "cost": worst})
            self._reserved += worst
            try:
                row, why, pause = await self._send(client, key, call, worst)
            finally:
                self._reserved -= worst
            self._write(file, row)
            self._stop_if_nothing_is_accepted(row)
            if key in self._known.replies:
                self._failed.clear()
                return
            if self._stopped:
                raise _Unanswered(self._stopped)
            if attempt < self.tries:
                wait = self.backoff * 2 ** (attempt - 1) * self._jitter.uniform(0.5, 1.5)
                await asyncio.sleep(min(max(wait, pause), 60.0))
        self._failed.append(why)
        if len(self._failed) >= max(4, self.concurrency):
            self._stopped = (
                f"{self.base_url}: {len(self._failed)} calls in a row failed {self.tries} times ({why}); see "
                f"to the server and run again: every reply so far is in {self.log}"
            )
        raise _Unanswered(f"{why}, {self.tries} times")

    def _stop_if_nothing_is_accepted(self, row: dict[str, Any]) -> None:
        """One bad request is that request's fault; when all are rejected, it is a setting's."""
        if "rejected" not in row or self._known.answered:
            return
        self._rejected += 1
        if self._rejected == max(4, self.concurrency):
            self._stopped = (
                f"{self.base_url}: rejected all of the first {self._rejected} calls ({row['rejected']}); see "
                "to the model's name, --max-tokens and --extra-body and run again"
            )

    def _write(self, file: IO[bytes], row: dict[str, Any]) -> None:
        jsonl.append(file, row)
        self._known.count(row)

    async def _wait_for_budget(self, worst: float) -> None:
        while not self._stopped and self.max_cost is not None:
            if self.spent + self._reserved + worst <= self.max_cost:
                return
            if self._reserved and self.spent + worst <= self.max_cost:
                # calls under way may turn out cheaper than their worst case
                await asyncio.sleep(0.02)
                continue
            self._stopped = (
                f"--max-cost {self.max_cost:g}: {self.spent:.4g} are spent, the next call may cost up to "
                f"{worst:.4g}; every reply so far is in {self.log}; raise --max-cost to go on"
            )

    async def _send(self, client, key: str, call: Request, worst: float):
        """(row for the log, why it failed, seconds the server asked to wait)."""
        import openai

        sampling = {"temperature": call.temperature, "top_p": call.top_p, "seed": call.seed}
        why = ""
        try:
            completion = await client.chat.completions.create(
                model=self.model,
                messages=call.messages(),
                max_tokens=call.max_tokens,
                extra_headers={"Idempotency-Key": key},
                extra_body=json.loads(call.extra) if call.extra else None,
                **sampling,
            )
            choice = completion.choices[0]
            reply, finish = choice.message.content, choice.finish_reason
            if reply is None:
                # a refusal, a filter, or a thought that the server set apart: paid, and no usable answer
                reply = getattr(choice.message, "refusal", None) or ""
            if not isinstance(reply, str):
                raise ValueError("no text")
            usage = completion.usage
            tokens = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
            known = all(type(count) is int and count >= 0 for count in tokens)
            cost = self.prices.cost(*tokens) if known else worst
            return {"key": key, "reply": reply, "finish": finish, "cost": cost, "tokens": tokens}, "", 0.0
        except openai.APIStatusError as error:
            return self._refused(error, key)
        except openai.APITimeoutError:
            why = "no answer in time"
        except openai.APIConnectionError:
            why = "the connection failed or broke off"
        except UserError:
            raise
        except (openai.APIError, AttributeError, IndexError, TypeError, ValueError):
            why = "a reply that is no chat completion"
        # it may have been answered and billed all the same
        return {"key": key, "lost": why, "cost": worst}, why, 0.0

    def _refused(self, error, key: str):
        """An HTTP error: to be tried again, the request's own fault, or the end of the run."""
        status = error.status_code
        if status in _RETRYABLE or status >= 500:
            after = error.response.headers.get("retry-after") or ""
            row = {"key": key, "refused": status, "cost": 0.0}
            return row, f"HTTP status {status}", float(after) if after.isdecimal() else 0.0
        # some servers repeat the key in their message
        message = " ".join(str(error.message).split())[:300]
        message = message.replace(self._secret, "***") if self._secret else message
        if status in (400, 413, 422):
            return {"key": key, "rejected": f"HTTP status {status}: {message}", "cost": 0.0}, "", 0.0
        self._stopped = f"{self.base_url}: HTTP status {status}: {message}; check the address, model and key"
        return {"key": key, "refused": status, "cost": 0.0}, "", 0.0


class _Unanswered(Exception):
    """A conversation cannot go on in this run."""
