"""Whether a run can be held by the device that is there, before its weights are loaded; and what became of the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from affina.catalog.gpus import Gpu, gpus
from affina.catalog.methods import method_named
from affina.catalog.shapes import ModelShape
from affina.config.schema import RunConfig
from affina.errors import ModelError, TrainingError
from affina.planning.build import model_config, shape_of, why_unplanned
from affina.planning.coefficients import coefficients_for, learn, shipped_coefficients
from affina.planning.fit import Change, apply, memory_of, smaller_cut, smallest_changes, workload_after
from affina.planning.forecast import card_as
from affina.planning.memory import BESIDE_TENSORS, MemoryPlan
from affina.planning.plan import CardPlan, plan_card
from affina.planning.workload import Workload
from affina.runs.units import format_bytes

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """What is free on the device of a run.

    name:       as the driver reports it; "cpu" for a CPU
    free_bytes: for tensors, what the CUDA context takes being taken already; None: unknown or unlimited
    is_capped:  the card has more free, and this process's allocator may not take it
    """

    name: str
    capability: tuple[int, int] | None = None
    total_bytes: int | None = None
    free_bytes: int | None = None
    is_capped: bool = False

    def card(self) -> Gpu | None:
        """The catalog's card for it, with the memory that is free; None: a CPU."""
        if self.capability is None or self.free_bytes is None or self.total_bytes is None:
            return None
        known = card_as(self.name, self.total_bytes / _GIB, f"{self.capability[0]}.{self.capability[1]}")
        context = shipped_coefficients().context_bytes
        return replace(known, memory_gib=(self.free_bytes + context) / _GIB)


def admit(config: RunConfig, workload: Workload, device: Device) -> CardPlan | None:
    """The plan of a run on the device that is there; None where none is made: for a model whose size its config.json
    does not tell, and for what `affina plan` does not count.

    Raises TrainingError `memory-too-small` when tensors alone take more than is free, with the smallest change of the
    settings with which they would not. A plan whose slack is not covered is let through: the engine recovers.
    """
    judged = _judge(config, workload, device)
    if judged is None:
        return None
    if judged.excess_of is not None:
        shape, card = judged.shape, device.card()
        changes = smallest_changes(config, shape, card, workload, may_quantize=True)
        needed = _needed(config, shape, card, workload, changes)
        raise _refusal(config, judged.plan.memory, changes, needed, judged.excess_of, device)
    return judged.plan


def cut_to_fit(config: RunConfig, workload: Workload, device: Device) -> tuple[Change, ...]:
    """With `engine.memory: auto`, what makes a run fit that would be refused, and changes nothing that is learned: a
    smaller micro-batch with as many more of them to a step. Empty where nothing of it is needed, or helps."""
    if config.engine.memory != "auto":
        return ()
    judged = _judge(config, workload, device)
    if judged is None or judged.excess_of is None:
        return ()
    return smaller_cut(config, judged.shape, device.card(), workload)


@dataclass(frozen=True, slots=True)
class _Judged:
    """A plan on the device that is there. excess_of: the bytes that are too few for it; None: it is let in"""

    shape: ModelShape
    plan: CardPlan
    excess_of: int | None


def _judge(config: RunConfig, workload: Workload, device: Device) -> _Judged | None:
    """None for what is tried without a plan."""
    if why_unplanned(config) is not None:
        return None
    raw, folder = model_config(config)
    try:
        shape = shape_of(config, raw, folder)
    except ModelError as error:
        if error.code != "config-incomplete":
            raise
        return None  # a model of another kind
    plan = plan_card(config, shape, device.card(), workload, (), with_changes=False)
    limit = _limit_bytes(config, device)
    is_refused = limit is not None and shape.is_exact and plan.certain_bytes > limit
    return _Judged(shape, plan, limit if is_refused else None)


def _limit_bytes(config: RunConfig, device: Device) -> int | None:
    limits = [device.free_bytes] if device.free_bytes is not None else []
    if isinstance(config.engine.memory, float):
        limits.append(int(config.engine.memory * _GIB))
    return min(limits) if limits else None


