"""Every setting of the package as frozen dataclasses, and the only place that turns a command line into one.

A run is one Python function, `get_config(model)`, in `configs/<name>.py`. `load_config` finds it, calls it
and applies the overrides of the command line (`--steps 100 --optim.projector-lr 1e-4`).
"""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrstraj_jax import settings
from mmrstraj_jax.errors import UserError
from mmrstraj_jax.settings import check_range


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP tower (spec: google/siglip-so400m-patch14-384). Only layers that run are held."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    # Hidden-state indices (= number of layers run) whose outputs are concatenated on the channel axis.
    # 26 of the 27-layer Google file (index -2) and of the 26-layer llava-hf file (index -1) are the same.
    feature_layers: tuple[int, ...] = (26,)

    @property
    def num_layers_run(self) -> int:
        return max(self.feature_layers)

    @property
    def grid_side(self) -> int:
        """Patches per side of a view; the remainder of image_size / patch_size is never seen (VALID conv)."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_side**2

    @property
    def output_size(self) -> int:
        return self.hidden_size * len(self.feature_layers)


@dataclass(frozen=True)
class TextConfig:
    """Qwen2 / Qwen2.5 decoder."""

    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int = 128
    vocab_size: int = 152064
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768


@dataclass(frozen=True)
class AnyResConfig:
    """Higher AnyRes. policy "tau" is the paper's (section 4), "anyres_max_N" the public checkpoints'."""

    policy: str = "tau"
    tau: float = 2000.0
    rounding: str = "hf"  # "hf" rounds to 7 decimals before truncating, "original" does not
    view_size: int = 384
    patch_size: int = 14
    # (height, width) candidates, HF order; rows outer
    grid_pinpoints: tuple[tuple[int, int], ...] = tuple(
        (384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7)
    )

    def __post_init__(self):
        if self.policy != "tau" and not re.fullmatch(r"anyres_max_[1-9]\d*", self.policy):
            raise UserError(f"anyres.policy {self.policy!r}: expected 'tau' or 'anyres_max_N' (N from 1 on)")
        if self.rounding not in ("hf", "original"):
            raise UserError(f"anyres.rounding {self.rounding!r}: expected 'hf' or 'original'")
        if not 0 < self.tau < math.inf:
            raise UserError(f"anyres.tau {self.tau}: expected a positive token budget")
        if not self.grid_pinpoints:
            raise UserError("anyres.grid_pinpoints: expected (height, width) pairs, one or more")
        sides = [self.view_size, *(side for pair in self.grid_pinpoints for side in pair)]
        if not 0 < self.patch_size <= min(sides) or any(side % self.view_size for side in sides):
            raise UserError(
                f"anyres: grid_pinpoints, view_size {self.view_size} and patch_size {self.patch_size} do not "
                "fit; expected multiples of view_size, as AnyResConfig.for_views makes them"
            )

    @property
    def side(self) -> int:
        return self.view_size // self.patch_size

    @property
    def max_num(self) -> int | None:
        """N of anyres_max_N, None for the tau policy."""
        return None if self.policy == "tau" else int(self.policy.rsplit("_", 1)[1])

    def for_views(self, view_size: int, patch_size: int) -> "AnyResConfig":
        """The same policy at another view size: tau keeps its share of the full-view token count."""
        tau, old = self.tau * (view_size // patch_size) ** 2 / self.side**2, self.view_size
        grid = tuple((h // old * view_size, w // old * view_size) for h, w in self.grid_pinpoints)
        sizes = {"view_size": view_size, "patch_size": patch_size, "grid_pinpoints": grid}
        return dataclasses.replace(self, tau=tau, **sizes)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one model. Token ids come from the tokenizer by name, or from config.json."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    image_token_id: int | None = None
    video_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None


LORA_TARGETS = {
    "vision_tower": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "projector": ("linear_1", "linear_2"),
    "language_model": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
SCHEDULES = ("cosine", "linear", "constant")  # optimizer.Optimizer.multiplier
INT32 = 2**31 - 1  # step numbers and seeds travel to the device as such
TRAINABLE_PARTS = ("vision_tower", "projector", "newline", "language_model")


def _check_names(key: str, given: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    for name in given:
        if name not in allowed:
            raise UserError(f"{key} {name!r}: expected some of {', '.join(allowed)}")
    if len(set(given)) != len(given):
        raise UserError(f"{key} {', '.join(given)}: a name is given twice")


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA as in PEFT: y = Wx + (alpha / r) B A dropout(x). Paper 5.1: r 8, alpha 16, tower and projector."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    vision_tower: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    projector: tuple[str, ...] = ("linear_1", "linear_2")
    language_model: tuple[str, ...] = ()

    def __post_init__(self):
        check_range(self, 1, math.inf, "rank", key="lora.", hint=" (for no LoRA give no targets)")
        if self.alpha <= 0:
            raise UserError(f"lora.alpha {self.alpha}: expected more than 0 (at 0 adapters change nothing)")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout {self.dropout}: expected a rate in [0, 1)")
        for part, allowed in LORA_TARGETS.items():
            _check_names(f"lora.{part}", getattr(self, part), allowed)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the shared schedule of paper section 5.1; learning rates per parameter group."""

    tower_lr: float = 2e-6
    projector_lr: float = 5e-5
    other_lr: float = 1e-5  # inert with the LLM frozen: no parameter is left for it
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    clip_norm: float = 1.0  # 0 switches clipping off
    skip_norm: float = 0.0  # an update with a larger gradient norm is dropped and counted; 0: none is
    schedule: str = "cosine"

    def __post_init__(self):
        least_0 = "tower_lr", "projector_lr", "other_lr", "weight_decay", "clip_norm", "skip_norm"
        check_range(self, 0, math.inf, *least_0, key="optim.")
        check_range(self, 0, 1, "warmup_ratio", key="optim.", hint=", a share of the steps")
        for key in ("b1", "b2"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"optim.{key} {getattr(self, key)}: expected a rate in [0, 1)")
        if self.eps <= 0:
            raise UserError(f"optim.eps {self.eps}: expected more than 0")
        if self.schedule not in SCHEDULES:
            raise UserError(f"optim.schedule {self.schedule!r}: expected one of {', '.join(SCHEDULES)}")


