"""What an export is proven on: a few prompts, and how far the logits of two models are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from affina.models.forward import evaluation_mode
from affina.models.structure import base_model_of, text_config

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and then it asks for its invoice.",
    "Buongiorno, vorrei sapere quando arriva il mio ordine numero 48213.",
    '{"name": "affina", "values": [1, 2, 3]} is a small JSON object.',
    "def add(a, b):\n    return a + b\n",
)


def text_vocabulary(raw_config: Mapping[str, Any]) -> int:
    """Size of the vocabulary from a raw config, also of one with a nested text model."""
    nested = raw_config.get("text_config")
    size = raw_config.get("vocab_size") or (nested.get("vocab_size") if isinstance(nested, Mapping) else None)
    return int(size or 256)


def default_probes(folder: Path, vocabulary_size: int) -> list[list[int]]:
    """Token ids of a few sentences, as plain text and as chat, or spread ids where there is no tokenizer."""
    probes: list[list[int]] = [[(i * 7919 + 11) % vocabulary_size for i in range(32)]]
    if not (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        return probes
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    probes += [tokenizer(sentence, add_special_tokens=True)["input_ids"] for sentence in _SENTENCES]
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": _SENTENCES[1]}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        probes.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return [probe for probe in probes if probe]


@torch.no_grad()
def logits_of(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
    """[P, V] float32 logits of all positions of all probes, on the CPU."""
    base = base_model_of(model)
    size = text_config(base).vocab_size
    rows = []
    with evaluation_mode(model):
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=base.device)
            rows.append(model(input_ids=ids, use_cache=False).logits[0, :, :size].float().cpu())
    return torch.cat(rows)


def rms(values: Tensor) -> float:
    """√ of the mean square."""
    return float(values.double().square().mean().sqrt())


def spread_of(logits: Tensor) -> float:
    """Standard deviation, the unit of differences; never 0."""
    return max(float(logits.double().std()), 1e-12)
