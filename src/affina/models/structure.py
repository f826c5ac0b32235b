"""What a causal language model is made of: the body, the head, and what happens to the logits between them and the
loss.

transformers has a few ways to arrange these. They are read from the config here, and `forward.py` compares the result
with the model's own logits once before it relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from affina.kernels.logits import ExpandableRows, HeadOptions
from affina.models.weights import Int8Head


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`, which may be wrapped by PEFT (its layers stay in place)."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel), f"not a transformers model: {type(base).__name__}"
    return base


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config of the language model, also where it is one part of several."""
    return model.config.get_text_config()


def body_of(model: PreTrainedModel) -> nn.Module | None:
    """The part that turns token ids into hidden states, or None when it cannot be told from the head."""
    body = getattr(model, model.base_model_prefix, None)
    return body if isinstance(body, nn.Module) and body is not model else None


@dataclass(frozen=True, slots=True)
class Head:
    """From hidden states to logits: z = softcap(scale · (W h + b)).

    weight: [V, D], a tensor or rows to be expanded     bias: [V] or None
    """

    weight: Tensor | ExpandableRows
    bias: Tensor | None
    softcap: float | None
    scale: float

    @property
    def options(self) -> HeadOptions:
        """All but the weight, as the kernels take it."""
        return HeadOptions(bias=self.bias, softcap=self.softcap, logit_scale=self.scale)


def head_of(model: PreTrainedModel) -> Head | None:
    """The head as the config describes it, or None when it is not a plain linear layer, dense or in int8."""
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear and not isinstance(layer, Int8Head):
        return None
    weight = layer.quantized if isinstance(layer, Int8Head) else layer.weight
    config = text_config(model)
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = 1.0
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        scale /= float(divisor)
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        scale *= float(factor)
    return Head(weight, layer.bias, float(softcap) if softcap is not None else None, scale)
