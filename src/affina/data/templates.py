"""Renders conversations with the tokenizer's own chat template and finds what is trained in them.

affina has no template of its own. Three laws hold for every sample, and are checked while it is made:

1. its ids are the ids that `apply_chat_template` gives for the same messages;
2. a trained reply runs from the end of the prompt that serving would build to its end-of-turn token, included;
3. an empty <think> block is never trained: it is what serving puts into the prompt when thinking is off.

Where the template cannot keep the text before a reply equal to serving's prompt (Qwen3 drops the reasoning of earlier
turns), the difference is counted, and `thinking="empty-masked"` avoids it with one sample per reply.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from affina.data.alignment import FieldPositions, locate_fields
from affina.data.masking import (
    Mask,
    TokenizedText,
    build_sample,
    invert,
    select_replies,
    tokenize_text,
    tokens_inside,
)
from affina.data.messages import Conversation, Message
from affina.data.samples import Sample
from affina.data.tokenizer import LoadedTokenizer, render_probe
from affina.errors import DataError, Location

Thinking = Literal["keep", "strip", "empty-masked"]

CONTRACT_VERSION = 1

_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")
_INLINE_THINK = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RenderedReply:
    """Where one assistant message stands in a rendered text, in characters.

    block_start:     where the reply's turn content starts; differs from `start` when an empty think block is between
    start, end:      the trained span; `end` is after the end-of-turn token, or after the text where there is none
    matches_serving: whether text[:start] is the prompt that serving builds; None when serving cannot build one
                     (a conversation that the assistant opens)
    thinking:        what stands before the answer: "reasoning", an "empty" block, or "none"
    lost_reasoning:  the template dropped the message's reasoning
    """

    message_index: int
    block_start: int
    start: int
    end: int
    has_end_of_turn: bool
    matches_serving: bool | None
    thinking: Literal["reasoning", "empty", "none"]
    lost_reasoning: bool


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """A conversation as text, exactly as the template writes it, and the positions of its replies."""

    text: str
    replies: tuple[RenderedReply, ...]


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A sample together with what was learnt while making it.

    text:       what the ids stand for
    reply_ends: index of the last token of every trained reply (its end-of-turn token)
    counts:     see `ChatTemplate.encode`
    """

    sample: Sample
    text: str
    reply_ends: tuple[int, ...]
    counts: Counter[str]
    origin: str = ""
    source: int = 0

    def __len__(self) -> int:
        return len(self.sample)


