"""Attention backends on one GPU: right, repeatable, capturable, and how fast.

    python bench/attention.py [--output bench/results/attention.json]       on a GPU, about a minute
    python bench/attention.py --cpu                                         the laptop's shapes on one and two threads

H = 32 query heads over G = 8 key heads of K = 128, bfloat16, v a strided view as the joint projection leaves it. For
each case and backend:

    error            ‖found − expected‖ / ‖expected‖ of output, ∂q, ∂k, ∂v; expected from the definition in float64
                     (up to 2,048 tokens) or float32
    same bits        whether four runs give the same bits, per tensor, with deterministic algorithms off and on
    captured         forward and backward in one CUDA graph over padded bounds, replayed for other lengths, against the
                     same pass outside a graph
    fwd, bwd         median milliseconds of events, after warm-up; graph: one replay of both
    TFLOP/s          4 · H · K · Σ L (L + 1) / 2 forward, 2.5 times that backward

    tile             milliseconds of each Triton kernel on three tiles each, without windows

A failing case prints its error and the rest goes on. Nothing here is a test; it is what `choose_backend` in
affina/kernels/attention.py and `tiles_for` in affina/kernels/triton/attention.py are set by.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, by the first product

import torch
from torch import Tensor

from affina.kernels.attention import AttentionResult, Segments, attention, attention_backward
from affina.kernels.packed_attention import Documents, packed_attention

HEADS, GROUPS, WIDTH = 32, 8, 128
SCALE = WIDTH**-0.5
NAMES = ("output", "grad_q", "grad_k", "grad_v")
RESULTS = Path(__file__).parent / "results" / "attention.json"


@dataclass(frozen=True)
class Case:
    """Documents of a row; `num_empty` more bounds at T and a loose `max_seqlen` as a captured graph has them."""

    name: str
    lengths: tuple[int, ...]
    num_empty: int = 0
    max_seqlen: int | None = None
    window: int | None = None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def forward_flops(self) -> float:
        return 4 * HEADS * WIDTH * sum(length * (length + 1) / 2 for length in self.lengths)

    def bounds(self, lengths: tuple[int, ...] | None = None) -> Tensor:
        padded = [0, *(lengths or self.lengths), *[0] * self.num_empty]
        return torch.tensor(padded).cumsum(0).to(torch.int32).cuda()

    def segments(self) -> Segments:
        longest = self.max_seqlen or max(self.lengths)
        return Segments.from_cu_seqlens(self.bounds(), max_seqlen=longest, lengths=self.lengths)


def real_lengths(tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Log-normal lengths with median 300 (σ = 0.8), cut to fill the row."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = int(300 * torch.exp(0.8 * torch.randn((), generator=generator)))
        lengths.append(max(1, min(drawn, tokens - sum(lengths))))
    return tuple(lengths)


def timed_cases() -> list[Case]:
    packed, short = real_lengths(16384), real_lengths(2048)
    return [
        Case("8x2048", (2048,) * 8),
        Case("1x2048", (2048,)),
        Case("1x16384", (16384,)),
        Case("packed-16384", packed),
        Case("packed-16384, 32 empty", packed, num_empty=32),
        Case("packed-2048", short),
        Case("packed-2048, 32 empty", short, num_empty=32),
        Case("1x16384, window 4096", (16384,), window=4096),
        Case("64x256", (256,) * 64),
        Case("16x1024", (1024,) * 16),
    ]


def checked_cases() -> list[Case]:
    return [
        Case("small ragged, 7 empty, loose", (1, 5, 130, 256, 1, 119), num_empty=7, max_seqlen=512),
        Case("small ragged, window 50", (1, 5, 130, 256, 1, 119), window=50),
        Case("one-token documents", (1,) * 64),
        Case("3x200", (200, 200, 200)),
        Case("1x2048", (2048,)),
        Case("packed-2048", real_lengths(2048)),
        Case("packed-16384, 32 empty", real_lengths(16384), num_empty=32),
        Case("1x16384", (16384,)),
    ]


def make_inputs(tokens: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    joint = normal(tokens, (HEADS + 2 * GROUPS) * WIDTH)
    v = torch.unflatten(joint[:, -GROUPS * WIDTH :], 1, (GROUPS, WIDTH))
    return normal(tokens, HEADS, WIDTH), normal(tokens, GROUPS, WIDTH), v, normal(tokens, HEADS, WIDTH)


def both_passes(
    inputs: tuple[Tensor, ...], segments: Segments, window: int | None, backend: str
) -> tuple[AttentionResult, tuple[Tensor, ...]]:
    q, k, v, grad_output = inputs
    result = attention(q, k, v, segments, scale=SCALE, window=window, backend=backend)
    gradients = attention_backward(grad_output, q, k, v, result, segments, scale=SCALE, window=window)
    return result, (result.output, *gradients)


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Deterministic algorithms on or off, without the filling of new memory that comes with them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def backends_of(case: Case) -> list[tuple[str, str, bool]]:
    """(label, backend, deterministic algorithms) to try on a case."""
    choices = [("triton", "triton", False), ("flash", "flash", False), ("flash, deterministic", "flash", True)]
    if len(set(case.lengths)) == 1 and case.window is None and case.lengths[0] > 1:
        choices.append(("cudnn", "cudnn", False))
    return choices


# ------------------------------------------------------------------------------------------------ what is measured


def errors(case: Case, backend: str) -> dict[str, float]:
    inputs, segments = make_inputs(case.tokens), case.segments()
    _, found = both_passes(inputs, segments, case.window, backend)
    wide = torch.float64 if case.tokens <= 2048 else torch.float32
    expected = both_passes(tuple(tensor.to(wide) for tensor in inputs), segments, case.window, "reference")[1]
    return {
        name: float((one.to(wide) - other).norm() / other.norm().clamp_min(1e-30))
        for name, one, other in zip(NAMES, found, expected, strict=True)
    }


def same_bits(case: Case, backend: str) -> dict[str, bool]:
    inputs, segments = make_inputs(case.tokens), case.segments()
    _, first = both_passes(inputs, segments, case.window, backend)
    same = dict.fromkeys(NAMES, True)
    for _ in range(3):
        _, again = both_passes(inputs, segments, case.window, backend)
        for name, one, other in zip(NAMES, first, again, strict=True):
            same[name] = same[name] and torch.equal(one, other)
    return same


def capture(
    inputs: tuple[Tensor, ...], segments: Segments, window: int | None, backend: str
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both_passes(inputs, segments, window, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, captured = both_passes(inputs, segments, window, backend)
    return graph, captured


def captured_error(case: Case, backend: str) -> dict[str, float]:
    """Relative differences of a replay, over other documents than at capture, from the same pass outside a graph."""
    inputs, bounds = make_inputs(case.tokens), case.bounds()
    uniform = case.lengths[0] if len(set(case.lengths)) == 1 and backend == "cudnn" else None
    segments = Segments(bounds, case.max_seqlen or max(case.lengths), None, uniform)
    graph, captured = capture(inputs, segments, case.window, backend)
    bounds.copy_(case.bounds(tuple(reversed(case.lengths))))
    graph.replay()
    _, expected = both_passes(inputs, segments, case.window, backend)
    return {
        name: float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-30))
        for name, one, other in zip(NAMES, captured, expected, strict=True)
    }


def milliseconds(function: Callable[[], Any], *, at_most: float = 0.1, warm_up: int = 2) -> float:
    """Median of events over at most 30 calls or `at_most` seconds."""
    for _ in range(warm_up):
        function()
    torch.cuda.synchronize()
    times: list[float] = []
    deadline = time.perf_counter() + at_most
    while len(times) < 5 or (len(times) < 30 and time.perf_counter() < deadline):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def times(case: Case, backend: str) -> dict[str, float]:
    inputs, segments, window = make_inputs(case.tokens), case.segments(), case.window
    q, k, v, grad_output = inputs
    result = attention(q, k, v, segments, scale=SCALE, window=window, backend=backend)

    def forward() -> AttentionResult:
        return attention(q, k, v, segments, scale=SCALE, window=window, backend=backend)

    def backward() -> tuple[Tensor, ...]:
        return attention_backward(grad_output, q, k, v, result, segments, scale=SCALE, window=window)

    graph, _ = capture(inputs, segments, window, backend)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    backward()
    peak = torch.cuda.max_memory_allocated() - held
    found = {
        "forward_ms": milliseconds(forward),
        "backward_ms": milliseconds(backward),
        "graph_ms": milliseconds(graph.replay),
        "backward_peak_mib": peak / 2**20,
    }
    tera = case.forward_flops / 1e9
    rates = {"forward_tflops": tera / found["forward_ms"], "backward_tflops": 2.5 * tera / found["backward_ms"]}
    return found | rates | {"graph_tflops": 3.5 * tera / found["graph_ms"]}


# ------------------------------------------------------------------------------------------------ the report


def attempt(
    records: list[dict[str, Any]], kind: str, case: Case, label: str, run: Callable[[], dict[str, Any]]
) -> None:
    """Run one probe; print and keep its result or its error."""
    record: dict[str, Any] = {"kind": kind, "case": case.name, "backend": label}
    try:
        record |= run()
        torch.cuda.synchronize()
    except (RuntimeError, AssertionError, TypeError, ValueError, *_triton_errors()) as error:
        record["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        traceback.print_exc(limit=-2, file=sys.stderr)
    torch.cuda.empty_cache()
    records.append(record)
    shown = ", ".join(
        f"{key} {_shown(value)}" for key, value in record.items() if key not in ("kind", "case", "backend")
    )
    print(f"{kind:10} {case.name:32} {label:22} {shown}", flush=True)


def _triton_errors() -> tuple[type[Exception], ...]:
    """What Triton raises when a kernel does not compile or does not fit the card."""
    try:
        from triton.runtime.errors import TritonError
    except ImportError:
        return ()
    return (TritonError,)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def measure(records: list[dict[str, Any]]) -> None:
    for case in checked_cases():
        for label, backend, wanted in backends_of(case):
            with determinism(wanted):
                attempt(records, "error", case, label, partial(errors, case, backend))
                attempt(records, "same bits", case, label, partial(same_bits, case, backend))
                attempt(records, "captured", case, label, partial(captured_error, case, backend))
    for case in timed_cases():
        for label, backend, wanted in backends_of(case):
            with determinism(wanted):
                attempt(records, "time", case, label, partial(times, case, backend))


# Rows, keys, warps, stages.
# Rows, keys, warps, stages. No 128 keys of a query tile: what Triton 3.6 compiles for them is wrong.
TILES = {
    "forward": ((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)),
    "queries": ((128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3)),
    "keys": ((64, 128, 8, 3), (64, 64, 4, 2), (64, 128, 8, 2)),
}


def tile_times(case: Case, kind: str, shape: tuple[int, int, int, int]) -> dict[str, float]:
    """Milliseconds of one Triton kernel on one tile, and TFLOP/s of the products it computes (2, 3 or 4)."""
    from affina.kernels.triton import attention as kernel

    tile = kernel.Tile(*shape, True)
    q, k, v, grad_output = make_inputs(case.tokens)
    segments, heads = case.segments(), tile.heads(HEADS // GROUPS)
    work = segments.work_list(case.tokens, tile.keys if kind == "keys" else tile.tokens(HEADS // GROUPS))
    options: dict[str, Any] = {"scale": SCALE, "window": None, "tile": tile}
    if kind == "forward":
        milli = milliseconds(lambda: kernel.forward(q, k, v, work, **options))
    elif kind == "queries":
        result = attention(q, k, v, segments, scale=SCALE, backend="triton")
        rows = (grad_output, q, k, v, result.output, result.lse)
        milli = milliseconds(lambda: kernel.backward_queries(*rows, work, key_heads=heads, **options))
    else:  # the time does not depend on the numbers
        statistics = kernel._new_statistics(q, heads).zero_()
        milli = milliseconds(lambda: kernel.backward_keys(grad_output, q, k, v, statistics, work, **options))
    products = {"forward": 2, "queries": 3, "keys": 4}[kind]
    return {"ms": milli, "tflops": products / 2 * case.forward_flops / 1e9 / milli}


def measure_tiles(records: list[dict[str, Any]]) -> None:
    """Which tiles `affina.kernels.triton.attention.tiles_for` should take on a card with descriptors."""
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        return
    for case in (case for case in timed_cases() if case.name in ("8x2048", "1x2048", "packed-16384", "packed-2048")):
        for kind, shapes in TILES.items():
            for shape in shapes:
                label = "{} {}x{}, {} warps, {} stages".format(kind, *shape)
                attempt(records, "tile", case, label, partial(tile_times, case, kind, shape))


def print_table(records: list[dict[str, Any]]) -> None:
    print(f"\n{'':55} {'milliseconds':>26} {'TFLOP/s':>20}")
    print(f"{'case':32} {'backend':22} {'fwd':>8} {'bwd':>8} {'graph':>8} {'fwd':>6} {'bwd':>6} {'graph':>6}")
    for record in records:
        if record["kind"] == "time" and "error" not in record:
            numbers = [record[key] for key in ("forward_ms", "backward_ms", "graph_ms")]
            rates = [record[f"{key}_tflops"] for key in ("forward", "backward", "graph")]
            line = " ".join([*(f"{number:8.3f}" for number in numbers), *(f"{rate:6.0f}" for rate in rates)])
            print(f"{record['case']:32} {record['backend']:22} {line}")


# ------------------------------------------------------------------------------------------------ CPU


def measure_cpu(threads: int, lengths: tuple[int, ...], repeats: int = 25) -> dict[str, float]:
    """Forward + backward against autograd through `packed_attention`, taking turns; the best of `repeats` each."""
    torch.set_num_threads(threads)
    heads, groups, width = 4, 2, 64
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_output = (
        torch.randn(sum(lengths), n, width, generator=generator) for n in (heads, groups, groups, heads)
    )
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    segments = Segments.from_cu_seqlens(bounds, max_seqlen=max(lengths), lengths=lengths)
    documents = Documents(bounds, lengths)

    def ours() -> None:
        result = attention(q, k, v, segments, scale=SCALE)
        attention_backward(grad_output, q, k, v, result, segments, scale=SCALE)

    def autograd() -> None:
        rows = [tensor.transpose(0, 1).unsqueeze(0).detach().requires_grad_() for tensor in (q, k, v)]
        output = packed_attention(rows[0], rows[1], rows[2], documents, scale=SCALE)
        torch.autograd.backward(output, grad_output.transpose(0, 1).unsqueeze(0))

    best = {"attention": float("inf"), "packed_attention": float("inf")}
    for _ in range(repeats):
        for name, function in (("attention", ours), ("packed_attention", autograd)):
            start = time.perf_counter()
            function()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def cpu_lengths(low: int, high: int, tokens: int = 2048) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = int(torch.randint(low, high + 1, (), generator=generator))
        lengths.append(min(drawn, tokens - sum(lengths)))
    return tuple(lengths)


def main_cpu() -> None:
    for low, high in ((20, 120), (4, 16), (16, 48), (200, 300), (64, 64), (2048, 2048)):
        for threads in (1, 2):
            found = measure_cpu(threads, cpu_lengths(low, high))
            shown = ", ".join(f"{name} {number:.2f} ms" for name, number in found.items())
            print(f"documents of {low}–{high} tokens, {threads} thread(s): {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    if options.cpu:
        main_cpu()
        return
    records: list[dict[str, Any]] = []
    measure(records)
    print_table(records)
    measure_tiles(records)
    head = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(head | {"records": records}, indent=1) + "\n")
    print(json.dumps(head))


if __name__ == "__main__":
    main()
