"""Loading a tokenizer: what can go wrong says how to mend it, and what it is has a fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError
from tests.data.tiny_tokenizers import GEMMA, THINKING, build_hf, build_tokenizer
from transformers import AutoTokenizer

from affina.data.tokenizer import describe_tokenizer, load_tokenizer
from affina.errors import ModelError


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/folder"])
def test_a_folder_that_does_not_exist_is_named(path: str) -> None:
    with pytest.raises(ModelError, match="is not a directory") as caught:
        load_tokenizer(path)
    assert caught.value.code == "tokenizer-not-found"
    assert "model.path" in str(caught.value)


def test_a_folder_without_a_tokenizer_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(tmp_path), local=True)
    assert caught.value.code == "tokenizer-not-found"
    assert caught.value.what == f"{tmp_path} holds no tokenizer"
    assert "copy tokenizer.json" in str(caught.value.fix)


UNKNOWN_MODEL = json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "of a later version"}})


@pytest.mark.parametrize("content", ["", "{", "{}", UNKNOWN_MODEL])
def test_a_damaged_tokenizer_is_refused_with_its_fault(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match="no tokenizer could be loaded") as caught:
        load_tokenizer(str(tmp_path), local=True)
    assert caught.value.code == "tokenizer-not-found"
    assert caught.value.why
    assert "holds tokenizer.json and tokenizer_config.json" in str(caught.value.fix)


def test_a_model_whose_licence_must_be_accepted_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    response = SimpleNamespace(headers={}, request=None)

    def refuse(*_: object, **__: object) -> None:
        # As transformers does: the hub's own error is the cause of an OSError about files.
        raise OSError("You are trying to access a gated repo.") from GatedRepoError("403", response=response)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ModelError) as caught:
        load_tokenizer("owner/model")
    assert caught.value.code == "model-gated"
    assert caught.value.what == "owner/model asks you to accept its licence first"
    assert caught.value.fix == "accept it on https://huggingface.co/owner/model, then: hf auth login"


def test_a_saved_tokenizer_loads_with_the_same_fingerprint(tmp_path: Path) -> None:
    hf = build_hf(THINKING)
    hf.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), local=True)
    assert loaded.fingerprint == describe_tokenizer(hf, name="x").fingerprint
    assert loaded.end_of_turn == ("<|im_end|>",)
    assert loaded.has_template


def test_the_fingerprint_sees_the_template_and_the_vocabulary() -> None:
    fingerprints = {
        describe_tokenizer(build_hf(THINKING), name="a").fingerprint,
        describe_tokenizer(build_hf(GEMMA), name="a").fingerprint,
        build_tokenizer(None).fingerprint,
    }
    assert len(fingerprints) == 3
    grown = build_hf(THINKING)
    grown.add_tokens(["extra"])
    assert describe_tokenizer(grown, name="a").fingerprint not in fingerprints


def test_a_slow_tokenizer_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelError, match="not a fast one") as caught:
        describe_tokenizer(SimpleNamespace(is_fast=False), name="old")
    assert caught.value.code == "tokenizer-not-fast"
    assert "save_pretrained" in str(caught.value)


def test_a_tokenizer_without_any_end_is_refused() -> None:
    with pytest.raises(ModelError, match="neither a chat template nor an end-of-sequence token") as caught:
        describe_tokenizer(build_hf(None, eos_token=None), name="endless")
    assert caught.value.code == "tokenizer-without-end"


def test_without_a_template_the_end_of_sequence_ends_texts() -> None:
    tokenizer = build_tokenizer(None)
    assert tokenizer.end_of_turn == ("<eos>",)
    assert not tokenizer.has_template
    assert tokenizer.special_tokens()["end_of_turn"] == [[tokenizer.eos_id], ["<eos>"]]


def test_a_real_llama_tokenizer_without_template_is_described(real_data_folder) -> None:  # type: ignore[no-untyped-def]
    tokenizer = load_tokenizer(str(real_data_folder("stories260k_hf")), local=True)
    assert tokenizer.end_of_turn == ("</s>",)
    assert tokenizer.pad_id not in tokenizer.end_of_turn_ids
