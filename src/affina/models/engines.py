"""Which engine computes a model's loss: transformers' own forward unless another one is attached."""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from affina.models.structure import base_model_of


class Engine(Protocol):
    """Something that computes the loss of a batch, with gradients for its own `parameters`."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser trains while this engine is attached."""
        ...

    @property
    def is_active(self) -> bool:
        """Whether it computes what the model would compute now; not while the adapter is switched off."""
        ...

    def make_room(self) -> str | None:
        """Use less memory from the next step on, and say how; None: it cannot."""
        ...

    def supervised_loss(self, batch: Any) -> Tensor:
        """The sum of the cross-entropies of the supervised tokens, a float32 scalar; its backward pass fills
        `parameters`' gradients."""
        ...


_ENGINES: WeakKeyDictionary[nn.Module, Engine] = WeakKeyDictionary()


def engine_of(model: nn.Module) -> Engine | None:
    """The engine attached to `model`; None: the reference."""
    return _ENGINES.get(base_model_of(model))


def set_engine(model: nn.Module, engine: Engine | None) -> None:
    """Attach an engine to `model`, or take it off."""
    if engine is None:
        _ENGINES.pop(base_model_of(model), None)
    else:
        _ENGINES[base_model_of(model)] = engine


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimiser trains: the attached engine's parameters, or the model's that require gradients."""
    engine = engine_of(model)
    if engine is not None:
        return engine.parameters
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
