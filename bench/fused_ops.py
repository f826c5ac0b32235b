"""Parity and speed of rms_norm, swiglu, qk_rope on this machine's GPU; sweeps tiles. One call, about two minutes.

Run in the repository root:  PYTHONPATH=src python bench_fused_ops.py   (SMALL=1 on a CPU under the interpreter)
"""

import os
import time

import torch

from affina.kernels.qk_rope import QkvUpdate, qk_rope, qk_rope_backward
from affina.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward
from affina.kernels.swiglu import GateUpUpdate, swiglu, swiglu_backward

SMALL = bool(os.environ.get("SMALL"))
DEVICE = "cpu" if SMALL else "cuda"
torch.manual_seed(0)


def rand(*shape, dtype=torch.bfloat16, factor=1.0):
    return (torch.randn(*shape, device=DEVICE) * factor).to(dtype)


def double(x):
    if isinstance(x, torch.Tensor):
        return x.double()
    if isinstance(x, GateUpUpdate):
        return GateUpUpdate(double(x.t), double(x.b_gate), double(x.b_up), x.scale_gate, x.scale_up)
    if isinstance(x, QkvUpdate):
        return QkvUpdate(double(x.t), double(x.b_q), double(x.b_k), double(x.b_v), *x.scales)
    return x


def compare(name, function, *args, **kwargs):
    """Largest error against float64, in units of the result's norm; float64 takes the reference path."""
    found = function(*args, **kwargs)
    exact = function(*(double(a) for a in args), **{k: double(v) for k, v in kwargs.items()})
    found = found if isinstance(found, tuple) else (found,)
    exact = exact if isinstance(exact, tuple) else (exact,)
    errors = [float((f.double() - e).norm() / e.norm().clamp(min=1e-30)) for f, e in zip(found, exact, strict=True)]
    worst = [float(((f.double() - e).abs() / (e.abs() + 1e-2)).max()) for f, e in zip(found, exact, strict=True)]
    print(f"{name:60s} rel {[f'{e:.1e}' for e in errors]} worst {[f'{e:.1e}' for e in worst]}", flush=True)


def qkv_case(T, H, G, K, dtype, R, norm):
    qkv = rand(T, (H + 2 * G) * K, dtype=dtype)
    angle = torch.rand(T, K // 2, device=DEVICE) * 6.28
    w = [1 + rand(K, dtype=dtype, factor=0.2) if norm else None for _ in range(2)]
    lora = None
    if R:
        b = [rand(n * K, R, dtype=dtype, factor=R**-0.5) for n in (H, G, G)]
        lora = QkvUpdate(rand(T, 3 * R, dtype=dtype), *b, 2.0, 1.3, 0.7)
    kw = dict(num_heads=H, num_kv_heads=G, q_weight=w[0], k_weight=w[1], epsilon=1e-6, lora=lora)
    return (qkv, angle.cos(), angle.sin()), kw


def parity():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype)[6:]
        for M, D in ((1, 64), (37, 896), (65, 2560), (130, 4096), (9, 16384)):
            x, u, g, w = rand(M, D, dtype=dtype), rand(M, D, dtype=dtype), rand(M, D, dtype=dtype), rand(D, dtype=dtype)
            compare(f"rms_norm {name} {M}x{D}", rms_norm, x, w, 1e-6)
            r = rms_norm(x, w, 1e-6)[1]
            s = add_rms_norm(x, u, w, 1e-6)[0]
            assert SMALL or torch.equal(s, x + u), "the sum is not x + u bit for bit"
            compare(f"rms_norm_backward {name} {M}x{D}", rms_norm_backward, g, x, w, r, grad_residual=u)
            wanted = rms_norm_backward(g, x, w, r, grad_residual=u)
            for over in (0, 1, 2):
                a = [t.clone() for t in (g, x, u)]
                assert torch.equal(rms_norm_backward(a[0], a[1], w, r, grad_residual=a[2], out=a[over]), wanted)
            ws, wy, _ = add_rms_norm(x, u, w, 1e-6)
            a = [x.clone(), u.clone()]
            fs, fy, _ = add_rms_norm(a[0], a[1], w, 1e-6, sum_out=a[0], out=a[1])
            assert torch.equal(fs, ws) and torch.equal(fy, wy), "in place differs"
        for M, I, R in (
            (1, 64, 0),
            (37, 3000, 0),
            (130, 9728, 0),
            (37, 3000, 8),
            (130, 9728, 16),
            (65, 1000, 64),
            (65, 1000, 200),
        ):
            gu, g = rand(M, 2 * I, dtype=dtype), rand(M, I, dtype=dtype)
            lora = (
                GateUpUpdate(
                    rand(M, 2 * R, dtype=dtype),
                    rand(I, R, dtype=dtype, factor=R**-0.5),
                    rand(I, R, dtype=dtype, factor=R**-0.5),
                    2.0,
                    0.7,
                )
                if R
                else None
            )
            compare(f"swiglu {name} {M}x{I} R={R}", swiglu, gu, lora=lora)
            compare(f"swiglu_backward {name} {M}x{I} R={R}", swiglu_backward, g, gu, lora=lora)
            wanted, act = swiglu_backward(g, gu, lora=lora), swiglu(gu, lora=lora)
            a, b = gu.clone(), g.clone()
            swiglu_backward(b, a, out=a, activation_out=b, lora=lora)
            assert torch.equal(a, wanted) and torch.equal(b, act), "in place differs"
        for T, H, G, K, R, norm in (
            (1, 1, 1, 64, 0, True),
            (37, 14, 2, 64, 8, False),
            (37, 32, 8, 128, 0, True),
            (67, 32, 8, 128, 16, True),
            (67, 5, 3, 80, 16, True),
            (67, 5, 3, 96, 0, True),
            (20, 4, 2, 256, 64, True),
            (20, 4, 2, 128, 200, True),
        ):
            args, kw = qkv_case(T, H, G, K, dtype, R, norm)
            compare(f"qk_rope {name} T={T} H={H} G={G} K={K} R={R} norm={norm}", qk_rope, *args, **kw)
            grads = [rand(n, T, K, dtype=dtype).transpose(0, 1) for n in (H, G, G)]
            compare(f"qk_rope_backward {name} K={K} R={R}", qk_rope_backward, *grads, *args, **kw)
            wanted = qk_rope_backward(*grads, *args, **kw)
            over = args[0].clone()
            assert torch.equal(qk_rope_backward(*grads, over, *args[1:], **kw, out=over), wanted), "in place differs"


