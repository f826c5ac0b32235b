"""All adapter parameters in one flat float32 buffer, of which PEFT's parameters are views.

One buffer makes clipping, the optimiser and the cast to 16 bits one launch each instead of hundreds, and PEFT still
owns what it owns: its modules see, save, load and merge the same memory.

In 16 bits the computation sees A' = √s A and B' = √s B, with s the adapter's scale. Then the update is t' B'ᵀ without a
factor, and the gradients of A and B are √s times those of A' and B': one factor on the loss's gradient, instead of one
on every product. (Adapters of different scales keep their factors.)

The order follows the products of a layer. Matrices A of projections with a common input (q, k, v; gate, up) lie one
after the other, so that their concatenation, [Σ R, in], is a view as well and x Aᵀ is one product for all of them:

    A_q A_k A_v  B_q  B_k  B_v | A_o  B_o | A_gate A_up  B_gate  B_up | A_down  B_down | next layer

Where memory is short the buffer lies in the host's, pinned (`on_host`): what the optimiser adds to it, gradients and
moments, is then there as well, and the device holds one layer's matrices at a time, for which they come and go. For
Qwen3-4B at rank 16 that is 595 MB of the device's memory, and 264 MB over the bus in the forward and backward pass of a
row, 132 MB more for the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

GROUPS_PER_LAYER = 4
"""q, k, v; o; gate, up; down."""
_ALIGNMENT = 64
"""Elements. Every matrix starts at a multiple of 128 bytes in 16 bits: what vector loads and matrix units want."""


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The adapter of one projection, as PEFT holds it.

    a: [R, in] float32     b: [out, R] float32     scale: s of W + s · B A
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class FlatPart:
    """Elements of a flat buffer from `start` on, on the computing device: of the adapter, or of its gradient.

    Views are made once: every layer asks for each matrix several times a pass, and where operations are launched one by
    one, it is the host that a step waits for.
    """

    values: Tensor
    start: int = 0
    _views: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def matrix(self, offset: int, rows: int, columns: int) -> Tensor:
        """[rows, columns] view of what begins at element `offset` of the flat buffer."""
        view = self._views.get((offset, rows, columns))
        if view is None:
            begin = offset - self.start
            view = self.values[begin : begin + rows * columns].view(rows, columns)
            self._views[offset, rows, columns] = view
        return view


@dataclass(frozen=True, slots=True)
class PairSlice:
    """Where the adapter of one projection lies in the flat buffer, and among its group's ranks."""

    rank: int
    scale: float
    ranks: slice
    b_offset: int
    num_outputs: int

    def b(self, flat: FlatPart) -> Tensor:
        """[out, R] view of `flat`."""
        return flat.matrix(self.b_offset, self.num_outputs, self.rank)


@dataclass(frozen=True, slots=True)
class GroupSlice:
    """Where the adapters of projections with a common input lie. `pairs` has None for a projection without adapter."""

    a_offset: int
    total_rank: int
    num_inputs: int
    pairs: tuple[PairSlice | None, ...]

    def a(self, flat: FlatPart) -> Tensor:
        """[Σ R, in] view of `flat`: the A of all projections, one below the other."""
        return flat.matrix(self.a_offset, self.total_rank, self.num_inputs)


