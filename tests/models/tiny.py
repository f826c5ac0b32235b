"""Random models of a few thousand parameters, and batches for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen3Config

from affina.models.compat import quiet_loading

VOCABULARY = 131


@dataclass(frozen=True)
class TinyBatch:
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    num_supervised: int


def batch_of(lengths: list[int], *, seed: int = 0, supervised: float = 0.6, vocabulary: int = VOCABULARY) -> TinyBatch:
    """Documents of random tokens, a share of them supervised, never the first of a document."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    ids = torch.randint(0, vocabulary, (count,), generator=generator)
    labels = ids.masked_fill(torch.rand(count, generator=generator) > supervised, -100)
    bounds = [0]
    for length in lengths:
        labels[bounds[-1]] = -100
        bounds.append(bounds[-1] + length)
    return TinyBatch(
        ids,
        labels,
        torch.cat([torch.arange(length) for length in lengths]),
        torch.tensor(bounds, dtype=torch.int32),
        tuple(lengths),
        int((labels != -100).sum()),
    )


def qwen3_config(**changes: Any) -> Qwen3Config:
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Qwen3Config(**(settings | changes))


def random_model(config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose norms and biases are random too, so that no two seeds agree anywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name and "dt_bias" not in name:
                nn.init.uniform_(parameter, 0.8, 1.2)
            elif parameter.dim() == 2:
                parameter.data.normal_(0, 0.08)
    return model.to(dtype).eval().requires_grad_(False)


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    with quiet_loading():
        model.save_pretrained(folder, **options)
    return folder


def randomize_adapter(model: nn.Module, *, seed: int = 3, scale: float = 0.05) -> None:
    """Gives B random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
