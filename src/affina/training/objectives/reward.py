"""A reward model: one number for a conversation, learnt from pairs (Bradley and Terry 1952; Ouyang et al.,
arXiv:2203.02155, eq. 1).

    s(x, y) = w · h      h: the body's output at the last token of the conversation
    loss = −log σ(s(x, y_w) − s(x, y_l))

The head w is a vector beside the adapter, saved in its file. Where it was saved and loaded are PEFT's own ways, so that
transformers' sequence classification with PEFT gives the same scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from affina.models.reward_head import document_scores
from affina.training.objectives import LossSum, PreparedStep


def reward_losses(chosen: Tensor, rejected: Tensor) -> Tensor:
    """[P] losses from [P] scores of the chosen and of the rejected replies."""
    return -logsigmoid(chosen - rejected)


@dataclass(frozen=True, slots=True)
class RewardObjective:
    """The loss over the pairs of a step."""

    def prepare(self, model: nn.Module, batches: Sequence[Any], *, step: int | None) -> PreparedStep:
        return PreparedStep(batches, self._loss, sum(batch.num_examples for batch in batches))

    def _loss(self, model: nn.Module, batch: Any) -> LossSum:
        count = batch.num_examples
        scores = document_scores(model, batch)[: 2 * count].view(-1, 2)
        chosen, rejected = scores[:, 0], scores[:, 1]
        margin = (chosen - rejected).detach()
        return LossSum(
            reward_losses(chosen, rejected).sum(),
            {
                "reward_chosen": (chosen.detach().sum(), float(count)),
                "reward_rejected": (rejected.detach().sum(), float(count)),
                "reward_margin": (margin.sum(), float(count)),
                "reward_accuracy": ((margin > 0).float().sum(), float(count)),
            },
        )
