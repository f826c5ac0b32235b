"""What the registry says of swapping, mixing and servers, held against PEFT and against what a server reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors import safe_open

from affina.catalog.methods import METHODS
from affina.models.compat import quiet_peft
from tests.models.tiny import VOCABULARY
from tests.training.method_cases import NUM_STEPS, MethodRun, attach, load_base, make_base

IDS = torch.arange(40).reshape(2, 20) * 5 % VOCABULARY
LORA_LIKE = [method.name for method in METHODS.values() if method.kind == "low-rank"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def weight_format_of(method: str) -> str:
    return "dense" if "dense" in METHODS[method].trains_on else "nf4"


def save_two(base: Path, method: str, folder: Path) -> tuple[Path, Path]:
    """Two adapters of one method that differ: one is trained on, the other less."""
    paths = folder / "one", folder / "two"
    for path, steps in zip(paths, (NUM_STEPS, 1), strict=True):
        path.mkdir()
        MethodRun(attach(base, method, weight_format_of(method)), path).train(until=steps)
    return paths


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **options).logits


def loaded(base: Path, method: str, path: Path) -> PeftModel:
    with quiet_peft():
        return PeftModel.from_pretrained(load_base(base, weight_format_of(method)), path).eval()


@pytest.mark.parametrize("method", LORA_LIKE)
def test_an_adapter_is_exchanged_in_place_where_the_registry_says_so(method: str, base: Path, tmp_path: Path) -> None:
    one, two = save_two(base, method, tmp_path)
    model, expected = loaded(base, method, one), logits(loaded(base, method, two))
    assert not torch.allclose(logits(model), expected, atol=1e-4)
    if not METHODS[method].hot_swap:
        with pytest.raises((ValueError, NotImplementedError, KeyError, RuntimeError)):
            hotswap_adapter(model, two, "default")
        return
    hotswap_adapter(model, two, "default")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", LORA_LIKE)
def test_one_batch_uses_several_adapters_where_the_registry_says_so(method: str, base: Path, tmp_path: Path) -> None:
    one, two = save_two(base, method, tmp_path)
    expected = [logits(loaded(base, method, path), IDS[i : i + 1])[0] for i, path in enumerate((one, two))]
    model = loaded(base, method, one)
    with quiet_peft():
        model.load_adapter(two, "two")
    model.eval()
    if not METHODS[method].mixed_batch:
        # DoRA says so; the others apply the active adapter to every row without a word.
        try:
            wrong = logits(model, adapter_names=["default", "two"])[1]
        except (ValueError, TypeError):
            return
        assert not torch.allclose(wrong, expected[1], atol=1e-4)
        return
    found = logits(model, adapter_names=["default", "two"])
    for row, want in zip(found, expected, strict=True):
        torch.testing.assert_close(row, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_servers_read_is_a_lora_file_with_nothing_that_they_refuse(
    method: str, base: Path, tmp_path: Path
) -> None:
    """The conditions of vllm/lora/peft_helper.py and of llama.cpp's convert_lora_to_gguf.py."""
    facts = METHODS[method]
    if facts.vllm == "no" and facts.llama_cpp == "no":
        pytest.skip("the registry promises no server")
    MethodRun(attach(base, method, weight_format_of(method)), tmp_path).train(until=1)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA"
    assert config["init_lora_weights"] is True  # a word such as pissa is refused
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert not config["modules_to_save"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    # llama.cpp scales by alpha / R whatever use_rslora says; vLLM reads it.
    assert (facts.llama_cpp == "yes") == (not config["use_rslora"])
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        ranks = {file.get_slice(name).get_shape()[0] for name in names if name.endswith(".lora_A.weight")}
    assert names
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert all(name.startswith("base_model.model.") for name in names)
    assert ranks == {config["r"]}
