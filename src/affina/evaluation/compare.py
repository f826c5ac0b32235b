"""Base against tuned model on the same records: figures, intervals, and in words what they allow one to say.

Two questions are asked, and each gets its own answer, because they can differ: does the tuned model expect the
replies more (perplexity on reply tokens), and does it give them (accuracy of generated replies)?
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from affina.data.samples import Sample
from affina.errors import EvaluationError
from affina.evaluation.perplexity import (
    Progress,
    RecordScore,
    Score,
    corpus_loss,
    exponential,
    no_progress,
    score_records,
)
from affina.evaluation.stats import (
    Estimate,
    Interval,
    accuracy_difference,
    bootstrap_ratio,
    mcnemar_exact,
    num_records_needed,
    wilson_interval,
)
from affina.evaluation.tasks.exact_match import Generate, ReplyOutcome, ReplyTask, accuracy, run_tasks

Conclusion = Literal["better", "worse", "cannot tell", "unchanged"]

_HOPELESS_NUM_RECORDS = 1_000_000
"""Above this, naming a number of records would suggest that collecting them is a plan."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One of the two models: a way to score samples and a way to generate replies (None: replies are not compared)."""

    score: Score
    generate: Generate | None = None


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """Level and number of the bootstrap, and how much is computed at once."""

    confidence: float = 0.95
    num_resamples: int = 2000
    seed: int = 0
    num_samples: int = 3
    batch_size: int = 16
    max_tokens_at_once: int = 8192


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """What one model reached. Accuracy and what belongs to it is None when no replies were generated."""

    perplexity: float
    loss: float
    perplexity_interval: Interval
    accuracy: float | None = None
    accuracy_interval: Interval | None = None
    num_right: int | None = None
    mean_reply_tokens: float | None = None
    num_cut_off: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "perplexity": _json_number(self.perplexity),
            "loss": _json_number(self.loss),
            "accuracy": self.accuracy,
            "num_right": self.num_right,
            "mean_reply_tokens": self.mean_reply_tokens,
            "num_cut_off": self.num_cut_off,
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one figure allows to conclude.

    conclusion:         better, worse, cannot tell (the interval includes no difference), unchanged (all records equal)
    sentence:           the same in words, with the interval
    change:             tuned / base perplexity, or tuned − base accuracy
    interval:           of the change
    p_value:            McNemar's exact test, for accuracy
    num_records_needed: about how many records would tell a difference of this size, when it cannot be told
    """

    conclusion: Conclusion
    sentence: str
    change: float
    interval: Interval
    p_value: float | None = None
    num_records_needed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "conclusion": self.conclusion,
            "sentence": self.sentence,
            "change": _json_number(self.change),
            "interval": _json_interval(self.interval),
            "p_value": self.p_value,
            "num_records_needed": self.num_records_needed,
        }


@dataclass(frozen=True, slots=True)
class ComparedReply:
    """One task with both models' answers."""

    prompt: str
    reference: str
    base: str
    tuned: str
    base_is_right: bool
    tuned_is_right: bool
    matcher: str
    origin: str
    base_is_complete: bool = True
    tuned_is_complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "reference": self.reference,
            "base": self.base,
            "tuned": self.tuned,
            "base_is_right": self.base_is_right,
            "tuned_is_right": self.tuned_is_right,
            "matcher": self.matcher,
            "origin": self.origin,
            "base_is_complete": self.base_is_complete,
            "tuned_is_complete": self.tuned_is_complete,
        }


