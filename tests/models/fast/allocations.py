"""How many bytes of tensors are alive while something runs: counted operation by operation, on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationTracker(TorchDispatchMode):
    """Counts the storages that operations inside the block allocate, until they are freed.

    Views, results in given memory and what existed before are not counted. What an operation needs for itself and frees
    again is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak_at = ""
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in given and id(storage) not in self._known:
                    self._count(storage)
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_at = self.live_bytes, str(func)
        return result

    def _count(self, storage: Any) -> None:
        key, num_bytes = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            self.live_bytes -= num_bytes
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live_bytes += num_bytes
