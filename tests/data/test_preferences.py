"""Records of preferences: what is found, what becomes of it, and what is said when it is something else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.tiny_tokenizers import build_tokenizer

from affina.config.objectives import Records
from affina.data.collate import collate
from affina.data.conversations import conversation_from_dict, conversation_to_dict
from affina.data.encoding import Encoder, EncodeSettings
from affina.data.formats import Columns, Format
from affina.data.messages import Conversation, Message
from affina.data.pii import count_pii, mask_conversation
from affina.data.preference_formats import detect_records, unread_label
from affina.data.preferences import to_conversations
from affina.data.prepare import PrepareSettings, prepare
from affina.data.quality import conversation_hash
from affina.data.records import RawRecord
from affina.data.samples import IGNORED_LABEL
from affina.data.store import ArrowSampleStore, StoreWriter
from affina.data.streaming import stream
from affina.data.validation import SourceSpec, read_conversations
from affina.errors import AffinaErrors, DataError, Location

Record = dict[str, Any]


def convert(
    record: Record, wanted: Records = "pairs", *, format: Format | str = "auto", **columns: str
) -> list[Conversation]:
    mapping = Columns(**columns)
    detected = detect_records([record], wanted=wanted, format=format, columns=mapping)  # type: ignore[arg-type]
    return to_conversations(RawRecord(record, Location("x.jsonl", 7), 0), detected, wanted=wanted)


def turns(messages: tuple[Message, ...]) -> list[tuple[str, str, bool]]:
    return [(message.role, message.content, message.train) for message in messages]


def user(content: str) -> Record:
    return {"role": "user", "content": content}


def reply(content: str) -> Record:
    return {"role": "assistant", "content": content}


CHOSEN = [("user", "q", True), ("assistant", "good", True)]
REJECTED = [("user", "q", True), ("assistant", "bad", True)]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"question": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [user("q")], "chosen": [reply("good")], "rejected": [reply("bad")]},
        {"prompt": "q", "chosen": [user("q"), reply("good")], "rejected": [user("q"), reply("bad")]},
        {"chosen": [user("q"), reply("good")], "rejected": [user("q"), reply("bad")]},
        {"chosen_messages": [user("q"), reply("good")], "rejected_messages": [user("q"), reply("bad")]},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {"prompt": "q", "responses": ["bad", "good"], "ranks": [2, 1]},
        {"prompt": "q", "responses": ["bad", "good"], "scores": [0.1, 0.9]},
        {"prompt": "q", "completions": [{"response": "bad", "score": 1}, {"response": "good", "score": 5}]},
        {"prompt": "q", "answers": '["bad", "good"]', "ranks": [1, 0]},
        {
            "prompt": {
                "role": "prompter",
                "text": "q",
                "replies": [
                    {"role": "assistant", "text": "bad", "rank": 1, "replies": []},
                    {"role": "assistant", "text": "good", "rank": 0, "replies": []},
                ],
            }
        },
    ],
    ids=lambda record: "+".join(record)[:40],
)
def test_a_pair_is_found_however_it_is_written(record: Record) -> None:
    columns = {"replies": "answers"} if "answers" in record else {}
    (found,) = convert(record, **columns)
    assert turns(found.messages) == CHOSEN
    assert [turns(other) for other in found.rejected] == [REJECTED]
    assert found.origin == "x.jsonl:7"


def test_replies_in_the_prompt_are_context() -> None:
    shared = [user("a"), reply("b"), user("c")]
    (found,) = convert({"chosen": [*shared, reply("good")], "rejected": [*shared, reply("bad")]})
    for messages in (found.messages, *found.rejected):
        assert [message.train for message in messages if message.role == "assistant"] == [False, True]


def test_system_history_and_input_are_part_of_the_prompt() -> None:
    record = {
        "instruction": "q",
        "input": "more",
        "system": "s",
        "history": [["a", "b"]],
        "chosen": "x",
        "rejected": "y",
    }
    (found,) = convert(record)
    expected = [("system", "s", True), ("user", "a", True), ("assistant", "b", False), ("user", "q\n\nmore", True)]
    assert turns(found.messages) == [*expected, ("assistant", "x", True)]
    assert turns(found.rejected[0]) == [*expected, ("assistant", "y", True)]


def test_the_best_of_a_ranking_is_preferred_to_each_that_is_worse_and_ties_say_nothing() -> None:
    (found,) = convert({"prompt": "q", "responses": ["a", "b", "c", "d"], "scores": [3, 5, 5, 1]})
    assert found.messages[-1].content == "b"
    assert [other[-1].content for other in found.rejected] == ["a", "d"]
    assert convert({"prompt": "q", "responses": ["a", "b"], "scores": [2, 2]}) == []


def test_a_tree_gives_a_preference_at_each_of_its_questions() -> None:
    below = {
        "role": "prompter",
        "text": "and then?",
        "replies": [
            {"role": "assistant", "text": "worst", "rank": 5, "replies": []},
            {"role": "assistant", "text": "best", "rank": 0, "replies": []},
            {"role": "assistant", "text": "unranked", "rank": None, "replies": []},
        ],
    }
    first = {"role": "assistant", "text": "hello", "rank": 0, "replies": [below]}
    second = {"role": "assistant", "text": "go away", "rank": 1, "replies": []}
    found = convert({"message_tree_id": "t", "prompt": {"role": "prompter", "text": "hi", "replies": [first, second]}})
    assert [entry.messages[-1].content for entry in found] == ["hello", "best"]
    assert turns(found[1].messages)[:2] == [("user", "hi", True), ("assistant", "hello", False)]
    assert {entry.group for entry in found} == {"t"}


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "desirable", "Good"])
def test_a_label_says_whether_the_last_reply_is_wanted(value: object) -> None:
    messages = [user("a"), reply("b"), user("c"), reply("d")]
    (found,) = convert({"messages": messages, "label": value}, "labels")
    assert found.desirable is True
    assert [message.train for message in found.messages if message.role == "assistant"] == [False, True]
    (other,) = convert({"prompt": "q", "completion": "a", "kto_tag": "false"}, "labels")
    assert other.desirable is False


def test_pairs_serve_as_labels() -> None:
    found = convert({"prompt": "q", "chosen": "good", "rejected": "bad"}, "labels")
    assert [(entry.messages[-1].content, entry.desirable, entry.rejected) for entry in found] == [
        ("good", True, ()),
        ("bad", False, ()),
    ]


PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("record", "wanted", "code", "what", "fix"),
    [
        (PAIR | {"rejected": "good"}, "pairs", "pair-without-difference", "are the same", "remove the record"),
        (
            {"chosen": [user("q"), reply("a")], "rejected": [user("other"), reply("b")]},
            "pairs", "pair-prompts-differ", "part at message 1", "the same prompt",
        ),
        (
            {"chosen": [user("q"), reply("a")], "rejected": [user("q"), reply("a"), user("r"), reply("b")]},
            "pairs", "pair-prompts-differ", "part at message 3", "only replies may differ",
        ),
        ({"chosen": "a", "rejected": "b"}, "pairs", "missing-prompt", "no prompt", "columns: {prompt: …}"),
        ({"messages": [user("q"), reply("a")]}, "pairs", "no-pairs", "wants pairs", "training.objective: sft"),
        (
            {"messages": [user("q"), reply("a")], "label": True},
            "pairs", "no-pairs", "wants pairs", '"label" looks like a label of single replies',
        ),
        ({"prompt": "q", "completion": "a"}, "labels", "no-labels", "no column of prompt, completion", "sft"),
        ({"prompt": "q", "completion": "a", "label": "maybe"}, "labels", "bad-label", '"label" is', "write true"),
        ({"prompt": "q", "responses": ["a"], "ranks": [1]}, "pairs", "bad-ranking", '"responses" holds', "two or more"),
        (
            {"prompt": "q", "responses": ["a", "b"], "ranks": [1]},
            "pairs", "bad-ranking", "for 2 replies", "one number for each",
        ),
        ({"prompt": "q", "responses": ["a", {"x": 1}], "ranks": [1, 2]}, "pairs", "bad-ranking", "no text", "text"),
        ({"prompt": "q", "responses": ["a", 7], "ranks": [1, 2]}, "pairs", "bad-ranking", "is 7", "as a string"),
        ({"prompt": "q", "responses": ["a", "b"]}, "pairs", "no-ranks", "nothing says which is better", "columns:"),
        (
            {"prompt": {"role": "robot", "text": "q", "replies": []}},
            "pairs", "bad-tree", "the role 'robot'", '"prompter" or "assistant"',
        ),
        (PAIR, "replies", "preference-data", "preference pairs", "training.objective: dpo"),
        ({"messages": [user("q"), reply("a")]}, "texts", "text-wanted", "learns from plain text", "sft"),
        ({"body": "long text here"}, "texts", "text-wanted", "learns from plain text", "columns: {text: body}"),
    ],
)  # fmt: skip
def test_records_of_another_kind_are_told_what_works(
    record: Record, wanted: Records, code: str, what: str, fix: str
) -> None:
    columns = {"bad-label": {"label": "label"}, "no-ranks": {"replies": "responses"}}.get(code, {})
    with pytest.raises(DataError) as caught:
        convert(record, wanted, **columns)
    assert caught.value.code == code
    assert what in caught.value.what
    assert fix in str(caught.value.fix)


def test_a_record_without_its_rejected_reply_is_told_by_its_line() -> None:
    detected = detect_records([PAIR], wanted="pairs")
    record = RawRecord(PAIR | {"rejected": None}, Location("x.jsonl", 7), 0)
    with pytest.raises(DataError, match="missing-value") as caught:
        to_conversations(record, detected, wanted="pairs")
    assert str(caught.value.where) == "x.jsonl:7"


def test_a_named_format_that_the_objective_does_not_read_is_refused() -> None:
    with pytest.raises(DataError, match="preference-data"):
        convert(PAIR, "replies", format="preference")
    with pytest.raises(DataError, match="missing-column"):
        convert({"prompt": "q", "chosen": "a"}, "pairs", format="preference")
    with pytest.raises(DataError, match="missing-column"):
        convert({"responses": ["a", "b"], "ranks": [1, 2]}, "pairs", format="ranking")


def write(path: Path, records: list[Record]) -> SourceSpec:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return SourceSpec(path)


def test_faults_of_rejected_replies_are_found_with_file_and_line(tmp_path: Path) -> None:
    records = [PAIR, PAIR | {"rejected": "  "}, PAIR | {"chosen": "good\x00"}, PAIR | {"chosen": "bad"}]
    spec = write(tmp_path / "pairs.jsonl", records)
    with pytest.raises(AffinaErrors) as caught:
        list(read_conversations([spec], wanted="pairs"))
    found = {(error.code, str(error.where)): error.what for error in caught.value.errors}
    path = tmp_path / "pairs.jsonl"
    assert "in the rejected conversation" in found["empty-reply", f"{path}:2"]
    assert "in the rejected" not in found["null-character", f"{path}:3"]
    assert ("pair-without-difference", f"{path}:4") in found


def test_a_faulty_tree_counts_as_one_skipped_record_and_one_without_preference_as_a_warning(tmp_path: Path) -> None:
    faulty = [{"role": "assistant", "text": text, "rank": rank, "replies": []} for rank, text in enumerate("  x")]
    again = {"role": "prompter", "text": "more", "replies": faulty}
    faulty[2]["replies"] = [again | {"replies": [dict(child) | {"replies": []} for child in faulty]}]
    trees = [{"prompt": {"role": "prompter", "text": "q", "replies": faulty}}]
    trees.append({"prompt": {"role": "prompter", "text": "q", "replies": []}})
    found = read_conversations([write(tmp_path / "trees.jsonl", trees)], on_error="skip", wanted="pairs")
    assert list(found) == []
    assert (found.problems.num_skipped, found.sources[0].num_skipped) == (1, 1)
    assert found.problems.counts["no-preference", "warning"] == 1


def test_turns_after_the_last_reply_are_cut_from_both_conversations(tmp_path: Path) -> None:
    record = {
        "chosen": [user("q"), reply("good"), user("thanks")],
        "rejected": [user("q"), reply("bad"), user("hm")],
    }
    (found,) = read_conversations([write(tmp_path / "p.jsonl", [record])], on_error="skip", wanted="pairs")
    assert turns(found.messages) == CHOSEN
    assert turns(found.rejected[0]) == REJECTED


def test_a_prompt_that_the_assistant_opens_is_context(tmp_path: Path) -> None:
    record = {"prompt": [reply("welcome"), user("q")], "chosen": "good", "rejected": "bad"}
    (found,) = read_conversations([write(tmp_path / "p.jsonl", [record])], wanted="pairs")
    assert [message.train for message in found.messages] == [False, True, True]
    with pytest.raises(AffinaErrors, match="comes before any user message"):
        list(
            read_conversations([write(tmp_path / "s.jsonl", [{"messages": [reply("welcome"), user("q"), reply("a")]}])])
        )


def test_supervised_training_on_labelled_replies_says_that_the_label_is_not_read(tmp_path: Path) -> None:
    records = [{"prompt": f"q {n}", "completion": f"a {n}", "label": n % 3 != 0} for n in range(12)]
    prepared = prepare(
        [write(tmp_path / "k.jsonl", records)],
        tokenizer=build_tokenizer("thinking"),
        settings=settings_for("replies"),
        cache_directory=tmp_path / "cache",
    )
    (finding,) = [finding for finding in prepared.report.findings if finding.code == "label-not-read"]
    assert "all of them are trained" in finding.what
    assert "training.objective: kto" in str(finding.fix)
    wanted = [record | {"label": True} for record in records]
    assert unread_label(wanted) is None
    assert unread_label([{"label": "positive"}, {"label": "negative"}]) is None


def test_several_replies_to_one_prompt_are_no_conflict_among_preferences(tmp_path: Path) -> None:
    records = [{"prompt": "the same question for all", "completion": f"a {n}", "label": n % 2 == 0} for n in range(8)]
    records += [{"prompt": f"q {n}", "completion": f"a {n}", "label": n % 2 == 0} for n in range(8)]
    codes = {}
    for kind in ("labels", "replies"):
        prepared = prepare(
            [write(tmp_path / "k.jsonl", records)],
            tokenizer=build_tokenizer("thinking"),
            settings=settings_for(kind),  # type: ignore[arg-type]
            cache_directory=tmp_path / "cache",
        )
        codes[kind] = {finding.code for finding in prepared.report.findings}
    assert "conflicting-answers" in codes["replies"]
    assert "conflicting-answers" not in codes["labels"]


# Everything that knows conversations knows the rejected ones


PREFERENCE = Conversation(
    messages=(Message("user", "mail a@b.org"), Message("assistant", "good")),
    rejected=((Message("user", "mail a@b.org"), Message("assistant", "write to c@d.org")),),
    desirable=True,
    origin="x:1",
)


def test_a_preference_survives_the_disk() -> None:
    assert conversation_from_dict(json.loads(json.dumps(conversation_to_dict(PREFERENCE)))) == PREFERENCE


def test_personal_data_of_rejected_replies_is_counted_and_masked() -> None:
    assert count_pii(PREFERENCE)["email"] == 2
    masked = mask_conversation(PREFERENCE)
    assert masked.rejected[0][-1].content == "write to [EMAIL]"
    assert masked.rejected[0][0] == masked.messages[0]


def test_the_rejected_reply_and_the_label_are_part_of_a_records_identity() -> None:
    from dataclasses import replace

    hashes = {
        conversation_hash(PREFERENCE),
        conversation_hash(replace(PREFERENCE, rejected=())),
        conversation_hash(replace(PREFERENCE, desirable=False)),
        conversation_hash(replace(PREFERENCE, desirable=None)),
    }
    assert len(hashes) == 4


# Samples


@pytest.mark.parametrize("kind", ["thinking", "gemma", "instruct"])
def test_masks_of_a_pair_are_those_of_its_two_conversations(kind: str) -> None:
    """The template's own ids, and trained exactly where the same conversation alone would be."""
    from dataclasses import replace

    tokenizer = build_tokenizer(kind)
    encoder = Encoder(tokenizer, EncodeSettings(max_length=512))
    (pair,) = convert({"prompt": "what is it", "chosen": "a good reply", "rejected": "bad"})
    (encoded,) = encoder.encode_record(pair).samples
    chosen, rejected = encoded.sample.split()
    for document, messages in ((chosen, pair.messages), (rejected, pair.rejected[0])):
        (alone,) = encoder.encode_record(replace(pair, messages=messages, rejected=())).samples
        assert np.array_equal(document.input_ids, alone.sample.input_ids)
        assert np.array_equal(document.labels, alone.sample.labels)
        assert document.num_supervised > 0
    assert encoded.sample.documents == (len(chosen), len(rejected))
    assert all(int(encoded.sample.input_ids[end]) in tokenizer.end_of_turn_ids for end in encoded.reply_ends)