@dataclass(frozen=True, slots=True)
class ReplyCounts:
    """On how many records which model is right."""

    both: int
    gained: int
    lost: int
    neither: int

    def to_dict(self) -> dict[str, int]:
        return {"both_right": self.both, "gained": self.gained, "lost": self.lost, "neither_right": self.neither}


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Base and tuned model on the same validation records.

    num_records: records whose perplexity was measured     num_replies: records for which replies were generated
    replies:     every compared reply                      samples:     the few that are shown
    notes:       what a reader must know to read the figures right
    report_path, samples_path: where the report and all replies were written, when they were
    """

    base: ModelFigures
    tuned: ModelFigures
    num_records: int
    num_tokens: int
    confidence: float
    perplexity: Verdict
    accuracy: Verdict | None = None
    num_replies: int = 0
    counts: ReplyCounts | None = None
    replies: tuple[ComparedReply, ...] = ()
    samples: tuple[ComparedReply, ...] = ()
    notes: tuple[str, ...] = ()
    run: str | None = None
    report_path: str | None = None
    samples_path: str | None = None
    seconds: float | None = None

    def with_files(self, *, run: str, report_path: str | None, samples_path: str | None) -> EvaluationResult:
        """The same result, knowing where it was written."""
        return replace(self, run=run, report_path=report_path, samples_path=samples_path)

    def to_dict(self) -> dict[str, Any]:
        """What `affina eval --json` prints and evaluation/result.json holds; all replies are in samples.jsonl."""
        accuracy_ci: dict[str, Any] | None = None
        if self.accuracy is not None:
            accuracy_ci = {
                "base": _json_interval(self.base.accuracy_interval),
                "tuned": _json_interval(self.tuned.accuracy_interval),
                "difference": _json_interval(self.accuracy.interval),
            }
        return {
            "base": self.base.to_dict(),
            "tuned": self.tuned.to_dict(),
            "n": self.num_records,
            "num_tokens": self.num_tokens,
            "num_replies": self.num_replies,
            "ci": {
                "level": self.confidence,
                "perplexity": {
                    "base": _json_interval(self.base.perplexity_interval),
                    "tuned": _json_interval(self.tuned.perplexity_interval),
                    "ratio": _json_interval(self.perplexity.interval),
                },
                "accuracy": accuracy_ci,
            },
            "verdict": {
                "perplexity": self.perplexity.to_dict(),
                "accuracy": self.accuracy.to_dict() if self.accuracy else None,
            },
            "counts": self.counts.to_dict() if self.counts else None,
            "samples": [sample.to_dict() for sample in self.samples],
            "notes": list(self.notes),
            "run": self.run,
            "report": self.report_path,
            "replies": self.samples_path,
            "seconds": self.seconds,
        }


def compare(
    base: Contestant,
    tuned: Contestant,
    samples: Sequence[Sample],
    tasks: Sequence[ReplyTask] = (),
    *,
    sample_groups: Sequence[str | None] | None = None,
    settings: CompareSettings | None = None,
    notes: Sequence[str] = (),
    progress: Progress = no_progress,
) -> EvaluationResult:
    """Measure both models on the same samples and tasks and say what follows.

    samples:       validation samples; those without a supervised token are left out and noted
    tasks:         replies to generate and compare; empty: perplexity only
    sample_groups: [len(samples)] records of one group are resampled together

    Raises EvaluationError `evaluation-no-records` when no sample has a supervised token.
    """
    settings = settings or CompareSettings()
    usable = [index for index, sample in enumerate(samples) if sample.num_supervised > 0]
    if not usable:
        raise EvaluationError(
            "evaluation-no-records",
            f"none of the {len(samples)} validation records has a trained reply"
            if samples
            else "no validation records",
            why="base and tuned model are compared on records that training did not see",
            fix="set data.validation, or a data.validation_fraction above 0, and train again",
        )
    notes = list(notes)
    if len(usable) < len(samples):
        notes.append(f"{len(samples) - len(usable)} validation records without a trained token were left out")
    chosen = [samples[index] for index in usable]
    groups = [sample_groups[index] for index in usable] if sample_groups is not None else None

    # One model at a time: switching an adapter on and off per batch costs more, and with offloading a lot more.
    base_scores = score_records(
        chosen,
        base.score,
        max_tokens_at_once=settings.max_tokens_at_once,
        phase="base model, perplexity",
        progress=progress,
    )
    base_outcomes = _generate(base, tasks, settings, "base model, replies", progress)
    tuned_scores = score_records(
        chosen,
        tuned.score,
        max_tokens_at_once=settings.max_tokens_at_once,
        phase="tuned model, perplexity",
        progress=progress,
    )
    tuned_outcomes = _generate(tuned, tasks, settings, "tuned model, replies", progress)

    result = EvaluationResult(
        base=_perplexity_figures(base_scores, groups, settings),
        tuned=_perplexity_figures(tuned_scores, groups, settings),
        num_records=len(chosen),
        num_tokens=sum(score.num_tokens for score in base_scores),
        confidence=settings.confidence,
        perplexity=judge_perplexity(base_scores, tuned_scores, groups=groups, settings=settings),
        notes=tuple(notes),
    )
    if not base_outcomes or not tuned_outcomes:
        return result
    return _with_replies(result, tasks, base_outcomes, tuned_outcomes, settings)


def judge_perplexity(
    base: Sequence[RecordScore],
    tuned: Sequence[RecordScore],
    *,
    groups: Sequence[str | None] | None = None,
    settings: CompareSettings,
) -> Verdict:
    """The verdict on perplexity: is the ratio tuned / base below 1 by more than chance?"""
    log_ratio = bootstrap_ratio(
        [after.nll - before.nll for before, after in zip(base, tuned, strict=True)],
        [score.num_tokens for score in base],
        groups=groups,
        num_resamples=settings.num_resamples,
        confidence=settings.confidence,
        seed=settings.seed,
    )
    ratio = exponential(log_ratio.value)
    interval = Interval(
        exponential(log_ratio.interval.low), exponential(log_ratio.interval.high), log_ratio.interval.level
    )
    conclusion = _conclude(log_ratio, lower_is_better=True)
    needed = num_records_needed(log_ratio, len(base)) if conclusion == "cannot tell" else None
    perplexities = exponential(corpus_loss(base)), exponential(corpus_loss(tuned))
    sentence = _perplexity_sentence(conclusion, perplexities, interval, len(base), needed)
    return Verdict(conclusion, sentence, ratio, interval, num_records_needed=needed)


def judge_accuracy(
    base_right: Sequence[bool],
    tuned_right: Sequence[bool],
    *,
    groups: Sequence[str | None] | None = None,
    settings: CompareSettings,
) -> Verdict:
    """The verdict on accuracy. A difference counts when its interval excludes zero *and* McNemar's test agrees."""
    difference = accuracy_difference(
        base_right,
        tuned_right,
        groups=groups,
        num_resamples=settings.num_resamples,
        confidence=settings.confidence,
        seed=settings.seed,
    )
    gained = sum(after and not before for before, after in zip(base_right, tuned_right, strict=True))
    lost = sum(before and not after for before, after in zip(base_right, tuned_right, strict=True))
    p_value = mcnemar_exact(gained, lost)
    if gained == lost == 0:
        conclusion: Conclusion = "unchanged"
    elif p_value > 1 - settings.confidence:
        conclusion = "cannot tell"
    else:
        conclusion = _conclude(difference, lower_is_better=False)
    needed = num_records_needed(difference, len(base_right)) if conclusion == "cannot tell" else None
    shares = sum(base_right) / len(base_right), sum(tuned_right) / len(tuned_right)
    sentence = _accuracy_sentence(conclusion, shares, difference, len(base_right), needed)
    return Verdict(conclusion, sentence, difference.value, difference.interval, p_value, needed)


