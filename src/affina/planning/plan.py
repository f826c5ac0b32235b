"""The plan of a run: what it needs on each card, how long it takes there, what it costs. One object for all doors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from affina.catalog.formats import WEIGHT_FORMATS
from affina.catalog.gpus import Gpu
from affina.catalog.methods import AdapterMethod, method_named
from affina.catalog.prices import Price
from affina.catalog.shapes import ModelShape
from affina.config.derive import VALIDATIONS_PER_RUN, has_validation
from affina.config.schema import RunConfig
from affina.planning.build import (
    adapter_file_bytes,
    checkpoint_bytes_of,
    checkpoint_bytes_on_disk,
    merged_bytes,
    model_config,
    setup_of,
    shape_of,
)
from affina.planning.coefficients import Coefficients, coefficients_for
from affina.planning.cost import Cost, costs, energy_kwh
from affina.planning.fit import Change, smallest_changes
from affina.planning.memory import MemoryPlan, plan_memory
from affina.planning.setup import ROW_MULTIPLE, StepSetup
from affina.planning.static_memory import optimizer_bytes, static_bytes
from affina.planning.time import StepTime, plan_time
from affina.planning.workload import Workload, estimated_workload
from affina.runs.checkpoints import checkpoint_bytes

CPU_NAME = "cpu"
_VALIDATION_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class CardPlan:
    """The run on one card.

    gpu:      None: a CPU
    format:   of the base's linear layers
    method:   of the adapter
    certain_bytes: of the memory, what lies there whatever the activations: weights, adapter, optimiser, gradients
    changes:  the smallest change with which it fits, empty where it fits or nothing helps
    may_quantize: whether these were allowed to propose another weight format
    seconds:  of the whole run with validation and comparison; None: unknown
    """

    gpu: Gpu | None
    format: str
    method: str
    certain_bytes: int
    memory: MemoryPlan
    step: StepTime | None
    fits: bool
    changes: tuple[Change, ...]
    may_quantize: bool
    seconds: float | None
    validation_seconds: float | None
    generation_seconds: float | None
    costs: tuple[Cost, ...]
    energy_kwh: float | None

    @property
    def name(self) -> str:
        return self.gpu.name if self.gpu is not None else CPU_NAME

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        memory = self.memory
        return {
            "gpu": self.name,
            "title": self.gpu.title if self.gpu is not None else "CPU",
            "capacity_bytes": memory.capacity_bytes,
            "fits": self.fits,
            "changes": [asdict(change) for change in self.changes],
            "memory": {
                "allocated_bytes": memory.allocated_bytes,
                "reserved_bytes": memory.reserved_bytes,
                "total_bytes": memory.total_bytes,
                "validation_bytes": memory.validation_bytes,
                "generation_bytes": memory.generation_bytes,
                "num_replies": memory.num_replies,
                "peak_bytes": memory.peak_bytes,
                "host_bytes": memory.host_bytes,
                "components": [asdict(component) for component in memory.components],
            },
            "engine": memory.engine,
            "engine_reason": memory.engine_reason,
            "keeps": memory.keeps,
            "step_seconds": self.step.step_seconds if self.step is not None else None,
            "tokens_per_second": self.step.tokens_per_second if self.step is not None else None,
            "seconds": self.seconds,
            "validation_seconds": self.validation_seconds,
            "generation_seconds": self.generation_seconds,
            "costs": [asdict(cost) for cost in self.costs],
            "energy_kwh": self.energy_kwh,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """A run before it is run.

    download_bytes: of the model's weights that are not on this machine; 0: they are here
    disk_bytes:     of the run directory
    host_bytes:     of main memory, on the card that needs most of it
    notes:          what is assumed or estimated
    """

    model: str
    shape: ModelShape
    workload: Workload
    cards: tuple[CardPlan, ...]
    num_trainable: int
    effective_rows: int
    row_tokens: int
    adapter_bytes: int
    merged_bytes: int
    download_bytes: int
    disk_bytes: int
    host_bytes: int
    notes: tuple[str, ...]

    @property
    def fits_somewhere(self) -> bool:
        return any(card.fits for card in self.cards)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what `affina plan --json` prints."""
        shape = self.shape
        return {
            "model": {
                "path": self.model,
                "model_type": shape.model_type,
                "num_parameters": shape.num_parameters,
                "num_layers": shape.num_layers,
                "hidden_size": shape.hidden_size,
                "vocabulary_size": shape.vocabulary_size,
                "is_exact": shape.is_exact,
            },
            "num_trainable": self.num_trainable,
            "data": {
                **asdict(self.workload),
                "row_lengths": list(self.workload.row_lengths),
                "mean_lengths": list(self.workload.mean_lengths),
            },
            "effective_rows": self.effective_rows,
            "row_tokens": self.row_tokens,
            "adapter_bytes": self.adapter_bytes,
            "merged_bytes": self.merged_bytes,
            "download_bytes": self.download_bytes,
            "disk_bytes": self.disk_bytes,
            "host_bytes": self.host_bytes,
            "cards": [card.to_dict() for card in self.cards],
            "notes": list(self.notes),
        }


