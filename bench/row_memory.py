"""What one long row holds on the device at the leanest save policy, buffer by buffer, in bytes per token.

    python bench/row_memory.py [--model qwen3-8b] [--rank 16]

Written down from models/fast (decoder.py, engine.py, layer.py, offload.py), in the order of a step. Every layer's input
goes to the host (`Keep.OFFLOADED`); every token is supervised. A buffer is listed as long as something refers to it,
needed or not: `unneeded` says which of them nothing reads any more. tests/bench counts the same bytes in a real step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_PITCH = 64
MLP_CHUNK_TOKENS = 4096
LOGIT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Sizes:
    """Widths of a decoder, the rank of every adapter, and the bytes of a number."""

    hidden: int
    intermediate: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    layers: int
    vocabulary: int
    rank: int = 16
    itemsize: int = 2

    @classmethod
    def of(cls, shape: dict[str, Any], *, rank: int = 16, itemsize: int = 2) -> Sizes:
        """From the arguments of a transformers config."""
        head_dim = shape["head_dim"]
        return cls(
            shape["hidden_size"],
            shape["intermediate_size"],
            shape["num_attention_heads"] * head_dim,
            shape["num_key_value_heads"] * head_dim,
            shape["num_attention_heads"],
            head_dim,
            shape["num_hidden_layers"],
            shape["vocab_size"],
            rank,
            itemsize,
        )

    def wide(self, columns: int) -> int:
        """Bytes of a row whose stride is rounded up."""
        return -(-columns // _PITCH) * _PITCH * self.itemsize

    @property
    def adapter_parameters(self) -> int:
        """Of one layer: R · (in + out) of the seven linears."""
        inputs = 5 * self.hidden + self.queries + self.intermediate
        outputs = self.queries + 2 * self.keys + 2 * self.hidden + 2 * self.intermediate
        return self.rank * (inputs + outputs)


@dataclass(frozen=True)
class Buffer:
    """bytes_per_token; unneeded: nothing reads it after this moment, or at it"""

    name: str
    bytes_per_token: int
    unneeded: bool = False


@dataclass(frozen=True)
class Moment:
    """What is held at one point of a step, on top of weights and adapter. constant_bytes: of one chunk of tokens"""

    name: str
    buffers: tuple[Buffer, ...]
    constant_bytes: int = 0

    @property
    def bytes_per_token(self) -> int:
        return sum(buffer.bytes_per_token for buffer in self.buffers)

    @property
    def needed_bytes_per_token(self) -> int:
        return sum(buffer.bytes_per_token for buffer in self.buffers if not buffer.unneeded)


def moments(s: Sizes, *, num_layers: int | None = None, has_streams: bool = True) -> list[Moment]:
    """The moments of a step that may be its busiest.

    num_layers:  that the decoder really has; None: s.layers
    has_streams: inputs of layers travel while the device computes (CUDA), two outwards and one back
    """
    layers = num_layers or s.layers
    b = s.itemsize
    stream = s.hidden * b
    ranks = s.rank * b
    qkv = Buffer("qkv, before the rotation", s.wide(s.queries + 2 * s.keys + 3 * s.rank) + 3 * ranks)
    rotated = Buffer("q, k rotated, v updated", (s.queries + 2 * s.keys) * b)
    attended = Buffer("attention's output, log-sum-exp", s.queries * b + 4 * s.heads)
    row = Buffer("token ids, labels, positions, cos, sin", 3 * 8 + 4 * s.head_dim)
    t_down = Buffer(f"t of the down projection, {layers} layers", layers * ranks)
    leaving = [Buffer("two inputs of layers on their way to the host", 2 * stream)] if has_streams else []
    arriving = [Buffer("the next layer's input, on its way back", stream)] if has_streams else []
    gate_up = s.wide(2 * s.intermediate + 2 * s.rank) + 2 * ranks
    mlp_forward = MLP_CHUNK_TOKENS * (gate_up + s.intermediate * b + stream)
    mlp_backward = MLP_CHUNK_TOKENS * (gate_up + s.intermediate * b + 2 * ranks)
    before = Buffer("x₂ of the layer below", stream, unneeded=True)
    x, x2, h = Buffer("x", stream), Buffer("x₂", stream), Buffer("h₂", stream)
    small = Buffer("t of o, norms' factors", ranks + 8)

    head_tape = [
        Buffer("supervised rows of the last layer", stream + 12, unneeded=True),
        Buffer("gradient of those rows", stream, unneeded=True),
    ]
    grad = s.wide(s.hidden + s.rank)
    first = Buffer("gradient of the last layer's output", grad, unneeded=True)
    grad3, grad2 = Buffer("∂x₃", grad), Buffer("∂x₂", s.wide(s.hidden + s.rank))
    held = [row, t_down, *head_tape, first]
    layer = [x, *arriving, qkv, rotated, attended, small]
    return [
        Moment(
            "forward: second norm",
            (
                row,
                t_down,
                *leaving,
                before,
                x,
                Buffer("h₁", stream, unneeded=True),
                qkv,
                rotated,
                attended,
                x2,
                h,
                small,
            ),
        ),
        Moment(
            "forward: MLP",
            (
                row,
                t_down,
                *leaving,
                before,
                x,
                *(Buffer(one.name, one.bytes_per_token, unneeded=True) for one in (qkv, rotated, attended)),
                x2,
                h,
                Buffer("the MLP's output", stream + 2 * ranks),
                small,
            ),
            mlp_forward,
        ),
        Moment(
            "head",
            (
                row,
                t_down,
                *leaving,
                Buffer("output of the last layer, not yet added", 2 * stream, unneeded=True),
                Buffer("supervised rows, normed rows, their gradient", 3 * stream),
                Buffer("targets, losses, norms' factors", 8 + 8 + 4 + 4),
            ),
            LOGIT_BYTES + LOGIT_BYTES // 4 * b,
        ),
        Moment(
            "gradient of the rows",
            (
                row,
                t_down,
                *leaving,
                *head_tape,
                Buffer("two float32 copies of it", 8 * s.hidden, unneeded=True),
            ),
        ),
        Moment("backward: attention recomputed", (*held, grad3, *layer, x2, Buffer("h₂", stream, unneeded=True))),
        Moment("backward: MLP", (*held, grad3, *layer, x2, grad2), mlp_backward),
        Moment(
            "backward: attention",
            (
                *held,
                Buffer("∂x₃", grad, unneeded=True),
                *layer,
                Buffer("x₂", stream, unneeded=True),
                grad2,
                Buffer("∂o", s.queries * b),
                Buffer("∂q, ∂k, ∂v", (s.queries + 2 * s.keys) * b),
                Buffer("row statistics", 8 * s.heads),
            ),
        ),
        Moment(
            "backward: input of q, k, v",
            (
                *held,
                Buffer("∂x₃", grad, unneeded=True),
                x,
                *arriving,
                qkv,
                Buffer(rotated.name, rotated.bytes_per_token, unneeded=True),
                Buffer(attended.name, attended.bytes_per_token, unneeded=True),
                small,
                Buffer("x₂", stream, unneeded=True),
                grad2,
                Buffer("∂h₁", stream),
                Buffer("∂x", grad),
            ),
        ),
    ]


def peak(s: Sizes, num_tokens: int, **options: Any) -> tuple[int, Moment]:
    """(bytes, moment): the busiest moment of a row of `num_tokens`, without weights and adapter."""
    found = [(m.bytes_per_token * num_tokens + m.constant_bytes, m) for m in moments(s, **options)]
    return max(found, key=lambda pair: pair[0])


def longest(s: Sizes, free_bytes: int, *, multiple: int = 128, **options: Any) -> int:
    """The longest row, a multiple of `multiple`, whose busiest moment fits into `free_bytes`; 0: none."""
    lengths = [(free_bytes - m.constant_bytes) // m.bytes_per_token for m in moments(s, **options)]
    return max(0, min(lengths) // multiple * multiple)


def adapter_bytes(s: Sizes) -> int:
    """Of one layer: float32 values, gradient and two moments, and the 16-bit copy."""
    return s.adapter_parameters * (4 * 4 + s.itemsize)


def nf4_bytes(s: Sizes) -> int:
    """Of one layer's weights with double quantisation: half a byte a number, and 1 + 4 / 256 bytes for 64 of them."""
    numbers = s.hidden * (2 * s.queries + 2 * s.keys + 3 * s.intermediate)
    return numbers // 2 + numbers // 64 + numbers // (64 * 256) * 4


def table(s: Sizes) -> str:
    """All moments and buffers, the busiest first."""
    lines = []
    for moment in sorted(moments(s), key=lambda moment: -moment.bytes_per_token):
        lines.append(
            f"{moment.name}: {moment.bytes_per_token:,} bytes per token, {moment.needed_bytes_per_token:,} of them "
            f"needed; {moment.constant_bytes / 2**20:,.0f} MiB besides"
        )
        lines += [
            f"    {one.bytes_per_token:>8,}  {one.name}{'  (not needed any more)' if one.unneeded else ''}"
            for one in moment.buffers
        ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent))
    from systems.common import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen3-8b")
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args(argv)
    print(table(Sizes.of(SHAPES[arguments.model], rank=arguments.rank)))


if __name__ == "__main__":
    main()