def choose_samples(replies: Sequence[ComparedReply], num_samples: int) -> tuple[ComparedReply, ...]:
    """A few replies of every kind: gained, lost, both right, neither, in turns and in the order of the records.

    What the tuned model lost is shown whenever there is any and room for two: a comparison that shows only gains
    would be an advertisement.
    """
    kinds: dict[tuple[bool, bool], list[ComparedReply]] = {
        (False, True): [],
        (True, False): [],
        (False, False): [],
        (True, True): [],
    }
    for reply in replies:
        kinds[reply.base_is_right, reply.tuned_is_right].append(reply)
    chosen: list[ComparedReply] = []
    queues = [queue for queue in kinds.values() if queue]
    while len(chosen) < num_samples and queues:
        for queue in list(queues):
            if len(chosen) < num_samples:
                chosen.append(queue.pop(0))
            if not queue:
                queues.remove(queue)
    return tuple(chosen)


def _generate(
    contestant: Contestant,
    tasks: Sequence[ReplyTask],
    settings: CompareSettings,
    phase: str,
    progress: Progress,
) -> list[ReplyOutcome]:
    if contestant.generate is None or not tasks:
        return []
    return run_tasks(tasks, contestant.generate, batch_size=settings.batch_size, phase=phase, progress=progress)


