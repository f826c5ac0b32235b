"""Peak memory of a run by component, in closed form: for training, for validation and for generation.

What the fused decoder holds is catalog/fused_memory.py's arithmetic, what the reference holds is
catalog/reference_memory.py's; the engines choose what to keep by the same. Here they meet weights, adapter, optimiser
and the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from affina.catalog.decoder import DecoderSpec
from affina.catalog.fused_choice import (
    RESERVE_SHARE,
    WORKSPACE_BYTES,
    StepChoice,
    StepDemand,
    choose_step,
    step_bytes,
)
from affina.catalog.fused_memory import allocated, evaluation_peak
from affina.catalog.reference_memory import (
    reference_evaluation_bytes,
    reference_peaks,
    reference_step_bytes,
    wants_recomputation,
)
from affina.catalog.save_policy import Keep, SavePolicy
from affina.planning.coefficients import Coefficients
from affina.planning.generation import generation_bytes, replies_at_once
from affina.planning.host_memory import PROCESS_BYTES, host_adapter_bytes, loading_bytes, offloaded_bytes
from affina.planning.setup import StepSetup, fused_row, reference_row
from affina.planning.static_memory import adapter_on_host, optimizer_bytes, static_bytes

_CONTEXT, _SLACK = "CUDA context", "allocator slack"
BESIDE_TENSORS = (_CONTEXT, _SLACK)
"""Names of the components that `MemoryPlan.allocated_bytes` does not count."""


@dataclass(frozen=True, slots=True)
class Component:
    """One part of the peak. note: what it is made of, or why it is there"""

    name: str
    num_bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a run needs of a device.

    components:  of the training peak, which add up to total_bytes
    allocated_bytes: the most that tensors take: `torch.cuda.max_memory_allocated`
    reserved_bytes:  what PyTorch takes from the device for it, captured rows and fragmentation included
    total_bytes:     with the CUDA context: what nvidia-smi shows
    validation_bytes, generation_bytes: the same for these stages, weights and context included
    wanted_replies: that the evaluation generates at once; num_replies: the same, halved until they fit
    peak_bytes:  of the stage that needs most
    host_bytes:  of main memory, the process itself included; on a CPU everything is there
    engine, engine_reason: which one, and why not the fast one where it is not
    keeps:       what layers keep for the backward pass, in words
    capacity_bytes: of the device for this process with its context, None: unknown
    fits:        the peak stays below it
    """

    components: tuple[Component, ...]
    allocated_bytes: int
    reserved_bytes: int
    total_bytes: int
    validation_bytes: int
    generation_bytes: int
    wanted_replies: int
    num_replies: int
    peak_bytes: int
    host_bytes: int
    engine: str
    engine_reason: str | None
    keeps: str
    choice: StepChoice | None
    recomputes: bool
    capacity_bytes: int | None
    fits: bool


def plan_memory(setup: StepSetup, coefficients: Coefficients) -> MemoryPlan:
    """Everything that a run of this step holds, on its card or CPU."""
    static = static_bytes(setup)
    if isinstance(setup.fused, DecoderSpec):
        return _fused_plan(setup, static, coefficients)
    return _reference_plan(setup, static, coefficients)


def capacity_bytes(setup: StepSetup, coefficients: Coefficients) -> int | None:
    """Of the device for this process, context included, which `engine.memory` does not count; None: a CPU without a
    limit. Below a limit other programs are taken to have the rest."""
    if setup.gpu is None:
        return setup.memory_bytes
    if setup.memory_bytes is None:
        return setup.gpu.memory_bytes
    return min(setup.gpu.memory_bytes, setup.memory_bytes + coefficients.context_bytes)


def tensor_budget_bytes(setup: StepSetup, coefficients: Coefficients) -> int | None:
    """What tensors may take."""
    capacity = capacity_bytes(setup, coefficients)
    return capacity - _context_bytes(setup, coefficients) if capacity is not None else None


def _context_bytes(setup: StepSetup, coefficients: Coefficients) -> int:
    return coefficients.context_bytes if setup.gpu is not None else 0


