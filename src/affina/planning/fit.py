"""Settings with which a run fits into less memory, the smallest change first, and the best use of what there is.

What may change without changing what is learned: micro-batch and accumulation together (the effective batch stays),
recomputation, the engine's save policy (which the engine chooses itself), the optimiser's storage. The weight format
changes the numbers a little and is proposed only when allowed. A shorter max_length drops data: it is named last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from affina.catalog.formats import FOUR_BIT_FORMATS
from affina.catalog.gpus import Gpu
from affina.catalog.methods import method_named
from affina.catalog.shapes import ModelShape
from affina.config.derive import with_value
from affina.config.schema import RunConfig
from affina.planning.build import setup_of
from affina.planning.coefficients import coefficients_for
from affina.planning.memory import MemoryPlan, plan_memory
from affina.planning.time import plan_time
from affina.planning.workload import Workload

_SHORTEST_LENGTH = 256
_SMALLEST_RANK = 8


@dataclass(frozen=True, slots=True)
class Change:
    """One setting by dotted path, its new value, and one sentence why."""

    path: str
    value: Any
    why: str


def memory_of(config: RunConfig, shape: ModelShape, gpu: Gpu | None, workload: Workload) -> MemoryPlan:
    """The memory of a config on a card."""
    setup = setup_of(config, shape, gpu, workload)
    engine = "reference" if isinstance(setup.fused, str) else "fast"
    return plan_memory(setup, coefficients_for(gpu.name if gpu is not None else "cpu", engine, setup.format))


def apply(config: RunConfig, changes: tuple[Change, ...]) -> RunConfig:
    """The config with the changes made."""
    for change in changes:
        config = with_value(config, change.path, change.value)
    return config


def smallest_changes(
    config: RunConfig, shape: ModelShape, gpu: Gpu | None, workload: Workload, *, may_quantize: bool
) -> tuple[Change, ...]:
    """The first proposal, in the order of how little it changes, with which the run fits; empty: none does."""
    for changes in _proposals(config, workload, may_quantize=may_quantize):
        changed = apply(config, changes)
        if memory_of(changed, shape, gpu, workload_after(changed, config, workload)).fits:
            return changes
    return ()


def smaller_cut(config: RunConfig, shape: ModelShape, gpu: Gpu | None, workload: Workload) -> tuple[Change, ...]:
    """The largest micro-batch, accumulated to the same effective batch, with which the run fits; empty: none does."""
    for cut in _smaller_micro_batches(config):
        changed = apply(config, cut)
        if memory_of(changed, shape, gpu, workload_after(changed, config, workload)).fits:
            return cut
    return ()


def workload_after(changed: RunConfig, config: RunConfig, workload: Workload) -> Workload:
    """The row's documents after micro-batch or length have changed: as many of each as fit."""
    if changed.training.micro_batch_size == config.training.micro_batch_size and (
        changed.data.max_length == config.data.max_length
    ):
        return workload
    budget = changed.training.micro_batch_size * changed.data.max_length
    lengths: list[int] = []
    for length in workload.row_lengths:
        taken = min(length, changed.data.max_length, budget - sum(lengths))
        if taken > 0:
            lengths.append(taken)
    if not changed.data.packing:
        lengths = sorted(lengths, reverse=True)[: changed.training.micro_batch_size]
    rows = tuple(lengths) or (budget,)
    return replace(workload, row_lengths=rows, mean_lengths=rows, row_supervised=None)


def _proposals(config: RunConfig, workload: Workload, *, may_quantize: bool) -> Iterator[tuple[Change, ...]]:
    base = tuple(_recomputation(config))
    if base:
        yield base
    smaller = list(_smaller_micro_batches(config))
    for change in smaller:
        yield (*base, *change)
    least = (*base, *(smaller[-1] if smaller else ()))
    optimizer = tuple(_smaller_optimizer(config))
    if optimizer:
        yield (*base, *optimizer)
        yield (*least, *optimizer)
    method = method_named(config.adapter.method)
    if may_quantize and "nf4" in method.trains_on and config.quantization.format not in FOUR_BIT_FORMATS:
        format = Change("quantization.format", "nf4", "4.127 bits a weight instead of 16: 9.2% of error in each")
        for rest in (base, *((*base, *change) for change in smaller), (*least, *optimizer)):
            yield (format, *rest)
        least = (format, *least)
    for fewer in _fewer_replies(config):
        yield (fewer,)
        if base:
            yield (*base, fewer)
        yield (*least, *optimizer, fewer)
    lowest = tuple(_lowest(config)) if may_quantize else ()
    if lowest:
        yield (*least, *lowest)
        least = (*least, *lowest)
    length = config.data.max_length
    while length > _SHORTEST_LENGTH:
        length //= 2
        shorter = Change("data.max_length", length, "shorter rows; longer samples are dropped or cut")
        yield (*least, shorter)
        if optimizer:
            yield (*least, *optimizer, shorter)
    rank = config.adapter.rank if "rank" in method.fields and method.name != "adalora" else 0
    while rank > _SMALLEST_RANK:
        rank //= 2
        smaller_rank = Change("adapter.rank", rank, "fewer trained parameters: it can learn less")
        yield (*least, *optimizer, smaller_rank)
        yield (*least, *optimizer, Change("data.max_length", _SHORTEST_LENGTH, "shorter rows"), smaller_rank)


