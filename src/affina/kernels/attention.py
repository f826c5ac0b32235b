"""Causal attention of packed documents as two plain functions, forward and backward, without autograd.

Legend: T tokens of the row, S documents, L tokens of one document, B documents of one batch, H query heads, G key/value
heads, R = H / G query heads that share a key head, K head dim, w sliding window (∞ without one).

**Forward.** For query t and key u of the same document, u ≤ t and t − u < w,

    S_tu = scale · q_t · k_u        lse_t = log Σ_u exp(S_tu)        P_tu = exp(S_tu − lse_t)        y_t = Σ_u P_tu v_u

Output and log-sum-exp are kept: with them the backward pass needs no softmax of its own.

**Backward.** Let g_t = ∂loss/∂y_t. From y_t = Σ_u P_tu v_u,

    ∂v_u = Σ_t P_tu g_t                         ∂P_tu = g_t · v_u

The softmax's Jacobian is ∂P_tu/∂S_tx = P_tu (δ_ux − P_tx), so

    ∂S_tu = P_tu (∂P_tu − D_t)                  D_t = Σ_x P_tx ∂P_tx = Σ_x P_tx (g_t · v_x) = g_t · y_t

The sum over keys in D_t collapses to a product of two rows of length K that exist already. Finally

    ∂q_t = scale · Σ_u ∂S_tu k_u                ∂k_u = scale · Σ_t ∂S_tu q_t

and a key head's gradients are summed over the R query heads that share it. Seven products of L · L · K / 2 terms in
all (two forward, five backward), nothing of size L × L kept: Dao, *FlashAttention-2*, arXiv:2307.08691, §3.1, appendix
B of arXiv:2205.14135. Softmax, log-sum-exp and D are float32 (float64 for float64 inputs).

**Backends.** Each is deterministic unless said otherwise.

*reference*: any device and type. On a CPU a document is one call of ATen's blocked kernel, which takes G < H as it is
(torch ≥ 2.9) and any strides, so that documents are views of the row and only results are copied. A call costs 10 to
30 µs before it computes anything, so documents of at most 16 tokens are gathered into batches whose lengths are
multiples of 8. What stands behind a document's end in such a batch needs no mask: no real query sees a later key, and
the gradient there is zero, hence ∂S = 0 in those rows.
Milliseconds of forward + backward against the autograd path through `packed_attention`, T = 2,048, H = 4, G = 2, K =
64, float32, one thread of an EPYC core, best of 25 (`bench/attention.py --cpu`): documents of 20–120 tokens 15.1 and
16.4, of 4–16 tokens 9.2 and 15.3, of 200–300 27.0 and 28.7, one document 123.1 and 125.6. Nearly all of it is ATen's
kernel, at 50–80 GFLOP/s of the core's 95. Tried and dropped: longer documents in bins, and whole bins as two batched
products around a softmax (no faster from 20 tokens on, and the weights must be kept).
Rows with documents longer than the window, and other devices, run by the formulas above in blocks of query rows.

*flash*: FlashAttention-2 on `cu_seqlens`; 16 bits, sm ≥ 80, K ≤ 256 and a multiple of 8. The kernel takes G < H as it
is; that torch 2.11's `varlen_attn` refuses it is a check of that function alone. Without
`torch.use_deterministic_algorithms(True)` ∂q is summed with atomics; with it, in ⌈SMs / (S · H)⌉ separate float32
buffers. The backward pass allocates such buffers of (T + 128 · S) · H · K and, if G < H, 2 · T · H · K of the input's
type; the kernels launch in proportion to ⌈max_seqlen / 128⌉ · S · H blocks, of which those behind a document's end
return at once. So S and `max_seqlen` should not be larger than needed; else empty documents cost nothing.

*triton*: our own kernels (`affina.kernels.triton.attention`); 16 bits, sm ≥ 80, K ≤ 256 and a multiple of 8. No
atomics, so always deterministic: ∂q by one kernel, ∂k and ∂v by another, seven products in the backward pass instead of
five. It launches ⌊T / block⌋ + S blocks per head whatever the documents' lengths, takes G < H as it is, and allocates
nothing but the gradients and 8 bytes per row and head. A document sees nothing of its neighbours while they are finite.

*cudnn*: documents of one length are a dense batch: views, no copies, except that v is made contiguous for the backward
pass when it is a strided view (newer torch demands that ∂v has the strides of v). 16 bits, sm ≥ 80, K ≤ 128 and a
multiple of 8. **Not deterministic**: torch does not ask cuDNN for its deterministic backward algorithm, whatever
`torch.use_deterministic_algorithms` says, so `choose_backend` never takes it when that is on. Not for documents of
different lengths: torch's backward pass on ragged offsets is wrong before the fix of pytorch#186142 (it takes K for the
longest document and writes past its workspace).

**CUDA graphs.** Nothing waits for the device: with flash and cudnn the host needs `max_seqlen` and, for dense batches,
`uniform_length`. A fixed S is reached by repeating T at the end of `cu_seqlens` (empty documents). Bounds must cover
the row: rows of no document get no gradient at all, not zeros (pytorch#176793). cuDNN makes its plan for a shape at
the first call on a thread, which must not be the captured one.

Index width: offsets are 64-bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import Final

import torch
from torch import Tensor

from affina.kernels.dispatch import use_triton

BACKENDS: Final = ("reference", "triton", "flash", "cudnn")

SHORTEST_DENSE_CUDNN: Final[dict[int, int]] = {9: 2048, 10: 1024}
"""Compute capability (major) → the document length from which a dense batch runs on cuDNN, where bits may differ.

