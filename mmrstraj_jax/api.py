"""The Python API, three names: `load(path)` gives a Model with `.generate`, `.logits` and `.features`.

model = mmrstraj_jax.load("runs/stage2")
model.generate([{"role": "user", "content": "<image>\\nIs there a bridge?"}], images=["tile.png"])
"""

import dataclasses
import functools
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from PIL import Image

from mmrstraj_jax.config import AnyResConfig, ImagePolicy, ModelConfig
from mmrstraj_jax.data import anyres as planning
from mmrstraj_jax.data import chat
from mmrstraj_jax.data import images as image_files
from mmrstraj_jax.data.collate import Example
from mmrstraj_jax.data.tokenizer import Tokenizer, bind_token_ids
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.inference import prompts
from mmrstraj_jax.inference.engine import LENGTH_MULTIPLE, Engine
from mmrstraj_jax.inference.options import DecodeOptions
from mmrstraj_jax.inference.prompts import ImageLike, Request, VideoLike
from mmrstraj_jax.models.mmrstraj import Inputs, MMRSTraj
from mmrstraj_jax.models.token_reduction import visual_pool

DTYPES = ("float32", "bfloat16", "float16", "source")


@functools.partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef: nnx.GraphDef, params: nnx.State, inputs: Inputs) -> Float[jax.Array, "B L V"]:
    model = nnx.merge(graphdef, params)
    return model.logits(model.hidden_states(inputs))


