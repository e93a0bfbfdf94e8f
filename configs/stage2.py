"""Stage 2: the adapters of stage 1 go on, on trajectory instructions (RSI-Traffic), with a fresh optimizer.

With `--model 0.5b` or `7b` this is section 5.1 of the MM-RSTraj paper. Made to be copied: `--config copy.py`.

    python -m mmrstraj_jax.train --config stage2 --init-from runs/stage1
    python -m mmrstraj_jax.train --config stage2 --model 7b --weights DIR --data traffic.json --init-from RUN
"""

from mmrstraj_jax.config import SMALL_MODELS, AnyResConfig, Config, LoRAConfig, OptimConfig, small_model


def get_config(model: str) -> Config:
    config = Config(
        name="stage2",
        model=model,
        merge_init=False,  # the same adapters go on; True merges them and starts new ones
        epochs=3,
        batch_size=8,  # the paper: 1 on each of 8 GPUs, no accumulation; fewer devices accumulate
        micro_batch_size=1,
        max_length=4096,  # unstated in the paper; tau 2000 leaves room for it
        dtype="bfloat16",
        remat="block",  # the paper's gradient checkpointing
        anyres=AnyResConfig(policy="tau", tau=2000.0),
        lora=LoRAConfig(rank=8, alpha=16.0, dropout=0.05),  # dropout unstated: the LLaVA scripts' value
        optim=OptimConfig(
            tower_lr=2e-6,
            projector_lr=5e-5,
            other_lr=1e-5,
            b1=0.9,
            b2=0.999,
            weight_decay=0.0,
            warmup_ratio=0.03,
            clip_norm=1.0,  # unstated: on by default in the HF Trainer that the paper used
            schedule="cosine",
        ),
    )
    # NOT THE PAPER below this line: the embedded sizes
    if model in SMALL_MODELS:
        config = small_model(config, steps=460, lr=2.5e-3, b2=0.98)
    return config
