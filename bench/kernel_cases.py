"""Every Triton kernel once or a few times at awkward sizes, compared with the reference in float64 on the CPU.

    python bench/kernel_cases.py [--only attention] [--output FILE] [--tiny] [--list]

Odd numbers of rows, rows that lie apart, heads of 64 to 256, ranks of 1 to 64, all types, documents of one token,
ignored rows. It is what bench/sanitize.py runs under compute-sanitizer: on the GPU nothing happens but copies and the
kernels. `--tiny` takes the smallest sizes. Without a GPU the kernels run where Triton interprets them
(TRITON_INTERPRET=1 and AFFINA_TRITON_ON_CPU=1); else the references are compared with themselves in float64.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import records  # noqa: E402

from affina.kernels import (  # noqa: E402
    adamw,
    code_tables,
    four_bit,
    fp8,
    int8,
    linear_cross_entropy,
    qk_rope,
    rms_norm,
    row_scaled,
    swiglu,
)
from affina.kernels import attention as attention_module  # noqa: E402
from affina.kernels.attention import Segments, attention, attention_backward  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
"""Of the relative norm of an error: a handful of roundings of 2^-24, 2^-9 and 2^-12 each, one after the other."""
EPSILON = 1e-6
_MODULES = (adamw, attention_module, four_bit, fp8, linear_cross_entropy, qk_rope, rms_norm, row_scaled, swiglu)

Place = Callable[[Tensor], Tensor]
"""Takes a tensor of the CPU to where, and in which type, an operation is computed."""


@dataclass(frozen=True)
class Case:
    """compute: the operation on inputs that go through its argument first; its results by name.

    kernels:   names of the Triton kernels that it launches
    tolerance: of each result's relative error; 0: equal bits
    is_wide:   the reference is computed in float64; else in the inputs' types
    """

    name: str
    kernels: tuple[str, ...]
    compute: Callable[[Place], dict[str, Tensor]]
    tolerance: float
    is_wide: bool = True


# Inputs
# --------------------------------------------------------------------------------------------------------------


def random(*shape: int, dtype: torch.dtype = torch.float32, factor: float = 1.0, slack: int = 0) -> Tensor:
    """Normal numbers; slack: columns between one row and the next that belong to nobody."""
    wide = torch.randn(*shape[:-1], shape[-1] + slack) * factor
    return wide.to(dtype)[..., : shape[-1]]


def on_device(tensor: Tensor) -> Tensor:
    """A copy on the device with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


def in_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor.clone()


@contextmanager
def references() -> Iterator[None]:
    """Inside, CPU tensors take the references also where Triton's interpreter would run its kernels."""
    before = [module.use_triton for module in _MODULES]
    for module in _MODULES:
        module.use_triton = lambda tensor: tensor.device.type == "cuda"
    try:
        yield
    finally:
        for module, function in zip(_MODULES, before, strict=True):
            module.use_triton = function


# Cases
# --------------------------------------------------------------------------------------------------------------


def norm_cases(is_tiny: bool) -> Iterator[Case]:
    sizes = [(5, 64, 3)] if is_tiny else [(1, 64, 1), (37, 896, 16), (65, 2560, 64), (5, 4100, 16), (3, 16384, 1)]
    for rows, width, rank in sizes:
        for dtype in FLOATS:
            x, update, gradient = (random(rows, width, dtype=dtype, slack=8) for _ in range(3))
            weight = random(width, dtype=dtype)
            t, b = random(rows, rank, dtype=dtype, slack=5), random(width, rank, dtype=dtype, factor=rank**-0.5)

            def compute(on: Place, x=x, update=update, gradient=gradient, weight=weight, t=t, b=b) -> dict[str, Tensor]:
                lora = rms_norm.RowUpdate(on(t), on(b), 0.7)
                y, rstd = rms_norm.rms_norm(on(x), on(weight), EPSILON)
                total, normed, total_rstd = rms_norm.add_rms_norm(on(x), on(update), on(weight), EPSILON, lora=lora)
                plain, _, _ = rms_norm.add_rms_norm(on(x), on(update), on(weight), EPSILON)
                residual = on(update)
                grad = rms_norm.rms_norm_backward(
                    on(gradient), on(x), on(weight), rstd, grad_residual=residual, out=residual
                )
                bare = rms_norm.rms_norm_backward(on(gradient), on(x), on(weight), rstd)
                rows = rms_norm.add_rows(on(x), on(update), lora=lora)
                return {
                    "y": y,
                    "rstd": rstd,
                    "sum": total,
                    "normed sum": normed,
                    "rstd of the sum": total_rstd,
                    "plain sum": plain,
                    "gradient": grad,
                    "gradient without residual": bare,
                    "rows": rows,
                }

            yield Case(
                f"rms_norm {rows}×{width} rank {rank} {name_of(dtype)}",
                ("rms_norm._forward_kernel", "rms_norm._backward_kernel", "rms_norm._add_kernel"),
                compute,
                TOLERANCE[dtype],
            )


