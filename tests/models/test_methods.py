"""What PEFT does silently wrong, done right or refused; and affina's own methods."""

from __future__ import annotations

import json
from typing import get_args

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config

from affina.catalog.methods import METHODS, PeftName
from affina.errors import ModelError
from affina.models.adapters import adapter_disabled, attach_adapter, load_adapter, read_adapter_info, save_adapter
from affina.models.adapters.factors import olora_factors, pissa_factors
from affina.models.adapters.restore import restore_adapter_weights, save_training_state
from affina.models.compat import quiet_peft
from affina.models.engines import trainable_parameters
from affina.models.families import Unsupported
from affina.models.fast.support import decoder_of
from affina.models.forward import hidden_states, isolation_of, supervised_loss, supervised_token_losses
from affina.models.generate import generate
from affina.models.weights import Nf4Linear, Nf4Options, format_of, quantize_linears
from affina.models.weights.dense_view import show_dense_weight
from affina.training.adalora import adalora_of
from tests.models.tiny import VOCABULARY, batch_of, qwen3_config, random_model, save
from tests.training.method_cases import (
    NUM_STEPS,
    MethodRun,
    attach,
    hidden_of,
    load_base,
    make_base,
    reload,
    small_options,
)

IDS = torch.arange(20).unsqueeze(0) * 5 % VOCABULARY


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False, **options).logits


def trained(base, method, folder, weight_format="dense"):
    run = MethodRun(attach(base, method, weight_format), folder)
    run.train(until=NUM_STEPS)
    return run.model.eval()


# Saved files load in plain PEFT
# ----------------------------------------------------------------------------------------------------------------

IN_PLAIN_PEFT = [name for name, method in METHODS.items() if method.kind != "weights" or name == "layernorm"]


@pytest.mark.parametrize("method", [name for name in IN_PLAIN_PEFT if "dense" in METHODS[name].trains_on])
def test_every_adapter_loads_in_plain_peft_with_the_same_logits(base, tmp_path, method):
    model = trained(base, method, tmp_path)
    expected = logits(model)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with quiet_peft():
        loaded = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    assert read_adapter_info(tmp_path).method == method


def test_without_our_file_the_method_is_read_from_pefts_config(base, tmp_path):
    for method, found in [
        ("dora", "dora"),
        ("rslora", "rslora"),
        ("pissa", "lora"),
        ("prompt", "prompt"),
        ("houlsby", "houlsby"),
    ]:
        folder = tmp_path / method
        trained(base, method, folder)
        (folder / "affina.json").unlink()
        assert read_adapter_info(folder).method == found


# PiSSA and OLoRA: the base is never rewritten
# ----------------------------------------------------------------------------------------------------------------


