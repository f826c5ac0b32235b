"""Memory that the fast engine needs beside what layers keep, and memory that is free."""

from __future__ import annotations

import psutil
import torch

from affina.kernels.linear_cross_entropy import default_chunk_rows
from affina.models.fast.decoder import Decoder
from affina.models.fast.layer import MLP_CHUNK_TOKENS

_RESERVE_SHARE = 0.06
"""Of the free memory, for the allocator's rounding and fragmentation."""
_CPU_SHARE = 0.5
"""Of a computer's free memory: other programs run there."""


def free_bytes(device: torch.device, budget_bytes: int | None) -> int:
    """Bytes that tensors may still take on `device`, the allocator's own unused blocks included.

    budget_bytes: of the whole process; None: what the device has
    """
    if device.type != "cuda":
        free = int(psutil.virtual_memory().available * _CPU_SHARE)
        return free if budget_bytes is None else min(free, budget_bytes)
    used = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - used
    free = torch.cuda.mem_get_info(device)[0] + unused
    if budget_bytes is not None:
        free = min(free, budget_bytes - used)
    return int(free * (1 - _RESERVE_SHARE))


def working_bytes(decoder: Decoder, row_tokens: int) -> int:
    """Bytes at the busiest moment of a step, without weights and without what layers keep.

    The busiest moment is the backward pass of one layer's MLP (gradients of gate and up, of the activation, of the
    residual stream) or the head's chunk of logits; gradients, the optimiser's two moments and the 16-bit copy of the
    adapter exist in either.
    """
    spec = decoder.spec
    itemsize = decoder.final_norm.dtype.itemsize
    mlp = (
        min(row_tokens, MLP_CHUNK_TOKENS) * 4 * spec.intermediate_size + row_tokens * 4 * spec.hidden_size
    ) * itemsize
    attention = row_tokens * (5 * spec.query_size + 6 * spec.key_value_size + 3 * spec.hidden_size) * itemsize
    device = decoder.adapter.parameter.device
    logits = default_chunk_rows(spec.vocabulary_size, device) * spec.vocabulary_size * (4 + itemsize)
    head = logits + 4 * row_tokens * spec.hidden_size * itemsize
    adapter = decoder.adapter.parameter.numel() * (3 * 4 + itemsize)
    return max(mlp, attention, head) + adapter
