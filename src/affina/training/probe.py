"""The longest micro-batch of a run, tried before its first step: memory that would run out in hour three runs out now.

Packed rows are equally long, so that the first step is the probe. Nothing is learned from it: gradients are dropped,
the optimiser is not called, and random numbers are left as they were. Its state, which is allocated in the first step,
is represented by as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from affina.catalog.fused_choice import OPTIMIZER_BYTES
from affina.training.loop import accumulate
from affina.training.objectives import Objective


def probe_longest(
    model: nn.Module,
    batch: Any,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    optimizer_kind: str,
    accumulates: bool,
    make_room: Callable[[], bool],
) -> None:
    """Both passes of `batch`, twice where gradients accumulate.

    make_room: as in `accumulate`: called when memory runs out, says whether a repetition will need less

    Raises torch.OutOfMemoryError when it does not fit in any way.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = batch.input_ids.device
    num_bytes = int(OPTIMIZER_BYTES[optimizer_kind] * sum(parameter.numel() for parameter in parameters))
    devices = [device] if device.type == "cuda" else []
    model.train()
    with torch.random.fork_rng(devices=devices):
        state = torch.empty(num_bytes if not optimizer.state else 0, dtype=torch.uint8, device=device)
        accumulate(
            model,
            [batch, batch] if accumulates else [batch],
            objective,
            step=0,
            loss_scale=1.0,
            begin=lambda: None,
            make_room=make_room,
        )
        del state
    optimizer.zero_grad(set_to_none=True)