def test_a_pair_is_one_sample_of_two_documents_in_a_row() -> None:
    encoder = Encoder(build_tokenizer("thinking"), EncodeSettings(max_length=512))
    (pair,) = convert({"prompt": "what is it", "chosen": "a good reply", "rejected": "bad"})
    (encoded,) = encoder.encode_record(pair).samples
    sample = encoded.sample
    batch = collate([sample, sample], num_tokens=256, pad_token_id=0)
    first, second = sample.documents
    assert batch.lengths == (first, second, first, second, 256 - 2 * len(sample))
    assert batch.num_examples == 2
    assert batch.position_ids[first].item() == 0, "positions restart in the rejected text"
    assert sum(batch.supervised_lengths) == batch.num_supervised == 2 * sample.num_supervised
    assert batch.supervised_lengths[-1] == 0
    for start in batch.cu_seqlens[:-1].tolist():
        assert batch.labels[start].item() == IGNORED_LABEL


def test_a_pair_that_is_too_long_is_left_out_whole_and_counted() -> None:
    (pair,) = convert({"prompt": "what is it", "chosen": "good " * 30, "rejected": "bad"})
    settings = EncodeSettings(max_length=40)
    found = Encoder(build_tokenizer("thinking"), settings).encode_record(pair)
    assert found.samples == ()
    assert found.counts["dropped_too_long"] == 1
    strict = Encoder(build_tokenizer("thinking"), EncodeSettings(max_length=40, truncation="raise"))
    error = strict.encode_record(pair).error
    assert error is not None
    assert error.code == "sample-too-long"
    assert "a pair has" in error.what
    assert str(error.where) == "x.jsonl:7"