def _fused_plan(setup: StepSetup, static: dict[str, int], coefficients: Coefficients) -> MemoryPlan:
    on_gpu = setup.gpu is not None
    demand = _demand(setup)
    optimizer = demand.optimizer_bytes
    # The engine chooses before it has seen the data, for a row of which every token is supervised.
    longest = setup.longest_possible or setup.row_tokens
    row = replace(fused_row(setup, num_predicted=setup.row_tokens), longest=longest)
    fixed = sum(static.values())
    budget = tensor_budget_bytes(setup, coefficients)
    choice = choose_step(
        row,
        replace(demand, num_shapes=2),  # so the engine assumes before it has seen the rows
        budget_bytes=int((budget - fixed) * (1 - RESERVE_SHARE)) if budget is not None else 1 << 62,
        recompute=setup.recompute,
        may_offload=on_gpu,
        may_capture=on_gpu and setup.is_packed and setup.itemsize == 2,
        on_gpu=on_gpu,
    )
    if setup.is_lowest:
        leanest = Keep.PARTS if on_gpu else Keep.INPUT
        choice = StepChoice(SavePolicy.uniform(setup.shape.num_layers, leanest), False)
    row = fused_row(setup)
    if adapter_on_host(setup):
        row = replace(row, num_parameters=0)
    if row.num_attention_on_host(choice.policy):
        choice = replace(choice, is_captured=False)  # rows of long documents are launched operation by operation
    step = step_bytes(row, choice, demand, on_gpu=on_gpu)
    workspaces = WORKSPACE_BYTES * (3 if choice.is_captured else 2) if on_gpu else 0
    gradient = allocated(row.num_parameters, 4) * (2 if setup.micro_batches > 1 else 1)
    in_parts = Keep.PARTS in choice.policy.layers
    kept = _kept_bytes(setup, choice.policy)
    working = max(step.needed - optimizer - workspaces - gradient - kept, 0)
    head = min(working, step.peaks.head - step.peaks.resident if choice.is_captured else 0)
    evaluation = step.peaks.forward if in_parts else evaluation_peak(row)
    evaluation += step.peaks.captured + gradient if choice.is_captured else 0
    host = offloaded_bytes(row, choice.policy)
    generation = 0  # captured rows give their memory back before it
    if adapter_on_host(setup):  # and it computes with PEFT's matrices
        generation = setup.num_trainable * 4 - static["adapter"]
        host += host_adapter_bytes(setup)
    parts = [
        Component("gradients", gradient, "float32, of the adapter"),
        Component("optimiser", optimizer, setup.optimizer),
        Component("activations kept", kept, choice.policy.describe()),
        Component("workspace", working - head, "of the layer that is being computed"),
        Component("logits", head, f"by chunks of {row.chunk_rows:,} rows"),
        Component("matrix library", workspaces, "cuBLAS"),
    ]
    return _assemble(
        setup,
        static,
        parts,
        coefficients,
        allocated_step=step.allocated,
        needed_step=step.needed,
        evaluation=evaluation + optimizer + workspaces,
        generation=generation + workspaces,
        host=host,
        slack=coefficients.slack_fast,
        engine="fast",
        reason=None,
        keeps=choice.policy.describe() + ("; rows are captured as CUDA graphs" if choice.is_captured else ""),
        choice=choice,
        recomputes=max(choice.policy.layers) < Keep.PRODUCTS,
    )


def _kept_bytes(setup: StepSetup, policy: SavePolicy) -> int:
    spec = setup.fused
    assert isinstance(spec, DecoderSpec)
    return policy.num_bytes(spec, num_tokens=setup.row_tokens, itemsize=setup.itemsize, ranks=setup.ranks)


def _reference_plan(setup: StepSetup, static: dict[str, int], coefficients: Coefficients) -> MemoryPlan:
    on_gpu = setup.gpu is not None
    demand = _demand(setup)
    recompute = _reference_recomputes(setup, demand, static, coefficients)
    row = reference_row(setup)
    peaks = reference_peaks(row, recompute=recompute, accumulates=demand.accumulates)
    workspaces = WORKSPACE_BYTES * 2 if on_gpu else 0
    step = reference_step_bytes(row, replace(demand, validates=False), recompute=recompute, on_gpu=on_gpu)
    gradient = step - demand.optimizer_bytes - workspaces - peaks.peak
    head = peaks.head - peaks.kept if peaks.head >= peaks.layer else 0
    keeps = "layers' inputs" if recompute else "everything for the backward pass"
    parts = [
        Component("gradients", gradient, "float32" if setup.trains_weights else "float32, of the adapter"),
        Component("optimiser", demand.optimizer_bytes, setup.optimizer),
        Component("activations kept", peaks.kept, keeps),
        Component("workspace", peaks.peak - peaks.kept - head, "of the layer that is being computed"),
        Component("logits", head, f"by chunks of {row.chunk_rows:,} rows"),
        Component("matrix library", workspaces, "cuBLAS"),
    ]
    return _assemble(
        setup,
        static,
        parts,
        coefficients,
        allocated_step=step,
        needed_step=step,
        evaluation=reference_evaluation_bytes(row) + demand.optimizer_bytes + workspaces,
        generation=workspaces,
        host=0,
        slack=coefficients.slack_reference,
        engine="reference",
        reason=str(setup.fused),
        keeps=keeps,
        choice=None,
        recomputes=recompute,
    )


