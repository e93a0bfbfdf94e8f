"""The JAX side without one of its savings: "before" of benchmarks/wins.py. A child like speed.ours.

Also the workloads that only wins.py has: a stream of rows of different sizes, whole short answers, and pixels
on their way to the device.
"""

import argparse
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mmrstraj_jax import parallel
from mmrstraj_jax.inference import decoding
from mmrstraj_jax.inference.decoding import SLOT_MULTIPLE, Decoder, laid_out, round_up
from mmrstraj_jax.inference.options import DecodeOptions
from mmrstraj_jax.models import attention as attention_module
from mmrstraj_jax.models import layers, qwen2, siglip
from mmrstraj_jax.models.attention import attention
from mmrstraj_jax.models.qwen2 import init_cache
from mmrstraj_jax.training import step as training_step
from mmrstraj_jax.training.step import gradients
from speed import child, ours, workloads
from speed.workloads import Item


class Stream(ours.Train):
    """One step for each row of workloads.STREAM, each in a program of its own shape."""

    def prepare(self) -> None:
        each = [dataclasses.replace(self.item, views=views) for views in workloads.STREAM]
        self.batches = [self.on_device(micro) for micro in self.padded([ours.batch(item) for item in each])]
        self.programs = {}
        for batch in self.batches:
            shape = self.shape(batch)
            if shape not in self.programs:
                self.programs[shape] = ours.Program(self.function(), *self.arguments(batch))
        self.program = self.programs[self.shape(self.batches[-1])]

    def padded(self, batches: list[dict]) -> list[dict]:
        return batches

    def shape(self, batch: dict) -> tuple:
        return tuple(leaf.shape for leaf in jax.tree.leaves(batch))

    def step(self) -> jax.Array:
        for batch in self.batches:
            loss = self.run(self.programs[self.shape(batch)], batch)
        return loss

    def outputs(self) -> dict[str, Any]:
        losses, trees = zip(*(self.differentiate(batch) for batch in self.batches), strict=True)
        return {"losses": jnp.stack(losses)} | jax.tree.map(lambda *leaves: sum(leaves), *trees)


class PaddedStream(Stream):
    """Every row padded to the largest one's views and length."""

    def padded(self, batches: list[dict]) -> list[dict]:
        tokens = self.item.model.vision.num_patches
        views = max(batch["inputs"].views.shape[1] for batch in batches)
        length = max(batch["inputs"].input_ids.shape[1] for batch in batches)
        return [self._pad(batch, views, length, tokens) for batch in batches]

    @staticmethod
    def _pad(batch: dict, views: int, length: int, tokens: int) -> dict:
        own = batch["inputs"]
        rows, count = own.views.shape[:2]
        at_end = ((0, 0), (0, length - own.input_ids.shape[1]))
        newline = own.visual_index == count * tokens
        index = np.pad(np.where(newline, views * tokens, own.visual_index), at_end, constant_values=-1)
        scale = np.ones((rows, views), np.float32)
        if own.view_scale is not None:
            scale[:, :count] = own.view_scale
        inputs = own._replace(
            input_ids=np.pad(own.input_ids, at_end),
            views=np.pad(own.views, ((0, 0), (0, views - count), (0, 0), (0, 0), (0, 0))),
            visual_index=index,
            view_scale=scale,
        )
        return batch | {"inputs": inputs}


class EveryPosition(ours.Train):
    """Logits of every token, the unsupervised ones with weight 0."""

    def prepare(self) -> None:
        micro, length = ours.batch(self.item), self.item.length
        weights = np.zeros((self.item.batch, length - 1), np.float32)
        weights[:, micro["positions"][0]] = 1
        everywhere = {
            "positions": np.tile(np.arange(length - 1, dtype=np.int32), (self.item.batch, 1)),
            "targets": micro["inputs"].input_ids[:, 1:],
            "weights": weights,
            "answer": weights > 0,
        }
        self.batch = self.on_device(micro | everywhere)
        self.program = ours.Program(self.function(), *self.arguments(self.batch))


