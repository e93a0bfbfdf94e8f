"""The PyTorch side: transformers and peft, tuned as well as ours. A child of compare.py (speed.child).

Eager or torch.compile, SDPA, no needless logits (loss and prompt score the same positions as ours), adapters
in our dtype, gradient checkpointing where ours recomputes with "block", no post-LN or head of the tower that
nobody reads. With --defaults training is what the libraries do untold: logits of every position, peft's own
adapter dtype.
"""

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import torch
import transformers
from torch.nn import functional
from transformers import (
    DynamicCache,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    StaticCache,
)

from speed import child, workloads
from speed.workloads import Item

TOWER = "q_proj|k_proj|v_proj|out_proj|fc1|fc2"


def config_of(item: Item) -> LlavaOnevisionConfig:
    vision, text = item.model.vision, item.model.text
    vision_config = {
        "model_type": "siglip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers_run,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "vision_use_head": False,
    }
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    same += ("num_key_value_heads", "vocab_size", "rope_theta", "rms_norm_eps", "tie_word_embeddings")
    same += ("max_position_embeddings",)
    text_config = {"model_type": "qwen2"} | {key: getattr(text, key) for key in same}
    return LlavaOnevisionConfig(
        vision_config=vision_config,
        text_config=text_config,
        tie_word_embeddings=text.tie_word_embeddings,
        image_token_index=text.vocab_size - 1,
        video_token_index=text.vocab_size - 2,
    )


def canonical(key: str) -> str:
    """Our name of one of their parameters."""
    for prefix in ("base_model.model.", "model."):
        key = key.removeprefix(prefix)
    for part in ("vision_model.", "encoder.", "embeddings.", "base_layer.", ".default.weight"):
        key = key.replace(part, "")
    return "language_model." + key if key.startswith("lm_head") else key


class Model:
    """The transformers model with the drawn weights; parts under the names that every version has."""

    def __init__(self, item: Item, device: torch.device, defaults: bool):
        dtype = getattr(torch, item.dtype)
        with device:
            self.whole = LlavaOnevisionForConditionalGeneration._from_config(
                config_of(item), dtype=dtype, attn_implementation="sdpa"
            )
        inner = self.whole.model
        self.tower = getattr(inner.vision_tower, "vision_model", inner.vision_tower)
        self.projector, self.decoder = inner.multi_modal_projector, inner.language_model
        self.head, self.newline = self.whole.lm_head, inner.image_newline
        self.whole.requires_grad_(False)
        self.adapters: dict[str, torch.nn.Parameter] = {}
        if item.kind == "train":
            lora = peft.LoraConfig(
                r=workloads.RANK,
                lora_alpha=workloads.ALPHA,
                lora_dropout=0.0,
                target_modules=rf".*vision_tower.*\.({TOWER})|.*multi_modal_projector\.(linear_1|linear_2)",
            )
            self.whole = peft.get_peft_model(self.whole, lora, autocast_adapter_dtype=defaults)
        with torch.no_grad():
            for key, parameter in self.whole.named_parameters():
                name = canonical(key)
                if parameter.requires_grad:
                    self.adapters[name] = parameter
                parameter.copy_(torch.from_numpy(workloads.weight(name, tuple(parameter.shape))))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Projected features [N, T, H] of views uint8 [N, S, S, 3], without the norm that nobody reads."""
        x = pixels.permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5).to(self.newline.dtype)
        encoded = self.tower.encoder(inputs_embeds=self.tower.embeddings(x)).last_hidden_state
        return self.projector(encoded)


class Vision:
    def __init__(self, item: Item, how: "How"):
        self.model = Model(item, how.device, False)
        self.pixels = torch.from_numpy(workloads.pixels(item)[0]).to(how.device)
        self.run = how.compiled(self.model.features)

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        return self.run(self.pixels)

    def outputs(self) -> dict[str, torch.Tensor]:
        return {"features": self.step()}


class Prefill:
    def __init__(self, item: Item, how: "How"):
        self.model = Model(item, how.device, False)
        self.ids = torch.from_numpy(workloads.token_ids(item)).long().to(how.device)
        self.run = how.compiled(self._prefill)

    def _prefill(self, ids: torch.Tensor) -> torch.Tensor:
        embeds = self.model.decoder.embed_tokens(ids)
        out = self.model.decoder(inputs_embeds=embeds, use_cache=True)
        return self.model.head(out.last_hidden_state[:, -1])

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        return self.run(self.ids)

    def outputs(self) -> dict[str, torch.Tensor]:
        return {"logits": self.step()}


class Decode:
    """Eager: the growing cache of generate(). Compiled: a static cache, one graph for every position."""

    def __init__(self, item: Item, how: "How", budget: int):
        self.item, self.how = item, how
        self.model = Model(item, how.device, False)
        self.ids = torch.from_numpy(workloads.token_ids(item)).long().to(how.device)
        self.slots = item.length + budget * workloads.DECODE_TOKENS + 1
        self.run = how.compiled(self._one)
        with torch.inference_mode():
            self.cache = self._cache()
            self.token = self._one(self.ids, self.cache).argmax(-1, keepdim=True)
        self.first = self.token

    def _cache(self) -> Any:
        if self.how.compile:
            return StaticCache(config=self.model.decoder.config, max_cache_len=self.slots)
        return DynamicCache(config=self.model.decoder.config)

    def _one(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        out = self.model.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        return self.model.head(out.last_hidden_state[:, -1])

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        written = []
        for _ in range(workloads.DECODE_TOKENS):
            self.token = self.run(self.token, self.cache).argmax(-1, keepdim=True)
            written.append(self.token)
        return torch.cat(written, dim=1)

    @torch.inference_mode()
    def outputs(self) -> dict[str, torch.Tensor]:
        cache = self._cache()
        self._one(self.ids[:, :-1], cache)
        logits = self._one(self.ids[:, -1:], cache)
        if self.item.dtype != "float32":
            return {"logits": logits}
        return {"logits": logits, "ids": torch.cat([self.first, self.step()], dim=1).to(torch.int32)}


class Train:
    def __init__(self, item: Item, how: "How"):
        self.item, self.how = item, how
        self.model = Model(item, how.device, how.defaults)
        if item.remat == "block":
            self.model.whole.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.whole.train()
        row = workloads.row(item)
        self.pixels, self.ids, self.positions, self.targets = (
            torch.from_numpy(np.ascontiguousarray(each)).to(how.device)
            for each in (row.pixels, row.input_ids, row.positions, row.targets)
        )
        self.parameters = list(self.model.adapters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, workloads.LEARNING_RATE, (0.9, 0.999), 1e-8, weight_decay=0.0
        )
        self.loss = how.compiled(self._default_loss if how.defaults else self._loss)

    def _embeds(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Text embeddings with the (reduced) view tokens and the newline in their places."""
        rows, views = pixels.shape[:2]
        features = self.model.features(pixels.flatten(0, 1))
        side, reduced = self.item.model.vision.grid_side, self.item.reduced_side
        if reduced < side:
            maps = features.unflatten(1, (side, side)).permute(0, 3, 1, 2)
            features = functional.interpolate(maps, (reduced, reduced), mode="bilinear").flatten(2).mT
        pool = features.reshape(rows, -1, features.shape[-1])
        newline = self.model.newline.expand(rows, 1, -1)
        text = self.model.decoder.embed_tokens(ids[:, pool.shape[1] + 1 :])
        return torch.cat([pool, newline, text], dim=1)

    def _loss(self, pixels, ids, positions, targets) -> torch.Tensor:
        embeds = self._embeds(pixels, ids)
        hidden = self.model.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        chosen = hidden.gather(1, positions.long()[..., None].expand(-1, -1, hidden.shape[-1]))
        scores = self.model.head(chosen).flatten(0, 1).float()
        return functional.cross_entropy(scores, targets.long().flatten())

    def _default_loss(self, pixels, ids, positions, targets) -> torch.Tensor:
        labels = torch.full_like(ids, -100, dtype=torch.long)
        labels[:, -targets.shape[1] :] = targets
        embeds = self._embeds(pixels, ids)
        return self.model.whole(inputs_embeds=embeds, labels=labels, use_cache=False).loss

    def _backward(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.pixels, self.ids, self.positions, self.targets)
        loss.backward()
        return loss.detach()

    def step(self) -> torch.Tensor:
        loss = self._backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss

    def outputs(self) -> dict[str, torch.Tensor]:
        loss = self._backward()
        found = {"loss": loss} | {name: value.grad for name, value in self.model.adapters.items()}
        self.optimizer.zero_grad()
        return found


