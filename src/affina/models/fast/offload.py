"""What layers keep, in pinned host memory, copied while the device computes.

A layer's tensors leave on a side stream as soon as the layer is done with them and come back one layer before the
backward pass needs them. On Qwen3-4B the input is 5 KiB per token and layer, the attention's output 8 KiB: at 16,384
tokens 220 MB, 4.5 ms of a PCIe 5 link, against about 10 ms of computing per layer and direction.

Device memory belongs to the computing stream throughout. A copy begins after what that stream was given before, and
the stream waits for a copy before the copied memory is freed: one layer's tensors at most are on their way at any
time, however far the host runs ahead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from affina.models.fast.layer import Saved


@dataclass(frozen=True, slots=True)
class _Journey:
    """Tensors of one layer on their way, and the event of the end of their copies (None: there is no device)."""

    tensors: dict[str, Tensor]
    done: torch.cuda.Event | None


class HostBuffers:
    """Pinned host buffers of each layer, kept from step to step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buffers: dict[tuple[int, str], Tensor] = {}
        self._pass = 0
        self._away: dict[int, dict[str, torch.Size]] = {}
        self._leaving: _Journey | None = None
        self._arriving: dict[int, _Journey] = {}

    def begin(self) -> None:
        """A forward pass begins: the buffers are its own from now on, whatever an earlier one left in them."""
        self._pass += 1
        self._away.clear()
        self._arriving.clear()

    def store(self, index: int, saved: Saved, *, has_input: bool) -> None:
        """Send away what layer `index` keeps of its attention and, with `has_input`, its input.

        What is away is empty in `saved` until `load`.
        """
        tensors = {"x": saved.x} if has_input else {}
        if saved.attended is not None:
            tensors |= {"output": saved.attended.output, "lse": saved.attended.lse}
        saved.host_pass = self._pass
        self._away[index] = {name: tensor.shape for name, tensor in tensors.items()}
        self._wait_for_leaving()
        copies = [(self._buffer(index, name, tensor), tensor) for name, tensor in tensors.items()]
        self._leaving = _Journey(tensors, self._copy(copies))
        _put(saved, {name: tensor.new_empty(0) for name, tensor in tensors.items()})

    def prefetch(self, index: int, saved: Saved) -> None:
        """Begin to bring back what layer `index` has away."""
        if saved.host_pass is None or index in self._arriving:
            return
        if saved.host_pass != self._pass:
            raise RuntimeError(
                "another forward pass ran before the backward pass of the one that keeps its tensors in host memory"
            )
        self._wait_for_leaving()
        tensors, copies = {}, []
        for name, shape in self._away[index].items():
            buffer = self._buffers[index, name][: shape.numel()].view(shape)
            tensors[name] = torch.empty(shape, dtype=buffer.dtype, device=self._device)
            copies.append((tensors[name], buffer))
        self._arriving[index] = _Journey(tensors, self._copy(copies))

    def load(self, index: int, saved: Saved) -> None:
        """Put back into `saved` what layer `index` has away."""
        if saved.host_pass is None:
            return
        self.prefetch(index, saved)
        saved.host_pass = None
        arrived = self._arriving.pop(index)
        self._wait_for(arrived)
        _put(saved, arrived.tensors)

    def _copy(self, copies: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """Copy (target, source) on the side stream, after all that the computing stream was given."""
        if self._stream is None:
            for target, source in copies:
                target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return done

    def _wait_for_leaving(self) -> None:
        """Let the computing stream wait for the last copy, and free what it copied."""
        if self._leaving is not None:
            self._wait_for(self._leaving)
            self._leaving = None

    def _wait_for(self, journey: _Journey) -> None:
        if journey.done is not None:
            torch.cuda.current_stream(self._device).wait_event(journey.done)

    def _buffer(self, index: int, name: str, tensor: Tensor) -> Tensor:
        """View of layer `index`'s host memory, of the shape and type of `tensor`."""
        buffer = self._buffers.get((index, name))
        if buffer is None or buffer.numel() < tensor.numel() or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=self._stream is not None)
            self._buffers[index, name] = buffer
        return buffer[: tensor.numel()].view(tensor.shape)


def _put(saved: Saved, tensors: dict[str, Tensor]) -> None:
    if "x" in tensors:
        saved.x = tensors["x"]
    if "output" in tensors:
        assert saved.attended is not None
        saved.attended = replace(saved.attended, output=tensors["output"], lse=tensors["lse"])
