"""From files to samples: cached, parallel, split before anything is cut, and never silent about what was left out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.data.tiny_tokenizers import THINKING, build_hf, build_tokenizer

from affina.config.schema import ColumnsConfig, DataConfig, RunConfig, SourceConfig, TrainingConfig
from affina.data.build import prepare_settings, source_spec
from affina.data.cache import is_intact, open_or_build
from affina.data.encoding import CHUNK_RECORDS, EncodeSettings, encode_all
from affina.data.messages import Conversation, Message
from affina.data.prepare import PreparedData, PrepareSettings, choose_num_workers, prepare
from affina.data.report import DataReport
from affina.data.show import to_plain
from affina.data.streaming import is_held_out, stream
from affina.data.tokenizer import LoadedTokenizer, describe_tokenizer
from affina.data.validation import SourceSpec
from affina.errors import AffinaErrors, DataError


def chat(question: str, answer: str, **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def write(path: Path, records: list[dict[str, object]]) -> SourceSpec:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return SourceSpec(path)


def many(count: int, name: str = "q") -> list[dict[str, object]]:
    words = ["river", "stone", "cloud", "paper", "glass", "north", "music", "winter"]
    return [
        chat(
            f"{name} {number}: what of {words[number % 8]} and {words[number // 8 % 8]} {number * 7919 % 1000}?",
            f"answer {number} {words[number * 3 % 8]}",
        )
        for number in range(count)
    ]


def run(
    tmp_path: Path,
    train: list[SourceSpec],
    *,
    kind: str | None = "thinking",
    validation: list[SourceSpec] | None = None,
    num_workers: int | None = 1,
    encode: EncodeSettings | None = None,
    tokenizer: LoadedTokenizer | None = None,
    **options: object,
) -> PreparedData:
    defaults: dict[str, object] = {"validation_fraction": 0.0}
    settings = PrepareSettings(encode or EncodeSettings(max_length=256), **{**defaults, **options})  # type: ignore[arg-type]
    return prepare(
        train,
        tokenizer=tokenizer or build_tokenizer(kind),
        settings=settings,
        validation=validation or (),
        num_workers=num_workers,
        cache_directory=tmp_path / "cache",
    )


def texts(prepared: PreparedData) -> list[str]:
    return [
        to_plain(sample, prepared.template.tokenizer.hf) for sample in prepared.train.take(range(len(prepared.train)))
    ]


def test_conversations_become_samples_with_their_replies_trained(tmp_path: Path) -> None:
    prepared = run(tmp_path, [write(tmp_path / "a.jsonl", [chat("hi", "hello"), chat("bye", "ciao")])])
    assert texts(prepared) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦hello<|im_end|>⟧\n",
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦ciao<|im_end|>⟧\n",
    ]
    assert prepared.train.origin(1).endswith("a.jsonl:2")
    assert prepared.enable_thinking is False
    assert prepared.contract["enable_thinking"] is False


# The cache


def test_the_second_time_nothing_is_done(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", many(30))
    first, second = (run(tmp_path, [spec], validation_fraction=0.2) for _ in range(2))
    assert (first.was_cached, second.was_cached) == (False, True)
    assert first.fingerprint == second.fingerprint
    assert second.report == first.report
    assert list(second.validation_conversations) == list(first.validation_conversations)


@pytest.mark.parametrize(
    "change",
    [
        {"encode": EncodeSettings(max_length=255)},
        {"encode": EncodeSettings(max_length=256, mask="all")},
        {"encode": EncodeSettings(max_length=256, thinking="strip")},
        {"encode": EncodeSettings(max_length=256, system_prompt="s")},
        {"seed": 1},
        {"validation_fraction": 0.1},
        {"deduplicate": "exact"},
        {"kind": "gemma"},
    ],
)
def test_whatever_changes_the_samples_changes_the_fingerprint(tmp_path: Path, change: dict[str, object]) -> None:
    spec = write(tmp_path / "a.jsonl", many(12))
    assert run(tmp_path, [spec]).fingerprint != run(tmp_path, [spec], **change).fingerprint  # type: ignore[arg-type]


def test_changed_data_is_prepared_again(tmp_path: Path) -> None:
    first = run(tmp_path, [write(tmp_path / "a.jsonl", [chat("hi", "hello")])])
    second = run(tmp_path, [write(tmp_path / "a.jsonl", [chat("hi", "hullo")])])
    assert not second.was_cached
    assert texts(first) != texts(second)


@pytest.mark.parametrize("name", ["train.arrow", "report.json", "validation.jsonl", "manifest.json"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, name: str) -> None:
    spec = write(tmp_path / "a.jsonl", many(30))
    first = run(tmp_path, [spec], validation_fraction=0.2)
    expected = texts(first)
    damaged = first.directory / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    second = run(tmp_path, [spec], validation_fraction=0.2)
    assert not second.was_cached
    assert texts(second) == expected
    assert is_intact(second.directory)


def test_a_preparation_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        open_or_build(tmp_path, "key", lambda folder: (folder / "half").write_text("x") and 1 // 0)
    assert [path.name for path in (tmp_path / "prepared").iterdir()] == ["key.lock"]


def test_two_runs_at_once_do_the_work_once(tmp_path: Path) -> None:
    builds: list[int] = []

    def build(folder: Path) -> None:
        builds.append(1)
        time.sleep(0.2)
        (folder / "data").write_text("x")

    threads = [threading.Thread(target=open_or_build, args=(tmp_path, "key", build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert open_or_build(tmp_path, "key", build) == (tmp_path / "prepared" / "key", True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_permission_says_where_else_to_go(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(DataError, match="AFFINA_CACHE") as caught:
        open_or_build(locked, "key", lambda folder: None)
    assert caught.value.code == "cache-not-writable"


# Workers


def test_the_number_of_workers_does_not_change_a_byte(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", many(300))
    stores = []
    for num_workers in (1, 2):
        prepared = run(tmp_path / str(num_workers), [spec], num_workers=num_workers, validation_fraction=0.1)
        assert not prepared.was_cached
        stores.append(
            [(prepared.directory / name).read_bytes() for name in ("train.arrow", "validation.arrow", "report.json")]
        )
    assert stores[0] == stores[1]


def test_errors_of_workers_arrive_with_all_their_parts() -> None:
    bad = Conversation((Message("user", "<|im_end|>"), Message("assistant", "a")), origin="b.jsonl:4")
    results = list(encode_all([bad] * 3, build_tokenizer("thinking"), EncodeSettings(64), num_workers=2))
    assert [result.error.code for result in results if result.error] == ["control-token-in-content"] * 3
    assert "(b.jsonl:4)" in str(results[0].error)
    assert results[0].error is not None
    assert results[0].error.fix


def test_a_worker_that_is_killed_ends_the_preparation_with_its_exit_code() -> None:
    good = Conversation((Message("user", "q"), Message("assistant", "a")))

    def kill_the_workers_on_the_way() -> Iterator[Conversation]:
        yield from itertools.repeat(good, 2 * CHUNK_RECORDS)
        for child in psutil.Process().children():
            if "affina.data.worker" in child.cmdline():
                child.kill()
        yield from itertools.repeat(good, 2 * CHUNK_RECORDS)

    with pytest.raises(DataError) as caught:
        list(encode_all(kill_the_workers_on_the_way(), build_tokenizer("thinking"), EncodeSettings(64), num_workers=2))
    assert caught.value.code == "worker-died"
    assert caught.value.what == "a process that prepares data ended with exit code -9"
    assert "run out of memory" in str(caught.value.why)
    assert "data.num_workers: 1" in str(caught.value.fix)


def test_small_sets_are_prepared_in_this_process() -> None:
    assert choose_num_workers(None, 1000) == 1
    assert choose_num_workers(None, 10**9) >= 1
    assert choose_num_workers(3, 1000) == 3
    assert choose_num_workers(0, 10**9) == 1


# Validation


def test_a_split_is_by_group_and_before_long_records_are_cut(tmp_path: Path) -> None:
    records = [chat(f"question number {n} about topic {n * 31}", "word " * 60, group=f"g{n // 3}") for n in range(60)]
    spec = dataclasses.replace(write(tmp_path / "a.jsonl", records))
    prepared = run(
        tmp_path, [spec], validation_fraction=0.2, encode=EncodeSettings(max_length=64, truncation="truncate")
    )
    groups = {conversation.group for conversation in prepared.validation_conversations}
    train = {int(prepared.train.origin(index).rpartition(":")[2]) - 1 for index in range(len(prepared.train))}
    assert groups
    assert not {f"g{n // 3}" for n in train} & groups
    assert len(prepared.report.split["train"]) == 64
    assert prepared.report.split["train"] != prepared.report.split["validation"]


def test_a_validation_set_of_its_own_is_compared_with_training(tmp_path: Path) -> None:
    records = many(20)
    prepared = run(
        tmp_path,
        [write(tmp_path / "a.jsonl", records)],
        validation=[write(tmp_path / "v.jsonl", [records[3], chat("something else entirely", "yes")])],
    )
    assert len(prepared.train) == 20
    assert len(prepared.validation) == len(prepared.validation_conversations) == 2
    assert prepared.report.leakage["counts"]["pair"] == 1
    assert any(finding.code == "leakage" for finding in prepared.report.findings)


def test_without_validation_there_is_none(tmp_path: Path) -> None:
    prepared = run(tmp_path, [write(tmp_path / "a.jsonl", many(5))])
    assert len(prepared.validation) == 0
    assert prepared.report.leakage == {}


# Mixing, duplicates, personal data


def test_weights_decide_the_shares(tmp_path: Path) -> None:
    specs = [write(tmp_path / "task.jsonl", many(30, "task")), write(tmp_path / "general.jsonl", many(30, "general"))]
    prepared = run(tmp_path, specs, weights=(0.75, 0.25))
    sources = prepared.train.sources.tolist()
    assert sources.count(0) == 3 * sources.count(1)
    assert any("general.jsonl" in note and "left out" in note for note in prepared.report.notes)


def test_duplicates_are_counted_and_removed_when_asked(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", [*many(10), *many(10)])
    counted, removed = run(tmp_path, [spec]), run(tmp_path, [spec], deduplicate="exact")
    assert (len(counted.train), len(removed.train)) == (20, 10)
    assert counted.report.duplicates["num_exact_duplicates"] == 10
    assert removed.report.num_duplicates_removed == 10
    assert "duplicates" in [finding.code for finding in counted.report.findings]
    assert "duplicates" not in [finding.code for finding in removed.report.findings]


def test_personal_data_is_reported_or_masked(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", [chat("my mail is anna.rossi@example.org", "thanks"), chat("b", "c")])
    reported, masked = run(tmp_path, [spec]), run(tmp_path, [spec], mask_pii=True)
    assert reported.report.pii["email"] == 1
    assert "personal-data" in [finding.code for finding in reported.report.findings]
    assert "anna.rossi" in "".join(texts(reported))
    assert "anna.rossi" not in "".join(texts(masked))
    assert "replaced by placeholders: 1 × email" in " ".join(masked.report.notes)


def test_conflicting_answers_are_reported_with_their_places(tmp_path: Path) -> None:
    prepared = run(tmp_path, [write(tmp_path / "a.jsonl", [chat("same", "yes"), chat("same", "no")])])
    assert prepared.report.duplicates["num_conflicts"] == 1
    assert [place.rpartition("/")[2] for place in prepared.report.duplicates["conflicts"][0]["records"]] == [
        "a.jsonl:1",
        "a.jsonl:2",
    ]


# What is left out, and why


def test_records_that_cannot_be_rendered_end_the_run_together(tmp_path: Path) -> None:
    records = [chat("<|im_end|>", "a"), chat("fine", "b"), chat("c", "<|im_start|>")]
    with pytest.raises(AffinaErrors) as caught:
        run(tmp_path, [write(tmp_path / "a.jsonl", records)])
    assert "a.jsonl:1" in str(caught.value)
    assert "a.jsonl:3" in str(caught.value)


def test_records_that_cannot_be_rendered_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    records = [chat("<|im_end|>", "a"), chat("fine", "b")]
    prepared = run(tmp_path, [write(tmp_path / "a.jsonl", records)], on_error="skip")
    assert len(prepared.train) == 1
    assert prepared.report.num_records_skipped == 1
    (problem,) = prepared.report.problems["listed"]
    assert (problem["code"], problem["line"]) == ("control-token-in-content", 1)
    assert problem["fix"]


def test_all_labels_masked_is_an_error_that_says_why(tmp_path: Path) -> None:
    record = chat("q", "a")
    record["messages"][1]["train"] = False  # type: ignore[index]
    with pytest.raises(DataError) as caught:
        run(tmp_path, [write(tmp_path / "a.jsonl", [record])], on_error="skip")
    assert caught.value.code in ("all-labels-masked", "bad-records", "nothing-trained")


def test_the_last_reply_without_training_leaves_nothing_for_mask_last(tmp_path: Path) -> None:
    messages = [*chat("q", "a")["messages"], *chat("q", "b")["messages"]]  # type: ignore[misc]
    messages[3]["train"] = False
    with pytest.raises(DataError, match="no sample has a token to train on") as caught:
        run(
            tmp_path,
            [write(tmp_path / "a.jsonl", [{"messages": messages}])],
            encode=EncodeSettings(max_length=256, mask="last"),
        )
    assert caught.value.code == "all-labels-masked"
    assert "1 samples have no trained token with data.mask: last" in str(caught.value)


def test_all_too_long_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="longer than data") as caught:
        run(tmp_path, [write(tmp_path / "a.jsonl", many(3))], encode=EncodeSettings(max_length=8))
    assert caught.value.code == "all-too-long"


def test_what_truncation_does_is_in_the_report(tmp_path: Path) -> None:
    records = [*many(9), chat("q", "long " * 300)]
    dropped = run(tmp_path, [write(tmp_path / "a.jsonl", records)])
    assert dropped.report.counts["dropped_too_long"] == 1
    assert "1 samples (10.0%) are longer than 256 tokens" in dropped.report.findings[0].what
    cut = run(
        tmp_path, [write(tmp_path / "a.jsonl", records)], encode=EncodeSettings(max_length=256, truncation="truncate")
    )
    assert cut.report.counts["lost_end_of_turn"] == 1
    assert "lost-end-of-turn" in [finding.code for finding in cut.report.findings]


def test_replies_unlike_serving_are_a_finding_that_empty_masked_resolves(tmp_path: Path) -> None:
    record = {"messages": [*chat("q", "a")["messages"], *chat("r", "b")["messages"]]}  # type: ignore[misc]
    spec = write(tmp_path / "a.jsonl", [record])
    kept = run(tmp_path, [spec])
    assert kept.report.counts["prefix_mismatches"] == 1
    assert "unlike-serving" in [finding.code for finding in kept.report.findings]
    served = run(tmp_path, [spec], encode=EncodeSettings(max_length=256, thinking="empty-masked"))
    assert len(served.train) == 2
    assert "prefix_mismatches" not in served.report.counts


def test_prompts_are_served_as_the_template_laid_them_out(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", many(4))
    assert run(tmp_path, [spec]).enable_thinking is False  # an empty block on the last turn: thinking was off
    # The same template without that block: then the plain prompt, that of thinking on, is what was trained.
    no_block = THINKING.replace("(loop.last or m.reasoning_content)", "m.reasoning_content")
    plain = run(tmp_path, [spec], tokenizer=describe_tokenizer(build_hf(no_block), name="no-block"))
    assert plain.enable_thinking is True
    assert "prefix_mismatches" not in plain.report.counts
    assert run(tmp_path, [spec], kind="gemma").enable_thinking is None


def test_plain_text_needs_no_template(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", [{"text": "the answer is here"}])
    prepared = run(tmp_path, [spec], kind=None)
    assert len(prepared.train) == 1
    assert prepared.report.train.num_supervised == prepared.report.train.num_tokens - 1


# The report


def test_the_report_survives_json(tmp_path: Path) -> None:
    report = run(tmp_path, [write(tmp_path / "a.jsonl", many(40))], validation_fraction=0.2).report
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.to_dict()["train"]["supervised_share"] == pytest.approx(report.train.supervised_share)


# Config


def test_the_config_becomes_plain_arguments() -> None:
    config = RunConfig(
        data=DataConfig(
            train=(SourceConfig(path="a.jsonl", weight=2.0, columns=ColumnsConfig(prompt="q")), SourceConfig(path="b")),
            max_length=77,
            thinking="strip",
            seed=5,
        ),
        training=TrainingConfig(seed=9),
    )
    settings = prepare_settings(config)
    assert settings.encode == EncodeSettings(max_length=77, thinking="strip")
    assert (settings.weights, settings.seed) == ((2.0, None), 5)
    assert source_spec(config.data.train[0]).columns.prompt == "q"


# Streaming


def stream_of(tmp_path: Path, count: int = 60, **options: object):  # type: ignore[no-untyped-def]
    spec = write(tmp_path / "a.jsonl", many(count))
    defaults: dict[str, object] = {"validation_fraction": 0.2}
    settings = PrepareSettings(EncodeSettings(max_length=256), **{**defaults, **options})  # type: ignore[arg-type]
    return stream([spec], tokenizer=build_tokenizer("thinking"), settings=settings)


def test_a_stream_holds_validation_records_out_by_their_content(tmp_path: Path) -> None:
    data = stream_of(tmp_path)
    held_out = {conversation.origin for conversation in data.validation_conversations}
    assert 0 < len(held_out) < 30
    assert len(data.validation) == len(held_out)
    pairs = list(itertools.islice(data.open(), 60))
    assert [number for number, _ in pairs] == list(range(1, 61))
    empty = {number for number, samples in pairs if not samples}
    assert {int(origin.rpartition(":")[2]) for origin in held_out} == empty
    assert all(is_held_out(conversation, 0.2) for conversation in data.validation_conversations)


def test_a_stream_starts_anew_at_its_end_and_resumes_in_any_pass(tmp_path: Path) -> None:
    data = stream_of(tmp_path, 20, validation_fraction=0.0)

    def ids(skip: int, count: int) -> list[list[int]]:
        pairs = itertools.islice(data.open(skip), count)
        return [sample.input_ids.tolist() for _, samples in pairs for sample in samples]

    twice = ids(0, 40)
    assert twice[:20] == twice[20:]
    assert ids(25, 10) == twice[25:35]


def test_a_stream_trains_in_steps_and_continues_from_its_state(tmp_path: Path) -> None:
    data = stream_of(tmp_path, 50, validation_fraction=0.0)
    options = {
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "packing": True,
        "seed": 3,
        "window_samples": 15,
    }

    def take(batches, count: int) -> list[list[list[list[int]]]]:  # type: ignore[no-untyped-def]
        return [
            [[sample.input_ids.tolist() for sample in row] for row in step] for step in itertools.islice(batches, count)
        ]

    whole = take(data.batches(**options), 12)
    first = data.batches(**options)
    take(first, 5)
    assert take(data.batches(**options, state=first.state), 7) == whole[5:]


def test_a_stream_that_never_gives_a_sample_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("affina.data.streaming.RECORDS_WITHOUT_SAMPLE", 50)
    spec = write(tmp_path / "a.jsonl", many(3))
    settings = PrepareSettings(EncodeSettings(max_length=8), validation_fraction=0.0)
    data = stream([spec], tokenizer=build_tokenizer("gemma"), settings=settings)
    with pytest.raises(DataError, match="nothing to train on"):
        next(item for item in data.open() if item[1])


@pytest.mark.parametrize("weights", [(), (1.0, 1.0)])
def test_a_stream_whose_records_are_all_left_out_comes_to_an_end(tmp_path: Path, weights: tuple[float, ...]) -> None:
    specs = [
        write(tmp_path / name, [{"messages": [{"role": "user", "content": "no reply"}]}])
        for name in ("a.jsonl", "b.jsonl")
    ]
    settings = PrepareSettings(EncodeSettings(max_length=64), weights=weights, on_error="skip", validation_fraction=0.0)
    data = stream(specs, tokenizer=build_tokenizer("gemma"), settings=settings)
    if weights:
        with pytest.raises(DataError, match="empty-source"):
            next(data.open())
    else:
        assert list(data.open()) == []


# Memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """Five times the text may not cost more than the hashes and signatures of its records."""
    script = tmp_path / "measure.py"
    script.write_text(
        "import json, resource, sys\n"
        "from pathlib import Path\n"
        "from tests.data.test_prepare import run\n"
        "from affina.data.encoding import EncodeSettings\n"
        "from affina.data.validation import SourceSpec\n"
        "folder, count = Path(sys.argv[1]), int(sys.argv[2])\n"
        "with open(folder / f'{count}.jsonl', 'w') as file:\n"
        "    for n in range(count):\n"
        "        file.write(json.dumps({'text': f'{n} ' + ' answer' * 600}) + '\\n')\n"
        "run(folder / str(count), [SourceSpec(folder / f'{count}.jsonl')], kind=None, encode=EncodeSettings(4096))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )
    peaks = []
    for count in (600, 3000):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        result = subprocess.run(
            [sys.executable, str(script), str(tmp_path), str(count)], capture_output=True, env=environment, check=True
        )
        peaks.append(int(result.stdout))
    # 2,400 more records are 10 MB of text and 6 MB of tokens, which would be several times that as Python objects.
    # About 1 kB of each record stays (2.4 MB); the rest of the margin is what an allocator keeps.
    assert peaks[1] - peaks[0] < 6_000_000
