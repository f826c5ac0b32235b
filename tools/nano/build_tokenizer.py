"""Train nano's tokenizer: byte-level BPE, 8,192 entries with the special tokens, digits one by one.

    python tools/nano/build_tokenizer.py --text FOLDER --output src/affina/catalog/assets/nano

Trained on a fixed sample of the English and Italian works and on generated tasks and support conversations, so that
words of the tasks are as cheap as words of the books. There is no normaliser: decoding gives back every text byte
for byte. Special tokens and their `special` flags are Qwen3's; <think> and the tool tags stay visible when special
tokens are skipped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

from corpus import read_works
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 8192
HIDDEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISIBLE_SPECIALS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
MAX_LENGTH = 1024

# A word takes the space before it and, in both languages, an elision's apostrophe (dell'|arte, don'|t);
# every digit stands alone, so that numbers and order codes are copied digit by digit.
WORD_PATTERN = r" ?\p{L}+(?:['’](?=\p{L}))?|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def new_tokenizer() -> Tokenizer:
    """An untrained tokenizer with the split pattern and the byte alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def training_text(folder: Path, *, seed: int = 0) -> Iterator[str]:
    """About 12 MB English, 12 MB Italian, 13 MB of tasks and 0.2 MB of support conversations."""
    from tasks import example_texts

    rng = random.Random(seed)
    slices: dict[str, list[str]] = {"en": [], "it": []}
    for work in read_works(folder):
        if not work.held_out:
            slices[work.language] += [work.text[start : start + 4000] for start in range(0, len(work.text), 4000)]
    for language in ("en", "it"):
        yield from rng.sample(slices[language], min(3000, len(slices[language])))
    yield from example_texts(seed=seed, count=60_000)
    # The first wording of affina/support. Its present wording came after nano was trained on this vocabulary.
    with gzip.open(Path(__file__).parent / "tokenizer_texts.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """The trained tokenizer, special tokens behind the merges as in Qwen3."""
    tokenizer = new_tokenizer()
    num_specials = len(HIDDEN_SPECIALS) + len(VISIBLE_SPECIALS)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - num_specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in HIDDEN_SPECIALS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in VISIBLE_SPECIALS])
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def save(tokenizer: Tokenizer, output: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, as AutoTokenizer reads them."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    wrapped.chat_template = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")
    wrapped.save_pretrained(output)
    config_file = output / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # The class name that transformers 4 and the servers know; the template also where older readers look for it.
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": wrapped.chat_template}
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder with the files that corpus.py names")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    save(train_tokenizer(training_text(arguments.text)), arguments.output)


if __name__ == "__main__":
    main()
