"""Peak memory of a run by component, in closed form: for training, for validation and for generation.

What the fused decoder holds is catalog/fused_memory.py's arithmetic, what the reference holds is
catalog/reference_memory.py's; the engines choose what to keep by the same. Here they meet weights, adapter, optimiser
and the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from affina.catalog.decoder import DecoderSpec
from affina.catalog.formats import weight_bytes
from affina.catalog.fused_choice import (
    OPTIMIZER_BYTES,
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
from affina.planning.setup import StepSetup, fused_row, reference_row


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
    engine, engine_reason: which one, and why not the fast one where it is not
    keeps:       what layers keep for the backward pass, in words
    capacity_bytes: of the device for this process, None: unknown
    fits:        total and validation stay below it
    """

    components: tuple[Component, ...]
    allocated_bytes: int
    reserved_bytes: int
    total_bytes: int
    validation_bytes: int
    generation_bytes: int
    engine: str
    engine_reason: str | None
    keeps: str
    choice: StepChoice | None
    recomputes: bool
    capacity_bytes: int | None
    fits: bool


def static_bytes(setup: StepSetup) -> dict[str, int]:
    """Weights and adapter by component, as both engines hold them."""
    return _static_bytes(_StaticKey(setup))


class _StaticKey:
    """The part of a setup that weights depend on; plans of one run differ in the rest."""

    def __init__(self, setup: StepSetup) -> None:
        self.setup = setup
        self._values = (
            setup.shape,
            setup.adapter,
            setup.precision,
            setup.format,
            setup.double_quantization,
            setup.skipped,
            setup.gpu,
            setup.engine,
            setup.is_lowest,
            setup.optimizer,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StaticKey) and self._values == other._values

    def __hash__(self) -> int:
        return hash(self._values)


@lru_cache(maxsize=64)
def _static_bytes(key: _StaticKey) -> dict[str, int]:
    setup = key.setup
    shape, n = setup.shape, setup.itemsize
    linears = sum(
        weight_bytes(
            format, linear.out_features, linear.in_features, itemsize=n, double_quantization=setup.double_quantization
        )
        * linear.count
        for linear, format, _ in setup.linears
    )
    embedding = (shape.embedding_parameters + shape.head_parameters) * n
    if setup.is_lowest:  # a byte a number, and a float32 scale for each entry
        embedding = shape.vocabulary_size * (shape.hidden_size + 4) * (1 if shape.ties else 2)
    parts = {
        "linear": linears,
        "embedding": embedding,
        "other": shape.other_parameters * n,
        "adapter": setup.num_trainable * 4,
        "expansion": 0,
    }
    if isinstance(setup.fused, DecoderSpec):
        parts["adapter"] = allocated(setup.flat_parameters, 4) + (allocated(setup.flat_parameters, n) if n == 2 else 0)
        parts["expansion"] = _room_for_low_rank(setup) if setup.products == "dense" else _workspace(setup)
        if adapter_on_host(setup):
            # One layer's gradients in float32, its matrices as they arrive, and two places for them in 16 bits.
            parts["adapter"] = setup.flat_parameters // shape.num_layers * (8 + 2 * n)
    return parts


def adapter_on_host(setup: StepSetup) -> bool:
    """Whether the adapter, its gradients and the optimiser's state are in main memory."""
    return setup.is_lowest and _has_flat_state(setup) and setup.gpu is not None


def _has_flat_state(setup: StepSetup) -> bool:
    return isinstance(setup.fused, DecoderSpec) and setup.optimizer == "adamw" and not setup.has_two_rates


def _room_for_low_rank(setup: StepSetup) -> int:
    """Rows below dense weights where the adapter's share of the input gradient is written."""
    if setup.itemsize == 4:
        return _workspace(setup)  # W + s B A, merged once per use
    ranks, shape = setup.ranks, setup.shape
    per_layer = (ranks.qkv + ranks.gate_up) * shape.hidden_size + ranks.output * shape.query_size
    return (per_layer + ranks.down * shape.intermediate_size) * setup.itemsize * shape.num_layers


def _workspace(setup: StepSetup) -> int:
    """One expanded weight at a time, as large as the largest group with a common input."""
    if setup.products == "fp8":
        return 0
    shape, ranks = setup.shape, setup.ranks
    if setup.is_lowest:  # one weight at a time
        rank = setup.adapter.rank if setup.itemsize == 2 else 0
        largest = max((linear.out_features + rank) * linear.in_features for linear in shape.linears)
        return allocated(largest, setup.itemsize)
    extra = (lambda rank: rank) if setup.itemsize == 2 else (lambda rank: 0)
    sizes = (
        (shape.query_size + 2 * shape.key_value_size + extra(ranks.qkv)) * shape.hidden_size,
        (shape.hidden_size + extra(ranks.output)) * shape.query_size,
        (2 * shape.intermediate_size + extra(ranks.gate_up)) * shape.hidden_size,
        (shape.hidden_size + extra(ranks.down)) * shape.intermediate_size,
    )
    return allocated(max(sizes), setup.itemsize)