@functools.partial(jax.jit, static_argnames="graphdef")
def _features(graphdef: nnx.GraphDef, params: nnx.State, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Tower features [V, T, D] and pool vectors [N, H] of one row."""
    model = nnx.merge(graphdef, params)
    tower = model.encode_views(inputs.views[0], one_by_one=jax.default_backend() == "cpu")
    pool = visual_pool(
        model.multi_modal_projector(tower)[None],
        model.image_newline[...],
        inputs.view_scale,
        inputs.canvas_index,
        inputs.canvas_scale,
    )
    return tower, pool[0, jnp.maximum(inputs.visual_index[0], 0)]


class Model:
    """A loaded model: weights, sizes, AnyRes policy, and its tokenizer where the folder had one.

    Attributes: config (ModelConfig with token ids), anyres (AnyResConfig), tokenizer (or None), model
    (MMRSTraj), engine (inference.engine.Engine), image_policy (ImagePolicy, the run's own).
    """

    def __init__(
        self,
        model: MMRSTraj,
        config: ModelConfig,
        anyres: AnyResConfig,
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int = 8,
        image_policy: ImagePolicy = image_files.DEFAULT,
    ):
        """
        Args:
            anyres: its view and patch size must be the tower's.
            tokenizer: needed for messages; token ids work without.
            batch_size: most conversations that `generate` runs at a time.
            image_policy: how image files become pixels.
        Raises:
            UserError: a policy of another view size, or a tokenizer that does not belong to the model.
        """
        vision = config.vision
        if (anyres.view_size, anyres.patch_size) != (vision.image_size, vision.patch_size):
            raise UserError(
                f"anyres: views of {anyres.view_size} px in patches of {anyres.patch_size}, the tower reads "
                f"{vision.image_size} px in patches of {vision.patch_size}; see AnyResConfig.for_views"
            )
        self.config = bind_token_ids(config, tokenizer) if tokenizer else config
        self.model, self.anyres, self.tokenizer = model, anyres, tokenizer
        self.image_policy = image_policy
        how = {"batch_size": batch_size, "image_policy": image_policy}
        self.engine = Engine(model, self.config, anyres, **how)

    def generate(
        self,
        messages_or_ids: Any,
        images: Sequence | ImageLike | None = None,
        videos: Sequence | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stream: Callable[[Any], None] | None = None,
    ) -> Any:
        """Answers one conversation, or each of a list of them.

        Args:
            messages_or_ids: one of
                - a question (str), or messages {"role", "content"} as `data.chat.prompt` takes them, where
                  "<image>" marks a slot; without any, the visual input goes in front of the first user text.
                  Gives text, control tokens left out;
                - token ids, one config.image_token_id per image, one video_token_id per video, run as is.
                  Gives the list of new ids, the end token included (as HF's generate);
                - a list of either. Gives a list, in its order.
            images: paths, PIL images or arrays uint8 [h, w, 3]; for a list of conversations one list each. A
                single image is seen in Higher AnyRes, two or more of a conversation as one padded view each.
            videos: each a list of frames (as images) or an array uint8 [F, h, w, 3].
            temperature: 0 is greedy: argmax, nothing else, unless a repetition_penalty is given.
            repetition_penalty: HF's, over prompt and answer; generation_config.json is not read.
            seed: the random key of a row comes from it and from the row's place in the list.
            stream: called with each new piece of text (complete characters) or each new id; one conversation.
        Raises:
            UserError: bad options, slots that do not match, an unreadable image, no tokenizer for messages.
        """
        options = DecodeOptions(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
        many = _is_many(messages_or_ids)
        if stream is not None and many:
            raise UserError("stream: expected one conversation, not a list of them")
        requests, texts = [], []
        for at, (prompt, pictures, clips) in enumerate(_samples(messages_or_ids, images, videos, many)):
            texts.append(not _is_ids(prompt))
            make = self.request if texts[-1] else Request
            name = f"conversation {at}" if many else "prompt"
            requests.append(make(prompt, pictures, clips, number=at, name=name))
        if stream is not None:
            return self._stream(requests[0], options, stream, texts[0])
        outputs: list[Any] = [None] * len(requests)
        for done in self.engine.complete(requests, options):
            outputs[done.index] = self.tokenizer.decode(done.ids) if texts[done.index] else done.ids
        return outputs if many else outputs[0]

    def logits(
        self, input_ids: Any, images: Sequence | ImageLike | None = None, videos: Sequence | None = None
    ) -> Float[np.ndarray, "L V"] | list[Float[np.ndarray, "L V"]]:
        """float32 logits of every position of a sample, visual tokens included.

        Args:
            input_ids: token ids, ONE image id per image (video id per video); a list of samples gives a list.
            images, videos: as in `generate`.
        Returns:
            [L_expanded, V]; row i predicts token i + 1.
        Raises:
            UserError: slots that do not match, an unreadable image, ids outside the vocabulary.
        """
        many = _is_many(input_ids)
        outputs = []
        for ids, pictures, clips in _samples(input_ids, images, videos, many):
            if not _is_ids(ids):
                raise UserError("logits: expected token ids (data.chat.prompt turns messages into ids)")
            request = Request(ids, pictures, clips, name=f"sample {len(outputs)}")
            prompts.measure(request, self.config, self.anyres, self.image_policy)
            example = prompts.read(request, self.config, self.anyres, image_policy=self.image_policy)
            logits = self._run(_logits, example)
            outputs.append(np.asarray(logits[0, : len(example.input_ids)]))
        return outputs if many else outputs[0]

    def features(self, images: Sequence[ImageLike] | ImageLike) -> Any:
        """What the model sees of an image, or of each of a list, every one on its own in Higher AnyRes.

        Returns:
            {"tower": float32 [views, T, D] (feature layers of SigLIP, base view first),
            "packed": float32 [N, H] (the visual tokens as the language model gets them, newlines included)}.
        Raises:
            UserError: an unreadable image.
        """
        if _is_image(images):
            return self._image_features(images)
        return [self._image_features(image) for image in images]

    def _image_features(self, source: ImageLike) -> dict[str, np.ndarray]:
        image = image_files.load(source, self.image_policy)
        plan = planning.plan(*image.size, self.anyres)
        views = image_files.views(image, plan, self.anyres.view_size)
        ids = np.zeros(plan.num_tokens, np.int32)
        tower, packed = self._run(_features, Example("image", ids, views, (plan,), (0,)))
        return {
            "tower": np.asarray(tower[: plan.num_views], np.float32),
            "packed": np.asarray(packed[: plan.num_tokens], np.float32),
        }

    def _run(self, function: Callable, example: Example) -> Any:
        inputs = prompts.model_batch([example], self.config, self.anyres, length_multiple=LENGTH_MULTIPLE)
        return function(self.engine.decoder.graphdef, self.engine.decoder.params, inputs)

    def request(
        self,
        messages: str | Sequence[Mapping],
        images: Sequence[ImageLike] = (),
        videos: Sequence[VideoLike] = (),
        **fields: Any,
    ) -> Request:
        """Messages as a Request for `engine.complete`, which runs many and yields each as it finishes.

        Args:
            messages, images, videos: of one conversation, as in `generate`.
            fields: max_new_tokens, number, name of the Request.
        Raises:
            UserError: no tokenizer, bad messages, or images and videos together.
        """
        if self.tokenizer is None:
            raise UserError("messages need a tokenizer; put tokenizer.json beside the weights or give ids")
        if len(images) and len(videos):
            raise UserError("images and videos in one conversation: messages have one kind of slot, give ids")
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        ids = chat.prompt(messages, self.tokenizer)
        slots = len(images) + len(videos)
        if slots and not np.isin(ids, (self.tokenizer.image_id, self.tokenizer.video_id)).any():
            ids = chat.prompt(_with_slots(messages, slots), self.tokenizer)
        return Request(ids.tolist(), images, videos, **fields)

    def _stream(self, request: Request, options: DecodeOptions, report: Callable, text: bool) -> Any:
        if not text:
            ids = []
            for number in self.engine.stream(request, options):
                ids.append(number)
                report(number)
            return ids
        decoder, pieces = chat.StreamDecoder(self.tokenizer), []
        for number in self.engine.stream(request, options):
            pieces.append(decoder.push(number))
            if pieces[-1]:
                report(pieces[-1])
        pieces.append(decoder.finish())
        if pieces[-1]:
            report(pieces[-1])
        return "".join(pieces)


def load(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    anyres: AnyResConfig | str | None = None,
    batch_size: int = 8,
    image_policy: ImagePolicy | None = None,
) -> Model:
    """Loads a run directory, or weights in any supported layout (weights.load.load_model).

    Args:
        path: run directory of training (its newest good checkpoint), our format, HF or lmms-lab folder.
        dtype: of the weights, one of DTYPES; default bfloat16 on an accelerator, float32 on a CPU; "source"
            is the file's (float16, as llava-hf's are, runs on accelerators only).
        anyres: policy; default the run's or the checkpoint's own. A name ("tau", "anyres_max_9") replaces
            only that of it: grid, rounding and tau stay; an AnyResConfig is taken as it is.
        batch_size: most conversations that `generate` runs at a time.
        image_policy: how image files become pixels (EXIF, 16 bits); default the run's own.
    Raises:
        UserError: no such path, not a model, another dtype, a projector that was never trained, or what
            `weights.load.load_model` finds.
    """
    on_cpu = jax.default_backend() == "cpu"
    if dtype is None:
        dtype = jnp.float32 if on_cpu else jnp.bfloat16
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    if name not in DTYPES:
        raise UserError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}")
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"load: expected a path, found {type(path).__name__}")
    path, own_images = Path(path), image_files.DEFAULT
    # Imported here: whoever builds a Model from arrays needs neither checkpoints nor weight files.
    if (path / "base.json").is_file():
        from mmrstraj_jax.training.run import open_run

        loaded = open_run(path, dtype=dtype)
        own_images = loaded.run_config.images
    else:
        from mmrstraj_jax.weights.load import load_model

        loaded = load_model(path, dtype=dtype)
        if any(leaf.startswith("multi_modal_projector.") for leaf in loaded.fresh):
            raise UserError(f"{path}: the projector is fresh, its weights are random; run stage 0 first")
    if on_cpu and loaded.model.language_model.dtype == jnp.float16:
        raise UserError(f"{path}: float16 does not run on a CPU; choose dtype float32 or bfloat16")
    policy = loaded.anyres
    if isinstance(anyres, str):
        policy = dataclasses.replace(policy, policy=anyres)
    elif anyres is not None:
        policy = anyres
    tokenizer = None if loaded.tokenizer_dir is None else Tokenizer.load(loaded.tokenizer_dir)
    how = {"batch_size": batch_size, "image_policy": image_policy or own_images}
    return Model(loaded.model, loaded.config, policy, tokenizer, **how)


# ---- what the caller gave: one sample or many ----


def _is_image(value: Any) -> bool:
    """Whether this is one image rather than several; what it is, data.images finds out."""
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes | os.PathLike | Image.Image)
    return not several or getattr(value, "ndim", 0) == 3


def _is_ids(value: Any) -> bool:
    if hasattr(value, "ndim"):
        return value.ndim == 1
    if not isinstance(value, Sequence):
        raise UserError(f"expected a question, messages or token ids, found {type(value).__name__}")
    # Any number: prompts refuses those that are no ids by name.
    return not isinstance(value, str) and len(value) > 0 and isinstance(value[0], numbers.Number)


def _is_many(value: Any) -> bool:
    """Whether this is a list of conversations rather than one: text, ids or messages."""
    if isinstance(value, str) or _is_ids(value):
        return False
    return len(value) == 0 or not isinstance(value[0], Mapping)


def _samples(prompt: Any, pictures: Any, clips: Any, many: bool) -> list[tuple[Any, list, list]]:
    """(prompt, images, videos) of every sample."""
    if not many:
        prompt, pictures, clips = [prompt], [pictures], [clips]
    columns = [list(prompt)]
    for name, column in (("images", pictures), ("videos", clips)):
        column = [None] * len(columns[0]) if column is None else list(column)
        if len(column) != len(columns[0]):
            raise UserError(
                f"{name}: {len(column)} entries for {len(columns[0])} conversations; expected one list each"
            )
        columns.append(
            [[] if media is None else [media] if _is_image(media) else list(media) for media in column]
        )
    return list(zip(*columns, strict=True))


def _with_slots(messages: Sequence[Mapping], slots: int) -> list[Mapping]:
    """The messages with `slots` image slots in front of the first user text."""
    out = [dict(message) for message in messages]
    first = next(message for message in out if chat.normalise_role(message.get("role")) == "user")
    text = first["content"]
    parts = [{"type": "text", "text": text}] if isinstance(text, str) else list(text)
    first["content"] = [{"type": "image"}] * slots + parts
    return out
