"""What `affina data` says about a data set: one frozen value that holds numbers, never tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from affina.data.batches import padded_efficiency, round_up
from affina.data.packing import efficiency, min_rows, pack

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """Sizes of the samples of one set, in tokens; percentiles are sizes that occur (no interpolation)."""

    num_samples: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    p50: int = 0
    p95: int = 0
    p99: int = 0
    max: int = 0

    @property
    def supervised_share(self) -> float:
        return self.num_supervised / self.num_tokens if self.num_tokens else 0.0


def summarize_lengths(lengths: NDArray[np.int32], num_supervised: NDArray[np.int32]) -> LengthSummary:
    """The summary of a set by its sizes."""
    if not len(lengths):
        return LengthSummary()
    p50, p95, p99 = (int(x) for x in np.percentile(lengths, [50, 95, 99], method="higher"))
    return LengthSummary(
        num_samples=len(lengths),
        num_tokens=int(lengths.sum(dtype=np.int64)),
        num_supervised=int(num_supervised.sum(dtype=np.int64)),
        p50=p50,
        p95=p95,
        p99=p99,
        max=int(lengths.max()),
    )


@dataclass(frozen=True, slots=True)
class PackingSummary:
    """How full the rows are.

    efficiency:        with the packing that training uses
    best_possible:     an upper bound for any packing (Martello and Toth's bound L2 on the rows)
    padded_efficiency: if as many samples per micro-batch as a row holds on average were padded to the longest instead
    """

    is_packed: bool
    num_rows: int
    tokens_per_row: int
    efficiency: float
    best_possible: float
    padded_efficiency: float


def summarize_packing(
    lengths: NDArray[np.int32], *, max_length: int, micro_batch_size: int, packing: bool, seed: int = 0
) -> PackingSummary:
    """Packs the set as training would, and compares."""
    capacity = round_up(max_length * micro_batch_size)
    if not packing or not len(lengths):
        padded = padded_efficiency(lengths, micro_batch_size, seed)
        # Without packing, samples lie end to end in rows of their own length: only the rounding of rows is lost.
        return PackingSummary(False, -(-len(lengths) // micro_batch_size), capacity, 1.0, 1.0, padded)
    rows = pack(lengths, max_length * micro_batch_size)
    best = min_rows(lengths, max_length * micro_batch_size)
    return PackingSummary(
        is_packed=True,
        num_rows=len(rows),
        tokens_per_row=capacity,
        efficiency=efficiency(lengths, len(rows), capacity),
        best_possible=efficiency(lengths, best, capacity),
        padded_efficiency=padded_efficiency(lengths, max(round(len(lengths) / len(rows)), 1), seed),
    )


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What one source gave."""

    description: str
    formats: tuple[str, ...]
    notes: tuple[str, ...]
    num_read: int
    num_kept: int
    num_skipped: int
    role: Literal["train", "validation"] = "train"


@dataclass(frozen=True, slots=True)
class DataFinding:
    """Something the user should know, with what to do about it."""

    level: Level
    code: str
    what: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class DataReport:
    """Everything that preparation learnt.

    counts:          what encoding counted over the training set, see `ChatTemplate.encode` and `fit_record`
    duplicates:      exact and near duplicates, conflicting answers (JSON of `quality.Duplicates`)
    leakage:         of validation records into training (JSON of `quality.LeakageReport`); empty without validation
    pii:             kind → hits in all records
    enable_thinking: how serving and evaluation should build prompts so that they look as trained: True, False, or
                     None where the template has no such switch
    split:           sha256 of each side, number of groups, number of records
    notes:           choices that were made, in sentences
    findings:        what deserves attention, worst first
    """

    sources: tuple[SourceReport, ...]
    num_records_read: int
    num_records_skipped: int
    num_records_repaired: int
    num_duplicates_removed: int
    train: LengthSummary
    validation: LengthSummary
    counts: Mapping[str, int]
    validation_counts: Mapping[str, int]
    problems: Mapping[str, Any]
    duplicates: Mapping[str, Any]
    leakage: Mapping[str, Any]
    pii: Mapping[str, int]
    split: Mapping[str, Any]
    template: Mapping[str, Any]
    enable_thinking: bool | None
    max_length: int
    packing: PackingSummary | None = None
    notes: tuple[str, ...] = ()
    findings: tuple[DataFinding, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the derived shares are in it as well."""
        record = asdict(self)
        for side in ("train", "validation"):
            record[side]["supervised_share"] = getattr(self, side).supervised_share
        return record

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> DataReport:
        """The report that `to_dict` wrote."""
        fields = dict(record)
        for side in ("train", "validation"):
            fields[side] = LengthSummary(**{k: v for k, v in fields[side].items() if k != "supervised_share"})
        fields["sources"] = tuple(
            SourceReport(**{**source, "formats": tuple(source["formats"]), "notes": tuple(source["notes"])})
            for source in fields["sources"]
        )
        fields["findings"] = tuple(DataFinding(**finding) for finding in fields["findings"])
        fields["notes"] = tuple(fields["notes"])
        if fields["packing"] is not None:
            fields["packing"] = PackingSummary(**fields["packing"])
        return DataReport(**fields)


# Thresholds: a share of the training samples (or replies) from which a finding is a warning, or an error.
_WARN_SHARE = 0.01
_ERROR_SHARE = 0.10


def find_problems(report: DataReport) -> tuple[DataFinding, ...]:
    """What in a report deserves attention, worst first."""
    findings = [
        *_reading_findings(report),
        *_truncation_findings(report),
        *_layout_findings(report),
        *_quality_findings(report),
    ]
    order = {"error": 0, "warning": 1, "note": 2}
    return tuple(sorted(findings, key=lambda finding: order[finding.level]))


def _level(share: float) -> Level:
    return "error" if share > _ERROR_SHARE else "warning" if share > _WARN_SHARE else "note"


def _reading_findings(report: DataReport) -> list[DataFinding]:
    findings = [
        DataFinding("warning", "label-not-read", problem["reason"], problem["fix"])
        for problem in report.problems.get("listed", ())
        if problem["code"] == "label-not-read"
    ][:1]
    if not (skipped := report.num_records_skipped):
        return findings
    share = skipped / max(report.num_records_read, 1)
    counts = [entry for entry in report.problems.get("counts", ()) if entry["severity"] == "error"]
    reasons = ", ".join(f"{entry['count']:,} × {entry['code']}" for entry in counts)
    return [
        *findings,
        DataFinding(
            _level(share),
            "records-skipped",
            f"{skipped:,} of {report.num_records_read:,} records ({share:.1%}) are faulty and are left out"
            + (f" ({reasons})" if reasons else ""),
            "`affina data` lists them with file and line",
        ),
    ]


_SPLIT = ", or set data.truncation: split"


def _is_whole(counts: Mapping[str, int]) -> bool:
    """Whether samples are never cut, because a preference is about the whole reply."""
    return any(counts.get(name) for name in ("pairs", "desirable", "undesirable"))


def _truncation_findings(report: DataReport) -> list[DataFinding]:
    counts, findings = report.counts, []
    num_samples = max(report.train.num_samples + counts.get("dropped_too_long", 0), 1)
    if dropped := counts.get("dropped_too_long", 0):
        findings.append(
            DataFinding(
                _level(dropped / num_samples),
                "too-long-dropped",
                f"{dropped:,} samples ({dropped / num_samples:.1%}) are longer than {report.max_length:,} tokens "
                "and are left out",
                f"raise data.max_length{_SPLIT}" if not _is_whole(counts) else "raise data.max_length",
            )
        )
    if lost := counts.get("lost_end_of_turn", 0):
        share = lost / max(counts.get("trained_replies", 0), 1)
        findings.append(
            DataFinding(
                _level(share),
                "lost-end-of-turn",
                f"{lost:,} trained replies ({share:.1%}) are cut before their end-of-turn token",
                "raise data.max_length, or set data.truncation: split or drop",
            )
        )
    if unlabelled := counts.get("dropped_without_labels", 0):
        share = unlabelled / max(unlabelled + report.train.num_samples, 1)
        findings.append(
            DataFinding(
                "error" if share > 0.05 else "warning",
                "without-labels",
                f"{unlabelled:,} samples ({share:.1%}) have no trained token and are left out",
                "check train flags and data.mask, or raise data.max_length",
            )
        )
    return findings


def _layout_findings(report: DataReport) -> list[DataFinding]:
    counts, findings = report.counts, []
    trained = max(counts.get("trained_replies", 0), 1)
    if mismatches := counts.get("prefix_mismatches", 0):
        findings.append(
            DataFinding(
                "warning",
                "unlike-serving",
                f"before {mismatches:,} trained replies ({mismatches / trained:.1%}) stands another text than serving "
                "sends, because the chat template treats earlier turns differently",
                "set data.thinking: empty-masked, which makes one sample per reply, or check the template",
            )
        )
    if lost := counts.get("lost_reasoning", 0):
        findings.append(
            DataFinding(
                "note",
                "reasoning-not-rendered",
                f"the chat template leaves out the reasoning of {lost:,} trained replies",
                "split conversations after each reply with reasoning that should be trained",
            )
        )
    if straddling := counts.get("straddling_tokens", 0):
        findings.append(
            DataFinding(
                "note",
                "straddling-tokens",
                f"{straddling:,} tokens lie across the border of a reply and are not trained",
                "remove white space at the beginning of replies",
            )
        )
    if empty := counts.get("empty_replies", 0):
        findings.append(
            DataFinding(
                "warning",
                "empty-replies",
                f"of {empty:,} replies the template renders nothing but the end of the turn; they are not trained",
                "give them content, or set train: false",
            )
        )
    reasoning, without = counts.get("reasoning", 0), counts.get("empty_think", 0) + counts.get("no_think", 0)
    if reasoning and without and report.enable_thinking is not None and without / (reasoning + without) > 0.05:
        findings.append(
            DataFinding(
                "note",
                "mixed-thinking",
                f"{reasoning:,} trained replies have reasoning and {without:,} have none",
                "that is right if both ways of asking are served; otherwise set data.thinking: strip",
            )
        )
    return findings


_LONGER = 1.5
"""Ratio of mean lengths from which a preference may be one for length alone (Singhal et al., arXiv:2310.03716)."""

_UNBALANCED = 10
"""Ratio of wanted to unwanted replies, either way, from which weights are worth setting: KTO's authors keep the
weighted numbers about equal (arXiv:2402.01306)."""


def _preference_findings(report: DataReport) -> list[DataFinding]:
    counts, findings = report.counts, []
    chosen, rejected = counts.get("chosen_tokens", 0), counts.get("rejected_tokens", 0)
    if chosen and rejected and chosen > _LONGER * rejected:
        findings.append(
            DataFinding(
                "warning",
                "chosen-longer",
                f"chosen replies are {chosen / rejected:.1f} times as long as rejected ones",
                "the model may learn to write more rather than better: add pairs in which the shorter reply is chosen, "
                "or use training.objective: simpo, which compares means over tokens",
            )
        )
    wanted, unwanted = counts.get("desirable", 0), counts.get("undesirable", 0)
    if wanted and unwanted and max(wanted, unwanted) > _UNBALANCED * min(wanted, unwanted):
        few, many = ("undesirable", wanted / unwanted) if wanted > unwanted else ("desirable", unwanted / wanted)
        findings.append(
            DataFinding(
                "warning",
                "labels-unbalanced",
                f"there are {wanted:,} wanted replies and {unwanted:,} unwanted ones",
                f"write training.preference.{few}_weight: {many:.0f}, so that both sides count about as much",
            )
        )
    return findings


def _quality_findings(report: DataReport) -> list[DataFinding]:
    findings = _preference_findings(report)
    leaked = sum(report.leakage.get("counts", {}).values()) if report.leakage else 0
    if leaked:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in report.leakage["counts"].items() if count)
        share = report.leakage.get("leaked_share", 0.0)
        findings.append(
            DataFinding(
                "error" if share > _ERROR_SHARE else "warning",
                "leakage",
                f"{leaked:,} validation records ({share:.1%}) resemble training records ({counts})",
                "remove them from one side, or name columns.group so that related records stay together",
            )
        )
    # Several replies to one prompt are what preferences are made of.
    conflicts = 0 if _is_whole(report.counts) else int(report.duplicates.get("num_conflicts", 0))
    if conflicts:
        findings.append(
            DataFinding(
                "warning",
                "conflicting-answers",
                f"{conflicts:,} prompts have different answers",
                "decide on one answer for each; the model cannot learn both",
            )
        )
    if repeated := int(report.duplicates.get("num_near_duplicates", 0)):
        share = repeated / max(int(report.duplicates.get("num_records", 0)), 1)
        if share > _WARN_SHARE and not report.num_duplicates_removed:
            findings.append(
                DataFinding(
                    "warning",
                    "duplicates",
                    f"{repeated:,} records ({share:.1%}) repeat another one exactly or nearly",
                    "set data.deduplicate: near (or exact)",
                )
            )
    hits = {kind: count for kind, count in report.pii.items() if count}
    if hits:
        listed = ", ".join(f"{count:,} × {kind}" for kind, count in sorted(hits.items()))
        findings.append(
            DataFinding("warning", "personal-data", f"the records contain {listed}", "set data.mask_pii: true")
        )
    return findings
