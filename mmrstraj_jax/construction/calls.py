"""Conversations with a language model, the log of their calls, and what a run of them would still cost.

A conversation is a generator: it yields requests, is sent their outcomes, and returns its result. So a run,
its estimate and its repetition from the log are the same code.
"""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mmrstraj_jax import jsonl
from mmrstraj_jax.construction.request import Request
from mmrstraj_jax.errors import UserError

_REPLY_CHARS = 2000  # of an unusable reply that go into its repair: megabytes would be paid again


@dataclass(frozen=True)
class Prices:
    """Dollars for a million tokens, and what an image counts."""

    prompt: float = 0.0
    completion: float = 0.0
    image_tokens: int = 1500

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6

    def worst(self, request: Request) -> float:
        """Dollars that one call can cost at most."""
        return self.cost(request.tokens(self.image_tokens)[1], request.max_tokens)


class Outcome(NamedTuple):
    """What came of a request: `values` or, with None, why not (unusable twice, or rejected)."""

    key: str
    values: dict[str, str] | None
    problem: str = ""


Conversation = Generator[Request, Outcome, Any]


def once(request: Request) -> Conversation:
    """A conversation of one request; its result is the outcome."""
    return (yield request)


class Log:
    """Rows of a log file: `sent` before a call, then its reply, or `lost`, `refused` or `rejected`."""

    def __init__(self, path: Path):
        """Reads it, if there is one. Raises UserError: a damaged log."""
        self.replies: dict[str, dict[str, Any]] = {}
        self.answered = False  # whether the server ever accepted a call
        self.spent = 0.0  # dollars, with the worst case of calls that may have been billed without an answer
        self._open: dict[str, float] = {}
        for row in jsonl.read(path) if path.exists() else ():
            key, cost = row.get("key"), row.get("cost")
            if not isinstance(key, str) or isinstance(cost, bool) or not isinstance(cost, int | float):
                raise UserError(f"{path}: a row without key or cost; expected a log of language-model calls")
            self.count(row)
        if not self.answered:
            # a server that has rejected all there was did so for a setting, which may be mended by now
            self.replies.clear()
        # calls that were under way when their process died
        self.spent += sum(self._open.values())
        self._open.clear()

    def count(self, row: dict[str, Any]) -> None:
        """Takes in a row."""
        key = row["key"]
        if "sent" in row:
            self.spent += self._open.pop(key, 0.0)
            self._open[key] = row["cost"]
            return
        self._open.pop(key, None)
        self.spent += row["cost"]
        self.answered |= "reply" in row
        if "reply" in row or "rejected" in row:
            self.replies[key] = row

    def settled(self, model: str, request: Request) -> tuple[Outcome | None, Request]:
        """(the outcome, _) as far as the log knows it, else (None, what has to be asked next)."""
        key, call = request.key(model), request
        for attempt in ("first", "repaired"):
            row = self.replies.get(call.key(model))
            if row is None:
                return None, call
            if "rejected" in row:
                return Outcome(key, None, row["rejected"]), call
            values, why = request.read(row["reply"], row["finish"])
            if values is not None or attempt == "repaired":
                return Outcome(key, values, why), call
            call = dataclasses.replace(request, repair=(row["reply"][:_REPLY_CHARS], why))
        raise AssertionError("unreachable")


# ---- estimates ----


class Plan(NamedTuple):
    """What a run would do. `most` is what a cost cap has to allow for, repairs aside."""

    calls: int
    logged: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    most: float

    def __str__(self) -> str:
        text = f"{self.calls} calls ({self.logged} more are in the log), about {self.prompt_tokens:,} prompt "
        text += (
            f"and {self.completion_tokens:,} answer tokens, about ${self.cost:.2f}, at most ${self.most:.2f}"
        )
        return text + ("" if self.most else " (name --prompt-price and --completion-price for dollars)")


def plan(conversations: Sequence[Callable[[], Conversation]], model: str, log: Path, prices: Prices) -> Plan:
    """Calls, tokens and dollars that a run would still take; sends nothing.

    What is in the log is replayed. Answers that are not there yet are taken for half of what they may be,
    and for all of it in `most`.
    """
    known = Log(log)
    typical, _ = _walk(conversations, model, known, 0.5)
    largest, logged = _walk(conversations, model, known, 1.0)
    tokens = sum(call.tokens(prices.image_tokens)[0] for call in typical)
    answers = sum(call.max_tokens // 2 for call in typical)
    most = sum(prices.worst(call) for call in largest)
    return Plan(len(typical), logged, tokens, answers, prices.cost(tokens, answers), most)


def _walk(conversations, model: str, known: Log, fill: float) -> tuple[list[Request], int]:
    """The calls to be made, each once, with stand-ins for answers; and how many are in the log already."""
    calls: dict[str, Request] = {}
    logged: set[str] = set()
    for start in conversations:
        conversation = start()
        try:
            request = next(conversation)
            while True:
                outcome, call = known.settled(model, request)
                if outcome is None:
                    calls[call.key(model)] = call
                    # of its own wording: what is asked about it must not count as asked before
                    name, chars = call.key(model), int(fill * 4 * request.max_tokens)
                    stand_in = {
                        field: name.ljust(chars, "x")[: max(1, min(rule.max_chars, chars))]
                        for field, rule in request.schema.items()
                    }
                    outcome = Outcome(name, stand_in)
                else:
                    logged.add(outcome.key)
                request = conversation.send(outcome)
        except StopIteration:
            continue
    return list(calls.values()), len(logged)
