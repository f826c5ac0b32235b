"""Which save policy a memory budget allows: the same choice for the engine on its device and for a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from affina.catalog.fused_memory import FusedPeaks, FusedRow, allocated, evaluation_peak, training_peaks
from affina.catalog.lowest_memory import parts_peaks
from affina.catalog.save_policy import Keep, SavePolicy

RESERVE_SHARE = 0.06
"""Of the free memory, for the allocator's rounding and fragmentation."""
WORKSPACE_BYTES = 32 << 20
"""Of the matrix library, for each stream and thread that multiplies: `CUBLAS_WORKSPACE_CONFIG=:4096:8`, what
deterministic kernels want and Hopper has anyway. Measured on an H200: two of them in a step that is launched operation
by operation (63 MiB unexplained by anything else), three where rows are captured (72 to 86)."""
OPTIMIZER_BYTES: dict[str, float] = {"adamw": 8.0, "adamw_8bit": 2.06, "paged_adamw_8bit": 2.06, "adafactor": 0.1}
"""Of an optimiser's state, per trained parameter: two float32 moments; two bytes and two float32 scales per 256; rows
and columns of a factored moment (no more than 10% of one at rank 16)."""


@dataclass(frozen=True, slots=True)
class StepDemand:
    """What a step needs beside the row itself.

    optimizer_bytes: of its state
    accumulates:     gradients of an earlier micro-batch are there while the next one's are made
    validates:       validation rows of the same size run between steps
    num_shapes:      of captured rows: 1 where all rows are cut alike, more where documents differ in number
    """

    optimizer_bytes: int = 0
    accumulates: bool = True
    validates: bool = True
    num_shapes: int = 2


@dataclass(frozen=True, slots=True)
class StepChoice:
    """policy: what layers keep; is_captured: rows are replayed as CUDA graphs."""

    policy: SavePolicy
    is_captured: bool


@dataclass(frozen=True, slots=True)
class StepBytes:
    """allocated: the most that tensors take, as the allocator counts; needed: what the device must have for it."""

    peaks: FusedPeaks
    allocated: int
    needed: int


def step_bytes(row: FusedRow, choice: StepChoice, demand: StepDemand, *, on_gpu: bool) -> StepBytes:
    """Bytes of a whole run's steps beside weights and adapter parameters, optimiser included.

    The optimiser's state comes with the first update, after the first row was captured.
    """
    is_captured = choice.is_captured and not row.num_attention_on_host(choice.policy)
    in_parts = Keep.PARTS in choice.policy.layers
    peaks = parts_peaks(row) if in_parts else training_peaks(row, choice.policy, is_captured=is_captured)
    gradient = allocated(row.num_parameters, 4) if demand.accumulates else 0
    validation = 0 if in_parts or not demand.validates else evaluation_peak(row)
    workspaces = WORKSPACE_BYTES * (3 if is_captured else 2) if on_gpu else 0
    if not is_captured:
        peak = max(peaks.allocated + gradient, validation) + demand.optimizer_bytes + workspaces
        return StepBytes(peaks, peak, peak)
    # A second shape is captured into the same pool, while the optimiser's state and the first one's outputs exist.
    others = (demand.num_shapes - 1) * peaks.resident
    between = max(peaks.head + gradient, peaks.resident + validation) + others + demand.optimizer_bytes
    capturing = peaks.captured + (others + gradient + demand.optimizer_bytes if others else 0)
    needed = peaks.captured + between - peaks.resident + workspaces
    return StepBytes(peaks, max(capturing, between) + workspaces, needed)


def choose_step(
    row: FusedRow,
    demand: StepDemand,
    *,
    budget_bytes: int,
    recompute: bool | Literal["auto"],
    may_offload: bool,
    may_capture: bool,
    on_gpu: bool,
) -> StepChoice:
    """The policy with the least recomputation that needs at most `budget_bytes`; the leanest one when none does.

    Captured rows come first, since nothing else helps small rows as much; they keep their memory for good, and inputs
    in host memory cannot be captured.
    """
    num_layers = row.spec.num_layers

    def fits(policy: SavePolicy, *, is_captured: bool) -> bool:
        choice = StepChoice(policy, is_captured)
        needed = step_bytes(row, choice, demand, on_gpu=on_gpu).needed
        if is_captured and row.num_attention_on_host(policy):
            # Rows of short documents are captured, and keep that memory; those of long ones run beside it.
            short = step_bytes(replace(row, longest=0), choice, demand, on_gpu=on_gpu)
            needed += short.peaks.captured
        return needed <= budget_bytes

    if recompute != "auto":
        policy = SavePolicy.uniform(num_layers, Keep.INPUT if recompute else Keep.ALL)
        return StepChoice(policy, may_capture and fits(policy, is_captured=True))
    if may_capture and fits(SavePolicy.uniform(num_layers, Keep.INPUT), is_captured=True):
        return StepChoice(_richest(num_layers, Keep.INPUT, lambda p: fits(p, is_captured=True)), True)
    leanest = Keep.OFFLOADED if may_offload else Keep.INPUT
    if may_offload and not fits(SavePolicy.uniform(num_layers, leanest), is_captured=False):
        return StepChoice(SavePolicy.uniform(num_layers, Keep.PARTS), False)
    return StepChoice(_richest(num_layers, leanest, lambda p: fits(p, is_captured=False)), False)


def _richest(num_layers: int, leanest: Keep, fits: Callable[[SavePolicy], bool]) -> SavePolicy:
    """The last rung of the ladder from `leanest` to all layers at ALL that fits, by bisection; the first if none does.

    A rung is one layer at the next level, the last layers first: the backward pass frees their memory first.
    """
    low, high = 0, (Keep.ALL - leanest) * num_layers
    if fits(_rung(num_layers, leanest, high)):
        return _rung(num_layers, leanest, high)
    high -= 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(_rung(num_layers, leanest, middle)):
            low = middle
        else:
            high = middle - 1
    return _rung(num_layers, leanest, low)


def _rung(num_layers: int, leanest: Keep, index: int) -> SavePolicy:
    level, num_higher = divmod(index, num_layers)
    lower = Keep(leanest + level)
    higher = (Keep(lower + 1),) * num_higher if num_higher else ()
    return SavePolicy((lower,) * (num_layers - num_higher) + higher)
