"""What holds for every format: the layer computes with its dequantised weight and keeps only the codes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn

from affina.errors import ModelError
from affina.kernels import fp8, int8
from affina.models.weights import (
    DENSE,
    FORMATS,
    FP8,
    INT8,
    NF4,
    Fp4Options,
    Fp8Linear,
    Fp8Options,
    Int8Linear,
    Int8Options,
    Nf4Options,
    QuantizedLinear,
    WeightFormatOptions,
    cache_dequantized,
    format_of,
    quantize_linears,
)

OPTIONS: list[WeightFormatOptions] = [Nf4Options(), Fp4Options(), Fp8Options(), Int8Options()]
ROW_SCALED: list[WeightFormatOptions] = [Fp8Options(), Int8Options()]
KERNELS = {"fp8": fp8, "int8": int8}


def options_named(option: WeightFormatOptions) -> str:
    return option.name


every_format = pytest.mark.parametrize("options", OPTIONS, ids=options_named)
row_scaled = pytest.mark.parametrize("options", ROW_SCALED, ids=options_named)


def layers(
    options: WeightFormatOptions, *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[QuantizedLinear, nn.Linear]:
    """A quantised layer and a dense one with the weight that it stands for."""
    torch.manual_seed(0)
    dense = nn.Linear(96, 70, bias=bias).to(dtype)
    quantized = options.quantize_linear(dense)
    dense.weight.data = quantized.dequantize()
    return quantized, dense


def state_bits(layer: nn.Module) -> dict[str, bytes]:
    """The bytes of every tensor: 8-bit floats cannot be compared as numbers."""
    return {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in layer.state_dict().items()
    }


@every_format
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
def test_output_and_input_gradient_are_those_of_the_dequantised_weight(options, bias, keeps):
    quantized, dense = layers(options, bias=bias)
    quantized.keep_dense_weight(keeps)
    found = torch.randn(2, 5, 96, requires_grad=True)
    expected = found.detach().clone().requires_grad_()
    quantized(found).square().sum().backward()
    dense(expected).square().sum().backward()
    assert torch.equal(found.grad, expected.grad)


@every_format
def test_the_backward_pass_is_the_derivative(options):
    quantized, _ = layers(options)
    double_input = torch.randn(3, 96, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quantized, (double_input,))


@every_format
def test_nothing_of_the_weights_size_is_kept_between_the_passes(options):
    quantized, _ = layers(options)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes) or tensor, lambda t: t):
        quantized(torch.randn(4, 96, requires_grad=True))
    assert sum(saved) < 70 * 96  # bytes: less than one a weight, where a dense float32 weight has four


@every_format
def test_gradients_are_the_same_after_an_evaluation_forward(options):
    # bitsandbytes on AVX512-BF16 CPUs repacks the weight in evaluation and never undoes it; gradients then vanish.
    quantized, _ = layers(options, dtype=torch.bfloat16)
    inputs = torch.randn(4, 96, dtype=torch.bfloat16)

    def gradient() -> torch.Tensor:
        leaf = inputs.clone().requires_grad_()
        quantized.train()(leaf).float().square().sum().backward()
        return leaf.grad

    before = gradient()
    with torch.no_grad():
        quantized.eval()(inputs)
    assert torch.equal(gradient(), before)


@every_format
def test_casting_the_module_changes_its_bias_alone(options):
    quantized, _ = layers(options)
    before, types = quantized.dequantize(), {name: getattr(quantized, name).dtype for name in quantized.EXACT}
    quantized.to(torch.bfloat16).half()
    assert quantized.bias.dtype == torch.float16
    quantized.float()
    assert {name: getattr(quantized, name).dtype for name in quantized.EXACT} == types
    assert torch.equal(quantized.dequantize(torch.float32), before)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


@every_format
def test_autocast_decides_the_type_of_the_product(options):
    quantized, _ = layers(options)
    inputs = torch.randn(4, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantized(inputs)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert inputs.grad.dtype == torch.float32


@every_format
def test_state_dict_round_trip_is_the_identity(options):
    quantized, _ = layers(options)
    torch.manual_seed(1)
    other = options.quantize_linear(nn.Linear(96, 70))
    other.keep_dense_weight(True)
    assert not torch.equal(other.dense_weight(torch.float32), quantized.dequantize())
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other.dense_weight(torch.float32), quantized.dequantize())
    assert state_bits(other) == state_bits(quantized)


@every_format
def test_a_state_dict_survives_both_kinds_of_file(options):
    quantized, _ = layers(options)
    torch.manual_seed(1)
    buffer = io.BytesIO()
    torch.save(quantized.state_dict(), buffer)
    buffer.seek(0)
    for state in (torch.load(buffer, weights_only=True), load_safetensors(save_safetensors(quantized.state_dict()))):
        other = options.quantize_linear(nn.Linear(96, 70))
        other.load_state_dict(state)
        assert state_bits(other) == state_bits(quantized)


@every_format
def test_a_copy_owns_its_weight(options):
    quantized, _ = layers(options)
    twin = copy.deepcopy(quantized)
    assert state_bits(twin) == state_bits(quantized)
    assert twin.weight.data_ptr() != quantized.weight.data_ptr()


@every_format
def test_formats_describe_their_layers(options):
    quantized, dense = layers(options, bias=False)
    weight_format = format_of(quantized)
    assert weight_format.name == options.name
    assert [other for other in FORMATS if other.owns(quantized)] == [weight_format, DENSE]
    assert format_of(dense) is DENSE
    assert format_of(nn.Embedding(3, 4)) is None
    assert set(weight_format.state_keys(quantized)) == set(quantized.state_dict())
    for known, layer in ((weight_format, quantized), (DENSE, dense)):
        assert known.shape(layer) == (70, 96)
        assert torch.equal(known.dequantize(layer), dense.weight)


def test_bytes_are_those_of_codes_and_scales():
    sizes = {option.name: format_of(layer := layers(option)[0]).num_bytes(layer) for option in OPTIONS}
    assert sizes["fp8"] == sizes["int8"] == 70 * 96 + 70 * 4
    assert sizes["fp4"] == sizes["nf4"]
    assert sizes["nf4"] < 70 * 96 * 4 / 7


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_weight_can_be_written_into_rows_that_are_apart(options, dtype):
    dense = nn.Linear(128, 70)
    quantized = options.quantize_linear(dense)
    room = torch.full((70, 200), 7.0, dtype=dtype)
    quantized.dequantize_into(room[:, 40:168])
    assert torch.equal(room[:, 40:168], quantized.dequantize(dtype))
    assert bool((room[:, :40] == 7).all())


# One byte and a scale per row
# ------------------------------------------------------------------------------------------------------------


@row_scaled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_weight_is_the_kernels(options, source, dtype, monkeypatch):
    monkeypatch.setattr("affina.models.weights.row_scaled._CHUNK_ELEMENTS_CPU", 1000)  # rows in several parts
    torch.manual_seed(0)
    dense = nn.Linear(96, 70).to(source)
    quantized = options.quantize_linear(dense)
    codes, scale = KERNELS[options.name].quantize_rows(dense.weight.detach())
    assert torch.equal(quantized.weight.data.float(), codes.float())
    assert torch.equal(quantized.scale, scale)
    assert quantized.dequantize().dtype == source
    assert torch.equal(quantized.dequantize(torch.float64), quantized.dequantize(torch.float32).double())
    assert torch.equal(quantized.dequantize(dtype), KERNELS[options.name].dequantize_rows(codes, scale, dtype))


@pytest.mark.parametrize(("options", "error"), [(Fp8Options(), 0.0265), (Int8Options(), 0.0084)], ids=["fp8", "int8"])
def test_the_error_on_normal_weights_is_the_documented_one(options, error):
    torch.manual_seed(0)
    dense = nn.Linear(2560, 200, bias=False)
    nn.init.normal_(dense.weight, std=0.02)
    difference = options.quantize_linear(dense).dequantize() - dense.weight
    assert float(difference.detach().square().mean().sqrt()) / 0.02 == pytest.approx(error, rel=0.02)


def test_eight_bits_survive_an_outlier_as_their_format_says():
    """int8's step is set by the row's largest number, e4m3's by each number."""
    torch.manual_seed(0)
    dense = nn.Linear(1024, 64, bias=False)
    nn.init.normal_(dense.weight)
    dense.weight.data[:, 0] = 40.0
    errors = {
        option.name: float((option.quantize_linear(dense).dequantize() - dense.weight)[:, 1:].detach().std())
        for option in ROW_SCALED
    }
    assert errors["int8"] == pytest.approx(40 / 127 / 12**0.5, rel=0.02)
    assert errors["fp8"] < 0.03


