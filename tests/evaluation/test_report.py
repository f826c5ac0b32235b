from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from affina.evaluation.compare import CompareSettings, Contestant, EvaluationResult, compare
from affina.evaluation.report import (
    Command,
    Fact,
    ReportData,
    config_rows,
    flatten,
    format_setting,
    render_report,
    write_report,
)
from affina.evaluation.tasks.exact_match import ReplyTask
from tests.evaluation.fakes import FakeGenerate, FakeScore, sample

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">\'"&{{ 7 * 7 }}{% raw %}</style></svg>]]>'


def result(text: str = "Rome", origin: str = "v.jsonl:1", prompt: str = "Capital?") -> EvaluationResult:
    samples = [sample(4, 4, identity=index) for index in range(8)]
    tasks = [ReplyTask((1, index), prompt, text, "normalized", origin) for index in range(8)]
    losses = {index: 2.0 + index / 10 for index in range(8)}
    return compare(
        Contestant(FakeScore(losses), FakeGenerate(f"No idea {text}")),
        Contestant(FakeScore(0.5), FakeGenerate(text)),
        samples,
        tasks,
        settings=CompareSettings(num_resamples=200),
    )


def metrics(num_steps: int = 60) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        lines.append(
            {"step": step, "loss": 3 / step, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 900.0}
        )
        if step % 20 == 0:
            lines.append({"step": step, "validation_loss": 3.2 / step})
    return lines


def full(text: str = "plain") -> ReportData:
    return ReportData(
        title=text,
        subtitle=text,
        status=text,
        result=result(text, text, text).to_dict(),
        metrics=metrics(),
        events=[{"time": text, "kind": text, "message": text, "fix": text}, {"kind": "checkpoint", "message": "x"}],
        facts=[Fact(text, text, text)],
        data_facts=[Fact(text, text, text)],
        config=config_rows(
            {"model": {"path": text}, text: {text: text}}, {"model.path": {"kind": "user", "file": text}}
        ),
        environment=[Fact(text, text)],
        commands=[Command(text, text)],
    )


