"""The embedded model and data set: where they are, what they promise, and that their sources still make them."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen3ForCausalLM

from affina.catalog.embedded import (
    EmbeddedError,
    dataset_manifest,
    embedded_dataset_path,
    embedded_model_path,
)

TOOLS = Path(__file__).parents[2] / "tools" / "nano"
ENGLISH = (
    "It was a cold morning, and the old man walked slowly down the road to the village, "
    "where his brother had been waiting for him since the evening before."
)
ITALIAN = (
    "Era una mattina fredda, e il vecchio camminava lentamente per la strada verso il paese, "
    "dove suo fratello lo aspettava dalla sera prima."
)


@pytest.fixture(scope="module")
def folder() -> Path:
    path = embedded_model_path("affina/nano")
    assert path is not None
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tools() -> Any:
    """The modules of tools/nano, which ship with the source but not with the wheel."""
    if not TOOLS.exists():
        pytest.skip("tools/nano is not beside the tests (an installed package has none)")
    sys.path.insert(0, str(TOOLS))
    try:
        import build_tokenizer
        import chat
        import make_support
        import skills
        import tasks

        yield {"chat": chat, "tasks": tasks, "skills": skills, "support": make_support, "tokenizer": build_tokenizer}
    finally:
        sys.path.remove(str(TOOLS))


def records(split: str) -> list[list[dict[str, str]]]:
    path = embedded_dataset_path("affina/support", split)
    assert path is not None
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_name_outside_affina_is_left_to_others() -> None:
    assert embedded_model_path("Qwen/Qwen3-4B") is None
    assert embedded_model_path("./affina/nano") is None
    assert embedded_dataset_path("data/train.jsonl") is None


def test_the_embedded_files_exist() -> None:
    model, train, validation = (
        embedded_model_path("affina/nano"),
        embedded_dataset_path("affina/support"),
        embedded_dataset_path("affina/support", "validation"),
    )
    assert model is not None
    assert (model / "model.safetensors").is_file()
    assert train is not None
    assert (train.name, train.is_file()) == ("train.jsonl", True)
    assert validation is not None
    assert (validation.name, validation.is_file()) == ("validation.jsonl", True)


def test_an_unknown_embedded_model_names_the_known_one() -> None:
    with pytest.raises(EmbeddedError) as caught:
        embedded_model_path("affina/nanno")
    assert caught.value.code == "embedded-unknown"
    assert str(caught.value) == (
        'error[embedded-unknown]: affina has no embedded model "affina/nanno"\n'
        "  why: names that begin with affina/ ship with affina; the only model is affina/nano\n"
        "  fix: write affina/nano, or the path of a folder, or a hub id of another organisation"
    )


def test_asking_for_the_data_set_as_a_model_says_what_it_is() -> None:
    with pytest.raises(EmbeddedError, match="affina/support is a data set"):
        embedded_model_path("affina/support")
    with pytest.raises(EmbeddedError, match="affina/nano is a model"):
        embedded_dataset_path("affina/nano")


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(EmbeddedError, match='has no split "test"') as caught:
        embedded_dataset_path("affina/support", "test")
    assert "train, validation" in str(caught.value)


def test_finding_embedded_files_does_not_import_torch() -> None:
    code = (
        "import sys; from affina.catalog.embedded import *; embedded_model_path('affina/nano'); "
        "embedded_dataset_path('affina/support'); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- model ------------------------------------------------------------------------------------------------------------


def test_nano_is_a_small_qwen3_that_fits_the_wheel(folder: Path, model: PreTrainedModel) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert isinstance(model, Qwen3ForCausalLM)
    assert 5_000_000 <= parameters <= 12_000_000
    assert (folder / "model.safetensors").stat().st_size <= 2 * parameters + 20_000  # bf16 and a header
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 24_000_000
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_every_linear_dimension_of_nano_is_a_multiple_of_64(model: PreTrainedModel) -> None:
    shapes = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert shapes
    assert all(size % 64 == 0 for shape in shapes for size in shape)


def test_generation_stops_at_the_end_of_a_turn(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    stops = model.generation_config.eos_token_id
    assert isinstance(stops, list)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stops
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(("text", "limit"), [(ENGLISH, 100), (ITALIAN, 120)])
def test_nano_predicts_both_languages_far_better_than_chance(
    text: str, limit: float, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        trained = math.exp(model(input_ids=ids, labels=ids).loss.item())
        torch.manual_seed(0)
        untrained = math.exp(Qwen3ForCausalLM(model.config)(input_ids=ids, labels=ids).loss.item())
    # A uniform guess has perplexity 8,192; held-out books gave 33 and 39 when nano was made.
    assert trained < limit
    assert untrained > 4_000


@pytest.mark.slow
def test_nano_keeps_the_base_skills_of_its_log(
    folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, tools: Any
) -> None:
    skills = tools["skills"]
    items = [item for item in skills.read_items(folder / "skills.jsonl") if item["skill"] not in ("think", "remember")]
    some = items[::4]
    accuracy = skills.score(some, skills.generate_replies(model, tokenizer, some, max_new_tokens=64))
    logged = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))["final"]["skills"]["all"]
    assert logged >= 0.97
    assert accuracy["all"] >= 0.9  # of 52 items: rounding of bf16 weights may turn a few of them


def test_the_log_belongs_to_these_files(folder: Path) -> None:
    log = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))
    for key, name in (("tokenizer_sha256", "tokenizer.json"), ("skills_sha256", "skills.jsonl")):
        assert log[key] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert log["loss_curve"][0]["loss"] > log["loss_curve"][-1]["loss"]


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_the_vocabulary_has_8192_entries_and_qwen3s_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>"]
    specials += ["</tool_response>", "<think>", "</think>"]
    assert len(tokenizer) == 8192
    for token in specials:
        assert len(tokenizer(token)["input_ids"]) == 1


def test_padding_is_not_the_end_of_a_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_reasoning_stays_visible_when_special_tokens_are_skipped(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("<think>\nyes\n</think>\n\nno<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\nyes\n</think>\n\nno"


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=80))
@settings(max_examples=200, deadline=None)
def test_decoding_gives_back_any_text(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@given(digits=st.text("0123456789", min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_every_digit_is_a_token_of_its_own(digits: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize(digits) == list(digits)


# --- template ---------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Città"}}}


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def test_a_plain_exchange_renders_as_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    system = {"role": "system", "content": "Be brief."}
    assert rendered(tokenizer, [system, USER, REPLY]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
    )


def test_thinking_off_adds_the_empty_block_to_the_prompt_only(tokenizer: PreTrainedTokenizerBase) -> None:
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(tokenizer, [USER], add_generation_prompt=True) == start
    assert rendered(tokenizer, [USER], add_generation_prompt=True, enable_thinking=True) == start
    off = rendered(tokenizer, [USER], add_generation_prompt=True, enable_thinking=False)
    assert off == start + "<think>\n\n</think>\n\n"
    assert rendered(tokenizer, [USER, REPLY], enable_thinking=False) == start + "Hello<|im_end|>\n"


def test_reasoning_is_rendered_before_the_reply(tokenizer: PreTrainedTokenizerBase) -> None:
    text = rendered(tokenizer, [USER, {**REPLY, "reasoning_content": "A greeting."}])
    assert text.endswith("<|im_start|>assistant\n<think>\nA greeting.\n</think>\n\nHello<|im_end|>\n")


def test_tools_calls_and_results_render_in_qwen3s_form(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": "rain"},
    ]
    text = rendered(tokenizer, messages, tools=[WEATHER], add_generation_prompt=True)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Città"}}\n</tool_call>'
    assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in text
    assert f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n" in text
    assert text.endswith(
        "<|im_start|>user\n<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_content_may_be_parts_or_missing(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}
    assert rendered(tokenizer, [parts]) == rendered(tokenizer, [USER])
    call_only = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert "<|im_start|>assistant\n<tool_call>" in rendered(tokenizer, [USER, call_only])


turns = st.lists(
    st.fixed_dictionaries(
        {
            "user": st.text("ab \n", min_size=1, max_size=8),
            "assistant": st.text("ab \n", min_size=1, max_size=8),
            "reasoning": st.none() | st.text("ab \n", max_size=8),
        }
    ),
    min_size=1,
    max_size=4,
)


@given(turns=turns)
@settings(max_examples=60, deadline=None)
def test_a_longer_conversation_begins_with_the_text_of_a_shorter_one(
    turns: list[dict[str, str | None]], tokenizer: PreTrainedTokenizerBase
) -> None:
    messages: list[dict[str, Any]] = []
    text = ""
    for turn in turns:
        messages.append({"role": "user", "content": turn["user"]})
        prompt = rendered(tokenizer, messages, add_generation_prompt=True)
        reply: dict[str, Any] = {"role": "assistant", "content": turn["assistant"]}
        if turn["reasoning"] is not None:
            reply["reasoning_content"] = turn["reasoning"]
        messages.append(reply)
        whole = rendered(tokenizer, messages)
        assert prompt.startswith(text)
        assert whole.startswith(prompt)
        text = whole


def test_both_places_of_the_template_hold_the_same_text(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == (folder / "chat_template.jinja").read_text(encoding="utf-8")


def test_pretraining_renders_conversations_as_the_template_does(tools: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    import random

    stream = tools["tasks"].examples(random.Random(3))
    skills = set()
    for _ in range(400):
        example = next(stream)
        segments = tools["chat"].render(example)
        text = "".join(segment.text for segment in segments)
        wanted = rendered(tokenizer, list(example.messages), tools=list(example.tools) or None)
        assert text == wanted.removesuffix("\n")
        pieces = [token for segment in segments for token in tokenizer(segment.text)["input_ids"]]
        assert pieces == tokenizer(text)["input_ids"]
        assert all(segment.text.endswith("<|im_end|>") for segment in segments if segment.trained)
        skills.add(example.skill)
    assert skills == set(tools["tasks"].SKILLS)


# --- data set ---------------------------------------------------------------------------------------------------------


def test_the_generator_makes_the_shipped_files_byte_for_byte(tools: Any, tmp_path: Path) -> None:
    tools["support"].write(tmp_path)
    shipped = embedded_dataset_path("affina/support")
    assert shipped is not None
    for name in ("train.jsonl", "validation.jsonl", "manifest.json"):
        assert (tmp_path / name).read_bytes() == (shipped.parent / name).read_bytes()


def test_the_skill_test_is_what_its_generator_makes(tools: Any, folder: Path) -> None:
    assert tools["skills"].build_items() == tools["skills"].read_items(folder / "skills.jsonl")


def test_the_manifest_describes_the_files() -> None:
    manifest = dataset_manifest("affina/support")
    assert set(manifest["files"]) == {"train.jsonl", "validation.jsonl"}
    for split in ("train", "validation"):
        path = embedded_dataset_path("affina/support", split)
        assert path is not None
        content = path.read_bytes()
        facts = manifest["files"][path.name]
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
        assert (facts["records"], facts["bytes"]) == (content.count(b"\n"), len(content))


def test_about_a_thousand_conversations_train_and_over_a_hundred_validate() -> None:
    assert 900 <= len(records("train")) <= 1_200
    assert 110 <= len(records("validation")) <= 140


def test_no_validation_question_customer_or_order_is_in_train() -> None:
    train, validation = records("train"), records("validation")
    seen = {messages[0]["content"].casefold() for messages in train}
    assert len({messages[0]["content"] for messages in validation}) == len(validation)
    assert not seen & {messages[0]["content"].casefold() for messages in validation}
    filed = [json.loads(messages[1]["content"]) for messages in train if messages[1]["content"].startswith("{")]
    known = {fields["customer"] for fields in filed} | {fields["order"] for fields in filed}
    for messages in validation:
        if messages[1]["content"].startswith("{"):
            fields = json.loads(messages[1]["content"])
            assert not known & {fields["customer"], fields["order"]}


def test_a_validation_question_recombines_a_known_frame_and_a_known_clause(tools: Any) -> None:
    frames, questions = tools["support"].FRAMES, tools["support"].QUESTIONS
    train = {messages[0]["content"] for messages in records("train")}
    held_out = {messages[0]["content"] for messages in records("validation")}
    for question in questions:
        for language in ("en", "it"):
            pairs = {
                frame.format(clause=clause): (frame, clause)
                for frame in frames[language]
                for clause in question.clauses[language]
            }
            (wording,) = held_out & set(pairs)
            frame, clause = pairs[wording]
            assert wording not in train
            assert any(text in train for text, pair in pairs.items() if pair[1] == clause)
            assert any(frame.format(clause=other.clauses[language][0]) in train for other in questions)


def test_a_validation_problem_recombines_a_known_beginning_and_a_known_end(tools: Any) -> None:
    import support_requests

    for category, languages in support_requests.PROBLEMS.items():
        for language, (beginnings, ends) in languages.items():
            train = support_requests.problem_phrases(category, language, held_out=False)
            validation = support_requests.problem_phrases(category, language, held_out=True)
            assert not set(train) & set(validation)
            assert len(validation) == len(beginnings)
            for part in (*beginnings, *ends):
                assert any(part in phrase for phrase in train)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_filed_request_is_one_line_of_json_copied_from_its_message(split: str, tools: Any) -> None:
    requests = [messages for messages in records(split) if messages[1]["content"].startswith("{")]
    assert len(requests) >= 60
    for user, assistant in requests:
        fields = json.loads(assistant["content"])
        assert list(fields) == ["customer", "order", "product", "category", "urgency", "language"]
        assert fields["customer"] in user["content"]
        assert fields["order"] in user["content"]
        assert "\n" not in assistant["content"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_languages_categories_and_urgencies_are_balanced(split: str) -> None:
    filed = [json.loads(reply["content"]) for _, reply in records(split) if reply["content"].startswith("{")]
    for field, kinds in (("language", 2), ("category", 5), ("product", 6), ("urgency", 3)):
        counts = [sum(fields[field] == value for fields in filed) for value in {fields[field] for fields in filed}]
        assert len(counts) == kinds
        assert max(counts) <= 2.2 * min(counts)


def test_answers_are_short_and_each_question_has_one_per_language() -> None:
    answers: dict[str, int] = {}
    for _, reply in records("train"):
        if not reply["content"].startswith("{"):
            answers[reply["content"]] = answers.get(reply["content"], 0) + 1
    assert all(3 <= len(answer.split()) <= 25 for answer in answers)
    assert len(set(answers.values())) == 1
    validation = {reply["content"] for _, reply in records("validation") if not reply["content"].startswith("{")}
    assert validation == set(answers)