@row_scaled
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(options, bad):
    dense = nn.Linear(96, 70)
    dense.weight.data[69, 95] = bad
    with pytest.raises(ModelError, match=r"a weight of shape \[70, 96\] holds NaN or infinity") as caught:
        options.quantize_linear(dense)
    assert caught.value.code == "weights-not-finite"


@row_scaled
def test_a_row_of_zeros_stays_zero(options):
    dense = nn.Linear(96, 70, bias=False)
    dense.weight.data[3] = 0
    quantized = options.quantize_linear(dense)
    assert float(quantized.scale[3]) == 1.0
    assert not quantized.dequantize()[3].any()


@pytest.mark.parametrize(
    ("options", "other", "what"),
    [
        (Fp8Options(), Int8Options(), "weight is int8, the layer keeps float8_e4m3fn codes"),
        (Int8Options(), None, "weight is float32, the layer keeps int8 codes"),
    ],
    ids=["int8 into fp8", "dense into int8"],
)
def test_a_state_dict_of_another_format_is_refused_before_it_is_rounded(options, other, what):
    quantized, dense = layers(options)
    state = (other.quantize_linear(dense) if other else dense).state_dict()
    before = state_bits(quantized)
    with pytest.raises(ModelError, match=what) as caught:
        quantized.load_state_dict(state)
    assert caught.value.code == "checkpoint-mismatch"
    assert state_bits(quantized) == before


