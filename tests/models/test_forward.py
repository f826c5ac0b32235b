"""One loss from two layouts, documents that do not see each other, and heads of every arrangement."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import (
    CohereConfig,
    FalconMambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)

from affina.errors import ModelError
from affina.models import forward
from affina.models.adapters import attach_adapter
from affina.models.compat import enable_recomputation
from affina.models.forward import (
    compute_context,
    evaluation_mode,
    hidden_states,
    isolates_documents,
    isolation_of,
    supervised_loss,
    supervised_token_losses,
    verified_head,
)
from affina.models.load import load_causal_lm
from affina.models.weights import Nf4Options
from tests.models.tiny import VOCABULARY, batch_of, qwen3_config, random_model, randomize_adapter, save

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
PACKED = {
    "qwen3": qwen3_config(),
    "qwen2": Qwen2Config(**COMMON),
    "llama": LlamaConfig(**COMMON),
    "mistral": MistralConfig(**COMMON, sliding_window=None),
    "mistral with a window of 5": MistralConfig(**COMMON, sliding_window=5),
    "qwen3 with a window on one layer": qwen3_config(
        use_sliding_window=True, sliding_window=4, layer_types=["full_attention", "sliding_attention"]
    ),
    "gemma2 with soft caps": Gemma2Config(
        **COMMON, head_dim=16, sliding_window=6, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
    ),
    "granite with scaled logits": GraniteConfig(
        **COMMON, logits_scaling=4.0, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.2
    ),
    "cohere with scaled logits": CohereConfig(**COMMON, logit_scale=0.25),
    "phi with a bias on the head": PhiConfig(**(COMMON | {"num_key_value_heads": 4})),
    "gpt2 with learnt positions": GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4),
    "gpt-neox": GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
}
SSM = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
ROWS = {
    "mamba": MambaConfig(**SSM, pad_token_id=None, bos_token_id=None, eos_token_id=None),
    "falcon-mamba": FalconMambaConfig(**SSM, pad_token_id=None, bos_token_id=None, eos_token_id=None),
    "opt, whose positions come from the mask": OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=64, pad_token_id=1,
    ),
}  # fmt: skip
LENGTHS = [9, 1, 14, 3]


def reference_loss(model, batch):
    """Each document alone through the model's own forward, cross-entropy on its own logits."""
    total = torch.zeros(())
    bounds = batch.cu_seqlens.tolist()
    with torch.no_grad():
        for start, end in pairwise(bounds):
            logits = model(input_ids=batch.input_ids[start:end].unsqueeze(0), use_cache=False).logits[0].float()
            total += torch.nn.functional.cross_entropy(
                logits[:-1], batch.labels[start + 1 : end], ignore_index=-100, reduction="sum"
            )
    return total


