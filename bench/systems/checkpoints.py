"""A checkpoint with random weights and a tokenizer of its own, for what loads models from folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from systems.common import random_model

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, as Qwen's models write it."""


def write_checkpoint(spec: dict[str, Any], folder: str | Path) -> None:
    """The case's architecture with random weights, and a tokenizer whose tokens are bytes, as released models lie."""
    random_model(spec).save_pretrained(folder)
    write_byte_tokenizer(folder)


def write_byte_tokenizer(folder: str | Path) -> None:
    """256 bytes and the markers of ChatML: a text of n ASCII characters has n tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
