"""Memory that is free, and the save policy that it allows: the arithmetic is catalog/fused_memory.py's."""

from __future__ import annotations

from typing import Literal

import psutil
import torch

from affina.catalog.decoder import DecoderSpec
from affina.catalog.fused_choice import RESERVE_SHARE, WORKSPACE_BYTES, StepChoice, StepDemand, choose_step
from affina.catalog.fused_memory import LONG_DOCUMENT, FusedRow, Products
from affina.catalog.save_policy import Keep, SavePolicy
from affina.kernels.linear_cross_entropy import default_chunk_rows
from affina.models.device import free_bytes
from affina.models.fast.build import largest_ranks
from affina.models.fast.decoder import Decoder
from affina.models.fast.fp8 import Fp8Stack
from affina.models.fast.weights import ExpandedStack

_CPU_SHARE = 0.5
"""Of a computer's free memory: other programs run there."""
_HOST_SHARE = 0.4
"""Of a computer's memory, for pinned copies of what layers keep: pinned memory is never paged out."""


def step_budget_bytes(device: torch.device, budget_bytes: int | None) -> int:
    """Bytes of `device` that a step may take beside what tensors hold now.

    budget_bytes: of the whole process; None: what the device has
    """
    free = free_bytes(device)
    if device.type != "cuda":
        free = int(free * _CPU_SHARE)
        return free if budget_bytes is None else min(free, budget_bytes)
    if budget_bytes is not None:
        free = min(free, budget_bytes - torch.cuda.memory_allocated(device))
    return int(free * (1 - RESERVE_SHARE))


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


def row_of(decoder: Decoder, num_tokens: int, *, longest: int | None = None) -> FusedRow:
    """A row of which every token is supervised, the dearest there is. longest: of its documents; None: the row"""
    device = decoder.adapter.device
    linear = decoder.layers[0].gate_up
    products: Products = "dense"
    if isinstance(linear.stack, Fp8Stack):
        products = "fp8"
    elif isinstance(linear.stack, ExpandedStack):
        products = "expanded"
    return FusedRow(
        spec=decoder.spec,
        ranks=largest_ranks(decoder),
        num_tokens=num_tokens,
        num_predicted=num_tokens,
        itemsize=decoder.final_norm.dtype.itemsize,
        products=products,
        num_parameters=decoder.adapter.parameter.numel(),
        chunk_rows=default_chunk_rows(decoder.spec.vocabulary_size, device),
        merges=linear.merges,
        longest=num_tokens if longest is None else longest,
        on_gpu=device.type == "cuda",
    )


def choose_for_device(
    decoder: Decoder,
    num_tokens: int,
    demand: StepDemand,
    *,
    budget_bytes: int | None,
    recompute: bool | Literal["auto"],
    may_capture: bool,
    longest: int | None = None,
) -> StepChoice:
    """What layers keep of rows of `num_tokens` in the memory that is free now."""
    device = decoder.adapter.device
    is_gpu = device.type == "cuda"
    # The probe that has just run has left the matrix library's workspaces, which the step counts itself.
    workspaces = 2 * WORKSPACE_BYTES if is_gpu else 0
    return choose_step(
        row_of(decoder, num_tokens, longest=longest),
        demand,
        budget_bytes=step_budget_bytes(device, budget_bytes) + workspaces,
        recompute=recompute,
        may_offload=is_gpu,
        may_capture=is_gpu and may_capture,
        on_gpu=is_gpu,
    )
