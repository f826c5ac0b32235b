"""`affina quantize` from the command line: what a person sees, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import affina
from affina.cli.main import run as command_line
from affina.runs.directory import RunDirectory
from tests.api.test_train import make_config


def quantize(*arguments: str) -> int:
    return command_line(["quantize", *arguments])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_person_sees_what_was_written_proven_and_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize("affina/nano", "-o", "small", "--max-records", "8") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "quantized small (6 MiB in nf4 with double quantisation, 1 file; 12 MiB before)" in output
    assert "layers 42 at 4.127 bits per weight; in bfloat16: lm_head" in output
    assert "codes and scales are the same bits, logits differ by 0.0e+00" in output
    assert "signal to noise 20.7 dB; the worst layers: layer shape bits RMSE relative SNR dB model.layers." in output
    assert "KL(unquantised ‖ quantised)" in output
    assert "of 8 records of affina/support" in output
    assert "write `model: small` in run.yaml" in output
    report = json.loads(Path("small/quantization_report.json").read_text())
    assert len(report["layers"]) == 42
    assert 0 < report["divergence"]["kl"]["interval"][0] < report["divergence"]["kl"]["value"]


def test_json_is_the_only_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize("affina/nano", "-o", "small", "--format", "int8", "--no-double", "--no-report", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["format"], result["num_layers"], result["errors"]) == ("int8", 42, None)
    assert result["notes"] == ["quantization.double_quantization has no effect: quantization.format is int8"]
    assert not Path("small/quantization_report.json").exists()


def test_layers_can_be_left_dense_and_few_records_have_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        quantize("affina/nano", "-o", "small", "--skip", "down_proj", "--skip", "layers.0", "--max-records", "2") == 0
    )
    output = " ".join(capsys.readouterr().out.split())
    assert "layers 30 at 4.127 bits per weight; in bfloat16: model.layers.0.self_attn.q_proj" in output
    assert "nats per token (too few records for an interval)" in output
    report = json.loads(Path("small/quantization_report.json").read_text(), parse_constant=pytest.fail)
    assert report["divergence"]["kl"]["interval"] is None


def test_text_of_a_file_is_measured_token_by_token(capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.txt").write_text("It was a bright cold day in April.\n\n" * 30)
    assert quantize("affina/nano", "-o", "small", "--format", "fp4", "--text", "notes.txt", "--json") == 0
    measured = json.loads(capsys.readouterr().out)["errors"]["divergence"]
    assert measured["text"] == "notes.txt"
    assert measured["num_tokens"] > 200


def test_a_run_gives_its_validation_data_and_trains_on_the_result(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=2)
    run = affina.train(config | {"quantization": "none"}).run
    result = affina.quantize(str(tiny_model_folder), "small", format="fp8", text=run, device="cpu")
    assert result.errors is not None
    assert result.errors["divergence"]["text"] == f"the validation data of {run}"
    again = make_config(Path("small").resolve(), chats_file, tmp_path, training__max_steps=2, output__name="second")
    trained = affina.train(again | {"quantization": "none"})
    events = [event["message"] for event in RunDirectory(trained.run).events()]
    assert any("the checkpoint is stored in fp8 and stays in it" in message for message in events)


def test_a_run_without_validation_data_is_refused_as_text(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=1, data__validation_fraction=0.0)
    run = affina.train(config).run
    with pytest.raises(affina.AffinaError) as caught:
        affina.quantize(str(tiny_model_folder), "z", text=run, device="cpu")
    assert caught.value.code == "text-empty"
    assert f"the validation data of {run} has no records" in caught.value.what
    assert not Path("z").exists()


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert quantize(*arguments) != 0
    assert not Path("z").exists()
    return capsys.readouterr().err


def test_bad_requests_are_refused_before_anything_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of(capsys, "affina/nano", "-o", "z", "--format", "int8", "--scale-search")
    assert "error[scale-search-without-4bit]" in text
    text = error_of(capsys, "affina/nano", "-o", "z", "--text", "absent.txt")
    assert 'error[path-missing]: data.train[0].path: "absent.txt" does not exist' in text
    text = error_of(capsys, "affina/nano", "-o", "z", "--format", "int4")
    assert "error[usage]" in text
    text = error_of(capsys, "affina/nano")
    assert "missing option '--output'" in text
    Path("empty.txt").write_text("")
    text = error_of(capsys, "affina/nano", "-o", "z", "--text", "empty.txt")
    assert "error[" in text


def test_a_run_is_no_model_and_the_way_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/config.yaml").write_text("model: affina/nano\n")
    text = error_of(capsys, "runs/a", "-o", "z")
    assert "error[model-not-found]: runs/a is a run, not a model" in text
    assert "affina merge runs/a -o merged" in text


def test_a_format_of_none_is_refused() -> None:
    with pytest.raises(affina.AffinaError) as caught:
        affina.quantize("affina/nano", "z", format="none")  # type: ignore[arg-type]
    assert caught.value.code == "unknown-value"
    assert "nf4, fp4, int8, fp8" in caught.value.what
