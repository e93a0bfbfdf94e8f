"""What every test shares: the CPU unless another platform is asked for, no hub, no window."""

import os

# Before any test module imports JAX, transformers or matplotlib.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
