"""Causal attention over a row of several documents, none of which sees another.

Legend: T tokens of the row, S documents, L tokens of one document, H query heads, G key/value heads, K head dim.

**Maths.** For document d with tokens a_d … a_{d+1}−1 and query t in it,

    y_t = Σ_{u ∈ d, u ≤ t, t − u < w} softmax_u(cap(q_t · k_u · scale)) v_u

with w the sliding window (∞ without one) and cap(x) = c · tanh(x / c) where a model has a soft cap.

**Reference and CPU path.** The row is split at the documents' bounds and each document is an ordinary causal
attention. Splitting once (`Tensor.split`) matters: slicing S times makes the backward pass fill S gradients of the
whole row with zeros. Measured on 2 cores (T = 2048, 33 documents, 4 heads of 64, fp32, forward and backward): split 49
ms, slices 133 ms, documents padded to one batch 84 ms, one T × T mask 351 ms.

**CUDA path.** `torch.nn.attention.varlen.varlen_attn` (FlashAttention on `cu_seqlens`) where the card, the type and the
head allow it: one kernel for all documents, no waiting for the device (H100, 8,192 tokens in 24 documents, 32 heads of
128, forward and backward: 2.0 ms, split 4.6 ms). Without grouped heads in torch 2.11, keys and values are repeated
there.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of a row begin and end.

    cu_seqlens: [S+1] int32 bounds on the device of the row
    lengths:    the same as Python numbers, so that no layer waits for the device
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @classmethod
    def of(cls, cu_seqlens: Tensor, lengths: Sequence[int]) -> Documents:
        """Documents from their bounds and lengths; empty documents are dropped. Never waits for the device."""
        present = tuple(length for length in lengths if length > 0)
        if len(present) != len(lengths):
            cu_seqlens = torch.tensor([0, *accumulate(present)], dtype=torch.int32).to(cu_seqlens.device)
        return cls(cu_seqlens, present)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """[1, H, T, K] attention output, each document on its own.

    query:     [1, H, T, K]      key, value: [1, G, T, K], H a multiple of G
    documents: their lengths sum to T
    scale:     of the scores; 1/√K when None
    window:    a token sees itself and the `window` − 1 tokens before it; None: the whole document
    softcap:   c of cap(x) = c · tanh(x / c) on the scores, or None
    dropout:   probability of dropping an attention weight
    """
    assert sum(documents.lengths) == query.shape[2], f"{sum(documents.lengths)} tokens, row of {query.shape[2]}"
    if can_use_varlen(query, value) and softcap is None and dropout == 0.0:
        return _varlen(query, key, value, documents, scale, window)
    lengths = list(documents.lengths)
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([_attend(q, k, v, scale, window, softcap, dropout) for q, k, v in parts], dim=2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Causal attention of one document."""
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if softcap is not None:
        return _attend_with_cap(query, key, value, scale, window, softcap, dropout)
    if grouped and _lacks_grouped_kernel(query):
        # Grouped heads have no memory-efficient kernel: every score of every head would be stored, in float32.
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    if window is None or length <= window:
        return scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )
    mask = _band(length, window, query.device)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
    )


def _attend_with_cap(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float,
    dropout: float,
) -> Tensor:
    """The definition, score by score: no fused kernel has a soft cap everywhere."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(2, 3)) * (scale if scale is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    visible = _band(query.shape[2], window, query.device)
    weights = scores.float().masked_fill(~visible, float("-inf")).softmax(dim=-1).to(query.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ value


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """[L, L] bool: which earlier tokens each token sees."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if window is None else causal.triu(1 - window)


def can_use_varlen(query: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention on variable lengths takes these tensors: a CUDA card since Ampere, 16 bits, heads up to
    256."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and torch.version.hip is None
        and _capability(query.device) >= (8, 0)
    )


def _lacks_grouped_kernel(query: Tensor) -> bool:
    """Whether the card is older than FlashAttention, the only fused kernel of SDPA's for grouped heads."""
    return query.device.type == "cuda" and torch.version.hip is None and _capability(query.device) < (8, 0)


@lru_cache(maxsize=8)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=1)
def _varlen_parameters() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"scale": scale}
    if repeats > 1 and "enable_gqa" in _varlen_parameters():
        options["enable_gqa"] = True
    elif repeats > 1:  # torch 2.11
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    # FlashAttention's window counts the tokens to the left, the token itself not included.
    left = -1 if window is None or documents.max_length <= window else window - 1
    if "window_size" in _varlen_parameters():
        options["window_size"] = (left, 0)
    else:  # torch 2.10
        assert left == -1, "this torch has no sliding window on variable lengths"
        options["is_causal"] = True
    rows = tuple(tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    bounds, longest = documents.cu_seqlens, documents.max_length
    output = varlen_attn(rows[0], rows[1], rows[2], bounds, bounds, longest, longest, **options)
    assert isinstance(output, Tensor)
    return output.transpose(0, 1).unsqueeze(0)
