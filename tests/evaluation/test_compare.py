from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from affina.errors import EvaluationError
from affina.evaluation.compare import (
    ComparedReply,
    CompareSettings,
    Contestant,
    EvaluationResult,
    choose_samples,
    compare,
    judge_accuracy,
    judge_perplexity,
)
from affina.evaluation.perplexity import RecordScore
from affina.evaluation.tasks.exact_match import ReplyTask
from tests.evaluation.fakes import FakeGenerate, FakeScore, sample

SETTINGS = CompareSettings(num_resamples=300)


def tasks(num: int) -> list[ReplyTask]:
    return [
        ReplyTask((1, index), f"question {index}", "yes", "normalized", f"v.jsonl:{index + 1}") for index in range(num)
    ]


def losses(num: int, level: float, spread: float, seed: int = 0) -> dict[int, float]:
    values = np.random.default_rng(seed).normal(level, spread, num)
    return {index: float(value) for index, value in enumerate(values)}


def run(base_loss: Any, tuned_loss: Any, base_reply: Any = "no", tuned_reply: Any = "yes", num: int = 40) -> Any:
    samples = [sample(5, 4 + index % 3, identity=index) for index in range(num)]
    return compare(
        Contestant(FakeScore(base_loss), FakeGenerate(base_reply)),
        Contestant(FakeScore(tuned_loss), FakeGenerate(tuned_reply)),
        samples,
        tasks(num),
        settings=SETTINGS,
    )


def test_a_clear_gain_is_called_better_in_words_and_numbers() -> None:
    result = run(losses(40, 2.0, 0.1), losses(40, 0.5, 0.1, seed=1))
    assert result.perplexity.conclusion == "better"
    assert result.perplexity.change == pytest.approx(math.exp(-1.5), rel=0.05)
    assert result.perplexity.sentence.startswith("Better: perplexity on reply tokens fell from 7.")
    assert result.accuracy.conclusion == "better"
    assert result.accuracy.sentence.startswith("Better: accuracy rose from 0% to 100% (+100.0 points, 95% interval +")
    assert result.counts.to_dict() == {"both_right": 0, "gained": 40, "lost": 0, "neither_right": 0}


def test_a_loss_is_called_worse() -> None:
    result = run(losses(40, 0.5, 0.1), losses(40, 2.0, 0.1, seed=1), base_reply="yes", tuned_reply="no")
    assert result.perplexity.conclusion == "worse"
    assert "rose from" in result.perplexity.sentence
    assert result.accuracy.conclusion == "worse"
    assert result.accuracy.sentence.startswith("Worse: accuracy fell from 100% to 0% (−100.0 points")


def test_the_same_model_twice_is_unchanged() -> None:
    result = run(losses(40, 1.0, 0.3), losses(40, 1.0, 0.3), base_reply="no", tuned_reply="no")
    assert result.perplexity.conclusion == "unchanged"
    assert result.perplexity.sentence == "Unchanged: every reply has the same probability under both models (n=40)."
    assert result.accuracy.conclusion == "unchanged"
    assert result.accuracy.sentence.startswith(
        "Unchanged: both models are right on the same records, 0% of them (n=40;"
    )


def test_a_difference_inside_the_noise_cannot_be_told_and_says_how_many_records_would_do() -> None:
    noise = np.random.default_rng(3).normal(0, 1, 40)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    base = [RecordScore(20.0, 10)] * 40
    tuned = [RecordScore(20.0 + 10 * (-0.1 + 0.5 * value), 10) for value in noise]
    verdict = judge_perplexity(base, tuned, settings=SETTINGS)
    assert verdict.conclusion == "cannot tell"
    # Effect 0.1, standard error 0.5 / √40 on 40 records: (2.8016 · 0.5 / 0.1)² = 196.2.
    assert verdict.num_records_needed == 197
    assert verdict.sentence.startswith(
        "Cannot tell with n=40: perplexity on reply tokens went from 7.39 to 6.69, and the"
    )
    assert verdict.sentence.endswith("About 200 records would be needed to tell a difference of this size.")


def test_a_difference_that_no_data_set_can_show_is_not_given_a_number() -> None:
    base_right = [True, False] * 20
    tuned_right = [False, True] * 20
    verdict = judge_accuracy(base_right, tuned_right, settings=SETTINGS)
    assert verdict.conclusion == "cannot tell"
    assert verdict.num_records_needed is None
    assert verdict.sentence.endswith("would stay invisible with any number of records that one can collect.")


def test_five_gains_of_five_records_are_not_enough_and_six_are() -> None:
    five = judge_accuracy([False] * 5, [True] * 5, settings=SETTINGS)
    six = judge_accuracy([False] * 6, [True] * 6, settings=SETTINGS)
    assert (five.conclusion, five.p_value) == ("cannot tell", 0.0625)
    assert (six.conclusion, six.p_value) == ("better", 0.03125)


def test_too_few_records_for_an_interval_are_said_to_be_so() -> None:
    result = run(losses(3, 2.0, 0.1), losses(3, 0.5, 0.1), num=3)
    assert result.perplexity.conclusion == "cannot tell"
    assert result.perplexity.sentence.endswith("but so few records allow no interval.")
    assert result.to_dict()["ci"]["perplexity"]["ratio"] == [0.0, None]


