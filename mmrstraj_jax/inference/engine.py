"""Answers for many prompts: batches of like shapes over all local devices, the next one read meanwhile.

Results come in the order in which they finish. A prompt's answer does not depend on its neighbours: padding
is on the right, random keys belong to the prompt.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from mmrstraj_jax import parallel
from mmrstraj_jax.config import AnyResConfig, Config, ImagePolicy, ModelConfig
from mmrstraj_jax.data import images
from mmrstraj_jax.data.collate import Example
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.inference import prompts
from mmrstraj_jax.inference.decoding import Decoder
from mmrstraj_jax.inference.options import DecodeOptions
from mmrstraj_jax.inference.prompts import Request
from mmrstraj_jax.models.mmrstraj import MMRSTraj

LENGTH_MULTIPLE = 64
VIEW_BUCKETS = Config().view_buckets


class Completion(NamedTuple):
    """What the model wrote for one request."""

    index: int  # place among the requests
    ids: list[int]  # the end token included, as HF's generate
    reason: str  # "stop": it met an end token; "length": its budget was used up
    prompt_tokens: int  # visual ones included


class Engine:
    """One model, its policy, and how many prompts it reads at a time."""

    def __init__(
        self,
        model: MMRSTraj,
        config: ModelConfig,
        policy: AnyResConfig,
        *,
        batch_size: int = 8,
        mesh: Mesh | None = None,
        image_policy: ImagePolicy = images.DEFAULT,
    ):
        """
        Args:
            config: its eos_token_ids end an answer.
            image_policy: how files become pixels; a run must be asked with the one it was trained with.
            batch_size: most rows of a device; fewer are filled up to a power of two (few programs).
            mesh: the devices to use; default: all of this process.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: expected 1 or more")
        self.decoder = Decoder(model, config.eos_token_ids, mesh or parallel.local_mesh())
        self.devices = self.decoder.mesh.size
        self.config, self.policy, self.batch_size = config, policy, batch_size
        self.image_policy = image_policy

    def complete(self, requests: Sequence[Request], options: DecodeOptions) -> Iterator[Completion]:
        """Writes an answer for every request; the longest go first (what does not fit shows at once).

        Every prompt is checked, from image headers, before the first one is run.
        Raises:
            UserError: naming the request; as prompts.measure, or prompt and budget exceed the positions.
        """
        shapes = [
            prompts.measure(request, self.config, self.policy, self.image_policy) for request in requests
        ]
        for request, shape in zip(requests, shapes, strict=True):
            self._check_budget(request, shape.length, options)
        first: dict[tuple, int] = {}  # of the prompts about the same media: they stand together
        media = [first.setdefault(prompts.media_key(request), at) for at, request in enumerate(requests)]

        def place(at: int) -> tuple[int, ...]:
            return -shapes[at].views, -(-shapes[at].length // LENGTH_MULTIPLE), media[at], at

        order = sorted(range(len(requests)), key=place)
        rows = self.batch_size * self.devices
        batches = [order[at : at + rows] for at in range(0, len(order), rows)]
        with ThreadPoolExecutor(max_workers=1) as reader:
            due = reader.submit(self._read, requests, batches[0]) if batches else None
            for number, batch in enumerate(batches):
                examples = due.result()
                if number + 1 < len(batches):
                    due = reader.submit(self._read, requests, batches[number + 1])
                yield from self._run(batch, requests, examples, options)

    def stream(self, request: Request, options: DecodeOptions) -> Iterator[int]:
        """The ids of one answer, each as soon as it is written, the end token included."""
        shape = prompts.measure(request, self.config, self.policy, self.image_policy)
        self._check_budget(request, shape.length, options)
        example = prompts.read(request, self.config, self.policy, image_policy=self.image_policy)
        for tokens in self._pieces([request], [example], [request.number or 0], options, chunk=1):
            yield int(tokens[0, 0])

    def _check_budget(self, request: Request, length: int, options: DecodeOptions) -> None:
        limit = self.config.text.max_position_embeddings
        budget = request.max_new_tokens or options.max_new_tokens
        if length + budget > limit:
            raise UserError(
                f"{request.name}: {length} prompt tokens and max_new_tokens {budget} exceed the model's "
                f"{limit} positions; lower max_new_tokens or shorten the prompt"
            )

    def _read(self, requests: Sequence[Request], batch: Sequence[int]) -> list[Example]:
        known: dict[tuple, np.ndarray] = {}
        return [
            prompts.read(requests[at], self.config, self.policy, known, self.image_policy) for at in batch
        ]

    def _pieces(self, requests, examples, numbers, options: DecodeOptions, **how):
        """Decoder.tokens of a batch, filled up with rows that write nothing."""
        budgets = [request.max_new_tokens or options.max_new_tokens for request in requests]
        share = -(-len(examples) // self.devices)  # rows of a device
        spare = self.devices * min(1 << (share - 1).bit_length(), self.batch_size) - len(examples)
        # A single call gets its exact views: a tower pass over empty ones would be most of its cost.
        view_buckets = VIEW_BUCKETS if len(examples) > 1 else ()
        examples = [*examples, *[None] * spare]
        inputs = prompts.model_batch(
            examples,
            self.config,
            self.policy,
            length_multiple=LENGTH_MULTIPLE,
            view_buckets=view_buckets,
        )
        inputs = prompts.share_views(inputs, examples, self.devices)
        # A slot's id may lie behind the last row of the vocabulary: it is never looked up.
        rows = self.config.text.vocab_size
        ids = [[number for number in request.ids if number < rows] for request in requests] + [[]] * spare
        numbers, budgets = [*numbers, *[0] * spare], [*budgets, *[0] * spare]
        return self.decoder.tokens(inputs, ids, options, numbers=numbers, budgets=budgets, **how)

    def _run(self, batch, requests, examples, options: DecodeOptions) -> Iterator[Completion]:
        mine = [requests[at] for at in batch]
        numbers = [at if requests[at].number is None else requests[at].number for at in batch]
        written: dict[int, list[int]] = {row: [] for row in range(len(batch))}
        for piece in self._pieces(mine, examples, numbers, options):
            for row in list(written):
                ids = written[row]
                ids += [int(token) for token in piece[row] if token >= 0]
                stopped = bool(ids) and ids[-1] in self.decoder.eos
                if stopped or len(ids) == (mine[row].max_new_tokens or options.max_new_tokens):
                    reason = "stop" if stopped else "length"
                    yield Completion(batch[row], written.pop(row), reason, len(examples[row].input_ids))
        assert not written, "the decoder ended before its rows"