def optimizer_bytes(setup: StepSetup) -> int:
    """Of the optimiser's state."""
    if adapter_on_host(setup):
        return 0
    num_values = setup.flat_parameters if _has_flat_state(setup) else setup.num_trainable
    return int(OPTIMIZER_BYTES[setup.optimizer] * num_values)


def plan_memory(setup: StepSetup, coefficients: Coefficients) -> MemoryPlan:
    """Everything that a run of this step holds, on its card or CPU."""
    static = static_bytes(setup)
    if isinstance(setup.fused, DecoderSpec):
        return _fused_plan(setup, static, coefficients)
    return _reference_plan(setup, static, coefficients)


def capacity_bytes(setup: StepSetup) -> int | None:
    """Of the device for this process, context included; None: a CPU without a limit."""
    capacity = setup.gpu.memory_bytes if setup.gpu is not None else None
    if setup.memory_bytes is None:
        return capacity
    return setup.memory_bytes if capacity is None else min(capacity, setup.memory_bytes)


def tensor_budget_bytes(setup: StepSetup, coefficients: Coefficients) -> int | None:
    """What tensors may take: `engine.memory` counts tensors, a card's capacity has the context in it."""
    capacity = setup.gpu.memory_bytes - coefficients.context_bytes if setup.gpu is not None else None
    if setup.memory_bytes is None:
        return capacity
    return setup.memory_bytes if capacity is None else min(capacity, setup.memory_bytes)


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
    generation = generation_bytes(setup) + (step.peaks.captured if choice.is_captured else 0)
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
    peaks = reference_peaks(row, recompute=recompute)
    workspaces = WORKSPACE_BYTES * 2 if on_gpu else 0
    step = reference_step_bytes(row, replace(demand, validates=False), recompute=recompute, on_gpu=on_gpu)
    gradient = step - demand.optimizer_bytes - workspaces - peaks.peak
    head = peaks.head - peaks.kept if peaks.head >= peaks.layer else 0
    keeps = "layers' inputs" if recompute else "everything for the backward pass"
    parts = [
        Component("gradients", gradient, "float32, of the adapter"),
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
        generation=generation_bytes(setup) + workspaces,
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
    slack: float,
    engine: str,
    reason: str | None,
    keeps: str,
    choice: StepChoice | None,
    recomputes: bool,
) -> MemoryPlan:
    on_gpu = setup.gpu is not None
    fixed = sum(static.values())
    context = coefficients.context_bytes if on_gpu else 0
    needed = fixed + needed_step
    slack = slack + coefficients.memory_factor - 1 if on_gpu else 0.0
    slack_bytes = int(needed * slack)
    shape = setup.shape
    heads = "embedding and head" if shape.head_parameters else "embedding, which is the head too"
    components = [
        Component("base weights", static["linear"] + static["other"], f"{setup.format} on the linear layers"
                  if setup.format != "none" else f"{setup.precision}"),
        Component("embedding", static["embedding"], f"{heads}, {setup.precision}"),
        Component("adapter", static["adapter"], f"{setup.num_trainable:,} parameters, float32 and working copy"
                  if engine == "fast" and setup.itemsize == 2 else f"{setup.num_trainable:,} parameters, float32"),
        Component("expansion", static["expansion"], "room to expand weights and for low-rank products"),
        *parts,
        Component("CUDA context", context, "driver, kernels and libraries"),
        Component("allocator slack", slack_bytes, "rounding and fragmentation"),
    ]  # fmt: skip
    total = needed + slack_bytes + context
    capacity = capacity_bytes(setup)
    validation = fixed + evaluation + int((fixed + evaluation) * slack) + context
    budget = tensor_budget_bytes(setup, coefficients)
    fits = budget is None or max(total, validation if setup.validates else 0) - context <= budget
    return MemoryPlan(
        components=tuple(component for component in components if component.num_bytes),
        allocated_bytes=fixed + allocated_step,
        reserved_bytes=needed + slack_bytes,
        total_bytes=total,
        validation_bytes=validation if setup.validates else 0,
        generation_bytes=fixed + generation + context,
        engine=engine,
        engine_reason=reason,
        keeps=keeps,
        choice=choice,
        recomputes=recomputes,
        capacity_bytes=capacity,
        fits=fits,
    )


def generation_bytes(setup: StepSetup) -> int:
    """Keys and values of a batch of replies, and the logits of one token each; see `StepSetup.generation`."""
    sequences, tokens = setup.generation
    if not sequences:
        return 0
    shape, n = setup.shape, setup.itemsize
    cache = sequences * tokens * 2 * shape.key_value_size * shape.num_layers * n
    prompt = sequences * tokens * (3 * shape.hidden_size + 3 * shape.intermediate_size) * n
    return cache + prompt + sequences * shape.vocabulary_size * (n + 4)
