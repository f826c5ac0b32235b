"""EVA: a LoRA whose A starts as the main directions of each layer's inputs on the training data.

Paischer et al., arXiv:2410.07170: the rows of A are the R largest right singular vectors of the layer's inputs X
[tokens, in], B is zero. They are found batch by batch: of what is known, Σ Vᵀ, with the next rows below it, the
singular vectors are those of all rows so far but for what earlier truncations dropped (Ross et al. 2008, without the
mean). Ranks are not shared out by explained variance as in the paper: every layer keeps `rank`, so that the size of the
adapter is what the config says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from affina.models.adapters.attach import ADAPTER_NAME
from affina.models.adapters.factors import lora_layers
from affina.models.forward import Batch, evaluation_mode, hidden_states, isolation_of

_ROWS_PER_BATCH = 1024
_SPARE_DIRECTIONS = 8


class Directions:
    """The main directions of rows that arrive in parts. kept: [≤ K, in] float32, Σ Vᵀ so far"""

    def __init__(self, count: int) -> None:
        self._count = count
        self.kept: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """rows: [N, in]"""
        rows = (rows.float() if self.kept is None else torch.cat([self.kept, rows.float()])).double()
        # From the smaller Gram matrix: of wide layers that of the rows, of narrow ones that of the inputs.
        if len(rows) < rows.shape[1]:
            _, left = torch.linalg.eigh(rows @ rows.t())
            self.kept = (left.flip(1)[:, : self._count].t() @ rows).float()
        else:
            values, right = torch.linalg.eigh(rows.t() @ rows)
            roots = values.clamp(min=0).sqrt().flip(0)[: self._count]
            self.kept = (roots.unsqueeze(1) * right.flip(1)[:, : self._count].t()).float()

    def unit_rows(self, count: int) -> Tensor | None:
        """[count, in] orthonormal, the largest first; None when the rows span fewer directions."""
        if self.kept is None:
            return None
        norms = torch.linalg.vector_norm(self.kept, dim=1)
        if int((norms > 1e-5 * norms.max()).sum()) < count:
            return None
        rows: Tensor = self.kept[:count] / norms[:count].unsqueeze(1)
        return rows


@torch.no_grad()
def start_from_inputs(model: PeftModel, batches: Iterable[Batch]) -> list[str]:
    """Give a fresh LoRA the main directions of its layers' inputs; names the layers whose inputs span too few, which
    stay random."""
    layers = lora_layers(model, ADAPTER_NAME)
    layout = isolation_of(model).layout  # found out by forward passes of its own, which must not be counted
    found = {name: Directions(layer.r[ADAPTER_NAME] + _SPARE_DIRECTIONS) for name, layer in layers}
    for batch in batches:
        hooks = [layer.register_forward_pre_hook(_collector(found[name], batch)) for name, layer in layers]
        try:
            with evaluation_mode(model):
                hidden_states(model, batch, layout=layout)
        finally:
            for hook in hooks:
                hook.remove()
    left_random = []
    for name, layer in layers:
        rows = found[name].unit_rows(layer.r[ADAPTER_NAME])
        if rows is None:
            left_random.append(name)
        else:
            layer.lora_A[ADAPTER_NAME].weight.copy_(rows)
    return left_random


def _collector(directions: Directions, batch: Batch) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def collect(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = _real_rows(inputs[0], batch)
        step = -(-len(rows) // _ROWS_PER_BATCH)
        directions.add(rows[::step])

    return collect


def _real_rows(hidden: Tensor, batch: Batch) -> Tensor:
    """[N, in] of the tokens of samples: [1, T, in] of a packed row, [S, L, in] of rows padded on the right."""
    if hidden.shape[0] == 1:
        return hidden[0]
    lengths = [length for length in batch.lengths if length > 0]
    return torch.cat([row[:length] for row, length in zip(hidden, lengths, strict=True)])
