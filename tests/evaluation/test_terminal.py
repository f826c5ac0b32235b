from __future__ import annotations

import io

import pytest
from rich.console import Console

from affina.evaluation.compare import CompareSettings, Contestant, EvaluationResult, compare
from affina.evaluation.tasks.exact_match import ReplyTask
from affina.evaluation.terminal import print_result
from tests.evaluation.fakes import FakeGenerate, FakeScore, sample


def make(reply: str = "Milan", num: int = 8, **score: float) -> EvaluationResult:
    samples = [sample(4, 4, identity=index) for index in range(num)]
    tasks = [ReplyTask((1, index), f"Question {index}?", "Rome", "normalized", "") for index in range(num)]
    return compare(
        Contestant(FakeScore(score.get("base", 2.0)), FakeGenerate(reply)),
        Contestant(FakeScore(score.get("tuned", 1.0)), FakeGenerate("Rome", is_complete=False)),
        samples,
        tasks,
        settings=CompareSettings(num_resamples=200),
    )


def show(result: EvaluationResult, width: int = 80, **options: object) -> str:
    output = io.StringIO()
    console = Console(file=output, width=width, markup=False, emoji=False, highlight=False)
    print_result(console, result, **options)  # type: ignore[arg-type]
    return output.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    printed = show(make("a rather long reply " * 30), width)
    assert max(map(len, printed.splitlines())) <= width


def test_the_table_has_both_figures_with_their_intervals() -> None:
    printed = show(make())
    assert "0% to 32.4%" in printed  # Wilson: 0 of 8
    assert "67.6% to 100%" in printed
    assert "7.39" in printed
    assert "2.72" in printed
    assert "× 0.368" in printed
    assert "8 validation records; ranges are 95% intervals" in printed


def test_replies_stand_side_by_side_where_there_is_room_and_below_each_other_where_not() -> None:
    wide, narrow = show(make(), 100), show(make(), 50)
    assert any("Milan" in line and "Rome" in line for line in wide.splitlines())
    assert not any("Milan" in line and "Rome" in line for line in narrow.splitlines())


def test_a_long_reply_is_shortened_and_an_empty_one_named() -> None:
    printed = show(make("word " * 2000))
    assert "…" in printed
    assert printed.count("\n") < 80
    assert "(empty)" in show(make("<think>never ends"))


def test_a_cut_off_reply_says_so() -> None:
    assert "(cut off at the token limit)" in show(make(), 120)


def test_a_reply_cannot_send_control_sequences_or_markup() -> None:
    printed = show(make("\x1b[31mred\x07 [bold]x[/bold]"), 120)
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert "[bold]x[/bold]" in printed


def test_paths_and_what_to_type_next_come_last() -> None:
    result = make().with_files(run="runs/a", report_path="runs/a/evaluation/report.html", samples_path="runs/a/s.jsonl")
    lines = show(result, next_commands=[("affina chat runs/a", "talk to it")]).splitlines()
    assert [line.split() for line in lines if line.startswith(("report", "all replies"))] == [
        ["report", "runs/a/evaluation/report.html"],
        ["all", "replies", "runs/a/s.jsonl"],
    ]
    assert lines[-1].split() == ["affina", "chat", "runs/a", "talk", "to", "it"]


def test_perplexity_alone_and_few_records_print_too() -> None:
    samples = [sample(4, 4, identity=index) for index in range(3)]
    printed = show(compare(Contestant(FakeScore(2.0)), Contestant(FakeScore(1.0)), samples), 120)
    assert "accuracy" not in printed
    assert "so few records allow no interval" in printed
    assert "0 to ∞" in printed
