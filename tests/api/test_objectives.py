"""Every objective on a dense and an NF4 base: from a file to a saved adapter, loaded, resumed to the same bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import affina
from affina.cli.main import run as command_line
from affina.config import load_mapping
from affina.data.build import tokenizer_from_config
from affina.data.collate import collate
from affina.errors import AffinaError, ConfigError, DataError, ModelError, RunError
from affina.models.build import load_for_inference
from affina.models.compat import quiet_peft
from affina.models.forward import hidden_states
from affina.models.reward_head import document_scores
from affina.runs.checkpoints import list_checkpoints
from affina.runs.directory import RunDirectory
from tests.api.test_train import adapter_weights, make_config

Record = dict[str, Any]


def pair(number: int) -> Record:
    return {
        "prompt": f"say number {number}",
        "chosen": f"number {number} it is" + "!" * (number % 3),
        "rejected": f"I will not say {number}" + "." * (number % 4),
    }


def labelled(number: int) -> Record:
    reply = f"number {number} it is" if number % 2 else f"I will not say {number}"
    return {"prompt": f"say number {number}", "completion": reply, "label": bool(number % 2)}


def text(number: int) -> Record:
    return {"text": f"Number {number} comes after number {number - 1}. " * (1 + number % 3)}


def chat(number: int) -> Record:
    return {"prompt": f"say number {number}", "completion": f"number {number} it is"}


def write(file: Path, make: Callable[[int], Record], count: int = 24) -> Path:
    file.write_text("".join(json.dumps(make(number)) + "\n" for number in range(count)), encoding="utf-8")
    return file


RECORDS: dict[str, Callable[[int], Record]] = {
    "sft": chat,
    "dpo": pair,
    "orpo": pair,
    "simpo": pair,
    "kto": labelled,
    "cpt": text,
    "reward": pair,
    "distill": chat,
}
OF_PAIRS = {"reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy"}
METRICS = {
    "dpo": OF_PAIRS,
    "orpo": OF_PAIRS,
    "simpo": OF_PAIRS,
    "reward": OF_PAIRS,
    "kto": {"reward_desirable", "reward_undesirable", "reward_accuracy", "kl_estimate"},
    "distill": {"on_policy"},
}


def objective_config(objective: str, model: Path, root: Path, **changes: Any) -> dict[str, Any]:
    file = write(root / f"{objective}.jsonl", RECORDS[objective])
    config = make_config(
        model,
        file,
        root,
        **{
            "training__max_steps": 3,
            "training__evaluate_every_steps": 3,
            "training__save_every_steps": 2,
            "training__objective": objective,
            "output__name": objective,
            "data__max_length": 128,
            "data__truncation": "split" if objective == "cpt" else "drop",
        }
        | changes,
    )
    if objective == "distill":
        config["training"]["distillation"] = {"teacher": str(model), "on_policy": 0.5, "max_new_tokens": 4}
    return config


@pytest.mark.parametrize("weight_format", ["none", "nf4"])
@pytest.mark.parametrize("objective", RECORDS)
def test_an_objective_trains_saves_loads_and_resumes_to_the_same_bits(
    objective: str, weight_format: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    config = objective_config(objective, tiny_model_folder, tmp_path, quantization__format=weight_format)
    result = affina.train(config)
    run = RunDirectory(result.run)
    steps = [record for record in run.metrics() if "loss" in record]
    validations = [record for record in run.metrics() if "validation_loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert all(
        math.isfinite(record["loss"]) for record in (*steps, *({"loss": v["validation_loss"]} for v in validations))
    )
    measured = METRICS.get(objective, set())
    assert all(measured <= record.keys() for record in steps)
    assert all({f"validation_{name}" for name in measured} <= record.keys() for record in validations)

    saved = adapter_weights(result.run)
    assert any(float(value.abs().max()) > 0 for name, value in saved.items() if "lora_B" in name)
    loaded = load_for_inference(load_mapping(config).config, result.run / "adapter")
    parameters = dict(loaded.model.named_parameters())
    for name, value in saved.items():
        own = parameters.get(name.replace(".weight", ".default.weight"))
        own = own if own is not None else parameters[name.replace(".score.", ".score.modules_to_save.default.")]
        assert torch.equal(own, value)

    (second,) = [entry for entry in list_checkpoints(run.checkpoints) if entry.step == 2]
    affina.train(resume=second.path)
    again = adapter_weights(result.run)
    assert all(torch.equal(again[name], value) for name, value in saved.items())
    assert [r for r in run.metrics() if "loss" in r][2]["loss"] == steps[2]["loss"]


def test_a_pair_of_a_fresh_adapter_costs_log_2(tiny_model_folder: Path, tmp_path: Path) -> None:
    result = affina.train(objective_config("dpo", tiny_model_folder, tmp_path))
    first = next(record for record in RunDirectory(result.run).metrics() if "loss" in record)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["reward_margin"] == 0


def test_preferences_are_learnt_and_the_comparison_still_works(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = objective_config("dpo", tiny_model_folder, tmp_path, training__learning_rate=5e-3)
    config["training"]["max_steps"] = 12
    config["evaluation"] = {"max_generations": 2, "max_new_tokens": 4}
    result = affina.train(config)
    steps = [record for record in RunDirectory(result.run).metrics() if "loss" in record]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["reward_accuracy"] > 0.9
    assert result.evaluation is not None
    tuned = result.evaluation.to_dict()["tuned"]
    assert math.isfinite(tuned["perplexity"]["value"] if isinstance(tuned["perplexity"], dict) else tuned["perplexity"])
    assert "Reward margin" in (result.run / "evaluation" / "report.html").read_text(encoding="utf-8")


def test_unwanted_replies_are_no_measure_of_a_kto_model(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = objective_config("kto", tiny_model_folder, tmp_path)
    config["evaluation"] = {"max_generations": 4, "max_new_tokens": 4}
    result = affina.train(config)
    samples = (result.run / "evaluation" / "samples.jsonl").read_text(encoding="utf-8")
    assert "it is" in samples
    assert "I will not" not in samples.replace("\\u", "")


def test_continued_pre_training_runs_on_the_fast_engine_and_others_say_why_not(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    notes = {}
    for objective in ("cpt", "dpo"):
        run = affina.train(objective_config(objective, tiny_model_folder, tmp_path, adapter__dropout=0.0)).run
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        notes[objective] = " ".join(event["message"] for event in events if event["kind"] == "note")
    assert "engine: fast" in notes["cpt"]
    reason = "training.objective dpo needs more than the supervised cross-entropy"
    assert f"engine: reference, because {reason}" in notes["dpo"]
    with pytest.raises(ModelError, match="engine-unsupported") as caught:
        affina.train(objective_config("dpo", tiny_model_folder, tmp_path, output__name="fast") | {"engine": "fast"})
    assert reason in str(caught.value.why)


def test_runs_are_listed_with_their_objective_and_losses_of_two_objectives_do_not_compare(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for objective in ("orpo", "simpo"):
        affina.train(objective_config(objective, tiny_model_folder, tmp_path))
    monkeypatch.chdir(tmp_path)
    assert [run.method for run in affina.list_runs("runs")] == ["lora on nf4, orpo", "lora on nf4, simpo"]
    assert command_line(["runs", "orpo", "simpo"]) == 0
    assert "different objectives: their losses do not compare" in " ".join(capsys.readouterr().out.split())


# Reward models


@pytest.fixture(scope="module")
def reward_run(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("reward")
    config = objective_config("reward", tiny_model_folder, root, quantization__format="none")
    return affina.train(config).run, config


def test_transformers_and_peft_give_the_scores_that_training_saw(
    reward_run: tuple[Path, dict[str, Any]], tiny_model_folder: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    run, config = reward_run
    resolved = load_mapping(config).config
    tokenizer = tokenizer_from_config(resolved.model)
    turns = [{"role": "user", "content": "say number 7"}, {"role": "assistant", "content": "number 7 it is"}]
    ids = tokenizer.hf.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]

    loaded = load_for_inference(resolved, run / "adapter")
    from affina.data.masking import build_sample

    sample = build_sample(torch.tensor(ids, dtype=torch.int32).numpy(), [])
    with torch.no_grad():
        ours = document_scores(loaded.model, collate([sample], num_tokens=None, pad_token_id=0))[0]
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder, num_labels=1)
        base.config.pad_token_id = tokenizer.pad_id
        with quiet_peft():
            other = PeftModel.from_pretrained(base, run / "adapter").eval()
        theirs = other(input_ids=torch.tensor([ids])).logits[0, 0]
    # float32, other attention kernels
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4, abs=1e-5)
    assert hidden_states(loaded.model, collate([sample], num_tokens=None, pad_token_id=0)).shape[-1] == 64


@pytest.mark.parametrize(
    ("verb", "reason"),
    [
        ("chat", "asked to chat"),
        ("merge", "merged into a language model"),
        ("eval", "compared with its base by replies"),
    ],
)
def test_a_reward_run_refuses_to_write(
    verb: str, reason: str, reward_run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [verb, str(reward_run[0])] + (["-o", str(tmp_path / "merged")] if verb == "merge" else [])
    assert command_line(arguments) == 1
    shown = capsys.readouterr().err
    assert "error[reward-run]" in shown
    assert reason in " ".join(shown.split())
    assert "AutoModelForSequenceClassification" in shown
    with pytest.raises(RunError, match="reward-run"):
        affina.evaluate(reward_run[0])


def test_a_reward_run_is_not_told_to_chat_next(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", pair)
    (tmp_path / "run.yaml").write_text(
        f"model: {tiny_model_folder}\ndata: {{train: pairs.jsonl, cache_directory: cache}}\n"
        "training: {objective: reward, max_steps: 2, device: cpu}\noutput: {name: r}\n"
    )
    assert command_line(["train", "run.yaml"]) == 0
    captured = capsys.readouterr()
    assert "affina chat" not in captured.out
    assert "affina runs" in captured.out
    assert "margin" in captured.err
    assert "in order" in captured.err


# Distillation from files


def test_a_teachers_tokens_are_written_and_learnt(tiny_model_folder: Path, tmp_path: Path) -> None:
    from recipes.teacher_log_probabilities import write_teacher_tokens

    write(tmp_path / "chats.jsonl", chat)
    (tmp_path / "run.yaml").write_text(f"model: {tiny_model_folder}\ndata: {tmp_path / 'chats.jsonl'}\n")
    taught = tmp_path / "taught.jsonl"
    assert write_teacher_tokens(tmp_path / "run.yaml", str(tiny_model_folder), taught, top_k=8) == 24
    record = json.loads(taught.read_text().splitlines()[0])
    assert {len(row) for row in record["teacher"]["token_ids"]} == {8}

    config = objective_config("distill", tiny_model_folder, tmp_path, quantization__format="none")
    config["data"]["train"] = [{"path": str(taught)}]
    config["training"]["distillation"] = {}
    result = affina.train(config)
    first, *_, last = [record for record in RunDirectory(result.run).metrics() if "loss" in record]
    # The student is the teacher: nothing to learn from what it was told.
    assert first["loss"] == pytest.approx(0.0, abs=1e-5)
    assert 0 < first["teacher_mass"] < 1
    assert last["step"] == 3


# Bad input


def fails(config: dict[str, Any], kind: type[AffinaError] = DataError) -> AffinaError:
    with pytest.raises(AffinaError) as caught:
        affina.train(config)
    errors = getattr(caught.value, "errors", [caught.value])
    assert isinstance(errors[0], kind)
    return errors[0]


def with_records(config: dict[str, Any], file: Path, records: list[Record]) -> dict[str, Any]:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    config["data"]["train"] = [{"path": str(file)}]
    return config


def test_kto_with_one_label_only_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = objective_config("kto", tiny_model_folder, tmp_path)
    for is_wanted, missing, fix in ((True, "unwanted", "sft"), (False, "wanted", "add wanted replies")):
        records = [labelled(number) | {"label": is_wanted} for number in range(12)]
        error = fails(with_records(config, tmp_path / f"{is_wanted}.jsonl", records))
        assert error.code == "one-label"
        assert f"there is no {missing} one" in error.what
        assert fix in str(error.fix)


def test_a_pair_longer_than_max_length_is_told_with_its_line_and_its_sizes(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    config = objective_config("dpo", tiny_model_folder, tmp_path, data__truncation="raise")
    records = [pair(number) for number in range(12)]
    records[4]["chosen"] = "long " * 100
    error = fails(with_records(config, tmp_path / "long.jsonl", records))
    assert error.code == "sample-too-long"
    assert "a pair has" in error.what
    assert "chosen" in error.what
    assert str(error.where) == f"{tmp_path / 'long.jsonl'}:5"
    assert "data.max_length: " in str(error.fix)
    config["data"]["truncation"] = "drop"
    config["output"]["name"] = "dropped"
    assert affina.train(config).steps == 3


def test_a_teacher_with_other_tokens_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_model_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = objective_config("distill", tiny_model_folder, tmp_path)
    config["training"]["distillation"] = {"teacher": str(other)}
    error = fails(config, ModelError)
    assert error.code == "teacher-tokenizer"
    assert "2 differ, for instance" in str(error.why)
    assert "training.objective: sft" in str(error.fix)
    run = RunDirectory(tmp_path / "runs" / "distill")
    assert not list(run.metrics())
    config["training"]["distillation"] = {"teacher": str(tmp_path / "nowhere")}
    assert fails(config, ConfigError).code == "path-missing"


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        ({"token_ids": [[1], [2]], "log_probabilities": [[-0.1], [-0.1]]}, "teacher-length", "speaks about 2 tokens"),
        ({"token_ids": [[1]], "log_probabilities": [[0.7]]}, "bad-teacher", '"teacher" is'),
        (None, "bad-teacher", '"teacher" is None'),
    ],
)
def test_a_teacher_that_does_not_fit_its_record_is_told_with_its_line(
    change: Record | None, code: str, reason: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    config = objective_config("distill", tiny_model_folder, tmp_path)
    config["training"]["distillation"] = {}
    records = [chat(number) | {"teacher": {"token_ids": [[1]], "log_probabilities": [[-0.5]]}} for number in range(6)]
    records[0]["teacher"] = change
    error = fails(with_records(config, tmp_path / "taught.jsonl", records))
    assert error.code == code
    assert reason in error.what
    assert str(error.where) == f"{tmp_path / 'taught.jsonl'}:1"


def test_a_teachers_token_beyond_the_vocabulary_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = objective_config("distill", tiny_model_folder, tmp_path)
    config["training"]["distillation"] = {}
    resolved = load_mapping(config).config
    from affina.data.build import template_from_config
    from affina.data.messages import Conversation, Message

    messages = (Message("user", "say number 0"), Message("assistant", "number 0 it is"))
    (encoded,) = template_from_config(resolved).encode(Conversation(messages))
    count = encoded.sample.num_supervised
    teacher = {"token_ids": [[99_999]] * count, "log_probabilities": [[-0.5]] * count}
    records = [chat(0) | {"teacher": teacher}]
    config["data"]["validation_fraction"] = 0.0
    error = fails(with_records(config, tmp_path / "taught.jsonl", records))
    assert error.code == "teacher-vocabulary"
    assert "99,999" in error.what


def test_records_without_a_teacher_need_a_teacher_model(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = objective_config("distill", tiny_model_folder, tmp_path)
    config["training"]["distillation"] = {}
    error = fails(config)
    assert error.code == "no-teacher"
    assert "training.distillation.teacher" in str(error.fix)
