"""`affina merge` prints what was proven, and nothing but JSON with --json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from affina import api
from affina.cli.main import main
from affina.errors import ExportError


@pytest.fixture
def report():
    from affina.export.merge import MergeReport

    return MergeReport(
        output=Path("merged"),
        base="affina/nano",
        adapter=Path("runs/a/adapter"),
        dtype="bfloat16",
        num_tensors=100,
        num_merged=56,
        num_bytes=17_400_000,
        files=("model.safetensors",),
        num_probe_tokens=120,
        adapter_effect=0.8,
        merge_error=0.004,
        max_merge_error=0.03,
        quantized_difference=0.05,
        notes=("the adapter was trained against the NF4 base",),
    )


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        raise SystemExit(main(arguments))
    return int(caught.value.code or 0)


def test_the_result_says_where_it_is_and_what_was_proven(report, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(api, "merge", lambda *arguments, **options: seen.append((arguments, options)) or report)
    assert run(["merge", "runs/a", "-o", "merged", "--dtype", "float16"]) == 0
    assert seen == [((Path("runs/a"), Path("merged")), {"dtype": "float16"})]
    output = capsys.readouterr().out
    assert "merged   merged  (17 MiB in bfloat16, 1 file)" in output
    assert "56 of 100 tensors carry the adapter" in output
    assert "differ from base + adapter by 4.0e-03 of their spread (120 positions)" in output
    assert "trained against the NF4 base" in output


def test_json_is_the_only_output(report, monkeypatch, capsys):
    monkeypatch.setattr(api, "merge", lambda *arguments, **options: report)
    assert run(["merge", "runs/a", "-o", "merged", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report.to_dict()


def test_an_error_is_printed_with_its_fix(monkeypatch, capsys):
    def fail(*arguments, **options):
        raise ExportError("output-exists", "merged already holds something", fix="name a new directory with -o")

    monkeypatch.setattr(api, "merge", fail)
    assert run(["merge", "runs/a", "-o", "merged"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error[output-exists]: merged already holds something" in captured.err
    assert "fix: name a new directory with -o" in captured.err