def test_peft_itself_rewrites_the_base_under_a_first_pissa_adapter():
    # The trap that is avoided here; when this fails, PEFT has changed and factors.py may become shorter.
    model = random_model(qwen3_config())
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"])
    with quiet_peft():
        adapted = peft.get_peft_model(model, config)
        assert not torch.equal(adapted.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight, weight)
        before = logits(adapted.eval())
        adapted.add_adapter("second", peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"]))
        assert (logits(adapted.eval()) - before).abs().max() > 0.01


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_starting_from_the_weights_leaves_the_base_and_other_adapters_alone(base, tmp_path, method):
    plain = hidden_of(load_base(base, "dense"))
    model = attach(base, method, "dense")
    weights = {name: p.clone() for name, p in load_base(base, "dense").named_parameters()}
    kept = {
        name.replace(".base_layer", ""): p
        for name, p in model.get_base_model().named_parameters()
        if ".lora_" not in name
    }
    assert all(torch.equal(kept[name], weight) for name, weight in weights.items())
    # s B A − s B₀ A₀ is zero up to the rounding of two sums.
    torch.testing.assert_close(hidden_of(model), plain, rtol=1e-4, atol=1e-4)
    with adapter_disabled(model):
        assert torch.equal(hidden_of(model), plain)
    first = trained(base, method, tmp_path / "first")
    expected = logits(first)
    second = tmp_path / "second"
    MethodRun(attach(base, method, "dense"), second, learning_rate=5e-2).train(until=NUM_STEPS)
    both = load_adapter(load_base(base, "dense"), tmp_path / "first")
    with quiet_peft():
        both.load_adapter(str(second), "second")
    both.set_adapter("default")
    torch.testing.assert_close(logits(both.eval()), expected, rtol=0, atol=1e-5)


def test_pissa_takes_the_largest_singular_directions_and_olora_the_first_of_qr():
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    down, up = pissa_factors(weight, 3, scale=2.0)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(2.0 * up @ down, left[:, :3] @ torch.diag(values[:3]) @ right[:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0), rtol=1e-4, atol=1e-5)
    down, up = olora_factors(weight, 16)
    torch.testing.assert_close(up @ down, weight, rtol=1e-4, atol=1e-5)


def test_large_weights_are_factored_by_subspace_iteration_without_touching_the_random_state(monkeypatch):
    from affina.models.adapters import factors

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 6, generator=generator) @ torch.randn(6, 30, generator=generator)
    exact = [factor.clone() for factor in pissa_factors(weight, 6, 1.0)]
    monkeypatch.setattr(factors, "_EXACT_SVD_SIZE", 8)
    state = torch.get_rng_state()
    down, up = pissa_factors(weight, 6, 1.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(up @ down, exact[1] @ exact[0], rtol=1e-4, atol=1e-4)


# LoftQ
# ----------------------------------------------------------------------------------------------------------------


def test_loftq_starts_nearer_to_the_original_weights_and_keeps_the_plain_nf4_base(base):
    model = attach(base, "loftq", "nf4", rank=8)
    plain, original = load_base(base, "nf4"), load_base(base, "dense")
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    kept = layer.base_layer.dequantize(torch.float32)
    assert torch.equal(kept, plain.model.layers[0].mlp.up_proj.dequantize(torch.float32))
    update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    weight = original.model.layers[0].mlp.up_proj.weight
    assert (weight - kept - update).norm() < 0.9 * (weight - kept).norm()


def test_a_loftq_adapter_is_refused_on_another_base_than_nf4(base, tmp_path):
    trained(base, "loftq", tmp_path, "nf4")
    with pytest.raises(ModelError) as caught:
        reload(base, tmp_path, "dense")
    assert caught.value.code == "adapter-base-mismatch"
    assert "started as the error of an NF4 base" in caught.value.what
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True


# DoRA
# ----------------------------------------------------------------------------------------------------------------


def test_a_dora_file_is_never_taken_for_plain_lora(base, tmp_path):
    trained(base, "dora", tmp_path)
    info = read_adapter_info(tmp_path)
    assert not info.is_plain_lora
    assert METHODS[info.method].vllm == "no"


def test_on_codes_pefts_dora_would_take_bytes_for_weights():
    model = random_model(qwen3_config())
    quantize_linears(model, Nf4Options(), exclude=[model.get_output_embeddings()])
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == torch.uint8
    dense = layer.dequantize(torch.float32)
    show_dense_weight(layer, shape_only=False)
    assert torch.equal(layer.weight, dense)
    assert isinstance(layer, Nf4Linear)
    assert format_of(layer).name == "nf4"
    moved = layer.to(torch.bfloat16)
    assert torch.equal(moved.dequantize(torch.float32), dense)


# Adapters of several kinds in one batch are PEFT's silent trap: affina's registry promises it for LoRA alone
# ----------------------------------------------------------------------------------------------------------------


def test_only_lora_and_what_is_saved_as_lora_promises_mixed_batches():
    promised = {name for name, method in METHODS.items() if method.mixed_batch}
    assert promised == {"lora", "rslora", "loraplus", "pissa", "olora", "eva", "loftq"}


# AdaLoRA
# ----------------------------------------------------------------------------------------------------------------


def test_adalora_comes_down_to_its_budget_and_saves_what_is_left(base, tmp_path):
    run = MethodRun(attach(base, "adalora", "dense"), tmp_path)
    run.train(until=NUM_STEPS)
    ranks = [int((p != 0).sum()) for name, p in run.model.named_parameters() if ".lora_E." in name]
    assert sum(ranks) == 4 * len(ranks)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert sorted(map(sum, saved.values())) == sorted(ranks)


def test_adalora_regularises_once_a_step_and_the_reported_loss_is_without_it(base):
    model = attach(base, "adalora", "dense")
    step = adalora_of(model, num_steps=10)
    factors = [
        (p, ".lora_A." in name) for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name
    ]
    distances = []
    for factor, is_right in factors:
        product = factor @ factor.T if is_right else factor.T @ factor
        distances.append(torch.norm(product - torch.eye(len(product))))
    assert float(step.regularization().detach()) == pytest.approx(
        0.5 * float(torch.stack(distances).mean().detach()), rel=1e-5
    )
    assert adalora_of(attach(base, "adalora", "dense", orthogonal_weight=0.0), num_steps=10).regularization() is None
    assert adalora_of(attach(base, "lora", "dense"), num_steps=10) is None


def test_an_adalora_that_grew_since_the_last_masking_is_saved_whole(base, tmp_path):
    run = MethodRun(attach(base, "adalora", "dense"), tmp_path)
    run.train(until=2)
    for name, parameter in run.model.named_parameters():
        if ".lora_E." in name:
            parameter.data += 0.1  # a step of the optimiser, before the next masking
    expected = hidden_of(run.model)
    save_adapter(run.model, tmp_path, contract={})
    torch.testing.assert_close(hidden_of(reload(base, tmp_path, "dense")), expected, rtol=0, atol=1e-5)


# Virtual tokens
# ----------------------------------------------------------------------------------------------------------------

VIRTUAL = ["prefix", "ptuning", "prompt"]


@pytest.mark.parametrize("method", VIRTUAL)
def test_the_loss_after_virtual_tokens_is_pefts_own(base, method):
    model = attach(base, method, "dense").eval()
    batch = batch_of([12, 7])
    total = 0.0
    for part in (slice(0, 12), slice(12, 19)):
        ids, labels = batch.input_ids[part].unsqueeze(0), batch.labels[part].unsqueeze(0)
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        total += float(output.loss) * int((labels[0, 1:] != -100).sum())
    loss, _ = supervised_loss(model, batch)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    assert float(supervised_token_losses(model, batch).sum()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("method", VIRTUAL)
def test_samples_of_one_row_are_computed_each_after_its_own_virtual_tokens(base, method):
    model = attach(base, method, "dense")
    isolation = isolation_of(model)
    assert (isolation.layout, isolation.reason) == (
        "rows",
        "each sample begins with the virtual tokens: one row per document",
    )
    together, alone = batch_of([12, 7], seed=3), batch_of([12], seed=3)
    alone.input_ids[:] = together.input_ids[:12]
    with torch.no_grad():
        torch.testing.assert_close(
            hidden_states(model.eval(), together)[:12], hidden_states(model, alone), rtol=1e-5, atol=1e-5
        )
    with adapter_disabled(model):
        assert isolation_of(model).layout == "packed"


@pytest.mark.parametrize("method", VIRTUAL)
def test_generation_after_virtual_tokens_is_greedy_on_their_logits(base, method):
    model = attach(base, method, "dense").eval()
    prompts = [[5, 9, 30], [7, 8, 1, 44, 3, 2]]
    found = generate(model, prompts, max_new_tokens=4, stop_ids=[], batch_size=2)
    for prompt, reply in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(4):
            row = torch.tensor([ids])
            with torch.no_grad():
                ids.append(int(model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -1].argmax()))
        assert reply == ids[len(prompt) :]
    with adapter_disabled(model):
        assert generate(model, prompts, max_new_tokens=4, stop_ids=[]) == generate(
            load_base(base, "dense"), prompts, max_new_tokens=4, stop_ids=[]
        )


def test_a_prompt_must_leave_room_for_the_virtual_tokens(base):
    model = attach(base, "prompt", "dense", num_virtual_tokens=10)
    with pytest.raises(ModelError, match=r"prompt 0 has 246 tokens; the model's context is 246"):
        generate(model, [[1] * 246], max_new_tokens=1, stop_ids=[])


def test_pefts_prefix_does_not_stand_activation_checkpointing():
    from affina.models.compat import enable_recomputation

    assert not METHODS["prefix"].checkpointing
    model = random_model(qwen3_config())
    enable_recomputation(model)
    with pytest.raises(
        ModelError, match=r"PEFT does not put prefix tuning on(.|\n)*does not work with gradient checkpointing"
    ):
        attach_adapter(model, method="prefix")


def test_of_ptuning_the_checkpoint_has_the_encoder_that_the_file_has_not(base, tmp_path):
    run = MethodRun(attach(base, "ptuning", "dense"), tmp_path)
    run.train(until=NUM_STEPS)
    other = attach(base, "ptuning", "dense")
    restore_adapter_weights(other, tmp_path)
    assert torch.equal(hidden_of(other), hidden_of(run.model))
    (tmp_path / "adapter_training_state.safetensors").unlink()
    assert torch.equal(hidden_of(reload(base, tmp_path, "dense")), hidden_of(run.model))


# Bottleneck adapters
# ----------------------------------------------------------------------------------------------------------------


def test_a_bottleneck_is_a_small_mlp_with_a_residual_after_the_layer(base):
    model = attach(base, "houlsby", "dense")
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    x = torch.randn(5, 48, generator=generator)
    h = layer.base_layer(x)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    expected = h + torch.relu(h @ down.weight.T + down.bias) @ up.weight.T + up.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_houlsby_adapts_attention_and_mlp_and_pfeiffer_the_mlp(base):
    assert {name.rpartition(".")[2] for name in attach(base, "houlsby", "dense").targeted_module_names} == {
        "o_proj",
        "down_proj",
    }
    assert {name.rpartition(".")[2] for name in attach(base, "pfeiffer", "dense").targeted_module_names} == {
        "down_proj"
    }


def test_bottlenecks_of_two_tasks_live_on_one_base_and_are_switched(base, tmp_path):
    first = logits(trained(base, "houlsby", tmp_path / "first"))
    MethodRun(attach(base, "houlsby", "dense"), tmp_path / "second", learning_rate=5e-2).train(until=NUM_STEPS)
    second = logits(reload(base, tmp_path / "second", "dense"))
    both = reload(base, tmp_path / "first", "dense")
    with quiet_peft():
        both.load_adapter(str(tmp_path / "second"), "second")
    both.set_adapter("second")
    assert torch.equal(logits(both.eval()), second)
    both.set_adapter("default")
    assert torch.equal(logits(both), first)
    with both.disable_adapter():
        assert torch.equal(logits(both), logits(load_base(base, "dense")))
    both.delete_adapter("second")
    assert torch.equal(logits(both), first)


def test_a_bottleneck_refuses_to_be_merged_by_peft_too(base):
    model = attach(base, "pfeiffer", "dense")
    with pytest.raises(ValueError, match="not linear"):
        model.merge_and_unload()


def test_bottleneck_dropout_acts_in_training_only(base):
    model = attach(base, "pfeiffer", "dense", dropout=0.5)
    for parameter in trainable_parameters(model):
        parameter.data += 0.3
    assert torch.equal(logits(model.eval()), logits(model))
    assert not torch.equal(logits(model.train()), logits(model))


# Weights of the model itself
# ----------------------------------------------------------------------------------------------------------------


def test_freeze_trains_the_last_layers_and_full_everything(base):
    names = {name for name, p in attach(base, "freeze", "dense").named_parameters() if p.requires_grad}
    assert names
    assert all(name.startswith("model.layers.1.") for name in names)
    model = attach(base, "full", "dense")
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ModelError) as caught:
        attach(base, "freeze", "dense", num_layers=3)
    assert caught.value.code == "num-layers-too-large"
    assert caught.value.what == "adapter.num_layers is 3; the model has 2 layers"