def _demand(setup: StepSetup) -> StepDemand:
    return StepDemand(
        optimizer_bytes(setup),
        accumulates=setup.micro_batches > 1,
        validates=setup.validates,
        num_shapes=setup.num_shapes,
    )


def _reference_recomputes(
    setup: StepSetup, demand: StepDemand, static: dict[str, int], coefficients: Coefficients
) -> bool:
    """The user's choice, or whether the step of a row of supervised tokens would not fit otherwise."""
    if setup.recompute != "auto":
        return setup.recompute
    budget = tensor_budget_bytes(setup, coefficients)
    if budget is None:
        return False
    row = reference_row(setup, num_predicted=setup.row_tokens)
    free = budget - sum(static.values())
    return wants_recomputation(row, demand, free_bytes=free, on_gpu=setup.gpu is not None)


def _assemble(
    setup: StepSetup,
    static: dict[str, int],
    parts: list[Component],
    coefficients: Coefficients,
    *,
    allocated_step: int,
    needed_step: int,
    evaluation: int,
    generation: int,
    host: int,
    slack: float,
    engine: str,
    reason: str | None,
    keeps: str,
    choice: StepChoice | None,
    recomputes: bool,
) -> MemoryPlan:
    """generation, host: what is there on the device beside weights and replies, and on the host beside the process"""
    on_gpu = setup.gpu is not None
    fixed = sum(static.values())
    context = _context_bytes(setup, coefficients)
    needed = fixed + needed_step
    slack = slack + coefficients.memory_factor - 1 if on_gpu else 0.0
    slack_bytes = int(needed * slack)
    shape = setup.shape
    heads = "embedding and head" if shape.head_parameters else "embedding, which is the head too"
    adapter = f"{setup.num_trainable:,} parameters, float32"
    if adapter_on_host(setup):
        adapter = f"{setup.num_trainable:,} parameters in main memory, one layer of them here"
    elif engine == "fast" and setup.itemsize == 2:
        adapter += " and working copy"
    if setup.trains_weights:
        adapter = f"{setup.num_trainable:,} weights of the model itself, float32 in their own place"
        host += setup.num_trainable * setup.itemsize  # the base's values, to compare with
    elif setup.num_frozen:
        adapter += f"; beside them {setup.num_frozen:,} that {setup.adapter.entry.title} holds and does not train"
    components = [
        Component("base weights", static["linear"] + static["other"], f"{setup.format} on the linear layers"
                  if setup.format != "none" else f"{setup.precision}"),
        Component("embedding", static["embedding"], f"{heads}, {'int8' if setup.is_lowest else setup.precision}"),
        Component("trained weights" if setup.trains_weights else "adapter", static["adapter"], adapter),
        Component("expansion", static["expansion"], "room to expand weights and for low-rank products"),
        *parts,
        Component(_CONTEXT, context, "driver, kernels and libraries"),
        Component(_SLACK, slack_bytes, "rounding and fragmentation"),
    ]  # fmt: skip
    total = needed + slack_bytes + context
    capacity = capacity_bytes(setup, coefficients)
    validation = fixed + evaluation + int((fixed + evaluation) * slack) + context if setup.validates else 0
    num_replies, replies = _replies(setup, fixed + generation, slack, capacity - context if capacity else None)
    peak = max(total, validation, replies + context)
    in_loading = loading_bytes(setup) + (0 if on_gpu else fixed)
    return MemoryPlan(
        components=tuple(component for component in components if component.num_bytes),
        allocated_bytes=fixed + allocated_step,
        reserved_bytes=needed + slack_bytes,
        total_bytes=total,
        validation_bytes=validation,
        generation_bytes=replies + context if num_replies else 0,
        wanted_replies=setup.generation[0],
        num_replies=num_replies,
        peak_bytes=peak,
        host_bytes=PROCESS_BYTES + max(in_loading, host if on_gpu else peak + host),
        engine=engine,
        engine_reason=reason,
        keeps=keeps,
        choice=choice,
        recomputes=recomputes,
        capacity_bytes=capacity,
        fits=capacity is None or peak <= capacity,
    )


def _replies(setup: StepSetup, beside: int, slack: float, budget: int | None) -> tuple[int, int]:
    """How many replies at once, and the bytes of generating them with what is there beside them."""
    if not setup.generation[0]:
        return 0, 0
    free = int(budget / (1 + slack)) - beside if budget is not None else None
    count = replies_at_once(setup, free)
    needed = beside + generation_bytes(setup, count)
    return count, needed + int(needed * slack)
