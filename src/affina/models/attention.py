"""The attention of packed rows, offered to transformers under the name `affina_packed`.

transformers lets a model's attention be chosen by name (`AttentionInterface`) and asks a second registry for the mask.
Under our name a forward pass that carries documents (see `forward.py`) attends document by document and builds no
mask; every other forward pass, generation with a cache, padded rows, is transformers' own `sdpa`, masks included.

The silent trap that this closes: with `sdpa` documents leak into each other as soon as an attention mask is passed,
even one of ones, or a cache is created, which is the default. Here isolation is an argument, not an inference from
what is absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from affina.errors import ModelError
from affina.kernels.packed_attention import Documents, packed_attention

PACKED_ATTENTION = "affina_packed"
_MASK_IS_NOT_NEEDED: ContextVar[bool] = ContextVar("mask_is_not_needed", default=False)
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask")


@contextmanager
def without_masks() -> Iterator[None]:
    """While a packed forward pass runs, transformers builds no mask: the documents' bounds say it all."""
    token = _MASK_IS_NOT_NEEDED.set(True)
    try:
        yield
    finally:
        _MASK_IS_NOT_NEEDED.reset(token)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [B, H, T, K], key and value [B, G, T, K] → [B, T, H, K]."""
    if documents is None and softcap is not None:
        return _capped_attention(query, key, value, attention_mask, dropout, scaling, softcap), None
    if documents is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **options,
        )
        return result
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise ModelError(
                "packing-unsupported",
                f"{type(module).__name__} computes attention with {name}, which packed attention does not have",
                fix="data.packing: false",
            )
    if not getattr(module, "is_causal", True):
        raise ModelError(
            "packing-unsupported",
            f"{type(module).__name__} is not causal; packed attention is",
            fix="data.packing: false",
        )
    output = packed_attention(
        query, key, value, documents, scale=scaling, window=sliding_window, softcap=softcap, dropout=dropout
    )
    return output.transpose(1, 2).contiguous(), None


def _capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """[B, T, H, K] attention with a soft cap under a mask (True: visible), which `sdpa` does not compute.

    Without a mask it is causal; a single query then sees all keys.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(2, 3)) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = (softcap * torch.tanh(scores / softcap)).float()
    if mask is None:
        num_queries, num_keys = scores.shape[-2:]
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = visible.tril(num_keys - num_queries)
    # A padded query sees nothing; the smallest number instead of −∞ keeps its unused row free of NaN.
    hidden = torch.finfo(torch.float32).min
    scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    weights = nn.functional.dropout(scores.softmax(dim=-1).to(query.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous()


def attention_mask(*arguments: Any, **options: Any) -> Tensor | None:
    """The mask of `sdpa`, or none while a packed forward pass runs."""
    if _MASK_IS_NOT_NEEDED.get():
        return None
    mask: Tensor | None = sdpa_mask(*arguments, **options)
    return mask


def register() -> None:
    """Makes `affina_packed` known to transformers; may be called again."""
    AttentionInterface.register(PACKED_ATTENTION, attention_forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, attention_mask)


def use_packed_attention(model: PreTrainedModel) -> bool:
    """Switches `model` to `affina_packed`; False when the architecture does not take its attention by name."""
    register()
    try:
        model.set_attn_implementation(PACKED_ATTENTION)
    except (ValueError, ImportError):
        return False
    return bool(model.config._attn_implementation == PACKED_ATTENTION)