def test_trained_weights_do_not_load_on_a_quantised_base_or_another_model(base, tmp_path):
    trained(base, "freeze", tmp_path)
    with pytest.raises(ModelError, match="holds trained weights, and the base is quantised"):
        reload(base, tmp_path, "nf4")
    with pytest.raises(ModelError, match="adapter-base-mismatch"):
        load_adapter(random_model(qwen3_config()), tmp_path)


def test_the_identity_of_a_base_does_not_change_while_its_weights_are_trained(base, tmp_path):
    from affina.models.adapters import base_identity

    assert base_identity(trained(base, "full", tmp_path)) == base_identity(load_base(base, "dense"))
    assert base_identity(trained(base, "layernorm", tmp_path)) == base_identity(load_base(base, "dense"))


# LoRA+
# ----------------------------------------------------------------------------------------------------------------


def test_loraplus_moves_b_faster_than_a_by_its_ratio(base, tmp_path):
    run = MethodRun(attach(base, "loraplus", "dense", learning_rate_ratio=8.0), tmp_path)
    run.train_in_memory()
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    by_kind = {
        kind: {rates[id(p)] for n, p in run.model.named_parameters() if kind in n} for kind in (".lora_A.", ".lora_B.")
    }
    assert by_kind == {".lora_A.": {2e-2}, ".lora_B.": {0.16}}