class WholeLastLayer(ours.Train):
    """The last layer's queries and MLP of every token."""

    def prepare(self) -> None:
        training_step.last_layer_is_short = lambda batch, trainable: False
        super().prepare()


class AllGradients(ours.Train):
    """Gradients of the frozen weights too; their norm is asked for, so that the compiler keeps them."""

    def function(self) -> Callable:
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(trainable, opt_state, frozen, batch, number):
            loss, grads = gradients(self.graphdef, self.config, trainable | frozen, {}, batch, number)
            mine = {name: grads.pop(name) for name in trainable}
            trainable, opt_state, metrics = self.optimizer.update(mine, opt_state, trainable, loss, number)
            return trainable, opt_state, metrics | {"loss": loss, "frozen_norm": optax.global_norm(grads)}

        return step


class AdaptersKept(ours.Train):
    """Remat "dots" keeps every product without batch axes, those with the adapters' B as well."""

    def prepare(self) -> None:
        policies = jax.checkpoint_policies
        policies.save_only_these_names = lambda *names: policies.dots_with_no_batch_dims_saveable
        super().prepare()


class AttentionAgain(ours.Train):
    """Remat "dots" does not keep attention's product with the values."""

    def prepare(self) -> None:
        attention_module.checkpoint_name = lambda x, name: x
        super().prepare()


class ScoresTurned(ours.Train):
    """Gradients of keys and values as the product's own rule has them."""

    def prepare(self) -> None:
        attention_module._over_queries = functools.partial(jnp.einsum, "nqs,nqd->nsd")
        super().prepare()


class WideScale(ours.Train):
    """An adapter's scale is of what its B computes."""

    def prepare(self) -> None:
        widened, scale = layers._widened, workloads.ALPHA / workloads.RANK
        layers._widened = lambda low, matrix: scale * widened(low / scale, matrix)
        super().prepare()


class LogitsAgain(ours.Train):
    """The backward pass computes the logits anew, though one chunk holds them all."""

    def prepare(self) -> None:
        loss = training_step.supervised_loss
        training_step.supervised_loss = lambda logits, *args, **how: loss(
            jax.checkpoint(logits), *args, **how
        )
        super().prepare()


class Unrolled(ours.Train):
    """Layers one after the other in the program, instead of a loop over them."""

    def prepare(self) -> None:
        def unrolled(*args: Any, **how: Any) -> Any:
            return layers.scan_layers(*args, **(how | {"unroll": True}))

        siglip.scan_layers = qwen2.scan_layers = unrolled
        super().prepare()


class ViewsTogether(ours.Vision):
    """Large views all at once on a CPU too."""

    def __init__(self, item: Item):
        siglip.LARGE_VIEW = 2**62
        super().__init__(item)


class StackedTower(ours.Vision):
    """The tower's layers as one stack, in a loop over it."""

    def __init__(self, item: Item):
        ours.laid_out = lambda model, platform: model
        super().__init__(item)


class EveryQuery(ours.Prefill):
    """The last layer's queries and MLP of every token of the prompt."""

    def __init__(self, item: Item):
        one_block = qwen2.DecoderLayer.__call__

        def whole(self, x, attend, rope, keys=None, at=None):
            if at is None:
                return one_block(self, x, attend, rope, keys)
            return qwen2.along_rows(one_block(self, x, causal(attend), rope, keys), at)

        def causal(attend):
            def both(q, k, v):
                attend(q[:, :1], k, v)  # which keeps keys and values
                return attention(q, k, v, is_causal=True)

            return both

        qwen2.DecoderLayer.__call__ = whole
        super().__init__(item)


class WholeScores(ours.Prefill):
    """JAX's own attention: scores of all queries at once, of the keys behind them too."""

    def __init__(self, item: Item):
        def library(q, k, v, is_causal, segment_ids):
            return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation="xla")

        attention_module._in_blocks = library
        super().__init__(item)


