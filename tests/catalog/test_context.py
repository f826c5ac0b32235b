"""How many tokens a model reads, from its config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from affina.catalog.context import context_tokens, local_context_tokens


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 40960}, 40960),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 8192}, "max_position_embeddings": 16}, 8192),
        ({"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 131072),
        # Llama 3.1: the factor is counted in max_position_embeddings already.
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"max_position_embeddings": 131072, "rope_parameters":
          {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear"}}, 4096),
        ({"state_size": 16}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": True}, None),
    ],
)  # fmt: skip
def test_the_context_is_what_the_config_allows(config: dict[str, Any], expected: int | None) -> None:
    assert context_tokens(config) == expected


def test_a_model_on_this_machine_is_read_and_any_other_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 77}))
    assert local_context_tokens(str(tmp_path)) == 77
    assert local_context_tokens("affina/nano") == 1024
    assert local_context_tokens("affina/unknown") is None
    assert local_context_tokens("owner/name") is None


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_damaged_config_is_left_to_the_loader(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert local_context_tokens(str(tmp_path)) is None
