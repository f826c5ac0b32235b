"""What the fused decoder does not run, and the reason it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, Qwen3MoeConfig

from affina.models.adapters import attach_adapter
from affina.models.compat import quiet_peft
from affina.models.families import Unsupported, read_decoder
from affina.models.fast import support
from affina.models.fast.support import decoder_of
from tests.models.tiny import VOCABULARY, qwen3_config, random_model


def reason_of(**options: Any) -> str:
    """Why a Qwen3 model with this PEFT LoRA adapter is refused."""
    config = qwen3_config(attention_bias=True, tie_word_embeddings=False)
    with quiet_peft():
        model = get_peft_model(random_model(config), LoraConfig(r=4, **{"target_modules": ["q_proj"], **options}))
    found = decoder_of(model)
    assert isinstance(found, Unsupported)
    return found.reason


def test_a_plain_adapter_on_a_described_family_is_supported() -> None:
    spec = decoder_of(attach_adapter(random_model(qwen3_config()), rank=4))
    assert not isinstance(spec, Unsupported)
    assert (spec.family, spec.num_layers, spec.has_qk_norm) == ("qwen3", 2, True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_dropout": 0.1}, "has adapter dropout"),
        ({"use_dora": True}, "uses DoRA"),
        ({"lora_bias": True}, "has a bias in its adapter"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "is adapted as Embedding, not as a plain LoRA layer"),
        ({"modules_to_save": ["norm"]}, "is trained, which is not a LoRA matrix"),
        ({"bias": "all"}, "is trained, which is not a LoRA matrix"),
    ],
)
def test_other_adapters_are_refused_by_name(options: dict[str, Any], reason: str) -> None:
    assert reason in reason_of(**options)


def test_mixtures_of_experts_are_refused_not_wrong() -> None:
    found = read_decoder(Qwen3MoeConfig())
    assert found == Unsupported("Qwen3-MoE routes tokens to experts, which the fused decoder does not do")


def test_an_unknown_family_lists_the_known_ones() -> None:
    found = read_decoder(GPT2Config())
    assert isinstance(found, Unsupported)
    assert found.reason == ("gpt2 is not a family that it describes (Qwen3, Qwen2 and Qwen2.5, Llama 2 and 3, Mistral)")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "the activation gelu is not silu"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"head_dim": 20}, "heads of 20 are not a multiple of 8 up to 256"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "the rotary embedding dynamic depends on the length of the row",
        ),
    ],
)
def test_variations_that_are_not_described_are_refused(changes: dict[str, Any], reason: str) -> None:
    assert read_decoder(qwen3_config(**changes)) == Unsupported(reason)


def test_sixteen_bits_on_a_cpu_are_refused() -> None:
    model = attach_adapter(random_model(qwen3_config(), dtype=torch.bfloat16), rank=4)
    found = decoder_of(model)
    assert found == Unsupported("on a CPU it computes in float32, not bfloat16")


@pytest.mark.parametrize(
    ("device", "capability", "hip", "triton", "reason"),
    [
        ("cuda", (7, 5), None, True, "its attention needs compute capability 8.0, the card has 7.5"),
        ("cuda", (9, 4), "6.2", True, "it has no kernels for ROCm"),
        ("mps", (0, 0), None, False, "it has no kernels for mps"),
        ("cuda", (8, 9), None, False, "Triton is not installed (`pip install triton`)"),
        ("cuda", (8, 0), None, True, None),
    ],
)
def test_devices_on_which_the_reference_is_faster_are_refused(
    device: str, capability: tuple[int, int], hip: str | None, triton: bool, reason: str | None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(support, "has_triton", lambda: triton)
    found = support._unsupported_device(torch.device(device), torch.bfloat16)
    assert found == (Unsupported(reason) if reason else None)


def test_a_trained_head_is_refused() -> None:
    model = attach_adapter(random_model(qwen3_config(tie_word_embeddings=False, vocab_size=VOCABULARY)), rank=4)
    model.get_base_model().get_output_embeddings().weight.requires_grad_(True)
    assert decoder_of(model) == Unsupported("the head is trained")
