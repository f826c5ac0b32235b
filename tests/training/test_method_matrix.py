"""Every method on dense weights and on NF4: trains, saves, reloads, merges or says why not, switches, resumes."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from affina.catalog.methods import METHODS
from affina.catalog.shapes import read_shape
from affina.errors import ExportError, ModelError
from affina.export.merge import merge
from affina.models.adapters import adapter_disabled, attach_adapter, load_adapter, read_adapter_info, save_adapter
from affina.models.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from affina.models.adapters.restore import restore_adapter_weights, save_training_state
from affina.models.engines import trainable_parameters
from affina.models.forward import supervised_loss
from affina.models.load import describe_model
from affina.models.quantized_checkpoint import planned_tensors
from affina.models.reward_head import SCORE_NAME, add_reward_head, document_scores
from affina.models.structure import base_model_of
from affina.models.weights import Nf4Linear, expand_linears, quantize_vocabulary
from tests.models.tiny import batch_of
from tests.training.method_cases import (
    FORMATS,
    NUM_STEPS,
    MethodRun,
    attach,
    hidden_of,
    load_base,
    make_base,
    no_global_randomness,
    reload,
    small_options,
    trained_values,
)

CASES = [(method, weight_format) for method in METHODS for weight_format in ("dense", "nf4")]
TRAINABLE = [case for case in CASES if case[1] in METHODS[case[0]].trains_on]
REFUSED = [case for case in CASES if case[1] not in METHODS[case[0]].trains_on]
every_trainable_case = pytest.mark.parametrize(
    ("method", "weight_format"), TRAINABLE, ids=["-".join(case) for case in TRAINABLE]
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """From method and format to a run of three steps that was never stopped, its folder and its hidden states."""

    @cache
    def run(method: str, weight_format: str):
        folder = tmp_path_factory.mktemp(method)
        whole = MethodRun(attach(base, method, weight_format), folder)
        whole.train(until=NUM_STEPS)
        return whole, folder, hidden_of(whole.model)

    return run


@every_trainable_case
def test_three_steps_change_what_is_trained_and_nothing_else(trained, method, weight_format):
    whole, _, _ = trained(method, weight_format)
    names = {name for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    now = dict(whole.model.named_parameters())
    changed = {name for name, before in whole.before.items() if not torch.equal(before, now[name])}
    assert changed <= names
    # LayerNorm tuning and the like have few tensors, and each of them moves; a mask may leave a rank of AdaLoRA alone.
    assert len(changed) >= 0.9 * len(names)
    assert {now[name].dtype for name in names} == {torch.float32}


@every_trainable_case
def test_the_registry_counts_what_is_trained_and_saved(base, trained, method, weight_format):
    whole, folder, _ = trained(method, weight_format)
    entry = METHODS[method]
    shape = read_shape(load_base(base, "dense").config.to_dict())
    settings = entry.settings(**small_options(method))
    count = sum(parameter.numel() for parameter in whole.model.parameters() if parameter.requires_grad)
    assert count == entry.num_parameters(shape, settings)
    saved = sum(tensor.numel() for tensor in load_file(folder / WEIGHTS_FILE).values())
    # AdaLoRA shares ranks out as it likes; layers are of different sizes.
    assert saved == entry.num_file_parameters(shape, settings) or method == "adalora"


@every_trainable_case
def test_a_saved_adapter_loads_to_the_same_model(base, trained, method, weight_format):
    _, folder, expected = trained(method, weight_format)
    found = hidden_of(reload(base, folder, weight_format))
    # PiSSA and OLoRA are saved as one LoRA of rank 2R, AdaLoRA without the ranks that are masked: the same terms in
    # other sums, some units of 2^-24 of numbers of the order of one.
    tolerance = 1e-5 if method in ("pissa", "olora", "adalora") else 0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def files_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    config = json.loads((folder / CONFIG_FILE).read_text())
    # AdaLoRA's pattern says which ranks of those that it started with are left; of a loaded one, all are.
    ranks = {name: sum(kept) for name, kept in (config.get("rank_pattern") or {}).items()}
    return load_file(folder / WEIGHTS_FILE), config | {"rank_pattern": ranks}


@every_trainable_case
def test_a_loaded_adapter_is_saved_as_it_was(base, trained, tmp_path, method, weight_format):
    _, folder, _ = trained(method, weight_format)
    expected, config = files_of(folder)
    may_go_on = METHODS[method].kind != "virtual tokens"
    for trainable in (False, True) if may_go_on else (False,):
        loaded = load_adapter(load_base(base, weight_format), folder, trainable=trainable)
        save_adapter(loaded, tmp_path, contract={"fingerprint": "abc"})
        found, again = files_of(tmp_path)
        assert again == config
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert read_adapter_info(tmp_path).method == method
        names = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        fresh = {
            name
            for name, parameter in attach(base, method, weight_format).named_parameters()
            if parameter.requires_grad
        }
        assert names == (fresh if trainable else set())


VIRTUAL_TOKENS = [name for name, method in METHODS.items() if method.kind == "virtual tokens"]


@pytest.mark.parametrize("method", VIRTUAL_TOKENS)
def test_virtual_tokens_are_not_trained_further_from_their_file_and_the_error_says_so(base, trained, method):
    _, folder, _ = trained(method, "dense")
    with pytest.raises(ModelError) as caught:
        load_adapter(load_base(base, "dense"), folder, trainable=True)
    assert caught.value.code == "adapter-unsupported"
    assert caught.value.what.endswith(f"is {METHODS[method].title}, which cannot be trained further from its file")
    assert "for inference alone" in caught.value.why
    assert caught.value.fix.startswith("resume its run")


# What a model with an adapter says of itself, and what is written of it
# ----------------------------------------------------------------------------------------------------------------


@every_trainable_case
def test_the_base_under_an_adapter_is_described_without_expanding_a_weight(base, monkeypatch, method, weight_format):
    plain, model = describe_model(load_base(base, weight_format)), attach(base, method, weight_format)
    monkeypatch.setattr(Nf4Linear, "dequantize", None)
    found = describe_model(model)
    assert found["num_parameters"] == plain["num_parameters"]
    assert {name: size for name, size in found["num_bytes"].items() if name != "adapter"} == plain["num_bytes"]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found["num_trainable"] == trained
    # PiSSA and OLoRA hold their initial factors besides, AdaLoRA the number of ranks of each of 14 layers.
    beside = {"pissa": trained, "olora": trained, "adalora": 14}.get(method, 0)
    assert found["num_adapter_parameters"] == (0 if method in ("full", "freeze") else trained + beside)
    assert found["num_bytes"].get("adapter", 0) == 4 * found["num_adapter_parameters"]


@every_trainable_case
def test_of_a_model_with_an_adapter_the_base_alone_is_written(base, method, weight_format):
    expected = {tensor.name for tensor in planned_tensors(load_base(base, weight_format))}
    model = base_model_of(attach(base, method, weight_format))
    assert {tensor.name for tensor in planned_tensors(model)} == expected


# A reward model's head
# ----------------------------------------------------------------------------------------------------------------

KEEPS_HEAD = [method for method, weight_format in TRAINABLE if METHODS[method].keeps_head and weight_format == "nf4"]


def with_head(base: Path, method: str, seed: int = 1) -> torch.nn.Module:
    model = load_base(base, "nf4" if "nf4" in METHODS[method].trains_on else "dense")
    add_reward_head(model, seed=seed)
    options = small_options(method)
    return attach_adapter(model, method=method, seed=5, options=options, trained_modules=(SCORE_NAME,))


@pytest.mark.parametrize("method", KEEPS_HEAD)
def test_a_reward_models_head_is_trained_saved_and_restored_beside_the_adapter(base, tmp_path, method):
    model = with_head(base, method)
    (head,) = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "score" in name]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    expected = scores_of(model)
    save_adapter(model, tmp_path, contract={})
    save_training_state(model, tmp_path)
    other = load_base(base, "nf4")
    add_reward_head(other, seed=2)  # the head comes from the file
    assert torch.equal(scores_of(load_adapter(other, tmp_path)), expected)
    fresh = with_head(base, method, seed=2)
    restore_adapter_weights(fresh, tmp_path)
    assert torch.equal(scores_of(fresh), expected)
    assert torch.equal(fresh.get_parameter(head), model.get_parameter(head))
    written = [tensor.name for tensor in planned_tensors(base_model_of(model))]
    assert [name for name in written if "score" in name] == ["score.weight"]


def scores_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return document_scores(model.eval(), batch_of([7, 9], seed=3))


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].keeps_head])
def test_a_method_that_keeps_no_head_is_refused_beside_one(base, method):
    with pytest.raises(ModelError) as caught:
        with_head(base, method)
    assert caught.value.code == "adapter-unsupported"
    assert caught.value.what == f"a reward model's head is not trained beside {METHODS[method].title}"
    assert caught.value.fix == "write `adapter: lora`, or an objective without a head, such as `objective: dpo`"


def test_a_reward_models_adapter_on_a_model_without_a_head_says_what_it_is(base, tmp_path):
    save_adapter(with_head(base, "lora"), tmp_path, contract={})
    with pytest.raises(ModelError) as caught:
        load_adapter(load_base(base, "nf4"), tmp_path)
    assert caught.value.code == "adapter-unsupported"
    assert caught.value.what == (
        f"the adapter in {tmp_path} is a reward model's, and the model has no head called score"
    )
    assert "AutoModelForSequenceClassification" in caught.value.fix


# An int8 vocabulary (engine.memory: lowest)
# ----------------------------------------------------------------------------------------------------------------


def with_int8_vocabulary(base: Path) -> torch.nn.Module:
    model = load_base(base, "dense")
    quantize_vocabulary(model)
    return model


def test_the_last_layers_are_trained_saved_and_loaded_beside_an_int8_vocabulary(base, tmp_path):
    model = attach_adapter(with_int8_vocabulary(base), method="freeze", options={"num_layers": 1})
    run = MethodRun(model, tmp_path)
    run.train(until=NUM_STEPS)
    now = dict(model.named_parameters())
    changed = {name for name, before in run.before.items() if not torch.equal(before, now[name])}
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed)
    assert torch.equal(hidden_of(load_adapter(with_int8_vocabulary(base), tmp_path)), hidden_of(model))


def test_an_int8_vocabulary_is_neither_trained_nor_replaced_by_trained_weights(base, trained):
    with pytest.raises(ModelError) as caught:
        attach_adapter(with_int8_vocabulary(base), method="full")
    assert caught.value.code == "adapter-unsupported"
    assert caught.value.what == "full fine-tuning cannot train an embedding and a head in int8"
    assert caught.value.why == "lowest keeps embedding and head in int8, whose codes cannot be trained"
    assert caught.value.fix == "write `memory: auto`, or `adapter: lora`"
    _, folder, _ = trained("full", "dense")
    with pytest.raises(ModelError, match="holds trained weights, and the base is quantised") as caught:
        load_adapter(with_int8_vocabulary(base), folder)
    assert caught.value.why == "a trained model.embed_tokens.weight cannot take the place of codes"


@every_trainable_case
def test_switched_off_the_model_is_its_base_and_on_again_it_is_as_before(base, trained, method, weight_format):
    whole, _, tuned = trained(method, weight_format)
    of_base = hidden_of(load_base(base, weight_format))
    flags = [parameter.requires_grad for parameter in whole.model.parameters()]
    with adapter_disabled(whole.model):
        # Without virtual tokens samples share a row again, and attention sums in another order.
        torch.testing.assert_close(hidden_of(whole.model), of_base, rtol=0, atol=0 if METHODS[method].packs else 2e-6)
    assert torch.equal(hidden_of(whole.model), tuned)
    assert not torch.allclose(tuned, of_base)
    assert [parameter.requires_grad for parameter in whole.model.parameters()] == flags


@every_trainable_case
def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(base, trained, tmp_path, method, weight_format):
    whole, _, _ = trained(method, weight_format)
    first = MethodRun(attach(base, method, weight_format), tmp_path)
    state = first.train(until=1)
    assert state.stop_reason == "interrupted"
    second = MethodRun(attach(base, method, weight_format), tmp_path)
    second.restore(tmp_path)
    resumed = dataclasses.replace(state, stop_reason=None)
    second.train(until=NUM_STEPS, state=resumed)
    expected, found = trained_values(whole.model), trained_values(second.model)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@every_trainable_case
def test_a_merged_model_is_the_adapted_one_or_the_merge_is_refused(base, trained, tmp_path, method, weight_format):
    _, folder, expected = trained(method, weight_format)
    if METHODS[method].merges == "no":
        with pytest.raises(ExportError) as caught:
            merge(str(base), folder, tmp_path / "merged", dtype="float32")
        assert caught.value.code == "merge-unsupported"
        assert "adapter: lora" in caught.value.fix
        assert not (tmp_path / "merged").exists()
        return
    merge(str(base), folder, tmp_path / "merged", dtype="float32", trained_weight_format=FORMATS[weight_format])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    made_for = weight_format if METHODS[method].merges == "dequantised base" else "dense"
    torch.testing.assert_close(hidden_of(merged), hidden_of(reload(base, folder, made_for)), rtol=1e-4, atol=1e-4)
    if made_for == weight_format:
        torch.testing.assert_close(hidden_of(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "weight_format"), list({case[0]: case for case in TRAINABLE[::-1]}.values()))
def test_the_same_seed_gives_the_same_adapter_and_leaves_the_random_state_alone(base, method, weight_format):
    if method == "eva":
        pytest.skip("its directions come from data: test_eva.py")
    with no_global_randomness():
        first, second = (trained_values(attach(base, method, weight_format)) for _ in range(2))
    assert all(torch.equal(second[name], value) for name, value in first.items())


NF4_CASES = [method for method, weight_format in TRAINABLE if weight_format == "nf4" and method != "loftq"]


@pytest.mark.parametrize("method", NF4_CASES)
@pytest.mark.parametrize("weight_format", ["nf4", "fp4", "int8", "fp8"])
def test_gradients_on_codes_are_those_on_the_weights_that_they_stand_for(base, method, weight_format):
    # PEFT's HRA trains on int8 codes as if they were weights, without an error; here this would be seen.
    on_codes = attach_to(base, method, weight_format, expand=False)
    on_weights = attach_to(base, method, weight_format, expand=True)
    for found, expected in zip(gradients(on_codes), gradients(on_weights), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def attach_to(base: Path, method: str, weight_format: str, *, expand: bool):
    model = load_base(base, weight_format)
    if expand:
        expand_linears(model, torch.float32)
    return attach_adapter(model, method=method, seed=5, options=small_options(method))


def gradients(model) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    parameters = trainable_parameters(model)
    with torch.no_grad():
        for parameter in parameters:  # away from zero, where half of the gradients are
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    loss, _ = supervised_loss(model, batch_of([11, 6], seed=4))
    return list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize(("method", "weight_format"), REFUSED, ids=["-".join(case) for case in REFUSED])
def test_a_method_that_cannot_train_on_a_format_names_the_nearest_that_can(base, method, weight_format):
    with pytest.raises(ModelError) as caught:
        attach(base, method, weight_format)
    assert caught.value.code == "adapter-unsupported"
    assert caught.value.why
    nearest = {"pissa": "loftq", "olora": "loftq", "loftq": "pissa"}.get(method, "lora")
    assert f"`adapter: {nearest}`" in caught.value.fix


@pytest.mark.parametrize("method", [method for method in METHODS if "dense" in METHODS[method].trains_on])
def test_a_16_bit_base_trains_with_float32_parameters(base, method):
    model = attach(base, method, "dense", dtype=torch.bfloat16)
    parameters = trainable_parameters(model)
    loss, count = supervised_loss(model, batch_of([11, 6], seed=4))
    gradients = torch.autograd.grad(loss / count, parameters, allow_unused=True)
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    exact, _ = supervised_loss(attach(base, method, "dense"), batch_of([11, 6], seed=4))
    # bfloat16 has 8 bits: two layers of sums lose about 1% of a loss.
    assert abs(float(loss.detach()) - float(exact.detach())) < 0.03 * float(exact.detach())
