"""Microseconds and TB/s of the operations on rows and heads on this GPU, with several tiles of each kernel.

    python bench/row_ops.py [--only qk_rope] [--rows 16384] [--rank 16]

Shapes are Qwen3-4B's. Launches are timed inside a CUDA graph of several, so that the host does not count; with 16,384
rows every tensor is larger than the cache. TB/s are those of the bytes that the operation must move (each tensor once),
to be read beside the first line, a copy. An asterisk marks the best tile, `in use` the one that the kernel has now.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from affina.kernels.qk_rope import QkvUpdate, qk_rope, qk_rope_backward
from affina.kernels.rms_norm import RowUpdate, add_rms_norm, add_rows, rms_norm, rms_norm_backward
from affina.kernels.triton import qk_rope as rope_kernels
from affina.kernels.triton import rms_norm as norm_kernels
from affina.kernels.triton.qk_rope import Tile
from affina.kernels.triton.rms_norm import RowTile, UpdateTile

WIDTH, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 2560, 32, 8, 128
BYTES = 2
DEVICE = "cuda"
LAUNCHES, REPLAYS = 20, 5

ROW_TILES = [RowTile(12, 1, 1), RowTile(24, 1, 1), RowTile(48, 1, 1), RowTile(24, 4, 3), RowTile(12, 4, 3)]
ADD_TILES = [UpdateTile(16, 128, 4), UpdateTile(32, 128, 4), UpdateTile(64, 64, 4), UpdateTile(16, 256, 4)]
PLAIN_TILES = [Tile(1024, 4, 4, 1), Tile(1024, 8, 4, 1), Tile(512, 4, 2, 1), Tile(1024, 4, 4, 3)]
UPDATE_TILES = [
    Tile(1024, 4, 4, 1),
    Tile(1024, 4, 4, 3),
    Tile(1024, 8, 4, 3),
    Tile(1024, 4, 4, 4),
    Tile(2048, 4, 8, 3),
]


@dataclass(frozen=True)
class Case:
    """One operation.

    table, key: where its tile is chosen; None where there is nothing to choose
    tiles:      to try
    """

    name: str
    num_bytes: int
    call: Callable[[], object]
    table: dict[Any, Any] | None = None
    key: Any = None
    tiles: tuple[Any, ...] = (None,)


def random(*shape: int, factor: float = 1.0) -> Tensor:
    """Normal numbers in bfloat16 on the GPU."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) * factor


def row_cases(num_rows: int, rank: int) -> Iterator[Case]:
    """The norm of the residual stream, with the sum before it, and its gradient."""
    x, update, y, weight = random(num_rows, WIDTH), random(num_rows, WIDTH), random(num_rows, WIDTH), random(WIDTH)
    lora = RowUpdate(random(num_rows, rank), random(WIDTH, rank, factor=0.1), 2.0)
    _, rstd = rms_norm(x, weight, 1e-6)
    one = num_rows * WIDTH * BYTES
    rows = norm_kernels.ROW_TILES

    def norm_of_sum(lora: RowUpdate | None) -> None:
        add_rms_norm(x, update, weight, 1e-6, sum_out=update, out=y, lora=lora)

    def product_then_norm_of_sum() -> None:
        update.addmm_(lora.t, lora.b.t(), alpha=lora.scale)
        norm_of_sum(None)

    yield Case("copy", 2 * one, lambda: y.copy_(x))
    yield Case("rms_norm", 2 * one, lambda: rms_norm(x, weight, 1e-6, out=y), rows, "forward", tuple(ROW_TILES))
    yield Case("add_rms_norm", 4 * one, lambda: norm_of_sum(None), rows, "sum", tuple(ROW_TILES))
    yield Case(
        "rms_norm_backward + residual",
        4 * one,
        lambda: rms_norm_backward(y, x, weight, rstd, grad_residual=update, out=update),
        rows,
        "backward",
        tuple(ROW_TILES),
    )
    yield Case(f"add_rms_norm R={rank}", 4 * one, lambda: norm_of_sum(lora))
    yield Case(
        f"add_rows R={rank}",
        3 * one,
        lambda: add_rows(x, update, lora=lora, out=update),
        vars(norm_kernels),
        "UPDATE_TILE",
        tuple(ADD_TILES),
    )
    yield Case(f"add_rms_norm R={rank} as addmm_ and add_rms_norm", 4 * one, product_then_norm_of_sum)


