"""What a wrong file is told: code, text, fix and place of every error, and all of them at once."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import string
from operator import ne
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.catalog.methods import METHODS
from affina.config import load_config
from affina.config.fields import all_fields
from affina.config.layers import PRESETS
from affina.config.names import FOREIGN_ANSWERS, FOREIGN_KEYS, FOREIGN_VALUES, suggest_key
from affina.config.schema import RunConfig
from affina.errors import AffinaError, AffinaErrors

METHOD_NAMES = f"{', '.join(METHODS)} or the PEFT name of another method (hra, vblora, …)"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with one data file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").touch()
    return tmp_path


def errors_of(text: str | bytes, *overrides: str, preset: str | None = None) -> list[AffinaError]:
    path = Path("run.yaml")
    path.write_bytes(text if isinstance(text, bytes) else dedent(text).encode())
    with pytest.raises(AffinaError) as caught:
        load_config(path, overrides, preset)
    return caught.value.errors if isinstance(caught.value, AffinaErrors) else [caught.value]


def error_of(text: str | bytes, *overrides: str, preset: str | None = None) -> AffinaError:
    (error,) = errors_of(text, *overrides, preset=preset)
    return error


def place(error: AffinaError) -> str:
    return str(error.where)


# --- YAML itself


def test_a_tab_is_named_with_its_line() -> None:
    error = error_of("training:\n\tepochs: 1\n")
    assert (error.code, place(error)) == ("yaml-tab", "run.yaml:2")
    assert error.what == "a tab is used where YAML wants spaces"
    assert error.fix == "replace each tab by two spaces"


def test_all_lines_with_tabs_are_listed() -> None:
    error = error_of("training:\n\tepochs: 1\n\tseed: 1\n")
    assert error.what == "a tab is used where YAML wants spaces (tabs are in lines 2, 3)"


def test_a_tab_inside_a_text_is_no_error() -> None:
    Path("run.yaml").write_text('data: {system_prompt: "a\tb"}\n')
    assert load_config(Path("run.yaml")).config.data.system_prompt == "a\tb"


def test_every_duplicate_key_is_reported_with_both_lines() -> None:
    first, second = errors_of("adapter:\n  rank: 8\n  rank: 16\ntraining: {}\ntraining: {}\n")
    assert (first.code, place(first)) == ("duplicate-key", "run.yaml:3")
    assert first.what == '"rank" is written twice; the first is in line 2'
    assert (second.what, place(second)) == ('"training" is written twice; the first is in line 4', "run.yaml:5")


@pytest.mark.parametrize(
    ("text", "line", "fix"),
    [
        ("data: a: b\n", 1, "put the text after the first colon in quotes"),
        ("adapter:\n  rank: 8\n   alpha: 3\n", 3, "indent this line like its neighbours"),
        ("adapter:\n  targets: [q_proj\ntraining: {}\n", 3, "close the bracket or brace"),
        ("adapter:\n  targets: [q_proj\n", 2, "close the bracket or brace"),
        ("model: 'Qwen\n", 1, "close the quotes"),
        ('model: "C:\\q"\n', 1, "write a backslash inside double quotes twice"),
        ("model: @x\n", 1, "put the value in quotes"),
        ("model: *x\n", 1, "put a text that begins with * in quotes"),
    ],
)
def test_a_syntax_error_shows_its_line_and_a_remedy(text: str, line: int, fix: str) -> None:
    error = error_of(text)
    assert error.code == "yaml-syntax"
    assert place(error) == f"run.yaml:{line}"
    assert text.splitlines()[line - 1].strip() in error.what
    assert error.fix is not None
    assert fix in error.fix


@pytest.mark.parametrize(
    ("text", "code", "what", "line"),
    [
        ("", "config-empty", "run.yaml holds no settings", None),
        ("# nothing\n", "config-empty", "run.yaml holds no settings", None),
        ("- a\n", "config-not-mapping", "run.yaml holds a list instead of sections", 1),
        ("hello\n", "config-not-mapping", 'run.yaml holds "hello" instead of sections', 1),
        ("model: a/b\n---\nmodel: a/c\n", "yaml-documents", "a second document begins with `---`", 2),
        ("model: !!python/name:os.system\n", "yaml-tag", 'the YAML tag "python/name:os.system" is not read', 1),
        ("<<: {model: a/b}\n", "yaml-merge-key", "the merge key << is not read", 1),
        ("training:\n  1: 2\n", "yaml-key", "'1' is not a name", 2),
        ("? [a]\n: 1\n", "yaml-key", "a list or mapping is used as a key", 1),
        ("data: &a [*a]\n", "yaml-recursive", "an alias contains itself", 1),
        (b"model: a\nadapter: caf\xe9\n", "yaml-encoding", "byte 0xe9 is not UTF-8", 2),
        (b"model: a\nadapter: a\x01b\n", "yaml-encoding", "a control character is in the file", 2),
        (
            "a: " + "[" * 1000,
            "yaml-too-large",
            "the file is nested too deeply, or its aliases unfold to too much",
            None,
        ),
    ],
)
def test_a_file_that_is_no_config_is_refused(text: str | bytes, code: str, what: str, line: int | None) -> None:
    error = errors_of(text)[0]
    assert (error.code, error.what) == (code, what)
    assert place(error) == ("run.yaml" if line is None else f"run.yaml:{line}")
    assert error.fix


def test_aliases_of_aliases_are_stopped() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert error_of("\n".join(lines)).code == "yaml-too-large"


def test_a_missing_file_is_told_with_its_neighbour(folder: Path) -> None:
    (folder / "support.yaml").write_text("adapter: {}\n")
    with pytest.raises(AffinaError) as caught:
        load_config(Path("suport.yaml"))
    assert caught.value.code == "config-missing"
    assert caught.value.what == "there is no file suport.yaml"
    assert caught.value.fix == "did you mean support.yaml?"
    with pytest.raises(AffinaError, match=r"this folder has support.yaml"):
        load_config(Path("zzzzzzzzz"))


def test_a_missing_file_in_an_empty_folder_is_told_how_to_begin(folder: Path) -> None:
    with pytest.raises(AffinaError, match="begin with a file that holds `extends: laptop`"):
        load_config(Path("x.yaml"))


def test_a_presets_name_in_place_of_a_file_is_recognised() -> None:
    with pytest.raises(AffinaError, match="starter is a preset: write --preset starter"):
        load_config(Path("starter"))


def test_a_folder_in_place_of_a_file_is_recognised(folder: Path) -> None:
    (folder / "run-1").mkdir()
    with pytest.raises(
        AffinaError, match=r"config-unreadable\]: run-1 is a folder\n  fix: write the path of a YAML file"
    ):
        load_config(Path("run-1"))
    (folder / "run-1" / "config.yaml").touch()
    with pytest.raises(AffinaError, match=r"write run-1/config.yaml"):
        load_config(Path("run-1"))


def test_an_unreadable_file_is_told_as_such(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        AffinaError, match=r"config-unreadable\]: x\.yaml cannot be read\n  why: permission denied\n  fix: check"
    ):
        load_config(Path("x.yaml"))


# --- names


@pytest.mark.parametrize(
    ("text", "what", "fix", "line"),
    [
        ("training:\n  learnig_rate: 1\n", "unknown key training.learnig_rate", "did you mean learning_rate?", 2),
        ("training:\n  learning-rate: 1\n", "unknown key training.learning-rate", "did you mean learning_rate?", 2),
        ("trainig: {}\n", "unknown key trainig", "did you mean training?", 1),
        ("extend: starter\n", "unknown key extend", "did you mean extends?", 1),
        ("epochs: 3\n", "unknown key epochs", "it belongs elsewhere: write training.epochs", 1),
        ("training:\n  max_length: 9\n", "unknown key training.max_length",
         "it belongs elsewhere: write data.max_length", 2),
        ("seed: 3\n", "unknown key seed",
         "it belongs elsewhere: write data.seed or training.seed or evaluation.seed", 1),
        ("training:\n  adapter: {}\n", "unknown key training.adapter",
         "adapter is a section of its own: move it to the left margin", 2),
        ("training.epochs: 3\n", "unknown key training.epochs",
         "write epochs inside the section training:, or give it as --set training.epochs=...", 1),
        ("lora_r: 3\n", "unknown key lora_r", "affina calls it adapter.rank", 1),
        ("adapter:\n  lora_r: 3\n", "unknown key adapter.lora_r", "affina calls it adapter.rank", 2),
        ("load_in_4bit: true\n", "unknown key load_in_4bit", "write `quantization: nf4`", 1),
        ("load_in_8bit: true\n", "unknown key load_in_8bit", "write `quantization: int8`", 1),
        ("training:\n  lr: 3\n", "unknown key training.lr", "affina calls it training.learning_rate", 2),
        ("quantization:\n  zzz: 3\n", "unknown key quantization.zzz",
         "the section quantization knows format, double_quantization, scale_search, skip_modules", 2),
        ("data:\n  train:\n    - path: my.jsonl\n      formt: text\n", "unknown key data.train[0].formt",
         "did you mean format?", 4),
        ("data:\n  train:\n    - path: my.jsonl\n      columns:\n        respnse: x\n        completon: y\n",
         "unknown key data.train[0].columns.completon", "did you mean completion?", 6),
    ],
)  # fmt: skip
def test_an_unknown_key_leads_to_the_right_one(text: str, what: str, fix: str, line: int) -> None:
    error = errors_of(text)[-1]
    assert (error.code, error.what, error.fix, place(error)) == ("unknown-key", what, fix, f"run.yaml:{line}")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("lora_r", "adapter.rank"),
        ("lora_alpha", "adapter.alpha"),
        ("per_device_train_batch_size", "training.micro_batch_size"),
        ("sequence_len", "data.max_length"),
        ("num_train_epochs", "training.epochs"),
        ("max_seq_length", "data.max_length"),
        ("base_model", "model.path"),
        ("output_dir", "output.directory"),
        ("lr", "training.learning_rate"),
    ],
)
def test_names_of_other_tools_are_understood(name: str, path: str) -> None:
    assert suggest_key(name, "", [*RunConfig.model_fields, "extends"]) == f"affina calls it {path}"


def test_every_foreign_name_leads_to_a_setting_that_exists_and_is_not_ours() -> None:
    ours = {*all_fields(), "extends"}
    assert set(FOREIGN_KEYS.values()) <= ours
    assert set(FOREIGN_VALUES) <= ours
    assert not set(FOREIGN_KEYS) & set(RunConfig.model_fields)
    assert not set(FOREIGN_KEYS) & set(FOREIGN_ANSWERS)


def test_every_foreign_value_leads_to_a_value_that_its_setting_takes() -> None:
    for path, words in FOREIGN_VALUES.items():
        for word, ours in words.items():
            assert ours in str(all_fields()[path].annotation), (path, word)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_one_wrong_letter_in_a_setting_still_leads_to_it(data: st.DataObject) -> None:
    names = [path for path in all_fields() if "[]" not in path and len(path.rpartition(".")[2]) > 6]
    path = data.draw(st.sampled_from(names))
    section, _, name = path.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in all_fields() if other.rpartition(".")[0] == section]
    index = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.sampled_from(string.ascii_lowercase))
    wrong = name[:index] + letter + name[index + 1 :]
    # adam_beta1 and adam_beta2, keep_best and keep_last are as near to each other as a slip is.
    twins = [other for other in siblings if len(other) == len(name) and sum(map(ne, other, name)) <= 2]
    if wrong not in siblings:
        assert suggest_key(wrong, section, siblings) in [f"did you mean {twin}?" for twin in twins]


# --- values


@pytest.mark.parametrize(
    ("text", "code", "what", "fix"),
    [
        ("training: {learning_rate: fast}", "wrong-type",
         'training.learning_rate is "fast"; it takes a number above 0 and below 1',
         "write such a value, or remove the key: the default is 0.0002"),
        ('training: {epochs: "3"}', "wrong-type", 'training.epochs is "3"; it takes a number above 0', "write 3"),
        ("training: {learning_rate: '2,5e-4'}", "wrong-type",
         'training.learning_rate is "2,5e-4"; it takes a number above 0 and below 1', "write 2.5e-4"),
        ("training: {learning_rate: 5}", "out-of-range",
         "training.learning_rate is 5; it takes a number above 0 and below 1",
         "write such a value, or remove the key: the default is 0.0002"),
        ("training: {learning_rate: .nan}", "out-of-range",
         "training.learning_rate is .nan; it takes a number above 0 and below 1",
         "write such a value, or remove the key: the default is 0.0002"),
        ("training: {epochs: .inf}", "out-of-range", "training.epochs is .inf; it takes a number above 0",
         "write such a value, or remove the key: the default is 1"),
        ("training: {epochs: true}", "wrong-type", "training.epochs is true; it takes a number above 0",
         "write such a value, or remove the key: the default is 1"),
        ("adapter: {rank: 0}", "out-of-range", "adapter.rank is 0; it takes a whole number of at least 1",
         "write such a value, or remove the key: the default is 16"),
        ("adapter: {rank: 16.0}", "wrong-type", "adapter.rank is 16.0; it takes a whole number of at least 1",
         "write 16"),
        ("adapter: {rank: }", "wrong-type", "adapter.rank is empty; it takes a whole number of at least 1",
         "write a value, or remove the key to get the default"),
        ("adapter: {dropout: 5}", "out-of-range", "adapter.dropout is 5; it takes a number of at least 0 and below 1",
         "write 0.05 for 5%"),
        ("data: {validation_fraction: 10}", "out-of-range",
         "data.validation_fraction is 10; it takes a number of at least 0 and at most 0.5", "write 0.1 for 10%"),
        ("data: {packing: yes}", "wrong-type", 'data.packing is "yes"; it takes true or false', "write true"),
        ("data: {packing: 0}", "wrong-type", "data.packing is 0; it takes true or false", "write false"),
        ("training: {gradient_checkpointing: off}", "wrong-type",
         'training.gradient_checkpointing is "off"; it takes true or false or auto', "write false"),
        ("training: {max_steps: none}", "wrong-type",
         'training.max_steps is "none"; it takes a whole number of at least 1 or null',
         "write null, or leave the key out"),
        ("training: {optimizer: adamw_torch}", "unknown-value",
         'training.optimizer is "adamw_torch"; it takes one of adamw, adamw_8bit, paged_adamw_8bit, adafactor',
         "did you mean adamw?"),
        ("training: {schedule: cosin}", "unknown-value",
         'training.schedule is "cosin"; it takes one of cosine, linear, constant', "did you mean cosine?"),
        ("training: {precision: bfloat16}", "unknown-value",
         'training.precision is "bfloat16"; it takes one of auto, bf16, fp16, fp32', "did you mean bf16?"),
        ("training: {precision: 16}", "unknown-value",
         "training.precision is 16; it takes one of auto, bf16, fp16, fp32", "did you mean fp16?"),
        ("quantization: 4bit", "unknown-value",
         'quantization.format is "4bit"; it takes one of none, nf4, fp4, int8, fp8',
         "did you mean nf4?"),
        ("quantization: true", "unknown-value",
         "quantization.format is true; it takes one of none, nf4, fp4, int8, fp8",
         "did you mean nf4?"),
        ("quantization: 8bit", "unknown-value",
         'quantization.format is "8bit"; it takes one of none, nf4, fp4, int8, fp8',
         "did you mean int8?"),
        ("quantization: float8", "unknown-value",
         'quantization.format is "float8"; it takes one of none, nf4, fp4, int8, fp8', "did you mean fp8?"),
        ("adapter: qlora", "unknown-value", f'adapter.method is "qlora"; it takes one of {METHOD_NAMES}',
         "write `adapter: lora` and `quantization: nf4`; together they are QLoRA"),
        ("adapter: lora+", "unknown-value", f'adapter.method is "lora+"; it takes one of {METHOD_NAMES}',
         "did you mean loraplus?"),
        ("adapter: {method: hra, options: 5}", "wrong-type", "adapter.options is 5; it takes a mapping of options",
         "write such a value, or remove the key: the default is a mapping ()"),
        ("adapter: {targets: all-liner}", "wrong-type",
         'adapter.targets is "all-liner"; it takes all-linear or a list of names', "did you mean all-linear?"),
        ("adapter: {targets: 'q_proj, v_proj'}", "wrong-type",
         'adapter.targets is "q_proj, v_proj"; it takes all-linear or a list of names',
         "write a list: [q_proj, v_proj]"),
        ("tracking: [wandb, tb]", "unknown-value",
         'tracking.trackers is ["wandb", "tb"]; it takes a list of names out of tensorboard, wandb, mlflow, trackio',
         "did you mean tensorboard?"),
        ("output: {name: 001}", "wrong-type", "output.name is 001; it takes text or null", 'put it in quotes: "001"'),
        ("model: {path: {a: 1}}", "wrong-type", "model.path is a mapping (a: …); it takes text",
         "write such a value, or remove the key: the default is affina/nano"),
        ("data: {validation: [{path: a/b, format: chatml}]}", "unknown-value",
         'data.validation[0].format is "chatml"; it takes one of '
         "auto, messages, sharegpt, alpaca, prompt_completion, text, preference, ranking, tree, labelled",
         "did you mean messages?"),
        ("training: {optimizer: §}", "unknown-value",
         'training.optimizer is "§"; it takes one of adamw, adamw_8bit, paged_adamw_8bit, adafactor',
         "write such a value, or remove the key: the default is adamw"),
        ("training: 5", "wrong-type", "training is 5; it is a section",
         "indent its settings below it: objective, epochs, max_steps, micro_batch_size …"),
        ("data: 5", "wrong-type", "data.train[0] is 5; it takes a path or a source",
         "write a file name, or a mapping with `path:`"),
        ("data: {train: [{format: text}]}", "missing-key", "data.train[0] has no path", "add `path:` to this source"),
        ("extends: [a, b]", "wrong-type",
         'extends is ["a", "b"]; it takes the name of a preset or the path of one YAML file',
         "write one of laptop, starter, production, premium, or a path; files can extend each other in a chain"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_shown_with_what_is_allowed(text: str, code: str, what: str, fix: str) -> None:
    error = error_of(text)
    assert (error.code, error.what, error.fix, place(error)) == (code, what, fix, "run.yaml:1")


def test_a_long_or_unprintable_value_is_shown_short_and_safe() -> None:
    error = error_of(f'adapter: {{rank: "{"x" * 500}"}}')
    assert len(error.what) < 160
    assert "\\x1b[31m" in error_of('adapter: {rank: "\\e[31m"}').what


# --- all together


def test_all_errors_of_a_file_come_together_in_the_order_of_its_lines() -> None:
    errors = errors_of(
        """\
        model: Qwen/Qwen3-4B
        lora_r: 16
        training:
          learning_rate: fast
          epochs: 1
          epochs: 2
        data: missing.jsonl
        engine: fastest
        """
    )
    assert [(error.code, place(error)) for error in errors] == [
        ("unknown-key", "run.yaml:2"),
        ("wrong-type", "run.yaml:4"),
        ("duplicate-key", "run.yaml:6"),
        ("path-missing", "run.yaml:7"),
        ("unknown-value", "run.yaml:8"),
    ]


def test_a_refused_value_does_not_cause_further_errors() -> None:
    # Without max_steps this would also be streaming-without-max-steps.
    text = "data: {streaming: true, validation_fraction: 0}\ntraining: {max_steps: many}\n"
    assert [error.code for error in errors_of(text)] == ["wrong-type"]


def test_errors_in_the_file_that_is_extended_carry_its_name() -> None:
    Path("base.yaml").write_text("adapter:\n  rank: x\n")
    assert place(error_of("extends: base.yaml\n")) == "base.yaml:2"


# --- extends, presets, overrides, paths


def test_extends_in_a_circle_is_refused() -> None:
    Path("a.yaml").write_text("extends: run.yaml\n")
    error = error_of("model: a/b\nextends: a.yaml\n")
    assert error.code == "extends-cycle"
    assert error.what == "extends goes round in a circle: run.yaml -> a.yaml -> run.yaml"
    assert place(error) == "a.yaml:1"


def test_an_unknown_target_of_extends_is_refused() -> None:
    error = error_of("model: a/b\nextends: producton\n")
    assert (error.code, place(error)) == ("extends-unknown", "run.yaml:2")
    assert error.what == 'extends is "producton", which is neither a preset nor a file'
    assert error.fix == "did you mean production?"
    assert error_of("extends: zzzzzz\n").fix == "write a preset's name or the path of a YAML file"


def test_an_unknown_preset_is_refused() -> None:
    error = error_of("model: a/b\n", preset="stater")
    assert (error.code, error.what, error.fix) == (
        "unknown-preset",
        'there is no preset "stater"',
        "did you mean starter?",
    )
    assert error_of("model: a/b\n", preset="x").fix == f"the presets are {', '.join(PRESETS)}"


def test_two_different_presets_are_refused() -> None:
    error = error_of("extends: starter\n", preset="premium")
    assert (error.code, error.what) == ("preset-twice", "--preset is premium, and the file extends starter")


@pytest.mark.parametrize(
    ("override", "code", "what"),
    [
        ("training.epochs", "override-syntax", 'the override "training.epochs" is not of the form section.key=value'),
        ("=1", "override-syntax", 'the override "=1" is not of the form section.key=value'),
        ("training..epochs=1", "override-syntax", '"training..epochs" is not the path of a setting'),
        ("extends=starter", "override-extends", "extends cannot be overridden"),
        ("data.train[2].path=x", "override-index", "data.train[2] does not exist: data.train has 1 source"),
        (
            "data.validation[0].path=x",
            "override-index",
            "data.validation[0] does not exist: data.validation has 0 sources",
        ),
        ("training.lr=1", "unknown-key", "unknown key training.lr"),
        ("training.epochs=many", "wrong-type", 'training.epochs is "many"; it takes a number above 0'),
        ("adapter.rank=a: b: c", "yaml-syntax", "this is not valid YAML: a: b: c"),
        ("adapter.rank=!x 3", "yaml-tag", 'the YAML tag "!x" is not read'),
        ("training=5", "wrong-type", "training is 5; it is a section"),
        ("data=gone.jsonl", "path-missing", 'data.train[0].path: "gone.jsonl" does not exist'),
    ],
)
def test_an_error_in_an_override_names_the_override(override: str, code: str, what: str) -> None:
    error = error_of("data: my.jsonl\n", override)
    assert (error.code, error.what, place(error)) == (code, what, f"--set {override}")


@pytest.mark.parametrize(
    ("text", "code", "what", "fix"),
    [
        ("data: mi.jsonl", "path-missing", 'data.train[0].path: "mi.jsonl" does not exist', "did you mean my.jsonl?"),
        ("data: ./chats", "path-missing", 'data.train[0].path: "./chats" does not exist',
         "check the spelling; relative paths start at the folder of the YAML file"),
        ("data: '*.csv'", "path-missing", 'data.train[0].path: no file matches "*.csv"', "try `ls *.csv`"),
        ("data: /nowhere/at/all", "path-missing", 'data.train[0].path: "/nowhere/at/all" does not exist',
         "check the spelling; relative paths start at the folder of the YAML file"),
        ("model: ./qwen", "path-missing", 'model.path: "./qwen" does not exist',
         "check the spelling; relative paths start at the folder of the YAML file"),
        ("model: a/b/c", "path-missing", 'model.path: "a/b/c" does not exist',
         "check the spelling; relative paths start at the folder of the YAML file"),
        ("model: affina/mini", "unknown-built-in", 'model.path is "affina/mini", which is not part of affina',
         "write affina/nano"),
        ("data: affina/nano", "unknown-built-in", 'data.train[0].path is "affina/nano", which is not part of affina',
         "write affina/support"),
        ("data: https://huggingface.co/datasets/owner/name/tree/main", "path-is-url",
         'data.train[0].path is the address "https://huggingface.co/datasets/owner/name/tree/main"',
         "write owner/name"),
        ("model: s3://bucket/model", "path-is-url", 'model.path is the address "s3://bucket/model"',
         "download it, and write the file's path"),
        ("data: ''", "path-empty", "data.train[0].path is empty", "write a file, a folder or a hub id"),
    ],
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_refused_before_anything_is_loaded(
    text: str, code: str, what: str, fix: str
) -> None:
    error = error_of(text)
    assert (error.code, error.what, error.fix, place(error)) == (code, what, fix, "run.yaml:1")


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=60),
        st.lists(
            st.tuples(
                st.sampled_from(["", "  ", "    ", "- ", "\t"]),
                st.sampled_from([*RunConfig.model_fields, "extends", "path", "rank", "train", "<<", "? ", "&a"]),
                st.sampled_from([":", ": ", ""]),
                st.one_of(
                    st.sampled_from(["*a", "[", "{", "1e-4", "null", "!!int x", "'", "starter"]), st.text(max_size=8)
                ),
            ).map("".join),
            max_size=6,
        ).map("\n".join),
    )
)
def test_no_file_whatever_crashes_the_reader(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(AffinaError):
        load_config(path)


def test_every_code_is_documented() -> None:
    root = Path(__file__).parents[2]
    documented = (root / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    sources = [*(root / "src/affina/config").glob("*.py"), *(root / "src/affina/cli").glob("main.py")]
    pattern = re.compile(r'(?:Error\(|refuse\()(?:\s*\w+,)?\s*"([a-z0-9]+(?:-[a-z0-9]+)*)"')
    codes = {code for source in sources for code in pattern.findall(source.read_text(encoding="utf-8"))}
    assert len(codes) > 40
    assert [code for code in sorted(codes) if f"`{code}`" not in documented] == []
