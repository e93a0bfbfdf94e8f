"""The tiny base model that ships: every part trained on SynthCity's base split (domain A, general questions).

NOT A RECIPE OF THE PAPER: it makes the stand-in for a pre-trained LLaVA-OneVision checkpoint. Its learning
rates are those of the language phases, whose steps stand in training/tiny_base.py; the whole is run by

    python -m mmrstraj_jax.training.tiny_base --out tiny
"""

from mmrstraj_jax.config import AnyResConfig, Config, LoRAConfig, OptimConfig


def get_config(model: str) -> Config:
    return Config(
        name="tiny_base",
        model=model,
        epochs=1,
        batch_size=4,
        micro_batch_size=2,
        max_length=1024,
        dtype="float32",
        remat="none",
        train_full=("vision_tower", "projector", "newline", "language_model"),
        anyres=AnyResConfig().for_views(112, 14),
        lora=LoRAConfig(dropout=0.0, vision_tower=(), projector=(), language_model=()),
        optim=OptimConfig(tower_lr=3e-4, projector_lr=1e-3, other_lr=1e-3, b2=0.99),
        view_buckets=(1, 2, 5, 10, 17, 26, 37),
        eval_samples=256,
    )
