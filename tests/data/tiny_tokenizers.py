"""Small tokenizers with chat templates of different kinds, built in memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from affina.data.tokenizer import LoadedTokenizer, describe_tokenizer

# Like Qwen3: reasoning only in the last turns, an empty block on the last turn, a switch in the prompt.
THINKING = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "{{- '<think>\\n' + (m.reasoning_content or '').strip('\\n') + '\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{{- m.content.lstrip('\\n') }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- '<tool_call>' + call.function.name + call.function.arguments | tojson + '</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)

# Like Gemma: the end of a turn is not the end-of-sequence token, and a BOS stands in front.
GEMMA = (
    "{{- '<bos>' }}{%- for m in messages %}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + "
    "'<end_of_turn>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
)

# Like Mistral: no opening of a reply at all, and the prompt does not depend on add_generation_prompt.
INSTRUCT = (
    "{{- '<bos>' }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + '<eos>' }}"
    "{%- else %}{{- raise_exception('only user and assistant') }}{%- endif %}{%- endfor %}"
)

# Two kinds of end: one inside a conversation and another at its end, as with some tool-using models.
TWO_ENDS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{{- '<eos>' if loop.last and m.role == 'assistant' else '<end_of_turn>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# Plain words as markup: a border that no special token protects.
WORDS = (
    "{%- for m in messages %}{{- m.role + ': ' + m.content + ('<eos>' if m.role == 'assistant' else '\\n') }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
)

# Changes the text of a reply, so that nothing can be aligned.
SHOUTING = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + (m.content | length) ~ '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>ASSISTANT\\n' }}{%- endif %}"
)

WITHOUT_END = "{%- for m in messages %}{{- m.role + ': ' + m.content + '\\n' }}{%- endfor %}"

TEMPLATES = {
    "thinking": THINKING,
    "gemma": GEMMA,
    "instruct": INSTRUCT,
    "two_ends": TWO_ENDS,
    "words": WORDS,
}

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>")


def build_hf(template: str | None, *, pad_token: str | None = "<pad>", eos_token: str | None = "<eos>") -> Any:
    """A byte-level tokenizer with a few merges, as a Hugging Face object."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # GPT-2's own pattern cuts "\n\n" before a word in two, but not at the end of a prompt; newer patterns do not.
    pattern = Regex(r" ?[^\s]+|\s*[\r\n]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["assistant user system the answer is a good one \n\n"] * 20, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    hf = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token=eos_token, pad_token=pad_token, unk_token=None
    )
    hf.chat_template = template
    return hf


@lru_cache
def build_tokenizer(kind: str | None) -> LoadedTokenizer:
    """One of TEMPLATES, or a tokenizer without template."""
    return describe_tokenizer(build_hf(TEMPLATES[kind] if kind else None), name=f"tiny-{kind}")