def test_what_a_layer_is_shows_in_its_text():
    assert (
        repr(layers(Fp8Options())[0]) == "Fp8Linear(in_features=96, out_features=70, float8_e4m3fn, one scale per row)"
    )
    assert repr(layers(Int8Options())[0]) == "Int8Linear(in_features=96, out_features=70, int8, one scale per row)"


def test_kinds_are_told_apart():
    assert isinstance(layers(Fp8Options())[0], Fp8Linear)
    assert isinstance(layers(Int8Options())[0], Int8Linear)
    assert (FP8.owns(layers(Int8Options())[0]), INT8.owns(layers(Fp8Options())[0])) == (False, False)
    assert not NF4.owns(layers(Fp8Options())[0])


# Inside a model
# ------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.lm_head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 9)
        self.embedding = nn.Embedding(9, 64)
        self.head = nn.Linear(64, 9, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("kind", [Nf4Options, Fp8Options, Int8Options])
def test_heads_skipped_names_and_shared_weights_stay_dense(kind):
    network = Network()
    names = quantize_linears(network, kind(skip_modules=("lm_head", "second")))
    assert names == ("first",)
    assert isinstance(network.first, QuantizedLinear)
    assert network.head.weight is network.embedding.weight


@every_format
def test_dense_weights_are_kept_within_the_budget_only(options):
    network = Network()
    quantize_linears(network, options)
    inputs = torch.randn(3, 64)
    expected = network.second(network.first(inputs))
    needed = 2 * 64 * 64 * 4
    assert cache_dequantized(network, needed - 1, torch.float32) == 0
    assert not network.first.keeps_dense_weight
    assert cache_dequantized(network, needed, torch.float32) == needed
    assert torch.equal(network.second(network.first(inputs)), expected)
    assert cache_dequantized(network, 0, torch.float32) == 0
    assert network.first._dense_weight is None
