"""The 4-bit layer computes with the dequantised weight, forward and backward, and keeps only the codes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from affina.models.weights import (
    DENSE,
    NF4,
    Nf4Linear,
    Nf4Options,
    cache_dequantized,
    format_of,
    quantize_linears,
)
from affina.models.weights.nf4 import quantize_linear


def layers(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Nf4Linear, nn.Linear]:
    """An NF4 layer and a dense one with the weight that it stands for."""
    torch.manual_seed(0)
    dense = nn.Linear(96, 70, bias=bias).to(dtype)
    quantized = quantize_linear(dense, Nf4Options())
    dense.weight.data = quantized.dequantize()
    return quantized, dense


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
def test_output_and_input_gradient_are_those_of_the_dequantised_weight(bias, keeps):
    quantized, dense = layers(bias)
    quantized.keeps_dense_weight = keeps
    found = torch.randn(2, 5, 96, requires_grad=True)
    expected = found.detach().clone().requires_grad_()
    quantized(found).square().sum().backward()
    dense(expected).square().sum().backward()
    assert torch.equal(found.grad, expected.grad)


def test_the_backward_pass_is_the_derivative():
    quantized, _ = layers()
    double_input = torch.randn(3, 96, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quantized, (double_input,))


def test_nothing_of_the_weights_size_is_kept_between_the_passes():
    quantized, _ = layers()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.nbytes) or tensor, lambda t: t):
        quantized(torch.randn(4, 96, requires_grad=True))
    assert sum(saved) < 70 * 96  # bytes: less than one a weight, where a dense float32 weight has four


def test_gradients_are_the_same_after_an_evaluation_forward():
    # bitsandbytes on AVX512-BF16 CPUs repacks the weight in evaluation and never undoes it; gradients then vanish.
    quantized, _ = layers(dtype=torch.bfloat16)
    inputs = torch.randn(4, 96, dtype=torch.bfloat16)

    def gradient() -> torch.Tensor:
        leaf = inputs.clone().requires_grad_()
        quantized.train()(leaf).float().square().sum().backward()
        return leaf.grad

    before = gradient()
    with torch.no_grad():
        quantized.eval()(inputs)
    assert torch.equal(gradient(), before)


def test_casting_the_module_keeps_the_scales_exact():
    quantized, _ = layers()
    before = quantized.dequantize()
    quantized.to(torch.bfloat16).half().float()
    assert quantized.nested_absmax.dtype == torch.float32
    assert torch.equal(quantized.dequantize(torch.float32), before)


def test_autocast_decides_the_type_of_the_product():
    quantized, _ = layers()
    inputs = torch.randn(4, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantized(inputs)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert inputs.grad.dtype == torch.float32


def test_state_dict_round_trip_is_the_identity():
    quantized, _ = layers()
    torch.manual_seed(1)
    other = quantize_linear(nn.Linear(96, 70), Nf4Options())
    assert not torch.equal(other.dequantize(), quantized.dequantize())
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other.dequantize(), quantized.dequantize())
    assert torch.equal(other.bias, quantized.bias)


def test_keys_of_the_state_dict_are_those_of_bitsandbytes():
    quantized, _ = layers(bias=False)
    assert (
        set(quantized.state_dict())
        == set(NF4.state_keys(quantized))
        == {
            "weight",
            "weight.absmax",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_state.bitsandbytes__nf4",
        }
    )


def test_formats_describe_their_layers():
    quantized, dense = layers()
    assert format_of(quantized) is NF4
    assert format_of(dense) is DENSE
    assert format_of(nn.Embedding(3, 4)) is None
    for weight_format, layer in ((NF4, quantized), (DENSE, dense)):
        assert weight_format.shape(layer) == (70, 96)
        assert torch.equal(weight_format.dequantize(layer), dense.weight)
    assert NF4.num_bytes(quantized) < DENSE.num_bytes(dense) / 7


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.lm_head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 9)
        self.embedding = nn.Embedding(9, 64)
        self.head = nn.Linear(64, 9, bias=False)
        self.head.weight = self.embedding.weight


def test_heads_skipped_names_and_shared_weights_stay_dense():
    network = Network()
    names = quantize_linears(network, Nf4Options(skip_modules=("lm_head", "second")))
    assert names == ("first",)
    assert isinstance(network.first, Nf4Linear)
    assert network.head.weight is network.embedding.weight


def test_dense_weights_are_kept_within_the_budget_only():
    network = Network()
    quantize_linears(network, Nf4Options())
    inputs = torch.randn(3, 64)
    expected = network.second(network.first(inputs))
    needed = 2 * 64 * 64 * 4
    assert cache_dequantized(network, needed - 1, torch.float32) == 0
    assert not network.first.keeps_dense_weight
    assert cache_dequantized(network, needed, torch.float32) == needed
    assert torch.equal(network.second(network.first(inputs)), expected)
    assert cache_dequantized(network, 0, torch.float32) == 0
