"""The adapter off: the model answers as its base, and is afterwards exactly what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn

from affina.models.adapters.trained_weights import original_weights, trained_weights_of
from affina.models.virtual_tokens import has_virtual_tokens, without_virtual_tokens


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as its base; a model without adapter already does."""
    if trained_weights_of(model) is not None:
        with original_weights(model):
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
            with model.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
