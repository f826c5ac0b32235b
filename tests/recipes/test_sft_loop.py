"""The page that everyone reads and the product give the same losses."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipes.sft_loop import sft_losses

import affina
from affina.runs.directory import RunDirectory

NUM_STEPS = 14


# PEFT 0.21 reads an attribute that transformers 5.20 renamed; the product silences it in models/compat.py.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("layout", [{"packing": False, "rows": 1}, {"packing": False, "rows": 4}])
def test_the_recipe_has_the_losses_of_the_product(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    result = affina.train(
        {
            "model": {"path": str(tiny_model_folder)},
            "adapter": {"rank": 16, "alpha": 32},
            "data": {
                "train": [{"path": str(chats_file)}],
                "validation_fraction": 0.0,
                "max_length": 64,
                "packing": layout["packing"],
                "cache_directory": str(tmp_path / "cache"),
            },
            "training": {
                "device": "cpu",
                "epochs": 10,
                "max_steps": NUM_STEPS,
                "micro_batch_size": layout["rows"],
                "gradient_accumulation_steps": 8 // layout["rows"],
                "learning_rate": 1e-3,
                "warmup_steps": 2,
            },
            "evaluation": {"enabled": False},
            "output": {"directory": str(tmp_path / "runs"), "name": "first"},
        }
    )
    product = [record["loss"] for record in RunDirectory(result.run).metrics() if "loss" in record]
    page = list(sft_losses(str(tiny_model_folder), str(chats_file), str(tmp_path / "adapter"), num_steps=NUM_STEPS))
    assert len(product) == NUM_STEPS
    # Both compute in float32, in another order of sums: 2^-24 per operation, some hundred of them, over 14 steps.
    assert product == pytest.approx(page, rel=2e-5)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