def make_plan(
    config: RunConfig,
    gpus: Sequence[Gpu | None],
    prices: Sequence[Price],
    *,
    workload: Workload | None = None,
    may_quantize: bool = False,
) -> Plan:
    """The plan of a config on each card. Loads nothing; of a hub model it reads config.json.

    workload:     of prepared data; None: estimated from the files
    may_quantize: changes may propose another weight format

    Raises ModelError and ConfigError for a model that cannot be planned.
    """
    raw, folder = model_config(config)
    shape = shape_of(config, raw, folder)
    data = workload or estimated_workload(config)
    plans = tuple(plan_card(config, shape, gpu, data, prices, may_quantize=may_quantize) for gpu in gpus)
    setup = setup_of(config, shape, gpus[0], data)
    present = checkpoint_bytes_on_disk(folder)
    training = config.training
    return Plan(
        model=config.model.path,
        shape=shape,
        workload=data,
        cards=plans,
        num_trainable=setup.num_trainable,
        effective_rows=training.micro_batch_size * training.gradient_accumulation_steps,
        row_tokens=setup.row_tokens,
        adapter_bytes=adapter_file_bytes(setup),
        merged_bytes=merged_bytes(setup),
        download_bytes=0 if present else checkpoint_bytes_of(shape),
        disk_bytes=checkpoint_bytes(setup.num_trainable, keep_last=training.keep_last),
        host_bytes=max(plan.memory.host_bytes for plan in plans),
        notes=tuple(_notes(config, shape, data, raw, folder)),
    )


def plan_card(
    config: RunConfig,
    shape: ModelShape,
    gpu: Gpu | None,
    workload: Workload,
    prices: Sequence[Price],
    *,
    may_quantize: bool = False,
    with_changes: bool = True,
) -> CardPlan:
    """The plan on one card."""
    setup = setup_of(config, shape, gpu, workload)
    memory, step, coefficients = measure(setup, _mean_setup(setup, workload))
    changes: tuple[Change, ...] = ()
    if not memory.fits and with_changes:
        changes = smallest_changes(config, shape, gpu, workload, may_quantize=may_quantize)
    validation = generation = seconds = None
    if step is not None and workload.num_steps is not None:
        validation = _validation_seconds(config, workload, step)
        generation = _generation_seconds(config, workload, setup, memory, coefficients)
        seconds = workload.num_steps * _micro_batches(config, workload) * step.micro_seconds + validation + generation
    return CardPlan(
        gpu=gpu,
        format=setup.format,
        method=config.adapter.method,
        certain_bytes=_certain_bytes(setup, memory),
        memory=memory,
        step=step,
        fits=memory.fits,
        changes=changes,
        may_quantize=may_quantize,
        seconds=seconds,
        validation_seconds=validation,
        generation_seconds=generation,
        costs=costs(gpu, seconds, prices) if gpu is not None and seconds is not None else (),
        energy_kwh=energy_kwh(gpu, seconds) if gpu is not None and seconds is not None else None,
    )


def measure(setup: StepSetup, mean: StepSetup | None = None) -> tuple[MemoryPlan, StepTime | None, Coefficients]:
    """Memory of a step and time of the mean one, with what this machine has learned about the card."""
    card = setup.gpu.name if setup.gpu is not None else CPU_NAME
    engine = "reference" if isinstance(setup.fused, str) else "fast"
    coefficients = coefficients_for(card, engine, setup.format)
    memory = plan_memory(setup, coefficients)
    return memory, plan_time(mean or setup, memory, coefficients), coefficients


