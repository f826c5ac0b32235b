"""Conversations on disk: one JSON object per line and an index of where the lines start.

Preparation reads every source once, checks it, and keeps what is valid here, so that later passes (split, mix, encode)
can take records in any order without holding them in memory, and so that evaluation can read the validation set again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affina.data.messages import Conversation, Message, ToolCall
from affina.errors import DataError, Location


def conversation_to_dict(conversation: Conversation) -> dict[str, Any]:
    """A JSON-ready mapping that `conversation_from_dict` turns back into an equal conversation."""
    record: dict[str, Any] = {"origin": conversation.origin, "source": conversation.source}
    if conversation.messages:
        record["messages"] = [_message_to_dict(message) for message in conversation.messages]
    if conversation.text is not None:
        record["text"] = conversation.text
    if conversation.tools:
        record["tools"] = list(conversation.tools)
    if conversation.group is not None:
        record["group"] = conversation.group
    if conversation.metadata:
        record["metadata"] = conversation.metadata
    if conversation.rejected:
        record["rejected"] = [[_message_to_dict(message) for message in turns] for turns in conversation.rejected]
    if conversation.desirable is not None:
        record["desirable"] = conversation.desirable
    return record


def conversation_from_dict(record: dict[str, Any]) -> Conversation:
    """The conversation that `conversation_to_dict` wrote."""
    return Conversation(
        messages=tuple(_message_from_dict(message) for message in record.get("messages", ())),
        text=record.get("text"),
        tools=tuple(record.get("tools", ())),
        group=record.get("group"),
        origin=record["origin"],
        source=record["source"],
        metadata=record.get("metadata", {}),
        rejected=tuple(tuple(_message_from_dict(message) for message in turns) for turns in record.get("rejected", ())),
        desirable=record.get("desirable"),
    )


def _message_to_dict(message: Message) -> dict[str, Any]:
    record: dict[str, Any] = {"role": message.role, "content": message.content}
    for name in ("reasoning", "tool_call_id", "name"):
        if (value := getattr(message, name)) is not None:
            record[name] = value
    if message.tool_calls:
        record["tool_calls"] = [[call.name, call.arguments, call.id] for call in message.tool_calls]
    if not message.train:
        record["train"] = False
    return record


def _message_from_dict(record: dict[str, Any]) -> Message:
    calls = tuple(ToolCall(name, arguments, call_id) for name, arguments, call_id in record.get("tool_calls", ()))
    return Message(
        role=record["role"],
        content=record["content"],
        reasoning=record.get("reasoning"),
        tool_calls=calls,
        tool_call_id=record.get("tool_call_id"),
        name=record.get("name"),
        train=record.get("train", True),
    )


def _index_path(path: Path) -> Path:
    return path.with_name(path.name + ".index")


class ConversationWriter:
    """Writes conversations one after the other. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._index = open(_index_path(path), "wb")  # noqa: SIM115

    def add(self, conversation: Conversation) -> None:
        self._index.write(np.int64(self._file.tell()).tobytes())
        # Lone surrogates cannot be written as UTF-8; escaped they can, and come back as they were.
        text = json.dumps(conversation_to_dict(conversation), ensure_ascii=True, separators=(",", ":"))
        self._file.write(text.encode("ascii") + b"\n")

    def close(self) -> None:
        self._file.close()
        self._index.close()

    def __enter__(self) -> ConversationWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class ConversationStore:
    """Random access to conversations on disk, as often as wanted. Raises DataError `store-damaged`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._starts: NDArray[np.int64] = np.fromfile(_index_path(self.path), dtype=np.int64)
            # Read, not mapped: pages of a mapped file would count as this process's memory, as large as the file.
            self._file = open(self.path, "rb")  # noqa: SIM115 - open as long as the store
            self._size = self._file.seek(0, 2)
        except OSError as error:
            raise self._damaged(str(error)) from error
        self._lock = threading.Lock()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int, /) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        start = int(self._starts[index])
        stop = int(self._starts[index + 1]) if index + 1 < len(self) else self._size
        with self._lock:
            self._file.seek(start)
            line = self._file.read(stop - start)
        try:
            return conversation_from_dict(json.loads(line))
        except (ValueError, KeyError) as error:
            raise self._damaged(str(error)) from error

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: Iterable[int]) -> Iterator[Conversation]:
        """The conversations at these indices, in the order of the indices."""
        return (self[int(index)] for index in indices)

    def _damaged(self, why: str) -> DataError:
        return DataError(
            "store-damaged",
            "a file of prepared conversations cannot be read",
            why=why,
            fix="delete it; affina prepares the data again",
            where=Location(self.path),
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (ConversationStore, (self.path,))
