"""The fused decoder: one hand-written forward and backward pass over a transformers model and its PEFT adapter."""

from affina.models.fast.engine import (
    FastEngine,
    attach_fast_engine,
    detach_fast_engine,
    fast_engine_of,
    flat_adapter_of,
)

__all__ = ["FastEngine", "attach_fast_engine", "detach_fast_engine", "fast_engine_of", "flat_adapter_of"]
