"""Perplexity on reply tokens: how surprised a model is by the replies that it should give.

    perplexity = exp( Σ_records nll / Σ_records tokens )        nll in nats, over supervised tokens only

Sums are taken over the whole set before the quotient: the mean of per-record perplexities would weigh a reply of two
tokens like one of two hundred, and depend on how text is cut into records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from affina.data.samples import Sample
from affina.errors import EvaluationError

Progress = Callable[[str, int, int], None]
"""Called with a phase ("perplexity, base"), records done and records in all."""


@dataclass(frozen=True, slots=True)
class RecordScore:
    """One record under one model: `nll` is the sum over its `num_tokens` supervised tokens, in nats."""

    nll: float
    num_tokens: int


class Score(Protocol):
    """Scores samples in the order given; how many share one forward pass is the scorer's affair."""

    def __call__(self, samples: Sequence[Sample], /) -> Sequence[RecordScore]: ...


def no_progress(phase: str, num_done: int, num_records: int) -> None:
    """A progress callback that shows nothing."""


def score_records(
    samples: Sequence[Sample],
    score: Score,
    *,
    max_tokens_at_once: int = 8192,
    phase: str = "perplexity",
    progress: Progress = no_progress,
) -> list[RecordScore]:
    """The score of each sample, in order.

    max_tokens_at_once: samples handed to `score` together have at most this many tokens (or are one sample).

    Raises EvaluationError `evaluation-not-finite` for a NaN or infinite score: a perplexity of it would hide that the
    model is broken.
    """
    scores: list[RecordScore] = []
    for group in _groups_of_tokens(samples, max_tokens_at_once):
        for offset, result in enumerate(score(group)):
            if not math.isfinite(result.nll):
                raise EvaluationError(
                    "evaluation-not-finite",
                    f"validation record {len(scores) + 1} has a loss of {result.nll}",
                    why="the model's outputs overflow or its weights hold NaN; no perplexity can be given",
                    fix="look for skipped steps in events.jsonl; try training.precision: bf16 (or fp32), or a lower "
                    "training.learning_rate",
                )
            assert result.num_tokens == group[offset].num_supervised, "a scorer must count the supervised tokens"
            scores.append(result)
        progress(phase, len(scores), len(samples))
    return scores


def corpus_perplexity(scores: Sequence[RecordScore]) -> float:
    """exp(Σ nll / Σ tokens). Raises EvaluationError `evaluation-no-tokens` when nothing is supervised."""
    return exponential(corpus_loss(scores))


def corpus_loss(scores: Sequence[RecordScore]) -> float:
    """Σ nll / Σ tokens: nats per reply token, the same quantity as the validation loss in training."""
    num_tokens = sum(score.num_tokens for score in scores)
    if num_tokens == 0:
        raise EvaluationError(
            "evaluation-no-tokens",
            f"{len(scores)} validation records have no supervised token",
            why="perplexity is measured on the tokens of trained replies",
            fix="look at `affina data` with --show; check data.mask and per-message `train`",
        )
    return math.fsum(score.nll for score in scores) / num_tokens


def exponential(value: float) -> float:
    """exp that ends in infinity where the standard library raises."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _groups_of_tokens(samples: Sequence[Sample], max_tokens: int) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    num_tokens = 0
    for sample in samples:
        if group and num_tokens + len(sample) > max_tokens:
            yield group
            group, num_tokens = [], 0
        group.append(sample)
        num_tokens += len(sample)
    if group:
        yield group
