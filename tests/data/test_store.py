"""Samples and conversations on disk come back as they were, and a damaged file says so."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.data.conversations import (
    ConversationStore,
    ConversationWriter,
    conversation_from_dict,
    conversation_to_dict,
)
from affina.data.messages import Conversation, Message, ToolCall
from affina.data.samples import IGNORED_LABEL, Sample
from affina.data.store import ROWS_PER_BATCH, ArrowSampleStore, MemorySampleStore, StoreWriter
from affina.errors import DataError


def random_samples(count: int) -> list[Sample]:
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(count):
        ids = generator.integers(0, 150_000, generator.integers(1, 40)).astype(np.int32)
        labels = np.where(generator.random(len(ids)) < 0.5, ids, np.int32(IGNORED_LABEL))
        labels[0] = IGNORED_LABEL
        samples.append(Sample(ids, labels))
    return samples


def write(path: Path, samples: list[Sample]) -> ArrowSampleStore:
    with StoreWriter(path, fingerprint="abc") as writer:
        for number, sample in enumerate(samples):
            writer.add(sample, origin=f"x.jsonl:{number}", source=number % 3)
    return ArrowSampleStore(path)


@pytest.mark.parametrize("count", [0, 1, ROWS_PER_BATCH, ROWS_PER_BATCH * 2 + 7])
def test_what_is_written_is_read(tmp_path: Path, count: int) -> None:
    samples = random_samples(count)
    store = write(tmp_path / "s.arrow", samples)
    assert len(store) == count
    assert store.fingerprint == "abc"
    assert store.lengths.tolist() == [len(sample) for sample in samples]
    assert store.num_supervised.tolist() == [sample.num_supervised for sample in samples]
    assert store.sources.tolist() == [number % 3 for number in range(count)]
    for number, (written, read) in enumerate(zip(samples, store.take(range(count)), strict=True)):
        assert read.input_ids.dtype == read.labels.dtype == np.int32
        assert read.input_ids.tolist() == written.input_ids.tolist()
        assert read.labels.tolist() == written.labels.tolist()
        assert store.origin(number) == f"x.jsonl:{number}"


def test_a_store_can_be_sent_to_another_process(tmp_path: Path) -> None:
    store = write(tmp_path / "s.arrow", random_samples(5))
    assert pickle.loads(pickle.dumps(store))[3].input_ids.tolist() == store[3].input_ids.tolist()


@pytest.mark.parametrize("index", [-1, 5])
def test_samples_that_do_not_exist_are_an_index_error(tmp_path: Path, index: int) -> None:
    with pytest.raises(IndexError):
        write(tmp_path / "s.arrow", random_samples(5))[index]


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_store_says_so_and_how_to_go_on(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.arrow"
    write(path, random_samples(50))
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-40], "empty": b"", "other": b"hello" * 100}[damage])
    with pytest.raises(DataError, match="prepared samples cannot be read") as caught:
        ArrowSampleStore(path)
    assert caught.value.code == "store-damaged"
    assert "prepares the data again" in str(caught.value)


def test_memory_and_arrow_stores_agree(tmp_path: Path) -> None:
    samples = random_samples(20)
    arrow, memory = write(tmp_path / "s.arrow", samples), MemorySampleStore(samples, fingerprint="abc")
    assert memory.fingerprint == arrow.fingerprint
    assert memory.lengths.tolist() == arrow.lengths.tolist()
    assert memory.num_supervised.tolist() == arrow.num_supervised.tolist()
    assert memory.take([3])[0].labels.tolist() == arrow.take([3])[0].labels.tolist()


texts = st.text(max_size=20)
json_values = st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda v: st.lists(v, max_size=2))
messages = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=texts | st.just("\ud800 alone"),
    reasoning=st.none() | texts,
    tool_calls=st.lists(
        st.builds(
            ToolCall, name=texts, arguments=st.dictionaries(texts, json_values, max_size=2), id=st.none() | texts
        ),
        max_size=2,
    ).map(tuple),
    tool_call_id=st.none() | texts,
    name=st.none() | texts,
    train=st.booleans(),
)
conversations = st.builds(
    Conversation,
    messages=st.lists(messages, max_size=3).map(tuple),
    text=st.none() | texts,
    tools=st.lists(st.dictionaries(texts, json_values, max_size=2), max_size=1).map(tuple),
    group=st.none() | texts,
    origin=texts,
    source=st.integers(0, 5),
    metadata=st.dictionaries(texts, json_values, max_size=1),
)


@given(conversations)
@settings(max_examples=100, deadline=None)
def test_a_conversation_survives_the_trip_through_json(conversation: Conversation) -> None:
    assert conversation_from_dict(conversation_to_dict(conversation)) == conversation


@given(st.lists(conversations, max_size=5))
@settings(max_examples=30, deadline=None)
def test_conversations_on_disk_can_be_read_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, items: list[Conversation]
) -> None:
    path = tmp_path_factory.mktemp("store") / "c.jsonl"
    with ConversationWriter(path) as writer:
        for item in items:
            writer.add(item)
    store = ConversationStore(path)
    assert list(store) == items
    assert list(store.select(reversed(range(len(items))))) == items[::-1]
    assert len(pickle.loads(pickle.dumps(store))) == len(items)


def test_a_damaged_conversation_says_so(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    with ConversationWriter(path) as writer:
        writer.add(Conversation((Message("user", "hello"),)))
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match="prepared conversations cannot be read"):
        ConversationStore(path)[0]
    with pytest.raises(DataError, match="prepared conversations cannot be read"):
        ConversationStore(tmp_path / "missing.jsonl")
