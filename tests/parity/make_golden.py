"""Writes golden.npz, the reference outputs for machines without torch.

From the repository root, with torch, transformers and peft installed:

    cd tests && PYTHONPATH=.. python -m parity.make_golden
"""

import tempfile
import zlib
from pathlib import Path

import numpy as np

from . import cases, reference
from .conftest import GOLDEN


def main() -> None:
    kept: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in cases.CHECKPOINTS:
            model = reference.load(cases.write_folder(name, Path(folder) / name))
            for sample in cases.samples(name):
                out = reference.run(model, name, sample)
                key = f"{name}/{sample.name}"
                kept[f"{key}/views_crc"] = np.asarray(zlib.crc32(out.views.tobytes()))
                kept[f"{key}/num_features"] = np.asarray(len(out.features))
                kept[f"{key}/features"] = cases.excerpt(out.features)
                kept[f"{key}/logits"] = cases.excerpt(out.logits)
                kept[f"{key}/loss"] = np.asarray(out.loss, np.float32)
                kept[f"{key}/greedy"] = np.asarray(reference.greedy(model, name, sample, cases.NEW_TOKENS))
            if name == "untied":
                rows = [sample for sample in cases.samples(name) if sample.name in cases.LORA_ROWS]
                batch = reference.batch(name, rows)
                _, gradients = reference.first_gradients(*reference.with_adapters(model), batch)
                kept |= {f"gradient/{path}": value for path, value in gradients.items()}
    np.savez_compressed(GOLDEN, **kept)
    print(f"{GOLDEN.name}: {len(kept)} arrays, {GOLDEN.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
