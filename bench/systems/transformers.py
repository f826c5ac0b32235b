"""transformers + PEFT, and with Liger's kernels (systems/liger.py)."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from systems.common import TARGETS, main, random_model, time_steps


def quantize_with_bitsandbytes(module: nn.Module) -> None:
    """Every linear layer but the head in bitsandbytes' NF4 with double quantisation."""
    import bitsandbytes

    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and name != "lm_head":
            layer = bitsandbytes.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                compress_statistics=True,
                device="meta",
            )
            layer.weight = bitsandbytes.nn.Params4bit(
                child.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
            )
            setattr(module, name, layer.to("cuda"))
        else:
            quantize_with_bitsandbytes(child)


def measure(spec: dict[str, Any], setting: dict[str, Any], folder: Path) -> dict[str, Any]:
    model = random_model(spec)
    if spec.get("nf4"):
        quantize_with_bitsandbytes(model.model)
        model.is_loaded_in_4bit = True
        gc.collect()
        torch.cuda.empty_cache()
    model = get_peft_model(model, LoraConfig(r=spec.get("rank", 16), lora_alpha=32, target_modules=TARGETS))
    if setting.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(0, 128_000, (spec["rows"], spec["length"]), device="cuda")

    def step(index: int) -> tuple[int, float]:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return ids.numel(), float(loss)

    return time_steps(step)


if __name__ == "__main__":
    main(measure)