def _needed(
    config: RunConfig, shape: Any, card: Gpu | None, workload: Workload, changes: Sequence[Change]
) -> int | None:
    if not changes:
        return None
    changed = apply(config, tuple(changes))
    return memory_of(changed, shape, card, workload_after(changed, config, workload)).allocated_bytes


def _refusal(
    config: RunConfig,
    memory: MemoryPlan,
    changes: Sequence[Change],
    needed_bytes: int | None,
    limit: int,
    device: Device,
) -> TrainingError:
    tensors = [component for component in memory.components if component.name not in BESIDE_TENSORS]
    largest = sorted(tensors, key=lambda component: component.num_bytes, reverse=True)[:3]
    parts = ", ".join(f"{component.name} {format_bytes(component.num_bytes)}" for component in largest)
    is_own_limit = device.free_bytes is None or limit < device.free_bytes
    is_capped = device.is_capped and not is_own_limit
    where = "engine.memory allows" if is_own_limit else "this process may take" if is_capped else "free are"
    if changes:
        settings = ", ".join(f"{change.path}: {change.value}" for change in changes)
        fix = f"write {settings}: then it needs {format_bytes(needed_bytes or 0)}"
    else:
        larger = [card for card in gpus().values() if card.memory_bytes > memory.peak_bytes]
        fix = f"the smallest card that holds it: {larger[0].title}" if larger else "take a smaller model"
        if isinstance(config.engine.memory, float):
            fix = f"raise engine.memory; {fix}"
        elif is_capped:
            fix = f"raise this process's share of the card (torch.cuda.set_per_process_memory_fraction); {fix}"
    return TrainingError(
        "memory-too-small",
        f"this run needs {format_bytes(memory.allocated_bytes)} on {device.name}, {where} {format_bytes(limit)}",
        why=f"its largest parts: {parts}; layers keep {memory.keeps}",
        fix=f"{fix}; `affina plan` shows every part",
    )


def planned_record(plan: CardPlan) -> dict[str, Any]:
    """What a run's manifest keeps of its plan."""
    memory = plan.memory
    return {
        "card": plan.name,
        "engine": memory.engine,
        "keeps": memory.keeps,
        "allocated_bytes": memory.allocated_bytes,
        "total_bytes": memory.total_bytes,
        "seconds": plan.seconds,
        "step_seconds": plan.step.step_seconds if plan.step is not None else None,
        "components": [asdict(component) for component in memory.components],
    }


def measured_record(
    plan: CardPlan,
    *,
    engine: str,
    peak_bytes: int | None,
    training_seconds: float,
    num_steps: int,
) -> dict[str, Any]:
    """What became of the plan, for the manifest; this machine's coefficients learn from it.

    peak_bytes: of the allocator; None where only the whole process was measured
    engine:     which really ran; another one than planned teaches nothing
    """
    planned_step = plan.step.step_seconds if plan.step is not None else None
    step = training_seconds / num_steps if num_steps else None
    is_counted = method_named(plan.method).fast_engine  # the others' estimates must not correct LoRA's
    if is_counted and plan.gpu is not None and engine == plan.memory.engine and peak_bytes is not None:
        factor = _time_factor(plan)
        learn(
            plan.gpu.name,
            engine,
            plan.format,
            predicted_seconds=planned_step / factor if planned_step is not None and num_steps >= 20 else None,
            measured_seconds=step,
            predicted_bytes=plan.memory.allocated_bytes,
            measured_bytes=peak_bytes,
        )
    return {
        "engine": engine,
        "allocated_bytes": peak_bytes,
        "step_seconds": step,
        "memory_error": _error(plan.memory.allocated_bytes, peak_bytes),
        "time_error": _error(planned_step, step),
    }


def _time_factor(plan: CardPlan) -> float:
    """This machine's correction inside the plan's time, which must not be learned twice."""
    assert plan.gpu is not None
    return coefficients_for(plan.gpu.name, plan.memory.engine, plan.format).time_factor


def _error(planned: float | None, measured: float | None) -> float | None:
    """(planned − measured) / measured"""
    return (planned - measured) / measured if planned is not None and measured else None
