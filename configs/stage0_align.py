"""Stage 0: aligns a fresh projector with captions (LCS-558K style), as LLaVA does before instruction tuning.

Not in the MM-RSTraj paper, which starts from an aligned model: rank-8 LoRA with a frozen LLM cannot align a
fresh projector, so weights composed of SigLIP and Qwen2.5 need this stage before stage 1. The projector is
trained in full, nothing else is trained.

    python -m mmrstraj_jax.train --config stage0_align --model 7b --weights DIR --data captions.json
"""

from mmrstraj_jax.config import SMALL_MODELS, AnyResConfig, Config, LoRAConfig, OptimConfig, small_model


def get_config(model: str) -> Config:
    config = Config(
        name="stage0_align",
        model=model,
        train_full=("projector",),
        epochs=1,
        batch_size=256,  # LLaVA's; accumulated from one sample per device
        micro_batch_size=1,
        max_length=4096,
        dtype="bfloat16",
        remat="block",
        anyres=AnyResConfig(policy="tau", tau=2000.0),
        lora=LoRAConfig(vision_tower=(), projector=(), language_model=()),
        optim=OptimConfig(
            projector_lr=1e-3, b1=0.9, b2=0.999, weight_decay=0.0, warmup_ratio=0.03, clip_norm=1.0
        ),
    )
    # Below this line: the embedded sizes
    return small_model(config, steps=200, lr=1e-3) if model in SMALL_MODELS else config
