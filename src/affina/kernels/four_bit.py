"""4-bit formats: quantise, dequantise, and their layout on disk, in plain PyTorch. The format is a table of 16 numbers.

**Maths.** A weight is cut, row after row, into blocks of 64 numbers. Block i keeps one scale s_i and for each number w
the index of the nearest entry of a fixed table q of 16 numbers in [−1, 1] (`code_tables`: NF4, FP4):

    s_i = max |w|        k = argmin_j |w / s_i − q_j|        ŵ = q_k · s_i

With *double quantisation* the scales are stored in 8 bits themselves (`double_quantization`). That is
4 + 8/64 + 32/(64·256) = 4.127 bits per weight, against 4.5 without. Dettmers et al., *QLoRA*, arXiv:2305.14314, §3.

**Layout.** Two indices share a byte, the first in the high nibble. Codes, scales, tables and the JSON state are those
of bitsandbytes 0.50, byte for byte, so that either reads what the other wrote (`FourBitTensor.to_state`).

**Scale search** (ours, same format). s = max|w| is not the scale of least squared error. With `scale_search` each
block tries a grid of factors below and above it, refines the best by least squares s = ⟨w, q_k⟩ / ⟨q_k, q_k⟩, and the
indices are chosen again for the scale as it is stored. On normal weights the error of NF4 falls from 0.0920 σ to
0.0852 σ, that of FP4 from 0.1220 σ to 0.1127 σ.

**Speed.** On a CPU dequantising looks up *two bytes at once* in a table of 65,536 × 4 numbers (1 MiB, fits a core's
cache): one gather moves 16 bytes for 4 weights; 6.6 million weights take 4.2 ms on 2 cores, bitsandbytes' C++ 5.3 ms in
bfloat16 and 8.0 ms in float32. On a GPU one byte at once is faster (0.37 ms against 4.0 ms for 25 million weights on an
H100). With Triton one kernel decodes scales and codes and writes the weight, reading half a byte and writing one number
for each weight (`affina.kernels.triton.four_bit`), where PyTorch's operations move 8 bytes of indices and float32
products besides. Products are float32, rounded once to the wanted type, as bitsandbytes does; a scale is rounded after
its product and again after its sum, never fused: all paths agree bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from affina.errors import ModelError
from affina.kernels.code_tables import TABLES, CodeTable, numbers_on, order_on, thresholds_on
from affina.kernels.dispatch import use_triton
from affina.kernels.double_quantization import (
    GROUP_SIZE,
    dequantize_scales,
    dynamic_map,
    pad_to_blocks,
    quantize_scales,
)

BLOCK_SIZE: Final = 64
TENSOR_SUFFIXES: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
"""Of a weight's tensors in a checkpoint, besides the packed weight itself and the table's `state_key`."""

_SMALLEST_SCALE = 1e-38
_BLOCKS_PER_CHUNK_CPU = 8192
_BLOCKS_PER_CHUNK_ACCELERATOR = 1 << 18
_SEARCH_FACTORS = tuple(0.74 + 0.02 * i for i in range(18))


@dataclass(frozen=True, slots=True)
class FourBitTensor:
    """A quantised weight.

    table:         the 16 numbers that indices stand for
    codes:         [⌈n/2⌉, 1] uint8, two indices a byte, the first one in the high nibble
    absmax:        [n/64] uint8 with double quantisation, float32 scales without
    nested_absmax: [n/64/256] float32, or None without double quantisation
    nested_offset: [] float32, the mean of the scales, or None
    shape, dtype:  of the weight that was quantised; dtype is also the default of `dequantize`
    """

    table: CodeTable
    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = BLOCK_SIZE

    @property
    def is_double_quantized(self) -> bool:
        return self.nested_absmax is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales (the two small tables are shared by all layers)."""
        nested = 0 if self.nested_absmax is None else self.nested_absmax.nbytes + 4
        return self.codes.nbytes + self.absmax.nbytes + nested

    def to(self, device: torch.device) -> FourBitTensor:
        """The same weight on `device`."""
        return replace(
            self,
            codes=self.codes.to(device),
            absmax=self.absmax.to(device),
            nested_absmax=self.nested_absmax.to(device) if self.nested_absmax is not None else None,
            nested_offset=self.nested_offset.to(device) if self.nested_offset is not None else None,
        )

    def scales(self) -> Tensor:
        """[n/64] float32 scales s."""
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax
        return dequantize_scales(self.absmax, self.nested_absmax, self.nested_offset)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in its shape, in `dtype` (default: the type it had)."""
        weight = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.codes.device)
        dequantize_into(self, weight.view(-1, weight.shape[-1]) if weight.dim() > 0 else weight.view(1, 1))
        return weight

    def to_state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by suffix of the weight's name; "" is the packed weight itself."""
        fields: dict[str, object] = {
            "quant_type": self.table.name,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        numbers = numbers_on(self.table, self.codes.device).clone()
        state = {"": self.codes, "absmax": self.absmax, "quant_map": numbers}
        if self.nested_absmax is not None and self.nested_offset is not None:
            fields |= {
                "nested_blocksize": GROUP_SIZE,
                "nested_dtype": "float32",
                "nested_offset": self.nested_offset.item(),
            }
            state["nested_absmax"] = self.nested_absmax
            state["nested_quant_map"] = dynamic_map(self.codes.device).clone()
        encoded = json.dumps(fields).encode()
        state[self.table.state_key] = torch.tensor(list(encoded), dtype=torch.uint8)
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], name: str = "weight") -> FourBitTensor:
        """The inverse of `to_state`; `name` is for messages.

        Raises ModelError[quantized-weights-unreadable] for anything but NF4 and FP4 as bitsandbytes stores them.
        """
        table = next((table for table in TABLES.values() if table.state_key in state), None)
        if table is None:
            keys = " or ".join(f'"{table.state_key}"' for table in TABLES.values())
            raise ModelError(
                "quantized-weights-unreadable",
                f"{name} is stored in 4 bits but has no {keys}",
                why="without it neither the format nor the shape is known",
                fix="use a checkpoint saved by bitsandbytes 0.43 or later",
            )
        _check_tables(state, table, name)
        nested = "nested_absmax" in state
        try:
            fields = json.loads(bytes(state[table.state_key].tolist()).decode())
            dtype = getattr(torch, fields["dtype"])
            if nested and fields["nested_blocksize"] != GROUP_SIZE:
                raise ModelError(
                    "quantized-weights-unreadable",
                    f"{name} groups its scales by {fields['nested_blocksize']}; affina reads groups of {GROUP_SIZE}",
                    fix=f"quantise the original checkpoint again: quantization.format {table.name}",
                )
            tensor = cls(
                table=table,
                codes=state[""].reshape(-1).view(torch.uint8).unsqueeze(1),
                absmax=state["absmax"],
                nested_absmax=state["nested_absmax"] if nested else None,
                nested_offset=torch.tensor(float(fields["nested_offset"])).to(state[""].device) if nested else None,
                shape=tuple(int(size) for size in fields["shape"]),
                dtype=dtype,
                block_size=int(fields["blocksize"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                "quantized-weights-unreadable",
                f"the state of {name} cannot be read: {type(error).__name__} {error}",
                why="the checkpoint is damaged or was edited",
                fix="download it again",
            ) from error
        _check_sizes(tensor, name)
        return tensor


def _check_tables(state: Mapping[str, Tensor], table: CodeTable, name: str) -> None:
    """Refuses tables other than the format's: the fast lookup has them built in."""
    cpu = torch.device("cpu")
    for suffix, expected in (("quant_map", numbers_on(table, cpu)), ("nested_quant_map", dynamic_map(cpu))):
        stored = state.get(suffix)
        if stored is None:
            continue
        # The extreme entry of the dynamic map is -0.9929 or -1.0, depending on what wrote the file.
        if stored.shape != expected.shape or not torch.allclose(stored.float().cpu(), expected, atol=8e-3, rtol=0):
            raise ModelError(
                "quantized-weights-unreadable",
                f"{name} uses its own {suffix}, not the one of {table.name.upper()}",
                fix=f"quantise the original checkpoint again: quantization.format {table.name}",
            )


def _check_sizes(tensor: FourBitTensor, name: str) -> None:
    count = 1
    for size in tensor.shape:
        count *= size
    blocks = -(-count // tensor.block_size)
    wanted = {"codes": -(-count // 2), "absmax": blocks}
    found = {"codes": tensor.codes.numel(), "absmax": tensor.absmax.numel()}
    if tensor.nested_absmax is not None:
        wanted["nested_absmax"] = -(-blocks // GROUP_SIZE)
        found["nested_absmax"] = tensor.nested_absmax.numel()
    if wanted != found:
        raise ModelError(
            "quantized-weights-unreadable",
            f"{name} of shape {list(tensor.shape)} needs {wanted} entries, the file has {found}",
            why="the checkpoint is damaged or was edited",
            fix="download it again",
        )


# Quantise
# --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantize(
    weight: Tensor,
    table: CodeTable,
    *,
    double_quantization: bool = True,
    scale_search: bool = False,
    block_size: int = BLOCK_SIZE,
) -> FourBitTensor:
    """`weight` (bf16, fp16 or fp32, any shape and device) in the format of `table`.

    Without `scale_search` the result equals bitsandbytes' on the CPU byte for byte.
    Raises ModelError when the weight holds NaN or infinity, which no scale can represent.
    """
    assert weight.dtype in (torch.bfloat16, torch.float16, torch.float32), f"cannot quantise {weight.dtype}"
    flat = weight.detach().reshape(-1)
    scales = _block_maxima(flat, block_size)
    if not bool(torch.isfinite(scales).all()):
        raise ModelError(
            "weights-not-finite",
            f"a weight of shape {list(weight.shape)} holds NaN or infinity",
            why="a block of weights with such a number cannot be scaled",
            fix="the checkpoint is damaged: download or export it again",
        )
    if scale_search:
        scales = _search_scales(flat, scales, table, block_size)
    absmax, nested_absmax, offset = scales, None, None
    if double_quantization:
        absmax, nested_absmax, offset = quantize_scales(scales)
    if scale_search and nested_absmax is not None and offset is not None:
        scales = dequantize_scales(absmax, nested_absmax, offset)
    codes = _encode(flat, scales, table, block_size)
    return FourBitTensor(table, codes, absmax, nested_absmax, offset, tuple(weight.shape), weight.dtype, block_size)


def _block_maxima(flat: Tensor, block_size: int) -> Tensor:
    """[M] float32: max |w| of each block."""
    remainder = flat.numel() % block_size
    maxima = pad_to_blocks(flat, block_size).abs().amax(dim=1).float()
    if remainder:
        maxima[-1:].clamp_(min=_SMALLEST_SCALE)
    return maxima


def _encode(flat: Tensor, scales: Tensor, table: CodeTable, block_size: int) -> Tensor:
    """[⌈n/2⌉, 1] uint8: the nearest table entry of every number under its block's scale, two to a byte."""
    count = flat.numel()
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=flat.device)
    num_full = count // block_size
    bytes_per_block = block_size // 2
    step = _blocks_per_chunk(flat.device)
    for start in range(0, num_full, step):
        stop = min(start + step, num_full)
        block = flat[start * block_size : stop * block_size].float().view(-1, block_size)
        inverse = 1.0 / scales[start:stop].clamp(min=_SMALLEST_SCALE).unsqueeze(1)
        normalised = (block * inverse).clamp_(-1, 1)
        packed[start * bytes_per_block : stop * bytes_per_block] = _pack(normalised.view(-1), table)
    if count % block_size:
        # The last, short block is divided instead of multiplied by the inverse; bytes depend on it.
        tail = (flat[num_full * block_size :].float() / scales[-1]).clamp_(-1, 1)
        packed[num_full * bytes_per_block :] = _pack(tail, table)
    return packed.unsqueeze(1)


def _pack(normalised: Tensor, table: CodeTable) -> Tensor:
    if normalised.numel() % 2:
        normalised = torch.nn.functional.pad(normalised, (0, 1))
    ranks = torch.bucketize(normalised, thresholds_on(table, normalised.device), out_int32=True)
    order = order_on(table, normalised.device)
    indices = (ranks.to(torch.uint8) if order is None else order.index_select(0, ranks)).view(-1, 2)
    return (indices[:, 0] << 4) | indices[:, 1]


def _search_scales(flat: Tensor, maxima: Tensor, table: CodeTable, block_size: int) -> Tensor:
    """[M] float32: for each block the scale of least squared error that the grid and one refinement find."""
    blocks = pad_to_blocks(flat, block_size)
    thresholds = thresholds_on(table, flat.device)
    numbers = numbers_on(table, flat.device)[list(table.order)]
    result = torch.empty_like(maxima)
    step = max(1, _blocks_per_chunk(flat.device) // 4)
    for start in range(0, blocks.shape[0], step):
        part = slice(start, start + step)
        block = blocks[part].float()
        maximum = maxima[part].clamp(min=_SMALLEST_SCALE)
        best_scale, best_error = maximum, _squared_error(block, maximum, numbers, thresholds)
        for factor in _SEARCH_FACTORS:
            best_scale, best_error = _keep_better(block, maximum * factor, best_scale, best_error, numbers, thresholds)
        for _ in range(2):
            values = numbers[torch.bucketize(block / best_scale.unsqueeze(1), thresholds)]
            fitted = (block * values).sum(1) / values.square().sum(1).clamp(min=_SMALLEST_SCALE)
            fitted = torch.where(fitted > 0, fitted, best_scale)
            best_scale, best_error = _keep_better(block, fitted, best_scale, best_error, numbers, thresholds)
        result[part] = torch.where(maxima[part] > 0, best_scale, maxima[part])
    return result


def _squared_error(block: Tensor, scale: Tensor, numbers: Tensor, thresholds: Tensor) -> Tensor:
    values = numbers[torch.bucketize(block / scale.unsqueeze(1), thresholds, out_int32=True)]
    return (values * scale.unsqueeze(1) - block).square_().sum(1)


def _keep_better(
    block: Tensor, candidate: Tensor, scale: Tensor, error: Tensor, numbers: Tensor, thresholds: Tensor
) -> tuple[Tensor, Tensor]:
    candidate_error = _squared_error(block, candidate, numbers, thresholds)
    better = candidate_error < error
    return torch.where(better, candidate, scale), torch.where(better, candidate_error, error)


# Dequantise
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def dequantize_into(quantized: FourBitTensor, out: Tensor) -> Tensor:
    """Writes the weight to `out` and returns it.

    quantized: of rows · columns numbers, with or without double quantisation
    out:       [rows, columns] bf16, fp16 or fp32 on the same device; a row is contiguous, its stride may exceed columns

    All paths give the same bits: the float32 product of table entry and scale, rounded once.
    """
    rows, columns = out.shape
    assert rows * columns == math.prod(quantized.shape), f"{tuple(quantized.shape)} does not fill {tuple(out.shape)}"
    assert columns <= 1 or out.stride(1) == 1, "the numbers of a row must lie side by side"
    has_whole_blocks = columns % quantized.block_size == 0
    if not (has_whole_blocks or out.is_contiguous()):
        # A block would lie in two rows that are apart; no model has such a width, so the copy costs nothing real.
        return out.copy_(dequantize_into(quantized, torch.empty_like(out, memory_format=torch.contiguous_format)))
    if use_triton(out):
        _dequantize_with_triton(quantized, out)
    elif out.is_contiguous():
        scales = quantized.scales()
        dequantize(
            quantized.codes,
            scales,
            quantized.table,
            quantized.shape,
            out.dtype,
            block_size=quantized.block_size,
            out=out,
        )
    else:
        _dequantize_rows(quantized, out)
    return out


def _dequantize_with_triton(quantized: FourBitTensor, out: Tensor) -> None:
    from affina.kernels.triton import four_bit as kernel

    kernel.dequantize_into(
        quantized.codes,
        quantized.absmax,
        quantized.nested_absmax,
        quantized.nested_offset,
        dynamic_map(out.device),
        numbers_on(quantized.table, out.device),
        out,
        block_size=quantized.block_size,
    )


def _dequantize_rows(quantized: FourBitTensor, out: Tensor) -> None:
    """The reference for rows that are apart and hold whole blocks."""
    rows, columns = out.shape
    block_size = quantized.block_size
    blocks_per_row = columns // block_size
    scales = quantized.scales().view(rows, blocks_per_row, 1)
    codes = quantized.codes.view(rows * blocks_per_row, block_size // 2)
    step = max(1, _blocks_per_chunk(out.device) // blocks_per_row)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        values = _look_up(codes[part.start * blocks_per_row : part.stop * blocks_per_row], quantized.table)
        torch.mul(
            values.view(-1, blocks_per_row, block_size),
            scales[part],
            out=out[part].view(-1, blocks_per_row, block_size),
        )


def dequantize(
    codes: Tensor,
    scales: Tensor,
    table: CodeTable,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    block_size: int = BLOCK_SIZE,
    out: Tensor | None = None,
) -> Tensor:
    """codes [⌈n/2⌉, 1] uint8 and scales [n/64] float32 → the weight in `shape` and `dtype`, written to `out` if
    given."""
    weight = out if out is not None else torch.empty(shape, dtype=dtype, device=codes.device)
    flat = weight.view(-1)
    packed = codes.reshape(-1)
    num_full = flat.numel() // block_size
    full_bytes = num_full * block_size // 2
    full_codes = packed[:full_bytes].view(num_full, block_size // 2)
    blocks = flat[: num_full * block_size].view(num_full, block_size)
    step = _blocks_per_chunk(codes.device)
    for start in range(0, num_full, step):
        part = slice(start, min(start + step, num_full))
        values = _look_up(full_codes[part], table).view(-1, block_size)
        torch.mul(values, scales[part].unsqueeze(1), out=blocks[part])
    if flat.numel() % block_size:
        tail = packed[full_bytes:]
        indices = torch.stack([tail >> 4, tail & 0xF], dim=1).view(-1)[: flat.numel() - num_full * block_size]
        flat[num_full * block_size :] = numbers_on(table, codes.device)[indices.int()] * scales[-1]
    return weight


def _look_up(codes: Tensor, table: CodeTable) -> Tensor:
    """[M, 32] uint8 → float32 numbers, two for each byte, in order."""
    if codes.device.type != "cpu":
        return _numbers_of_bytes(table, codes.device)[codes.reshape(-1).int()]
    index = codes.view(torch.int16).reshape(-1).int().bitwise_and_(0xFFFF)
    return _numbers_of_byte_pairs(table, codes.device).index_select(0, index)


@lru_cache(maxsize=8)
def _numbers_of_bytes(table: CodeTable, device: torch.device) -> Tensor:
    """[256, 2] float32: the two numbers that a packed byte stands for."""
    byte = torch.arange(256, device=device)
    return numbers_on(table, device)[torch.stack([byte >> 4, byte & 0xF], dim=1)].contiguous()


@lru_cache(maxsize=8)
def _numbers_of_byte_pairs(table: CodeTable, device: torch.device) -> Tensor:
    """[65536, 4] float32: the four numbers that two packed bytes, read as one little-endian integer, stand for."""
    pair = torch.arange(1 << 16, device=device)
    return _numbers_of_bytes(table, device)[torch.stack([pair & 0xFF, pair >> 8], dim=1)].view(-1, 4).contiguous()


def _blocks_per_chunk(device: torch.device) -> int:
    """Blocks that are processed at once: what fits a CPU's cache, or a bounded workspace on a GPU."""
    return _BLOCKS_PER_CHUNK_CPU if device.type == "cpu" else _BLOCKS_PER_CHUNK_ACCELERATOR
