"""The decoding options, without JAX: `--help` and typing errors must not wait for it."""

import dataclasses
import numbers

from mmrstraj_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """How an answer is written. The defaults are plain argmax.

    Nothing is read from a checkpoint's generation_config: Qwen's ships a repetition penalty of 1.05 or 1.1,
    active under do_sample=False, so "greedy" would not be greedy.

    Raises:
        UserError: a value that is no number, or outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            whole, value = field.type is int, getattr(self, field.name)
            if not isinstance(value, numbers.Integral if whole else numbers.Real):
                expected = "a whole number" if whole else "a number"
                raise UserError(f"{field.name} {value!r}: expected {expected}")
        for name, valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "a probability in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0 (1 is off)"),
            ("seed", 0 <= self.seed < 2**32, "0 up to 2^32 - 1"),
        ):
            if not valid:
                raise UserError(f"{name} {getattr(self, name)}: expected {expected}")
        if self.greedy and (self.top_p < 1 or self.top_k > 0):
            raise UserError("top_p and top_k choose among samples: give a temperature above 0 with them")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether a step needs the sorted vocabulary."""
        return self.top_p < 1 or self.top_k > 0