# Sizes, targets, other methods
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "miss", "loha", "adalora"])
def test_a_rank_above_a_layers_size_names_the_layer_and_what_fits(base, method):
    name = "initial_rank" if method == "adalora" else "rank"
    with pytest.raises(ModelError) as caught:
        attach(base, method, "dense", **{name: 40})
    assert caught.value.code == "rank-above-layer"
    assert caught.value.what == f"adapter.{name} is 40; model.layers.0.self_attn.k_proj is 16 × 32"
    assert caught.value.fix.startswith("write `rank: 8` or less, leave k_proj out of adapter.targets")


@pytest.mark.parametrize("method", ["oft", "boft"])
def test_blocks_that_do_not_divide_a_layers_inputs_name_a_size_that_does(base, method):
    with pytest.raises(ModelError) as caught:
        attach(base, method, "dense", block_size=7)
    assert caught.value.code == "block-size-unfit"
    assert "has 32 inputs" in caught.value.what
    assert caught.value.fix == "write `block_size: 8`"


def test_an_embedding_tied_to_the_head_cannot_be_a_target(base):
    for name, other in (("embed_tokens", "the head"), ("lm_head", "the embedding")):
        with pytest.raises(ModelError) as caught:
            attach(base, "lora", "dense", targets=(name,))
        assert caught.value.code == "target-unmatched"
        assert f"its weight is {other}'s as well (they are tied)" in caught.value.why
        assert "`adapter: full`" in caught.value.fix
    untied = random_model(qwen3_config(tie_word_embeddings=False))
    with pytest.raises(ModelError, match="the loss is computed through the plain head"):
        attach_adapter(untied, targets=["lm_head"])