def _perplexity_figures(
    scores: Sequence[RecordScore], groups: Sequence[str | None] | None, settings: CompareSettings
) -> ModelFigures:
    estimate = bootstrap_ratio(
        [score.nll for score in scores],
        [score.num_tokens for score in scores],
        groups=groups,
        num_resamples=settings.num_resamples,
        confidence=settings.confidence,
        seed=settings.seed,
    )
    loss = corpus_loss(scores)
    # A perplexity is at least 1; a symmetric interval of its logarithm may reach below.
    low, high = max(0.0, estimate.interval.low), estimate.interval.high
    return ModelFigures(
        perplexity=exponential(loss),
        loss=loss,
        perplexity_interval=Interval(exponential(low), exponential(high), settings.confidence),
    )


def _with_replies(
    result: EvaluationResult,
    tasks: Sequence[ReplyTask],
    base: Sequence[ReplyOutcome],
    tuned: Sequence[ReplyOutcome],
    settings: CompareSettings,
) -> EvaluationResult:
    base_right, tuned_right = [outcome.is_right for outcome in base], [outcome.is_right for outcome in tuned]
    pairs = list(zip(base_right, tuned_right, strict=True))
    replies = tuple(
        ComparedReply(
            prompt=task.prompt,
            reference=task.reference,
            base=before.answer,
            tuned=after.answer,
            base_is_right=before.is_right,
            tuned_is_right=after.is_right,
            matcher=task.matcher,
            origin=task.origin,
            base_is_complete=before.is_complete,
            tuned_is_complete=after.is_complete,
        )
        for task, before, after in zip(tasks, base, tuned, strict=True)
    )
    notes = list(result.notes)
    cut_off = sum(not outcome.is_complete for outcome in tuned)
    if cut_off:
        notes.append(
            f"{cut_off} of {len(tuned)} replies of the tuned model reached the token limit and were judged as they "
            "are (evaluation.max_new_tokens)"
        )
    return replace(
        result,
        base=_reply_figures(result.base, base, settings),
        tuned=_reply_figures(result.tuned, tuned, settings),
        accuracy=judge_accuracy(base_right, tuned_right, groups=[task.group for task in tasks], settings=settings),
        num_replies=len(tasks),
        counts=ReplyCounts(
            both=pairs.count((True, True)),
            gained=pairs.count((False, True)),
            lost=pairs.count((True, False)),
            neither=pairs.count((False, False)),
        ),
        replies=replies,
        samples=choose_samples(replies, settings.num_samples),
        notes=tuple(notes),
    )


def _reply_figures(figures: ModelFigures, outcomes: Sequence[ReplyOutcome], settings: CompareSettings) -> ModelFigures:
    num_right = sum(outcome.is_right for outcome in outcomes)
    return replace(
        figures,
        accuracy=accuracy(outcomes),
        accuracy_interval=wilson_interval(num_right, len(outcomes), confidence=settings.confidence),
        num_right=num_right,
        mean_reply_tokens=sum(outcome.num_tokens for outcome in outcomes) / len(outcomes),
        num_cut_off=sum(not outcome.is_complete for outcome in outcomes),
    )