def test_a_pair_whose_replies_would_be_several_texts_is_refused() -> None:
    shared = [user("a")]
    record = {
        "chosen": [*shared, reply("b"), user("c"), reply("d")],
        "rejected": [*shared, reply("x"), user("c"), reply("y")],
    }
    (pair,) = convert(record)
    settings = EncodeSettings(max_length=512, thinking="empty-masked")
    error = Encoder(build_tokenizer("thinking"), settings).encode_record(pair).error
    assert error is not None
    assert error.code == "pair-not-one-text"
    assert "data.thinking: strip" in str(error.fix)


def test_the_store_keeps_documents_and_labels(tmp_path: Path) -> None:
    encoder = Encoder(build_tokenizer("thinking"), EncodeSettings(max_length=512))
    (pair,) = convert(PAIR)
    (single,) = convert({"prompt": "q", "completion": "a", "label": False}, "labels")
    samples = [encoder.encode_record(entry).samples[0].sample for entry in (pair, single)]
    with StoreWriter(tmp_path / "s.arrow", fingerprint="f") as writer:
        for sample in samples:
            writer.add(sample)
    store = ArrowSampleStore(tmp_path / "s.arrow")
    assert store[0].documents == samples[0].documents
    assert (store[0].desirable, store[1].desirable) == (None, False)
    assert store[1].documents == ()
    assert np.array_equal(store[0].labels, samples[0].labels)