def test_a_model_without_norms_of_its_width_cannot_have_them_tuned(monkeypatch):
    from affina.models.adapters import targets

    model = random_model(qwen3_config())
    monkeypatch.setattr(targets, "base_model_of", lambda given: given)
    for layer in [module for module in model.modules() if "Norm" in type(module).__name__]:
        layer.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ModelError, match="has no norms"):
        targets.residual_norms(model)


OPTIONS = {
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 8},
    "psoft": {"r": 4},
    "road": {"group_size": 4},
    "vblora": {"vector_length": 16, "num_vectors": 8, "topk": 2},
    "waveft": {"n_frequency": 8},
}


@pytest.mark.parametrize("method", get_args(PeftName))
def test_other_methods_of_peft_train_save_load_and_are_switched_off(base, tmp_path, method):
    run = MethodRun(attach(base, method, "dense", options=OPTIONS.get(method, {})), tmp_path)
    run.train(until=NUM_STEPS)
    tuned, plain = hidden_of(run.model), hidden_of(load_base(base, "dense"))
    assert not torch.allclose(tuned, plain)
    with adapter_disabled(run.model):
        assert torch.equal(hidden_of(run.model), plain)
    assert torch.equal(hidden_of(reload(base, tmp_path, "dense")), tuned)
    fresh = attach(base, method, "dense", options=OPTIONS.get(method, {}))
    restore_adapter_weights(fresh, tmp_path)
    assert torch.equal(hidden_of(fresh), tuned)