class How:
    """Device and mode of this side."""

    def __init__(self, device: str, compile: bool, defaults: bool):
        self.device, self.compile, self.defaults = torch.device(device), compile, defaults

    def compiled(self, function: Callable) -> Callable:
        return torch.compile(function) if self.compile else function

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Side:
    """Requests of compare.py."""

    def __init__(self, how: How):
        self.how = how

    def prepare(self, item: dict, budget: int, cache: str) -> dict:
        self.item = Item(**item)
        kinds = {"vision": Vision, "prefill": Prefill, "train": Train}
        start = time.perf_counter()
        if self.item.kind == "decode":
            self.work = Decode(self.item, self.how, budget)
        else:
            self.work = kinds[self.item.kind](self.item, self.how)
        self.how.wait()
        return {"prepare_s": time.perf_counter() - start}

    def outputs(self, path: str) -> dict:
        found = {name: value.detach().cpu() for name, value in self.work.outputs().items()}
        whole = {n: (v.float() if v.is_floating_point() else v).numpy() for n, v in found.items()}
        np.savez(path, **whole)
        return {}

    def time(self) -> dict:
        start = time.perf_counter()
        result = self.work.step()
        self.how.wait()
        seconds = time.perf_counter() - start
        return {"seconds": seconds} | ({"loss": float(result)} if self.item.kind == "train" else {})

    def memory(self, reset: bool) -> dict:
        if self.how.device.type == "cuda":  # as JAX counts: what was allocated, without the pool's spare
            return {"peak": torch.cuda.max_memory_allocated()}
        if reset:
            child.forget_peak()
        return {"peak": child.peak_bytes()}

    def limits(self, dtype: str, large: bool) -> dict:
        device = self.how.device
        side, copy_bytes, repeats = workloads.probe(large, device.type == "cuda")
        x = torch.randn(side, side, dtype=getattr(torch, dtype), device=device)
        buffer = torch.ones(copy_bytes // 4, device=device)
        return {
            "matmul": 2 * side**3 * repeats / self._best(lambda: x @ x, repeats),
            "copy": 2 * copy_bytes * repeats / self._best(lambda: buffer + 1, repeats),
            "read": copy_bytes * repeats / self._best(buffer.sum, repeats),
        }

    def _best(self, function: Callable, repeats: int) -> float:
        found = []
        for _ in range(4):
            start = time.perf_counter()
            for _ in range(repeats):
                function()
            self.how.wait()
            found.append(time.perf_counter() - start)
        return min(found[1:])

    def about(self) -> dict:
        versions = {each.__name__: each.__version__ for each in (torch, transformers, peft)}
        name = torch.cuda.get_device_name() if self.how.device.type == "cuda" else ""
        python = platform.python_version()
        return {"versions": versions, "python": python, "device": name, "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--defaults", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    child.serve(Side(How(args.device, args.compile, args.defaults)))


if __name__ == "__main__":
    main()