def _certain_bytes(setup: StepSetup, memory: MemoryPlan) -> int:
    """Of LoRA and its relatives everything is counted on a card. Of other methods, what no activation is part of."""
    if not setup.counts_by_method:
        return memory.allocated_bytes
    gradient = 4 * setup.num_trainable if setup.micro_batches > 1 or setup.trains_weights else 0
    return sum(static_bytes(setup).values()) + optimizer_bytes(setup) + gradient


def _mean_setup(setup: StepSetup, workload: Workload) -> StepSetup:
    """The row by which time is counted: without packing rows are as long as their samples."""
    tokens = setup.row_tokens if setup.is_packed else -(-sum(workload.mean_lengths) // ROW_MULTIPLE) * ROW_MULTIPLE
    share = setup.predicted / setup.row_tokens
    return replace(setup, row_tokens=tokens, lengths=workload.mean_lengths, num_predicted=max(1, round(share * tokens)))


def _micro_batches(config: RunConfig, workload: Workload) -> float:
    """Of a step on average: the last step of an epoch may have fewer."""
    accumulation = config.training.gradient_accumulation_steps
    if config.data.packing or not workload.num_samples or not workload.steps_per_epoch:
        return float(accumulation)
    rows = -(-workload.num_samples // config.training.micro_batch_size)
    return min(float(accumulation), rows / workload.steps_per_epoch)


def _validation_seconds(config: RunConfig, workload: Workload, step: StepTime) -> float:
    """A forward pass is about a third of a training step; validating takes no more than 15% of the time by default."""
    if not has_validation(config) or workload.num_steps is None or not workload.num_tokens or not workload.num_samples:
        return 0.0
    tokens = workload.num_validation * workload.num_tokens / workload.num_samples
    once = tokens / step.tokens_per_second / 3
    every = config.training.evaluate_every_steps
    if every is not None:
        return -(-workload.num_steps // every) * once
    training = workload.num_steps * step.step_seconds
    return once + min((VALIDATIONS_PER_RUN - 1) * once, _VALIDATION_SHARE * training)


def _generation_seconds(
    config: RunConfig, workload: Workload, setup: StepSetup, memory: MemoryPlan, coefficients: Coefficients
) -> float:
    """Replies of base and tuned model, if every one is as long as it may be, so many at once as memory holds."""
    if not memory.num_replies or setup.gpu is None:
        return 0.0
    count = min(config.evaluation.max_generations, workload.num_validation or config.evaluation.max_generations)
    shape = setup.shape
    reading = shape.num_parameters * 2 / (setup.gpu.bandwidth_gb_s * 1e9 * coefficients.traffic_share)
    token = max(coefficients.decode_seconds * shape.num_layers / 36, reading)
    return 2 * -(-count // memory.num_replies) * config.evaluation.max_new_tokens * token


def _costs(method: AdapterMethod) -> str:
    """As a clause; what is not among the counted products."""
    return f"also computes what is not counted ({method.cost})"


def _notes(config: RunConfig, shape: ModelShape, workload: Workload, raw: dict[str, Any], folder: Path) -> list[str]:
    notes = []
    method = method_named(config.adapter.method)
    if not method.fast_engine:
        notes.append(
            f"{method.title}: parameters, gradients and optimiser are counted exactly; its activations were compared "
            "with steps on a CPU, not with a card"
        )
        if method.kind != "weights":
            notes.append(f"time is a lower bound: {method.title} {_costs(method)}")
    if not shape.is_exact:
        notes.append(f"{shape.model_type} is not described: it is counted as a Llama-like decoder of the same sizes")
    if not workload.is_exact:
        known = (
            "estimated from the size of the files"
            if workload.num_tokens is not None
            else "unknown, because the data is not a plain text file here"
        )
        notes.append(f"tokens and steps are {known}; --tokenize counts them")
    if shape.stored_format is not None and shape.stored_format not in WEIGHT_FORMATS:
        notes.append(f"the checkpoint is stored as {shape.stored_format}, which affina does not train on")
    return notes
