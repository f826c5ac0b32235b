"""The scalar head of a reward model: a vector beside the body, trained in full and saved with the adapter.

It is called `score`, as in transformers' sequence classification models, and PEFT keeps it as a module to save. So the
adapter folder of a reward run loads there too:

    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    model = PeftModel.from_pretrained(base, "runs/…/adapter")
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from affina.errors import ModelError
from affina.models.forward import Batch, last_hidden_states
from affina.models.structure import base_model_of, body_of, text_config

SCORE_NAME = "score"


def add_reward_head(base: PreTrainedModel, *, seed: int) -> None:
    """Give `base` a scalar head, drawn from `seed` alone with the standard deviation of the model's own weights.

    Raises ModelError `reward-head-unsupported` for a model whose body cannot be told from its head.
    """
    config = text_config(base)
    if body_of(base) is None:
        raise ModelError(
            "reward-head-unsupported",
            f"{type(base).__name__} has no body that a scalar head could be put on",
            fix="choose a decoder such as Qwen3, Llama or Mistral, or training.objective: dpo",
        )
    head = nn.Linear(config.hidden_size, 1, bias=False, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        head.weight.mul_(getattr(config, "initializer_range", 0.02) or 0.02)
    base.add_module(SCORE_NAME, head.to(base.device))


def has_reward_head(model: nn.Module) -> bool:
    """Whether the model scores conversations."""
    return hasattr(base_model_of(model), SCORE_NAME)


def document_scores(model: nn.Module, batch: Batch) -> Tensor:
    """[S] float32: the score at the last token of every document of the row, with gradients."""
    head: nn.Module = getattr(base_model_of(model), SCORE_NAME)
    hidden = last_hidden_states(model, batch)
    scores: Tensor = head(hidden.float())
    return scores.squeeze(1)
