"""Memory that the fast engine needs beside what layers keep, and memory that is free."""

from __future__ import annotations

import psutil
import torch

from affina.kernels.linear_cross_entropy import default_chunk_rows
from affina.models.families import DecoderSpec
from affina.models.fast.decoder import Decoder
from affina.models.fast.layer import MLP_CHUNK_TOKENS
from affina.models.fast.policy import Keep, SavePolicy

_RESERVE_SHARE = 0.06
"""Of the free memory, for the allocator's rounding and fragmentation."""
_CPU_SHARE = 0.5
"""Of a computer's free memory: other programs run there."""
_HOST_SHARE = 0.4
"""Of a computer's memory, for pinned copies of what layers keep: pinned memory is never paged out."""

LONG_DOCUMENT = 2048
"""Tokens of a document from which the attention's output goes to the host rather than being computed twice."""

_SMALLEST_PART = 512
_PART_MULTIPLE = 128
_PARTS_OF_A_LONG_ROW = 16


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


def attention_on_host(
    spec: DecoderSpec, policy: SavePolicy, *, num_tokens: int, longest: int, itemsize: int, device: torch.device
) -> int:
    """How many layers, the first ones, send their attention's output to host memory instead of computing it again.

    longest: tokens of the row's longest document. Attention grows with its square, the copy with the row; from
    `LONG_DOCUMENT` on it hides behind the layer's products. As many layers as a share of the host's memory holds.
    """
    num_offloaded = sum(keep <= Keep.OFFLOADED for keep in policy.layers)
    # In parts, an output on its way is most of what a layer holds beside its own.
    shortest = 2 * LONG_DOCUMENT if Keep.PARTS in policy.layers else LONG_DOCUMENT
    if longest < shortest or not (device.type == "cuda" or num_offloaded):
        return 0
    num_candidates = sum(keep < Keep.ATTENTION for keep in policy.layers)
    of_inputs = num_offloaded * num_tokens * spec.hidden_size * itemsize
    per_layer = num_tokens * (spec.query_size * itemsize + spec.num_heads * 4)
    room = _HOST_SHARE * psutil.virtual_memory().total - of_inputs
    return max(0, min(num_candidates, int(room // per_layer)))


def tokens_per_part(num_tokens: int) -> int:
    """Tokens that a layer in parts computes at once: at least so many that the weights, which are expanded anew for
    every part, are used well, and for long rows few beside what grows with them."""
    share = num_tokens // _PARTS_OF_A_LONG_ROW // _PART_MULTIPLE * _PART_MULTIPLE
    return min(max(share, _SMALLEST_PART), MLP_CHUNK_TOKENS)


def working_bytes(decoder: Decoder, row_tokens: int) -> int:
    """Bytes at the busiest moment of a step, without weights and without what layers keep.

    The busiest moment is the backward pass of one layer's MLP (gradients of gate and up, of the activation, of the
    residual stream), that of its attention, with the next layer's output of attention on its way from the host, or the
    head's chunk of logits; gradients, the optimiser's two moments and the 16-bit copy of the adapter exist in either.
    """
    spec = decoder.spec
    itemsize = decoder.final_norm.dtype.itemsize
    mlp = (
        min(row_tokens, MLP_CHUNK_TOKENS) * 4 * spec.intermediate_size + row_tokens * 4 * spec.hidden_size
    ) * itemsize
    attention = row_tokens * (6 * spec.query_size + 6 * spec.key_value_size + 3 * spec.hidden_size) * itemsize
    device = decoder.adapter.device
    logits = default_chunk_rows(spec.vocabulary_size, device) * spec.vocabulary_size * (4 + itemsize)
    head = logits + 4 * row_tokens * spec.hidden_size * itemsize
    adapter = decoder.adapter.parameter.numel() * (3 * 4 + itemsize)
    return max(mlp, attention, head) + adapter
