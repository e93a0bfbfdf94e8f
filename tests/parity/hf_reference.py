"""What transformers says about exported folders, on stdout as one JSON line each: logits and greedy ids.

Run by tests/test_weights_hf.py, in this environment or in one with another transformers version. Needs only
torch, transformers, peft (for an adapter), NumPy and PIL; not this package and not JAX.

    python hf_reference.py REQUEST.npz FOLDER [FOLDER+ADAPTER ...]
"""

import json
import sys

import numpy as np
import torch
import transformers
from transformers import LlavaOnevisionForConditionalGeneration


def main(request: str, *folders: str) -> None:
    for name in folders:
        folder, _, adapter = name.partition("+")
        run(folder, request, adapter)


def run(folder: str, request: str, adapter: str) -> None:
    torch.manual_seed(0)
    model, info = LlavaOnevisionForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    problems = {k: sorted(v) for k, v in info.items() if v}
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    data = np.load(request)
    batch = {
        "input_ids": torch.tensor(data["input_ids"])[None],
        "pixel_values": torch.tensor(data["pixel_values"])[None],
        "image_sizes": torch.tensor(data["image_sizes"])[None],
    }
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with torch.no_grad():
        logits = model(**batch).logits[0]
        ids = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
    print(
        json.dumps(
            {
                "version": transformers.__version__,
                "problems": problems,
                "logits": logits.tolist(),
                "greedy": ids[0, batch["input_ids"].shape[1] :].tolist(),
                "adapted": sum("lora_A" in name for name, _ in model.named_parameters()),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