PIL_LIMIT = 178_956_970  # above twice its MAX_IMAGE_PIXELS Pillow refuses to open a file


@dataclass(frozen=True)
class ImagePolicy:
    """How image files become RGB; every oddity has a declared answer (docs/data.md)."""

    exif: bool = False  # apply the camera's rotation (HF's loader does, the original does not)
    max_pixels: int = 89_478_485  # PIL's own decompression-bomb limit, here an error instead of a warning
    deep: str = "refuse"  # more than 8 bits per band: refuse | stretch (2nd to 98th percentile to 0..255)

    def __post_init__(self):
        if self.deep not in ("refuse", "stretch"):
            raise UserError(f"images.deep {self.deep!r}: expected refuse or stretch")
        check_range(self, 1, PIL_LIMIT, "max_pixels", key="images.", hint=", Pillow's limit")


@dataclass(frozen=True)
class LoaderConfig:
    """How the host prepares batches. None of it changes what a step trains on: it may differ at a resume."""

    workers: int = 0  # processes; 0: `threads` threads of the training process
    threads: int = 4
    prefetch: int = 4  # batches that wait ready, of each worker
    timeout: float = 300.0  # seconds without a batch after which the run ends, naming the row at hand
    cache_dir: str | None = None  # of the index of the data; None: the user's cache folder
    verify: bool = False  # decode every image when the data is indexed, not only its header

    def __post_init__(self):
        check_range(self, 0, math.inf, "workers", "threads", key="loader.")
        check_range(self, 1, math.inf, "prefetch", key="loader.")
        if self.timeout <= 0:
            raise UserError(f"loader.timeout {self.timeout}: expected seconds, more than 0")


@dataclass(frozen=True)
class ClusterConfig:
    """Patience with other processes, in seconds. None of it changes what a step trains on."""

    start_timeout: float = 300.0  # until all processes have come
    heartbeat: float = 60.0  # without a sign of life a process counts as dead
    step_timeout: float = 1800.0  # without progress a run counts as stuck; longer than compiling takes

    def __post_init__(self):
        timeouts = "start_timeout", "heartbeat", "step_timeout"
        check_range(self, 1, math.inf, *timeouts, key="cluster.", hint=" seconds")


