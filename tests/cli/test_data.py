"""`affina data`: the report as tables or as one JSON object, and samples with what is trained marked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from affina.cli import main
from tests.data.tiny_tokenizers import THINKING, build_hf


@pytest.fixture
def config(tmp_path: Path) -> Path:
    build_hf(THINKING).save_pretrained(tmp_path / "model")
    records = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(8)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model:\n  path: {tmp_path / 'model'}\n"
        f"data:\n  train:\n    - path: {tmp_path / 'chat.jsonl'}\n  validation_fraction: 0.25\n"
        f"  max_length: 64\n  cache_directory: {tmp_path / 'cache'}\n"
    )
    return path


def test_the_report_names_source_lengths_and_ends(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["data", str(config)]) == 0
    text = capsys.readouterr().out
    assert "chat.jsonl" in text
    assert "6; 6 end with <|im_end|>, which is trained" in text
    assert "6 with an empty block (masked); serve with thinking off" in text


def test_samples_are_shown_with_trained_text_in_brackets(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["data", str(config), "--show", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("<|im_start|>assistant\n<think>\n\n</think>\n\n⟦a") == 2
    assert text.count("<|im_end|>⟧") == 2
    assert "chat.jsonl:" in text


def test_json_is_one_object_with_samples(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["data", str(config), "--json", "--show", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["train"]["num_samples"] == 6
    assert report["validation"]["num_samples"] == 2
    (sample,) = report["samples"]
    assert sample["num_supervised"] == sum(len(token["ids"]) for token in sample["tokens"] if token["trained"])


def test_a_bad_record_is_an_error_with_its_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = config.parent / "chat.jsonl"
    data.write_text(data.read_text() + '{"messages": [{"role": "user", "content": "q"}]}\n')
    assert main.run(["data", str(config)]) == 1
    assert "chat.jsonl:9" in capsys.readouterr().err
