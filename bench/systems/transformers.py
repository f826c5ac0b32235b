"""transformers + PEFT, and with Liger's kernels (systems/liger.py)."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from systems.common import DEVICE, TARGETS, Clock, cap_memory, dtype_of, main, random_model, time_steps
from systems.peers import batches_of, trainer_step


def quantize_with_bitsandbytes(module: nn.Module, dtype: torch.dtype) -> None:
    """Every linear layer but the head in bitsandbytes' NF4 with double quantisation. dtype: of the products"""
    import bitsandbytes

    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and name != "lm_head":
            layer = bitsandbytes.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=False,
                compute_dtype=dtype,
                quant_type="nf4",
                compress_statistics=True,
                device="meta",
            )
            layer.weight = bitsandbytes.nn.Params4bit(
                child.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
            )
            setattr(module, name, layer.to(DEVICE))
        else:
            quantize_with_bitsandbytes(child, dtype)


def measure(spec: dict[str, Any], setting: dict[str, Any], folder: Path, clock: Clock) -> dict[str, Any]:
    with clock.paused():
        model = random_model(spec)
        if spec.get("nf4"):
            quantize_with_bitsandbytes(model.model, dtype_of(spec))
            model.is_loaded_in_4bit = True
            gc.collect()
    cap_memory(setting)
    model = get_peft_model(model, LoraConfig(r=spec.get("rank", 16), lora_alpha=32, target_modules=TARGETS))
    if setting.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    return time_steps(trainer_step(model, batches_of(spec), spec), clock=clock)


if __name__ == "__main__":
    main(measure)