class Page(HTMLParser):
    """Collects elements and the attributes that can load or run something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "br", "circle", "line", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def test_the_page_asks_the_network_for_nothing() -> None:
    html = render_report(full())
    assert not re.search(r"https?://", html)
    assert "@import" not in html
    assert "url(" not in html
    page = Page(html)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "action", "data"):
            assert (tag, value) == ("link", "data:,")


def test_every_element_is_closed_in_order() -> None:
    page = Page(render_report(full()))
    assert page.open == []


def test_hostile_text_is_shown_and_never_run() -> None:
    html = render_report(full(HOSTILE))
    plain = render_report(full("plain"))
    page, harmless = Page(html), Page(plain)
    assert page.tags == harmless.tags  # the hostile text has added no element anywhere
    assert page.tags.count("script") == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "".join(page.text).count("<script>alert(1)</script>") >= 12
    assert "{{ 7 * 7 }}" in "".join(page.text)


def test_only_the_page_s_own_script_and_style_may_run() -> None:
    html = render_report(full())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    import base64
    import hashlib

    for tag in ("style", "script"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert body is not None
        digest = base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]
    assert " style=" not in html  # an inline style would be blocked


def test_the_page_says_what_can_be_concluded_and_from_how_much() -> None:
    text = "".join(Page(render_report(full())).text)
    assert "Better: accuracy rose from 0% to 100%" in text
    assert "The same 8 validation records (32 reply tokens) for both models, replies generated for 8." in text
    assert "Both right on 0, only the tuned model on 8, only the base model on 0, neither on 0" in text
    assert "✓ right" in text
    assert "✗ wrong" in text


def test_tables_have_headers_and_drawings_have_descriptions() -> None:
    html = render_report(full())
    page = Page(html)
    assert page.tags.count("caption") == 1
    for tag, name, _ in page.attributes:
        assert not (tag == "th" and name == "class")
    num_scoped = sum(1 for tag, name, _ in page.attributes if tag == "th" and name == "scope")
    assert num_scoped == page.tags.count("th")
    num_described = sum(1 for tag, name, value in page.attributes if tag == "svg" and name == "aria-label" and value)
    assert num_described == page.tags.count("svg")
    assert "training from 3 to" in html
    assert 'lang="en"' in html


def test_routine_events_are_counted_and_others_told() -> None:
    text = "".join(Page(render_report(full())).text)
    assert "1 routine event (a checkpoint, for instance) is in events.jsonl." in text


@pytest.mark.parametrize(
    ("kind", "css_class"),
    [("failed", "error"), ("step-skipped", "warning"), ("resumed", "info"), ("early-stopping", "warning")],
)
def test_events_carry_their_weight(kind: str, css_class: str) -> None:
    html = render_report(ReportData(title="t", events=[{"kind": kind, "message": "m"}]))
    assert f'<li class="{css_class}">' in html


def test_a_run_without_anything_still_gives_a_page() -> None:
    html = render_report(ReportData(title="empty", status="interrupted"))
    text = "".join(Page(html).text)
    assert "Base and tuned model have not been compared yet" in text
    assert "interrupted" in text
    assert "<svg" not in html


def test_metrics_with_gaps_do_not_break_the_charts() -> None:
    lines = metrics()
    lines[10]["loss"] = None
    lines[11] = {"step": 12, "loss": float("nan"), "grad_norm": None}
    lines.append({"note": "no step"})
    html = render_report(ReportData(title="gaps", metrics=lines))
    assert "NaN" not in html
    assert "nan" not in re.sub(r"<style>.*?</style>|<script>.*?</script>", "", html, flags=re.DOTALL)


def test_perplexity_alone_gives_a_table_of_one_row() -> None:
    samples = [sample(4, 4, identity=index) for index in range(8)]
    only = compare(Contestant(FakeScore(2.0)), Contestant(FakeScore(1.0)), samples)
    html = render_report(ReportData(title="p", result=only.to_dict()))
    assert "Perplexity" in html
    assert "replies that match" not in html


def test_the_theme_can_be_fixed_for_pictures() -> None:
    assert '<html lang="en">' in render_report(ReportData(title="t"))
    assert '<html lang="en" data-theme="dark">' in render_report(ReportData(title="t"), theme="dark")


def test_the_report_is_written_all_or_nothing(tmp_path: Path) -> None:
    path = write_report(ReportData(title="t"), tmp_path / "evaluation" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_settings_are_flat_and_carry_who_chose_them() -> None:
    rows = config_rows(
        {"data": {"train": [{"path": "a.jsonl"}], "seed": 0}, "training": {"epochs": 3.0, "warmup_steps": 8}},
        {
            "training.epochs": {"kind": "user", "file": "/home/u/run.yaml", "line": 14},
            "training.warmup_steps": {"kind": "derived", "reason": "3% of 240 steps"},
            "data.train": {"kind": "override", "file": "--set data.train"},
            "data.seed": {"kind": "preset", "preset": "laptop"},
        },
    )
    assert [(row.path, row.value, row.origin, row.is_chosen) for row in rows] == [
        ("data.train[0].path", "a.jsonl", "you, --set data.train", True),
        ("data.seed", "0", "preset laptop", False),
        ("training.epochs", "3", "you, run.yaml:14", True),
        ("training.warmup_steps", "8", "derived: 3% of 240 steps", False),
    ]


def test_settings_are_shown_as_yaml_would() -> None:
    values = [None, True, 2e-4, "x", ["a", "b"], 12]
    assert [format_setting(value) for value in values] == ["not set", "true", "0.0002", "x", '["a", "b"]', "12"]
    assert flatten({"a": {}, "b": []}) == {"a": {}, "b": []}


def luminance(colour: str) -> float:
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_the_contrast_that_wcag_asks_for_in_both_themes() -> None:
    style = re.search(r"<style>(.*?)</style>", render_report(ReportData(title="t")), re.DOTALL)
    assert style is not None
    light = dict(re.findall(r"--(\w[\w-]*): (#[0-9a-f]{6})", style[1].split("@media")[0]))
    dark = dict(re.findall(r"--(\w[\w-]*): (#[0-9a-f]{6})", style[1].split('[data-theme="dark"]')[1].split("}")[0]))
    for colours in (light, dark):
        for ink in ("ink", "soft", "tuned", "bad", "warn", "validation"):
            for ground in ("paper", "sunken") if ink != "validation" else ("paper",):
                bright, dim = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
                # WCAG 2.2, 1.4.3: 4.5 to 1 for text of normal size.
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ink, ground)
        bright, dim = sorted((luminance(colours["tuned"]), luminance(colours["tuned-wash"])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5