def timed(name, function, num_bytes):
    if SMALL:
        function()
        return
    from triton.testing import do_bench

    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    ms = do_bench(function, warmup=5, rep=30, return_mode="median")
    print(f"{name:76s} {ms * 1e3:8.1f} us {num_bytes / ms / 1e9:6.2f} TB/s  first call {first:.1f} s", flush=True)


def speed():
    from affina.kernels.triton import qk_rope as kq
    from affina.kernels.triton import rms_norm as kr
    from affina.kernels.triton import swiglu as ks

    M, D, I, H, G, K = (16384, 2560, 9728, 32, 8, 128) if not SMALL else (40, 64, 70, 5, 2, 16)
    x, u, g = rand(M, D), rand(M, D), rand(M, D)
    w = rand(D)
    y, r = rms_norm(x, w, 1e-6)
    timed("copy of M x D (ceiling)", lambda: y.copy_(x), 4 * M * D)
    plain_tile = kr._tile
    for warps in (4, 8, 16):
        kr._tile = lambda width, warps=warps: (*plain_tile(width)[:2], warps)
        timed(f"rms_norm warps {warps}", lambda: rms_norm(x, w, 1e-6, out=y), 4 * M * D)
        timed(f"add_rms_norm in place, warps {warps}", lambda: add_rms_norm(x, u, w, 1e-6, sum_out=x, out=y), 8 * M * D)
        timed(
            f"rms_norm_backward + residual in place, warps {warps}",
            lambda: rms_norm_backward(g, x, w, r, grad_residual=u, out=u),
            8 * M * D,
        )
    kr._tile = plain_tile
    del x, u, g, y

    gu, go = rand(M, 2 * I), rand(M, I)
    out, act, grad = torch.empty_like(go), torch.empty_like(go), torch.empty_like(gu)
    for elements, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8)):
        ks._PLAIN_TILE_ELEMENTS, ks._NUM_WARPS = elements, warps
        timed(f"swiglu {elements} elements, {warps} warps", lambda: swiglu(gu, out=out), 6 * M * I)
        timed(
            f"swiglu_backward + activation {elements} elements, {warps} warps",
            lambda: swiglu_backward(go, gu, out=grad, activation_out=act),
            12 * M * I,
        )
    ks._PLAIN_TILE_ELEMENTS = 1024
    for R in (16, 64):
        lora = GateUpUpdate(rand(M, 2 * R), rand(I, R, factor=0.2), rand(I, R, factor=0.2), 2.0, 2.0)
        for tile, warps in (
            ((32, 64), 4),
            ((64, 64), 4),
            ((64, 64), 8),
            ((32, 128), 4),
            ((64, 128), 8),
            ((128, 64), 8),
        ):
            ks._UPDATE_TILE, ks._NUM_WARPS = tile, warps
            timed(f"swiglu R={R} tile {tile}, {warps} warps", lambda: swiglu(gu, out=out, lora=lora), 6 * M * I)
            timed(
                f"swiglu_backward + activation R={R} tile {tile}, {warps} warps",
                lambda: swiglu_backward(go, gu, out=grad, activation_out=act, lora=lora),
                12 * M * I,
            )
        ks._UPDATE_TILE, ks._NUM_WARPS = (64, 64), 4
    del gu, go, out, act, grad

    for norm in (True, False):
        for R in (0, 16, 64) if norm else (0, 16):
            args, kw = qkv_case(M, H, G, K, torch.bfloat16, R, norm)
            grads = [rand(M, n, K) for n in (H, G, G)]
            forward_bytes = 4 * M * K * (H + G + (G if R else 0))
            backward_bytes = 4 * M * K * (H + 2 * G) + (2 * M * K * (H + G) if norm else 0)
            for elements, warps, per in (
                (1024, 4, 4),
                (1024, 4, 8),
                (1024, 4, 2),
                (2048, 4, 4),
                (2048, 8, 4),
                (2048, 4, 8),
                (4096, 8, 4),
            ):
                kq._PLAIN_TILE_ELEMENTS = kq._UPDATE_TILE_ELEMENTS = elements
                kq._NUM_WARPS, kq._HEADS_PER_PROGRAM = warps, per
                label = f"norm={norm} R={R} {elements} elements, {warps} warps, {per} heads"
                timed(f"qk_rope {label}", lambda: qk_rope(*args, **kw), forward_bytes)
                timed(
                    f"qk_rope_backward in place {label}",
                    lambda: qk_rope_backward(*grads, *args, **kw, out=args[0]),
                    backward_bytes,
                )


if __name__ == "__main__":
    with torch.no_grad():
        if not SMALL:
            print(torch.cuda.get_device_name(), torch.__version__)
        parity()
        speed()