class FlatAdapter:
    """The flat buffer.

    groups:        of the projections with a common input, GROUPS_PER_LAYER to a layer
    compute_dtype: type in which the computation sees the matrices
    on_host:       keep the buffer in the host's memory

    parameter:   [P] float32, what the optimiser trains, padding included
    layout:      PEFT's parameters with the places where they begin
    num_padding: elements between the matrices; always zero, gradients too
    root_scale:  √s; the gradient of the loss is multiplied by it before the backward pass
    device:      that computes
    """

    def __init__(
        self, groups: Sequence[Sequence[LoraPair | None]], *, compute_dtype: torch.dtype, on_host: bool = False
    ) -> None:
        self.slices: list[GroupSlice | None] = []
        moves: list[tuple[nn.Parameter, int]] = []
        scales = {pair.scale for group in groups for pair in group if pair is not None}
        is_scaled = compute_dtype != torch.float32 and len(scales) == 1 and min(scales) > 0
        self.root_scale = math.sqrt(min(scales)) if is_scaled else 1.0
        offset, bounds = 0, [0]
        for group in groups:
            group_slice, offset = _lay_out(group, offset, moves, scale=1.0 if is_scaled else None)
            self.slices.append(group_slice)
            bounds.append(offset)
        assert moves, "an adapter without parameters"
        self.device = moves[0][0].device
        self._bounds = bounds[::GROUPS_PER_LAYER]
        pins = on_host and self.device.type == "cuda"
        place = torch.device("cpu") if on_host else self.device
        self.parameter = nn.Parameter(torch.zeros(offset, dtype=torch.float32, device=place, pin_memory=pins))
        for source, start in moves:
            view = self.parameter.data[start : start + source.numel()].view(source.shape)
            view.copy_(source.data)
            source.data = view
        self.layout: dict[nn.Parameter, int] = dict(moves)
        self.num_padding = offset - sum(source.numel() for source in self.layout)
        self._shadow = None if on_host else torch.empty_like(self.parameter.data, dtype=compute_dtype)
        largest = max(stop - start for start, stop in pairwise(self._bounds))
        self._stage = _Stage(largest, compute_dtype, self.device) if on_host else None
        # What stays where it is from step to step keeps its views.
        self._computed = None if self._shadow is None or compute_dtype == torch.float32 else FlatPart(self._shadow)
        self._staged: dict[tuple[int, int], FlatPart] = {}
        self._staged_gradients: dict[int, FlatPart] = {}

    @property
    def is_on_host(self) -> bool:
        return self._stage is not None

    def computed(self) -> FlatPart:
        """[P] the parameters as the computation sees them: the buffer itself in float32, else a fresh 16-bit copy,
        times `root_scale`. Nothing on the host's side: there every layer has its own (`layer`)."""
        if self._shadow is None:
            return FlatPart(self.parameter.data[:0])
        if self._computed is None:
            return FlatPart(self.parameter.data)
        torch.mul(self.parameter.data, self.root_scale, out=self._shadow)
        return self._computed

    def layer(self, index: int, computed: FlatPart) -> FlatPart:
        """The parameters of layer `index`, of `computed` or fetched from the host; valid until the layer after next is
        asked for."""
        if self._stage is None:
            return computed
        start, stop = self._bounds[index : index + 2]
        values = self._stage.fetch(self.parameter.data[start:stop], self.root_scale)
        place = index, values.data_ptr()
        if place not in self._staged:
            self._staged[place] = FlatPart(values, start)
        return self._staged[place]

    def new_gradient(self) -> Tensor:
        """[P] float32 for gradients, where the parameter is: zero where no matrix lies, undefined elsewhere."""
        pins = self._stage is not None and self.device.type == "cuda"
        gradient = torch.empty(self.parameter.shape, dtype=torch.float32, device=self.parameter.device, pin_memory=pins)
        return gradient.zero_() if self.num_padding else gradient

    def layer_gradient(self, gradient: Tensor, index: int) -> FlatPart:
        """Where the backward pass of layer `index` writes; `store_gradient` brings it home."""
        if self._stage is None:
            return FlatPart(gradient)
        start, stop = self._bounds[index : index + 2]
        if index not in self._staged_gradients:
            self._staged_gradients[index] = FlatPart(self._stage.gradient[: stop - start], start)
        part = self._staged_gradients[index]
        if self.num_padding:
            part.values.zero_()
        return part

    def store_gradient(self, part: FlatPart, gradient: Tensor) -> None:
        """Bring a layer's gradient to its place in `gradient`, if it is not there already."""
        if self._stage is not None:
            gradient[part.start : part.start + part.values.numel()].copy_(part.values, non_blocking=True)

    def wait_for_gradient(self) -> None:
        """After this the host may read a gradient in its memory."""
        if self._stage is not None and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def gradients_of(self, gradient: Tensor) -> dict[nn.Parameter, Tensor]:
        """PEFT's parameters with their views of a flat gradient."""
        return {source: self._view(gradient, source) for source in self.layout}

    def split(self, flat: Tensor, order: Sequence[nn.Parameter]) -> list[Tensor]:
        """A flat tensor cut into copies that belong to the parameters of `order`."""
        return [self._view(flat, parameter).clone() for parameter in order]

    def join(self, parts: Sequence[Tensor], order: Sequence[nn.Parameter]) -> Tensor:
        """[P] the inverse of `split`, zero in the padding."""
        flat = torch.zeros_like(self.parameter.data)
        for part, parameter in zip(parts, order, strict=True):
            self._view(flat, parameter).copy_(part)
        return flat

    def _view(self, flat: Tensor, parameter: nn.Parameter) -> Tensor:
        start = self.layout[parameter]
        return flat[start : start + parameter.numel()].view(parameter.shape)

    def release(self) -> None:
        """Give every PEFT parameter its own memory on the device again, with the present values."""
        for source in self.layout:
            source.data = source.data.to(self.device, copy=True)


class _Stage:
    """Device memory through which the matrices of one layer after another pass.

    The sum at a layer's end may be made by the next layer's norm, which then reads the B of the layer before; so there
    are two places, used in turn. Everything is queued on the computing stream, in its order.
    """

    def __init__(self, num_elements: int, compute_dtype: torch.dtype, device: torch.device) -> None:
        self.gradient = torch.empty(num_elements, dtype=torch.float32, device=device)
        self._places = [torch.empty(num_elements, dtype=compute_dtype, device=device) for _ in range(2)]
        self._arrived = torch.empty_like(self.gradient) if compute_dtype != torch.float32 else self.gradient[:0]

    def fetch(self, source: Tensor, factor: float) -> Tensor:
        """`source` times `factor` in the type of the computation; valid until the call after next."""
        self._places.reverse()
        place = self._places[0][: source.numel()]
        if place.dtype == source.dtype:
            return place.copy_(source, non_blocking=True)
        arrived = self._arrived[: source.numel()].copy_(source, non_blocking=True)
        return torch.mul(arrived, factor, out=place)


def _lay_out(
    group: Sequence[LoraPair | None], offset: int, moves: list[tuple[nn.Parameter, int]], *, scale: float | None
) -> tuple[GroupSlice | None, int]:
    """Assign places to one group's matrices from `offset` on; returns the end. scale: for all; None: each its own."""
    present = [pair for pair in group if pair is not None]
    if not present:
        return None, offset
    a_offset, num_inputs = offset, present[0].a.shape[1]
    for pair in present:
        moves.append((pair.a, offset))
        offset += pair.a.numel()
    offset = _aligned(offset)
    pairs: list[PairSlice | None] = []
    first_rank = 0
    for member in group:
        if member is None:
            pairs.append(None)
            continue
        ranks = slice(first_rank, first_rank + member.rank)
        own = member.scale if scale is None else scale
        pairs.append(PairSlice(member.rank, own, ranks, offset, member.b.shape[0]))
        moves.append((member.b, offset))
        offset = _aligned(offset + member.b.numel())
        first_rank += member.rank
    return GroupSlice(a_offset, first_rank, num_inputs, tuple(pairs)), offset


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