def _recomputation(config: RunConfig) -> Iterator[Change]:
    if config.training.gradient_checkpointing is False:
        yield Change("training.gradient_checkpointing", "auto", "layers keep as much as fits, the rest is recomputed")


def _smaller_micro_batches(config: RunConfig) -> Iterator[tuple[Change, Change]]:
    """Halves, with as many more micro-batches: the same effective batch."""
    training = config.training
    rows = training.micro_batch_size * training.gradient_accumulation_steps
    micro = training.micro_batch_size
    while micro > 1:
        micro = max(size for size in range(1, micro) if rows % size == 0)
        yield (
            Change("training.micro_batch_size", micro, f"{micro} instead of {training.micro_batch_size} rows at once"),
            Change("training.gradient_accumulation_steps", rows // micro, f"keeps the effective batch of {rows} rows"),
        )


def _fewer_replies(config: RunConfig) -> Iterator[Change]:
    """What training does not feel; a card halves the batch of replies by itself, down to one."""
    if config.evaluation.batch_size > 1:
        yield Change("evaluation.batch_size", 1, "one reply at a time: the comparison takes longer")
    if config.evaluation.max_generations:
        yield Change("evaluation.max_generations", 0, "not one reply fits: the comparison is of perplexity alone")


def _smaller_optimizer(config: RunConfig) -> Iterator[Change]:
    if config.training.optimizer == "adamw":
        yield Change("training.optimizer", "adamw_8bit", "2 instead of 8 bytes of state per trained parameter")


def _lowest(config: RunConfig) -> Iterator[Change]:
    """Under a limit of the user's own there is no such change: it is another value of the same setting."""
    if config.engine.memory == "auto" and not method_named(config.adapter.method).trains_vocabulary:
        why = "embedding and head in 8 bits, every layer recomputed, adapter and optimiser in main memory: slower"
        yield Change("engine.memory", "lowest", why)


@dataclass(frozen=True, slots=True)
class Fit:
    """The best settings for a memory limit. reasons: of every choice, those that stayed included"""

    changes: tuple[Change, ...]
    memory: MemoryPlan
    reasons: tuple[str, ...]


def best_fit(
    config: RunConfig, shape: ModelShape, gpu: Gpu | None, workload: Workload, *, may_quantize: bool
) -> Fit | None:
    """The fastest way to run the config within its memory, effective batch constant; None: nothing fits.

    Every way to cut the effective batch into micro-batches is timed, the engine's save policy chosen for each.
    """
    best: tuple[float, tuple[Change, ...], MemoryPlan] | None = None
    training = config.training
    rows = training.micro_batch_size * training.gradient_accumulation_steps
    recomputes = tuple(_recomputation(config))
    cuts = [size for size in range(1, rows + 1) if rows % size == 0]
    for base, micro in product(((), recomputes) if recomputes else ((),), cuts):
        cut: tuple[Change, ...] = ()
        if micro != training.micro_batch_size:
            cut = (
                Change("training.micro_batch_size", micro, ""),
                Change("training.gradient_accumulation_steps", rows // micro, ""),
            )
        changed = apply(config, (*base, *cut))
        setup = setup_of(changed, shape, gpu, workload_after(changed, config, workload))
        memory = memory_of(changed, shape, gpu, workload_after(changed, config, workload))
        if not memory.fits:
            continue
        coefficients = coefficients_for(gpu.name if gpu is not None else "cpu", memory.engine, setup.format)
        time = plan_time(setup, memory, coefficients)
        # Without a speed the largest micro-batch counts as the fastest.
        seconds = time.step_seconds if time is not None else 1.0 / micro
        if best is None or seconds < best[0] * 0.98:
            best = (seconds, (*base, *cut), memory)
    if best is None:
        changes = smallest_changes(config, shape, gpu, workload, may_quantize=may_quantize)
        if not changes:
            return None
        changed = apply(config, changes)
        memory = memory_of(changed, shape, gpu, workload_after(changed, config, workload))
        return Fit(changes, memory, tuple(f"{change.path}: {change.value}: {change.why}" for change in changes))
    _, changes, memory = best
    changes = tuple(_explained(change, config, rows) for change in changes)
    return Fit(changes, memory, tuple(_reasons(config, changes, memory, rows)))


def _explained(change: Change, config: RunConfig, rows: int) -> Change:
    if change.path == "training.micro_batch_size":
        why = f"the fastest cut of {rows} rows that fits" if change.value > 1 else "one row at a time is what fits best"
        return Change(change.path, change.value, why)
    if change.path == "training.gradient_accumulation_steps":
        return Change(change.path, change.value, f"keeps the effective batch of {rows} rows")
    return change


def _reasons(config: RunConfig, changes: tuple[Change, ...], memory: MemoryPlan, rows: int) -> Iterator[str]:
    changed = {change.path for change in changes}
    for change in changes:
        yield f"{change.path}: {change.value}: {change.why}"
    if "training.micro_batch_size" not in changed:
        size = config.training.micro_batch_size
        yield f"training.micro_batch_size stays {size}: no other cut of the {rows} rows is faster within the memory"
    is_all = memory.keeps.startswith("everything")
    rest = "nothing is computed again" if is_all else "the most that fits, the rest is computed again"
    yield f"layers keep {memory.keeps}: {rest}"
    if "quantization.format" not in changed:
        yield f"quantization.format stays {config.quantization.format}: it fits without another weight format"
