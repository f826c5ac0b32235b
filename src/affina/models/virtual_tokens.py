"""Prompt methods: trained tokens before every sample, as embeddings or as keys and values of every layer.

PEFT adds them in `PeftModel.forward`, from which affina takes only the encoder: the body is called here, and the loss
needs hidden states of the sample's own tokens. Samples do not share a row: each begins with the virtual tokens, and
only what is in a row of its own sees nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from transformers import Cache

from affina.models.structure import base_model_of

_OFF: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True, slots=True)
class VirtualTokens:
    """The virtual tokens of `model`.

    count:     P, tokens before every sample
    is_prefix: keys and values for every layer; else embeddings
    """

    model: PeftModel
    count: int
    is_prefix: bool

    def embeddings(self, input_ids: Tensor) -> Tensor:
        """[B, P + T, D] of the virtual tokens and of `input_ids` [B, T]."""
        tokens: Tensor = base_model_of(self.model).get_input_embeddings()(input_ids)
        virtual: Tensor = self.model.get_prompt(batch_size=input_ids.shape[0])
        return torch.cat([virtual.to(tokens.dtype), tokens], dim=1)

    def cache(self, batch_size: int) -> Cache:
        """A cache that begins with the virtual tokens' keys and values."""
        return self.model.get_prompt(batch_size=batch_size)


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether `model`'s adapter puts tokens before every sample, switched off or not."""
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


def virtual_tokens_of(model: nn.Module) -> VirtualTokens | None:
    """The virtual tokens that a forward pass of `model` begins with now."""
    if not has_virtual_tokens(model) or model in _OFF:
        return None
    assert isinstance(model, PeftModel)
    config = model.active_peft_config
    return VirtualTokens(model, int(config.num_virtual_tokens), config.peft_type == PeftType.PREFIX_TUNING)


@contextmanager
def without_virtual_tokens(model: nn.Module) -> Iterator[None]:
    """Inside, samples begin with themselves."""
    was_off = model in _OFF
    _OFF.add(model)
    try:
        yield
    finally:
        if not was_off:
            _OFF.discard(model)
