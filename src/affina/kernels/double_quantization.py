"""Double quantisation: the block scales of a 4-bit weight, in 8 bits themselves.

Their mean m is subtracted, groups of 256 of them share one float32 scale t, and each is the nearest entry of a map d of
256 numbers:

    s_i ≈ d[a_i] · t_{i // 256} + m

8 bits for a block of 64 weights instead of 32, and 32 for a group of 64 · 256: 0.127 bits per weight instead of 0.5.
Dettmers et al., *QLoRA*, arXiv:2305.14314, §3; the map: Dettmers et al., *8-bit Optimizers via Block-wise
Quantization*, arXiv:2110.02861, §1.3.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

GROUP_SIZE: Final = 256
_MAP_CELLS = 65535


@lru_cache(maxsize=8)
def dynamic_map(device: torch.device) -> Tensor:
    """[256] float32, ascending: the signed dynamic 8-bit map d.

    Seven decades 10⁻⁶ … 10⁰; decade i is cut into 2^i equal steps between 0.1 and 1 whose midpoints, with both signs,
    are entries; zero and one are added. arXiv:2110.02861, figure 2.
    """
    values: list[float] = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        midpoints = (edges[:-1] + edges[1:]) / 2.0
        scaled = (10 ** (decade - 6)) * midpoints
        values += scaled.tolist() + (-scaled).tolist()
    assert len(values) == 256
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _map_index(device: torch.device) -> Tensor:
    """[65536] uint8: the nearest entry of the dynamic map for each point of an even grid over [-1, 1].

    bitsandbytes rounds a number to this grid before it looks for the nearest entry, so near the middle between two
    entries its choice is not always the nearest. Byte-equal files need the same grid; the error differs by less than
    1e-5.
    """
    table = dynamic_map(torch.device("cpu"))
    grid = torch.arange(_MAP_CELLS + 1, dtype=torch.float32) * (2.0 / _MAP_CELLS) - 1.0
    return torch.bucketize(grid, (table[:-1] + table[1:]) / 2).to(torch.uint8).to(device)


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales [M] float32 → (indices [M] uint8, [M/256] float32 group scales, [] float32 mean)."""
    offset = scales.mean()
    centred = scales - offset
    count = centred.numel()
    groups = pad_to_blocks(centred, GROUP_SIZE)
    group_scales = groups.abs().amax(dim=1)
    # A group of equal scales has the group scale 0 and any index decodes to 0; bitsandbytes stores index 0, as for -1.
    normalised = (groups * (1.0 / group_scales).unsqueeze(1)).nan_to_num(nan=-1.0).clamp_(-1, 1)
    cells = ((normalised + 1.0) * (0.5 * _MAP_CELLS) + 0.5).int()
    indices = _map_index(scales.device)[cells]
    return indices.reshape(-1)[:count].contiguous(), group_scales, offset


def dequantize_scales(indices: Tensor, group_scales: Tensor, offset: Tensor) -> Tensor:
    """The inverse of `quantize_scales`: [M] float32."""
    values = dynamic_map(indices.device).index_select(0, indices.int())
    padded = pad_to_blocks(values, GROUP_SIZE)
    return (padded * group_scales.unsqueeze(1)).reshape(-1)[: indices.numel()] + offset


def pad_to_blocks(flat: Tensor, block_size: int) -> Tensor:
    """[n] → [⌈n / block⌉, block], the tail filled with zeros."""
    missing = -flat.numel() % block_size
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.reshape(-1, block_size)
