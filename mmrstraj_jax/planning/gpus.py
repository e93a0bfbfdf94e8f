"""GPUs by name: what their data sheets promise. The plan's floors and the monitor's MFU share this table."""

from dataclasses import dataclass

from mmrstraj_jax.errors import UserError


@dataclass(frozen=True)
class GPU:
    """One device.

    Attributes:
        memory: GiB that the driver shows.
        tflops: dense bfloat16 matrix rate, without sparsity, TFLOP/s.
        bandwidth: of its memory, GB/s.
        link: to the other GPUs of its node, one direction, GB/s (NVLink; PCIe 4.0 x16 where there is none).
    """

    memory: float
    tflops: float
    bandwidth: float
    link: float


# NVIDIA data sheets. Names are lower case; `find` also takes the device_kind that JAX reports.
GPUS: dict[str, GPU] = {
    "a100-40": GPU(39.5, 312, 1555, 300),
    "a100-80": GPU(79.2, 312, 2039, 300),
    "h100": GPU(79.6, 989, 3350, 450),
    "h100-pcie": GPU(79.6, 756, 2000, 64),
    "h200": GPU(140.4, 989, 4800, 450),
    "b200": GPU(178.0, 2250, 8000, 900),
    "l40s": GPU(44.5, 362, 864, 32),
    "rtx4090": GPU(23.6, 165, 1008, 32),
    "rtx3090": GPU(23.7, 71, 936, 32),
    "v100-32": GPU(31.7, 125, 900, 150),  # float16; it has no bfloat16
}
NODE_LINK = 50.0  # GB/s a GPU between nodes: one 400 Gbit/s adapter each

_KINDS = (  # in device_kind -> name; first match wins
    ("a100-sxm4-40", "a100-40"),
    ("a100-pcie-40", "a100-40"),
    ("a100", "a100-80"),
    ("h100 pcie", "h100-pcie"),
    ("h100", "h100"),
    ("h200", "h200"),
    ("b200", "b200"),
    ("l40s", "l40s"),
    ("4090", "rtx4090"),
    ("3090", "rtx3090"),
    ("v100", "v100-32"),
)


def find(name: str) -> GPU:
    """A GPU of the table. Raises UserError listing the names."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpus {name}: expected some of {', '.join(GPUS)}")
    return GPUS[name.lower()]


def of_kind(device_kind: str) -> GPU | None:
    """The GPU behind jax.Device.device_kind ("NVIDIA H100 80GB HBM3"), None for one that is not listed."""
    kind = device_kind.lower()
    return next((GPUS[name] for part, name in _KINDS if part in kind), None)
