"""Which way of training fits a GPU and is fastest: replicated or fsdp, with or without recomputation."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mmrstraj_jax.config import Config, ModelConfig
from mmrstraj_jax.data.collate import Shape
from mmrstraj_jax.parallel import gathered_once, is_split
from mmrstraj_jax.planning import flops
from mmrstraj_jax.planning.gpus import GPU
from mmrstraj_jax.planning.memory import Memory, estimate
from mmrstraj_jax.planning.program import abstract_model
from mmrstraj_jax.training.state import num_bytes

GIB = 2**30
# Of a card's memory: the rest is CUDA's context, cuDNN's and NCCL's workspaces, and fragmentation.
USABLE = 0.9
REMATS = ("none", "dots", "block")


@dataclass(frozen=True)
class Option:
    """One way of training on `devices` devices."""

    remat: str
    fsdp: int  # 1: weights are replicated
    memory: Memory  # of one device, at the bucket that needs most
    flops: float  # of one device and step, mean over the data
    wire_bytes: float  # that one device sends in a step

    @property
    def name(self) -> str:
        return ("replicated" if self.fsdp == 1 else f"fsdp {self.fsdp}") + f", remat {self.remat}"

    def fits(self, gpu: GPU) -> bool:
        return self.memory.peak <= USABLE * gpu.memory * GIB

    def floor(self, gpu: GPU) -> float:
        """Seconds of a step at data-sheet rates: arithmetic, or the wire where that takes longer."""
        return max(self._seconds(gpu))

    def without_overlap(self, gpu: GPU) -> float:
        """Seconds of a step whose wire time hides behind nothing."""
        return sum(self._seconds(gpu))

    def _seconds(self, gpu: GPU) -> tuple[float, float]:
        return self.flops / (gpu.tflops * 1e12), self.wire_bytes / (gpu.link * 1e9)


def options(
    config: Config,
    model: ModelConfig,
    buckets: list[Shape],
    rows: Int[np.ndarray, "rows 5"],
    devices: int,
) -> list[Option]:
    """Every strategy for this data on this many devices.

    Args:
        config: its batch_size is a multiple of devices.
        buckets: shapes that a step can have; memory is that of the worst.
        rows: real shapes of the data's rows; FLOPs are their mean.
    """
    per_device = config.batch_size // devices
    micro = min(config.micro_batch_size, per_device)
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    found = []
    for remat in REMATS:
        trained = dataclasses.replace(config, remat=remat)
        work = [flops.of_row(model, *row[:3]).training(trained) for row in distinct.tolist()]
        mean = float(np.average(work, weights=counts))
        for fsdp in dict.fromkeys((1, devices)):
            chosen = dataclasses.replace(config, remat=remat, batch_size=per_device, micro_batch_size=micro)
            memory = max(
                (estimate(chosen, model, bucket, fsdp=fsdp) for bucket in largest(buckets)),
                key=lambda one: one.peak,
            )
            wire = wire_bytes(chosen, model, devices, fsdp)
            found.append(Option(remat, fsdp, memory, mean * per_device, wire))
    return found


def largest(buckets: list[Shape]) -> list[Shape]:
    """Buckets that no other one covers: only these can need the most memory."""
    return [one for one in buckets if not any(one != other and one.fits(other) for other in buckets)]


def wire_bytes(config: Config, model: ModelConfig, devices: int, fsdp: int) -> float:
    """Bytes that one device sends a step, by rings: gradients all-reduced, and with fsdp weights gathered.

    The gradient of each micro-batch is reduced where it is made, and every micro-batch gathers the weights of
    each layer for its forward pass and again for its backward pass. The head and the projector are gathered
    once a step. Left out: scalars, and embeddings of looked-up tokens where the table is split.

    Args:
        config: batch_size and micro_batch_size are those of one device.
        devices: all of them.
        fsdp: how many share one copy of the weights.
    """
    tree = abstract_model(config, model)
    leaves = tree.trainable | tree.frozen
    passes = {"language_model": 2, "vision_tower": 1 + flops.tower_trains(config)}
    layers = sum(
        passes[name.split(".")[0]] * num_bytes(leaf)
        for name, leaf in leaves.items()
        if ".layers." in name and is_split(name, leaf.shape, fsdp)
    )
    gradients = sum(map(num_bytes, tree.trainable.values()))
    micro_batches = config.batch_size / config.micro_batch_size
    reduced = 2 * (devices - 1) / devices * micro_batches * gradients
    return reduced + (fsdp - 1) / fsdp * (micro_batches * layers + gathered_once(leaves, fsdp))


def recommend(found: list[Option], gpu: GPU) -> tuple[Option | None, str]:
    """The option that fits and is fastest even if no communication overlaps; and why, in a sentence."""
    fitting = [option for option in found if option.fits(gpu)]
    if not fitting:
        least = min(found, key=lambda option: option.memory.peak)
        need = least.memory.peak / GIB
        return None, (
            f"nothing fits: {least.name} needs {need:.1f} of {USABLE * gpu.memory:.1f} usable GiB; "
            "take more devices or a smaller max_length or tau"
        )
    best = min(fitting, key=lambda option: (option.without_overlap(gpu), option.fsdp))
    used = f"{best.memory.peak / GIB:.1f} of {gpu.memory:.1f} GiB"
    if best.fsdp == 1:
        why = f"weights fit on every device ({used}), so only adapter gradients travel"
    else:
        why = f"replicated weights do not fit; split over {best.fsdp} devices it takes {used}"
    if best.remat == "none":
        why += "; activations fit, so nothing is computed twice"
    else:
        why += f"; without remat {best.remat} activations would not fit"
    return best, why
