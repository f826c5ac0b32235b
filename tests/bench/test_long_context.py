"""The search for the longest sequence, on cards that are only arithmetic; and one run of the script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GIB = 2**30


class Card:
    """Stands in for a model on a card: a row takes what `needs` says, and fits below the cap."""

    def __init__(self, cap_gib: float, needs: Callable[[int], float], *, seconds: float = 0.1) -> None:
        from systems.common import SHAPES

        self.shape, self.num_layers = SHAPES["qwen3-8b"], 3
        self._cap, self._needs, self._seconds = cap_gib, needs, seconds
        self.tried: list[int] = []

    def attempt(self, num_tokens: int) -> dict[str, Any] | None:
        self.tried.append(num_tokens)
        reserved = self._needs(num_tokens) / GIB
        return {"seconds": self._seconds, "reserved_gib": reserved} if reserved <= self._cap else None


def search(card: Card, line: Any, cap_gib: float, **options: Any) -> tuple[dict[str, Any], Any]:
    import long_context
    import records

    deadline = records.Deadline(options.pop("seconds", 1e6))
    options = {"most_seconds": 1e6, "longest": None, **options}
    return long_context.search(card, cap_gib, line, deadline, **options)  # type: ignore[arg-type]


def test_an_exact_prediction_is_tried_once() -> None:
    from long_context import Line

    line = Line(6 * GIB, 47_000)
    card = Card(8, lambda tokens: 6 * GIB + 47_000 * tokens)
    found, _ = search(card, line, 8)
    assert card.tried == [found["tokens"]]
    assert found["tokens"] % 128 == 0
    assert 0.97 < found["tokens"] / (2 * GIB / 47_000) < 1


def test_a_prediction_that_is_too_long_is_shortened_by_5_percent_until_it_fits() -> None:
    from long_context import Line

    card = Card(8, lambda tokens: 6 * GIB + 52_000 * tokens)
    found, _ = search(card, Line(6 * GIB, 47_000), 8)
    first, second, third = card.tried
    assert found["tokens"] == third
    assert 0.945 < second / first <= 0.95
    assert [one["fits"] for one in found["tries"]] == [False, False, True]


def test_a_prediction_that_is_too_short_is_lengthened_by_what_was_measured() -> None:
    from long_context import Line

    card = Card(24, lambda tokens: 6 * GIB + 41_000 * tokens)
    found, line = search(card, Line(6 * GIB, 47_000), 24)
    assert len(card.tried) == 2
    assert found["tokens"] == card.tried[1] > 1.1 * card.tried[0]
    assert line.per_token == pytest.approx(41_000)


def test_a_costly_step_is_not_repeated_for_a_little_more() -> None:
    from long_context import Line

    card = Card(80, lambda tokens: 6 * GIB + 41_000 * tokens, seconds=90.0)
    search(card, Line(6 * GIB, 47_000), 80)
    assert len(card.tried) == 1


def test_what_would_take_too_long_is_cut_to_what_does_not_and_the_record_says_so() -> None:
    from long_context import Line, affordable

    card = Card(80, lambda tokens: 6 * GIB + 47_000 * tokens)
    found, _ = search(card, Line(6 * GIB, 47_000), 80, most_seconds=60)
    assert card.tried == [found["tokens"]] == [affordable(card.shape, 3, 60)]
    assert found["bounded_by"] == "time"
    assert found["predicted_tokens"] > 4 * found["tokens"]
    found, _ = search(Card(8, lambda tokens: 6 * GIB + 47_000 * tokens), Line(6 * GIB, 47_000), 8, most_seconds=60)
    assert found["bounded_by"] == "memory"


def test_what_never_fits_ends_and_nothing_is_begun_without_time() -> None:
    from long_context import Line

    nothing = Card(8, lambda tokens: 9 * GIB)
    found, _ = search(nothing, Line(6 * GIB, 47_000), 8)
    assert len(nothing.tried) <= 7
    assert found["error"] == "no length fits"
    card = Card(8, lambda tokens: 6 * GIB + 47_000 * tokens)
    found, _ = search(card, Line(6 * GIB, 47_000), 8, seconds=0)
    assert card.tried == []
    assert found["error"] == "no time was left"


def test_the_affordable_length_takes_about_the_seconds_that_it_may() -> None:
    from long_context import affordable, step_seconds
    from systems.common import SHAPES

    shape = SHAPES["qwen3-8b"]
    length = affordable(shape, 3, 60)
    assert length % 128 == 0
    assert step_seconds(shape, length, 3) <= 60 < step_seconds(shape, int(1.05 * length), 3)
    assert affordable(shape, 3, 0) == 0


def test_two_points_give_the_line() -> None:
    from long_context import Line

    line = Line.through((1000, 5e9), (3000, 5.2e9))
    assert (line.fixed, line.per_token) == (4.9e9, 1e5)
    assert line.longest(5.2e9) == 2944
    assert line.longest(1e9) == 0


def test_short_rows_are_measured_on_the_whole_model_and_long_ones_on_few_layers() -> None:
    from long_context import choose_layers
    from systems.common import SHAPES

    shape = SHAPES["qwen3-8b"]
    assert choose_layers(shape, 10_000, full_seconds=60, few_layers=3) == 36
    assert choose_layers(shape, 300_000, full_seconds=60, few_layers=3) == 3
    assert choose_layers(shape, 3_000_000, full_seconds=1e9, few_layers=3) == 3  # more host memory than there is


def test_attention_dominates_the_estimate_of_long_steps() -> None:
    from long_context import step_seconds
    from systems.common import SHAPES

    shape = SHAPES["qwen3-8b"]
    short, long = step_seconds(shape, 2048, 36), step_seconds(shape, 342_733, 36)
    assert 0.1 < short < 1.5
    assert 400 < long < 900


def test_the_script_runs_and_keeps_records_of_other_shapes(tmp_path: Path) -> None:
    import long_context

    output = tmp_path / "found.json"
    old = {"shape": "qwen3-8b", "mode": "nf4", "cap_gib": 8, "tokens": 1}
    output.write_text(json.dumps({"records": [old]}))
    long_context.main(["--tiny", "--caps", "1", "--output", str(output)])
    kept, new = json.loads(output.read_text())["records"]
    assert kept == old
    assert (new["shape"], new["tokens"], new["measured_layers"]) == ("tiny", 256, 2)
    assert "offloaded" in new["policy"] or "parts" in new["policy"]


def test_a_shape_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import long_context
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="there is no GPU; --tiny"):
            long_context.main([])
    monkeypatch.setattr(long_context, "DEVICE", torch.device("cuda"))
    with pytest.raises(SystemExit, match="unknown modes: int2"):
        long_context.main(["--modes", "int2"])
    with pytest.raises(SystemExit, match="unknown shapes: qwen3-9b"):
        long_context.main(["--shapes", "qwen3-9b"])
