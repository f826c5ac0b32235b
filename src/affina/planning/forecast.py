"""What `affina plan` answers: cards by name, this machine's card, the fit, the trace; joined in one object."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from affina.catalog.gpus import Gpu, find_gpu, gpu_named, gpus
from affina.catalog.prices import load_prices
from affina.catalog.shapes import ModelShape
from affina.config import ResolvedConfig
from affina.config.derive import with_value
from affina.config.schema import RunConfig
from affina.errors import ConfigError
from affina.planning.build import adapter_of, model_config, precision_of, raise_unless_planned, shape_of
from affina.planning.fit import Change, Fit, apply, best_fit, memory_of, smallest_changes, workload_after
from affina.planning.plan import CPU_NAME, Plan, make_plan
from affina.planning.workload import Workload, estimated_workload

THIS, ALL = "this", "all"
_ASK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class TraceResult:
    """Bytes of the reference engine's step on a CPU, counted.

    row_tokens:     of the traced micro-batch
    untraced_format: of the run's base, in whose place a dense one was traced; None: the run's base is dense
    """

    static_bytes: int
    peak_bytes: int
    num_operations: int
    row_tokens: int
    recomputes: bool
    untraced_format: str | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """A plan, with the fit and the trace where they were asked for."""

    plan: Plan
    fit: Fit | None = None
    fit_gib: float | None = None
    trace: TraceResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values = self.plan.to_dict()
        if self.fit is not None:
            values["fit"] = {
                "gib": self.fit_gib,
                "changes": [asdict(change) for change in self.fit.changes],
                "reasons": list(self.fit.reasons),
                "keeps": self.fit.memory.keeps,
                "total_bytes": self.fit.memory.total_bytes,
                "peak_bytes": self.fit.memory.peak_bytes,
            }
        if self.trace is not None:
            values["trace"] = asdict(self.trace)
        return values


def forecast(
    resolved: ResolvedConfig,
    *,
    gpus: Sequence[str],
    prices: str | Path | None,
    fit_gib: float | None,
    may_quantize: bool,
    workload: Workload | None,
    trace: bool,
) -> Forecast:
    """The forecast of a config; the arguments are those of `affina.plan`."""
    config = resolved.config
    raise_unless_planned(config)
    quotes = load_prices(prices)
    cards = cards_of(config, gpus)
    fit = None
    if fit_gib is not None:
        card = _card_to_fit(cards, gpus, fit_gib)
        cards = [card]
        within = with_value(config, "engine.memory", float(fit_gib)) if card is None else config
        fit = _fit(within, card, fit_gib, workload, may_quantize=may_quantize)
        if card is None:
            limit = Change("engine.memory", float(fit_gib), "a CPU has no memory of its own: the run is told its share")
            fit = replace(fit, changes=(limit, *fit.changes), reasons=(_reason(limit), *fit.reasons))
        changed = apply(config, fit.changes)
        workload = workload_after(changed, config, workload) if workload is not None else None
        config = changed
    plan = make_plan(config, cards, quotes, workload=workload, may_quantize=may_quantize)
    return Forecast(plan, fit, fit_gib, _trace(config, plan) if trace else None)


def cards_of(config: RunConfig, names: Sequence[str]) -> list[Gpu | None]:
    """The cards that the names mean, in the catalog's order for `all`.

    Without names: the CPU where the config trains on one, else this machine's card, else all.
    """
    if not names:
        if config.training.device == "cpu":
            return [None]
        here = this_gpu()
        return [here] if here is not None else list(gpus().values())
    found: list[Gpu | None] = []
    for name in (part.strip() for text in names for part in text.split(",")):
        if name == ALL:
            found += list(gpus().values())
        elif name == THIS:
            here = this_gpu()
            if here is None:
                raise ConfigError(
                    "gpu-not-here",
                    "this machine has no NVIDIA card that its driver reports",
                    why="nvidia-smi is missing or lists none",
                    fix="name a card: --gpu t4, or --gpu all",
                )
            found.append(here)
        elif name == "cpu":
            found.append(None)
        else:
            found.append(gpu_named(name))
    return list(dict.fromkeys(found))


@lru_cache(maxsize=1)
def this_gpu() -> Gpu | None:
    """The card of this machine as its driver reports it, with its own memory; None: there is none.

    A card that the catalog does not know is taken for the known one whose compute capability and memory are nearest.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_ASK_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    for line in answer.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and parts[1].isdigit():
            return card_as(parts[0], int(parts[1]) / 1024, parts[2])
    return None


