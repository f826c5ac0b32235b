"""Kahneman-Tversky optimisation: replies that are wanted or unwanted, each on its own (Ethayarajh et al.,
arXiv:2402.01306, eq. 7 and 8).

    r = log π(y|x) − log ref(y|x)
    z = max(0, mean over mismatched pairs of log π(y'|x) − log ref(y'|x))        the reference point, without a gradient
    loss = λ_D (1 − σ(β (r − z)))    for a wanted reply,      λ_U (1 − σ(β (z − r)))    for an unwanted one

z estimates the KL divergence between policy and reference, from the questions of the step with the replies of the next
one. It is one number of the whole optimiser step, made before its first micro-batch: so the gradient does not depend on
how the step is cut. (The paper and TRL take the micro-batch.)

To pair question i with reply i + 1 costs no more tokens than the step has, since each is used once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from affina.data.collate import Batch, collate
from affina.data.samples import Sample
from affina.models.forward import document_log_probabilities, evaluation_mode
from affina.training.objectives import LossSum, PreparedStep
from affina.training.objectives.documents import question_and_reply
from affina.training.objectives.scores import ReferenceScores, reference_log_probabilities


def kto_losses(
    log_ratios: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """[N] losses of replies.

    log_ratios: [N] float32, log π − log ref of each reply    desirable: [N] bool    reference_point: [] z ≥ 0
    """
    sign = torch.where(desirable, 1.0, -1.0)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1.0 - torch.sigmoid(beta * sign * (log_ratios - reference_point)))


@dataclass(frozen=True, slots=True)
class KtoObjective:
    """The loss over the labelled replies of a step."""

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: ReferenceScores = field(default_factory=ReferenceScores)

    def prepare(self, model: nn.Module, batches: Sequence[Any], *, step: int | None) -> PreparedStep:
        reference_point = estimate_reference_point(model, batches)
        count = sum(batch.num_examples for batch in batches)
        return PreparedStep(batches, partial(self._loss, reference_point=reference_point), count)

    def _loss(self, model: nn.Module, batch: Any, *, reference_point: Tensor) -> LossSum:
        reference = self.reference(model, batch)[: batch.num_examples]
        policy = document_log_probabilities(model, batch)[: batch.num_examples]
        log_ratios = policy - reference
        desirable = torch.tensor(batch.desirable, device=policy.device)
        losses = kto_losses(
            log_ratios,
            desirable,
            reference_point,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        rewards = self.beta * log_ratios.detach()
        num_desirable = float(sum(batch.desirable))
        num_undesirable = batch.num_examples - num_desirable
        right = torch.where(desirable, rewards > self.beta * reference_point, rewards < self.beta * reference_point)
        return LossSum(
            losses.sum(),
            {
                "reward_desirable": (rewards[desirable].sum(), num_desirable),
                "reward_undesirable": (rewards[~desirable].sum(), num_undesirable),
                "reward_accuracy": (right.float().sum(), float(batch.num_examples)),
                "kl_estimate": (reference_point * batch.num_examples, float(batch.num_examples)),
            },
        )


@torch.no_grad()
def estimate_reference_point(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """[] float32: z of a step. 0 for a step of one reply, whose question has no other reply to go with."""
    rows = mismatched_rows(batches)
    device = batches[0].input_ids.device
    if not rows:
        return torch.zeros((), device=device)
    differences: list[Tensor] = []
    for row in rows:
        batch = collate(row, num_tokens=None, pad_token_id=0).to(device)
        with evaluation_mode(model):
            policy = document_log_probabilities(model, batch)
        difference = policy - reference_log_probabilities(model, batch)
        differences.append(difference[: len(row)])
    return torch.cat(differences).mean().clamp(min=0.0)


def mismatched_rows(batches: Sequence[Batch]) -> list[list[Sample]]:
    """Each question of the step with the reply of the next sample (the last with the first), in rows of about the
    step's own lengths; [] for a step of one sample."""
    samples = [sample for batch in batches for sample in question_and_reply(batch)]
    if len(samples) < 2:
        return []
    room = max(sum(batch.lengths) for batch in batches)
    rows: list[list[Sample]] = [[]]
    used = 0
    for (question, _), (_, reply) in zip(samples, samples[1:] + samples[:1], strict=True):
        sample = reply.to(question)
        if rows[-1] and used + len(sample) > room:
            rows.append([])
            used = 0
        rows[-1].append(sample)
        used += len(sample)
    return rows
