"""Methods whose run differs from LoRA's, from the config to the adapter and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import affina
from affina.catalog.methods import METHODS
from affina.errors import AffinaError


def config(model: Path, data: Path, output: Path, **adapter: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": {"train": str(data), "max_length": 128, "num_workers": 1, "cache_directory": str(output / "cache")},
        "adapter": adapter,
        "training": {"device": "cpu", "max_steps": 3, "gradient_accumulation_steps": 1, "save_every_steps": 1},
        "evaluation": {"enabled": False},
        "output": {"directory": str(output), "name": "run"},
    }


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("method", ["pissa", "eva", "loraplus", "adalora", "ptuning", "full"])
def test_a_run_of_every_kind_of_method_is_resumed_to_the_same_bits(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path, method: str
) -> None:
    small = {"rank": 4, "calibration_samples": 4, "num_virtual_tokens": 3, "bottleneck_size": 4}
    adapter = {"method": method, **{name: value for name, value in small.items() if name in METHODS[method].fields}}
    result = affina.train(config(tiny_model_folder, chats_file, tmp_path, **adapter))
    assert result.method == method
    whole = load_file(result.adapter / "adapter_model.safetensors")
    events = [json.loads(line) for line in (result.run / "events.jsonl").read_text().splitlines()]
    notes = [event["message"] for event in events if event["kind"] == "note"]
    fast = METHODS[method].fast_engine
    assert any(
        note.startswith("engine: fast" if fast else "engine: reference, because it computes plain LoRA")
        for note in notes
    )
    # As if it had been stopped after its second step.
    import shutil

    shutil.rmtree(result.adapter)
    shutil.rmtree(result.run / "checkpoints" / "step-00000003")
    resumed = affina.train(resume=result.run)
    again = load_file(resumed.adapter / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_loftq_starts_from_the_original_weights_of_the_run(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    wanted = config(tiny_model_folder, chats_file, tmp_path, method="loftq", rank=4) | {"quantization": "nf4"}
    result = affina.train(wanted)
    report = affina.merge(result.run, tmp_path / "merged", dtype="float32")
    assert report.notes == ("merged into the dequantised NF4 base, which the adapter was made for",)
    assert report.merge_error < 1e-4


def test_a_rank_above_a_layer_is_found_before_the_data_is_read(
    tiny_model_folder: Path, tmp_path: Path, chats_file: Path
) -> None:
    chats_file.write_text("not JSON")
    with pytest.raises(AffinaError) as caught:
        affina.train(config(tiny_model_folder, chats_file, tmp_path, method="lora", rank=100))
    assert caught.value.code == "rank-above-layer"


def test_the_methods_are_a_table() -> None:
    table = affina.methods("Qwen/Qwen3-4B")
    assert [row.method.name for row in table.rows] == list(METHODS)
    assert table.num_parameters == 4_022_468_096
    assert affina.methods().rows[0].sizes is None
