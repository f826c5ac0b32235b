"""The real training step on fake tensors: no weights, no GPU, every byte counted.

The model is built on the meta device, gets its adapter there, and its parameters are then wrapped as fake tensors that
claim to lie on the CPU. The step is the training loop's own: objective, backward pass, optimiser. It runs twice; the
second time the optimiser's state exists. What a storage takes is counted while it lives, so the result is exact for the
operations that ran: those of the CPU. On a GPU attention and the expansion of quantised weights are other kernels with
other workspace, which the closed form of `memory` knows.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate as accumulate_lengths
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from affina.catalog.methods import method_named
from affina.data.collate import Batch
from affina.data.samples import IGNORED_LABEL
from affina.errors import ModelError
from affina.models.adapters import attach_adapter
from affina.models.compat import enable_recomputation
from affina.models.forward import assume_packed
from affina.models.weights import WeightFormatOptions, quantize_linears
from affina.planning.allocations import AllocationCounter
from affina.training.loop import accumulate
from affina.training.objectives.sft import TokenObjective, sft_objective
from affina.training.optim import OptimizerOptions, build_optimizer

_STEPS = 2
_ADAMW = OptimizerOptions("adamw")


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """What is traced. lengths: the documents of one micro-batch, laid end to end; every token but the first is trained

    weight_format: of the frozen linear layers, None: dense
    rank, targets, dropout: of the methods that have them; options: the method's other settings
    recompute:     activations are recomputed layer by layer
    """

    lengths: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    weight_format: WeightFormatOptions | None = None
    rank: int = 16
    targets: str | Sequence[str] = "all-linear"
    dropout: float = 0.0
    method: str = "lora"
    options: Mapping[str, Any] = field(default_factory=dict)
    recompute: bool = False
    optimizer: OptimizerOptions = _ADAMW
    gradient_accumulation_steps: int = 1


@dataclass(frozen=True, slots=True)
class Trace:
    """Bytes that live at once, as the CUDA allocator rounds them.

    static_bytes: parameters and buffers      peak_bytes: of the step      num_operations: dispatched in one step
    """

    static_bytes: int
    peak_bytes: int
    num_operations: int


def trace_folder(folder: Path, settings: TraceSettings) -> Trace:
    """`trace_config` of the config.json in a folder; its weights are not read."""
    return trace_config(AutoConfig.from_pretrained(folder), settings)


def trace_config(config: PretrainedConfig, settings: TraceSettings) -> Trace:
    """One training step of a model on fake tensors. Seconds for billions of parameters, on any machine.

    Raises ModelError: trace-quantised, trace-unsupported for an adapter method whose step asks for tensors' values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    method = method_named(settings.method)
    try:
        with torch.device("meta"):
            model = build_model(config, settings)
        become_fake(model, mode)
        return run_step(model, settings, mode)
    except (NotImplementedError, RuntimeError) as error:  # what torch raises where a fake tensor is asked for numbers
        if method.fast_engine:
            raise
        raise ModelError(
            "trace-unsupported",
            f"a step of {method.title} cannot be traced",
            why=f"it asks for values, and a trace has none ({str(error).splitlines()[0]})",
            fix="plan without --trace: the closed form counts this method too",
        ) from error


def build_model(config: PretrainedConfig, settings: TraceSettings) -> nn.Module:
    """The model that trains: base in its format and dtype, frozen, with its adapter, on the current default device."""
    base = AutoModelForCausalLM.from_config(config, dtype=settings.dtype)
    base.eval().requires_grad_(False)
    if settings.weight_format is not None:
        raise_for_quantised_trace(base)
        quantize_linears(
            base, settings.weight_format, exclude=[head for head in [base.get_output_embeddings()] if head is not None]
        )
    model: nn.Module = _attach(base, settings)
    if settings.recompute:
        enable_recomputation(base)
    return model


def _attach(base: PreTrainedModel, settings: TraceSettings) -> nn.Module:
    """The adapter, with those of rank, targets and dropout that the method has."""
    given = {"rank": settings.rank, "targets": settings.targets, "dropout": settings.dropout}
    options = {name: value for name, value in given.items() if name in method_named(settings.method).fields}
    model: nn.Module = attach_adapter(base, method=settings.method, options={**options, **settings.options})
    return model


def raise_for_quantised_trace(base: nn.Module) -> None:
    """Refuse quantising weights that do not exist."""
    if next(base.parameters()).is_meta:
        raise ModelError(
            "trace-quantised",
            "a trace runs on dense weights",
            why="quantising looks at the weights' values, and a trace has none",
            fix="plan without --trace: the closed form knows every format; or set quantization.format=none",
        )


def become_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Wrap every parameter and buffer, tied ones once. PEFT cannot do this step: `.to()` fails inside the mode."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    known[id(tensor)] = _fake(tensor, mode)
                tensors[name] = known[id(tensor)]


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    meta = tensor.data if tensor.is_meta else torch.empty_like(tensor.data, device="meta")
    fake = FakeTensor(mode, meta, torch.device("cpu"))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def run_step(model: nn.Module, settings: TraceSettings, mode: FakeTensorMode | None = None) -> Trace:
    """The peak of the second optimiser step of `model`, whose tensors are fake under `mode`, or real without one."""
    if method_named(settings.method).packs:
        assume_packed(model)
    counter = AllocationCounter()
    counter.add([*model.parameters(), *model.buffers()])
    static = counter.alive_bytes
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(parameters, settings.optimizer)
    model.train()
    with mode or nullcontext(), counter:
        for _ in range(_STEPS):
            gc.collect()  # autograd's cycles of the step before
            counter.reset_peak()
            before = counter.num_operations
            batches = [
                _batch(settings.lengths, has_values=mode is None) for _ in range(settings.gradient_accumulation_steps)
            ]
            accumulate(
                model,
                batches,
                TokenObjective(sft_objective),
                step=0,
                loss_scale=1.0,
                begin=lambda: None,
                make_room=lambda: False,
            )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del batches
    return Trace(static, counter.peak_bytes, counter.num_operations - before)


def _batch(lengths: tuple[int, ...], *, has_values: bool) -> Batch:
    """A row of zeros. Without values its bounds are not made of numbers, which would lie outside of the trace."""
    count = sum(lengths)
    labels = torch.zeros(count, dtype=torch.long)
    bounds = [0, *accumulate_lengths(lengths)]
    for start in bounds[:-1]:
        labels[start] = IGNORED_LABEL
    cu_seqlens = torch.zeros(len(bounds), dtype=torch.int32)
    if has_values:
        cu_seqlens.copy_(torch.tensor(bounds, dtype=torch.int32))
    return Batch(
        input_ids=torch.zeros(count, dtype=torch.long),
        labels=labels,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        num_tokens=count,
        num_supervised=count - len(lengths),
        num_examples=len(lengths),
        supervised_lengths=tuple(length - 1 for length in lengths),
    )
