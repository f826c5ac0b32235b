"""Puts saved parameters back into an adapter that is attached: resuming, and switching to the best checkpoint."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from affina.errors import ModelError
from affina.models.adapters.lora import ADAPTER_NAME
from affina.models.adapters.storage import WEIGHTS_FILE


def restore_adapter_weights(model: PeftModel, directory: Path) -> None:
    """Copy the parameters saved in `directory` into `model`'s adapter, exactly: both sides are float32.

    The model's parameter tensors stay the same objects, so an optimiser that holds them goes on working.

    Raises ModelError `adapter-mismatch` when names or shapes differ from the model's adapter.
    """
    saved = load_file(directory / WEIGHTS_FILE)
    current = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME)
    shapes = {name: tuple(tensor.shape) for name, tensor in current.items()}
    found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if shapes != found:
        different = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise ModelError(
            "adapter-mismatch",
            f"the adapter in {directory} has other parameters than this run: {different[0]}",
            why=f"{len(different)} names or shapes differ",
            fix="use the adapter section that it was trained with (config.yaml of its run)",
        )
    set_peft_model_state_dict(model, saved, adapter_name=ADAPTER_NAME)
