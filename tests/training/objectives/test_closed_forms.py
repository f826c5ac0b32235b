"""The losses on numbers that can be checked on paper, and against autograd of the plain definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from affina.training.objectives.distill import divergence_losses, top_k_losses
from affina.training.objectives.kto import kto_losses
from affina.training.objectives.preference import (
    dpo_losses,
    ipo_losses,
    log_one_minus_exp,
    orpo_losses,
    simpo_losses,
)
from affina.training.objectives.reward import reward_losses
from affina.training.objectives.scores import PairScores


def scores(chosen: float, rejected: float, num_chosen: float = 1.0, num_rejected: float = 1.0) -> PairScores:
    return PairScores(
        *(torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected, num_chosen, num_rejected))
    )


def test_dpo_is_the_logistic_loss_of_the_difference_of_log_ratios() -> None:
    # log ratios: −10 + 12 = 2 for the chosen, −20 + 19 = −1 for the rejected reply; difference 3, times 0.5
    found = dpo_losses(scores(-10, -20), scores(-12, -19), beta=0.5)
    assert float(found.losses) == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert (float(found.chosen_rewards), float(found.rejected_rewards)) == (1.0, -0.5)


def test_a_policy_that_is_its_reference_has_loss_log_2_whatever_beta() -> None:
    for beta in (0.01, 0.1, 5.0):
        found = dpo_losses(scores(-10, -20), scores(-10, -20), beta=beta)
        assert float(found.losses) == pytest.approx(math.log(2))
        assert float(found.chosen_rewards - found.rejected_rewards) == 0


def test_label_smoothing_weighs_both_orders_of_a_pair() -> None:
    found = dpo_losses(scores(-10, -20), scores(-12, -19), beta=0.5, label_smoothing=0.2)
    wrong_order = math.log(1 + math.exp(1.5))
    assert float(found.losses) == pytest.approx(0.8 * math.log(1 + math.exp(-1.5)) + 0.2 * wrong_order)


def test_ipo_pulls_the_difference_of_means_to_its_target() -> None:
    # means: 2 / 4 and −1 / 2; the difference is 1, the target 1 / (2 · 0.1) = 5
    found = ipo_losses(scores(-10, -20, 4, 2), scores(-12, -19, 4, 2), beta=0.1)
    assert float(found.losses) == pytest.approx(16.0)
    at_target = ipo_losses(scores(-2, -12, 4, 2), scores(-12, -7, 4, 2), beta=0.1)
    assert float(at_target.losses) == pytest.approx(0.0)


def test_orpo_adds_the_likelihood_and_the_odds_ratio() -> None:
    # p = 1/2 and 1/4 per token: odds 1 and 1/3, whose ratio is 3
    found = orpo_losses(scores(3 * math.log(0.5), 2 * math.log(0.25), 3, 2), beta=0.1)
    assert float(found.losses) == pytest.approx(math.log(2) - 0.1 * math.log(3 / 4))


def test_simpo_wants_a_margin_between_means() -> None:
    # means −1 and −3, times 2: difference 4, margin 1
    found = simpo_losses(scores(-4, -6, 4, 2), beta=2.0, margin=1.0)
    assert float(found.losses) == pytest.approx(math.log(1 + math.exp(-3)))


def test_kto_is_a_half_at_the_reference_point_and_falls_on_the_right_side() -> None:
    ratios = torch.tensor([2.0, 2.0, 12.0, 12.0])
    desirable = torch.tensor([True, False, True, False])
    found = kto_losses(ratios, desirable, torch.tensor(2.0), beta=0.1, undesirable_weight=2.0)
    sigmoid_1 = 1 / (1 + math.exp(-1))
    assert found.tolist() == pytest.approx([0.5, 1.0, 1 - sigmoid_1, 2 * sigmoid_1])


def test_reward_is_the_logistic_loss_of_the_difference() -> None:
    assert float(reward_losses(torch.tensor([3.0]), torch.tensor([1.0]))[0]) == pytest.approx(
        math.log(1 + math.exp(-2))
    )


PROBABILITIES = [[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]]


def test_a_divergence_is_that_of_the_two_distributions() -> None:
    teacher, student = (torch.tensor([row]).log() for row in PROBABILITIES)
    forward = 0.5 * math.log(2) + 0 + 2 * 0.125 * math.log(0.5)
    assert float(divergence_losses(student, teacher)) == pytest.approx(forward)
    reverse = 0.25 * math.log(0.5) + 2 * 0.25 * math.log(2)
    assert float(divergence_losses(student, teacher, divergence=1.0)) == pytest.approx(reverse)
    assert float(divergence_losses(teacher, teacher, divergence=0.4)) == pytest.approx(0, abs=1e-7)


def test_a_vocabulary_that_is_padded_further_is_cut() -> None:
    teacher, student = (torch.tensor([row]).log() for row in PROBABILITIES)
    padded = torch.cat([teacher, torch.full((1, 3), 9.0)], dim=1)
    assert torch.equal(divergence_losses(student, padded), divergence_losses(student, teacher))


def test_top_k_and_the_rest_are_the_events_that_are_compared() -> None:
    teacher, student = (torch.tensor([row]).log() for row in PROBABILITIES)
    found = top_k_losses(student, torch.tensor([[0, 1]]), teacher[:, :2])
    # {0: 1/2, 1: 1/4, rest: 1/4} against {1/4, 1/4, 1/2}
    assert float(found) == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    whole = top_k_losses(student, torch.arange(4).unsqueeze(0), teacher)
    assert float(whole) == pytest.approx(float(divergence_losses(student, teacher)), rel=1e-5)
    padded = top_k_losses(
        student, torch.tensor([[0, 1, 0]]), torch.cat([teacher[:, :2], torch.tensor([[-torch.inf]])], 1)
    )
    assert float(padded) == pytest.approx(float(found))


def test_gradients_stay_finite_where_a_teacher_covers_everything() -> None:
    teacher = torch.tensor([[0.75, 0.25]]).log()
    student = torch.tensor([[0.0, 30.0]]).requires_grad_()
    loss = top_k_losses(student, torch.tensor([[0, 1]]), teacher).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    # ∂KL/∂z = q − p
    torch.testing.assert_close(gradient, torch.tensor([[-0.75, 0.75]]), rtol=0, atol=1e-4)


@given(st.floats(min_value=-60, max_value=-1e-5))
def test_log_one_minus_exp_keeps_its_digits(value: float) -> None:
    found = float(log_one_minus_exp(torch.tensor(value, dtype=torch.float64)))
    expected = math.log(-math.expm1(value)) if value > -0.5 else math.log1p(-math.exp(value))
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-300)


def test_log_one_minus_exp_has_a_gradient_even_at_zero() -> None:
    values = torch.tensor([0.0, -1e-9, -0.5, -50.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(log_one_minus_exp(values).sum(), values)
    assert bool(gradient.isfinite().all())


def plain_orpo(chosen: Tensor, rejected: Tensor) -> Tensor:
    p, q = chosen.exp(), rejected.exp()
    return -chosen - 0.1 * torch.log(torch.sigmoid(torch.log((p / (1 - p)) / (q / (1 - q)))))


def test_the_gradient_of_orpo_is_autograds_of_the_plain_definition() -> None:
    values = torch.tensor([-0.01, -0.7, -3.0, -0.4, -2.0, -0.05], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(3, dtype=torch.float64)
    ours = orpo_losses(PairScores(values[:3], values[3:], ones, ones), beta=0.1).losses.sum()
    plain = plain_orpo(values[:3], values[3:]).sum()
    (found,) = torch.autograd.grad(ours, values)
    (expected,) = torch.autograd.grad(plain, values)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