def swiglu_cases(is_tiny: bool) -> Iterator[Case]:
    sizes = [(9, 40, 3)] if is_tiny else [(33, 96, 1), (37, 3000, 16), (130, 1216, 16), (65, 1000, 64), (7, 9728, 16)]
    for rows, width, rank in sizes:
        for dtype in FLOATS:
            gate_up, gradient = random(rows, 2 * width, dtype=dtype, slack=16), random(rows, width, dtype=dtype)
            t, u_down = random(rows, 2 * rank, dtype=dtype, slack=3), random(rows, rank, dtype=dtype, slack=7)
            b_gate, b_up = (random(width, rank, dtype=dtype, factor=rank**-0.5) for _ in range(2))
            kept = [random(width, rank), random(width, rank), random(rank, width)]

            def compute(
                on: Place, gate_up=gate_up, gradient=gradient, t=t, u_down=u_down, b_gate=b_gate, b_up=b_up, kept=kept
            ) -> dict[str, Tensor]:
                lora = swiglu.GateUpUpdate(on(t), on(b_gate), on(b_up), 2.0, 0.7)
                over, activation = on(gate_up), on(gradient)
                swiglu.swiglu_backward(activation, over, out=over, activation_out=activation)
                sums = [on(values) for values in kept]
                fresh = [on(torch.full_like(values, torch.nan)) for values in kept]
                grads = []
                for outputs, accumulates in ((sums, True), (fresh, False)):
                    target = on(gate_up)
                    swiglu.swiglu_backward_with_ranks(
                        on(gradient),
                        target,
                        lora=lora,
                        u_down=on(u_down),
                        grad_b_gate=outputs[0],
                        grad_b_up=outputs[1],
                        grad_a_down=outputs[2],
                        accumulates=accumulates,
                        out=target,
                    )
                    grads.append(target)
                return {
                    "plain": swiglu.swiglu(on(gate_up)),
                    "updated": swiglu.swiglu(on(gate_up), lora=lora),
                    "plain gradient": over,
                    "activation": activation,
                    "gradient": grads[0],
                    "gradient again": grads[1],
                    **{f"factor {index}, added": values for index, values in enumerate(sums)},
                    **{f"factor {index}": values for index, values in enumerate(fresh)},
                }

            yield Case(
                f"swiglu {rows}×{width} rank {rank} {name_of(dtype)}",
                (
                    "swiglu._forward_kernel",
                    "swiglu._backward_kernel",
                    "swiglu_low_rank._forward_kernel",
                    "swiglu_low_rank._backward_kernel",
                    "swiglu_low_rank._reduce_kernel",
                ),
                compute,
                TOLERANCE[dtype],
            )


