"""Objectives over pairs: DPO, IPO, ORPO and SimPO.

With π the policy, ref the reference, y_w the chosen and y_l the rejected reply to x, |y| tokens of a reply:

    r_y   = log π(y|x) − log ref(y|x)                                        implicit reward, up to β
    DPO    −(1−ε) log σ(β (r_w − r_l)) − ε log σ(−β (r_w − r_l))             arXiv:2305.18290, eq. 7; ε: section 3 of
                                                                             arXiv:2403.00409 (conservative DPO)
    IPO    (r_w/|y_w| − r_l/|y_l| − 1/(2β))²                                 arXiv:2310.12036, eq. 17, β = τ
    ORPO   −log π(y_w|x)/|y_w| − β log σ(log odds(y_w) − log odds(y_l))      arXiv:2403.07691, eq. 6 and 7, β = λ
           odds(y) = p/(1−p),  log p = log π(y|x)/|y|
    SimPO  −(1−ε) log σ(z) − ε log σ(−z)                                     arXiv:2405.14734, eq. 6
           z = β (log π(y_w|x)/|y_w| − log π(y_l|x)/|y_l|) − γ

Deviations. IPO's log ratios are means over tokens, as in the authors' own experiments (they said so to TRL), not sums
as the paper writes: otherwise the target 1/(2β) would mean something else for every length. ORPO's likelihood is that
of the reply, as in the paper; TRL's is that of prompt and reply.

The losses are functions of [P] numbers, one for each pair; `PairObjective` gets these numbers from a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from affina.training.objectives import LossSum, PreparedStep
from affina.training.objectives.scores import PairScores, ReferenceScores, pair_scores

PairKind = Literal["dpo", "ipo", "orpo", "simpo"]

_NEARLY_CERTAIN = -1e-6
"""Largest mean log-probability whose odds are computed: at 0 they are infinite."""


@dataclass(frozen=True, slots=True)
class PairLosses:
    """Of P pairs, each [P] float32: the losses, and the rewards that the metrics show (without gradients)."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_losses(policy: PairScores, reference: PairScores, *, beta: float, label_smoothing: float = 0.0) -> PairLosses:
    """Direct preference optimisation: a logistic loss of the difference between implicit rewards."""
    chosen = policy.chosen - reference.chosen
    rejected = policy.rejected - reference.rejected
    losses = smoothed_logistic(beta * (chosen - rejected), label_smoothing)
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def ipo_losses(policy: PairScores, reference: PairScores, *, beta: float) -> PairLosses:
    """Identity preference optimisation: the difference is pulled towards 1/(2β), not to infinity."""
    chosen = (policy.chosen - reference.chosen) / policy.num_chosen
    rejected = (policy.rejected - reference.rejected) / policy.num_rejected
    losses = (chosen - rejected - 1.0 / (2.0 * beta)).square()
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def orpo_losses(policy: PairScores, *, beta: float) -> PairLosses:
    """The chosen reply's likelihood, and the odds between the two: no reference, no separate fine-tuning before."""
    means = policy.per_token()
    log_odds = (means.chosen - log_one_minus_exp(means.chosen)) - (means.rejected - log_one_minus_exp(means.rejected))
    losses = -means.chosen - beta * logsigmoid(log_odds)
    return PairLosses(losses, beta * means.chosen.detach(), beta * means.rejected.detach())


def simpo_losses(policy: PairScores, *, beta: float, margin: float, label_smoothing: float = 0.0) -> PairLosses:
    """Simple preference optimisation: mean log-probabilities as rewards, apart by at least `margin`."""
    means = policy.per_token()
    losses = smoothed_logistic(beta * (means.chosen - means.rejected) - margin, label_smoothing)
    return PairLosses(losses, beta * means.chosen.detach(), beta * means.rejected.detach())


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """−log σ of logits whose label is wrong with probability `label_smoothing`."""
    if label_smoothing == 0.0:
        return -logsigmoid(logits)
    return -(1.0 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def log_one_minus_exp(values: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, without cancellation at either end (Mächler 2012). x is taken as −1e-6 at most."""
    values = values.clamp(max=_NEARLY_CERTAIN)
    is_near_zero = values > -0.6931471805599453
    # Both branches get arguments of their own range: an unused branch that is infinite would make gradients NaN.
    near = torch.log(-torch.expm1(torch.where(is_near_zero, values, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(is_near_zero, -1.0, values)))
    return torch.where(is_near_zero, near, far)


@dataclass(frozen=True, slots=True)
class PairObjective:
    """A loss over the pairs of a step. See `PreferenceConfig` for the constants."""

    kind: PairKind
    beta: float
    label_smoothing: float = 0.0
    margin: float = 0.0
    reference: ReferenceScores = field(default_factory=ReferenceScores)

    def prepare(self, model: nn.Module, batches: Sequence[Any], *, step: int | None) -> PreparedStep:
        return PreparedStep(batches, self._loss, sum(batch.num_examples for batch in batches))

    def _loss(self, model: nn.Module, batch: Any) -> LossSum:
        # The reference first: its activations are gone before those of the policy are kept.
        reference = self.reference.pairs(model, batch) if self.kind in ("dpo", "ipo") else None
        policy = pair_scores(model, batch)
        found = self._losses(policy, reference)
        return LossSum(found.losses.sum(), pair_metrics(found, policy))

    def _losses(self, policy: PairScores, reference: PairScores | None) -> PairLosses:
        if self.kind == "orpo":
            return orpo_losses(policy, beta=self.beta)
        if self.kind == "simpo":
            return simpo_losses(policy, beta=self.beta, margin=self.margin, label_smoothing=self.label_smoothing)
        assert reference is not None
        if self.kind == "ipo":
            return ipo_losses(policy, reference, beta=self.beta)
        return dpo_losses(policy, reference, beta=self.beta, label_smoothing=self.label_smoothing)


def pair_metrics(found: PairLosses, policy: PairScores) -> dict[str, tuple[Tensor, float]]:
    """Rewards, their margin, the share of pairs in the right order, and the replies' negative log-likelihoods."""
    count = float(found.losses.shape[0])
    margin = found.chosen_rewards - found.rejected_rewards
    return {
        "reward_chosen": (found.chosen_rewards.sum(), count),
        "reward_rejected": (found.rejected_rewards.sum(), count),
        "reward_margin": (margin.sum(), count),
        "reward_accuracy": ((margin > 0).float().sum(), count),
        "chosen_nll": (-policy.chosen.detach().sum(), float(policy.num_chosen.sum())),
        "rejected_nll": (-policy.rejected.detach().sum(), float(policy.num_rejected.sum())),
    }