class SharedMasks(ours.Prefill):
    """The compiler may write masks out for all layers at once."""

    def __init__(self, item: Item):
        attention_module.lax = types.SimpleNamespace(**vars(jax.lax) | {"optimization_barrier": lambda x: x})
        super().__init__(item)


class RoundedProducts(ours.Prefill):
    """Products in bfloat16 are rounded by XLA's own product."""

    def __init__(self, item: Item):
        layers._rounded_apart = layers._times
        super().__init__(item)


class RoundedActivations(ours.Prefill):
    """Every step of the activation function is rounded to bfloat16."""

    def __init__(self, item: Item):
        qwen2.rounded_once = siglip.rounded_once = lambda function, *inputs: function(*inputs)
        super().__init__(item)


class WideGradients(ours.Train):
    """An adapter's gradient as autodiff writes it: a layer's whole gradient is read transposed."""

    def __init__(self, item: Item):
        layers._widened = layers._times
        super().__init__(item)


class HeadsTogether(ours.Train):
    """Attention's backward pass as autodiff writes it: all heads at once."""

    def __init__(self, item: Item):
        attention_module._blocks_and_back_by_head = attention_module._blocks
        super().__init__(item)


class WholeHead(ours.Train):
    """The gradient through the language model's head as one product."""

    def __init__(self, item: Item):
        qwen2.math = types.SimpleNamespace(gcd=lambda *numbers: 1)
        super().__init__(item)


class HostLoop(ours.Decode):
    """A program a token, its cache copied: the host asks for each."""

    def __init__(self, item: Item, budget: int):
        graphdef, params = nnx.split(laid_out(ours.build(item), jax.default_backend()))
        self.item, self.decoder = item, types.SimpleNamespace(graphdef=graphdef, params=params)
        slots = round_up(item.length + budget * workloads.DECODE_TOKENS + 1, SLOT_MULTIPLE)

        @jax.jit
        def prefill(params, ids, lengths):
            text = nnx.merge(graphdef, params).language_model
            cache = init_cache(text.config, item.batch, slots, text.dtype)
            hidden, cache = text.prefill(text.embed(ids), lengths, cache)
            return jnp.argmax(text.logits(hidden), axis=-1).astype(jnp.int32), cache

        @jax.jit
        def one(params, tokens, cache):
            text = nnx.merge(graphdef, params).language_model
            hidden, cache = text.decode(tokens, cache)
            return jnp.argmax(text.logits(hidden), axis=-1).astype(jnp.int32), cache

        prompt = ours.text_inputs(item)
        self.one = one
        self.tokens, self.cache = prefill(params, prompt.input_ids, prompt.lengths)
        self.first = np.asarray(self.tokens)[:, None]

    def step(self) -> np.ndarray:
        written = []
        for _ in range(workloads.DECODE_TOKENS):
            self.tokens, self.cache = self.one(self.decoder.params, self.tokens, self.cache)
            written.append(np.asarray(self.tokens))  # as a host does that looks for the end
        return np.stack(written, axis=1)


class Stacked(ours.Decode):
    """The decoder's layers as one stack, in a loop over it."""

    def __init__(self, item: Item, budget: int):
        decoding.laid_out = lambda model, platform: model
        super().__init__(item, budget)


class RightWeights(ours.Decode):
    """x W^T for a few rows too, not W x^T."""

    def __init__(self, item: Item, budget: int):
        layers.FEW_ROWS = 0
        super().__init__(item, budget)


class HeadByHead(ours.Decode):
    """One token's attention to the cache as jax.nn writes it, a product for each key head."""

    def __init__(self, item: Item, budget: int):
        attention_module._one_query = lambda q, k, v, kv_lengths: jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=kv_lengths, implementation="xla"
        )
        super().__init__(item, budget)


