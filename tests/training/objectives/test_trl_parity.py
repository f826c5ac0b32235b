"""Loss and gradient of every objective equal TRL's on fixed tensors (recorded/trl_objectives.py says how they came)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from affina.kernels.linear_cross_entropy import linear_cross_entropy
from affina.training.objectives.distill import divergence_losses
from affina.training.objectives.kto import kto_losses
from affina.training.objectives.preference import dpo_losses, ipo_losses, orpo_losses, simpo_losses
from affina.training.objectives.reward import reward_losses
from affina.training.objectives.scores import PairScores

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "recorded" / "trl_objectives.json").read_text(encoding="utf-8")
)
COUNTS = torch.tensor(RECORDED["counts"], dtype=torch.float32)
REFERENCE = torch.tensor(RECORDED["reference"]).sum(1)


def pairs_of(sums: Tensor, counts: Tensor) -> PairScores:
    """TRL lays out all chosen, then all rejected."""
    chosen, rejected = sums.chunk(2)
    return PairScores(chosen, rejected, *counts.chunk(2))


def assert_equal(found: Tensor, leaf: Tensor, expected: dict[str, Any]) -> None:
    (gradient,) = torch.autograd.grad(found, leaf)
    recorded = torch.tensor(expected["gradient"])
    # Both are float32 with sums in another order: some units of 2^-24 = 6e-8 of the largest term.
    torch.testing.assert_close(found.detach(), torch.tensor(expected["loss"]), rtol=2e-6, atol=1e-6)
    # TRL's gradient for tokens outside the reply comes from its sum over zeros; ours never sees them.
    mask = torch.tensor(RECORDED["log_probs"]) != 0 if recorded.shape == (8, 9) else torch.ones_like(recorded).bool()
    torch.testing.assert_close(gradient[mask], recorded[mask], rtol=1e-5, atol=1e-6)
    assert float(recorded[mask].abs().max()) > 0


def test_the_recorded_values_are_of_the_version_that_the_documentation_names() -> None:
    page = Path(__file__).parents[3] / "docs" / "guides" / "preferences.md"
    assert f"TRL {RECORDED['trl']}" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["dpo", "dpo_steep", "ipo"])
def test_dpo_and_ipo_equal_trl(name: str) -> None:
    leaf = torch.tensor(RECORDED["log_probs"]).requires_grad_()
    policy, reference = pairs_of(leaf.sum(1), COUNTS), pairs_of(REFERENCE, COUNTS)
    losses = ipo_losses if name == "ipo" else dpo_losses
    found = losses(policy, reference, beta=RECORDED[name]["beta"]).losses.mean()
    assert_equal(found, leaf, RECORDED[name])


def test_dpo_with_smoothed_labels_equals_trl() -> None:
    case = RECORDED["dpo_smoothed"]
    leaf = torch.tensor(RECORDED["log_probs"]).requires_grad_()
    policy, reference = pairs_of(leaf.sum(1), COUNTS), pairs_of(REFERENCE, COUNTS)
    found = dpo_losses(policy, reference, beta=case["beta"], label_smoothing=case["label_smoothing"])
    assert_equal(found.losses.mean(), leaf, case)
    assert case["loss"] != RECORDED["dpo"]["loss"]


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_the_loss_of_sft_and_cpt_equals_trl(chunk_rows: int | None) -> None:
    """The sum over a step's tokens divided by their number, whatever their rows."""
    case = RECORDED["sft"]
    leaf = torch.tensor(case["hidden"]).requires_grad_()
    labels = torch.tensor(case["labels"])[:, 1:].reshape(-1)
    hidden = leaf[:, :-1].reshape(len(labels), -1)
    found = linear_cross_entropy(hidden, torch.tensor(case["head"]), labels, chunk_rows=chunk_rows)
    assert_equal(found / (labels != -100).sum(), leaf, case)


@pytest.mark.parametrize("name", ["kto", "kto_weighted"])
def test_kto_equals_trl(name: str) -> None:
    case = RECORDED[name]
    leaf = torch.tensor(RECORDED["log_probs"]).requires_grad_()
    mismatched = torch.tensor(RECORDED["mismatched"]) - torch.tensor(RECORDED["mismatched_reference"])
    reference_point = mismatched.mean().clamp(min=0)
    assert float(reference_point) == pytest.approx(case["kl"][0], rel=1e-6)
    found = kto_losses(
        leaf.sum(1) - REFERENCE,
        torch.tensor(case["labels"]),
        reference_point,
        beta=case["beta"],
        desirable_weight=case["weights"][0],
        undesirable_weight=case["weights"][1],
    ).mean()
    assert_equal(found, leaf, case)


def averages() -> tuple[Tensor, PairScores]:
    """Mean log-probabilities; these two objectives were recorded with chosen and rejected in turns."""
    leaf = (torch.tensor(RECORDED["log_probs"]).sum(1) / COUNTS).requires_grad_()
    ones = torch.ones(4)
    return leaf, PairScores(leaf[0::2], leaf[1::2], ones, ones)


def test_the_odds_ratio_of_orpo_equals_trl() -> None:
    leaf, scores = averages()
    # TRL adds the likelihood of prompt and reply outside of this function; ours adds the reply's inside.
    odds = orpo_losses(scores, beta=RECORDED["orpo"]["beta"]).losses + scores.chosen
    assert_equal(odds.mean(), leaf, RECORDED["orpo"])


def test_simpo_equals_trl() -> None:
    case = RECORDED["simpo"]
    leaf, scores = averages()
    found = simpo_losses(scores, beta=case["beta"], margin=case["margin"], label_smoothing=case["label_smoothing"])
    assert_equal(found.losses.mean(), leaf, case)


def test_reward_equals_trl() -> None:
    leaf = torch.tensor(RECORDED["reward"]["scores"]).requires_grad_()
    assert_equal(reward_losses(*leaf.chunk(2)).mean(), leaf, RECORDED["reward"])


@pytest.mark.parametrize("case", RECORDED["distill"]["cases"], ids=lambda c: f"{c['divergence']}-{c['temperature']}")
def test_distillation_equals_trl(case: dict[str, Any]) -> None:
    leaf = torch.tensor(RECORDED["distill"]["student"]).requires_grad_()
    teacher = torch.tensor(RECORDED["distill"]["teacher"])
    losses = divergence_losses(leaf, teacher, divergence=case["divergence"], temperature=case["temperature"])
    assert_equal(losses.sum(), leaf, case)
