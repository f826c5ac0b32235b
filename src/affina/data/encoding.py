"""Turns conversations into samples, chunk by chunk, in this process or in several.

Worker processes are plain `python -m affina.data.worker` children that speak pickles over pipes. That works on every
system, does not import the caller's script again (as multiprocessing's spawn does), and cannot inherit locks of threads
(as fork does). Chunks are given out and taken back in order, so that the result does not depend on how many there are.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Any

from affina.data.masking import Mask
from affina.data.messages import Conversation
from affina.data.pairs import fit_pairs, with_label, with_teacher
from affina.data.preference_formats import TEACHER
from affina.data.templates import ChatTemplate, EncodedSample, Thinking
from affina.data.tokenizer import LoadedTokenizer
from affina.data.truncation import Truncation, fit_record
from affina.errors import DataError

CHUNK_RECORDS = 128
CHUNK_CHARACTERS = 1_000_000
_HEADER_BYTES = 8


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """What decides a record's samples, besides the tokenizer."""

    max_length: int
    truncation: Truncation = "drop"
    mask: Mask = "assistant"
    thinking: Thinking = "keep"
    system_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class RecordSamples:
    """The samples of one record in order, what was counted, or the error that kept it out."""

    samples: tuple[EncodedSample, ...] = ()
    counts: Counter[str] = field(default_factory=Counter)
    error: DataError | None = None


class Encoder:
    """Encodes records one at a time; errors come back as values."""

    def __init__(self, tokenizer: LoadedTokenizer, settings: EncodeSettings) -> None:
        self.settings = settings
        self.template = ChatTemplate(tokenizer, thinking=settings.thinking, system_prompt=settings.system_prompt)

    def encode_record(self, conversation: Conversation) -> RecordSamples:
        settings = self.settings
        try:
            if conversation.rejected:
                fitted = fit_pairs(
                    conversation, encode=self._encode, max_length=settings.max_length, truncation=settings.truncation
                )
            else:
                fitted = fit_record(
                    conversation,
                    encode=self._encode,
                    mask=settings.mask,
                    max_length=settings.max_length,
                    truncation=settings.truncation,
                )
                if conversation.desirable is not None:
                    fitted = with_label(fitted, is_desirable=conversation.desirable)
                if TEACHER in conversation.metadata:
                    size = len(self.template.tokenizer.hf)
                    fitted = with_teacher(fitted, conversation, vocabulary_size=size)
        except DataError as error:
            return RecordSamples(error=error)
        # The text is for people who look at samples; to send it between processes would double the traffic.
        return RecordSamples(tuple(replace(sample, text="") for sample in fitted.samples), fitted.counts)

    def _encode(self, conversation: Conversation, mask: Mask) -> list[EncodedSample]:
        return self.template.encode(conversation, mask=mask)

    def encode_chunk(self, chunk: list[Conversation]) -> list[RecordSamples]:
        return [self.encode_record(conversation) for conversation in chunk]


def encode_all(
    conversations: Iterable[Conversation],
    tokenizer: LoadedTokenizer,
    settings: EncodeSettings,
    *,
    num_workers: int = 1,
) -> Iterator[RecordSamples]:
    """The samples of every conversation, in order. More than one worker means that many child processes.

    Memory holds one chunk per worker. Raises DataError `worker-died` when a child is killed.
    """
    initial = _pickle_initial(tokenizer, settings) if num_workers > 1 else None
    if initial is None:
        encoder = Encoder(tokenizer, settings)
        for conversation in conversations:
            yield encoder.encode_record(conversation)
        return
    with _WorkerPool(initial, num_workers) as pool:
        for results in pool.map(_chunks(conversations)):
            yield from results


def _pickle_initial(tokenizer: LoadedTokenizer, settings: EncodeSettings) -> bytes | None:
    """What a worker starts with, or None where the tokenizer's own code cannot travel to another process."""
    try:
        return pickle.dumps((tokenizer, settings), protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None


def _chunks(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    chunk: list[Conversation] = []
    num_characters = 0
    for conversation in conversations:
        chunk.append(conversation)
        num_characters += len(conversation.text or "") + sum(len(message.content) for message in conversation.messages)
        if len(chunk) >= CHUNK_RECORDS or num_characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


# Pipes


def write_message(stream: IO[bytes], payload: bytes) -> None:
    """One message: its length in eight bytes, then the bytes."""
    stream.write(len(payload).to_bytes(_HEADER_BYTES, "big"))
    stream.write(payload)
    stream.flush()


def read_message(stream: IO[bytes]) -> bytes | None:
    """The next message, or None when the other side has closed the pipe."""
    header = _read_exactly(stream, _HEADER_BYTES)
    return _read_exactly(stream, int.from_bytes(header, "big")) if header is not None else None


def _read_exactly(stream: IO[bytes], num_bytes: int) -> bytes | None:
    parts: list[bytes] = []
    while num_bytes > 0:
        part = stream.read(num_bytes)
        if not part:
            return None
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


class _WorkerPool:
    """Children that each hold at most one chunk: whoever is next in turn is read before it is given more.

    Since a child is never written to while it may be writing, no pipe can block both sides.
    """

    def __init__(self, initial: bytes, num_workers: int) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        self._children: list[subprocess.Popen[bytes]] = []
        try:
            for _ in range(num_workers):
                child = subprocess.Popen(
                    [sys.executable, "-m", "affina.data.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                )
                self._children.append(child)
            for child in self._children:
                self._send(child, initial)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> _WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(self, chunks: Iterable[list[Conversation]]) -> Iterator[list[RecordSamples]]:
        waiting: deque[subprocess.Popen[bytes]] = deque()
        free = deque(self._children)
        for chunk in chunks:
            if not free:
                child = waiting.popleft()
                yield self._receive(child)
                free.append(child)
            child = free.popleft()
            self._send(child, pickle.dumps(chunk, protocol=pickle.HIGHEST_PROTOCOL))
            waiting.append(child)
        while waiting:
            yield self._receive(waiting.popleft())

    def close(self) -> None:
        for child in self._children:
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        pass  # the child is gone; nothing is lost by not telling it to end
        for child in self._children:
            try:
                child.wait(timeout=5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _send(self, child: subprocess.Popen[bytes], payload: bytes) -> None:
        assert child.stdin is not None
        try:
            write_message(child.stdin, payload)
        except BrokenPipeError as error:
            raise self._died(child) from error

    def _receive(self, child: subprocess.Popen[bytes]) -> list[RecordSamples]:
        assert child.stdout is not None
        payload = read_message(child.stdout)
        if payload is None:
            raise self._died(child)
        results: Any = pickle.loads(payload)
        assert isinstance(results, list)
        return results

    def _died(self, child: subprocess.Popen[bytes]) -> DataError:
        code = child.wait()
        return DataError(
            "worker-died",
            f"a process that prepares data ended with exit code {code}",
            why="the system may have run out of memory and killed it" if code < 0 else "its error stands above",
            fix="set data.num_workers: 1, which needs the least memory",
        )
