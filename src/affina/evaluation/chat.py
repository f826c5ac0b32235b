"""A conversation with the tuned model, with its base at hand for the same prompt.

The prompt of every turn is built by the template that training used, so that what is tried here is what was trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from affina.data.messages import Message
from affina.errors import EvaluationError
from affina.evaluation.matchers import final_answer

Decode = Callable[[Sequence[int]], str]
"""From token ids to text, without the template's control tokens."""

_THINKING = re.compile(r"<think>\s*(.*?)\s*</think>", re.DOTALL)
_INCOMPLETE = "\ufffd"


class StreamTokens(Protocol):
    """Generates one token after the other until the end of the turn, which is not given out."""

    def __call__(
        self, prompt_ids: Sequence[int], /, *, use_adapter: bool, max_new_tokens: int, temperature: float
    ) -> Iterator[int]: ...


class PromptTemplate(Protocol):
    """What builds prompts: `ChatTemplate` in the product."""

    def prompt_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        enable_thinking: bool | None = None,
    ) -> list[int]: ...


class ChatSession:
    """Turns of one conversation. Replies come in pieces while they are generated.

    stream:         generates tokens with or without the adapter
    context_tokens: what the model can read, prompt and reply together; None: not known
    max_new_tokens: longest reply                  temperature: 0 always takes the likeliest token
    run:            name of the run, for greetings
    """

    def __init__(
        self,
        stream: StreamTokens,
        template: PromptTemplate,
        decode: Decode,
        *,
        context_tokens: int | None = None,
        enable_thinking: bool | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        run: str = "",
        model: str = "",
    ) -> None:
        self._stream = stream
        self._template = template
        self._decode = decode
        self._context_tokens = context_tokens
        self._enable_thinking = enable_thinking
        self._messages: list[Message] = []
        self._system: str | None = None
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.run = run
        self.model = model

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far, with its system prompt."""
        system = (Message("system", self._system),) if self._system else ()
        return (*system, *self._messages)

    @property
    def last_prompt(self) -> str | None:
        """The user's last message."""
        return next((message.content for message in reversed(self._messages) if message.role == "user"), None)

    def reply(self, text: str) -> Iterator[str]:
        """The tuned model's reply to `text`, in pieces; both become part of the conversation.

        A reply that is stopped half-way (the iterator is closed, or Ctrl-C) stays in the conversation as far as it
        came, so that the next turn follows what the user has seen.
        """
        user = Message("user", text)
        ids = self._prompt((*self.messages, user))
        self._messages.append(user)
        pieces: list[str] = []
        try:
            for piece in self._generate(ids, use_adapter=True):
                pieces.append(piece)
                yield piece
        finally:
            self._messages.append(_reply_message("".join(pieces)))

    def base_reply(self, text: str | None = None) -> Iterator[str]:
        """The base model's reply at the same place of the conversation, which it does not change.

        text: what to ask; None: the user's last message again, with everything that stood before it

        Raises EvaluationError `chat-nothing-asked` when there is no last message.
        """
        if text is None:
            asked = [index for index, message in enumerate(self._messages) if message.role == "user"]
            if not asked:
                raise EvaluationError(
                    "chat-nothing-asked",
                    "there is no message yet that the base model could answer",
                    fix="ask something first, or type /base followed by a question",
                )
            system = self.messages[: len(self.messages) - len(self._messages)]
            prompt = (*system, *self._messages[: asked[-1] + 1])
        else:
            prompt = (*self.messages, Message("user", text))
        return self._generate(self._prompt(prompt), use_adapter=False)

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self._messages.clear()

    def set_system(self, text: str) -> None:
        """Start over with this system prompt; an empty text takes it away (the run's own then applies again)."""
        self._system = text.strip() or None
        self.reset()

    def set_thinking(self, is_on: bool | None) -> None:
        """Thinking on or off in the prompts to come; None: as it was trained."""
        self._enable_thinking = is_on

    def _generate(self, prompt_ids: Sequence[int], *, use_adapter: bool) -> Iterator[str]:
        room = self.max_new_tokens
        if self._context_tokens is not None:
            room = min(room, self._context_tokens - len(prompt_ids))
        tokens = self._stream(prompt_ids, use_adapter=use_adapter, max_new_tokens=room, temperature=self.temperature)
        return stream_text(tokens, self._decode)

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        ids = self._template.prompt_ids(messages, (), enable_thinking=self._enable_thinking)
        if self._context_tokens is not None and len(ids) >= self._context_tokens:
            raise EvaluationError(
                "chat-too-long",
                f"the conversation has {len(ids):,} tokens; the model reads {self._context_tokens:,}",
                fix="/reset starts a new one",
            )
        return ids


def stream_text(tokens: Iterator[int], decode: Decode) -> Iterator[str]:
    """Pieces of text from a stream of tokens; a character whose bytes are spread over tokens comes when it is whole.

    Only the last tokens are decoded again for each new one: what was given out before serves as context, because many
    tokenizers write a token differently at the start of a text.
    """
    ids: list[int] = []
    context_start = shown_end = 0
    for token in tokens:
        ids.append(token)
        context = decode(ids[context_start:shown_end])
        text = decode(ids[context_start:])
        if len(text) > len(context) and not text.endswith(_INCOMPLETE):
            yield text[len(context) :]
            context_start, shown_end = shown_end, len(ids)
    rest = decode(ids[context_start:])[len(decode(ids[context_start:shown_end])) :]
    if rest:
        yield rest


def _reply_message(text: str) -> Message:
    thinking = _THINKING.search(text)
    reasoning = thinking[1] if thinking is not None and thinking[1] else None
    return Message("assistant", final_answer(text), reasoning=reasoning)
