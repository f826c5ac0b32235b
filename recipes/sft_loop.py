"""Supervised fine-tuning on one page: no abstractions, only what happens. A test proves that affina's losses are these.

    python recipes/sft_loop.py MODEL_DIRECTORY chats.jsonl

Each line of the file is {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer


def sft_losses(
    model_path: str,
    data_path: str,
    adapter_path: str = "adapter",
    *,
    num_steps: int = 20,
    samples_per_step: int = 8,
    learning_rate: float = 1e-3,
    warmup_steps: int = 2,
    rank: int = 16,
    alpha: int = 32,
    seed: int = 0,
) -> Iterator[float]:
    """Train a LoRA adapter and yield each step's loss: the mean over all trained tokens of the step, in nats."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)

    # 1. Tokens and labels. Only replies are trained, up to and including the token that ends the turn; not the prompt,
    #    and not the newline that templates write after a turn.
    samples = []
    for line in Path(data_path).read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text.startswith(prompt), "this page handles templates that only append"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        num_prompt = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
        labels = [token if num_prompt <= i < end else -100 for i, token in enumerate(ids)]
        samples.append((torch.tensor([ids]), torch.tensor(labels)))

    # 2. The adapter: y = W x + (alpha / rank) · B A x, with B = 0 at the start, on every linear layer but the head.
    torch.manual_seed(seed)
    model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)

    # 3. Training. The sum of all token losses of a step is divided by the number of all its trained tokens.
    order: list[int] = []
    epoch = 0
    for step in range(num_steps):
        if not order:
            order = np.random.default_rng([seed, epoch]).permutation(len(samples)).tolist()
            epoch += 1
        chosen, order = order[:samples_per_step], order[samples_per_step:]
        num_trained = sum(int((samples[i][1] != -100).sum()) for i in chosen)
        step_loss = 0.0
        for i in chosen:
            input_ids, targets = samples[i]
            logits = model(input_ids=input_ids, use_cache=False).logits[0]
            # Position t predicts token t + 1.
            loss = cross_entropy(logits[:-1], targets[1:], ignore_index=-100, reduction="sum") / num_trained
            loss.backward()  # type: ignore[no-untyped-call]
            step_loss += loss.item()

        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        progress = max(step - warmup_steps, 0) / max(num_steps - warmup_steps, 1)
        factor = (step + 1) / warmup_steps if step < warmup_steps else 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        optimizer.step()
        optimizer.zero_grad()
        yield step_loss
    model.save_pretrained(adapter_path)


if __name__ == "__main__":
    for step, loss in enumerate(sft_losses(sys.argv[1], sys.argv[2]), start=1):
        print(f"step {step}  loss {loss:.4f}")
