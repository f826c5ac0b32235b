"""What a method is told: the settings of the section `adapter`, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Targets = str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """The settings of one adapter; a method reads those that it has (`AdapterMethod.fields`).

    rank:                  R, width of a low-rank update
    alpha:                 numerator of the update's scale
    dropout:               share of the adapter's input that is dropped in training
    targets:               "all-linear", or names of linear layers
    learning_rate_ratio:   LoRA+: learning rate of B over that of A
    initial_rank:          AdaLoRA: rank before the budget is cut to `rank`
    orthogonal_weight:     AdaLoRA: weight of its regularisation
    num_virtual_tokens:    prompt methods: tokens put before every sample
    encoder_hidden_size:   P-tuning: width of the encoder; prefix tuning: of its reparametrisation, None: none
    block_size:            OFT, BOFT: width of the blocks that are rotated
    kronecker_factor:      LoKr: size of the first factor; None: as square as possible
    bottleneck_size:       bottleneck adapters: width of the bottleneck
    num_layers:            freeze: how many last layers are trained
    calibration_samples:   EVA: training samples whose activations give the initial directions
    options:               other PEFT methods: fields of their PEFT config
    """

    method: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: Targets = "all-linear"
    learning_rate_ratio: float = 16.0
    initial_rank: int = 24
    orthogonal_weight: float = 0.5
    num_virtual_tokens: int = 20
    encoder_hidden_size: int | None = None
    block_size: int = 32
    kronecker_factor: int | None = None
    bottleneck_size: int = 64
    num_layers: int = 2
    calibration_samples: int = 64
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
