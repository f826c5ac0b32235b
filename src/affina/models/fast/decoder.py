"""The whole decoder: from packed token ids to the loss, and back to the gradient of the flat adapter.

    forward   embed → layers → final norm of the rows that predict a supervised token → head, in chunks → loss
    backward  ∂loss/∂rows (made in the forward pass) → final norm → layers, last to first

The head is frozen, so its part of the backward pass is done as soon as the logits of a chunk exist
(kernels/linear_cross_entropy.py). Layers below the first adapted one need no backward pass and keep nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from affina.catalog.save_policy import Keep, SavePolicy
from affina.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_and_gradient
from affina.kernels.rms_norm import rms_norm, rms_norm_backward
from affina.models.families import DecoderSpec
from affina.models.fast import parts
from affina.models.fast.layer import DecoderLayer, Pending, RowContext, Saved
from affina.models.fast.offload import HostBuffers
from affina.models.fast.parameters import FlatAdapter
from affina.models.structure import Head


@dataclass(frozen=True, slots=True)
class HeadTape:
    """What the head leaves for the backward pass; used up by it.

    positions: [N] rows of the last layer's output that predict a supervised token, of `num_tokens`
    rows:      [N, D] those rows; rstd: [N] their norm's factors
    gradient:  [N, D] gradient of the loss with respect to the normed rows
    """

    num_tokens: int
    positions: Tensor
    rows: Tensor
    rstd: Tensor
    gradient: Tensor


@dataclass(frozen=True, slots=True)
class Decoder:
    """A described decoder with its frozen weights and flat adapter."""

    spec: DecoderSpec
    layers: Sequence[DecoderLayer]
    embedding: nn.Module
    final_norm: Tensor
    head: Head
    adapter: FlatAdapter
    first_adapted: int
    host: HostBuffers

    def forward(
        self, input_ids: Tensor, row: RowContext, policy: SavePolicy | None
    ) -> tuple[Pending, list[Saved | None]]:
        """input_ids [T] → (output of the last layer, what each layer kept). policy: None keeps nothing."""
        if policy is not None:
            self.host.begin()
        x = Pending(self.embedding(input_ids))
        saved: list[Saved | None] = []
        for index in range(len(self.layers)):
            keep = policy.layers[index] if policy is not None and index >= self.first_adapted else None
            on_host = keep is not None and keep < Keep.ATTENTION and index < row.num_attention_on_host
            x, kept = self._layer_forward(index, x, row, keep, keeps_attention=on_host)
            has_input = keep is not None and keep <= Keep.OFFLOADED
            if kept is not None and (on_host or has_input):
                self.host.store(index, kept, has_input=has_input)
            saved.append(kept)
        return x, saved

    def _layer_forward(
        self, index: int, x: Pending, row: RowContext, keep: Keep | None, *, keeps_attention: bool
    ) -> tuple[Pending, Saved | None]:
        own = replace(row, flat=self.adapter.layer(index, row.flat))
        if not row.in_parts:
            return self.layers[index].forward(x, own, keep, keeps_attention=keeps_attention)
        after, kept = parts.forward(self.layers[index], x, own, keeps_attention=keeps_attention)
        return after, None if keep is None else kept

    def new_stream(self, num_tokens: int, like: Tensor) -> Tensor:
        """[T, D + R] uninitialised, for the gradient of the residual stream: there is one, for all layers."""
        beside = (linear for layer in self.layers for linear in (layer.output, layer.down))
        return max(beside, key=lambda linear: linear.num_extra).new_outputs(num_tokens, like)

    def backward(self, stream: Tensor, saved: list[Saved | None], row: RowContext) -> Tensor:
        """∂last in `stream` → [P] float32 gradient of the flat adapter. Uses up `stream` and `saved`."""
        gradient = self.adapter.new_gradient()
        for index in range(len(self.layers) - 1, self.first_adapted - 1, -1):
            kept, saved[index] = saved[index], None
            assert kept is not None
            self.host.load(index, kept)
            self._layer_backward(index, stream, kept, saved[index - 1] if index else None, row, gradient)
        self.adapter.wait_for_gradient()
        return gradient

    def _layer_backward(
        self, index: int, stream: Tensor, kept: Saved, kept_below: Saved | None, row: RowContext, gradient: Tensor
    ) -> None:
        layer, is_first = self.layers[index], index == self.first_adapted
        own = replace(row, flat=self.adapter.layer(index, row.flat))
        part = self.adapter.layer_gradient(gradient, index)

        def fetch_next() -> None:
            if not is_first and kept_below is not None:
                self.host.prefetch(index - 1, kept_below)

        if row.in_parts:
            parts.backward(layer, stream, kept, own, part, is_first=is_first, before_tail=fetch_next)
        else:
            fetch_next()
            layer.backward(stream, kept, own, part, is_first=is_first)
        self.adapter.store_gradient(part, gradient)

    def loss(self, last: Pending, positions: Tensor, targets: Tensor) -> Tensor:
        """The sum of the cross-entropies, without anything for a backward pass."""
        hidden, _ = rms_norm(last.rows(positions), self.final_norm, self.spec.norm_epsilon)
        return linear_cross_entropy(hidden, self.head.weight, targets, **self.head.options)

    def loss_and_gradient(
        self, rows: Tensor, positions: Tensor, targets: Tensor, *, num_tokens: int
    ) -> tuple[Tensor, HeadTape]:
        """The sum of the cross-entropies, and its gradient up to the final norm.

        rows: [N, D] of the last layer's output, those at `positions`
        """
        hidden, rstd = rms_norm(rows, self.final_norm, self.spec.norm_epsilon)
        loss, gradient = linear_cross_entropy_and_gradient(
            hidden, self.head.weight, targets, gradient_out=hidden, **self.head.options
        )
        return loss, HeadTape(num_tokens, positions, rows, rstd, gradient)

    def gradient_of_last(self, tape: HeadTape, factor: Tensor) -> Tensor:
        """The gradient of the last layer's output in a new stream: zero but for the rows that predict a supervised
        token.

        factor: [] float32, the gradient of the loss; it may lie outside float16's range although the product does not.
        """
        # One number in a tensor of a dimension: PyTorch then multiplies in float32, and rounds the product.
        gradient = tape.gradient.mul_((factor * self.adapter.root_scale).reshape(1))
        of_rows = rms_norm_backward(gradient, tape.rows, self.final_norm, tape.rstd, grad_residual=None, out=gradient)
        stream = self.new_stream(tape.num_tokens, of_rows)
        stream[:, : self.spec.hidden_size].zero_().index_copy_(0, tape.positions, of_rows)
        return stream