@pytest.mark.parametrize("name", [*PACKED, *ROWS])
def test_the_loss_is_that_of_every_document_alone(name):
    model = random_model((PACKED | ROWS)[name])
    batch = batch_of(LENGTHS)
    expected = reference_loss(model, batch)
    loss, count = supervised_loss(model, batch)
    assert count == batch.num_supervised
    # Float32 rounding of attention over differently shaped rows, added over about 15 tokens.
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=1e-4)
    rows, _ = supervised_loss(model, batch, layout="rows")
    torch.testing.assert_close(rows, expected, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("name", PACKED)
def test_attention_models_pack_their_documents(name):
    isolation = isolation_of(random_model(PACKED[name]))
    assert isolation.layout == "packed"
    assert isolation.difference < 1e-5
    assert "do not see each other" in isolation.reason


@pytest.mark.parametrize("name", ["mamba", "falcon-mamba"])
def test_state_space_models_get_one_row_per_document(name):
    isolation = isolation_of(random_model(ROWS[name]))
    assert isolation.layout == "rows"
    assert "documents see each other" in isolation.reason
    assert isolation.difference > 1e-3
    assert not isolates_documents(random_model(ROWS[name]))


def test_a_document_does_not_change_when_its_neighbour_does():
    # transformers' sdpa leaks here as soon as a mask is passed or a cache is made.
    model = random_model(qwen3_config())
    first, second = batch_of([12, 8], seed=1), batch_of([12, 8], seed=1)
    second.input_ids[:12] = (second.input_ids[:12] + 1) % VOCABULARY
    with torch.no_grad():
        one, two = hidden_states(model, first), hidden_states(model, second)
    assert torch.equal(one[12:], two[12:])
    assert not torch.equal(one[:12], two[:12])


def test_no_mask_is_built_and_no_cache_is_made_for_a_packed_row(monkeypatch):
    model = random_model(qwen3_config())
    supervised_loss(model, batch_of(LENGTHS))  # the probes of the first call pad and mask
    seen = []
    original = type(model.model.layers[0]).forward

    def spy(self, *arguments, attention_mask=None, past_key_values=None, **options):
        seen.append((attention_mask, past_key_values))
        return original(self, *arguments, attention_mask=attention_mask, past_key_values=past_key_values, **options)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", spy)
    supervised_loss(model, batch_of(LENGTHS))
    assert seen == [(None, None)] * 2


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (
            GptOssConfig(**COMMON, head_dim=16, num_local_experts=2, num_experts_per_tok=1),
            "GptOssAttention computes attention with s_aux, which packed attention does not have",
        ),
        (
            Gemma3TextConfig(**COMMON, head_dim=16, use_bidirectional_attention=True),
            "Gemma3Attention is not causal; packed attention is",
        ),
    ],
    ids=["attention sinks", "both directions"],
)
def test_attention_that_cannot_be_packed_goes_by_rows_and_is_refused_when_asked_for(config, what):
    model = random_model(config)
    isolation = isolation_of(model)
    assert isolation.layout == "rows"
    assert f"cannot run packed rows ({what})" in isolation.reason
    with pytest.raises(ModelError) as caught:
        supervised_loss(model, batch_of(LENGTHS), layout="packed")
    assert caught.value.code == "packing-unsupported"
    assert caught.value.what == what
    assert caught.value.fix == "data.packing: false"


def test_masks_are_honoured_outside_of_packed_rows():
    model = random_model(qwen3_config())
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    expected = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    isolation_of(model)
    found = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(found[:, 2:], expected[:, 2:])


@pytest.mark.parametrize("weight_format", [None, Nf4Options()], ids=["dense", "nf4"])
@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_adapter_gradients_are_those_of_the_plain_forward(tmp_path, weight_format, layout):
    folder = save(random_model(qwen3_config()), tmp_path)
    model = attach_adapter(
        load_causal_lm(str(folder), dtype=torch.float32, device="cpu", weight_format=weight_format), rank=4
    )
    randomize_adapter(model)
    batch = batch_of(LENGTHS)
    supervised_loss(model, batch, layout=layout)[0].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    bounds = batch.cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        logits = model(input_ids=batch.input_ids[start:end].unsqueeze(0), use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], batch.labels[start + 1 : end], reduction="sum")
        loss.backward()
    assert found
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = parameter.grad.abs().max()
            assert (found[name] - parameter.grad).abs().max() < 2e-5 * scale, name  # float32, two orders of summation


def test_token_losses_lie_at_the_tokens_that_were_predicted():
    model = random_model(qwen3_config())
    batch = batch_of(LENGTHS)
    losses = supervised_token_losses(model, batch)
    assert losses.shape == batch.labels.shape
    assert torch.equal(losses != 0, batch.labels != -100)
    torch.testing.assert_close(losses.sum(), supervised_loss(model, batch)[0])
    rows = supervised_token_losses(model, batch, layout="rows")
    torch.testing.assert_close(losses, rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_a_batch_without_supervised_tokens_gives_zero(layout):
    model = attach_adapter(random_model(qwen3_config()), rank=2)
    batch = batch_of(LENGTHS, supervised=-1.0)
    assert batch.num_supervised == 0
    loss, count = supervised_loss(model, batch, layout=layout)
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)


def test_the_head_is_checked_against_the_models_own_logits():
    model = random_model(GraniteConfig(**COMMON, logits_scaling=4.0))
    assert verified_head(model).scale == 0.25
    wrong = random_model(GraniteConfig(**COMMON, logits_scaling=4.0))
    original = wrong.forward

    def unusual(*arguments, **options):
        output = original(*arguments, **options)
        output.logits = output.logits * 1.5
        return output

    wrong.forward = unusual
    with pytest.raises(ModelError, match="head-unknown"):
        verified_head(wrong)