def _conclude(estimate: Estimate, *, lower_is_better: bool) -> Conclusion:
    if estimate.value == 0 and estimate.standard_error == 0:
        return "unchanged"
    if not estimate.interval.excludes(0.0):
        return "cannot tell"
    return "better" if (estimate.value < 0) == lower_is_better else "worse"


def _perplexity_sentence(
    conclusion: Conclusion, perplexities: tuple[float, float], interval: Interval, num_records: int, needed: int | None
) -> str:
    if conclusion == "unchanged":
        return f"Unchanged: every reply has the same probability under both models (n={num_records})."
    base, tuned = (format_perplexity(perplexity) for perplexity in perplexities)
    course = f"perplexity on reply tokens went from {base} to {tuned}"
    if not math.isfinite(interval.high):
        return f"Cannot tell with n={num_records}: {course}, but so few records allow no interval."
    level = f"{interval.level:.0%} interval of the ratio"
    if conclusion == "cannot tell":
        return (
            f"Cannot tell with n={num_records}: {course}, and the {level} is {interval.low:.3f} to "
            f"{interval.high:.3f}, which includes 1 (no difference).{_needed_sentence(needed)}"
        )
    verb = "fell" if conclusion == "better" else "rose"
    return (
        f"{conclusion.capitalize()}: perplexity on reply tokens {verb} from {base} to {tuned} ({level} "
        f"{interval.low:.3f} to {interval.high:.3f}, n={num_records})."
    )


def format_share(value: float) -> str:
    """`93.5%`; whole numbers at the ends, where a decimal would add nothing."""
    return f"{value:.0%}" if value in (0.0, 1.0) else f"{value:.1%}"


def format_points(value: float) -> str:
    """A difference of shares in percentage points, with its sign: `+84.0`, `−2.5`."""
    return f"{100 * value:+.1f}".replace("-", "−")


def format_perplexity(value: float) -> str:
    """A perplexity with three or four digits: 11.54, 1.45, 1,204."""
    if not math.isfinite(value):
        return "∞"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _accuracy_sentence(
    conclusion: Conclusion, shares: tuple[float, float], difference: Estimate, num_records: int, needed: int | None
) -> str:
    points = f"{format_points(difference.value)} points"
    low, high = (format_points(end) for end in difference.interval.to_list())
    level = f"{difference.interval.level:.0%} interval"
    if conclusion == "unchanged":
        return (
            f"Unchanged: both models are right on the same records, {format_share(shares[0])} of them "
            f"(n={num_records}; the {level} of the difference is {low} to {high} points)."
        )
    course = f"accuracy went from {format_share(shares[0])} to {format_share(shares[1])}"
    if conclusion == "cannot tell":
        return (
            f"Cannot tell with n={num_records}: {course}, and the {level} of the difference is {low} to {high} "
            f"points.{_needed_sentence(needed)}"
        )
    verb = "rose" if conclusion == "better" else "fell"
    return (
        f"{conclusion.capitalize()}: accuracy {verb} from {format_share(shares[0])} to {format_share(shares[1])} "
        f"({points}, {level} {low} to {high}, n={num_records})."
    )


def _needed_sentence(needed: int | None) -> str:
    if needed is None or needed > _HOPELESS_NUM_RECORDS:
        return " A difference this small would stay invisible with any number of records that one can collect."
    return f" About {_rounded(needed):,} records would be needed to tell a difference of this size."


def _rounded(number: int) -> int:
    """Two significant digits, upwards: more would promise a precision that an order of magnitude has not."""
    scale: int = 10 ** max(0, len(str(number)) - 2)
    return int(-(-number // scale) * scale)


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json_interval(interval: Interval | None) -> list[float | None] | None:
    return [_json_number(interval.low), _json_number(interval.high)] if interval is not None else None
