"""Formats: what is written in any of them is read back equal, and what is not understood says what to write instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.data.formats import ROLE_NAMES, Columns, detect_format, lookup, to_conversation
from affina.data.messages import Conversation, Message, ToolCall
from affina.data.records import RawRecord
from affina.data.validation import ConversationStream, SourceSpec, read_conversations, validate_conversation
from affina.errors import DataError, Location

HERE = Location("data.jsonl", 3)


def convert(record: dict[str, Any], format: Any = "auto", **columns: str) -> Conversation:
    detected = detect_format([record], format=format, columns=Columns(**columns), where=Location("data.jsonl"))
    return to_conversation(RawRecord(record, HERE, 0), detected)


def messages(record: dict[str, Any], format: Any = "auto", **columns: str) -> tuple[Message, ...]:
    return convert(record, format, **columns).messages


def chat(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


USER = {"role": "user", "content": "ciao"}

# Round trips ---------------------------------------------------------------------------------------------------------

# Anything but think tags, which have their own tests.
texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda text: "think>" not in text
)
json_values = st.recursive(st.none() | st.booleans() | st.integers() | texts, st.lists, max_leaves=4)
arguments = st.dictionaries(texts, json_values, max_size=3)
names = st.from_regex(r"[a-z_]{1,10}", fullmatch=True)


@st.composite
def conversations(draw: st.DrawFn, *, tools: bool) -> Conversation:
    turns: list[Message] = []
    if draw(st.booleans()):
        turns.append(Message("system", draw(texts)))
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Message("user", draw(texts)))
        if tools and draw(st.booleans()):
            calls = draw(st.lists(st.builds(ToolCall, names, arguments, st.none() | names), min_size=1, max_size=2))
            turns.append(Message("assistant", draw(st.just("") | texts), tool_calls=tuple(calls)))
            turns += [
                Message("tool", draw(texts), tool_call_id=call.id, name=draw(st.none() | names)) for call in calls
            ]
        reasoning = draw(st.none() | texts) if tools else None
        turns.append(
            Message("assistant", draw(texts), reasoning=reasoning, train=draw(st.booleans()) if tools else True)
        )
    return Conversation(messages=tuple(turns))


def as_messages(conversation: Conversation, *, as_parts: bool, arguments_as_text: bool) -> dict[str, Any]:
    turns = []
    for message in conversation.messages:
        content: Any = message.content
        if as_parts:
            content = [{"type": "text", "text": message.content}]
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if message.reasoning is not None:
            turn["reasoning_content"] = message.reasoning
        if message.tool_calls:
            turn["content"] = content if message.content else None
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(call.arguments) if arguments_as_text else call.arguments,
                    },
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            turn["name"] = message.name
        if not message.train:
            turn["weight"] = 0
        turns.append(turn)
    return {"messages": turns}


def without_origin(conversation: Conversation) -> Conversation:
    return replace(conversation, origin="", group=None)


@given(conversations(tools=True), st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_messages_are_read_back_equal(conversation: Conversation, as_parts: bool, arguments_as_text: bool) -> None:
    record = as_messages(conversation, as_parts=as_parts, arguments_as_text=arguments_as_text)
    assert without_origin(convert(record)) == conversation
    as_string = {"messages": json.dumps(record["messages"])}  # as a CSV cell has it
    assert without_origin(convert(as_string)) == conversation


@given(conversations(tools=False))
@settings(max_examples=60, deadline=None)
def test_sharegpt_is_read_back_equal(conversation: Conversation) -> None:
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    record = {"conversations": [{"from": speakers[m.role], "value": m.content} for m in conversation.messages]}
    assert detect_format([record]).format == "sharegpt"
    assert without_origin(convert(record)) == conversation


@given(conversations(tools=False))
@settings(max_examples=60, deadline=None)
def test_alpaca_with_system_and_history_is_read_back_equal(conversation: Conversation) -> None:
    turns = [message.content for message in conversation.messages if message.role != "system"]
    record: dict[str, Any] = {
        "instruction": turns[-2],
        "input": "",
        "output": turns[-1],
        "history": [list(pair) for pair in zip(turns[:-2:2], turns[1:-2:2], strict=True)],
    }
    if conversation.messages[0].role == "system":
        record["system"] = conversation.messages[0].content
    assert detect_format([record]).format == "alpaca"
    assert without_origin(convert(record)) == conversation


@given(texts, texts)
@settings(max_examples=40, deadline=None)
def test_prompt_and_completion_are_read_back_equal_under_all_their_names(prompt: str, completion: str) -> None:
    wanted = (Message("user", prompt), Message("assistant", completion))
    for ask, answer in [("prompt", "completion"), ("question", "answer"), ("prompt", "response"), ("input", "output")]:
        assert messages({ask: prompt, answer: completion}) == wanted


# Messages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ROLE_NAMES))
def test_every_role_name_is_understood_in_any_case(name: str) -> None:
    if ROLE_NAMES[name] == "assistant" and name == "function_call":
        return
    record = chat({"role": name.upper(), "content": "x"})
    assert messages(record)[0].role == ROLE_NAMES[name]


def test_an_unknown_role_names_the_message_and_the_known_ones() -> None:
    with pytest.raises(
        DataError, match=r"message 2 has the role 'narrator'(.|\n)*system, user, assistant or tool"
    ) as caught:
        messages(chat(USER, {"role": "narrator", "content": "x"}))
    assert caught.value.where == HERE


def test_legacy_function_calls_and_results_are_understood() -> None:
    turns = messages(
        chat(
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "meteo", "arguments": '{"city": "Roma"}'}},
            {"role": "function", "name": "meteo", "content": "sole"},
        )
    )
    assert turns[1] == Message("assistant", "", tool_calls=(ToolCall("meteo", {"city": "Roma"}),))
    assert turns[2] == Message("tool", "sole", name="meteo")


@pytest.mark.parametrize("arguments", ['{"a": 1', "[1]", 7, '{"a": NaN}', '{"a": 1, "a": 2}'])
def test_broken_tool_arguments_are_refused(arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "somma", "arguments": arguments}}
    with pytest.raises(DataError, match=r"the arguments of somma in message 2"):
        messages(chat(USER, {"role": "assistant", "content": None, "tool_calls": [call]}))


def test_a_call_without_arguments_has_an_empty_object() -> None:
    for arguments in (None, "", {}, "{}"):
        call = {"function": {"name": "ora", "arguments": arguments}}
        turns = messages(chat(USER, {"role": "assistant", "content": "", "tool_calls": [call]}))
        assert turns[1].tool_calls == (ToolCall("ora", {}),)


@pytest.mark.parametrize("call", [{}, {"function": {}}, {"function": {"name": ""}}, "somma", {"name": 3}])
def test_a_call_without_a_name_is_refused(call: Any) -> None:
    with pytest.raises(DataError, match="tool call without a function name"):
        messages(chat(USER, {"role": "assistant", "content": "", "tool_calls": [call]}))


def test_only_replies_may_call_tools() -> None:
    with pytest.raises(DataError, match="message 1 has tool calls and the role user"):
        messages(chat({"role": "user", "content": "", "tool_calls": [{"name": "x"}]}))


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio"}, {"text": "no type"}, 5]
)
def test_parts_that_are_not_text_are_refused_with_the_reason(part: Any) -> None:
    with pytest.raises(DataError, match=r"message 1 has a part of type") as caught:
        messages(chat({"role": "user", "content": [{"type": "text", "text": "look"}, part]}))
    assert caught.value.code == "unsupported-content"


def test_images_beside_the_messages_are_refused() -> None:
    with pytest.raises(DataError, match=r'the record has "images"(.|\n)*cannot read images'):
        convert({**chat(USER), "images": ["a.png"]})
    assert convert({**chat(USER), "images": []}).messages


@pytest.mark.parametrize(
    ("extra", "train"),
    [
        *[({"weight": 0}, False), ({"weight": 1}, True), ({"weight": 1.0}, True), ({"train": False}, False)],
        *[({"train": True}, True), ({"loss_weight": 0.0}, False), ({}, True), ({"weight": None}, True)],
    ],
)
def test_weight_and_train_decide_whether_a_message_is_trained(extra: dict[str, Any], train: bool) -> None:
    assert messages(chat(USER, {"role": "assistant", "content": "x", **extra}))[1].train is train


@pytest.mark.parametrize("extra", [{"weight": 0.5}, {"weight": "1"}, {"train": "yes"}, {"weight": [1]}])
def test_other_weights_are_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"message 2 has (weight|train)(.|\n)*use 1 \(train on it\) or 0"):
        messages(chat(USER, {"role": "assistant", "content": "x", **extra}))


def test_weight_and_train_may_not_contradict_each_other() -> None:
    with pytest.raises(DataError, match="contradict each other"):
        messages(chat(USER, {"role": "assistant", "content": "x", "weight": 0, "train": True}))


def test_messages_that_are_no_list_of_objects_are_refused() -> None:
    for value in (["ciao"], 7, "[1]", '["x"]'):
        with pytest.raises(DataError) as caught:
            messages({"messages": value}, "messages", role="role", content="content")
        assert caught.value.code in ("bad-messages", "bad-nested-json")


# Reasoning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reasoning", "reply"),
    [
        ("<think>\nconto\n</think>\n\n42", "conto", "42"),
        ("<think>conto</think>42", "conto", "42"),
        ("\n<think>\nuno\n\ndue\n</think>\n42\n", "uno\n\ndue", "42\n"),
        ("<think>\n\n</think>\n\n42", "", "42"),
        ("nessun pensiero", None, "nessun pensiero"),
    ],
)
def test_a_think_block_becomes_reasoning(content: str, reasoning: str | None, reply: str) -> None:
    for record in (
        chat(USER, {"role": "assistant", "content": content}),
        {"prompt": "ciao", "completion": content},
        {"conversations": [{"from": "human", "value": "ciao"}, {"from": "gpt", "value": content}]},
    ):
        assert messages(record)[1] == Message("assistant", reply, reasoning=reasoning)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("<think>\nnever closed", "never closed"),
        ("reasoning</think>42", "without <think>"),
        ("<think>a</think>b<think>c</think>d", "2 <think> blocks"),
        ("Prima. <think>a</think> Dopo.", "not at its start"),
        ("</think>a<think>", "not at its start"),
    ],
)
def test_a_malformed_think_block_is_an_error_with_its_place(content: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        messages(chat(USER, {"role": "assistant", "content": content}))
    assert caught.value.where == HERE
    assert "message 2" in caught.value.what


def test_a_user_may_write_think_tags() -> None:
    assert messages(chat({"role": "user", "content": "what does <think> do?"}))[0].reasoning is None


def test_reasoning_in_two_places_is_refused() -> None:
    with pytest.raises(DataError, match="reasoning in a field of its own and a <think> block"):
        messages(chat(USER, {"role": "assistant", "content": "<think>a</think>b", "reasoning_content": "c"}))


# Tools, system, group ------------------------------------------------------------------------------------------------

FUNCTION = {"name": "meteo", "description": "Il tempo", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize("tools", [[TOOL], [FUNCTION], json.dumps([TOOL]), json.dumps([FUNCTION]), TOOL])
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tool_definitions_are_read_in_all_their_spellings(tools: Any, column: str) -> None:
    assert convert({**chat(USER), column: tools}).tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools_are_no_tools(tools: Any) -> None:
    assert convert({**chat(USER), "tools": tools}).tools == ()


def test_a_tool_without_a_name_is_refused() -> None:
    with pytest.raises(DataError, match="a tool definition has no name"):
        convert({**chat(USER), "tools": [{"type": "function", "function": {}}]})


def test_a_system_column_goes_in_front_unless_it_is_there_already() -> None:
    system = {"role": "system", "content": "Sii breve."}
    wanted = (Message("system", "Sii breve."), Message("user", "ciao"))
    assert messages({**chat(USER), "system": "Sii breve."}) == wanted
    assert messages({**chat(system, USER), "system": "Sii breve."}) == wanted
    assert messages({**chat(USER), "system": ""}) == wanted[1:]
    with pytest.raises(DataError, match="a system message and another system prompt"):
        messages({**chat(system, USER), "system": "Sii lungo."})


@pytest.mark.parametrize("column", ["group", "conversation_id", "document_id", "message_tree_id"])
def test_the_group_is_taken_from_a_column_or_an_id(column: str) -> None:
    assert convert({**chat(USER), column: 17}).group == "17"
    assert convert({**chat(USER), "customer": "acme", column: 17}, group="customer").group == "acme"
    assert convert(chat(USER)).group is None


def test_the_origin_is_the_place_of_the_record() -> None:
    assert convert(chat(USER)).origin == "data.jsonl:3"


# Alpaca, prompt and completion, text ---------------------------------------------------------------------------------


def test_the_input_of_an_instruction_follows_it() -> None:
    assert messages({"instruction": "Traduci", "input": "Hello", "output": "Ciao"}) == (
        Message("user", "Traduci\n\nHello"),
        Message("assistant", "Ciao"),
    )


def test_only_the_completion_of_a_conversational_prompt_is_trained() -> None:
    record = {
        "prompt": [USER, {"role": "assistant", "content": "salve"}, {"role": "user", "content": "come va?"}],
        "completion": [{"role": "assistant", "content": "bene"}],
    }
    assert detect_format([record]).format == "prompt_completion"
    assert [message.train for message in messages(record) if message.role == "assistant"] == [False, True]
    mixed = {"prompt": record["prompt"], "completion": "bene"}
    assert messages(mixed) == messages(record)


def test_numbers_are_written_as_text_and_lists_are_refused_with_a_path() -> None:
    assert messages({"question": "6·7?", "answer": 42})[1].content == "42"
    with pytest.raises(DataError, match=r"is a list, not text(.|\n)*columns: \{completion: answer\.0\}"):
        messages({"question": "chi?", "answer": ["io", "tu"]})


def test_a_record_without_the_completion_says_what_it_has() -> None:
    detected = detect_format([{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r'no "completion" \(the completion\); it has prompt, note'):
        to_conversation(RawRecord({"prompt": "a", "note": "x"}, HERE, 0), detected)


def test_plain_text_has_no_messages() -> None:
    assert convert({"text": "C'era una volta"}).text == "C'era una volta"
    assert convert({"text": "C'era una volta"}).messages == ()


# Mapping and detection -----------------------------------------------------------------------------------------------


def test_dotted_paths_reach_into_objects_and_lists() -> None:
    record = {"a": {"b": [{"c": 1}, {"c": 2}]}, "x.y": 3}
    assert lookup(record, "a.b.1.c") == 2
    assert lookup(record, "a.b.-1.c") == 2
    assert lookup(record, "x.y") == 3
    for path in ("a.b.2.c", "a.z", "a.b.c", "q"):
        assert repr(lookup(record, path)) == "nothing"


def test_columns_are_mapped_without_code() -> None:
    record = {"ask": {"text": "domanda"}, "replies": [{"text": "risposta"}], "who": "x"}
    assert messages(record, prompt="ask.text", completion="replies.0.text") == (
        Message("user", "domanda"),
        Message("assistant", "risposta"),
    )
    turns = {"log": [{"speaker": "customer", "says": "ciao"}, {"speaker": "agent", "says": "salve"}]}
    assert [m.role for m in messages(turns, messages="log", role="speaker", content="says")] == ["user", "assistant"]


def test_what_was_recognised_is_told_with_the_columns_that_are_not_read() -> None:
    detected = detect_format([{"question": "a", "answer": "b", "score": 1}])
    assert detected.why == '"question" is the prompt and "answer" the reply; not read: score'


def test_a_mapped_column_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        DataError, match=r'unknown-column\]: columns\.prompt names "qestion"(.|\n)*did you mean question\?'
    ):
        convert({"question": "a", "reply_text": "b"}, prompt="qestion")


@pytest.mark.parametrize(
    ("record", "suggestion"),
    [
        ({"id": 1, "domanda": "a", "risposta": "b"}, "columns: {prompt: domanda, completion: risposta}"),
        ({"question": "a", "replies": ["b"]}, "columns: {prompt: question, completion: replies.0}"),
        (
            {"utterances": [{"speaker": "user", "text": "a"}, {"speaker": "assistant", "text": "b"}]},
            "columns: {messages: utterances, role: speaker, content: text}",
        ),
        ({"column_1": "What is it?", "column_2": "x"}, "columns: {prompt: column_1, completion: column_2}"),
        ({"question": [[{"role": "user", "content": "a"}]], "id": "x"}, "columns: {messages: question.0}"),
        ({"story": "once"}, "columns: {text: story}"),
    ],
)
def test_unknown_columns_list_what_each_format_wants_and_the_nearest_mapping(
    record: dict[str, Any], suggestion: str
) -> None:
    with pytest.raises(DataError) as caught:
        detect_format([record])
    assert caught.value.code == "unknown-format"
    assert all(name in caught.value.what for name in record)
    assert all(name in str(caught.value.why) for name in ("messages:", "sharegpt:", "alpaca:", "prompt_completion:"))
    assert suggestion in str(caught.value.fix)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "a", "question": "b", "answer": "c"}, 'both "prompt" and "question" could be the prompt'),
        ({"question": "a", "answer": "b", "solution": "c"}, 'both "answer" and "solution" could be the completion'),
        (
            {"messages": [USER], "conversations": [{"from": "human", "value": "a"}]},
            '"messages", "conversations" are all lists of turns',
        ),
    ],
)
def test_more_than_one_reading_is_an_error_that_says_how_to_choose(record: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        detect_format([record])
    assert caught.value.code == "ambiguous-format"
    assert says in caught.value.what
    assert "columns: {" in str(caught.value.fix)


def test_messages_win_over_other_columns() -> None:
    record = {"prompt": "a", "prompt_id": "x", **chat(USER, {"role": "assistant", "content": "b"})}
    assert detect_format([record]).format == "messages"


@pytest.mark.parametrize(
    ("record", "fix"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "columns: {prompt: prompt, completion: chosen}"),
        (
            {
                "conversations": [{"from": "human", "value": "a"}],
                "chosen": {"from": "gpt", "value": "b"},
                "rejected": "c",
            },
            "columns: {prompt: conversations, completion: chosen}",
        ),
        ({"chosen": [USER], "rejected": [USER]}, "columns: {messages: chosen}"),
    ],
)
def test_preference_pairs_are_not_trained_on_by_accident(record: dict[str, Any], fix: str) -> None:
    with pytest.raises(DataError, match="preference pairs") as caught:
        detect_format([record])
    assert caught.value.code == "preference-data"
    assert fix in str(caught.value.fix)


def test_turns_with_unknown_keys_get_a_mapping_proposed() -> None:
    record = {"log": [{"speaker": "user", "says": "ciao", "t": 1}]}
    with pytest.raises(DataError) as caught:
        convert(record, messages="log")
    assert caught.value.code == "unknown-turns"
    assert caught.value.what == 'the turns in "log" have the keys speaker, says, t'
    assert caught.value.fix == "map them: columns: {messages: log, role: speaker, content: says}"


def test_a_named_format_without_its_column_says_what_it_needs() -> None:
    with pytest.raises(
        DataError, match=r'missing-column\].*for the completion(.|\n)*alpaca needs "instruction", "output"'
    ):
        convert({"instruction": "a", "note": "b"}, "alpaca")
    with pytest.raises(
        DataError, match=r"no column for the text was found among instruction(.|\n)*columns: \{text: instruction\}"
    ):
        convert({"instruction": "a"}, "text")
    with pytest.raises(DataError, match=r"no column for the messages"):
        convert({"instruction": "a"}, "messages")


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "user", "gpt", "[", "{}", '[{"a":1}]'])
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("role", "content", "from", "value", "type", "text", "tool_calls", "function", "function_call"),
                    *("name", "arguments", "weight", "train", "reasoning", "id", "tool_call_id", "tools"),
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history"),
                *("system", "tools", "text", "group", "images"),
            ]
        ),
        anything,
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]),
)
@settings(max_examples=300, deadline=None)
def test_whatever_a_record_holds_it_is_a_conversation_or_an_explained_error(
    record: dict[str, Any], format: Any
) -> None:
    try:
        conversation = convert(record, format)
    except DataError:
        return  # anything else fails the test
    validate_conversation(conversation, HERE)


# Real data -----------------------------------------------------------------------------------------------------------


def read(path: Path, **columns: str) -> tuple[list[Conversation], ConversationStream]:
    stream = read_conversations([SourceSpec(path, columns=Columns(**columns))], on_error="skip")
    return list(stream), stream


@pytest.mark.parametrize(
    ("name", "columns", "format", "kept", "skipped", "repaired"),
    [
        ("gsm8k/train.jsonl.gz", {}, "prompt_completion", 7473, 0, 0),
        ("dolly_6400/dolly_6400.jsonl.gz", {}, "prompt_completion", 6400, 0, 0),
        (
            "taskmaster4/dialogs.jsonl.gz",
            {"messages": "utterances", "role": "speaker", "content": "text"},
            "messages",
            3710,
            0,
            75,
        ),
        (
            "oasst_en100/en_100_tree.jsonl.gz",
            {"prompt": "prompt.text", "completion": "prompt.replies.0.text"},
            "prompt_completion",
            100,
            0,
            0,
        ),
        ("tau_bench/gpt-4o-airline.jsonl.gz", {}, "messages", 200, 0, 200),
        (
            "flan_cot/aqua_train.tsv.gz",
            {"prompt": "column_1", "completion": "column_3"},
            "prompt_completion",
            2728,
            0,
            0,
        ),
        ("llamafactory_demos/alpaca_en_demo.json.gz", {}, "alpaca", 999, 0, 0),
        ("llamafactory_demos/alpaca_zh_demo.json.gz", {}, "alpaca", 1000, 0, 0),
        ("llamafactory_demos/identity.json", {}, "alpaca", 91, 0, 0),
        ("llamafactory_demos/c4_demo.jsonl.gz", {}, "text", 300, 0, 0),
        ("llamafactory_demos/wiki_demo.txt.gz", {}, "text", 1, 0, 0),
        ("llamafactory_demos/glaive_toolcall_en_demo.json.gz", {}, "sharegpt", 300, 0, 0),
        ("llamafactory_demos/glaive_toolcall_zh_demo.json.gz", {}, "sharegpt", 298, 2, 0),
        ("llamafactory_demos/v1_sft_demo.jsonl.gz", {}, "messages", 500, 0, 0),
        ("llamafactory_demos/reason_tool_use_demo.jsonl.gz", {}, "messages", 97, 3, 0),
        ("llamafactory_demos/kto_en_demo.json.gz", {}, "messages", 300, 0, 0),
        (
            "llamafactory_demos/dpo_en_demo.json.gz",
            {"prompt": "conversations", "completion": "chosen"},
            "prompt_completion",
            300,
            0,
            0,
        ),
        ("llamafactory_demos/v1_dpo_demo.jsonl", {"messages": "chosen_messages"}, "messages", 10, 0, 0),
    ],
)
def test_real_data_is_read_with_no_mapping_or_a_small_one(
    real_data_folder: Callable[[str], Path],
    name: str,
    columns: dict[str, str],
    format: str,
    kept: int,
    skipped: int,
    repaired: int,
) -> None:
    folder, _, rest = name.partition("/")
    found, stream = read(real_data_folder(folder) / rest, **columns)
    assert len(found) == kept
    assert (stream.problems.num_skipped, stream.problems.num_repaired) == (skipped, repaired)
    assert stream.sources[0].formats[0].startswith(f"{format}: ")


def test_real_tool_conversations_keep_their_calls_results_and_definitions(
    real_data_folder: Callable[[str], Path],
) -> None:
    found, _ = read(real_data_folder("llamafactory_demos") / "glaive_toolcall_en_demo.json.gz")
    calls = [call for c in found for m in c.messages for call in m.tool_calls]
    assert len(calls) == 211  # function_call turns in the file
    assert sum(m.role == "tool" for c in found for m in c.messages) == 211
    assert all(tool["type"] == "function" and tool["function"]["name"] for c in found for tool in c.tools)
    airline, _ = read(real_data_folder("tau_bench") / "gpt-4o-airline.jsonl.gz")
    assert sum(len(m.tool_calls) for c in airline for m in c.messages) == 1164
    reasoning, _ = read(real_data_folder("llamafactory_demos") / "reason_tool_use_demo.jsonl.gz")
    assert all(m.reasoning for c in reasoning for m in c.messages if m.role == "assistant")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("taskmaster4/dialogs.jsonl.gz", "columns: {messages: utterances, role: speaker, content: text}"),
        ("llamafactory_demos/dpo_zh_demo.json.gz", "columns: {prompt: conversations, completion: chosen}"),
        ("italian_tasks/squad_it_test.jsonl.gz", "columns: {prompt: question, completion: answers.0}"),
        ("flan_cot/creak_train.tsv.gz", "columns: {prompt: column_1, completion: column_2}"),
        ("bfcl_v4/BFCL_v4_multiple.json.gz", "columns: {messages: question.0}"),
        ("italian_tasks/ud_pud_it.jsonl.gz", "columns: {prompt: it, completion: en}"),
    ],
)
def test_real_data_in_no_known_format_gets_the_right_mapping_proposed(
    real_data_folder: Callable[[str], Path], name: str, fix: str
) -> None:
    folder, _, rest = name.partition("/")
    with pytest.raises(DataError) as caught:
        read(real_data_folder(folder) / rest)
    assert fix in str(caught.value.fix)