def test_a_small_difference_in_a_big_set_is_seen_because_records_are_paired() -> None:
    records = np.random.default_rng(0)
    hard = records.normal(2.0, 1.0, 200)
    base = [RecordScore(10 * float(level), 10) for level in hard]
    tuned = [RecordScore(10 * (float(level) - 0.05 + float(records.normal(0, 0.1))), 10) for level in hard]
    # The spread between records (1.0) is twenty times the effect (0.05); unpaired it would drown.
    assert judge_perplexity(base, tuned, settings=SETTINGS).conclusion == "better"


def test_without_generation_there_is_perplexity_and_no_accuracy() -> None:
    samples = [sample(3, 3, identity=index) for index in range(8)]
    result = compare(Contestant(FakeScore(2.0)), Contestant(FakeScore(1.0)), samples, tasks(8), settings=SETTINGS)
    assert result.accuracy is None
    values = result.to_dict()
    assert values["base"]["accuracy"] is None
    assert values["ci"]["accuracy"] is None
    assert values["num_replies"] == 0


def test_records_without_trained_tokens_are_left_out_and_noted() -> None:
    samples = [sample(4, 0), *(sample(3, 3, identity=index) for index in range(6))]
    result = compare(Contestant(FakeScore(2.0)), Contestant(FakeScore(1.0)), samples, settings=SETTINGS)
    assert result.num_records == 6
    assert result.notes == ("1 validation records without a trained token were left out",)


@pytest.mark.parametrize(
    ("samples", "what"),
    [([], "no validation records"), ([sample(4, 0)], "none of the 1 validation records has a trained reply")],
)
def test_no_validation_data_is_an_error_with_a_way_out(samples: list[Any], what: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        compare(Contestant(FakeScore(1.0)), Contestant(FakeScore(1.0)), samples)
    assert caught.value.render() == (
        f"error[evaluation-no-records]: {what}\n"
        "  why: base and tuned model are compared on records that training did not see\n"
        "  fix: set data.validation, or a data.validation_fraction above 0, and train again"
    )


def test_cut_off_replies_are_counted_and_noted() -> None:
    samples = [sample(3, 3, identity=index) for index in range(6)]
    result = compare(
        Contestant(FakeScore(2.0), FakeGenerate("no")),
        Contestant(FakeScore(1.0), FakeGenerate("yes and", is_complete=False)),
        samples,
        tasks(6),
        settings=SETTINGS,
    )
    assert result.tuned.num_cut_off == 6
    assert result.notes[0].startswith("6 of 6 replies of the tuned model reached the token limit")


def test_the_json_has_the_promised_shape_and_survives_a_round_trip() -> None:
    values = run(losses(40, 2.0, 0.1), losses(40, 0.5, 0.1)).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["n"] == 40
    assert {"perplexity", "accuracy"} <= values["base"].keys() & values["tuned"].keys()
    assert values["ci"]["level"] == 0.95
    for measure, parts in {
        "perplexity": ("base", "tuned", "ratio"),
        "accuracy": ("base", "tuned", "difference"),
    }.items():
        for part in parts:
            low, high = values["ci"][measure][part]
            assert low <= high
    assert len(values["samples"]) == 3
    assert {"prompt", "reference", "base", "tuned", "base_is_right", "tuned_is_right"} <= values["samples"][0].keys()


def test_every_figure_lies_in_its_interval() -> None:
    result: EvaluationResult = run(losses(40, 1.4, 0.5), losses(40, 1.2, 0.5, seed=9))
    for figures in (result.base, result.tuned):
        assert figures.perplexity_interval.low <= figures.perplexity <= figures.perplexity_interval.high
        assert figures.accuracy is not None
        assert figures.accuracy_interval is not None
        assert figures.accuracy_interval.low <= figures.accuracy <= figures.accuracy_interval.high
    assert result.perplexity.interval.low <= result.perplexity.change <= result.perplexity.interval.high
    assert result.perplexity.change == pytest.approx(result.tuned.perplexity / result.base.perplexity)


def test_progress_tells_each_model_and_phase() -> None:
    phases: list[str] = []
    samples = [sample(3, 3, identity=index) for index in range(6)]
    compare(
        Contestant(FakeScore(2.0), FakeGenerate("no")),
        Contestant(FakeScore(1.0), FakeGenerate("yes")),
        samples,
        tasks(6),
        settings=SETTINGS,
        progress=lambda phase, done, of: phases.append(phase),
    )
    assert list(dict.fromkeys(phases)) == [
        "base model, perplexity",
        "base model, replies",
        "tuned model, perplexity",
        "tuned model, replies",
    ]


def reply(base: bool, tuned: bool, name: str) -> ComparedReply:
    return ComparedReply(name, "r", "b", "t", base, tuned, "exact", "")


def test_samples_show_every_kind_and_never_hide_what_was_lost() -> None:
    replies = [
        *(reply(False, True, f"gained {n}") for n in range(5)),
        reply(True, False, "lost 0"),
        reply(True, True, "both 0"),
        reply(False, False, "neither 0"),
    ]
    assert [one.prompt for one in choose_samples(replies, 3)] == ["gained 0", "lost 0", "neither 0"]
    assert [one.prompt for one in choose_samples(replies, 6)][3:] == ["both 0", "gained 1", "gained 2"]
    assert len(choose_samples(replies, 100)) == 8
    assert choose_samples(replies, 0) == ()
