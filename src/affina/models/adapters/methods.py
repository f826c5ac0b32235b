"""The adapter methods: one entry each, with what PEFT does right with it. A method that is not listed is refused.

LoRA (Hu et al., arXiv:2106.09685) adds a product of two thin matrices to a frozen weight:

    y = x Wᵀ + s · (x Aᵀ) Bᵀ      A: [R, in], B: [out, R]      s = α / R

rsLoRA (Kalajdzievski, arXiv:2312.03732) scales by s = α / √R, so that raising the rank does not shrink the update.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from affina.errors import ModelError


@dataclass(frozen=True, slots=True)
class AdapterMethod:
    """One method and its capabilities.

    trains_on:          weight formats of the base on which its gradients are right
    merges_exactly:     merging into a dense weight reproduces the adapter up to rounding
    loads_in_servers:   the saved file is plain LoRA, which servers read as it is
    scales_by_root:     s = α / √R instead of α / R
    default_rank, default_alpha: what config presets start from
    """

    name: str
    title: str
    paper: str
    trains_on: frozenset[str]
    merges_exactly: bool
    loads_in_servers: bool
    scales_by_root: bool
    default_rank: int = 16
    default_alpha: float = 32.0

    def scale(self, rank: int, alpha: float) -> float:
        """s, the factor on the update."""
        return alpha / math.sqrt(rank) if self.scales_by_root else alpha / rank

    def num_parameters(self, rank: int, shapes: Iterable[tuple[int, int]]) -> int:
        """Trainable parameters on linear layers of the given (out, in) shapes: Σ R · (out + in)."""
        return sum(rank * (rows + columns) for rows, columns in shapes)


_EVERYWHERE = frozenset({"dense", "nf4", "fp4", "fp8", "int8"})

METHODS: Mapping[str, AdapterMethod] = {
    method.name: method
    for method in (
        AdapterMethod(
            name="lora",
            title="LoRA",
            paper="arXiv:2106.09685",
            trains_on=_EVERYWHERE,
            merges_exactly=True,
            loads_in_servers=True,
            scales_by_root=False,
        ),
        AdapterMethod(
            name="rslora",
            title="rank-stabilised LoRA",
            paper="arXiv:2312.03732",
            trains_on=_EVERYWHERE,
            merges_exactly=True,
            loads_in_servers=True,
            scales_by_root=True,
        ),
    )
}


def method_named(name: str) -> AdapterMethod:
    """The method called `name`. Raises ModelError[adapter-method-unknown] with the nearest name."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    raise ModelError(
        "adapter-method-unknown",
        f'adapter.method "{name}" is not one of {", ".join(METHODS)}',
        fix=f"did you mean {near[0]}?" if near else f"use one of {', '.join(METHODS)}",
    )
