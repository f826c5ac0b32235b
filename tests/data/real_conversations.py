"""Conversations of the real data sets, built here by hand so that these tests do not depend on the format readers."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from affina.data.messages import Conversation, Message, ToolCall


def _lines(path: Path) -> Iterator[Any]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def gsm8k(folder: Path) -> Iterator[Conversation]:
    for number, record in enumerate(_lines(folder / "train.jsonl.gz"), 1):
        yield Conversation(
            (Message("user", record["question"]), Message("assistant", record["answer"])), origin=f"gsm8k:{number}"
        )


def dolly_6400(folder: Path) -> Iterator[Conversation]:
    for number, record in enumerate(_lines(folder / "dolly_6400.jsonl.gz"), 1):
        yield Conversation(
            (Message("user", record["instruction"]), Message("assistant", record["response"])),
            origin=f"dolly:{number}",
        )


def taskmaster4(folder: Path) -> Iterator[Conversation]:
    """Dialogues with their API calls as tool calls and tool results, which stand before the agent's sentence."""
    for number, record in enumerate(_lines(folder / "dialogs.jsonl.gz"), 1):
        messages: list[Message] = []
        for utterance in record["utterances"]:
            calls = list(_api_calls(utterance.get("annotations") or []))
            if utterance["speaker"] == "user":
                messages.append(Message("user", utterance["text"]))
            for name, arguments, response in calls:
                messages.append(Message("assistant", "", tool_calls=(ToolCall(name, arguments),)))
                messages.append(Message("tool", response, name=name))
            if utterance["speaker"] != "user" and utterance["text"]:
                messages.append(Message("assistant", utterance["text"]))
        tools = ({"type": "function", "function": {"name": "get_menu_items", "parameters": {"type": "object"}}},)
        yield Conversation(tuple(messages), tools=tools, origin=f"taskmaster4:{number}")


def _api_calls(annotations: list[dict[str, str]]) -> Iterator[tuple[str, dict[str, Any], str]]:
    contexts: dict[str, dict[str, str]] = {}
    for annotation in annotations:
        contexts.setdefault(annotation["context"], {})[annotation["name"]] = annotation["value"]
    for context, values in contexts.items():
        if "api_call" not in values:
            continue
        response = contexts.get(context.replace("call", "response"), {}).get("response", "{}")
        try:
            arguments = json.loads(values.get("request", "{}"))
        except json.JSONDecodeError:
            arguments = {"request": values["request"]}
        yield values["api_call"], arguments if isinstance(arguments, dict) else {"value": arguments}, response


def oasst_en100(folder: Path) -> Iterator[Conversation]:
    """Every path from a tree's prompt to an assistant's leaf."""

    def paths(node: dict[str, Any], before: tuple[Message, ...]) -> Iterator[tuple[Message, ...]]:
        here = (*before, Message("user" if node["role"] == "prompter" else "assistant", node["text"]))
        if not node["replies"] and here[-1].role == "assistant":
            yield here
        for reply in node["replies"]:
            yield from paths(reply, here)

    for number, record in enumerate(_lines(folder / "en_100_tree.jsonl.gz"), 1):
        for messages in paths(record["prompt"], ()):
            yield Conversation(messages, origin=f"oasst:{number}")


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


def llamafactory_demos(folder: Path) -> Iterator[Conversation]:
    for name in ("glaive_toolcall_en_demo", "glaive_toolcall_zh_demo"):
        with gzip.open(folder / f"{name}.json.gz", "rt", encoding="utf-8") as stream:
            records = json.load(stream)
        for number, record in enumerate(records, 1):
            messages = tuple(_sharegpt(turn) for turn in record["conversations"])
            tools = tuple({"type": "function", "function": tool} for tool in json.loads(record["tools"] or "[]"))
            yield Conversation(messages, tools=tools, origin=f"{name}:{number}")
    for name in ("alpaca_en_demo", "alpaca_zh_demo"):
        with gzip.open(folder / f"{name}.json.gz", "rt", encoding="utf-8") as stream:
            records = json.load(stream)
        for number, record in enumerate(records, 1):
            question = record["instruction"] + (f"\n{record['input']}" if record["input"] else "")
            yield Conversation(
                (Message("user", question), Message("assistant", record["output"])), origin=f"{name}:{number}"
            )
    for name in ("v1_sft_demo", "reason_tool_use_demo"):
        for number, record in enumerate(_lines(folder / f"{name}.jsonl.gz"), 1):
            yield _parts_conversation(record, f"{name}:{number}")


def _sharegpt(turn: dict[str, str]) -> Message:
    if turn["from"] == "function_call":
        call = json.loads(turn["value"])
        return Message("assistant", "", tool_calls=(ToolCall(call["name"], call["arguments"]),))
    return Message(_SHAREGPT_ROLES[turn["from"]], turn["value"])  # type: ignore[arg-type]


def _parts_conversation(record: dict[str, Any], origin: str) -> Conversation:
    messages: list[Message] = []
    tools: tuple[dict[str, Any], ...] = ()
    for message in record["messages"]:
        parts: dict[str, list[str]] = {}
        for part in message["content"]:
            parts.setdefault(part["type"], []).append(part["value"])
        tools += tuple(_tool(tool) for text in parts.get("tools", []) for tool in json.loads(text))
        calls = tuple(
            call for kind in ("tool_call", "tool_calls") for text in parts.get(kind, []) for call in _calls(text)
        )
        reasoning = "\n".join(parts["reasoning"]) if "reasoning" in parts else None
        messages.append(
            Message(
                message["role"],
                "\n".join(parts.get("text", [])),
                reasoning=reasoning,
                tool_calls=calls,
                train=message.get("loss_weight", 1.0) > 0,
            )
        )
    return Conversation(tuple(messages), tools=tools, origin=origin)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return tool if "function" in tool else {"type": "function", "function": tool}


def _calls(text: str) -> Iterator[ToolCall]:
    value = json.loads(text)
    for call in value if isinstance(value, list) else [value]:
        arguments = call.get("arguments", {})
        yield ToolCall(call["name"], arguments if isinstance(arguments, dict) else json.loads(arguments))


LOADERS: dict[str, Callable[[Path], Iterator[Conversation]]] = {
    "gsm8k": gsm8k,
    "dolly_6400": dolly_6400,
    "taskmaster4": taskmaster4,
    "oasst_en100": oasst_en100,
    "llamafactory_demos": llamafactory_demos,
}

_REPLY = re.compile(r"<\|im_start\|>assistant\n((?:.(?!<\|im_start\|>))*?<\|im_end\|>)", re.DOTALL)
_EMPTY_BLOCK = re.compile(r"\A<think>\n\n</think>\n\n")


def chatml_replies(text: str) -> list[str]:
    """An oracle of its own: in ChatML without control tokens in the content, replies can be read off the text."""
    return [_EMPTY_BLOCK.sub("", reply) for reply in _REPLY.findall(text)]
