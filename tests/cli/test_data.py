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


def test_pairs_are_counted_and_shown_as_chosen_and_rejected(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"prompt": f"q{n}", "chosen": f"good{n}", "rejected": f"bad{n}"} for n in range(8)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["data", str(config), "--set", "training.objective=dpo", "--set", "data.max_length=128"]
    assert main.run([*arguments, "--show", "1"]) == 0
    text = capsys.readouterr().out
    assert "preference" in text
    assert "6; a chosen reply has" in text
    assert text.index("\nchosen\n") < text.index("⟦good") < text.index("\nrejected\n") < text.index("⟦bad")
    assert main.run([*arguments, "--json", "--show", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["pairs"] == 6
    assert len(report["samples"][0]["documents"]) == 2


def test_labels_are_counted_and_shown(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"prompt": f"q{n}", "completion": f"a{n}", "label": n % 2 == 0} for n in range(8)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main.run(["data", str(config), "--set", "training.objective=kto", "--show", "6"]) == 0
    text = capsys.readouterr().out
    assert "wanted and" in text
    assert "the reply is wanted" in text
    assert "the reply is unwanted" in text


def test_pairs_that_are_too_long_are_not_told_to_be_split(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"prompt": f"q{n}", "chosen": "good " * (1 + 300 * (n % 2)), "rejected": f"bad{n}"} for n in range(12)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["data", str(config), "--set", "training.objective=dpo", "--set", "data.max_length=100"]
    assert main.run(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "error[too-long-dropped]" in text
    assert "fix: raise data.max_length" in text
    assert "data.truncation: split" not in text