def settings_for(wanted: Records, **changes: Any) -> PrepareSettings:
    return PrepareSettings(encode=EncodeSettings(max_length=256), wanted=wanted, validation_fraction=0.2, **changes)


def test_preparation_counts_what_it_found_and_validation_keeps_the_pairs(tmp_path: Path) -> None:
    records = [
        {"prompt": f"question {n}", "chosen": f"good answer {n} " * 4, "rejected": f"bad {n}"} for n in range(20)
    ]
    prepared = prepare(
        [write(tmp_path / "p.jsonl", records)],
        tokenizer=build_tokenizer("thinking"),
        settings=settings_for("pairs"),
        cache_directory=tmp_path / "cache",
    )
    assert prepared.report.counts["pairs"] == len(prepared.train) == 16
    assert len(prepared.validation) == 4
    assert all(len(prepared.train[index].documents) == 2 for index in range(16))
    assert all(len(conversation.rejected) == 1 for conversation in prepared.validation_conversations)
    findings = {finding.code: finding for finding in prepared.report.findings}
    assert "times as long" in findings["chosen-longer"].what


def test_labels_that_are_far_from_even_are_said(tmp_path: Path) -> None:
    records = [{"prompt": f"q {n}", "completion": f"a {n}", "label": n % 20 != 0} for n in range(60)]
    prepared = prepare(
        [write(tmp_path / "k.jsonl", records)],
        tokenizer=build_tokenizer("thinking"),
        settings=settings_for("labels"),
        cache_directory=tmp_path / "cache",
    )
    counts = Counter(prepared.train[index].desirable for index in range(len(prepared.train)))
    assert counts == {True: prepared.report.counts["desirable"], False: prepared.report.counts["undesirable"]}
    (finding,) = [finding for finding in prepared.report.findings if finding.code == "labels-unbalanced"]
    assert "training.preference.undesirable_weight: " in str(finding.fix)


