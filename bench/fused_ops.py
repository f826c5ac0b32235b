"""Errors of rms_norm, swiglu and qk_rope on this machine's GPU, and the speed of swiglu over a few tiles.

    PYTHONPATH=src python bench/fused_ops.py [--only NAME ...]

NAME: parity, swiglu, swiglu_ranks (the speed of the others: bench/row_ops.py).
Shapes are those of Qwen3-4B with 16,384 tokens, in bfloat16.
Bytes are those that the operation cannot avoid: each operand and result once. Times are medians with a cold L2 cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from affina.kernels.qk_rope import QkvUpdate, qk_rope, qk_rope_backward
from affina.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from affina.kernels.swiglu import GateUpUpdate, swiglu, swiglu_backward, swiglu_backward_with_ranks

TOKENS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 16384, 2560, 9728, 32, 8, 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16, factor: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * factor).to(dtype)


# Errors
# --------------------------------------------------------------------------------------------------------------


def parity() -> None:
    """Errors against float64, which takes the reference path; results written over operands are the same bits."""
    for dtype in DTYPES:
        for rows, width in ((37, 896), (65, 2560)):
            _rms_norm_errors(rows, width, dtype)
        for rows, width, rank in ((37, 3000, 0), (130, 9728, 16), (65, 1000, 64), (65, 1000, 200)):
            _swiglu_errors(rows, width, rank, dtype)
        for heads, kv_heads, head_dim, rank, has_norm in ((14, 2, 64, 8, False), (32, 8, 128, 16, True)):
            _qk_rope_errors(heads, kv_heads, head_dim, rank, has_norm, dtype)


def compare(name: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
    """Prints the largest error against float64 of each result: of its norm, and of an element."""
    found = function(*arguments, **keywords)
    exact = function(*(double(a) for a in arguments), **{name: double(value) for name, value in keywords.items()})
    errors = []
    for f, e in zip(results(found), results(exact), strict=True):
        difference = (f.double() - e).abs()
        errors.append(f"{difference.norm() / e.norm():.1e} / {(difference / (e.abs() + 1e-2)).max():.1e}")
    print(f"{name:56s} norm / element {', '.join(errors)}", flush=True)


def results(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    if isinstance(value, GateUpUpdate):
        factors = (double(value.t), double(value.b_gate), double(value.b_up))
        return GateUpUpdate(*factors, value.scale_gate, value.scale_up)
    if isinstance(value, QkvUpdate):
        return QkvUpdate(double(value.t), double(value.b_q), double(value.b_k), double(value.b_v), *value.scales)
    return value


def _rms_norm_errors(rows: int, width: int, dtype: torch.dtype) -> None:
    name = f"{dtype} {rows}x{width}"
    x, residual, gradient = (rand(rows, width, dtype=dtype) for _ in range(3))
    weight = rand(width, dtype=dtype)
    rstd = rms_norm(x, weight, 1e-6)[1]
    compare(f"rms_norm {name}", rms_norm, x, weight, 1e-6)
    compare(f"rms_norm_backward {name}", rms_norm_backward, gradient, x, weight, rstd, grad_residual=residual)
    assert torch.equal(add_rms_norm(x, residual, weight, 1e-6)[0], x + residual), "the sum is not x + residual"
    wanted = rms_norm_backward(gradient, x, weight, rstd, grad_residual=residual)
    over = residual.clone()
    assert torch.equal(rms_norm_backward(gradient, x, weight, rstd, grad_residual=over, out=over), wanted)


def _swiglu_errors(rows: int, width: int, rank: int, dtype: torch.dtype) -> None:
    name = f"{dtype} {rows}x{width} rank {rank}"
    gate_up, gradient = rand(rows, 2 * width, dtype=dtype), rand(rows, width, dtype=dtype)
    lora = gate_up_update(rows, width, rank, dtype) if rank else None
    compare(f"swiglu {name}", swiglu, gate_up, lora=lora)
    if lora is not None:
        _rank_errors(name, gradient, gate_up, lora, rank)
        return
    compare(f"swiglu_backward {name}", swiglu_backward, gradient, gate_up)
    wanted, activation = swiglu_backward(gradient, gate_up), swiglu(gate_up)
    over, over_gradient = gate_up.clone(), gradient.clone()
    swiglu_backward(over_gradient, over, out=over, activation_out=over_gradient)
    assert torch.equal(over, wanted), "in place differs"
    assert torch.equal(over_gradient, activation), "in place differs"


def _rank_errors(name: str, gradient: Tensor, gate_up: Tensor, lora: GateUpUpdate, rank: int) -> None:
    """Of the gradients of factors; they are products of rounded numbers, which the float64 reference does not round."""

    def with_ranks(
        gradient: Tensor, gate_up: Tensor, *, lora: GateUpUpdate, u_down: Tensor, over: bool = False
    ) -> tuple[Tensor, ...]:
        outputs = rank_outputs(gradient.shape[1], rank, torch.promote_types(gradient.dtype, torch.float32))
        out = gate_up if over else None
        found = swiglu_backward_with_ranks(gradient.clone(), gate_up, lora=lora, u_down=u_down, **outputs, out=out)
        return found, *outputs.values()

    u_down = rand(gradient.shape[0], rank, dtype=gradient.dtype)
    compare(f"with ranks {name}", with_ranks, gradient, gate_up, lora=lora, u_down=u_down)
    assert lora is not None
    wanted = with_ranks(gradient, gate_up, lora=lora, u_down=u_down)
    found = with_ranks(gradient, gate_up.clone(), lora=lora, u_down=u_down, over=True)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True)), "in place or the second time differs"


def _qk_rope_errors(heads: int, kv_heads: int, head_dim: int, rank: int, has_norm: bool, dtype: torch.dtype) -> None:
    name = f"{dtype} {heads}/{kv_heads} heads of {head_dim} rank {rank}{' normed' if has_norm else ''}"
    arguments, keywords = qkv_case(37, heads, kv_heads, head_dim, rank, has_norm, dtype)
    gradients = [rand(n, 37, head_dim, dtype=dtype).transpose(0, 1) for n in (heads, kv_heads, kv_heads)]
    compare(f"qk_rope {name}", qk_rope, *arguments, **keywords)
    compare(f"qk_rope_backward {name}", qk_rope_backward, *gradients, *arguments, **keywords)
    wanted = qk_rope_backward(*gradients, *arguments, **keywords)
    over = arguments[0].clone()
    assert torch.equal(qk_rope_backward(*gradients, over, *arguments[1:], **keywords, out=over), wanted)


# Speed
# --------------------------------------------------------------------------------------------------------------


def timed(name: str, function: Callable[[], Any], num_bytes: int) -> None:
    """Prints the microseconds of a call, the effective bandwidth and the seconds of the first call (compilation)."""
    from triton.testing import do_bench

    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    milliseconds = do_bench(function, warmup=5, rep=30, return_mode="median")
    print(
        f"{name:72s} {milliseconds * 1e3:8.1f} us {num_bytes / milliseconds / 1e9:6.2f} TB/s  first {first:4.1f} s",
        flush=True,
    )


@contextmanager
def replaced(table: MutableMapping[Any, Any], key: Any, value: Any) -> Iterator[None]:
    before = table[key]
    table[key] = value
    try:
        yield
    finally:
        table[key] = before


def speed_swiglu() -> None:
    """Without updates, forward and backward with the activation written again; with updates, forward."""
    from affina.kernels.triton.swiglu_low_rank import TILES, Tile

    gate_up, gradient = rand(TOKENS, 2 * INTERMEDIATE), rand(TOKENS, INTERMEDIATE)
    out, activation, grad_gate_up = torch.empty_like(gradient), torch.empty_like(gradient), torch.empty_like(gate_up)
    size = 2 * TOKENS * INTERMEDIATE
    timed("copy of gate and up (ceiling)", lambda: grad_gate_up.copy_(gate_up), 4 * size)
    timed("swiglu, no update", lambda: swiglu(gate_up, out=out), 3 * size)
    timed(
        "swiglu_backward, no update",
        lambda: swiglu_backward(gradient, gate_up, out=grad_gate_up, activation_out=activation),
        6 * size,
    )
    tiles = (Tile(32, 64, 4, 3, 8), Tile(32, 64, 4, 4, 6), Tile(32, 128, 4, 3, 4), Tile(64, 64, 4, 3, 3))
    for rank, candidates in ((16, tiles), (64, (TILES["forward", 64],))):
        lora = gate_up_update(TOKENS, INTERMEDIATE, rank)

        def forward(lora: GateUpUpdate = lora) -> None:
            swiglu(gate_up, out=out, lora=lora)

        for tile in candidates:
            with replaced(TILES, ("forward", rank), tile):
                timed(f"swiglu, rank {rank}, {brief(tile)}", forward, 3 * size)


def speed_swiglu_ranks() -> None:
    """The backward pass with the gradients of all factors, checked against separate products."""
    from affina.kernels.triton.swiglu_low_rank import TILES, Tile

    tiles = {
        16: (
            Tile(32, 64, 4, 3, 4, max_registers=128),
            Tile(32, 64, 4, 2, 4, max_registers=128),
            Tile(32, 64, 4, 4, 4, max_registers=128),
            Tile(32, 128, 8, 3, 2, max_registers=128),
            Tile(16, 64, 4, 4, 5),
            Tile(64, 64, 4, 2, 2),
            Tile(64, 64, 4, 3, 3, max_registers=168),
        ),
        64: (
            Tile(32, 64, 4, 3, 2),
            Tile(32, 64, 4, 2, 2),
            Tile(16, 64, 4, 3, 3, max_registers=168),
            Tile(32, 64, 4, 3, 3, max_registers=168),
            Tile(32, 128, 8, 2, 1),
            Tile(64, 64, 8, 2, 1),
        ),
    }
    gate_up, gradient = rand(TOKENS, 2 * INTERMEDIATE), rand(TOKENS, INTERMEDIATE)
    grad_gate_up, activation = torch.empty_like(gate_up), torch.empty_like(gradient)
    num_bytes = 2 * TOKENS * INTERMEDIATE * 5
    for rank in (16, 64):
        lora, u_down = gate_up_update(TOKENS, INTERMEDIATE, rank), rand(TOKENS, rank)
        found, wanted = rank_outputs(INTERMEDIATE, rank), rank_outputs(INTERMEDIATE, rank)

        def separate(lora: GateUpUpdate = lora, u_down: Tensor = u_down, outputs: dict[str, Tensor] = wanted) -> None:
            swiglu_backward(gradient, gate_up, out=grad_gate_up, activation_out=activation, lora=lora)
            t_gate, t_up = lora.t.split(lora.ranks, dim=1)
            grad_gate, grad_up = grad_gate_up.chunk(2, dim=1)
            torch.mm(grad_gate.t(), t_gate, out_dtype=torch.float32, out=outputs["grad_b_gate"]).mul_(lora.scale_gate)
            torch.mm(grad_up.t(), t_up, out_dtype=torch.float32, out=outputs["grad_b_up"]).mul_(lora.scale_up)
            torch.mm(u_down.t(), activation, out_dtype=torch.float32, out=outputs["grad_a_down"])

        def folded(lora: GateUpUpdate = lora, u_down: Tensor = u_down, outputs: dict[str, Tensor] = found) -> None:
            swiglu_backward_with_ranks(gradient, gate_up, lora=lora, u_down=u_down, **outputs, out=grad_gate_up)

        separate()
        for tile in tiles[rank]:
            with replaced(TILES, ("backward", rank), tile):
                timed(f"backward with ranks, rank {rank}, {brief(tile)}", folded, num_bytes)
            errors = [float((found[key] - wanted[key]).norm() / wanted[key].norm()) for key in wanted]
            assert max(errors) < 1e-4, f"the factors' gradients differ from the products by {errors}"


# Operands
# --------------------------------------------------------------------------------------------------------------


def gate_up_update(rows: int, width: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> GateUpUpdate:
    b_gate, b_up = (rand(width, rank, dtype=dtype, factor=rank**-0.5) for _ in range(2))
    return GateUpUpdate(rand(rows, 2 * rank, dtype=dtype), b_gate, b_up, 2.0, 0.7)


def rank_outputs(width: int, rank: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"grad_b_gate": (width, rank), "grad_b_up": (width, rank), "grad_a_down": (rank, width)}
    return {name: torch.empty(shape, dtype=dtype, device="cuda") for name, shape in shapes.items()}


def qkv_case(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rank: int,
    has_norm: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    qkv = rand(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angle = torch.rand(tokens, head_dim // 2, device="cuda") * 6.28
    lora = None
    if rank:
        factors = [rand(n * head_dim, rank, dtype=dtype, factor=rank**-0.5) for n in (heads, kv_heads, kv_heads)]
        lora = QkvUpdate(rand(tokens, 3 * rank, dtype=dtype), *factors, 2.0, 1.3, 0.7)
    q_weight, k_weight = (1 + rand(head_dim, dtype=dtype, factor=0.2) if has_norm else None for _ in range(2))
    keywords = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "q_weight": q_weight,
        "k_weight": k_weight,
        "epsilon": 1e-6,
        "lora": lora,
    }
    return (qkv, angle.cos(), angle.sin()), keywords


def brief(tile: Any) -> str:
    registers = f", {tile.max_registers} registers" if tile.max_registers else ""
    return (
        f"{tile.rows}x{tile.columns}, {tile.num_warps} warps, {tile.num_stages} stages, {tile.programs}/SM{registers}"
    )


SECTIONS: dict[str, Callable[[], None]] = {
    "parity": parity,
    "swiglu": speed_swiglu,
    "swiglu_ranks": speed_swiglu_ranks,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, action="append", metavar="NAME", help="a part; may be repeated")
    chosen = parser.parse_args().only or list(SECTIONS)
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    for name in chosen:
        start = time.perf_counter()
        SECTIONS[name]()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