def test_hra_is_refused_on_codes_on_which_peft_would_train_without_an_error(base):
    with pytest.raises(ModelError) as caught:
        attach(base, "hra", "nf4")
    assert caught.value.code == "adapter-unsupported"
    assert "HRA trains on int8 codes without an error" in caught.value.why


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"rr": 4}, 'adapter.options has "rr", which HRAConfig does not have'),
        ({"r": -3}, "PEFT refuses adapter.method hra"),
    ],
)
def test_options_that_peft_does_not_take_are_an_error(base, options, what):
    with pytest.raises(ModelError) as caught:
        attach(base, "hra", "dense", options=options)
    assert caught.value.code == "adapter-option-wrong"
    assert caught.value.what.startswith(what)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.fast_engine])
def test_the_fused_decoder_says_which_method_it_does_not_compute(base, method):
    weight_format = "dense" if "dense" in METHODS[method].trains_on else "nf4"
    reason = decoder_of(attach(base, method, weight_format))
    assert reason == Unsupported(f"it computes plain LoRA, not {METHODS[method].title}")


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if method.fast_engine and "dense" in method.trains_on]
)
def test_the_fused_decoder_computes_what_the_registry_promises(base, method):
    assert not isinstance(decoder_of(attach(base, method, "dense")), Unsupported)


def test_a_training_state_of_another_adapter_is_refused(base, tmp_path):
    model = attach(base, "pissa", "dense")
    save_training_state(model, tmp_path)
    other = attach_adapter(load_base(base, "dense"), method="pissa", options=small_options("pissa") | {"rank": 2})
    with pytest.raises(ModelError, match="adapter-mismatch"):
        restore_adapter_weights(other, tmp_path)


def test_a_layer_that_peft_does_not_take_for_a_method_is_an_error(tmp_path):
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    with pytest.raises(ModelError) as caught:
        attach(save(random_model(config), tmp_path), "oft", "dense")
    assert caught.value.code == "adapter-unsupported"
    assert "Conv1D" in caught.value.why


def test_gpt2_takes_every_method_that_goes_on_any_linear_layer(tmp_path):
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    folder = save(random_model(config), tmp_path)
    for method in (
        "lora",
        "dora",
        "pissa",
        "adalora",
        "vera",
        "houlsby",
        "layernorm",
        "prompt",
        "prefix",
        "full",
    ):
        options = {"targets": ("c_proj",)} if method == "houlsby" else {}
        model = attach(folder, method, "dense", **options)
        loss, _ = supervised_loss(model, batch_of([9, 6]))
        gradients = torch.autograd.grad(loss, trainable_parameters(model), allow_unused=True)
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients), method