def test_pairs_stream_as_they_are_prepared(tmp_path: Path) -> None:
    records = [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(6)]
    spec = write(tmp_path / "p.jsonl", records)
    data = stream(
        [spec],
        tokenizer=build_tokenizer("thinking"),
        settings=PrepareSettings(encode=EncodeSettings(max_length=256), wanted="pairs", validation_fraction=0.0),
    )
    opened = data.open()
    samples = [sample for _, found in (next(opened) for _ in range(6)) for sample in found]
    assert [len(sample.documents) for sample in samples] == [2] * 6


def test_pairs_that_are_all_too_long_are_told_what_helps(tmp_path: Path) -> None:
    records = [{"prompt": f"q {n}", "chosen": "good " * 300, "rejected": f"bad {n}"} for n in range(6)]
    with pytest.raises(DataError, match="all-too-long") as caught:
        prepare(
            [write(tmp_path / "p.jsonl", records)],
            tokenizer=build_tokenizer("thinking"),
            settings=settings_for("pairs"),
            cache_directory=tmp_path / "cache",
        )
    assert "pairs (chosen and rejected together)" in caught.value.what
    assert caught.value.fix == "raise data.max_length"


# Real data


@pytest.mark.parametrize(
    ("name", "wanted", "format", "num_records", "num_conversations", "num_rejected", "skipped"),
    [
        ("llamafactory_demos/dpo_en_demo.json.gz", "pairs", "preference", 300, 300, 300, 0),
        ("llamafactory_demos/dpo_zh_demo.json.gz", "pairs", "preference", 300, 300, 300, 0),
        ("llamafactory_demos/v1_dpo_demo.jsonl", "pairs", "preference", 10, 10, 10, 0),
        ("oasst_en100/en_100_tree.jsonl.gz", "pairs", "tree", 100, 212, 429, 0),
        ("oasst_en100/en_100_message.jsonl.gz", "pairs", "tree", 100, 212, 429, 0),
        ("llamafactory_demos/kto_en_demo.json.gz", "labels", "labelled", 300, 300, 0, 0),
        ("llamafactory_demos/dpo_en_demo.json.gz", "labels", "preference", 300, 600, 0, 0),
        # 52 contexts hold a call of a function without a name
        ("taskmaster4/reward.jsonl.gz", "labels", "labelled", 3228, 3176, 0, 52),
    ],
)
def test_real_preferences_are_read_without_a_mapping(
    real_data_folder: Callable[[str], Path],
    name: str,
    wanted: Records,
    format: str,
    num_records: int,
    num_conversations: int,
    num_rejected: int,
    skipped: int,
) -> None:
    folder, _, rest = name.partition("/")
    found = read_conversations([SourceSpec(real_data_folder(folder) / rest)], on_error="skip", wanted=wanted)
    conversations = list(found)
    assert found.sources[0].num_read == num_records
    assert len(conversations) == num_conversations
    assert sum(len(conversation.rejected) for conversation in conversations) == num_rejected
    assert found.problems.num_skipped == skipped
    assert found.sources[0].formats[0].startswith(f"{format}: ")
    if wanted == "labels":
        assert {conversation.desirable for conversation in conversations} == {True, False}


def test_real_pairs_are_encoded_with_a_real_template(
    real_data_folder: Callable[[str], Path], qwen3_tokenizer_folder: Path
) -> None:
    from affina.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(qwen3_tokenizer_folder))
    encoder = Encoder(tokenizer, EncodeSettings(max_length=8192))
    spec = SourceSpec(real_data_folder("llamafactory_demos") / "dpo_en_demo.json.gz", max_records=40)
    for conversation in read_conversations([spec], wanted="pairs"):
        result = encoder.encode_record(conversation)
        assert result.error is None
        (encoded,) = result.samples
        chosen, rejected = encoded.sample.split()
        prompt = next(i for i in range(len(chosen)) if chosen.labels[i] != IGNORED_LABEL)
        assert np.array_equal(chosen.input_ids[:prompt], rejected.input_ids[:prompt])
        for document, messages in ((chosen, conversation.messages), (rejected, conversation.rejected[0])):
            trained = document.input_ids[document.labels != IGNORED_LABEL].tolist()
            assert tokenizer.hf.decode(trained).endswith("<|im_end|>")
            assert tokenizer.hf.decode(trained, skip_special_tokens=True).strip().endswith(messages[-1].content.strip())
