"""What the 16 indices of a 4-bit format stand for: the tables of NF4 and FP4.

**NF4** (4-bit NormalFloat, Dettmers et al., *QLoRA*, arXiv:2305.14314, §3 and appendix E) takes quantiles of the normal
distribution, so that for normal weights all 16 indices are about equally likely. Index and number ascend together.

**FP4** is a floating-point number: a sign, two bits of exponent and one of mantissa. In bitsandbytes' encoding the
exponent counts *down* (01 is the largest) and the subnormal pair is 0 and 2⁻⁴:

    s 00 m:  ±m · 2⁻⁴        s 01 m: ±(1 + m/2) · 2³        s 10 m: ±(1 + m/2) · 2²        s 11 m: ±(1 + m/2) · 2¹

all divided by the largest, 12. It is not the E2M1 of the Open Compute Project (0, ½, 1, 1½, 2, 3, 4, 6), which spends
its subnormal number on ½ where this one spends it next to zero. Both signs of zero are the number 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CodeTable:
    """A 4-bit format's numbers.

    name:    as in `quantization.format` and in bitsandbytes' `quant_type`
    numbers: [16] the number in [−1, 1] that each index stands for
    order:   [16] the indices from the smallest number to the largest; which of two zeros comes first decides the byte
    """

    name: str
    numbers: tuple[float, ...]
    order: tuple[int, ...] = tuple(range(16))

    @property
    def state_key(self) -> str:
        """The suffix under which bitsandbytes stores a weight's JSON state."""
        return f"quant_state.bitsandbytes__{self.name}"


# fmt: off
NF4: Final = CodeTable(
    "nf4",
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)
"""Written out so that no library's rounding of the normal quantiles can change a byte of a checkpoint."""

FP4: Final = CodeTable(
    "fp4",
    (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
        0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
        -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
    order=(11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
)
# fmt: on

TABLES: Final = {table.name: table for table in (NF4, FP4)}


def normal_float_numbers() -> Tensor:
    """[16] float32: NF4's numbers from the normal distribution's quantiles.

    Eight positive and seven negative quantiles, evenly spaced in probability between ½ and 1 − δ with
    δ = ½ (1/32 + 1/30), and an exact zero, divided by the largest: arXiv:2305.14314, equation 4.
    """
    tail = 1 - 0.5 * (1 / 32 + 1 / 30)
    positive = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    table = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (table / table.max()).float()


def small_float_numbers() -> Tensor:
    """[16] float32: FP4's numbers from its bits, by index (see the module)."""
    index = torch.arange(16)
    exponent, mantissa = (index >> 1) & 3, index & 1
    normal = (1 + mantissa / 2) * 2.0 ** (4 - exponent)
    magnitude = torch.where(exponent == 0, mantissa * 2.0**-4, normal)
    return torch.where(index >= 8, -magnitude, magnitude).float() / 12


@lru_cache(maxsize=16)
def numbers_on(table: CodeTable, device: torch.device) -> Tensor:
    """[16] float32 numbers by index on `device`."""
    return torch.tensor(table.numbers, dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def thresholds_on(table: CodeTable, device: torch.device) -> Tensor:
    """[15] float32, ascending: the middles between neighbouring numbers; on the middle the smaller one is taken."""
    ascending = numbers_on(table, device)[list(table.order)]
    return (ascending[:-1] + ascending[1:]) / 2


@lru_cache(maxsize=16)
def order_on(table: CodeTable, device: torch.device) -> Tensor | None:
    """[16] uint8: the index of the k-th smallest number on `device`; None where they ascend together."""
    if table.order == tuple(range(16)):
        return None
    return torch.tensor(table.order, dtype=torch.uint8, device=device)