def card_as(name: str, memory_gib: float, capability: str) -> Gpu:
    """The card that a driver's answer describes."""
    known = find_gpu(name)
    if known is not None:
        return known
    major, _, minor = capability.partition(".")
    wanted = (int(major), int(minor or 0)) if major.isdigit() else (8, 0)

    def distance(card: Gpu) -> tuple[float, float]:
        generation = abs((card.capability[0] - wanted[0]) * 10 + card.capability[1] - wanted[1])
        return generation, abs(card.memory_gib - memory_gib)

    nearest = min(gpus().values(), key=distance)
    title = f"{name} (speed as {nearest.title})"
    return replace(nearest, title=title, memory_gib=memory_gib * 0.985, capability=wanted, aliases=())


def _card_to_fit(cards: Sequence[Gpu | None], names: Sequence[str], gib: float) -> Gpu | None:
    """The card whose memory is cut to a limit; None: the CPU. Raises ConfigError `usage` where several are named."""
    if names and len(cards) > 1:
        listed = ", ".join(card.name if card is not None else CPU_NAME for card in cards)
        raise ConfigError(
            "usage",
            f"a fit is for one card, and {len(cards)} are named: {listed}",
            why="each would need other settings",
            fix="name one of them, or none: any card with that much memory is taken then",
        )
    if list(cards) == [None]:
        return None
    return with_memory(cards[0] if len(cards) == 1 else None, gib)


def with_memory(card: Gpu | None, gib: float) -> Gpu:
    """A card of which that much memory may be taken; without a name one of Ampere's generation."""
    if card is not None:
        return replace(card, memory_gib=gib)
    title = "any card since Ampere, at the speed of an RTX 3090"
    return replace(gpus()["rtx3090"], name="any", title=title, memory_gib=gib)


def _reason(change: Change) -> str:
    return f"{change.path}: {change.value}: {change.why}"


def _fit(config: RunConfig, card: Gpu | None, gib: float, workload: Workload | None, *, may_quantize: bool) -> Fit:
    raw, folder = model_config(config)
    shape = shape_of(config, raw, folder)
    data = workload or estimated_workload(config)
    fit = best_fit(config, shape, card, data, may_quantize=may_quantize)
    if fit is None:
        raise nothing_fits(config, shape, card, data, gib)
    return fit


def nothing_fits(config: RunConfig, shape: ModelShape, card: Gpu | None, workload: Workload, gib: float) -> ConfigError:
    """The error for a memory in which no settings run, with the smallest change that would."""
    needed = memory_of(config, shape, card, workload).peak_bytes / 2**30
    quantized = smallest_changes(config, shape, card, workload, may_quantize=True)
    if quantized:
        way = ", ".join(f"{change.path}={change.value}" for change in quantized)
        fix = f"it would fit with {way} (--may-quantize allows it)"
    elif card is None:
        fix = "give it more memory, or take a smaller model"
    else:
        larger = [entry for entry in gpus().values() if memory_of(config, shape, entry, workload).fits]
        fix = f"the smallest card on which it runs as it is: {larger[0].title}" if larger else "take a smaller model"
    return ConfigError(
        "nothing-fits",
        f"{config.model.path} does not fit into {gib:g} GiB, whatever is recomputed and however the batch is cut",
        why=f"as it is it needs {needed:.1f} GiB",
        fix=fix,
    )


def _trace(config: RunConfig, plan: Plan) -> TraceResult:
    """The reference step on fake tensors; imports torch."""
    import torch
    from transformers import AutoConfig

    from affina.planning.trace import TraceSettings, trace_config
    from affina.training.optim import OptimizerOptions

    _, folder = model_config(config)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.bfloat16, "fp32": torch.float32}
    lengths = plan.workload.row_lengths
    rest = plan.row_tokens - sum(lengths)
    recompute = config.training.gradient_checkpointing
    wants = recompute if isinstance(recompute, bool) else plan.cards[0].memory.recomputes
    settings = TraceSettings(
        lengths=(*lengths, rest) if rest > 0 else lengths,
        dtype=dtypes[precision_of(config, plan.cards[0].gpu)],
        rank=config.adapter.rank,
        targets=config.adapter.targets,
        dropout=config.adapter.dropout,
        method=config.adapter.method,
        options=dict(adapter_of(config).others),
        recompute=wants,
        optimizer=OptimizerOptions("adamw"),
    )
    traced = trace_config(AutoConfig.from_pretrained(folder), settings)
    format = plan.cards[0].format
    return TraceResult(
        traced.static_bytes,
        traced.peak_bytes,
        traced.num_operations,
        plan.row_tokens,
        wants,
        untraced_format=format if format != "none" else None,
    )
