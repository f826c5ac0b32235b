"""The layers' forward and backward pass as two CUDA graphs, replayed for every packed row of the same shape.

A micro-step of a 36-layer decoder is some two thousand launches. The host needs 10 µs or more for each, the device as
little as that for many of them, so at small rows the device waits. A graph is launched once.

Static are the row's length, the number of entries of `cu_seqlens` (padded with empty documents) and the bound on a
document's length. The head stays outside, since the number of supervised tokens differs from row to row; it is a few
launches per chunk of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from affina.catalog.save_policy import Keep, SavePolicy
from affina.kernels.attention import Segments
from affina.models.fast.decoder import Decoder
from affina.models.fast.layer import Pending, RowContext

_WARMUP_RUNS = 2
_TOKENS_PER_DOCUMENT = 128
_SHORTEST_BOUND = 2048
MAX_GRAPHS = 4


@dataclass(frozen=True, slots=True)
class RowShape:
    """What must be equal for a graph to serve a row. num_bounds: entries of cu_seqlens, padded."""

    num_tokens: int
    num_bounds: int
    max_seqlen: int
    uniform_length: int | None

    @classmethod
    def of(cls, segments: Segments, num_tokens: int) -> RowShape:
        """Rounded up so that few shapes serve many rows, most often one: an empty document costs next to nothing."""
        num_documents = len(segments.cu_seqlens) - 1
        if segments.uniform_length is not None:
            return cls(num_tokens, num_documents + 1, segments.max_seqlen, segments.uniform_length)
        step = max(16, num_tokens // _TOKENS_PER_DOCUMENT)
        longest = max(_SHORTEST_BOUND, 1 << (segments.max_seqlen - 1).bit_length())
        return cls(num_tokens, -(-num_documents // step) * step + 1, min(num_tokens, longest), None)


class GraphedRow:
    """The two graphs of one row shape, with their inputs and outputs at fixed addresses."""

    def __init__(
        self,
        decoder: Decoder,
        policy: SavePolicy,
        shape: RowShape,
        input_ids: Tensor,
        row: RowContext,
        pool: Any,
        stream: torch.cuda.Stream,
    ) -> None:
        self._decoder = decoder
        self._input_ids = input_ids.clone()
        self._row = RowContext(
            Segments(_padded(row.segments.cu_seqlens, shape), shape.max_seqlen, None, shape.uniform_length),
            row.cos.clone(),
            row.sin.clone(),
            row.flat,
        )
        self._num_replays = 0
        self._capture(policy, pool, stream)

    def forward(self, input_ids: Tensor, row: RowContext) -> tuple[Pending, int]:
        """(output of the last layer, valid until the next forward pass; a ticket for `backward`)."""
        self._input_ids.copy_(input_ids)
        self._row.cos.copy_(row.cos)
        self._row.sin.copy_(row.sin)
        bounds = self._row.segments.cu_seqlens
        count = row.segments.cu_seqlens.shape[0]
        bounds[:count].copy_(row.segments.cu_seqlens)
        bounds[count:].fill_(input_ids.shape[0])
        self._forward_graph.replay()
        self._num_replays += 1
        return self._last, self._num_replays

    def backward(self, grad: Tensor, ticket: int) -> Tensor:
        """∂last [T, D + R] → [P] gradient of the flat adapter, a copy."""
        if ticket != self._num_replays:
            raise RuntimeError("a captured forward pass ran again before the backward pass of the one before it")
        self._num_replays += 1
        self._grad.copy_(grad)
        self._backward_graph.replay()
        return self._gradient.clone()

    def _capture(self, policy: SavePolicy, pool: Any, stream: torch.cuda.Stream) -> None:
        decoder, row = self._decoder, self._row
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # What is set up at the first call (compiled kernels, plans of cuDNN) must exist before the capture. Done at
            # a lean level, so that it needs no second set of activations beside that of rows captured before.
            lean = SavePolicy.uniform(decoder.spec.num_layers, Keep.INPUT)
            for _ in range(_WARMUP_RUNS):
                last, saved = decoder.forward(self._input_ids, row, lean)
                decoder.backward(decoder.new_stream(last.x.shape[0], last.x).zero_(), saved, row)
                del last, saved
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._forward_graph, self._backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward_graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._last, saved = decoder.forward(self._input_ids, row, policy)
        self._grad = decoder.new_stream(self._last.x.shape[0], self._last.x)
        with torch.cuda.graph(self._backward_graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._gradient = decoder.backward(self._grad, saved, row)


class RowGraphs:
    """Captured rows by shape. `note` is told once why something is not captured.

    All share one pool of memory: a row's activations are spent before the next row's forward pass begins. They are
    captured on one stream, since memory that was freed on one stream is not given out on another.
    """

    def __init__(self, decoder: Decoder, note: Callable[[str], None]) -> None:
        self._decoder = decoder
        self._note = note
        self.captured: dict[RowShape, GraphedRow] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._refused = False

    def row(self, policy: SavePolicy, input_ids: Tensor, row: RowContext) -> GraphedRow | None:
        """The graphs for a row of this shape, captured now if need be; None: run it launch by launch."""
        if self._refused:
            return None
        if min(policy.layers) <= Keep.OFFLOADED:
            self._refuse("inputs of layers are in host memory")
            return None
        shape = RowShape.of(row.segments, input_ids.shape[0])
        if shape not in self.captured:
            if len(self.captured) >= MAX_GRAPHS:
                self._refuse(f"rows have more than {MAX_GRAPHS} shapes")
                return None
            if self._pool is None or self._stream is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            try:
                self.captured[shape] = GraphedRow(
                    self._decoder, policy, shape, input_ids, row, self._pool, self._stream
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._refuse(f"capture failed: {str(error).splitlines()[0]}")
                return None
        return self.captured[shape]

    def clear(self) -> None:
        """Drop all graphs and their memory, as a change of the save policy requires."""
        self.captured.clear()
        self._pool = None
        self._refused = False

    def _refuse(self, reason: str) -> None:
        self._refused = True
        self.captured.clear()
        self._note(f"no CUDA graphs ({reason}): every operation is launched by itself")


def _padded(cu_seqlens: Tensor, shape: RowShape) -> Tensor:
    bounds = cu_seqlens.new_full((shape.num_bounds,), shape.num_tokens)
    bounds[: cu_seqlens.shape[0]] = cu_seqlens
    return bounds
