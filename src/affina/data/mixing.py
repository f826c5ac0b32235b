"""How records of several sources are mixed: a plan over known sizes, or an interleaving of streams.

Both keep the asked shares as exactly as whole records allow, at the end and at every point on the way: after k records,
source i has given w_i·k/Σw records, to within one. The order that achieves this for any number of sources is Tijdeman's
solution of the chairman assignment problem (R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32,
1980); taking the source with the largest deficit, the obvious rule, does not. Integer arithmetic only, so that a
mix is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any, Final, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from affina.errors import DataError

RecordT = TypeVar("RecordT")

# Weights are taken as decimal fractions of at most this denominator: 0.1 is one tenth, not 3602879701896397/2**55.
_MAX_DENOMINATOR: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Mix:
    """Which records are used, in which order.

    sources: [N] int32, index of the source of each record
    records: [N] int64, index of the record within its source
    counts:  records taken from each source
    notes:   what the user should know: records left out, records repeated
    """

    sources: NDArray[np.int32]
    records: NDArray[np.int64]
    counts: tuple[int, ...]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sources)


def mix_sources(
    sizes: Sequence[int],
    weights: Sequence[float | None],
    *,
    seed: int = 0,
    num_records: int | None = None,
    names: Sequence[str] | None = None,
) -> Mix:
    """A mix of sources of known sizes.

    sizes:       records in each source
    weights:     shares relative to each other; all None: every record of every source once, source after source
    num_records: size of the mix; None: the largest in which no record is used twice
    Within a source the order is random (seeded), without replacement: no record comes again before all have come.
    raises:      DataError when weights are missing or not positive, or a source with a weight is empty
    """
    labels = [str(name) for name in names] if names is not None else [f"source {i}" for i in range(len(sizes))]
    assert len(sizes) == len(weights) == len(labels), "one size, weight and name per source"
    if all(weight is None for weight in weights):
        return _concatenate(sizes)
    parts = integer_weights(weights, labels)
    for size, label in zip(sizes, labels, strict=True):
        if size == 0:
            raise DataError(
                "empty-source",
                f"{label} has a weight but no records",
                fix="remove it, or see why its records were left out",
            )
    total = sum(parts)
    if num_records is None:
        num_records = max(1, min(size * total // part for size, part in zip(sizes, parts, strict=True)))
    order = _interleaved_order(parts, num_records)
    counts = np.bincount(order, minlength=len(sizes))
    records = np.empty(num_records, dtype=np.int64)
    notes = []
    for index, (size, count) in enumerate(zip(sizes, counts.tolist(), strict=True)):
        generator = np.random.default_rng([seed, index])
        records[order == index] = _draw(generator, size, count)
        notes += _note(labels[index], size, count, num_records)
    return Mix(order, records, tuple(counts.tolist()), tuple(notes))


def integer_weights(weights: Sequence[float | None], names: Sequence[str]) -> tuple[int, ...]:
    """The weights as whole numbers in the same proportion. raises: DataError"""
    fractions = []
    for weight, name in zip(weights, names, strict=True):
        if weight is None:
            raise DataError(
                "missing-weight",
                f"{name} has no weight, but other sources have one",
                fix="give every source a weight, or none",
            )
        fraction = Fraction(str(float(weight))).limit_denominator(_MAX_DENOMINATOR) if np.isfinite(weight) else None
        if fraction is None or fraction <= 0:
            raise DataError(
                "bad-source-weight", f"{name} has the weight {weight}", fix="use a number above 0, such as 0.75"
            )
        fractions.append(fraction)
    common = lcm(*(fraction.denominator for fraction in fractions))
    return tuple(int(fraction * common) for fraction in fractions)


def _concatenate(sizes: Sequence[int]) -> Mix:
    sources = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    pieces = [np.arange(size, dtype=np.int64) for size in sizes]
    records = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
    return Mix(sources, records, tuple(sizes), ())


def _draw(generator: np.random.Generator, size: int, count: int) -> NDArray[np.int64]:
    """`count` of `size` records in random order; each is drawn q or q + 1 times, q = count // size."""
    rounds = [generator.permutation(size) for _ in range(-(-count // size))]
    return np.concatenate(rounds)[:count].astype(np.int64) if rounds else np.empty(0, dtype=np.int64)


def _note(name: str, size: int, count: int, total: int) -> list[str]:
    share = f"{name}: {count:,} of {total:,} records ({count / total:.1%})"
    if count > size:
        return [f"{share}; it has {size:,}, so each is used {count / size:.2f} times on average"]
    if count < size:
        return [f"{share}; {size - count:,} of its {size:,} are left out"]
    return [f"{share}; all of them, once"]


class Scheduler:
    """Whose turn it is, one record after the other (Tijdeman's rule; see the module)."""

    def __init__(self, parts: Sequence[int]) -> None:
        self._parts = tuple(parts)
        self._total = sum(parts)
        self._given = [0] * len(parts)
        self._num_given = 0

    def next(self) -> int:
        """The index of the source that gives the next record."""
        self._num_given += 1
        parts, total = self._parts, self._total
        spread = 2 * len(parts) - 2
        if spread == 0:
            return 0
        chosen, best = -1, (0, 1)
        for index, part in enumerate(parts):
            # deficit·total = part·k − given·total. Eligible when deficit ≥ 1/(2n−2); the deadline is the k at which the
            # deficit would reach 1 − 1/(2n−2); the earliest deadline goes first.
            deficit = part * self._num_given - self._given[index] * total
            if deficit * spread < total:
                continue
            slack = (spread - 1) * total - deficit * spread
            if chosen < 0 or slack * best[1] < best[0] * part:
                chosen, best = index, (slack, part)
        assert chosen >= 0, "some source is always eligible"
        self._given[chosen] += 1
        return chosen


def _interleaved_order(parts: Sequence[int], count: int) -> NDArray[np.int32]:
    """[count] int32, the source of each record.

    The order repeats after Σparts records, when all deficits are zero again.
    """
    scheduler = Scheduler(parts)
    period = min(count, sum(parts))
    pattern = np.fromiter((scheduler.next() for _ in range(period)), dtype=np.int32, count=period)
    return np.resize(pattern, count) if period else pattern


# Streams -------------------------------------------------------------------------------------------------------------


class MixedStream(Generic[RecordT]):
    """Records of several streams in the asked proportions, read while they are needed.

    counts:  records given by each source so far
    repeats: times each source was started again so far
    ended_by: index of the source whose end ended the mix; None while it goes on
    """

    def __init__(
        self,
        streams: Sequence[Callable[[], Iterator[RecordT]]],
        weights: Sequence[float],
        *,
        when_exhausted: Literal["stop", "repeat"] = "stop",
        names: Sequence[str] | None = None,
    ) -> None:
        self._streams = tuple(streams)
        self._names = [str(name) for name in names] if names else [f"source {i}" for i in range(len(streams))]
        self._parts = integer_weights(weights, self._names)
        self._when_exhausted = when_exhausted
        self._reset()

    def _reset(self) -> None:
        self.counts = [0] * len(self._streams)
        self.repeats = [0] * len(self._streams)
        self.ended_by: int | None = None

    def __iter__(self) -> Iterator[RecordT]:
        self._reset()
        scheduler = Scheduler(self._parts)
        iterators = [stream() for stream in self._streams]
        end: Any = object()
        while True:
            index = scheduler.next()
            record = next(iterators[index], end)
            if record is end and self._when_exhausted == "repeat":
                iterators[index] = self._streams[index]()
                self.repeats[index] += 1
                record = next(iterators[index], end)
                if record is end:
                    raise DataError(
                        "empty-source", f"{self._names[index]} has a weight but no records", fix="remove the source"
                    )
            if record is end:
                self.ended_by = index
                return
            self.counts[index] += 1
            yield record

    @property
    def notes(self) -> tuple[str, ...]:
        """What happened so far, one line per source."""
        total = max(1, sum(self.counts))
        lines = []
        for index, name in enumerate(self._names):
            line = f"{name}: {self.counts[index]:,} of {total:,} records ({self.counts[index] / total:.1%})"
            if self.repeats[index]:
                line += f", started again {self.repeats[index]} times"
            if self.ended_by == index:
                line += ", and its end ended the mix"
            lines.append(line)
        return tuple(lines)


def interleave_streams(
    streams: Sequence[Callable[[], Iterator[RecordT]]],
    weights: Sequence[float],
    *,
    when_exhausted: Literal["stop", "repeat"] = "stop",
    names: Sequence[str] | None = None,
) -> MixedStream[RecordT]:
    """The streaming mix: exact shares at every point, constant memory.

    streams:        one function per source that starts reading it
    when_exhausted: stop: the first source that ends, ends the mix. repeat: it is started again, for ever
    raises:         DataError when a weight is not positive, or a source to be repeated is empty
    """
    return MixedStream(streams, weights, when_exhausted=when_exhausted, names=names)