class ChatTemplate:
    """The tokenizer's chat template, with the thinking mode and the system prompt that training and serving share."""

    def __init__(
        self,
        tokenizer: LoadedTokenizer,
        *,
        thinking: Thinking = "keep",
        system_prompt: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.thinking: Thinking = thinking
        self.system_prompt = system_prompt
        self._end_of_turn = re.compile("|".join(re.escape(text) for text in tokenizer.end_of_turn))
        self._control = re.compile("|".join(re.escape(text) for text in tokenizer.control_tokens) or r"(?!)")
        self._segment_ids: dict[str, tuple[int, ...]] = {}
        self._special_ids = frozenset(int(i) for i, t in tokenizer.hf.added_tokens_decoder.items() if t.special)
        self._header, self._prompt_on, self._prompt_off, self._renders_reasoning = self._probe()
        self._open_before = self._probe_open_replies()
        self.empty_block = self._find_empty_block()
        """What the template adds to the prompt when thinking is off; "" where it has no such switch."""

    # What the template can do

    @property
    def supports_thinking(self) -> bool:
        """Whether the template knows reasoning at all; without it the thinking modes change nothing in the text."""
        return self._renders_reasoning or self._prompt_on != self._prompt_off

    def _find_empty_block(self) -> str:
        shared = _shared_prefix(self._prompt_on, self._prompt_off)
        return self._prompt_off[len(_shared_prefix(self._header, shared)) :] if self.supports_thinking else ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user about settings that have no effect here."""
        if self.tokenizer.has_template and self.thinking != "keep" and not self.supports_thinking:
            return (
                f"data.thinking: {self.thinking} changes little here: "
                f"the chat template of {self.tokenizer.name} knows no reasoning",
            )
        return ()

    def _probe(self) -> tuple[str, str, str, bool]:
        """(text that opens every reply, prompt with thinking on, prompt with thinking off, renders reasoning)."""
        if not self.tokenizer.has_template:
            return "", "", "", False
        hf = self.tokenizer.hf
        user = {"role": "user", "content": "affinaprobequestion"}
        reply = {"role": "assistant", "content": "affinaprobereply"}
        base = render_probe(hf, [user]) or ""
        prompt_on = _suffix(render_probe(hf, [user], add_generation_prompt=True), base)
        prompt_off = _suffix(render_probe(hf, [user], add_generation_prompt=True, enable_thinking=False), base)
        middle = render_probe(hf, [user, reply, user, reply])
        header = _shared_prefix(prompt_on, prompt_off)
        if middle is not None and middle.startswith(base):
            header = _shared_prefix(header, middle[len(base) :])
        reasoned = render_probe(hf, [user, {**reply, "reasoning_content": "affinaprobereason"}])
        return header, prompt_on, prompt_off, reasoned is not None and "affinaprobereason" in reasoned

    def _probe_open_replies(self) -> frozenset[str]:
        """The roles before whose turns the template writes no end of turn after a reply: "user", "tool"."""
        if not self.tokenizer.has_template:
            return frozenset()
        user: dict[str, Any] = {"role": "user", "content": "affinaprobequestion"}
        reply: dict[str, Any] = {"role": "assistant", "content": "affinaprobereply"}
        function = {"name": "affinaprobecall", "arguments": {"n": 1}}
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        result = {"role": "tool", "name": "affinaprobecall", "content": "affinaproberesult"}
        probes = {
            "user": ([user, reply, user, reply], "affinaprobereply", "affinaprobequestion"),
            "tool": ([user, call, result, reply], "affinaprobecall", "affinaproberesult"),
        }
        return frozenset(
            role
            for role, (messages, own, following) in probes.items()
            if (between := _text_between(render_probe(self.tokenizer.hf, messages), own, following)) is not None
            and self._end_of_turn.search(between) is None
        )

    # Rendering

    def template_messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The mappings that the template is given: system prompt added, reasoning removed where the mode says so."""
        with_system = self._with_system(messages)
        if self.thinking != "keep":
            with_system = [_without_reasoning(message) for message in with_system]
        return [message.to_template() for message in with_system]

    @property
    def template_options(self) -> dict[str, Any]:
        """Arguments beyond messages and tools with which `apply_chat_template` gives the ids of the samples."""
        return {"enable_thinking": False} if self.thinking == "empty-masked" and self.supports_thinking else {}

    def render(self, conversation: Conversation) -> RenderedConversation:
        """The conversation as text, and where its replies stand.

        Raises DataError: `template-missing`, `template-refused`, `control-token-in-content`, `template-not-alignable`,
        `end-of-turn-missing`.
        """
        self._require_template(conversation)
        self._refuse_control_tokens(conversation)
        messages = self.template_messages(conversation.messages)
        tools = conversation.tools
        text = self._apply(messages, tools, conversation)
        indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        fields = locate_fields(text, messages, lambda marked: self._apply(marked, tools, conversation))
        offset = len(messages) - len(conversation.messages)  # 1 when a system prompt was added
        replies: list[RenderedReply] = []
        previous_end = 0
        for position, index in enumerate(indices):
            if fields is None:
                reply = self._align_by_prefix(text, messages, index, conversation)
            elif (own := fields[index]) is None:
                reply = self._align_bare(text, messages, index, previous_end, conversation)
            else:
                later = (fields[following] for following in indices[position + 1 :])
                limit = next((field.first for field in later if field is not None), len(text))
                reply = self._align(text, messages, index, own, previous_end, limit, conversation)
            previous_end = reply.end
            replies.append(replace(reply, message_index=index - offset))
        return RenderedConversation(text, tuple(replies))

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.system_prompt is None or any(message.role == "system" for message in messages):
            return list(messages)
        return [Message("system", self.system_prompt), *messages]

    def _require_template(self, conversation: Conversation) -> None:
        if self.tokenizer.has_template:
            return
        raise DataError(
            "template-missing",
            f"the tokenizer of {self.tokenizer.name} has no chat template, and the data has conversations",
            why="affina renders conversations with the model's own template only: a made-up one would not be the one "
            "that serving uses",
            fix="use the instruction-tuned variant of the model, put a chat_template into its tokenizer_config.json, "
            "or train on plain text",
            where=_where(conversation),
        )

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        """A text such as <|im_end|> inside a message would become a control token and end the turn there."""
        for index, message in enumerate(conversation.messages):
            for text in _texts_of(message):
                if (match := self._control.search(text)) is not None:
                    self._raise_control_token(match.group(), f"message {index} ({message.role})", conversation)
        for tool in conversation.tools:
            if (match := self._control.search(json.dumps(tool, ensure_ascii=False))) is not None:
                self._raise_control_token(match.group(), "a tool definition", conversation)

    def _raise_control_token(self, token: str, place: str, conversation: Conversation) -> None:
        raise DataError(
            "control-token-in-content",
            f"{place} contains {token!r}, which the tokenizer reads as a control token",
            why="in training and in serving it would act as markup and not as text: a turn could end or begin inside "
            "a message",
            fix="write it differently in the data (for example with a space inside), or set data.on_error: skip",
            where=_where(conversation),
        )

    def _apply(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        conversation: Conversation | None,
        *,
        add_generation_prompt: bool = False,
        options: dict[str, Any] | None = None,
    ) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return str(
                self.tokenizer.hf.apply_chat_template(
                    messages,
                    tools=[dict(tool) for tool in tools] or None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **(self.template_options if options is None else options),
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise DataError(
                "template-refused",
                f"the chat template of {self.tokenizer.name} cannot render this conversation "
                f"({' → '.join(message['role'] for message in messages[:8])})",
                why=str(error) or type(error).__name__,
                fix="bring the roles into the order that the model's template expects, or set data.on_error: skip",
                where=_where(conversation) if conversation is not None else None,
            ) from error

    # Where a reply starts and ends

    def _align(
        self,
        text: str,
        messages: list[dict[str, Any]],
        index: int,
        fields: FieldPositions,
        previous_end: int,
        limit: int,
        conversation: Conversation,
    ) -> RenderedReply:
        start, matches = self._find_start(text, messages, index, previous_end, fields.first, conversation)
        block_start, start, thinking = self._skip_empty_block(text, start, fields)
        closing = self._find_end(text, messages, index, fields.last, limit)
        return RenderedReply(
            message_index=index,
            block_start=block_start,
            start=start,
            end=closing.end() if closing is not None else fields.last,
            has_end_of_turn=closing is not None,
            matches_serving=matches,
            thinking=thinking,
            lost_reasoning=fields.has_lost_reasoning and thinking != "reasoning",
        )

    def _find_end(
        self, text: str, messages: list[dict[str, Any]], index: int, start: int, limit: int
    ) -> re.Match[str] | None:
        """The end of turn of message `index`, whose own text ends at `start`; None where the template writes none.

        Where it leaves a reply open, the next end of turn is that of the turn after it: what the user wrote, or a
        tool's result, would be trained.
        """
        if index + 1 < len(messages) and messages[index + 1]["role"] in self._open_before:
            return None
        return self._end_of_turn.search(text, start, limit)

    def _find_start(
        self,
        text: str,
        messages: list[dict[str, Any]],
        index: int,
        previous_end: int,
        first_field: int,
        conversation: Conversation,
        *,
        first: bool = False,
    ) -> tuple[int, bool | None]:
        """Where the reply's own text starts, and whether everything before it is what serving would send.

        It starts between the end of the reply before and the first field. If the text is not serving's prompt up to
        there, it starts after the last opening of a reply in between (after the first one when `first`).
        """
        if index == 0:
            return self._start_by_header(text, previous_end, first_field, conversation, first=first), None
        prompt = self._apply(messages[:index], conversation.tools, conversation, add_generation_prompt=True)
        if text.startswith(prompt) and previous_end <= len(prompt) <= first_field:
            return self._extend_by_block(text, prompt, first_field)
        closed = self._closed_prompt(prompt)
        if closed is not None and text.startswith(closed) and previous_end <= len(closed) <= first_field:
            return len(closed), self.thinking in ("keep", "strip")
        return self._start_by_header(text, previous_end, first_field, conversation, first=first), False

    def _extend_by_block(self, text: str, prompt: str, first_field: int) -> tuple[int, bool]:
        """With thinking on, the text may go on with the empty block: then serving with thinking off is the match."""
        if self.thinking == "empty-masked":
            return len(prompt), True
        closed = self._closed_prompt(prompt)
        if closed is not None and text.startswith(closed) and len(closed) <= first_field:
            return len(closed), True
        return len(prompt), self.thinking == "keep" or not self.supports_thinking

    def _closed_prompt(self, prompt: str) -> str | None:
        """The thinking-off prompt that belongs to a thinking-on prompt; None where they do not differ by their end."""
        if self._prompt_on == self._prompt_off or not prompt.endswith(self._prompt_on) or not self._prompt_on:
            return None
        return prompt[: len(prompt) - len(self._prompt_on)] + self._prompt_off

    def _start_by_header(
        self, text: str, previous_end: int, first_field: int, conversation: Conversation, *, first: bool
    ) -> int:
        find = text.find if first else text.rfind
        # Only a control token cannot be part of what a user wrote; the last opening before a reply is safe anyway.
        is_safe = bool(self._header) and (not first or self._control.search(self._header) is not None)
        position = find(self._header, previous_end, first_field) if is_safe else -1
        if position < 0:
            self._raise_not_alignable(conversation)
        for prompt in sorted((self._prompt_on, self._prompt_off, self._header), key=len, reverse=True):
            if text.startswith(prompt, position) and position + len(prompt) <= first_field:
                return position + len(prompt)
        return position + len(self._header)

    def _skip_empty_block(
        self, text: str, start: int, fields: FieldPositions
    ) -> tuple[int, int, Literal["reasoning", "empty", "none"]]:
        """(where the turn's content starts, where training starts, what stands before the answer)."""
        if fields.kept.get("r"):
            return start, start, "reasoning"
        if self.empty_block and text.endswith(self.empty_block, 0, start):
            return start - len(self.empty_block), start, "empty"
        block = _EMPTY_THINK.match(text, start)
        if block is not None:
            return start, min(block.end(), max(fields.first, start)), "empty"
        inline = _INLINE_THINK.match(text, start)
        return start, start, "reasoning" if inline is not None else "none"

    def _align_bare(
        self, text: str, messages: list[dict[str, Any]], index: int, previous_end: int, conversation: Conversation
    ) -> RenderedReply:
        """A message of which nothing was rendered (its reasoning was dropped, and it had nothing else)."""
        start, matches = self._find_start(text, messages, index, previous_end, len(text), conversation, first=True)
        block = _EMPTY_THINK.match(text, start)
        trained_from = block.end() if block is not None else start
        closing = self._find_end(text, messages, index, trained_from, len(text))
        is_closed = self.empty_block != "" and text.endswith(self.empty_block, 0, start)
        return RenderedReply(
            message_index=index,
            block_start=start - len(self.empty_block) if is_closed else start,
            start=trained_from,
            end=closing.end() if closing is not None else trained_from,
            has_end_of_turn=closing is not None,
            matches_serving=matches,
            thinking="empty" if block is not None or is_closed else "none",
            lost_reasoning=bool(messages[index].get("reasoning_content")),
        )

    def _align_by_prefix(
        self, text: str, messages: list[dict[str, Any]], index: int, conversation: Conversation
    ) -> RenderedReply:
        """For templates that no mark can follow: the renderings up to and including the reply must be prefixes."""
        if index == 0:
            self._raise_not_alignable(conversation)
        prompt = self._apply(messages[:index], conversation.tools, conversation, add_generation_prompt=True)
        through = self._apply(messages[: index + 1], conversation.tools, conversation)
        if not (text.startswith(prompt) and through.startswith(prompt) and text.startswith(through)):
            self._raise_not_alignable(conversation)
        start, matches = self._extend_by_block(text, prompt, len(through))
        ends = list(self._end_of_turn.finditer(text, start, len(through)))
        block = _EMPTY_THINK.match(text, start)
        trained_from = block.end() if block is not None else start
        is_empty = block is not None or start > len(prompt)
        has_reasoning = bool(messages[index].get("reasoning_content")) and not is_empty
        return RenderedReply(
            message_index=index,
            block_start=len(prompt),
            start=trained_from,
            end=ends[-1].end() if ends else len(through),
            has_end_of_turn=bool(ends),
            matches_serving=matches,
            thinking="empty" if is_empty else "reasoning" if has_reasoning else "none",
            lost_reasoning=False,
        )

    def _raise_not_alignable(self, conversation: Conversation) -> None:
        raise DataError(
            "template-not-alignable",
            f"the replies of this record cannot be found in what the chat template of {self.tokenizer.name} renders",
            why="the template changes the text of a reply, or merges turns, so that no loss mask would be right",
            fix="set data.mask: all, change the record, or set data.on_error: skip",
            where=_where(conversation),
        )

    def _raise_no_end(self, index: int, conversation: Conversation) -> None:
        raise DataError(
            "end-of-turn-missing",
            f"the chat template of {self.tokenizer.name} writes no end-of-turn token after message {index}",
            why=f"a reply without {' or '.join(self.tokenizer.end_of_turn)} teaches the model never to stop",
            fix="correct the chat template, or take the reply out of the loss with train: false",
            where=_where(conversation),
        )

    # Samples

    def encode(self, conversation: Conversation, *, mask: Mask = "assistant") -> list[EncodedSample]:
        """The samples of one conversation: one, or with `empty-masked` one for each group of replies that share a text.

        Counts of each sample: trained_replies, ends_of_turn (supervised), reasoning, empty_think, no_think (what stands
        before a trained reply), lost_reasoning, prefix_mismatches (trained replies whose ids before the reply are not
        the ids of serving's prompt, with thinking on or off), prompt_thinking_on (those that have the prompt of
        thinking on), opening_replies (no prompt exists), straddling_tokens; empty_replies (nothing but an end of turn
        was rendered: not trained); texts; unaligned (mask `all`, and the replies cannot be found).

        Raises DataError as `render` does.
        """
        if not conversation.messages:
            return [self._encode_text(conversation)]
        if mask == "all" and not self._can_align(conversation):
            return [self._encode_unaligned(conversation)]
        rendered = self.render(conversation)
        chosen = select_replies(conversation.messages, mask)
        if self.thinking != "empty-masked" or not self.supports_thinking or mask == "all":
            return [self._encode_rendered(conversation, rendered, chosen, mask)]
        return self._encode_as_served(conversation, rendered, chosen)

    def _encode_as_served(
        self, conversation: Conversation, rendered: RenderedConversation, chosen: list[int]
    ) -> list[EncodedSample]:
        together = [
            reply.message_index
            for reply in rendered.replies
            if reply.message_index in chosen and reply.matches_serving is not False
        ]
        alone = [index for index in chosen if index not in together]
        samples: list[tuple[int, EncodedSample]] = []
        for index in alone:
            part = replace(conversation, messages=conversation.messages[: index + 1])
            samples.append((index, self._encode_rendered(part, self.render(part), [index], "assistant")))
        if together or not alone:
            last = together[-1] if together else -1
            samples.append((last, self._encode_rendered(conversation, rendered, together, "assistant")))
        return [sample for _, sample in sorted(samples, key=lambda pair: pair[0])]

    def _encode_rendered(
        self, conversation: Conversation, rendered: RenderedConversation, chosen: list[int], mask: Mask
    ) -> EncodedSample:
        tokens = tokenize_text(self.tokenizer.hf, rendered.text)
        counts: Counter[str] = Counter()
        trained: list[slice] = []
        untrained: list[slice] = []
        reply_ends: list[int] = []
        for reply in rendered.replies:
            part, num_straddling = tokens_inside(tokens, reply.start, reply.end)
            is_empty = self._end_of_turn.fullmatch(rendered.text, reply.start, reply.end) is not None
            if reply.message_index in chosen and is_empty:
                counts["empty_replies"] += 1
            if reply.message_index not in chosen or is_empty:
                untrained.append(tokens_inside(tokens, reply.block_start, reply.end)[0])
                continue
            untrained.append(tokens_inside(tokens, reply.block_start, reply.start)[0])
            if not self._ends_well(reply, tokens, part):
                self._raise_no_end(reply.message_index, conversation)
            trained.append(part)
            reply_ends.append(part.stop - 1)
            counts.update(self._count_reply(rendered.text, tokens, reply, part, num_straddling))
        labelled = invert(untrained, len(tokens.ids)) if mask == "all" else trained
        return EncodedSample(
            sample=build_sample(tokens.ids, labelled),
            text=rendered.text,
            reply_ends=tuple(reply_ends),
            counts=+counts,
            origin=conversation.origin,
            source=conversation.source,
        )

    def _ends_well(self, reply: RenderedReply, tokens: TokenizedText, part: slice) -> bool:
        """Whether the last trained token of the reply is an end-of-turn token."""
        return (
            reply.has_end_of_turn
            and part.stop > part.start
            and int(tokens.ids[part.stop - 1]) in self.tokenizer.end_of_turn_ids
        )

    def _count_reply(
        self, text: str, tokens: TokenizedText, reply: RenderedReply, part: slice, num_straddling: int
    ) -> Counter[str]:
        names = {"reasoning": "reasoning", "empty": "empty_think", "none": "no_think"}
        matches = reply.matches_serving is not False and self._prompt_ids_agree(text, tokens, reply.start, part.start)
        return Counter(
            {
                "trained_replies": 1,
                "ends_of_turn": 1,
                names[reply.thinking]: 1,
                "lost_reasoning": int(reply.lost_reasoning),
                "prefix_mismatches": int(not matches),
                "prompt_thinking_on": int(matches and self.supports_thinking and reply.thinking != "empty"),
                "opening_replies": int(reply.matches_serving is None),
                "straddling_tokens": num_straddling,
            }
        )

    def _prompt_ids_agree(self, text: str, tokens: TokenizedText, border: int, first: int) -> bool:
        """Whether tokenising only the text before the border gives the same ids as tokenising the whole.

        A special token cuts the text for the tokenizer, so that the stretch since the last one is enough to look at.
        """
        start = first
        while start > 0 and int(tokens.ids[start - 1]) not in self._special_ids:
            start -= 1
        start = max(start - 1, 0)
        segment = text[int(tokens.starts[start]) : border] if first > 0 else text[:border]
        expected = self._segment_ids.get(segment)
        if expected is None:
            expected = tuple(int(i) for i in tokenize_text(self.tokenizer.hf, segment).ids) if segment else ()
            if len(self._segment_ids) < 256:
                self._segment_ids[segment] = expected
        return expected == tuple(int(i) for i in tokens.ids[start:first])

    def _can_align(self, conversation: Conversation) -> bool:
        """For mask `all`, a template that cannot be aligned is no obstacle: only empty think blocks matter."""
        try:
            self.render(conversation)
        except DataError as error:
            if error.code == "template-not-alignable":
                return False
            raise
        return True

    def _encode_unaligned(self, conversation: Conversation) -> EncodedSample:
        messages = self.template_messages(conversation.messages)
        text = self._apply(messages, conversation.tools, conversation)
        tokens = tokenize_text(self.tokenizer.hf, text)
        blocks = [tokens_inside(tokens, match.start(), match.end())[0] for match in _EMPTY_THINK.finditer(text)]
        sample = build_sample(tokens.ids, invert(blocks, len(tokens.ids)))
        ends = tuple(i for i, token in enumerate(tokens.ids.tolist()) if token in self.tokenizer.end_of_turn_ids)
        counts = Counter({"unaligned": 1})
        return EncodedSample(sample, text, ends, counts, conversation.origin, conversation.source)

    def _encode_text(self, conversation: Conversation) -> EncodedSample:
        """Plain text: the tokenizer's own opening token if it has one, the text, the end token; all supervised."""
        text = conversation.text or ""
        if (match := self._control.search(text)) is not None:
            self._raise_control_token(match.group(), "the text", conversation)
        ids = tokenize_text(self.tokenizer.hf, text, add_special_tokens=True).ids
        if not len(ids) or int(ids[-1]) != self.tokenizer.eos_id:
            ids = _append(ids, self.tokenizer.eos_id)
        sample = build_sample(ids, [slice(0, len(ids))])
        counts = Counter({"texts": 1})
        return EncodedSample(sample, text, (len(ids) - 1,), counts, conversation.origin, conversation.source)

    # What serving builds

    def prompt_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        enable_thinking: bool | None = None,
    ) -> list[int]:
        """The ids that serving sends for these messages: rendered with the template, with its generation prompt.

        enable_thinking: None means as trained: off after `strip` and `empty-masked`, the template's default after
        `keep` (see PreparedData.enable_thinking for what the data says).
        """
        conversation = Conversation(messages=tuple(messages), tools=tuple(dict(tool) for tool in tools))
        self._require_template(conversation)
        self._refuse_control_tokens(conversation)
        if enable_thinking is None and self.thinking != "keep" and self.supports_thinking:
            enable_thinking = False
        options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        text = self._apply(
            self.template_messages(messages), tools, conversation, add_generation_prompt=True, options=options
        )
        return [int(i) for i in tokenize_text(self.tokenizer.hf, text).ids]

    # The contract

    def contract(self, *, enable_thinking: bool | None = None) -> dict[str, Any]:
        """What must be the same wherever the adapter is used, ready for JSON.

        enable_thinking: how the trained prompts were laid out, when the data decides it
        """
        if enable_thinking is None and self.thinking != "keep" and self.supports_thinking:
            enable_thinking = False
        contract: dict[str, Any] = {
            "version": CONTRACT_VERSION,
            "template_sha256": hashlib.sha256(self.tokenizer.template_text.encode()).hexdigest(),
            "tokenizer_sha256": self.tokenizer.fingerprint,
            "special_tokens": self.tokenizer.special_tokens(),
            "thinking": self.thinking,
            "system_prompt": self.system_prompt,
            "enable_thinking": enable_thinking,
        }
        contract["fingerprint"] = self.fingerprint
        return contract

    @property
    def fingerprint(self) -> str:
        """sha256 over template, special tokens, segmentation, thinking mode and system prompt."""
        parts = [
            self.tokenizer.template_text,
            self.tokenizer.fingerprint,
            json.dumps(self.tokenizer.special_tokens(), sort_keys=True),
            self.thinking,
            json.dumps(self.system_prompt),
        ]
        return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


_CONTRACT_NAMES = {
    "template_sha256": "the chat template",
    "special_tokens": "the special tokens",
    "tokenizer_sha256": "the tokenizer (vocabulary or segmentation)",
    "thinking": "the thinking mode",
    "system_prompt": "the system prompt",
    "enable_thinking": "thinking on or off in the prompt",
}


def check_contract(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Does nothing when both contracts agree; otherwise raises DataError `template-contract-broken`.

    The error names everything that differs, with both values. A value that one side does not know (None for
    `enable_thinking`) is no difference.
    """
    different = [key for key in _CONTRACT_NAMES if _differs(key, saved.get(key), current.get(key))]
    if "template_sha256" in different and "tokenizer_sha256" in different:
        different.remove("tokenizer_sha256")  # it covers the template, hence says nothing more
    differences = [
        f"{_CONTRACT_NAMES[key]} ({_shorten(saved.get(key))} when trained, {_shorten(current.get(key))} now)"
        for key in different
    ]
    if differences:
        raise DataError(
            "template-contract-broken",
            f"this is not the layout that the adapter was trained with: {'; '.join(differences)}",
            why="the model would be asked with other tokens than it has learnt from, and silently answer worse",
            fix="put the model's tokenizer and chat template back as they were when it was trained, and use the "
            "data.thinking and data.system_prompt of its run; or train again",
        )


def _differs(key: str, saved: object, current: object) -> bool:
    if key == "enable_thinking" and (saved is None or current is None):
        return False
    # Contracts come back from JSON, where tuples are lists.
    return json.dumps(saved, sort_keys=True) != json.dumps(current, sort_keys=True)


def _shorten(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text[:12] + "…" if re.fullmatch(r"[0-9a-f]{64}", text) else text[:80]


def _without_reasoning(message: Message) -> Message:
    if message.role != "assistant":
        return message
    content = _INLINE_THINK.sub("", message.content)
    # Replies recorded from models whose prompt already opens the block begin inside it; templates cut there as well.
    before, closing, after = content.rpartition("</think>")
    return replace(message, reasoning=None, content=after.lstrip() if closing else before + after)


def _texts_of(message: Message) -> list[str]:
    texts = [message.content, message.reasoning or "", message.name or ""]
    for call in message.tool_calls:
        texts += [call.name, json.dumps(call.arguments, ensure_ascii=False)]
    return texts


def _append(ids: Any, token_id: int) -> Any:
    import numpy as np

    return np.append(ids, np.int32(token_id)).astype(np.int32)


def _text_between(text: str | None, first: str, second: str) -> str | None:
    """What stands between the first `first` and the next `second`; None where they are not there in this order."""
    _, found_first, rest = (text or "").partition(first)
    between, found_second, _ = rest.partition(second)
    return between if found_first and found_second else None


def _suffix(text: str | None, prefix: str) -> str:
    return text[len(prefix) :] if text is not None and text.startswith(prefix) else ""


def _shared_prefix(first: str, second: str) -> str:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return first[:length]


def _where(conversation: Conversation) -> Location | None:
    """`file:line` of a record as a Location."""
    if not conversation.origin:
        return None
    path, _, line = conversation.origin.rpartition(":")
    return Location(path, int(line)) if path and line.isdigit() else Location(conversation.origin)


__all__ = [
    "ChatTemplate",
    "EncodedSample",
    "RenderedConversation",
    "RenderedReply",
    "Thinking",
    "check_contract",
]
