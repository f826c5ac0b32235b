"""The canonical conversation: what every format is turned into, and what every template renders.

A conversation is what the tokenizer's chat template takes: a list of messages with a role, text, and, where there
are any, reasoning, tool calls and tool results. Plain text (for continued pre-training) is a conversation without
messages whose `text` is set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One function call of an assistant. `arguments` is the decoded JSON object."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `train=False` takes a reply out of the loss; `reasoning` is the text inside <think>…</think>."""

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    train: bool = True

    def to_template(self) -> dict[str, Any]:
        """The mapping that Hugging Face chat templates read (`reasoning_content`, `tool_calls[].function`)."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                    **({"id": call.id} if call.id else {}),
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        return message


@dataclass(frozen=True, slots=True)
class Conversation:
    """One record in canonical form.

    messages: the turns, empty for plain text; of a preference, the prompt and the best reply
    text:     plain text, None for conversations
    tools:    JSON schemas of the functions on offer, as the template takes them
    group:    records with the same group never end up on both sides of a split
    origin:   `file:line` (or `file#index`) of the record, for messages to the user
    rejected: of a preference, the worse alternatives to `messages`, each with the same prompt in front
    desirable: whether the reply is wanted, where a label says so (KTO)
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    group: str | None = None
    origin: str = ""
    source: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    rejected: tuple[tuple[Message, ...], ...] = ()
    desirable: bool | None = None