def test_a_head_in_four_bits_goes_through_its_own_module():
    model = random_model(qwen3_config(tie_word_embeddings=False))
    model.lm_head = Nf4Options().quantize_linear(model.lm_head)
    batch = batch_of(LENGTHS)
    assert verified_head(model) is None
    torch.testing.assert_close(supervised_loss(model, batch)[0], reference_loss(model, batch), rtol=2e-5, atol=1e-4)


def test_probing_leaves_modes_and_random_state_alone():
    model = attach_adapter(random_model(qwen3_config()), rank=2, dropout=0.5)
    model.train()
    model.base_model.model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    isolation_of(model)
    verified_head(model)
    with evaluation_mode(model):
        pass
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("weight_format", [None, Nf4Options()], ids=["dense", "nf4"])
def test_bfloat16_trains_float32_adapters_without_copies_of_inputs(tmp_path, weight_format, checkpointing):
    folder = save(random_model(qwen3_config(), dtype=torch.bfloat16), tmp_path)

    def build(dtype):
        base = load_causal_lm(str(folder), dtype=dtype, device="cpu", weight_format=weight_format)
        model = attach_adapter(base, rank=4)
        randomize_adapter(model)
        if checkpointing:
            enable_recomputation(base)
        return model.train()

    model, exact = build(torch.bfloat16), build(torch.float32)
    batch = batch_of(LENGTHS)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss, _ = supervised_loss(model, batch)
    loss.backward()
    expected, _ = supervised_loss(exact, batch)
    expected.backward()
    assert abs(loss.item() / expected.item() - 1) < 2**-6
    for (name, found), (_, wanted) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        if found.requires_grad:
            assert found.dtype == found.grad.dtype == torch.float32, name
            # Two layers in bfloat16, whose products carry 2^-8 each.
            assert (found.grad - wanted.grad).norm() / wanted.grad.norm() < 0.1, name
    if not checkpointing:
        # Inputs of adapters are [1, T, features] in float32 when PEFT casts them; norms keep some of [1, T, 64].
        wide = [tensor for tensor in kept if tensor.dtype == torch.float32 and tensor.shape[-1] == 96]
        assert wide == []


@pytest.mark.parametrize(
    ("what", "kernel"),
    [
        ("loss", "linear_token_losses"),
        ("losses", "linear_token_losses"),
        ("token losses", "linear_token_losses"),
        ("row losses", "linear_row_losses"),
        ("logits", "linear_logits"),
    ],
)
def test_the_head_is_never_copied_into_the_type_of_a_norm_that_is_trained(monkeypatch, tmp_path, what, kernel):
    # LayerNorm tuning on bfloat16: the last norm is float32, and so is what it hands to the head.
    base = load_causal_lm(str(save(random_model(qwen3_config()), tmp_path)), dtype=torch.bfloat16, device="cpu")
    model = attach_adapter(base, method="layernorm")
    batch = batch_of(LENGTHS)
    assert hidden_states(model, batch).dtype == torch.float32
    verified_head(model)
    seen = []
    original = getattr(forward, kernel)

    def spy(hidden, weight, *arguments, **options):
        seen.append((hidden.dtype, weight.dtype))
        return original(hidden, weight, *arguments, **options)

    monkeypatch.setattr(forward, kernel, spy)
    {
        "loss": lambda: supervised_loss(model, batch),
        "losses": lambda: forward.supervised_losses(model, batch),
        "token losses": lambda: supervised_token_losses(model, batch),
        "row losses": lambda: forward.supervised_row_losses(model, batch, lambda logits, part: logits.sum(-1)),
        "logits": lambda: forward.supervised_logits_reader(model, batch)(slice(0, 2)),
    }[what]()
    assert seen == [(torch.bfloat16, torch.bfloat16)]


def test_compute_context_is_for_mixed_types_only():
    from contextlib import nullcontext

    full = attach_adapter(random_model(qwen3_config()), rank=2)
    assert isinstance(compute_context(full), nullcontext)
    assert isinstance(compute_context(random_model(qwen3_config(), dtype=torch.bfloat16)), nullcontext)
    half = attach_adapter(random_model(qwen3_config(), dtype=torch.bfloat16), rank=2)
    assert isinstance(compute_context(half), torch.autocast)
