"""Counts the bytes of live tensors while torch code runs, on real and on fake tensors alike."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from affina.catalog.fused_memory import allocated


class AllocationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Inside `with`, every storage that an operation returns counts until it is freed, as the CUDA allocator would.

    alive_bytes, peak_bytes: now, and the most so far
    num_operations:          that were dispatched

    What exists before counts when `add` is told of it, else not. torch's MemTracker cannot follow frozen parameters
    (it hooks their gradients), hence this one; it sees storages, not tensors, so views cost nothing.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.alive_bytes = 0
        self.peak_bytes = 0
        self.num_operations = 0
        self._live: dict[int, int] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._count(tensor)

    def reset_peak(self) -> None:
        """Begin a new peak at what is alive now."""
        self.peak_bytes = self.alive_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_operations += 1
        existed = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in existed:
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        num_bytes = allocated(storage.nbytes(), 1)
        self._live[key] = num_bytes
        self.alive_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.alive_bytes -= self._live.pop(key)
