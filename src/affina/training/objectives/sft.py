"""Supervised fine-tuning, and continued pre-training: the negative log-likelihood of the supervised tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from affina.models.forward import supervised_loss
from affina.training.objectives import LossSum, PreparedStep


def sft_objective(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Sum over supervised tokens of -log p(token | what comes before it in its sample), and their number.

    batch: input_ids, labels, position_ids [T]; cu_seqlens [S+1]
    """
    return supervised_loss(model, batch)


@dataclass(frozen=True, slots=True)
class TokenObjective:
    """A loss that is a sum over supervised tokens: `(model, batch) -> (sum, count)`."""

    loss: Callable[[nn.Module, Any], tuple[Tensor, int]]

    def prepare(self, model: nn.Module, batches: Sequence[Any], *, step: int | None) -> PreparedStep:
        return PreparedStep(batches, self._loss, sum(batch.num_supervised for batch in batches))

    def _loss(self, model: nn.Module, batch: Any) -> LossSum:
        return LossSum(self.loss(model, batch)[0])
