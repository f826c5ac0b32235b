"""The adapter off: the model answers as its base, and is afterwards exactly what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from peft import PeftModel
from torch import nn

from affina.models.adapters.trained_weights import (
    original_norms_as_trained,
    original_weights,
    trained_weights_of,
)
from affina.models.virtual_tokens import has_virtual_tokens, without_virtual_tokens


@contextmanager
def adapter_disabled(model: nn.Module, *, as_trained: bool = False) -> Iterator[None]:
    """Inside, the model answers as its base, bit for bit; a model without adapter already does.

    as_trained: where weights of the model itself are trained, compute with the base's values in their types. Then a
                model that has learnt nothing gives the same bits switched on and off, on a 16-bit base too
    """
    if trained_weights_of(model) is not None:
        with original_weights(model, as_trained=as_trained):
            yield
    elif not isinstance(model, PeftModel):
        yield
    elif has_virtual_tokens(model):
        with without_virtual_tokens(model), model.disable_adapter():
            yield
    else:
        # PEFT switches on with gradients whatever it has switched off, the frozen adapter of PiSSA too.
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            with model.disable_adapter(), original_norms_as_trained(model) if as_trained else nullcontext():
                yield
        finally:
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
