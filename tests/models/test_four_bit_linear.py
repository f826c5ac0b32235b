"""What only the 4-bit layer has: bitsandbytes' names, and scales that are quantised themselves.

What holds for every format: test_quantized_linear.py.
"""

from __future__ import annotations

import torch
from torch import nn

from affina.models.weights import DENSE, NF4, Nf4Linear, Nf4Options


def quantized_layer(*, bias: bool = True) -> Nf4Linear:
    torch.manual_seed(0)
    return Nf4Options().quantize_linear(nn.Linear(96, 70, bias=bias))


def test_casting_the_module_keeps_the_scales_exact():
    quantized = quantized_layer()
    before = quantized.dequantize()
    quantized.to(torch.bfloat16).half().float()
    assert quantized.nested_absmax.dtype == torch.float32
    assert torch.equal(quantized.dequantize(torch.float32), before)


def test_keys_of_the_state_dict_are_those_of_bitsandbytes():
    quantized = quantized_layer(bias=False)
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


def test_double_quantisation_saves_three_eighths_of_a_bit():
    dense = nn.Linear(4096, 64, bias=False)
    double, single = (Nf4Options(double_quantization=on).quantize_linear(dense) for on in (True, False))
    bits = [NF4.num_bytes(layer) * 8 / dense.weight.numel() for layer in (double, single)]
    assert bits[0] < 4.128
    assert bits[1] == 4.5
    assert DENSE.num_bytes(dense) == 4 * dense.weight.numel()