def rope_cases(is_tiny: bool) -> Iterator[Case]:
    sizes = (
        [(5, 3, 1, 16, 2)]
        if is_tiny
        else [(37, 14, 2, 64, 16), (35, 4, 1, 80, 1), (5, 3, 1, 96, 64), (67, 32, 8, 128, 16), (3, 2, 1, 256, 64)]
    )
    for tokens, heads, kv_heads, head_dim, rank in sizes:
        for dtype in FLOATS:
            has_norm = head_dim != 64
            qkv = random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, slack=48)
            angles = torch.rand(tokens, head_dim // 2) * 6.28
            factors = [
                random(count * head_dim, rank, dtype=dtype, factor=rank**-0.5) for count in (heads, kv_heads, kv_heads)
            ]
            t = random(tokens, 3 * rank, dtype=dtype, slack=5)
            weights = [1 + random(head_dim, dtype=dtype, factor=0.2) for _ in range(2)] if has_norm else [None, None]
            gradients = [random(count, tokens, head_dim, dtype=dtype) for count in (heads, kv_heads, kv_heads)]

            def compute(
                on: Place,
                qkv=qkv,
                angles=angles,
                factors=factors,
                t=t,
                weights=weights,
                gradients=gradients,
                heads=heads,
                kv_heads=kv_heads,
            ) -> dict[str, Tensor]:
                found: dict[str, Tensor] = {}
                for lora in (qk_rope.QkvUpdate(on(t), *map(on, factors), 2.0, 1.3, 0.7), None):
                    options = {
                        "num_heads": heads,
                        "num_kv_heads": kv_heads,
                        "q_weight": None if weights[0] is None else on(weights[0]),
                        "k_weight": None if weights[1] is None else on(weights[1]),
                        "epsilon": EPSILON,
                        "lora": lora,
                    }
                    cos, sin = on(angles.cos()), on(angles.sin())
                    rotated = qk_rope.qk_rope(on(qkv), cos, sin, **options)
                    over = on(qkv)
                    grads = [on(gradient).transpose(0, 1) for gradient in gradients]
                    qk_rope.qk_rope_backward(*grads, over, cos, sin, **options, out=over)
                    kind = "plain" if lora is None else "updated"
                    found |= {f"{kind} {name}": part for name, part in zip("qkv", rotated, strict=False)}
                    found[f"{kind} gradient"] = over
                return found

            yield Case(
                f"qk_rope {tokens} tokens, {heads}/{kv_heads} heads of {head_dim} rank {rank} {name_of(dtype)}",
                ("qk_rope._forward_kernel", "qk_rope._backward_kernel"),
                compute,
                TOLERANCE[dtype],
            )


def attention_cases(is_tiny: bool) -> Iterator[Case]:
    layouts = (
        [([3, 1, 9], 2, 1, 16, None)]
        if is_tiny
        else [
            ([77, 1, 130, 3], 4, 2, 64, None),
            ([65, 64, 1], 3, 1, 80, 33),
            ([200], 2, 2, 96, 40),
            ([129, 15, 1, 1, 250], 8, 2, 128, None),
            ([70, 31], 2, 1, 256, None),
        ]
    )
    for lengths, heads, kv_heads, head_dim, window in layouts:
        for dtype in HALVES:
            tokens = sum(lengths)
            scale = head_dim**-0.5
            q = random(tokens, heads, head_dim, dtype=dtype)
            # Values as they come: columns of a wider row.
            kv = random(tokens, 2 * kv_heads * head_dim, dtype=dtype, slack=16)
            gradient = random(tokens, heads, head_dim, dtype=dtype)
            bounds = torch.tensor([0, *lengths, 0]).cumsum(0).to(torch.int32)  # an empty document at the end

            def compute(
                on: Place,
                q=q,
                kv=kv,
                gradient=gradient,
                bounds=bounds,
                lengths=lengths,
                scale=scale,
                window=window,
                groups=kv_heads,
            ) -> dict[str, Tensor]:
                k, v = (part.unflatten(1, (groups, -1)) for part in on(kv).chunk(2, dim=1))
                k = k.contiguous()
                segments = Segments.from_cu_seqlens(on(bounds), max_seqlen=max(lengths), lengths=tuple(lengths))
                moved = on(q)
                backend = "reference" if moved.dtype == torch.float64 or not runs_triton(moved) else "triton"
                options = {"scale": scale, "window": window}
                result = attention(moved, k, v, segments, **options, backend=backend)
                grads = attention_backward(on(gradient), moved, k, v, result, segments, **options)
                return {"output": result.output, **dict(zip(("∂q", "∂k", "∂v"), grads, strict=True))}

            yield Case(
                f"attention {'+'.join(map(str, lengths))} tokens, {heads}/{kv_heads} heads of {head_dim}, "
                f"window {window} {name_of(dtype)}",
                (
                    "attention._work_list_kernel",
                    "attention._forward_kernel",
                    "attention._grad_q_kernel",
                    "attention._grad_kv_kernel",
                ),
                compute,
                TOLERANCE[dtype],
            )


def runs_triton(tensor: Tensor) -> bool:
    return bool(attention_module.use_triton(tensor))


def loss_cases(is_tiny: bool) -> Iterator[Case]:
    for rows, vocabulary, softcap in (
        [(5, 300, 7.0)] if is_tiny else [(7, 5003, None), (3, 151_936, 30.0), (1, 17, None)]
    ):
        for dtype in FLOATS:
            logits = random(rows, vocabulary, dtype=dtype, factor=3.0, slack=13)
            targets = torch.randint(0, vocabulary, (rows,))
            targets[rows // 2] = -100
            bias = random(vocabulary)

            def compute(on: Place, logits=logits, targets=targets, bias=bias, softcap=softcap) -> dict[str, Tensor]:
                found = {}
                for name, extra in (("plain", None), ("with bias and scale", on(bias))):
                    moved = on(logits)
                    losses = torch.full((moved.shape[0],), torch.nan, device=moved.device)
                    error = torch.empty_like(moved)
                    linear_cross_entropy.cross_entropy_rows(
                        moved,
                        on(targets),
                        losses=losses,
                        error=error,
                        bias=extra,
                        softcap=softcap,
                        logit_scale=1.0 if extra is None else 0.7,
                    )
                    found |= {f"losses {name}": losses, f"error {name}": error}
                return found

            yield Case(
                f"cross entropy {rows}×{vocabulary} cap {softcap} {name_of(dtype)}",
                ("linear_cross_entropy._cross_entropy_kernel",),
                compute,
                TOLERANCE[dtype],
                is_wide=False,
            )


def four_bit_cases(is_tiny: bool) -> Iterator[Case]:
    for shape in [(3, 128)] if is_tiny else [(96, 2560), (7, 130), (1, 64), (33, 4096)]:
        for double in (True, False):
            # FP4 differs from NF4 in the table alone, an argument of the same kernel; the smaller shapes try it.
            table = code_tables.FP4 if shape[0] in (1, 7) else code_tables.NF4
            weight = random(*shape, dtype=torch.bfloat16)
            quantized = four_bit.quantize(weight, table, double_quantization=double)

            def compute(on: Place, quantized=quantized, shape=shape) -> dict[str, Tensor]:
                parts = {
                    name: None if value is None else on(value)
                    for name in ("codes", "absmax", "nested_absmax", "nested_offset")
                    for value in [getattr(quantized, name)]
                }
                moved = replace(quantized, **parts)
                found = {}
                for dtype in FLOATS:
                    out = torch.empty(shape[0], shape[1] + 32, dtype=dtype, device=moved.codes.device)[:, : shape[1]]
                    found[name_of(dtype)] = four_bit.dequantize_into(moved, out)
                return found

            kind = "double" if double else "single"
            yield Case(
                f"{table.name} {shape[0]}×{shape[1]}, {kind} quantisation",
                ("four_bit._dequantize_kernel",),
                compute,
                0.0,
                is_wide=False,
            )


def fp8_cases(is_tiny: bool) -> Iterator[Case]:
    for rows, width in [(3, 48)] if is_tiny else [(37, 2560), (1, 16), (130, 9728)]:
        for dtype in FLOATS:
            x, factor = random(rows, width, dtype=dtype, slack=16), random(width).abs() + 0.1

            def compute(on: Place, x=x, factor=factor) -> dict[str, Tensor]:
                plain, plain_scale = fp8.quantize_rows(on(x))
                codes, scale = fp8.quantize_rows(on(x), column_factor=on(factor))
                return {
                    "values": fp8.dequantize_rows(plain.cpu(), plain_scale.cpu()),
                    "scaled values": fp8.dequantize_rows(codes.cpu(), scale.cpu()),
                    "transposed": fp8.transpose_codes(plain).cpu().view(torch.uint8),
                }

            yield Case(
                f"fp8 {rows}×{width} {name_of(dtype)}",
                ("fp8._quantize_rows_kernel", "fp8._transpose_kernel"),
                compute,
                # A quotient on the border between two codes may go to either; a code is 2^-4 apart from the next.
                2e-3,
                is_wide=False,
            )


def row_scaled_cases(is_tiny: bool) -> Iterator[Case]:
    for rows, width in [(3, 48)] if is_tiny else [(37, 2560), (1, 1), (33, 9728)]:
        for quantize in (int8.quantize_rows, fp8.quantize_rows):
            codes, scale = quantize(random(rows, width))

            def compute(on: Place, codes=codes, scale=scale, width=width) -> dict[str, Tensor]:
                on_codes = on(codes.view(torch.uint8)).view(codes.dtype)
                found = {}
                for dtype in FLOATS:
                    out = torch.empty(codes.shape[0], width + 32, dtype=dtype, device=on_codes.device)[:, :width]
                    found[name_of(dtype)] = row_scaled.expand_rows(on_codes, on(scale), out)
                return found

            kind = name_of(codes.dtype)
            yield Case(
                f"{kind} {rows}×{width} expanded", ("row_scaled._expand_rows_kernel",), compute, 0.0, is_wide=False
            )


def optimizer_cases(is_tiny: bool) -> Iterator[Case]:
    for count in [1001] if is_tiny else [1, 1001, 1_000_003]:
        buffers = [random(count), random(count), random(count, factor=0.1), random(count, factor=0.1).square()]

        def compute(on: Place, buffers=buffers, count=count) -> dict[str, Tensor]:
            parameters, gradients, first, second = map(on, buffers)
            norm = adamw.gradient_norm(gradients)
            factor = adamw.clip_factor(norm, 1.0, 2.0)
            adamw.adamw_step(
                parameters,
                gradients,
                first,
                second,
                step=3,
                learning_rate=1e-3,
                weight_decay=0.1,
                gradient_factor=factor,
            )
            return {
                "norm": norm,
                "factor": factor,
                "parameters": parameters,
                "first moment": first,
                "second moment": second,
            }

        yield Case(
            f"adamw {count} parameters",
            (
                "adamw._adamw_kernel",
                "adamw._sum_of_squares_kernel",
                "adamw._root_of_sum_kernel",
                "adamw._clip_factor_kernel",
            ),
            compute,
            TOLERANCE[torch.float32],
            is_wide=False,
        )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


GROUPS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "rms_norm": norm_cases,
    "swiglu": swiglu_cases,
    "qk_rope": rope_cases,
    "attention": attention_cases,
    "cross_entropy": loss_cases,
    "four_bit": four_bit_cases,
    "fp8": fp8_cases,
    "row_scaled": row_scaled_cases,
    "adamw": optimizer_cases,
}


def cases(only: Sequence[str] = (), *, is_tiny: bool = False) -> Iterator[Case]:
    """All cases, or those of some groups; inputs are made when a case is reached, the same in every process."""
    for index, (name, group) in enumerate(GROUPS.items()):
        if not only or name in only:
            torch.manual_seed(index)
            yield from group(is_tiny)


# Comparison
# --------------------------------------------------------------------------------------------------------------


def check(case: Case) -> dict[str, Any]:
    """The largest relative error of a case's results, and whether it is within the tolerance."""
    found = {name: tensor.cpu() for name, tensor in case.compute(on_device).items()}
    with references():
        expected = case.compute(in_float64 if case.is_wide else as_it_is)
    errors = {name: relative(found[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    return {
        "case": case.name,
        "error": errors[worst],
        "in": worst,
        "tolerance": case.tolerance,
        "is_right": all(error <= case.tolerance for error in errors.values()),
    }


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; infinite where a number is missing."""
    if found.shape != expected.shape or not bool(found.double().isfinite().all()):
        return float("inf")
    difference, size = (found.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / size) if size > 0 else float(difference)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"of {', '.join(GROUPS)}, by comma")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--list", action="store_true", help="print the cases and their kernels, and stop")
    arguments = parser.parse_args(argv)
    only = [name for name in arguments.only.split(",") if name]
    if unknown := set(only) - set(GROUPS):
        raise SystemExit(f"unknown groups: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    found: list[dict[str, Any]] = []
    started = time.perf_counter()
    for case in cases(only, is_tiny=arguments.tiny):
        if arguments.list:
            print(f"{case.name}: {', '.join(case.kernels)}")
            continue
        try:
            result = check(case)
        except Exception as error:  # noqa: BLE001 - the other kernels are still worth a look
            result = {"case": case.name, "is_right": False, "exception": f"{type(error).__name__}: {error}"[:600]}
        result["kernels"] = list(case.kernels)
        found.append(result)
        if not result["is_right"]:
            print(f"WRONG {result}", flush=True)
        if arguments.output is not None:
            records.write(arguments.output, {"cases": found})
    if not arguments.list:
        right = sum(result["is_right"] for result in found)
        print(f"{right} of {len(found)} cases right, {time.perf_counter() - started:.0f} s", flush=True)
        if right < len(found):
            sys.exit(1)


if __name__ == "__main__":
    main()