@dataclass(frozen=True)
class Config:
    """One training run."""

    name: str = "stage1"
    model: str = "7b"  # a preset of MODEL_PRESETS; sizes of named weights come from their config.json
    weights: str | None = None  # our format, HF or lmms-lab folder, siglip=DIR,qwen=DIR,...; None: embedded
    data: str | None = None  # "A.json:0.7,B.json:0.3"; None: the embedded SynthCity sample
    eval_data: str | None = None  # held-out rows, as data; None: those of the embedded sample, or none
    image_root: str | None = None  # default: the folder of each data file
    on_bad: str = "quarantine"  # a row that cannot be trained on: quarantine (reported, left out) | error
    init_from: str | None = None  # a finished run whose adapters go on
    feature_layer: int = 0  # tower output for the projector, from the end (-1, -2); 0: as in the weights
    merge_init: bool = False  # merge those adapters into the base and start new ones
    run_dir: str | None = None  # default runs/<name>
    epochs: int = 3
    steps: int = 0  # 0: as many as the epochs give
    batch_size: int = 8  # global, whatever the device count
    micro_batch_size: int = 1  # per device; accumulation fills up to batch_size
    fsdp: int = 1  # devices that share one copy of the weights; the rest of the devices is data parallel
    max_length: int = 4096  # longer rows are bad rows: nothing is ever cut
    packing: bool = False  # several samples share a row of up to max_length tokens; batch_size counts rows
    seed: int = 0
    dtype: str = "bfloat16"  # frozen weights and compute; adapters and optimizer are float32
    quantize_llm: str = "none"  # none | int8 | nf4: how the frozen language model is stored (extra quant)
    remat: str = "block"  # none | block | dots
    label_mask: str = "original"  # original | clean
    loss_normalization: str = "token"  # token: global token mean | microbatch: mean of micro-batch means
    train_full: tuple[str, ...] = ()  # parts trained without LoRA, of TRAINABLE_PARTS
    anyres: AnyResConfig = AnyResConfig()
    lora: LoRAConfig = LoRAConfig()
    optim: OptimConfig = OptimConfig()
    images: ImagePolicy = ImagePolicy()
    loader: LoaderConfig = LoaderConfig()
    cluster: ClusterConfig = ClusterConfig()
    eval_every: int = 0  # steps; 0: at the end only
    eval_samples: int = 256
    save_every: int = 100
    keep_last: int = 3
    log_every: int = 1
    wandb: str | None = None  # Weights & Biases project; needs the extra of that name
    compilation_cache: str | None = None  # folder that keeps compiled programs; may be shared, may be deleted
    view_buckets: tuple[int, ...] = (1, 2, 3, 5, 7, 10, 13, 17, 21, 26, 31, 37)
    length_multiple: int = 128  # sequence lengths are rounded up to a multiple of this, in geometric steps
    notes: str = field(default="", metadata={"help": "free text kept in config.json"})

    def __post_init__(self):
        choices = {
            "remat": ("none", "block", "dots"),
            "quantize_llm": ("none", "int8", "nf4"),
            "label_mask": ("original", "clean"),
            "on_bad": ("quarantine", "error"),
            "loss_normalization": ("token", "microbatch"),
            "dtype": ("bfloat16", "float32"),
            "model": tuple(MODEL_PRESETS),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise UserError(f"{key} {getattr(self, key)!r}: expected one of {', '.join(allowed)}")
        paths = ("name", "weights", "data", "eval_data", "image_root", "init_from", "run_dir")
        for key in (*paths, "compilation_cache"):  # a script's unset variable; Path("") is this folder
            if getattr(self, key) == "":
                raise UserError(f"{key} is empty: expected a path, or leave the option out")
        if self.feature_layer > 0:
            raise UserError(
                f"feature_layer {self.feature_layer}: expected -1, -2, ..., or 0: the weights' own"
            )
        _check_names("train_full", self.train_full, TRAINABLE_PARTS)
        if self.quantize_llm != "none" and "language_model" in self.train_full:
            raise UserError(
                f"quantize_llm {self.quantize_llm}: the language model is in train_full, and only frozen "
                "weights can be stored in fewer bits; drop one of them"
            )
        check_range(self, 0, INT32, "steps", "seed", "eval_every", "eval_samples")
        least_1 = "epochs", "batch_size", "micro_batch_size", "fsdp", "max_length", "length_multiple"
        check_range(self, 1, INT32, *least_1, "save_every", "keep_last", "log_every")
        if list(self.view_buckets) != sorted(set(self.view_buckets)) or min(self.view_buckets, default=0) < 1:
            raise UserError(f"view_buckets {self.view_buckets}: expected ascending positive view counts")
        batch, micro = self.batch_size, self.micro_batch_size
        if batch % micro:
            raise UserError(f"batch_size {batch} is not a multiple of micro_batch_size {micro}: set both")


def _preset(view: tuple, feature_layer: int, text: TextConfig) -> ModelConfig:
    hidden, mlp, heads, image = view
    vision = VisionConfig(hidden, mlp, heads, image, 14, 1e-6, (feature_layer,))
    return ModelConfig(vision, text)


_SO400M = (1152, 4304, 16, 384)
# Shapes of the public files (google/siglip-so400m-patch14-384, Qwen2.5-{0.5B,7B}-Instruct) for planning
# without weights; with --weights the sizes come from its config.json.
MODEL_PRESETS: dict[str, ModelConfig] = {
    "tiny": _preset(
        (192, 512, 3, 112),
        6,
        TextConfig(192, 320, 3, 3, 3, 64, 1024, tie_word_embeddings=True, max_position_embeddings=2048),
    ),
    "mini": _preset(
        (384, 1536, 6, 224), 8, TextConfig(512, 1408, 8, 8, 2, 64, 32000, tie_word_embeddings=True)
    ),
    "0.5b": _preset(_SO400M, 26, TextConfig(896, 4864, 24, 14, 2, 64, 151936, tie_word_embeddings=True)),
    "7b": _preset(_SO400M, 26, TextConfig()),
}


def warmup_steps(total: int, ratio: float) -> int:
    """ceil(ratio * N), the rule of HF Trainer."""
    return math.ceil(ratio * total)


SMALL_MODELS = ("tiny", "mini")


def small_model(config: Config, *, steps: int = 130, lr: float = 1e-3, b2: float = 0.999) -> Config:
    """NOT THE PAPER: a recipe's settings for `tiny` and `mini`, which learn in minutes on a CPU.

    2e-6 cannot move a model of 3.5 M parameters in minutes; its views are 112 or 224 px; float32 is what a
    CPU is fast at; activations fit without recomputing them; a few hundred steps need no dropout.
    """
    vision = MODEL_PRESETS[config.model].vision
    return dataclasses.replace(
        config,
        dtype="float32",
        remat="none",
        steps=steps,
        batch_size=4,
        micro_batch_size=4,
        eval_samples=128,
        max_length=1024,
        anyres=config.anyres.for_views(vision.image_size, vision.patch_size),
        lora=dataclasses.replace(config.lora, dropout=0.0),
        optim=dataclasses.replace(config.optim, tower_lr=lr, projector_lr=lr, b2=b2),
        view_buckets=(1, 2, 5, 7, 10, 17, 26, 37),
        length_multiple=512,  # few programs: compiling costs more than the padding here
    )


def recipe_line(config: Config, overridden: frozenset[str] = frozenset()) -> str:
    """The first line of a run: which recipe this is, and whether it is the paper's."""
    line = f"{config.name}, model {config.model}: "
    if config.model in SMALL_MODELS:
        line += (
            "small-model settings instead of the paper's learning rates and step counts "
            f"(tower {config.optim.tower_lr:g}, projector {config.optim.projector_lr:g}, "
            f"{config.steps} steps; --print-config --model 7b shows the paper's)"
        )
    else:
        line += "the settings of its config file"
    return line + (f"; overridden: {', '.join(sorted(overridden))}" if overridden else "")


def _shipped_configs() -> Path:
    package = Path(__file__).parent
    # A wheel holds configs/ inside the package; in a source checkout it lies beside it.
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """The file of `--config NAME`: a .py path, then ./configs/NAME.py, then the configs of the package.

    Raises UserError with the nearest name when there is none.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"--config {name}: no such file")
        return Path(name)
    folders = (Path("configs"), _shipped_configs())
    for folder in folders:
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.py")} - {"__init__"})
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--config {name}: {hint}expected a .py file or one of {', '.join(known)}")


def load_config(name: str, args: list[str], *, model: str | None = None) -> tuple[Config, frozenset[str]]:
    """The config of one run: get_config(model) of `find_config(name)`, then the command line's overrides.

    args: the words behind the command, less `--config` and `--print-config` (settings.take_option and
    take_flag), in the forms of `settings.overrides`. model: used where args have no `--model`; without both
    it is tiny, and `--weights` may not be named, because a recipe's learning rates depend on the size.
    Returns the config and the dotted names of the overridden fields. `--help` prints the options and exits.
    Raises UserError: unknown config, option (with the nearest name), model or value.
    """
    overrides = settings.overrides([word for word in args if word not in ("--help", "-h")], Config)
    model = overrides.get("model", model) or (None if overrides.get("weights") else "tiny")
    if model not in MODEL_PRESETS:
        problem = f"--model {model}" if model else "--weights without --model"
        raise UserError(f"{problem}: expected one of {', '.join(MODEL_PRESETS)}")
    path = find_config(name)
    config = settings.call_file(path, "get_config", model)
    if not isinstance(config, Config):
        raise UserError(f"--config {path}: expected a function get_config(model) that returns the Config")
    config = settings.from_dict(settings.to_dict(config), Config, f"--config {path}")  # checks the types
    if {"--help", "-h"} & set(args):
        import tyro

        about = f"Settings of {path.name}; --config NAME chooses another, --print-config shows the result. "
        about += (
            "train takes --allow-config-change, --allow-fresh, --coordinator, --num-processes, --process-id."
        )
        tyro.cli(Config, default=config, args=["--help"], description=about, prog="[command]")
    return settings.replace(config, overrides), frozenset(overrides)


# ---- a run's config.json and --print-config ----

to_dict = settings.to_dict
format_config = settings.format_config
diff = settings.diff


def from_dict(data: dict[str, Any], where: str = "config.json") -> Config:
    """The Config of a run directory's config.json; UserError if a field is missing, unknown or mistyped."""
    return settings.from_dict(data, Config, where)
