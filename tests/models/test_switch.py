"""Switched off, a model is its base: bit for bit, or in the types of what is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Glm4Config

from affina.models.adapters import adapter_disabled, attach_adapter
from affina.models.engines import trainable_parameters
from affina.models.forward import supervised_losses
from tests.models.tiny import VOCABULARY, batch_of, random_model
from tests.training.method_cases import attach, load_base, make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@torch.no_grad()
def losses_of(model: nn.Module) -> Tensor:
    return supervised_losses(model, batch_of([7, 9], seed=9))


def post_norm_model() -> nn.Module:
    """A GLM4, whose norms write into the residual stream: trained in float32 they make all of it float32."""
    config = Glm4Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return random_model(config).to(torch.bfloat16)


@pytest.mark.parametrize("method", ["full", "freeze", "layernorm", "lora"])
def test_on_16_bits_switched_off_is_the_base_and_as_trained_is_a_model_that_has_learnt_nothing(
    base: Path, method: str
) -> None:
    if method == "layernorm":
        of_base = losses_of(post_norm_model())
        model: nn.Module = attach_adapter(post_norm_model(), method=method)  # type: ignore[arg-type]
    else:
        of_base = losses_of(load_base(base, "dense", torch.bfloat16))
        model = attach(base, method, "dense", dtype=torch.bfloat16)
    fresh = losses_of(model)
    # Otherwise there was nothing to distinguish.
    assert torch.equal(fresh, of_base) == (method == "lora")
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = {name: (parameter, parameter.data) for name, parameter in model.named_parameters()}
    tuned = losses_of(model)
    assert not torch.equal(tuned, fresh)
    with adapter_disabled(model):
        assert torch.equal(losses_of(model), of_base)
    with adapter_disabled(model, as_trained=True):
        assert torch.equal(losses_of(model), fresh)
    assert torch.equal(losses_of(model), tuned)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert parameter.data.data_ptr() == before[name][1].data_ptr()
        assert parameter.dtype == before[name][1].dtype