def head_cases(num_rows: int, rank: int) -> Iterator[Case]:
    """Norm and rotation of queries and keys, without and with updates, and their gradient."""
    all_heads = NUM_HEADS + 2 * NUM_KV_HEADS
    qkv, weight = random(num_rows, all_heads * HEAD_DIM), random(HEAD_DIM)
    angles = torch.rand(num_rows, HEAD_DIM // 2, device=DEVICE)
    b_q, b_k, b_v = (random(count * HEAD_DIM, rank, factor=0.1) for count in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))
    lora = QkvUpdate(random(num_rows, 3 * rank), b_q, b_k, b_v, 2.0, 2.0, 2.0)
    grads = [random(num_rows, count, HEAD_DIM) for count in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
    options: dict[str, Any] = {
        "num_heads": NUM_HEADS,
        "num_kv_heads": NUM_KV_HEADS,
        "q_weight": weight,
        "k_weight": weight,
        "epsilon": 1e-6,
    }
    one = num_rows * HEAD_DIM * BYTES

    def forward(lora: QkvUpdate | None) -> None:
        if lora is None:
            qk_rope(qkv, angles, angles, **options)
        else:
            qk_rope(qkv, angles, angles, **options, lora=lora)

    def backward(lora: QkvUpdate | None) -> None:
        qk_rope_backward(grads[0], grads[1], grads[2], qkv, angles, angles, **options, out=qkv, lora=lora)

    table = rope_kernels.TILES
    for kind, update, tiles in (("plain", None, PLAIN_TILES), ("update", lora, UPDATE_TILES)):
        name = f"qk_rope R={0 if update is None else rank}"
        written = all_heads if update is not None else NUM_HEADS + NUM_KV_HEADS
        # The angles too: every group of heads reads them, memory delivers them once.
        forward_bytes = 2 * one * written + num_rows * HEAD_DIM * 4
        yield Case(name, forward_bytes, lambda u=update: forward(u), table, ("forward", kind), tuple(tiles))  # type: ignore[misc]
        backward_bytes = 2 * one * all_heads + one * (NUM_HEADS + NUM_KV_HEADS) + num_rows * HEAD_DIM * 4
        name = name.replace("qk_rope", "qk_rope_backward")
        yield Case(name, backward_bytes, lambda u=update: backward(u), table, ("backward", kind), tuple(tiles))  # type: ignore[misc]


def microseconds(call: Callable[[], object]) -> float:
    """The median time of one call on the GPU, after a first one that compiles."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6 / LAUNCHES)
    return statistics.median(times)


def measure(case: Case) -> None:
    """Time the operation with each of its tiles; print all and mark the best."""
    used = case.table[case.key] if case.table is not None else None
    results = []
    for tile in dict.fromkeys((*case.tiles, used)) if case.table is not None else case.tiles:
        if case.table is not None:
            case.table[case.key] = tile
        results.append((microseconds(case.call), tile))
    if case.table is not None:
        case.table[case.key] = used
    best = min(duration for duration, _ in results)
    print(case.name)
    for duration, tile in results:
        words = "" if tile is None else ", ".join(f"{name} {value}" for name, value in tile._asdict().items())
        mark = "*" if duration == best and len(results) > 1 else " "
        in_use = "  in use" if tile is not None and tile == used else ""
        print(f"  {mark} {duration:8.1f} us  {case.num_bytes / duration / 1e6:5.2f} TB/s  {words}{in_use}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="time the operations whose name holds this")
    parser.add_argument("--rows", type=int, default=16384, help="tokens (default 16384)")
    parser.add_argument("--rank", type=int, default=16, help="of the low-rank updates (default 16)")
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for cases in (row_cases, head_cases):
        for case in cases(arguments.rows, arguments.rank):
            if arguments.only in case.name:
                measure(case)


if __name__ == "__main__":
    with torch.no_grad():
        main()
