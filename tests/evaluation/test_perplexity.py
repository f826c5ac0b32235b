from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from affina.data.samples import Sample
from affina.errors import EvaluationError
from affina.evaluation.perplexity import (
    RecordScore,
    corpus_loss,
    corpus_perplexity,
    exponential,
    score_records,
)
from tests.evaluation.fakes import FakeScore, sample


def test_perplexity_weighs_tokens_and_not_records() -> None:
    # Two tokens at 4 nats and eight at 1: 16 nats over 10 tokens.
    scores = [RecordScore(8.0, 2), RecordScore(8.0, 8)]
    assert corpus_loss(scores) == pytest.approx(1.6)
    assert corpus_perplexity(scores) == pytest.approx(math.exp(1.6))


def test_a_model_that_is_certain_has_perplexity_one() -> None:
    assert corpus_perplexity([RecordScore(0.0, 5)]) == 1.0


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    scores = score_records([sample(3, 4), sample(2, 9)], FakeScore(math.log(8000)))
    assert corpus_perplexity(scores) == pytest.approx(8000)


def test_scores_come_in_the_order_of_the_samples_in_groups_of_bounded_size() -> None:
    samples = [sample(5, 5, identity=index) for index in range(7)]
    score = FakeScore({index: float(index) for index in range(7)})
    progress: list[tuple[str, int, int]] = []
    scores = score_records(samples, score, max_tokens_at_once=25, progress=lambda *state: progress.append(state))
    assert [one.nll for one in scores] == [5.0 * index for index in range(7)]
    assert score.calls == [2, 2, 2, 1]
    assert progress[-1] == ("perplexity", 7, 7)


def test_a_sample_longer_than_the_limit_is_scored_alone() -> None:
    score = FakeScore(1.0)
    score_records([sample(2, 2), sample(50, 50), sample(2, 2)], score, max_tokens_at_once=10)
    assert score.calls == [1, 1, 1]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error_and_not_a_perplexity(loss: float) -> None:
    score = FakeScore({1: 1.0, 2: loss})
    with pytest.raises(EvaluationError) as caught:
        score_records([sample(2, 2), sample(2, 2, identity=2)], score)
    assert caught.value.code == "evaluation-not-finite"
    assert caught.value.what == f"validation record 2 has a loss of {loss}"
    assert "training.precision" in (caught.value.fix or "")


def test_a_scorer_that_counts_other_tokens_is_our_bug() -> None:
    def miscount(samples: Sequence[Sample], /) -> list[RecordScore]:
        return [RecordScore(1.0, one.num_supervised + 1) for one in samples]

    with pytest.raises(AssertionError, match="supervised"):
        score_records([sample(2, 2)], miscount)


def test_no_supervised_token_is_an_error_that_names_the_mask() -> None:
    with pytest.raises(EvaluationError) as caught:
        corpus_loss([RecordScore(0.0, 0)])
    assert caught.value.code == "evaluation-no-tokens"
    assert "data.mask" in (caught.value.fix or "")


def test_a_huge_loss_gives_infinity_and_no_exception() -> None:
    assert exponential(1000.0) == math.inf
    assert exponential(-math.inf) == 0.0
