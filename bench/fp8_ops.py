"""What quantising to e4m3 costs on this GPU, by a pass of its own and inside the norm; checked, then timed.

    PYTHONPATH=src python bench/fp8_ops.py [--rows 16384] [--rank 16]

Shapes are the operands of Qwen3-4B's 8-bit products. Codes and scales must be the bits of the PyTorch reference. Each
operand is timed with several numbers a thread (`ELEMENTS`) and, as `one piece`, held in the next power of two, in 32
bits, on one warp for 512 numbers. TB/s are those of the bytes that the operation must move, to be read beside the first
line, a copy. Takes less than a minute.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from row_ops import DEVICE, microseconds, random

from affina.kernels import fp8
from affina.kernels.fp8 import QuantizedRows, quantize_rows, transpose_codes
from affina.kernels.rms_norm import RowUpdate, add_rms_norm
from affina.kernels.triton import fp8 as kernels

HIDDEN, INTERMEDIATE, QUERIES, KEYS, LAYERS = 2560, 9728, 4096, 1024, 36
ELEMENTS = (16, 24, 40, 80)


@dataclass(frozen=True)
class Rows:
    """An operand: x [M, K], u [M, R] beside it or None, and factors [K + R] of the columns or None."""

    name: str
    x: Tensor
    u: Tensor | None
    factor: Tensor | None

    @property
    def columns(self) -> int:
        return self.x.shape[1] + (0 if self.u is None else self.u.shape[1])


def split(factor: Tensor | None, columns: int) -> dict[str, Tensor | None]:
    if factor is None:
        return {}
    return {"column_factor": factor[:columns], "beside_factor": factor[columns:]}


def operands(num_rows: int, rank: int) -> Iterator[Rows]:
    """In the order in which a layer quantises them."""
    for name, columns in (("h of q, k, v; of gate, up", HIDDEN), ("o", QUERIES), ("activation", INTERMEDIATE)):
        yield Rows(name, random(num_rows, columns), None, None)
    gradients = (
        ("stream, for down; for o", HIDDEN, rank),
        ("gradient of gate, up", 2 * INTERMEDIATE, 2 * rank),
        ("gradient of q, k, v", QUERIES + 2 * KEYS, 3 * rank),
    )
    for name, columns, beside in gradients:
        factor = torch.rand(columns + beside, device=DEVICE) * 1e-3 + 1e-5
        padded = -(-columns // 64) * 64
        yield Rows(name, random(num_rows, padded)[:, :columns], random(num_rows, beside), factor)


@contextmanager
def one_piece() -> Iterator[None]:
    """Rows held in the next power of two of their length, in 32 bits a number."""
    pieces, warps, packs, unit = kernels.held_pieces, kernels.num_warps, kernels.packs, kernels.CODES_UNIT
    kernels.CODES_UNIT = 16
    kernels.packs = lambda x: False
    kernels.held_pieces = lambda columns: (min(32768, max(128, 1 << (columns - 1).bit_length())), 0)
    kernels.num_warps = lambda held: min(16, max(1, held // 512))
    try:
        yield
    finally:
        kernels.held_pieces, kernels.num_warps, kernels.packs = pieces, warps, packs
        kernels.CODES_UNIT = unit


@contextmanager
def held(
    count: int, *, packs: bool = True, at_once: int = kernels.MAX_HELD, unit: int = kernels.CODES_UNIT
) -> Iterator[None]:
    """So many numbers of a row to a thread, in 16 bits or 32, so many of a row at once, and codes written by `unit`."""
    before = kernels.ELEMENTS, kernels.packs, kernels.MAX_HELD, kernels.CODES_UNIT
    kernels.ELEMENTS, kernels.MAX_HELD, kernels.CODES_UNIT = count, at_once, unit
    if not packs:
        kernels.packs = lambda x: False
    try:
        yield
    finally:
        kernels.ELEMENTS, kernels.packs, kernels.MAX_HELD, kernels.CODES_UNIT = before


def check(found: QuantizedRows, numbers: Tensor, factor: Tensor | None, name: str) -> None:
    """Equal bits of the reference, on some rows: it needs float32 copies."""
    part = slice(None, 512)
    codes, scale = QuantizedRows.empty(numbers[part].shape[0], numbers.shape[1], numbers.device)
    fp8._quantize_rows(numbers[part], factor, codes, scale)
    assert torch.equal(found.codes[part].view(torch.uint8), codes.view(torch.uint8)), f"codes of {name} differ"
    assert torch.equal(found.scale[part], scale), f"scales of {name} differ"


def show(name: str, call: Callable[[], Any], num_bytes: int, *, per_layer: int = 1) -> None:
    duration = microseconds(call)
    step = f"{duration * LAYERS * per_layer / 1e3:6.2f} ms in 36 layers" if per_layer else ""
    print(f"  {duration:8.1f} us  {num_bytes / duration / 1e6:5.2f} TB/s  {step}  {name}", flush=True)


def time_copying(num_rows: int) -> None:
    """The ceiling."""
    x = random(num_rows, INTERMEDIATE)
    target = torch.empty_like(x)
    print(f"copy: [{num_rows}, {INTERMEDIATE}]")
    show("bfloat16", lambda: target.copy_(x), 4 * x.numel(), per_layer=0)


def time_quantising(rows: Rows) -> None:
    """One operand, every way."""
    factors = split(rows.factor, rows.x.shape[1])
    memory = QuantizedRows.empty(rows.x.shape[0], rows.columns, rows.x.device)

    def quantize() -> QuantizedRows:
        return quantize_rows(rows.x, beside=rows.u, out=memory.codes, scale_out=memory.scale, **factors)

    whole = rows.x if rows.u is None else torch.cat([rows.x, rows.u], dim=1)
    per_layer = rows.name.count(";") + 1
    print(f"{rows.name}: [{rows.x.shape[0]}, {rows.columns}]")
    ways = [("one piece", one_piece())]
    ways += [(f"{count} a thread{' (in use)' * (count == kernels.ELEMENTS)}", held(count)) for count in ELEMENTS]
    ways += [(f"{count} a thread, in 32 bits", held(count, packs=False)) for count in ELEMENTS[-2:]]
    ways += [(f"{count} a thread, codes by 16", held(count, unit=16)) for count in ELEMENTS[-2:]]
    ways += [("read twice, 4,096 at once", held(8, at_once=4096))]
    for name, way in ways:
        with way:
            memory.codes.view(torch.uint8).fill_(0x7F)
            check(quantize(), whole, rows.factor, rows.name)
            show(name, quantize, 3 * whole.numel(), per_layer=per_layer)


def time_norm(num_rows: int, rank: int) -> None:
    """The norm and codes of its output, by one kernel and by two."""
    x, update, weight = random(num_rows, HIDDEN), random(num_rows, HIDDEN), random(HIDDEN)
    total, y = torch.empty_like(x), torch.empty_like(x)
    lora = RowUpdate(random(num_rows, rank), random(HIDDEN, rank, factor=0.1), 2.0)
    codes = QuantizedRows.empty(num_rows, HIDDEN, x.device)

    def apart() -> None:
        add_rms_norm(x, update, weight, 1e-6, sum_out=total, out=y, lora=lora)
        quantize_rows(y, out=codes.codes, scale_out=codes.scale)

    def together() -> None:
        add_rms_norm(x, update, weight, 1e-6, sum_out=total, out=y, lora=lora, codes_out=codes)

    print(f"sum, norm and its codes: [{num_rows}, {HIDDEN}]")
    together()
    check(codes, y, None, "the norm")
    one = x.numel()
    for name, call in (("two passes", apart), ("in the norm (in use)", together)):
        show(name, call, 11 * one, per_layer=2)


def time_transposing() -> None:
    """The weights' codes and those of the adapter's A below them, transposed for the input gradient."""
    print("transposing codes of a layer's weights")
    for rows, columns in (
        (QUERIES + 2 * KEYS, HIDDEN),
        (HIDDEN, QUERIES),
        (2 * INTERMEDIATE, HIDDEN),
        (HIDDEN, INTERMEDIATE),
    ):
        codes, a = quantize_rows(random(rows, columns)).codes, quantize_rows(random(16, columns)).codes
        out = torch.empty(columns, rows + 16, dtype=fp8.E4M3, device=DEVICE)

        def transpose(codes: Tensor = codes, a: Tensor = a, out: Tensor = out) -> Tensor:
            return transpose_codes(codes, below=a, out=out)

        stacked = torch.cat([codes.view(torch.uint8), a.view(torch.uint8)])
        assert torch.equal(transpose().view(torch.uint8), stacked.t()), "bytes are lost"
        show(f"[{rows}, {columns}]", transpose, 2 * stacked.numel())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384, help="tokens (default 16384)")
    parser.add_argument("--rank", type=int, default=16, help="of each adapter (default 16)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    time_copying(arguments.rows)
    for rows in operands(arguments.rows, arguments.rank):
        time_quantising(rows)
    time_norm(arguments.rows, arguments.rank)
    time_transposing()


if __name__ == "__main__":
    main()
