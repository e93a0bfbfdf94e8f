"""MM-RSTraj in JAX: remote-sensing and trajectory vision-language models, fine-tuned in two LoRA stages.

`load(path)` gives a model with `.generate`, `.logits` and `.features`. The commands are
`python -m mmrstraj_jax.NAME`.
"""

from typing import TYPE_CHECKING, Any

from mmrstraj_jax.errors import UserError

if TYPE_CHECKING:
    from mmrstraj_jax.api import load

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # JAX takes seconds to import: `--help`, `--print-config` and the host-side tools must not pay for it.
    if name == "load":
        from mmrstraj_jax.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
