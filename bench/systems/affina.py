"""affina's fast engine with its own loop's pieces: objective, accumulation, loss scale, clipping, optimiser."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from affina.catalog.lowest_memory import tokens_per_part
from affina.catalog.save_policy import Keep
from affina.data.collate import Batch, collate
from affina.data.samples import Sample
from affina.models.adapters import attach_adapter
from affina.models.engines import engine_of, trainable_parameters
from affina.models.families import Unsupported
from affina.models.fast import attach_fast_engine
from affina.models.weights import Fp8Options, Nf4Options, quantize_linears, quantize_vocabulary
from affina.training.loop import accumulate, apply_gradients
from affina.training.loss_scale import LossScale
from affina.training.objectives.sft import TokenObjective, sft_objective
from affina.training.optim import OptimizerOptions, build_optimizer
from systems.common import (
    DEVICE,
    LEARNING_RATE,
    TARGETS,
    Clock,
    cap_memory,
    dtype_of,
    main,
    num_token_ids,
    packed_rows,
    random_model,
    time_steps,
)


def batches_of(spec: dict[str, Any], count: int = 4) -> list[Batch]:
    """Packed rows of random tokens, every one but a document's first supervised."""
    generator = np.random.default_rng(1)
    total = spec["rows"] * spec["length"]
    if spec.get("packed"):
        rows = packed_rows(total, count)
    else:
        rows = [[spec["length"]] * spec["rows"]] * count
    return [
        random_batch(lengths, num_tokens=total, num_ids=num_token_ids(spec), generator=generator) for lengths in rows
    ]


def random_batch(lengths: list[int], *, num_tokens: int, num_ids: int, generator: np.random.Generator) -> Batch:
    """One row of random documents of these lengths, on the device."""
    samples = []
    for length in lengths:
        ids = generator.integers(0, num_ids, length).astype(np.int32)
        samples.append(Sample(ids, ids))
    return collate(samples, num_tokens=num_tokens, pad_token_id=0).to(DEVICE)


def be_deterministic() -> None:
    """As a run is by default."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def adapted_model(spec: dict[str, Any]) -> Any:
    """The frozen base in the case's weight format, with a fresh adapter on all seven linears."""
    model = random_model(spec).eval().requires_grad_(False)
    options = Nf4Options() if spec.get("nf4") else Fp8Options() if spec.get("fp8") else None
    if options is not None:
        quantize_linears(model, options, exclude=[model.get_output_embeddings()])
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    if spec.get("lowest"):
        quantize_vocabulary(model)
    return attach_adapter(model, rank=spec.get("rank", 16), alpha=32.0, targets=TARGETS)


@torch.no_grad()
def restart_adapter(model: nn.Module, seed: int) -> None:
    """The adapter as PEFT starts one, A uniform and B zero, from `seed` alone; in place, as captured graphs require."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            values = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
            parameter.copy_(values)
        elif ".lora_B." in name:
            parameter.zero_()


def prepare(spec: dict[str, Any], setting: dict[str, Any], clock: Clock | None = None) -> tuple[Any, Any, Any]:
    """(model, optimiser, engine)"""
    if setting.get("deterministic", True):
        be_deterministic()
    with (clock or Clock()).paused():
        adapted = adapted_model(spec)
    cap_memory(setting)
    memory = setting.get("memory_gib", setting.get("cap_gib"))
    engine = attach_fast_engine(
        adapted,
        row_tokens=spec["rows"] * spec["length"],
        budget_bytes=int(memory * 2**30) if memory else None,
        recompute=setting.get("recompute", "auto"),
        is_lean=bool(spec.get("lowest")),
    )
    if isinstance(engine, Unsupported):
        raise SystemExit(f"the fast engine does not run: {engine.reason}")
    if setting.get("graphs", True) and DEVICE.type == "cuda":
        engine.enable_graphs(print)
    optimizer = build_optimizer(trainable_parameters(adapted), OptimizerOptions("adamw"))
    return adapted, optimizer, engine


def one_step(model: Any, optimizer: Any, batch: Batch, loss_scale: LossScale | None = None) -> tuple[int, float]:
    """Forward, backward, clip, update: (tokens that are not padding, loss per token).

    A step that runs out of memory is repeated with more recomputation, as the loop does it.
    """
    scale = loss_scale.scale if loss_scale is not None else 1.0
    engine = engine_of(model)

    def make_room() -> bool:
        optimizer.zero_grad(set_to_none=True)
        kept = engine.make_room() if engine is not None else None
        if kept is not None:
            print(f"out of memory: layers keep {kept} from now on", flush=True)
        return kept is not None

    loss, _ = accumulate(
        model,
        [batch],
        TokenObjective(sft_objective),
        step=0,
        loss_scale=scale,
        begin=lambda: None,
        make_room=make_room,
    )
    norm = apply_gradients(optimizer, trainable_parameters(model), LEARNING_RATE, max_norm=1.0, loss_scale=scale)
    optimizer.zero_grad(set_to_none=True)
    if loss_scale is not None:
        loss_scale.update(is_finite=bool(np.isfinite(norm)))
    return batch.num_tokens, float(loss)


def measure(spec: dict[str, Any], setting: dict[str, Any], folder: Path, clock: Clock) -> dict[str, Any]:
    started = time.perf_counter()
    model, optimizer, engine = prepare(spec, setting, clock)
    prepared = time.perf_counter() - started
    batches = batches_of(spec)
    loss_scale = LossScale.for_precision(is_float16=dtype_of(spec) is torch.float16)
    result = time_steps(
        lambda index: one_step(model, optimizer, batches[index % len(batches)], loss_scale), clock=clock
    )
    captured = f"{len(engine.graphs.captured)} graphs" if engine.graphs is not None else "eager"
    note = f"{engine.policy.describe()}; {captured}"
    result = {**result, "note": note, "prepare_seconds": round(prepared, 1)}
    if Keep.PARTS in engine.policy.layers:
        result["part_tokens"] = tokens_per_part(spec["rows"] * spec["length"])
    return result


if __name__ == "__main__":
    main(measure)
