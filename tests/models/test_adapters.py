"""Adapters attach where they should, survive saving, load in plain PEFT, and refuse the wrong base."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config

from affina.errors import ModelError
from affina.models.adapters import (
    METHODS,
    adapter_disabled,
    attach_adapter,
    base_identity,
    has_adapter,
    load_adapter,
    method_named,
    read_adapter_info,
    resolve_targets,
    save_adapter,
)
from affina.models.adapters.files import read_adapter_tensors
from affina.models.adapters.restore import restore_adapter_weights
from affina.models.compat import quiet_peft
from affina.models.load import load_causal_lm
from affina.models.weights import Fp8Options, Int8Options, Nf4Options, format_of, quantized_layers
from tests.models.tiny import VOCABULARY, qwen3_config, random_model, randomize_adapter, save

IDS = torch.arange(20).unsqueeze(0) * 5 % VOCABULARY
CONTRACT = {"fingerprint": "abc", "thinking": "keep"}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(random_model(qwen3_config()), tmp_path_factory.mktemp("base"))


QUANTIZED = [Nf4Options(), Fp8Options(), Int8Options()]


def base(folder, weight_format=None, dtype=torch.float32):
    return load_causal_lm(str(folder), dtype=dtype, device="cpu", weight_format=weight_format)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """A trained adapter on disk and the logits that it gives."""
    model = attach_adapter(base(folder), rank=4, alpha=12)
    randomize_adapter(model)
    return save_adapter(model, tmp_path_factory.mktemp("adapter"), contract=CONTRACT), logits(model)


# Attaching
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "scale"), [("lora", 32 / 9), ("rslora", 32 / math.sqrt(9))])
def test_the_update_is_scaled_as_the_method_says(folder, method, scale):
    adapted = attach_adapter(base(folder), method=method, rank=9, alpha=32)
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == pytest.approx(scale)
    assert METHODS[method].scale(9, 32) == pytest.approx(scale)


def test_the_seed_alone_decides_the_adapter(folder):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = attach_adapter(base(folder), rank=4, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = attach_adapter(base(folder), rank=4, seed=7), attach_adapter(base(folder), rank=4, seed=8)
    first, second, other = (model.state_dict() for model in (first, second, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("weight_format", [Fp8Options(), Int8Options()], ids=["fp8", "int8"])
def test_the_adapter_is_not_rounded_to_the_type_of_the_codes(folder, weight_format):
    # PEFT makes an adapter in the type of the frozen weight: in e4m3 half of A's smaller numbers would be 0.
    dense, quantized = (attach_adapter(base(folder, options), rank=4, seed=7) for options in (None, weight_format))
    expected = {name: p for name, p in dense.named_parameters() if p.requires_grad}
    found = {name: p for name, p in quantized.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_adapter_is_off_inside_adapter_disabled(folder):
    model = base(folder)
    before = logits(model)
    adapted = attach_adapter(model, rank=4)
    randomize_adapter(adapted)
    assert not torch.equal(logits(adapted), before)
    with adapter_disabled(adapted):
        assert torch.equal(logits(adapted), before)
    assert not torch.equal(logits(adapted), before)
    assert has_adapter(adapted)


def test_adapter_disabled_accepts_a_model_without_adapter(folder):
    model = base(folder)
    with adapter_disabled(model):
        assert torch.equal(logits(model), logits(model))
    assert not has_adapter(model)


def test_dropout_acts_in_training_only(folder):
    adapted = attach_adapter(base(folder), rank=4, dropout=0.5)
    randomize_adapter(adapted)
    assert torch.equal(logits(adapted.eval()), logits(adapted))
    assert not torch.equal(logits(adapted.train()), logits(adapted))


def test_layers_of_gpt2_take_adapters_too():
    model = random_model(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=1, n_head=2))
    adapted = attach_adapter(model, rank=2)
    assert len(adapted.targeted_module_names) == 4


# Targets
# ---------------------------------------------------------------------------------------------------------------


def test_all_linear_means_every_linear_layer_but_the_head(folder):
    names = resolve_targets(base(folder))
    assert len(names) == 14
    assert not any("lm_head" in name for name in names)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(["q_proj"], 2), (["q_proj", "v_proj"], 4), (["layers.1.mlp.up_proj"], 1), ("mlp.down_proj", 2)],
)
def test_targets_are_names_or_their_last_parts(folder, targets, count):
    names = resolve_targets(base(folder), targets)
    assert len(names) == count
    adapted = attach_adapter(base(folder), rank=2, targets=targets)
    assert sorted(adapted.targeted_module_names) == sorted(names)


def test_a_target_that_matches_nothing_is_an_error_with_candidates(folder):
    with pytest.raises(ModelError) as caught:
        attach_adapter(base(folder), targets=["v_proj", "q_porj"])
    assert caught.value.code == "target-unmatched"
    assert caught.value.what == 'adapter.targets "q_porj" matches nothing'
    assert "the model has q_proj, k_proj, v_proj, o_proj, gate_proj" in caught.value.why
    assert caught.value.fix == "did you mean q_proj?"


def test_a_target_that_is_not_linear_is_an_error(folder):
    with pytest.raises(ModelError, match="not a linear layer"):
        resolve_targets(base(folder), ["input_layernorm"])


def test_a_name_unlike_any_gets_the_list(folder):
    with pytest.raises(ModelError, match="use all-linear, or some of q_proj"):
        resolve_targets(base(folder), ["xyz"])


def test_an_unknown_method_is_an_error_with_the_nearest_name():
    with pytest.raises(
        ModelError, match=r'adapter-method-unknown\]: adapter\.method "rs-lora" (.|\n)*did you mean rslora'
    ):
        method_named("rs-lora")


def test_a_method_is_refused_on_a_weight_format_on_which_it_does_not_train(folder):
    assert has_adapter(attach_adapter(base(folder), method="pissa", rank=2))
    with pytest.raises(ModelError) as caught:
        attach_adapter(base(folder, Nf4Options()), method="pissa", rank=2)
    assert caught.value.code == "adapter-unsupported"
    assert caught.value.what == "PiSSA cannot train on model.layers.0.self_attn.q_proj (Nf4Linear)"
    assert caught.value.why.startswith("PiSSA starts from a factorisation of the weights")
    assert caught.value.fix.startswith("write `quantization: none`, or `adapter: loftq` (on nf4 also: lora, rslora")


# Saving and loading
# ----------------------------------------------------------------------------------------------------


def test_loading_what_was_saved_is_the_identity(folder, saved):
    directory, expected = saved
    assert torch.equal(logits(load_adapter(base(folder), directory)), expected)


def test_the_adapter_loads_in_plain_peft_with_equal_logits(folder, saved):
    directory, expected = saved
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with quiet_peft():
        loaded = PeftModel.from_pretrained(plain, str(directory)).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)


def test_the_files_are_those_of_peft_and_one_of_ours(folder, saved):
    directory, _ = saved
    names = {path.name for path in directory.iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "affina.json"}
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 12, True)
    info = read_adapter_info(directory)
    assert info.contract == CONTRACT
    assert info.base == base_identity(base(folder))
    assert "affina" in info.versions


@pytest.mark.parametrize("weight_format", QUANTIZED, ids=["nf4", "fp8", "int8"])
def test_an_adapter_trained_on_a_quantised_base_loads_on_the_dense_one_and_back(folder, tmp_path, weight_format):
    trained = attach_adapter(base(folder, weight_format), rank=4)
    randomize_adapter(trained)
    directory = save_adapter(trained, tmp_path, contract=CONTRACT)
    again = load_adapter(base(folder, weight_format), directory)
    assert torch.equal(logits(again), logits(trained))
    assert {format_of(layer).name for layer in quantized_layers(again)} == {weight_format.name}
    load_adapter(base(folder), directory)


def test_a_trainable_adapter_can_go_on(folder, saved):
    directory, _ = saved
    frozen, trainable = load_adapter(base(folder), directory), load_adapter(base(folder), directory, trainable=True)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert sum(parameter.requires_grad for parameter in trainable.parameters()) == 28


def test_matrices_are_read_by_layer(saved):
    directory, _ = saved
    pairs = read_adapter_tensors(directory)
    down, up = pairs["model.layers.1.mlp.down_proj"]
    assert (down.shape, up.shape) == ((4, 96), (64, 4))
    assert len(pairs) == 14


def test_restoring_gives_a_fresh_adapter_the_saved_parameters(folder, saved):
    directory, expected = saved
    fresh = attach_adapter(base(folder), rank=4, alpha=12)
    before = {name: id(parameter) for name, parameter in fresh.named_parameters()}
    restore_adapter_weights(fresh, directory)
    assert torch.equal(logits(fresh.eval()), expected)
    assert {name: id(parameter) for name, parameter in fresh.named_parameters()} == before


def test_parameters_of_another_adapter_are_not_restored(folder, saved):
    directory, _ = saved
    other = attach_adapter(base(folder), rank=8, targets=["q_proj"])
    before = logits(other)
    with pytest.raises(ModelError) as caught:
        restore_adapter_weights(other, directory)
    assert caught.value.code == "adapter-mismatch"
    assert f"the adapter in {directory} has other parameters than this run" in caught.value.what
    assert caught.value.why == "28 names or shapes differ"
    assert "config.yaml of its run" in caught.value.fix
    assert torch.equal(logits(other), before)


# Identity
# --------------------------------------------------------------------------------------------------------------


def test_the_identity_does_not_depend_on_type_format_or_adapter(folder):
    expected = base_identity(base(folder))
    assert base_identity(base(folder, dtype=torch.bfloat16)) == expected
    for weight_format in QUANTIZED:
        assert base_identity(base(folder, weight_format)) == expected
    assert base_identity(attach_adapter(base(folder), rank=2)) == expected


def test_another_model_of_the_same_shape_has_another_identity(folder):
    other = base_identity(random_model(qwen3_config(), seed=1))
    mine = base_identity(base(folder))
    assert other["shapes_sha256"] == mine["shapes_sha256"]
    assert other["weights_sha256"] != mine["weights_sha256"]


def test_a_base_of_another_shape_is_refused(saved, tmp_path):
    directory, _ = saved
    other = base(save(random_model(qwen3_config(intermediate_size=64)), tmp_path))
    with pytest.raises(ModelError) as caught:
        load_adapter(other, directory)
    assert caught.value.code == "adapter-base-mismatch"
    assert "down_proj has 64 inputs, the adapter was made for 96" in caught.value.why


def test_a_base_with_other_depth_is_refused(saved, tmp_path):
    directory, _ = saved
    other = base(save(random_model(qwen3_config(num_hidden_layers=3)), tmp_path))
    with pytest.raises(ModelError, match="num_hidden_layers 2 → 3"):
        load_adapter(other, directory)
    shallow = base(save(random_model(qwen3_config(num_hidden_layers=1)), tmp_path / "shallow"))
    with pytest.raises(ModelError, match=r"it adapts model\.layers\.1"):
        load_adapter(shallow, directory)


def test_another_fine_tune_of_the_same_shape_is_refused(folder, saved, tmp_path):
    directory, _ = saved
    other = base(save(random_model(qwen3_config(), seed=1), tmp_path))
    with pytest.raises(ModelError) as caught:
        load_adapter(other, directory)
    assert "norms and embeddings are not those" in caught.value.why
    assert caught.value.fix == f"load it on {folder}"


# Damage
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(saved, tmp_path):
    directory, _ = saved
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_changed_byte_is_found_by_its_checksum(folder, copy):
    path = copy / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_adapter(base(folder), copy)
    assert caught.value.code == "adapter-damaged"
    assert "is not the file that was saved" in caught.value.what
    assert str(caught.value.where).endswith("adapter_model.safetensors")


def test_a_file_cut_short_is_found_without_a_checksum(folder, copy):
    (copy / "affina.json").unlink()
    path = copy / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        load_adapter(base(folder), copy)


def test_a_broken_config_is_found(folder, copy):
    (copy / "affina.json").unlink()
    (copy / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json is not JSON"):
        load_adapter(base(folder), copy)


def test_an_adapter_of_another_tool_loads_without_our_file(folder, saved, copy):
    (copy / "affina.json").unlink()
    assert torch.equal(logits(load_adapter(base(folder), copy)), saved[1])
    assert read_adapter_info(copy).contract is None


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(folder, copy, name):
    (copy / name).unlink()
    with pytest.raises(ModelError, match=rf"adapter-missing\].*it has no {name}(.|\n)*the directory that holds"):
        load_adapter(base(folder), copy)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"peft_type": "XLORA"}, "is XLORA"),
        ({"bias": "all"}, "is LORA with bias all"),
        ({"modules_to_save": ["lm_head"]}, "is LORA with modules_to_save"),
        ({"peft_type": "NONSENSE"}, "is NONSENSE"),
    ],
)
def test_adapters_that_we_do_not_load_are_refused(folder, copy, changes, what):
    error = refused_with(folder, copy, changes)
    assert error.code == "adapter-unsupported"
    assert error.what.endswith(what)
    assert error.fix == "load it in PEFT"


@pytest.mark.parametrize("changes", [{"peft_type": "LOHA"}, {"use_dora": True}])
def test_a_file_of_another_method_than_its_config_says_is_an_error(folder, copy, changes):
    # PEFT leaves what is missing as it was made, at random for LoHa, and warns.
    error = refused_with(folder, copy, changes)
    assert error.code == "adapter-mismatch"
    assert "the parameters are another method's" in error.why


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq"])
def test_an_adapter_that_would_rewrite_the_base_again_is_refused(folder, copy, start):
    error = refused_with(folder, copy, {"init_lora_weights": start})
    assert error.code == "adapter-unsupported"
    assert "loading it changes the base again" in error.why
    assert "path_initial_model_for_weight_conversion" in error.fix


def refused_with(folder, copy, changes):
    (copy / "affina.json").unlink()
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError) as caught:
        load_adapter(base(folder), copy)
    return caught.value
