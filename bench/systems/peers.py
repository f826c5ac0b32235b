"""What the peers' training steps have in common: tokens, and mixed precision as transformers' Trainer does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from systems.common import DEVICE, LEARNING_RATE, dtype_of, num_token_ids, packed_rows


@dataclass(frozen=True, slots=True)
class PeerBatch:
    """Arguments of a model's call, labels among them. num_tokens: without padding"""

    arguments: dict[str, torch.Tensor]
    num_tokens: int


def batches_of(spec: dict[str, Any], count: int = 4) -> list[PeerBatch]:
    """Random tokens, all but a document's first supervised.

    Packed rows carry positions, from which transformers tells documents apart; the rest of a row is a document without
    labels, so that all rows have one length.
    """
    generator = torch.Generator().manual_seed(1)
    rows, length = spec["rows"], spec["length"]
    if not spec.get("packed"):
        ids = torch.randint(0, num_token_ids(spec), (rows, length), generator=generator).to(DEVICE)
        return [PeerBatch({"input_ids": ids, "labels": ids}, ids.numel())]
    batches = []
    for lengths in packed_rows(rows * length, count):
        num_tokens = sum(lengths)
        padding = rows * length - num_tokens
        parts = [*lengths, padding] if padding else lengths
        ids = torch.randint(0, num_token_ids(spec), (1, rows * length), generator=generator)
        labels = ids.clone()
        labels[0, [0, *accumulate(lengths[:-1])]] = -100
        labels[0, num_tokens:] = -100
        positions = torch.cat([torch.arange(n) for n in parts]).unsqueeze(0)
        arguments = {"input_ids": ids, "labels": labels, "position_ids": positions}
        batches.append(PeerBatch({name: tensor.to(DEVICE) for name, tensor in arguments.items()}, num_tokens))
    return batches


def document_lengths_of(batch: PeerBatch) -> torch.Tensor:
    """[S] int32 lengths of a packed row's documents, padding included, on the CPU."""
    positions = batch.arguments["position_ids"][0].cpu()
    starts = (positions == 0).nonzero().squeeze(1)
    ends = torch.cat([starts[1:], torch.tensor([positions.numel()])])
    return (ends - starts).to(torch.int32)


def trainer_step(model: Any, batches: list[PeerBatch], spec: dict[str, Any]) -> Callable[[int], tuple[int, float]]:
    """Autocast, backward, clip, fused AdamW; a gradient scaler in float16: a step of transformers' Trainer."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    dtype = dtype_of(spec)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype is torch.float16)

    def step(index: int) -> tuple[int, float]:
        batch = batches[index % len(batches)]
        with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = model(**batch.arguments, use_cache=False).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return batch.num_tokens, float(loss.detach())

    return step
