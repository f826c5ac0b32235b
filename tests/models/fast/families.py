"""Tiny random models of every described family, with an adapter whose matrices are all random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from affina.catalog.save_policy import Keep, SavePolicy
from affina.models.adapters import attach_adapter
from affina.models.engines import trainable_parameters
from affina.models.fast import FastEngine, attach_fast_engine, detach_fast_engine, fast_engine_of
from affina.models.forward import supervised_loss
from affina.models.weights import Fp4Options, Fp8Options, Int8Options, Nf4Options, WeightFormatOptions, quantize_linears
from tests.models.tiny import VOCABULARY, TinyBatch, qwen3_config, random_model, randomize_adapter

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen3, tied": lambda: qwen3_config(num_hidden_layers=3),
    "qwen3, attention bias, untied": lambda: qwen3_config(
        num_hidden_layers=3, attention_bias=True, tie_word_embeddings=False
    ),
    "qwen2, one window": lambda: Qwen2Config(
        **_SMALL, use_sliding_window=True, sliding_window=7, max_window_layers=2, tie_word_embeddings=True
    ),
    "llama, scaled rope, biases": lambda: LlamaConfig(
        **_SMALL,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral, window": lambda: MistralConfig(**_SMALL, sliding_window=9, head_dim=24),
}


WEIGHTS: dict[str, WeightFormatOptions | None] = {
    "dense": None,
    "nf4": Nf4Options(),
    "fp4": Fp4Options(),
    "fp8": Fp8Options(),
    "int8": Int8Options(),
}


def adapted_model(
    config: PretrainedConfig,
    *,
    weights: str = "dense",
    method: str = "lora",
    rank: int = 4,
    alpha: float = 6.0,
    targets: str | Sequence[str] = "all-linear",
    dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """A model that is ready to train; weights: a name in WEIGHTS."""
    base = random_model(config, dtype=dtype)
    for name, parameter in base.named_parameters():
        if name.endswith("_proj.bias"):
            parameter.data.sub_(1.0)  # around 0; around 1 every softmax would be nearly one-hot, its gradient rounding
    options = WEIGHTS[weights]
    if options is not None:
        quantize_linears(base, options, exclude=[base.get_output_embeddings()])
    model = attach_adapter(base, method=method, rank=rank, alpha=alpha, targets=targets)
    randomize_adapter(model)
    return model.train()


def loss_and_gradients(model: PeftModel, batch: TinyBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and every adapter gradient by PEFT's name, from whichever engine is attached."""
    parameters = trainable_parameters(model)
    loss, _ = supervised_loss(model, batch)
    gradients = torch.autograd.grad(loss, parameters)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    engine = fast_engine_of(model)
    if engine is None:
        return loss.detach(), {names[id(p)]: g for p, g in zip(parameters, gradients, strict=True)}
    views = engine.decoder.adapter.gradients_of(gradients[0])
    return loss.detach(), {names[id(p)]: g for p, g in views.items()}


def both_engines(
    model: PeftModel, batch: TinyBatch, keep: Keep = Keep.ALL
) -> tuple[tuple[Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]:
    """(reference, fast): loss and gradients of the same model; leaves the reference."""
    expected = loss_and_gradients(model, batch)
    attach(model, keep)
    found = loss_and_gradients(model, batch)
    detach_fast_engine(model)
    return expected, found


def attach(model: PeftModel, keep: Keep = Keep.ALL) -> None:
    """Attach the fast engine at one save level; fails when it is refused."""
    engine = attach_fast_engine(model, row_tokens=512, recompute=False)
    assert isinstance(engine, FastEngine), engine
    engine.policy = SavePolicy.uniform(engine.decoder.spec.num_layers, keep)


def worst_difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of one gradient, ‖found − expected‖ / ‖expected‖, and its name."""
    assert expected.keys() == found.keys()
    differences = {
        name: float((found[name] - value).norm() / value.norm().clamp(min=1e-20)) for name, value in expected.items()
    }
    name = max(differences, key=lambda key: differences[key])
    return differences[name], name
