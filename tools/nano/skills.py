"""The held-out skill test: written once with a fixed seed, never trained on, scored by exact match.

    python tools/nano/skills.py write --output src/affina/catalog/assets/nano/skills.jsonl
    python tools/nano/skills.py score --model src/affina/catalog/assets/nano [--adapter RUN/adapter]

An item holds the conversation up to the reply, and the reply. Pre-training skips every generated conversation that
contains an item's last question, except small talk, whose few greetings must be known word for word.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chat import Example, render
from tasks import LANGUAGES, SKILLS, new_example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEED = 7_919
ITEMS_PER_LANGUAGE = 4
NOT_HELD_OUT = frozenset({"small_talk"})
END_OF_TURN = "<|im_end|>"
Item = dict[str, Any]


def to_item(example: Example) -> Item:
    """The test item of a conversation: for a tool call the call itself, else the last reply."""
    index = 1 if example.skill == "tool_call" else len(example.messages) - 1
    context = Example(example.skill, example.language, example.messages[: index + 1], example.tools)
    reply = render(context)[-1].text.removesuffix(END_OF_TURN)
    item: Item = {"skill": example.skill, "language": example.language, "messages": list(example.messages[:index])}
    if example.tools:
        item["tools"] = list(example.tools)
    return {**item, "reply": final_answer(reply)}


def final_answer(reply: str) -> str:
    """What follows the reasoning, without surrounding space."""
    return reply.rsplit("</think>", 1)[-1].strip()


def build_items(seed: int = SEED) -> list[Item]:
    """ITEMS_PER_LANGUAGE different items of each skill and language."""
    rng = random.Random(seed)
    items: list[Item] = []
    for skill in SKILLS:
        for language in LANGUAGES:
            chosen: dict[str, Item] = {}
            while len(chosen) < ITEMS_PER_LANGUAGE:
                item = to_item(new_example(rng, skill, language))
                chosen.setdefault(last_question(item["messages"]), item)
            items += chosen.values()
    return items


def last_question(messages: Iterable[dict[str, Any]]) -> str:
    return [message["content"] for message in messages if message["role"] == "user"][-1]


def held_out_questions(items: list[Item]) -> frozenset[str]:
    """The questions that pre-training must not see; of `remember`, the statement that its question is about."""
    questions = set()
    for item in items:
        if item["skill"] not in NOT_HELD_OUT:
            messages = item["messages"]
            questions.add(messages[0]["content"] if item["skill"] == "remember" else last_question(messages))
    return frozenset(questions)


def read_items(path: Path) -> list[Item]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def generate_replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: list[Item], *, max_new_tokens: int = 96
) -> list[str]:
    """The greedy reply to each item, in batches of items of similar length."""
    import torch

    prompts = [
        tokenizer.apply_chat_template(
            item["messages"], tools=item.get("tools"), tokenize=False, add_generation_prompt=True
        )
        for item in items
    ]
    order = sorted(range(len(items)), key=lambda index: len(prompts[index]))
    replies = [""] * len(items)
    for start in range(0, len(order), 64):
        indices = order[start : start + 64]
        batch = tokenizer([prompts[index] for index in indices], return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            output = model.generate(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        for index, row in zip(indices, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            replies[index] = tokenizer.decode(row).split(END_OF_TURN)[0].replace("<|endoftext|>", "")
    return replies


def score(items: list[Item], replies: list[str]) -> dict[str, float]:
    """Exact-match accuracy of each skill, and of all under "all"."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for item, reply in zip(items, replies, strict=True):
        hit = final_answer(reply) == item["reply"]
        hits[item["skill"]].append(hit)
        hits["all"].append(hit)
    return {skill: round(sum(values) / len(values), 4) for skill, values in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="write the test items")
    write.add_argument("--output", type=Path, required=True)
    scoring = commands.add_parser("score", help="score a model, with an adapter if given, and print JSON")
    scoring.add_argument("--model", type=Path, required=True)
    scoring.add_argument("--items", type=Path, help="default: skills.jsonl beside the model")
    scoring.add_argument("--adapter", type=Path)
    scoring.add_argument("--show-errors", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "write":
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in build_items()]
        arguments.output.write_text("".join(lines), encoding="utf-8")
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    if arguments.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, arguments.adapter)
    items = read_items(arguments.items or arguments.model / "skills.jsonl")
    replies = generate_replies(model, tokenizer, items)
    if arguments.show_errors:
        for item, reply in zip(items, replies, strict=True):
            if final_answer(reply) != item["reply"]:
                print(json.dumps({**item, "got": reply}, ensure_ascii=False))
    print(json.dumps(score(items, replies)))


if __name__ == "__main__":
    main()
