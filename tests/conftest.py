"""Fixtures for all tests: real data where it is present, and no network anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REAL_DATA = Path(os.environ.get("AFFINA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def real_data(name: str) -> Path:
    """The folder of a real data set, or a skip that says what is missing."""
    folder = REAL_DATA / name
    if not folder.exists():
        pytest.skip(f"real data set {name!r} is not on this machine (set AFFINA_TEST_DATA to its parent folder)")
    return folder


@pytest.fixture
def real_data_folder():  # type: ignore[no-untyped-def]
    """Function from a data set's name to its folder; skips the test where it is absent."""
    return real_data


@pytest.fixture(scope="session")
def qwen3_tokenizer_folder() -> Path:
    """The real Qwen3-4B tokenizer, template and config."""
    return real_data("qwen3_tokenizer") / "hf"


def save_random_qwen3(folder: Path, *, vocab_size: int, max_position_embeddings: int) -> None:
    """Two random Qwen3 layers of width 64; the same weights every time, without touching the random state."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
            max_position_embeddings=max_position_embeddings,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen3 of 0.7 M parameters with the tokenizer and template of affina/nano."""
    import shutil

    from affina.catalog.embedded import embedded_model_path

    folder = tmp_path_factory.mktemp("models") / "tiny"
    nano = embedded_model_path("affina/nano")
    assert nano is not None
    save_random_qwen3(folder, vocab_size=8192, max_position_embeddings=1024)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (nano / name).exists():
            shutil.copyfile(nano / name, folder / name)
    return folder


@pytest.fixture
def chats_file(tmp_path: Path) -> Path:
    """48 short chats whose replies follow from their prompts, of different lengths."""
    import json

    file = tmp_path / "chats.jsonl"
    with open(file, "w", encoding="utf-8") as lines:
        for number in range(48):
            words = " ".join(["please"] * (number % 7))
            messages = [
                {"role": "user", "content": f"{words} say number {number}".strip()},
                {"role": "assistant", "content": f"number {number} it is" + "!" * (number % 5)},
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return file
