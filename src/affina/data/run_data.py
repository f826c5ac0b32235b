"""What a run reads: prepared data on disk, or a stream. Training and evaluation see one shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from affina.config.schema import RunConfig
from affina.data.build import prepare_from_config, stream_from_config
from affina.data.messages import Conversation
from affina.data.prepare import Progress
from affina.data.report import DataReport
from affina.data.samples import SampleStore
from affina.data.streaming import StreamedData
from affina.data.teacher import check_teacher
from affina.data.templates import ChatTemplate
from affina.data.tokenizer import LoadedTokenizer


class OriginStore(SampleStore, Protocol):
    """Samples that know which record they come from."""

    def origin(self, index: int, /) -> str: ...


class Conversations(Protocol):
    """Conversations that can be read in any order, as often as wanted."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Conversation]: ...
    def select(self, indices: Iterable[int], /) -> Iterator[Conversation]: ...


class ConversationList(list[Conversation]):
    """`Conversations` in memory."""

    def select(self, indices: Iterable[int], /) -> Iterator[Conversation]:
        return (self[int(index)] for index in indices)


@dataclass(frozen=True)
class RunData:
    """The data of one run.

    train:           the training samples; None for a stream
    stream:          where training samples come from while training; None for prepared data
    validation:      fixed samples, possibly none; validation_conversations are the records behind them
    report:          what preparation found; None for a stream, which is judged as it passes
    fingerprint:     sha256 of everything that decided the data; of a stream: of its validation set, settings, template
    enable_thinking: how prompts are built so that they look as trained; None: the template has no switch
    """

    train: SampleStore | None
    stream: StreamedData | None
    validation: OriginStore
    validation_conversations: Conversations
    template: ChatTemplate
    report: DataReport | None
    fingerprint: str
    enable_thinking: bool | None

    @cached_property
    def contract(self) -> dict[str, Any]:
        """See `ChatTemplate.contract`."""
        return self.template.contract(enable_thinking=self.enable_thinking)


def open_run_data(config: RunConfig, tokenizer: LoadedTokenizer, *, progress: Progress | None = None) -> RunData:
    """The data of a config: prepared (or found in the cache), or opened as a stream with its validation set read.

    Raises ModelError `teacher-tokenizer` before any of it is read.
    """
    if config.training.objective == "distill" and config.training.distillation.teacher is not None:
        check_teacher(config.training.distillation.teacher, tokenizer)
    if config.data.streaming:
        return _stream(config, tokenizer)
    data = prepare_from_config(config, tokenizer, progress=progress)
    return RunData(
        train=data.train,
        stream=None,
        validation=data.validation,
        validation_conversations=data.validation_conversations,
        template=data.template,
        report=data.report,
        fingerprint=data.fingerprint,
        enable_thinking=data.enable_thinking,
    )


def _stream(config: RunConfig, tokenizer: LoadedTokenizer) -> RunData:
    data = stream_from_config(config, tokenizer)
    contract = data.template.contract()
    return RunData(
        train=None,
        stream=data,
        validation=data.validation,
        validation_conversations=ConversationList(data.validation_conversations),
        template=data.template,
        report=None,
        fingerprint=_stream_fingerprint(data, contract, config),
        enable_thinking=contract["enable_thinking"],
    )


def _stream_fingerprint(data: StreamedData, contract: dict[str, Any], config: RunConfig) -> str:
    """A stream is not read through before training, so its training records cannot be part of this."""
    digest = hashlib.sha256(json.dumps(contract, sort_keys=True, default=str).encode())
    digest.update(config.data.model_dump_json(exclude={"cache_directory", "num_workers"}).encode())
    for index in range(len(data.validation)):
        digest.update(data.validation[index].input_ids.tobytes())
    return digest.hexdigest()
