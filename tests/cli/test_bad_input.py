"""Wrong input through the whole command line: an early error with a fix, one JSON object, and nothing lost."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from affina.cli.main import run as affina
from affina.config import rules
from affina.runs.directory import RunDirectory

Record = dict[str, Any]


def chat(question: str, answer: str, **reply: Any) -> Record:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **reply}]}


CHATS = [chat(f"say number {number}", f"number {number} it is" + "!" * (number % 5)) for number in range(40)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFFINA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write(name: str, records: Sequence[Record], *, newline: str = "\n") -> Path:
    path = Path(name)
    path.write_bytes("".join(json.dumps(record, ensure_ascii=False) + newline for record in records).encode())
    return path


@pytest.fixture
def train(tiny_model_folder: Path) -> Callable[..., int]:
    """`affina train run.yaml` of two steps on the tiny model: exit code. Line 2 of run.yaml is the data."""

    def run(data: str, *options: str, name: str = "r", model: Path | str = tiny_model_folder) -> int:
        Path("run.yaml").write_text(
            f"model: {json.dumps(str(model))}\n"
            f"data: {{train: {json.dumps(data)}, max_length: 128}}\n"
            "training: {device: cpu, max_steps: 2, save_every_steps: 1}\n"
            "evaluation: {enabled: false}\n",
            encoding="utf-8",
        )
        return affina(["train", "run.yaml", "--set", f"output.name={name}", *options])

    return run


@pytest.fixture
def finished(train: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> RunDirectory:
    """A run that has been trained."""
    write("chats.jsonl", CHATS)
    assert train("chats.jsonl", name="done") == 0
    capfd.readouterr()
    return RunDirectory(Path("runs/done"))


def one_error(captured: str) -> dict[str, Any]:
    """The error of an output that is one JSON object and nothing else."""
    error: dict[str, Any] = json.loads(captured)["error"]
    return error


# Data


@pytest.mark.parametrize(
    ("content", "code", "line", "fix"),
    [
        (b"", "empty-file", None, "write it again"),
        (b"\n\n", "no-records", None, "check that this is the file you meant"),
        (b'{"messages": [{"role":', "invalid-json", 1, "write or download the file again"),
        (b'{"foo": 1, "bar": 2}\n', "unknown-format", None, "map the columns"),
        (json.dumps(CHATS).encode("utf-16"), "wrong-encoding", None, "iconv"),
        (json.dumps(chat("q", "a", weight=0)).encode(), "nothing-trained", 1, "set weight 1"),
        (b'{"messages": []}\n', "unknown-format", None, "check what wrote this file"),
    ],
)
def test_a_bad_data_file_is_refused_with_its_place_and_a_fix(
    content: bytes, code: str, line: int | None, fix: str, train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    Path("bad.jsonl").write_bytes(content)
    assert train("bad.jsonl", "--json") == 1
    error = one_error(capfd.readouterr().out)
    found = next(one for one in error["errors"] if one["code"] == code)
    assert Path(found["file"]).name == "bad.jsonl"
    assert found["line"] == line
    assert fix in found["fix"]


def test_a_missing_data_file_is_named_by_its_line_in_the_config(
    train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("nofile.jsonl") == 1
    text = capfd.readouterr().err
    assert 'error[path-missing]: data.train[0].path: "nofile.jsonl" does not exist (run.yaml:2)' in text
    assert not Path("runs").exists()


def test_an_empty_conversation_on_the_first_line_is_an_error_of_that_line_alone(
    train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    write("chats.jsonl", [{"messages": []}, *CHATS])
    assert train("chats.jsonl") == 1
    text = capfd.readouterr().err
    assert "chats.jsonl:1)" in text
    assert "unknown-format" not in text


def test_dropped_and_skipped_records_are_said_before_training(
    train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    write("chats.jsonl", [chat("q", "word " * 500), chat("q", ""), *CHATS])
    assert train("chats.jsonl", "--set", "data.on_error=skip", "--set", "data.validation_fraction=0") == 0
    text = capfd.readouterr().err
    assert "data: 1 samples (2.4%) are longer than 128 tokens and are left out; raise data.max_length" in text
    assert "data: 1 of 42 records (2.4%) are faulty and are left out (1 × empty-reply)" in text
    events = Path("runs/r/events.jsonl").read_text()
    assert "too-long-dropped" in events
    assert "records-skipped" in events


@pytest.mark.parametrize(
    "records",
    [
        [chat(f"كم الساعة {number}? 👩‍👩‍👧‍👦", f"שלום עולם 🇮🇹 è così {number}") for number in range(12)],
        [chat("capital of Italy?", "Rome"), chat("2 + 2?", "4"), chat("say hello", "hello there")],
    ],
    ids=["unicode", "three records"],
)
def test_unusual_but_right_data_trains(
    records: list[Record], train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    write("data.jsonl", records, newline="\r\n")
    assert train("data.jsonl", "--json") == 0
    assert json.loads(capfd.readouterr().out)["status"] == "finished"


def test_a_single_record_cannot_be_split(train: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    write("one.jsonl", CHATS[:1])
    assert train("one.jsonl") == 1
    text = capfd.readouterr().err
    assert "error[cannot-split]: there is only one record, so no validation set can be split off" in text
    assert train("one.jsonl", "--set", "data.validation_fraction=0") == 0


# Model and settings


def test_a_length_beyond_the_context_is_refused_before_anything_is_read(capfd: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("extends: laptop\ndata:\n  max_length: 4096\n")
    for verb in ("train", "check"):
        assert affina([verb, "run.yaml"]) == 1
        assert capfd.readouterr().err == (
            "error[longer-than-context]: data.max_length is 4,096 tokens; affina/nano reads 1,024 (run.yaml:3)\n"
            "  why: beyond its context a model has never seen the positions: it would learn noise, or fail\n"
            "  fix: write `max_length: 1024` or less; data.truncation says what happens to longer samples\n"
        )
    assert not Path("runs").exists()


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("spoil", "code", "fix"),
    [
        (lambda model: change_config(model, model_type="quux9"), "model-type-unknown", "upgrade transformers"),
        (lambda model: (model / "config.json").write_text("{"), "config-damaged", "download or copy the model again"),
        (lambda model: (model / "config.json").unlink(), "model-not-found", "give a directory with config.json"),
        (lambda model: (model / "model.safetensors").unlink(), "checkpoint-missing", "model.safetensors"),
        (lambda model: (model / "model.safetensors").write_bytes(b"x" * 100), "checkpoint-damaged", "again"),
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer-not-found", "copy tokenizer.json"),
    ],
)
def test_an_unusable_model_is_refused_before_the_data_is_read(
    spoil: Callable[[Path], object],
    code: str,
    fix: str,
    train: Callable[..., int],
    tiny_model_folder: Path,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = Path(shutil.copytree(tiny_model_folder, folder / "model"))
    spoil(model)
    write("bad.jsonl", [chat("q", "")])  # it would be refused as well, had it been read
    assert train("bad.jsonl", "--json", model=model) == 1
    error = one_error(capfd.readouterr().out)
    assert error["code"] == code
    assert fix in error["fix"]


def test_a_tokenizer_without_template_is_one_error_whatever_the_data(
    train: Callable[..., int], tiny_model_folder: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model_folder, folder / "model"))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    write("chats.jsonl", CHATS)
    for options in ((), ("--set", "data.on_error=skip")):
        assert train("chats.jsonl", "--json", *options, model=model) == 1
        error = one_error(capfd.readouterr().out)
        assert (error["code"], len(error["errors"])) == ("template-missing", 1)


def test_an_8_bit_optimizer_without_its_package_is_refused(
    train: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write("chats.jsonl", CHATS)
    monkeypatch.setattr(rules, "_is_installed", lambda module: module != "bitsandbytes")
    assert train("chats.jsonl", "--set", "training.optimizer=adamw_8bit") == 1
    text = capfd.readouterr().err
    assert (
        "error[optimizer-without-package]: training.optimizer is adamw_8bit, and bitsandbytes is not installed" in text
    )
    assert 'fix: run `pip install "affina[gpu]"`, or write `optimizer: adamw`' in text


def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_an_error_of_loading_is_told_with_the_line_of_its_setting(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    no_cuda(monkeypatch)
    write("chats.jsonl", CHATS)
    lines = [
        f"model: {json.dumps(str(tiny_model_folder))}",
        "data: {train: chats.jsonl, max_length: 128}",
        "adapter:",
        "  targets: [q_porj]",
        "training:",
        "  device: cuda",
    ]
    Path("run.yaml").write_text("\n".join(lines))
    assert affina(["train", "run.yaml"]) == 1
    text = capfd.readouterr().err
    assert (
        "error[device-unavailable]: training.device is cuda, but torch sees no CUDA device (run.yaml:6)\n  why: "
        in text
    )
    assert affina(["train", "run.yaml", "--set", "training.device=cpu"]) == 1
    text = capfd.readouterr().err
    assert 'error[target-unmatched]: adapter.targets "q_porj" matches nothing (run.yaml:4)\n' in text
    assert affina(["train", "run.yaml", "--set", "training.device=cpu", "--set", "adapter.targets=[x]", "--json"]) == 1
    error = one_error(capfd.readouterr().out)
    assert (error["code"], error["file"], error["line"]) == ("target-unmatched", "--set adapter.targets=[x]", None)
    (failed, *_) = [Path("runs") / run["name"] for run in listed_runs(capfd)]
    assert json.loads((failed / "run.json").read_text())["error"]["code"] == "target-unmatched"


def listed_runs(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert affina(["runs", "--json"]) == 0
    runs: list[dict[str, Any]] = json.loads(capfd.readouterr().out)["runs"]
    return runs


def test_an_error_around_a_run_is_told_with_the_line_of_its_own_config(
    finished: RunDirectory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    no_cuda(monkeypatch)
    text = finished.config_file.read_text().replace("  device: cpu", "  device: cuda")
    finished.config_file.write_text(text)
    (line,) = [number for number, content in enumerate(text.splitlines(), 1) if content.startswith("  device: cuda")]
    for command in (["eval", "runs/done"], ["chat", "runs/done"], ["merge", "runs/done", "-o", "merged"],
                    ["train", "--resume", "runs/done"]):  # fmt: skip
        assert affina([*command, "--json"]) == 1
        error = one_error(capfd.readouterr().out)
        assert error["code"] == "device-unavailable", command
        assert (error["file"], error["line"]) == ("runs/done/config.yaml", line), command


def test_a_name_that_is_taken_is_told_with_its_line(
    finished: RunDirectory, train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("chats.jsonl", name="done") == 1
    assert "runs/done already holds a run (--set output.name=done)\n" in capfd.readouterr().err


@pytest.mark.parametrize(("num_bad", "last_line"), [(3, "3 errors"), (1, "  fix: ")])
def test_the_summary_of_bad_records_is_not_counted_as_an_error(
    num_bad: int, last_line: str, train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    write("chats.jsonl", [*[chat(f"q{number}", "") for number in range(num_bad)], *CHATS])
    assert train("chats.jsonl") == 1
    text = capfd.readouterr().err
    assert text.count("error[empty-reply]") == num_bad
    assert f"error[bad-records]: {num_bad} bad record" in text
    assert text.splitlines()[-1].startswith(last_line)
    assert train("chats.jsonl", "--json") == 1
    error = one_error(capfd.readouterr().out)
    assert (error["code"], [one["code"] for one in error["errors"]]) == ("bad-records", ["empty-reply"] * num_bad)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    train: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from affina.training import checkpoint

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    write("chats.jsonl", CHATS)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.CheckpointWriter, "__call__", killed)
        assert train("chats.jsonl") == 130
    capfd.readouterr()
    assert train("chats.jsonl") == 1
    text = capfd.readouterr().err
    assert "error[run-exists]: runs/r already holds a run" in text
    again = "it has no checkpoint yet: `affina train --resume runs/r` starts it from the beginning"
    assert f"fix: {again}, or choose another output.name" in text
    assert affina(["train", "--resume", "runs/r"]) == 0
    assert "restarted: no checkpoint yet: starts from the beginning" in capfd.readouterr().err
    assert [record["step"] for record in RunDirectory(Path("runs/r")).metrics() if "loss" in record] == [1, 2]


def test_all_mistakes_of_a_file_come_together_as_one_json_object(capfd: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("traning: {}\ntraining:\n  epoch: 1\n  learning_rate: fast\n  precision: fp8\n")
    assert affina(["train", "run.yaml", "--json"]) == 1
    errors = one_error(capfd.readouterr().out)["errors"]
    assert [(error["code"], error["line"]) for error in errors] == [
        ("unknown-key", 1),
        ("unknown-key", 3),
        ("wrong-type", 4),
        ("unknown-value", 5),
    ]
    Path("run.yaml").write_text("training:\n\tepochs: 1\n")
    assert affina(["train", "run.yaml", "--json"]) == 1
    assert one_error(capfd.readouterr().out)["code"] == "yaml-tab"


# Runs: nothing is lost


def test_a_run_is_never_written_over(
    finished: RunDirectory, train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in finished.path.rglob("*") if file.is_file()}
    assert train("chats.jsonl", name="done") == 1
    assert "error[run-exists]: runs/done already holds a run" in capfd.readouterr().err
    assert {file: file.read_bytes() for file in finished.path.rglob("*") if file.is_file()} == before


def test_a_corrected_mistake_does_not_cost_the_name_of_the_run(
    train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    write("chats.jsonl", [chat("q", "")])
    assert train("chats.jsonl") == 1
    assert RunDirectory(Path("runs/r")).status() == "failed"
    assert affina(["eval", "runs/r", "--json"]) == 1
    error = one_error(capfd.readouterr().out)
    assert error["code"] == "run-unfinished"
    assert error["fix"] == (
        "correct that and start it again: `affina train`, or `affina train --resume runs/r` with its own config"
    )
    write("chats.jsonl", CHATS)
    assert train("chats.jsonl") == 0
    manifest = RunDirectory(Path("runs/r")).read_manifest()
    assert (manifest["status"], manifest["error"]) == ("finished", None)


def test_a_failed_run_with_other_files_in_it_is_left_alone(
    train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    write("chats.jsonl", [chat("q", "")])
    assert train("chats.jsonl") == 1
    note = Path("runs/r/notes.txt")
    note.write_text("mine")
    write("chats.jsonl", CHATS)
    assert train("chats.jsonl") == 1
    assert "error[run-exists]" in capfd.readouterr().err
    assert note.read_text() == "mine"


@pytest.mark.parametrize("loss", ["gone", "changed"])
def test_a_resume_that_cannot_begin_leaves_the_run_as_it_was(
    loss: str, finished: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    before = finished.read_manifest()
    metrics = finished.metrics_file.read_bytes()
    Path("chats.jsonl").unlink()
    if loss == "changed":
        write("chats.jsonl", CHATS[:-1])
    assert affina(["train", "--resume", "runs/done/checkpoints/step-00000001", "--json"]) == 1
    error = one_error(capfd.readouterr().out)
    assert error["code"] == {"gone": "file-not-found", "changed": "resume-data-changed"}[loss]
    after = finished.read_manifest()
    assert (after["status"], after["error"]) == (before["status"], before["error"]) == ("finished", None)
    assert finished.metrics_file.read_bytes() == metrics


def test_ctrl_c_while_the_data_is_read_leaves_a_run_that_can_start_again(
    train: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from affina.data import run_data

    def interrupted(*arguments: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    write("chats.jsonl", CHATS)
    with monkeypatch.context() as patched:
        patched.setattr(run_data, "prepare_from_config", interrupted)
        assert train("chats.jsonl", "--json") == 130
    assert one_error(capfd.readouterr().out)["code"] == "interrupted"
    assert RunDirectory(Path("runs/r")).status() == "interrupted"
    assert train("chats.jsonl") == 0


@pytest.mark.parametrize("cause", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left on device")])
def test_a_comparison_that_stops_leaves_the_run_finished(
    cause: BaseException, train: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from affina.evaluation import build

    def stopped(*arguments: Any, progress: Callable[[str, int, int], None], **options: Any) -> None:
        progress("base model, perplexity", 0, 4)
        raise cause

    write("chats.jsonl", CHATS)
    with monkeypatch.context() as patched:
        patched.setattr(build, "evaluate_run", stopped)
        assert train("chats.jsonl", "--set", "evaluation.enabled=true") == (
            130 if isinstance(cause, KeyboardInterrupt) else 1
        )
    text = capfd.readouterr().err
    assert "training is finished and its adapter saved; the comparison again: affina eval runs/r" in text
    run = RunDirectory(Path("runs/r"))
    assert run.status() == "finished"
    assert (run.adapter / "adapter_model.safetensors").is_file()


# After training


def test_a_changed_template_is_refused_by_every_verb_before_it_does_anything(
    train: Callable[..., int], tiny_model_folder: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model_folder, folder / "model"))
    write("chats.jsonl", CHATS)
    assert train("chats.jsonl", model=model) == 0
    capfd.readouterr()
    with (model / "chat_template.jinja").open("a") as template:
        template.write("x")
    for command in (
        ["eval", "runs/r"],
        ["chat", "runs/r"],
        ["merge", "runs/r", "-o", "merged"],
        ["train", "--resume", "runs/r/checkpoints/step-00000001"],
    ):
        assert affina([*command, "--json"]) == 1
        error = one_error(capfd.readouterr().out)
        assert error["code"] == "template-contract-broken"
        assert "the chat template (" in error["what"]
        assert "tokenizer (" not in error["what"]
        assert "put the model's tokenizer and chat template back" in error["fix"]
    assert not Path("merged").exists()
    assert RunDirectory(Path("runs/r")).status() == "finished"


def test_held_out_records_that_were_trained_on_are_never_evaluated(
    finished: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    write("chats.jsonl", [*CHATS, *(chat(f"another {number}", "one") for number in range(40))])
    assert affina(["eval", "runs/done", "--json"]) == 1
    error = one_error(capfd.readouterr().out)
    assert error["code"] == "validation-changed"
    assert error["fix"] == "put the data back as it was, or start a new run"
    assert not finished.evaluation.exists()


def test_an_adapter_of_another_base_is_refused(
    finished: RunDirectory, train: Callable[..., int], tiny_model_folder: Path, folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import torch
    from transformers import AutoModelForCausalLM

    other = Path(shutil.copytree(tiny_model_folder, folder / "other"))
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    model.save_pretrained(other)
    assert train("chats.jsonl", name="other", model=other) == 0
    shutil.rmtree(finished.adapter)
    shutil.copytree("runs/other/adapter", finished.adapter)
    capfd.readouterr()
    for command in (["merge", "runs/done", "-o", "merged"], ["eval", "runs/done"]):
        assert affina([*command, "--json"]) == 1
        error = one_error(capfd.readouterr().out)
        assert error["code"] == "adapter-base-mismatch"
        assert error["fix"] == f"load it on {other}"
    assert not Path("merged").exists()


@pytest.mark.parametrize("verb", [["eval"], ["chat"], ["merge", "-o", "merged"], ["train", "--resume"]])
def test_a_run_that_is_not_there_is_named_with_those_that_are(
    verb: list[str], finished: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    assert affina([verb[0], *verb[1:], "runs/dome", "--json"]) == 1
    error = one_error(capfd.readouterr().out)
    assert (error["code"], error["fix"]) == ("run-missing", "runs in runs: done")


@pytest.mark.parametrize("manifest", ["{", "[]"])
def test_one_damaged_run_does_not_hide_the_others(
    manifest: str, finished: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.path, "runs/broken")
    Path("runs/broken/run.json").write_text(manifest)
    assert affina(["runs", "--json"]) == 0
    listed = {run["name"]: run["status"] for run in json.loads(capfd.readouterr().out)["runs"]}
    assert listed == {"done": "finished", "broken": "damaged"}
    assert affina(["runs", "done", "broken", "--json"]) == 1
    assert one_error(capfd.readouterr().out)["code"] == "run-unreadable"


def test_no_folder_of_runs_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert affina(["runs"]) == 0
    assert capfd.readouterr().out.startswith("no runs in runs\n")


def test_a_run_without_its_config_says_what_still_works(
    finished: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    finished.config_file.unlink()
    assert affina(["chat", "runs/done", "--json"]) == 1
    error = one_error(capfd.readouterr().out)
    assert error["code"] == "run-unreadable"
    assert error["what"] == "runs/done has no config.yaml"
    assert "adapter/ still loads with PEFT alone" in error["fix"]


def test_an_adapter_record_that_is_no_object_is_damage_and_no_bug(
    finished: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    (finished.adapter / "affina.json").write_text("[]")
    assert affina(["chat", "runs/done", "--json"]) == 1
    assert one_error(capfd.readouterr().out)["code"] == "adapter-damaged"


def test_a_merge_never_writes_into_what_exists(finished: RunDirectory, capfd: pytest.CaptureFixture[str]) -> None:
    Path("merged").mkdir()
    Path("merged/mine.txt").write_text("mine")
    assert affina(["merge", "runs/done", "-o", "merged", "--json"]) == 1
    assert one_error(capfd.readouterr().out)["code"] == "output-exists"
    assert [file.name for file in Path("merged").iterdir()] == ["mine.txt"]


def test_a_presets_validation_set_does_not_measure_other_data(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write("mine.jsonl", CHATS)
    assert affina(["check", "--preset", "laptop", "--set", "data.train=mine.jsonl", "--json"]) == 0
    data = json.loads(capfd.readouterr().out)["config"]["data"]
    assert (data["validation"], data["validation_fraction"]) == ([], 0.1)