Measured on an H200, forward + backward in ms, H = 32, G = 8, K = 128, 16,384 tokens: documents of 2,048: Triton 2.36,
cuDNN 2.29, flash 3.81; one of 16,384: cuDNN 14.3, flash 24.1. On 10.0 torch itself prefers cuDNN (pytorch#149282)."""

_LONGEST_GATHERED = 16
_GATHER_MULTIPLE = 8
_ROWS_OF_A_BIN = 256
_SCORE_BYTES_CPU = 32 * 1024 * 1024
_SCORE_BYTES_ACCELERATOR = 256 * 1024 * 1024

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Where the documents of a row of T tokens begin and end.

    cu_seqlens:     [S+1] int32 on the row's device, from 0 to T; empty documents (equal neighbours) are allowed
    max_seqlen:     an upper bound of the documents' lengths; tight is faster
    lengths:        the lengths of the documents that are not empty, or None where the host does not know them
    uniform_length: L when all documents that are not empty have L tokens
    """

    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] | None = None
    uniform_length: int | None = None
    _work_lists: dict[tuple[int, int, bool], tuple[int, Tensor]] = field(init=False, repr=False, default_factory=dict)

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Tensor, *, max_seqlen: int, lengths: tuple[int, ...] | None = None
    ) -> Segments:
        """Segments from bounds and, where they are known, host-side lengths (zeros are dropped). Never waits."""
        assert cu_seqlens.dtype == torch.int32, f"cu_seqlens must be int32, is {cu_seqlens.dtype}"
        assert cu_seqlens.dim() == 1, f"cu_seqlens must be [S+1], is {list(cu_seqlens.shape)}"
        assert max_seqlen >= 1, f"max_seqlen is {max_seqlen}"
        if lengths is None:
            return cls(cu_seqlens, max_seqlen)
        assert len(lengths) < cu_seqlens.shape[0], f"{len(lengths)} lengths for {cu_seqlens.shape[0] - 1} documents"
        lengths = tuple(length for length in lengths if length > 0)
        assert max(lengths, default=0) <= max_seqlen, f"a document has {max(lengths)} tokens, max_seqlen {max_seqlen}"
        return cls(cu_seqlens, max_seqlen, lengths, lengths[0] if len(set(lengths)) == 1 else None)

    def host_lengths(self) -> tuple[int, ...]:
        """`lengths`, or the differences of `cu_seqlens`, for which the host waits."""
        if self.lengths is not None:
            return self.lengths
        return tuple(end - start for start, end in pairwise(self.cu_seqlens.tolist()) if end > start)

    @property
    def num_documents(self) -> int:
        """S, empty documents counted."""
        return self.cu_seqlens.shape[0] - 1

    def work_list(self, num_tokens: int, block: int) -> Tensor:
        """[⌊T / block⌋ + S, 4] int32, the work list of the Triton kernels, made once for all layers of a row.

        Made again when `cu_seqlens` was written to. A list made while a CUDA graph is captured is part of the graph:
        replays make it from the bounds of the moment, for the pass that is captured and for those captured after it
        (the backward pass in a second graph). Two graphs that are replayed independently need two `Segments`.
        """
        from affina.kernels.triton import attention as kernel

        bounds = self.cu_seqlens
        is_captured = bounds.is_cuda and torch.cuda.is_current_stream_capturing()
        version = 0 if is_captured or bounds.is_inference() else bounds._version
        known = self._work_lists.get((num_tokens, block, is_captured))
        if known is not None and known[0] == version and (is_captured or not bounds.is_inference()):
            return known[1]
        work = kernel.work_list(bounds, num_tokens, block)
        self._work_lists[num_tokens, block, is_captured] = (version, work)
        return work


@dataclass(frozen=True, slots=True, eq=False)
class AttentionResult:
    """What the forward pass keeps for the backward pass.

    output:  [T, H, K] contiguous
    lse:     float32 (float64) log-sum-exp in the backend's layout: [T, H] reference and triton, [H, T] flash,
             [B, H, L, 1] cudnn
    saved:   the backend's random state, which its backward operator wants although nothing is dropped
    backend: which one it was
    """

    output: Tensor
    lse: Tensor
    saved: tuple[Tensor, ...]
    backend: str

    def of_heads(self, heads: slice) -> AttentionResult:
        """What attention of these query heads alone, and of the key heads that they share, would have kept; a copy."""
        lse = self.lse[heads] if self.backend == "flash" else self.lse[:, heads]
        return AttentionResult(self.output[:, heads].contiguous(), lse.contiguous(), self.saved, self.backend)


@torch.no_grad()
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
    backend: str = "auto",
) -> AttentionResult:
    """Causal attention of each document with itself.

    q:       [T, H, K]
    k, v:    [T, G, K], H a multiple of G; each may be a view with a larger row stride
    window:  a token sees itself and the `window` − 1 tokens before it; None: the whole document
    backend: "auto" (`choose_backend`) or one of `BACKENDS`; `why_not` must have no objection to it
    """
    _check_shapes(q, k, v, segments)
    window = _effective_window(window, segments)
    if backend == "auto":
        backend = choose_backend(q, v, segments, window)
    objection = why_not(backend, q, v, segments, window)
    assert objection is None, f"attention backend {backend}: {objection}"
    assert backend == "reference" or _is_aligned(k), f"attention backend {backend}: unaligned keys, {k.stride()}"
    if backend == "reference":
        return _reference_forward(q, k, v, segments, scale, window)
    if backend == "triton":
        return _triton_forward(q, k, v, segments, scale, window)
    if backend == "flash":
        return _flash_forward(q, k, v, segments, scale, window)
    assert segments.uniform_length is not None, "why_not lets no other document through"
    return _cudnn_forward(q, k, v, segments.uniform_length, scale)


@torch.no_grad()
def attention_backward(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: AttentionResult,
    segments: Segments,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H, K], [T, G, K], [T, G, K]: the gradients of q, k and v, contiguous, in their types.

    grad_output: [T, H, K]
    the rest:    exactly what `attention` got and gave
    """
    assert grad_output.shape == q.shape, f"gradient {list(grad_output.shape)} of an output {list(q.shape)}"
    window = _effective_window(window, segments)
    grad_output = grad_output.contiguous()
    if result.backend == "reference":
        return _reference_backward(grad_output, q, k, v, result, segments, scale, window)
    if result.backend == "triton":
        return _triton_backward(grad_output, q, k, v, result, segments, scale, window)
    if result.backend == "cudnn":
        assert segments.uniform_length is not None
        return _cudnn_backward(grad_output, q, k, v, result, segments.uniform_length, scale)
    return _flash_backward(grad_output, q, k, v, result, segments, scale, window)


def choose_backend(q: Tensor, v: Tensor, segments: Segments, window: int | None = None) -> str:
    """The backend `attention` takes by itself: the fastest one that is known to be right.

    1. Where bits may differ from run to run, dense batches: cuDNN from the length in `SHORTEST_DENSE_CUDNN`.
    2. Triton on Hopper, or where deterministic algorithms are demanded. Measured on an H200, forward + backward in ms:
       documents of log-normal lengths, median 300, in 16,384 tokens: Triton 0.95, flash 2.00, flash deterministic 2.16.
    3. Flash.
    4. The reference where none runs: CPUs, float32, cards before Ampere, odd head dims, AMD.
    """
    window = _effective_window(window, segments)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    order = ["flash"]
    if is_deterministic or (q.device.type == "cuda" and _capability(q.device)[0] == 9):
        order.insert(0, "triton")
    if not is_deterministic and _prefers_cudnn(q, segments):
        order.insert(0, "cudnn")
    return next((name for name in order if why_not(name, q, v, segments, window) is None), "reference")


def _prefers_cudnn(q: Tensor, segments: Segments) -> bool:
    if segments.uniform_length is None or q.device.type != "cuda":
        return False
    shortest = SHORTEST_DENSE_CUDNN.get(_capability(q.device)[0])
    return shortest is not None and segments.uniform_length >= shortest


def why_not(backend: str, q: Tensor, v: Tensor, segments: Segments, window: int | None = None) -> str | None:
    """What keeps `backend` from these inputs, in words, or None. The reference takes everything."""
    assert backend in BACKENDS, f"unknown attention backend {backend!r}"
    if backend == "reference":
        return None
    on_cuda = q.device.type == "cuda" and torch.version.hip is None
    if backend == "triton" and not use_triton(q):
        return "Triton is not installed" if on_cuda else "it needs a CUDA device"
    if not on_cuda and backend != "triton":
        return "it needs a CUDA device"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in 16 bits, the inputs are {q.dtype}"
    if on_cuda and _capability(q.device) < (8, 0):
        return f"it needs compute capability 8.0 (Ampere), the device has {_capability(q.device)}"
    head_dim, widest = q.shape[-1], 128 if backend == "cudnn" else 256
    if head_dim % 8 != 0 or head_dim > widest:
        return f"it needs a head dim that is a multiple of 8 and at most {widest}, this one is {head_dim}"
    if not (_is_aligned(q) and _is_aligned(v)):
        return "it needs contiguous rows that begin at multiples of 16 bytes"
    if backend == "triton" and not (_has_joined_heads(q) and _has_joined_heads(v)):
        return "it needs the heads of a token side by side"
    if backend == "cudnn" and _effective_window(window, segments) is not None:
        return "torch gives cuDNN no sliding window"
    if backend == "cudnn" and segments.uniform_length is None:
        return "torch's cuDNN backward pass is wrong for documents of different lengths"
    if backend == "cudnn" and segments.uniform_length == 1:
        return "cuDNN has no causal attention of single tokens"
    return None


def _has_joined_heads(tensor: Tensor) -> bool:
    """Whether the heads of a token lie side by side: [T, heads, K] with any row stride."""
    return tensor.shape[1] == 1 or tensor.stride(1) == tensor.shape[2]


def _is_aligned(tensor: Tensor) -> bool:
    """Whether every row of a 16-bit tensor is contiguous from a multiple of 16 bytes on (its storage always is).

    With other rows the kernels fault, or compute wrong numbers in silence (pytorch#194818).
    """
    offsets = (tensor.storage_offset(), *tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and all(offset % 8 == 0 for offset in offsets)


@lru_cache(maxsize=8)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> None:
    tokens, heads, width = q.shape
    groups = k.shape[1]
    assert k.shape == v.shape == (tokens, groups, width), f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    assert heads % groups == 0, f"{heads} query heads over {groups} key/value heads"
    assert segments.lengths is None or sum(segments.lengths) == tokens, f"{segments.lengths} in a row of {tokens}"


def _effective_window(window: int | None, segments: Segments) -> int | None:
    """None when no document is longer than the window."""
    assert window is None or window >= 1, f"a window of {window}"
    longest = segments.max_seqlen if segments.lengths is None else max(segments.lengths, default=1)
    return None if window is None or window >= longest else window


# ------------------------------------------------------------------------------------------------ Triton


def _triton_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None
) -> AttentionResult:
    from affina.kernels.triton import attention as kernel

    assert scale > 0, f"attention backend triton: a scale of {scale}"
    assert _has_joined_heads(k), f"attention backend triton: heads of keys apart, {k.stride()}"
    num_tokens, repeats = q.shape[0], q.shape[1] // k.shape[1]
    tile = kernel.tiles_for(q).forward
    work = segments.work_list(num_tokens, tile.tokens(repeats))
    output, lse = kernel.forward(q, k, v, work, scale=scale, window=window, tile=tile)
    return AttentionResult(output, lse, (), "triton")


def _triton_backward(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: AttentionResult,
    segments: Segments,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from affina.kernels.triton import attention as kernel

    num_tokens, repeats = q.shape[0], q.shape[1] // k.shape[1]
    tiles = kernel.tiles_for(q)
    grad_q, statistics = kernel.backward_queries(
        grad_output,
        q,
        k,
        v,
        result.output,
        result.lse,
        segments.work_list(num_tokens, tiles.queries.tokens(repeats)),
        scale=scale,
        window=window,
        tile=tiles.queries,
        key_heads=tiles.keys.heads(repeats),
    )
    key_work = segments.work_list(num_tokens, tiles.keys.keys)
    grad_k, grad_v = kernel.backward_keys(
        grad_output, q, k, v, statistics, key_work, scale=scale, window=window, tile=tiles.keys
    )
    return grad_q, grad_k, grad_v


# ------------------------------------------------------------------------------------------------ flash


def _flash_window(window: int | None) -> tuple[bool, int]:
    """(is_causal, window_size_left): the kernel counts the tokens to the left of the query's own.

    It knows two modes, causal and local; the local one with nothing to the right is causal as well.
    """
    return (True, -1) if window is None else (False, window - 1)


def _flash_max_seqlen(segments: Segments) -> int:
    """At least 2: at 1 the kernel swaps heads and queries, which assumes that no document is empty."""
    return max(segments.max_seqlen, 2)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None
) -> AttentionResult:
    is_causal, left = _flash_window(window)
    bounds, longest = segments.cu_seqlens, _flash_max_seqlen(segments)
    output, lse, rng_state, unused, _ = _aten._flash_attention_forward(
        q.contiguous(),  # the output takes the strides of q
        k,
        v,
        bounds,
        bounds,
        longest,
        longest,
        0.0,  # dropout_p
        is_causal,
        False,  # return_debug_mask
        scale=scale,
        window_size_left=left,
        window_size_right=0,
    )
    return AttentionResult(output, lse, (rng_state, unused), "flash")


def _flash_backward(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: AttentionResult,
    segments: Segments,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    is_causal, left = _flash_window(window)
    bounds, longest = segments.cu_seqlens, _flash_max_seqlen(segments)
    rng_state, unused = result.saved
    grad_q, grad_k, grad_v = _aten._flash_attention_backward(
        grad_output,
        q,
        k,
        v,
        result.output,
        result.lse,
        bounds,
        bounds,
        longest,
        longest,
        0.0,  # dropout_p
        is_causal,
        rng_state,
        unused,
        scale=scale,
        window_size_left=left,
        window_size_right=0,
    )
    return grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()


# ------------------------------------------------------------------------------------------------ cuDNN


def _as_batch(tensor: Tensor, length: int) -> Tensor:
    """[B, heads, L, K] view of a [T, heads, K] row of equal documents."""
    return torch.unflatten(tensor, 0, (-1, length)).transpose(1, 2)


def _as_row(batch: Tensor) -> Tensor:
    """[T, heads, K] contiguous from [B, heads, L, K]; a view where the memory already lies so."""
    return batch.transpose(1, 2).flatten(0, 1).contiguous()


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> AttentionResult:
    output, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
        _as_batch(q.contiguous(), length),  # the output takes the strides of q
        _as_batch(k, length),
        _as_batch(v, length),
        None,  # attn_bias
        True,  # compute_log_sumexp
        0.0,  # dropout_p
        True,  # is_causal
        False,  # return_debug_mask
        scale=scale,
    )
    return AttentionResult(_as_row(output), lse, (seed, offset), "cudnn")


def _cudnn_backward(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, result: AttentionResult, length: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    seed, offset = result.saved
    gradients = _aten._scaled_dot_product_cudnn_attention_backward(
        _as_batch(grad_output, length),
        _as_batch(q.contiguous(), length),
        _as_batch(k.contiguous(), length),
        _as_batch(v.contiguous(), length),
        _as_batch(result.output, length),
        result.lse,
        seed,
        offset,
        None,  # attn_bias
        None,  # cum_seq_q: a dense batch
        None,  # cum_seq_k
        length,
        length,
        0.0,  # dropout_p
        True,  # is_causal
        scale=scale,
    )
    grad_q, grad_k, grad_v = gradients
    return _as_row(grad_q), _as_row(grad_k), _as_row(grad_v)


# ------------------------------------------------------------------------------------------------ reference


@dataclass(frozen=True, slots=True, eq=False)
class _Bin:
    """Short documents from anywhere in the row, padded behind their ends to one length.

    slots: [B · length] int64, the row of each slot; slots behind a document's end repeat its last row
    rows:  [N] int64, all rows of these documents
    real:  [N] int64, the slots of those rows
    """

    length: int
    slots: Tensor
    rows: Tensor
    real: Tensor

    def gather(self, row: Tensor) -> Tensor:
        """[B, heads, length, …] of [T, heads, …]."""
        return torch.unflatten(row.index_select(0, self.slots), 0, (-1, self.length)).transpose(1, 2)

    def gather_gradient(self, row: Tensor) -> Tensor:
        """`gather` with zeros behind the documents' ends."""
        padded = row.new_zeros(self.slots.shape[0], *row.shape[1:])
        padded.index_copy_(0, self.real, row.index_select(0, self.rows))
        return torch.unflatten(padded, 0, (-1, self.length)).transpose(1, 2)

    def scatter(self, batch: Tensor, row: Tensor) -> None:
        """Write the real slots of [B, heads, length, …] to `row` [T, heads, …]."""
        row.index_copy_(0, self.rows, batch.transpose(1, 2).flatten(0, 1).index_select(0, self.real))


@lru_cache(maxsize=16)
def _plan(lengths: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[_Bin, ...]]:
    """The documents that run alone (their indices) and the bins of the others; made once for all layers of a batch."""
    starts = list(accumulate(lengths, initial=0))
    members: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        members.setdefault(-(-length // _GATHER_MULTIPLE) * _GATHER_MULTIPLE, []).append(index)
    alone: list[int] = []
    bins: list[_Bin] = []
    for length, indices in members.items():
        count = _ROWS_OF_A_BIN // length if length <= _LONGEST_GATHERED else 1
        for group in (indices[first : first + count] for first in range(0, len(indices), count)):
            if len(group) == 1:
                alone += group
            else:
                bins.append(_make_bin([starts[index] for index in group], [lengths[index] for index in group], length))
    return tuple(alone), tuple(bins)


def _make_bin(starts: list[int], lengths: list[int], length: int) -> _Bin:
    first, own_length = torch.tensor(starts).unsqueeze(1), torch.tensor(lengths).unsqueeze(1)
    position = torch.arange(length).unsqueeze(0)
    slots = (first + torch.minimum(position, own_length - 1)).flatten()
    real = (position < own_length).flatten().nonzero().squeeze(1)
    return _Bin(length, slots, slots.index_select(0, real), real)


def _by_document(
    operator: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    segments: Segments,
    gradient: Tensor | None = None,
) -> None:
    """Run `operator` on batches of documents and write what it returns to `results`.

    inputs, results: [T, heads, …] rows; the operator takes and returns [B, heads, L, …]
    gradient:        a row that the operator takes before the inputs, or None
    """
    rows = inputs if gradient is None else (gradient, *inputs)
    length = segments.uniform_length
    if length is not None:
        for result, part in zip(results, operator(*(_as_batch(row, length) for row in rows)), strict=True):
            _as_batch(result, length).copy_(part)
        return
    lengths = segments.host_lengths()
    alone, bins = _plan(lengths)
    documents = [_split(row, lengths) for row in rows] if alone else []
    targets = [_split(result, lengths) for result in results] if alone else []
    for index in alone:
        for views, part in zip(targets, operator(*(views[index] for views in documents)), strict=True):
            views[index].copy_(part)
    for group in bins:
        padded = [group.gather(row) for row in inputs]
        if gradient is not None:
            padded.insert(0, group.gather_gradient(gradient))
        for result, part in zip(results, operator(*padded), strict=True):
            group.scatter(part, result)


def _split(row: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """[1, heads, L, …] views of the documents of [T, heads, …]. One split is much cheaper than S slices."""
    return torch.split(row.transpose(0, 1).unsqueeze(0), list(lengths), dim=2)


def _reference_forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None
) -> AttentionResult:
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=_accumulation_type(q), device=q.device)
    if q.device.type == "cpu" and window is None:
        forward = _aten._scaled_dot_product_flash_attention_for_cpu
        _by_document(partial(forward, is_causal=True, scale=scale), (q, k, v), (output, lse), segments)
    else:
        for rows in _documents(segments):
            output[rows], lse[rows] = _forward_by_definition(q[rows], k[rows], v[rows], scale, window)
    return AttentionResult(output, lse, (), "reference")


def _reference_backward(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: AttentionResult,
    segments: Segments,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    inputs = (q, k, v, result.output, result.lse)
    if q.device.type == "cpu" and window is None:
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        operator = partial(backward, dropout_p=0.0, is_causal=True, scale=scale)
        _by_document(operator, inputs, (grad_q, grad_k, grad_v), segments, grad_output)
    else:
        for rows in _documents(segments):
            document = [tensor[rows] for tensor in (grad_output, *inputs)]
            grad_q[rows], grad_k[rows], grad_v[rows] = _backward_by_definition(*document, scale=scale, window=window)
    return grad_q, grad_k, grad_v


def _documents(segments: Segments) -> Iterator[slice]:
    """The rows of each document."""
    return (slice(start, end) for start, end in pairwise(accumulate(segments.host_lengths(), initial=0)))


def _accumulation_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _forward_by_definition(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """[L, H, K] output and [L, H] log-sum-exp of one document, block by block of query rows."""
    heads, groups = q.shape[1], k.shape[1]
    keys, values = (_by_head(tensor, groups) for tensor in (k, v))
    outputs, logs = [], []
    for rows, seen in _blocks(q, window):
        scores = _scores(_by_head(q[rows], groups), keys[:, seen], rows, seen, scale, window)
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        weights = scores.sub_(lse).exp_()
        outputs.append(_by_token(weights @ values[:, seen], heads))
        logs.append(_by_token(lse, heads).squeeze(-1))
    return torch.cat(outputs), torch.cat(logs)


def _backward_by_definition(
    grad_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[L, H, K], [L, G, K], [L, G, K] float32: the gradients of one document's q, k and v."""
    heads, groups = q.shape[1], k.shape[1]
    keys, values = (_by_head(tensor, groups) for tensor in (k, v))
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    grad_queries = []
    for rows, seen in _blocks(q, window):
        queries, grads, outputs = (_by_head(tensor[rows], groups) for tensor in (q, grad_output, output))
        scores = _scores(queries, keys[:, seen], rows, seen, scale, window)
        weights = scores.sub_(_by_head(lse[rows].unsqueeze(-1), groups)).exp_()
        grad_values[:, seen] += weights.transpose(1, 2) @ grads
        mean = (grads * outputs).sum(dim=-1, keepdim=True)
        grad_scores = (grads @ values[:, seen].transpose(1, 2)).sub_(mean).mul_(weights).mul_(scale)
        grad_queries.append(_by_token(grad_scores @ keys[:, seen], heads))
        grad_keys[:, seen] += grad_scores.transpose(1, 2) @ queries
    return torch.cat(grad_queries), grad_keys.transpose(0, 1), grad_values.transpose(0, 1)


def _blocks(q: Tensor, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Query rows of one block and the keys that any of them sees; a block's scores stay below a fixed size."""
    length, heads = q.shape[:2]
    budget_bytes = _SCORE_BYTES_CPU if q.device.type == "cpu" else _SCORE_BYTES_ACCELERATOR
    widest = length if window is None else min(length, 2 * window)
    num_rows = max(16, budget_bytes // (4 * heads * widest))
    if window is not None:
        num_rows = max(16, min(num_rows, window))
    for start in range(0, length, num_rows):
        end = min(start + num_rows, length)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, end), slice(first, end)


def _scores(queries: Tensor, keys: Tensor, rows: slice, seen: slice, scale: float, window: int | None) -> Tensor:
    """[G, R · rows, seen] scaled scores, −∞ where a query does not see the key."""
    scores = (queries @ keys.transpose(1, 2)).mul_(scale)
    query = torch.arange(rows.start, rows.stop, device=queries.device)
    key = torch.arange(seen.start, seen.stop, device=queries.device)
    distance = query.unsqueeze(1) - key.unsqueeze(0)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    torch.unflatten(scores, 1, (-1, len(query))).masked_fill_(hidden, float("-inf"))
    return scores


def _by_head(tensor: Tensor, groups: int) -> Tensor:
    """[G, R · L, K] of [L, H, K] in the accumulation type: all query heads of a key head in one product's rows."""
    length, heads, width = tensor.shape
    split = torch.unflatten(tensor.to(_accumulation_type(tensor)), 1, (groups, heads // groups))
    return split.permute(1, 2, 0, 3).reshape(groups, heads // groups * length, width)


def _by_token(tensor: Tensor, heads: int) -> Tensor:
    """[L, H, K] of [G, R · L, K]."""
    groups = tensor.shape[0]
    return torch.unflatten(tensor, 1, (heads // groups, -1)).permute(2, 0, 1, 3).flatten(1, 2)
