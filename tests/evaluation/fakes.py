"""Models that are tables: what evaluation needs of a model, without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from affina.data.messages import Message
from affina.data.samples import IGNORED_LABEL, Sample
from affina.evaluation.perplexity import RecordScore
from affina.evaluation.tasks.exact_match import Generation


def sample(num_prompt: int, num_reply: int, *, identity: int = 1) -> Sample:
    """`identity` is the first token, by which a fake model recognises the sample."""
    ids = np.full(num_prompt + num_reply, 7, np.int32)
    ids[0] = identity
    labels = ids.copy()
    labels[:num_prompt] = IGNORED_LABEL
    return Sample(ids, labels)


class FakeScore:
    """Loss per token by the sample's first token; remembers how many samples each call had."""

    def __init__(self, loss_of: dict[int, float] | float) -> None:
        self.loss_of = loss_of
        self.calls: list[int] = []

    def __call__(self, samples: Sequence[Sample], /) -> list[RecordScore]:
        self.calls.append(len(samples))
        return [RecordScore(self._loss(one) * one.num_supervised, one.num_supervised) for one in samples]

    def _loss(self, one: Sample) -> float:
        return self.loss_of if isinstance(self.loss_of, float) else self.loss_of[int(one.input_ids[0])]


class FakeGenerate:
    """Replies by prompt ids; remembers the batches."""

    def __init__(self, replies: dict[tuple[int, ...], str] | str, *, is_complete: bool = True) -> None:
        self.replies = replies
        self.is_complete = is_complete
        self.batches: list[list[int]] = []

    def __call__(self, prompts: Sequence[Sequence[int]], /) -> list[Generation]:
        self.batches.append([len(prompt) for prompt in prompts])
        return [self._reply(tuple(prompt)) for prompt in prompts]

    def _reply(self, prompt: tuple[int, ...]) -> Generation:
        text = self.replies if isinstance(self.replies, str) else self.replies[prompt]
        return Generation(text, len(text.split()), self.is_complete)


class FakeTemplate:
    """One id per character of `role:content;…`; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[tuple[str, str]], bool | None]] = []

    def prompt_ids(
        self, messages: Sequence[Message], tools: object = (), *, enable_thinking: bool | None = None
    ) -> list[int]:
        self.asked.append(([(message.role, message.content) for message in messages], enable_thinking))
        return [ord(character) for message in messages for character in f"{message.role}:{message.content};"]


class FakeStream:
    """Streams the bytes of a fixed reply, one byte per token; the base answers in capitals."""

    def __init__(self, reply: str) -> None:
        self.reply = reply
        self.calls: list[dict[str, object]] = []

    def __call__(
        self, prompt_ids: Sequence[int], /, *, use_adapter: bool, max_new_tokens: int, temperature: float
    ) -> Iterator[int]:
        self.calls.append(
            {
                "prompt": "".join(map(chr, prompt_ids)),
                "use_adapter": use_adapter,
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
            }
        )
        text = self.reply if use_adapter else self.reply.upper()
        yield from text.encode("utf-8")[:max_new_tokens]


def decode_bytes(ids: Sequence[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")
