"""Supervised fine-tuning: the negative log-likelihood of the supervised tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from affina.models.forward import supervised_loss


def sft_objective(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Sum over supervised tokens of -log p(token | what comes before it in its sample), and their number.

    batch: input_ids, labels, position_ids [T]; cu_seqlens [S+1]
    """
    return supervised_loss(model, batch)
