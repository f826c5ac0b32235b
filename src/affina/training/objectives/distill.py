"""Distillation: the student learns the teacher's distribution over the next token, not only the token that came.

With P the teacher's and Q the student's distribution at a supervised token, both at temperature T:

    divergence 0        KL(P ‖ Q)                                  forward: cover all that the teacher would say
    divergence 1        KL(Q ‖ P)                                  reverse: avoid what the teacher would not say
    between: β          β KL(P ‖ M) + (1−β) KL(Q ‖ M),  M = β P + (1−β) Q

(Agarwal et al., arXiv:2306.13649, eq. 1.) *Off-policy* the tokens are the data's. *On-policy* (same paper, section 3.1)
the student writes the replies itself, at temperature 1, and the teacher judges those: it learns on what it will meet.
Which steps do that, and what is written, follows from the run's seed and the step, so that a resumed run repeats it.

Without a teacher model the records carry its k likeliest tokens and their log-probabilities. Then everything else is
one event, so that what is compared are two distributions over k + 1 events:

    Σ_k P_k log(P_k/Q_k) + P_rest log(P_rest/Q_rest)          never more than KL(P ‖ Q), and 0 when P = Q
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from affina.data.collate import Batch, collate
from affina.models.forward import evaluation_mode, supervised_logits_reader, supervised_row_losses
from affina.models.generate import generate
from affina.training.objectives import LossSum, PreparedStep
from affina.training.objectives.documents import Reply, question_and_reply
from affina.training.objectives.preference import log_one_minus_exp


def divergence_losses(student: Tensor, teacher: Tensor, *, divergence: float = 0.0, temperature: float = 1.0) -> Tensor:
    """[C] divergences between distributions given as [C, V] float32 logits. A vocabulary that one of the two has padded
    further is cut to the shared part."""
    size = min(student.shape[-1], teacher.shape[-1])
    log_q = log_softmax(student[..., :size] / temperature, dim=-1)
    log_p = log_softmax(teacher[..., :size] / temperature, dim=-1)
    if divergence == 0.0:
        return _kl(log_p, log_q)
    if divergence == 1.0:
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + float(np.log(divergence)), log_q + float(np.log1p(-divergence)))
    return divergence * _kl(log_p, log_m) + (1.0 - divergence) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def top_k_losses(student: Tensor, token_ids: Tensor, log_probabilities: Tensor) -> Tensor:
    """[C] KL of the teacher to the student over k tokens and the rest.

    student: [C, V] float32 logits     token_ids: [C, K] int64     log_probabilities: [C, K] float32, −inf for padding
    """
    log_q = log_softmax(student, dim=-1).gather(1, token_ids)
    p = log_probabilities.exp()
    is_real = p > 0
    # Padding gets 0 · 0: with −∞ it would be 0 · ∞, whose gradient is no number.
    terms = torch.where(is_real, p * (torch.where(is_real, log_probabilities, 0.0) - log_q), 0.0)
    rest = (1.0 - p.sum(dim=-1)).clamp(min=0.0)
    covered = torch.logsumexp(torch.where(is_real, log_q, -torch.inf), dim=-1)
    log_rest = torch.log(rest.clamp(min=torch.finfo(rest.dtype).tiny))
    return terms.sum(dim=-1) + torch.where(rest > 0, rest * (log_rest - log_one_minus_exp(covered)), 0.0)


@dataclass(frozen=True, slots=True)
class OnPolicy:
    """How the student writes replies of its own.

    share:    of the steps        stop_ids: ends of turn; the first one closes a reply in training
    """

    share: float
    max_new_tokens: int
    stop_ids: Sequence[int]
    seed: int

    def is_due(self, step: int) -> bool:
        """Whether that step learns on its own replies: a function of seed and step."""
        return bool(np.random.default_rng([self.seed & 0xFFFFFFFF, step, 1]).random() < self.share)


@dataclass(frozen=True, slots=True)
class DistillObjective:
    """The divergence summed over the supervised tokens of a step.

    teacher: a frozen model with the student's tokenizer; None: the batches carry the teacher's top-k
    """

    teacher: nn.Module | None = None
    divergence: float = 0.0
    temperature: float = 1.0
    on_policy: OnPolicy | None = field(default=None)

    def prepare(self, model: nn.Module, batches: Sequence[Any], *, step: int | None) -> PreparedStep:
        is_own = step is not None and self.on_policy is not None and self.on_policy.is_due(step)
        if is_own:
            assert self.on_policy is not None
            assert step is not None
            batches = own_replies(model, batches, self.on_policy, step=step)
        count = sum(batch.num_supervised for batch in batches)
        return PreparedStep(batches, partial(self._loss, is_own=is_own), count)

    def _loss(self, model: nn.Module, batch: Any, *, is_own: bool) -> LossSum:
        if self.teacher is None:
            ids, log_probabilities = batch.teacher_ids, batch.teacher_log_probabilities
            losses = supervised_row_losses(
                model, batch, lambda logits, part: top_k_losses(logits, ids[part], log_probabilities[part])
            )
            mass = log_probabilities.exp().sum()
            return LossSum(losses.sum(), {"teacher_mass": (mass, float(batch.num_supervised))})
        with torch.no_grad(), evaluation_mode(self.teacher):
            teacher_logits = supervised_logits_reader(self.teacher, batch)
        losses = supervised_row_losses(
            model,
            batch,
            lambda logits, part: divergence_losses(
                logits, teacher_logits(part), divergence=self.divergence, temperature=self.temperature
            ),
        )
        tokens = float(batch.num_supervised)
        metrics = {"on_policy": (losses.new_tensor(tokens * is_own), tokens)} if self.on_policy is not None else {}
        return LossSum(losses.sum(), metrics)


def own_replies(model: nn.Module, batches: Sequence[Batch], settings: OnPolicy, *, step: int) -> list[Batch]:
    """The same questions, each with a reply that the model writes now; the whole reply is supervised."""
    written = []
    for number, batch in enumerate(batches):
        questions = [question for question, _ in question_and_reply(batch)]
        replies = generate(
            model,
            [question.tolist() for question in questions],
            max_new_tokens=settings.max_new_tokens,
            stop_ids=settings.stop_ids,
            temperature=1.0,
            # One stream of numbers for each micro-batch of each step.
            seed=(settings.seed * 1_000_003 + step) * 1_009 + number,
        )
        samples = []
        for question, reply in zip(questions, replies, strict=True):
            # A reply that ended by itself is closed as in the data; one that was cut off is not.
            closed = [*reply, settings.stop_ids[0]] if len(reply) < settings.max_new_tokens else reply
            own = np.array(closed, dtype=np.int32)
            samples.append(Reply(own, labels=own).to(question))
        written.append(collate(samples, num_tokens=None, pad_token_id=0).to(batch.input_ids.device))
    return written
