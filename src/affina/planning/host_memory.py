"""Main memory that a run takes: while its model is loaded, and what waits there between the passes of a step."""

from __future__ import annotations

from affina.catalog.fused_memory import FusedRow
from affina.catalog.save_policy import Keep, SavePolicy
from affina.planning.setup import StepSetup

PROCESS_BYTES = 1 << 30
"""Of Python with torch and transformers; assumed."""


def loading_bytes(setup: StepSetup) -> int:
    """Weights are read one at a time: the largest one, twice in float32 while it is converted or quantised."""
    largest = max(setup.shape.embedding_parameters, *(linear.num_weights for linear in setup.shape.linears))
    return 2 * largest * 4


def offloaded_bytes(row: FusedRow, policy: SavePolicy) -> int:
    """Inputs and attention outputs of layers that wait in main memory: models/fast/offload.py's buffers."""
    tokens, spec = row.num_tokens, row.spec
    inputs = sum(keep <= Keep.OFFLOADED for keep in policy.layers) * pinned(tokens * spec.hidden_size * row.itemsize)
    output = pinned(tokens * spec.query_size * row.itemsize) + pinned(tokens * spec.num_heads * 4)
    return inputs + row.num_attention_on_host(policy) * output


def host_adapter_bytes(setup: StepSetup) -> int:
    """An adapter on the host: parameters and gradients in pinned memory, the optimiser's moments beside them."""
    gradients = 2 if setup.micro_batches > 1 else 1
    return (1 + gradients) * pinned(setup.flat_parameters * 4) + setup.flat_parameters * 8


def pinned(num_bytes: int) -> int:
    """Bytes of a pinned block: torch's allocator of host memory gives out powers of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0