class Answer:
    """Whole answers of workloads.ANSWER tokens, prompt included; rows that are done end the compiled loop."""

    budget = workloads.ANSWER

    def __init__(self, item: Item):
        self.decoder, self.item = Decoder(ours.build(item), (), parallel.local_mesh()), item
        self.options = DecodeOptions(max_new_tokens=self.budget)

    def step(self) -> np.ndarray:
        prompt, ids = ours.text_inputs(self.item), workloads.token_ids(self.item)
        pieces = self.decoder.tokens(prompt, ids, self.options)
        return np.concatenate(list(pieces), axis=1)[:, : workloads.ANSWER]

    def outputs(self) -> dict[str, Any]:
        return {"ids": self.step()}


class WholeLoop(Answer):
    """The loop runs to its end, and what is behind the answer is thrown away."""

    budget = workloads.DECODE_TOKENS + 1


class MaterialisedScores(ours.Train):
    """XLA's attention on a GPU, its scores in memory."""

    def __init__(self, item: Item):
        attention_module.uses_cudnn = lambda dtype: False
        super().__init__(item)


class Transfer:
    """Views of one large image from the host's memory into the tower's numbers, as uint8."""

    def __init__(self, item: Item):
        self.dtype, self.pixels = jnp.dtype(item.dtype), workloads.pixels(item)
        self.normalise = jax.jit(self.normalised)

    def normalised(self, pixels: jax.Array) -> jax.Array:
        return ((pixels.astype(jnp.float32) / 255 - 0.5) / 0.5).astype(self.dtype)

    def step(self) -> jax.Array:
        return self.normalise(jax.device_put(self.pixels))

    def outputs(self) -> dict[str, Any]:
        return {"pixels": self.step()}


class FloatTransfer(Transfer):
    """Normalised by NumPy on the host, float32 on the way."""

    def step(self) -> jax.Array:
        return jax.device_put((self.pixels.astype(np.float32) / 255 - 0.5) / 0.5).astype(self.dtype)


WITHOUT = {  # what is given up -> the kinds that change
    "supervised-positions": {"train": EveryPosition},
    "frozen-weights": {"train": AllGradients},
    "last-layer": {"train": WholeLastLayer},
    "adapters": {"train": AdaptersKept},
    "attention-kept": {"train": AttentionAgain},
    "queries-turned": {"train": ScoresTurned},
    "narrow-scale": {"train": WideScale},
    "one-chunk": {"train": LogitsAgain},
    "scan": {"train": Unrolled},
    "narrow-gradients": {"train": WideGradients},
    "back-by-head": {"train": HeadsTogether},
    "head-in-parts": {"train": WholeHead},
    "one-by-one": {"vision": ViewsTogether},
    "last-token": {"prefill": EveryQuery},
    "query-blocks": {"prefill": WholeScores},
    "own-masks": {"prefill": SharedMasks},
    "rounded-apart": {"prefill": RoundedProducts},
    "activations": {"prefill": RoundedActivations},
    "buckets": {"stream": PaddedStream},
    "compiled-loop": {"decode": HostLoop},
    "layout": {"decode": Stacked, "vision": StackedTower},
    "few-rows": {"decode": RightWeights},
    "one-query": {"decode": HeadByHead},
    "early-stop": {"answer": WholeLoop},
    "fused-attention": {"train": MaterialisedScores},
    "uint8": {"transfer": FloatTransfer},
}


class Side(ours.Side):
    kinds = ours.Side.kinds | {"stream": Stream, "answer": Answer, "transfer": Transfer}

    def __init__(self, without: str | None, remat: str | None):
        self.kinds = self.kinds | WITHOUT.get(without, {})
        self.remat = remat

    def prepare(self, item: dict, budget: int, cache: str) -> dict:
        item = item | ({"remat": self.remat} if self.remat else {})
        return super().prepare(item, budget, cache)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--without", choices=tuple(WITHOUT))
    parser.add_argument("--remat", choices=workloads.REMATS)
    args = parser.parse_args()
    child.serve(Side(args.without, args.remat))


if __name__ == "__main__":
    main()
