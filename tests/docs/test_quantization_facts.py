"""What can be checked of the QLoRA paper (arXiv:2305.14314), and the table of docs/concepts/quantization.md from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from affina.kernels import four_bit
from affina.kernels.code_tables import FP4, NF4, normal_float_numbers
from affina.models.weights import Fp4Options, Fp8Options, Int8Options, Nf4Options, WeightFormatOptions
from affina.training.optim import moment_bytes

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "quantization.md"
QWEN3_4B = [(4096, 2560), (1024, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (9728, 2560), (2560, 9728)] * 36
"""(out, in) of the linear layers of Qwen3-4B; 3,633,315,840 weights."""

APPENDIX_E = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""The paper's list of NF4's values."""


@pytest.fixture(scope="module")
def weight() -> Tensor:
    """1,024 rows of 2,560 numbers of the standard normal distribution: 40,960 blocks."""
    return torch.randn(1024, 2560, generator=torch.Generator().manual_seed(0))


def error(quantized: Tensor, weight: Tensor) -> float:
    return float((quantized.float() - weight).double().square().mean().sqrt())


def quantized_by(options: WeightFormatOptions, weight: Tensor) -> Tensor:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return options.quantize_linear(layer).dequantize(torch.float32)


def int4(weight: Tensor) -> Tensor:
    """Whole numbers from −7 to 7 with the same scale per block of 64: max |w| on 7."""
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 7
    return ((blocks / scale).round() * scale).reshape(weight.shape)


# Section 3: 4-bit NormalFloat
# --------------------------------------------------------------------------------------------------


def test_the_numbers_of_nf4_are_those_of_appendix_e_and_follow_from_their_definition() -> None:
    assert list(NF4.numbers) == APPENDIX_E
    # 3e-7: the list was made from quantiles in float32.
    torch.testing.assert_close(normal_float_numbers(), torch.tensor(APPENDIX_E), rtol=0, atol=3e-7)


def test_nf4_has_an_exact_zero_seven_negative_and_eight_positive_numbers() -> None:
    assert [sum(number < 0 for number in NF4.numbers), NF4.numbers.count(0.0)] == [7, 1]
    assert (min(NF4.numbers), max(NF4.numbers)) == (-1.0, 1.0)
    padded = torch.tensor([[0.0] * 32 + [0.5, -1.0] * 16])
    kept = four_bit.quantize(padded, NF4, double_quantization=False).dequantize()
    assert torch.equal(kept[0, :32], torch.zeros(32))
    assert torch.equal(kept == -1.0, padded == -1.0)


# Section 3: double quantisation
# ------------------------------------------------------------------------------------------------


def test_a_weight_costs_4_127_bits_and_double_quantisation_saves_0_373() -> None:
    double, single = 4 + 8 / 64 + 32 / (64 * 256), 4 + 32 / 64
    assert (round(double, 3), round(single - double, 3)) == (4.127, 0.373)
    num_weights = sum(rows * columns for rows, columns in QWEN3_4B)
    for options, bits in ((Nf4Options(), double), (Nf4Options(double_quantization=False), single)):
        num_bytes = sum(options.num_bytes(rows, columns) for rows, columns in QWEN3_4B)
        # 4 bytes for the mean of the scales of each of 252 weights
        assert num_bytes * 8 / num_weights == pytest.approx(bits, abs=3e-6)


def test_double_quantisation_costs_no_accuracy(weight: Tensor) -> None:
    double, single = (error(quantized_by(Nf4Options(double_quantization=on), weight), weight) for on in (True, False))
    assert single < double < 1.001 * single


# Section 4 and appendix: which 4 bits are best
# ---------------------------------------------------------------------------------


def test_nf4_has_less_error_on_normal_weights_than_fp4_and_int4(weight: Tensor) -> None:
    nf4 = error(quantized_by(Nf4Options(), weight), weight)
    assert nf4 == pytest.approx(0.0920, abs=2e-4)  # known to 0.1%: 40,960 blocks
    # The error alone would rank INT4 before this FP4; in the paper's perplexities (table 2) it comes last.
    assert nf4 < 0.87 * error(int4(weight), weight) < error(quantized_by(Fp4Options(), weight), weight)
    assert nf4 < 0.77 * error(quantized_by(Fp4Options(), weight), weight)


def test_the_four_bits_of_nf4_carry_more_information_than_those_of_fp4(weight: Tensor) -> None:
    # The entropy of the indices on normal weights: 4 bits if all 16 were used equally often.
    entropies = []
    for table in (NF4, FP4):
        codes = four_bit.quantize(weight, table).codes
        share = torch.bincount(torch.cat([codes >> 4, codes & 15]).flatten().int(), minlength=16).double()
        share = share[share > 0] / share.sum()
        entropies.append(float(-(share * share.log2()).sum()))
    assert 4 > entropies[0] > entropies[1]


# The table of the documentation
# ------------------------------------------------------------------------------------------------


ROWS: list[tuple[str, Callable[[int, int], float], Callable[[Tensor], Tensor]]] = [
    ("bfloat16", lambda rows, columns: 2 * rows * columns, lambda weight: weight.bfloat16().float()),
    *(
        (name, options.num_bytes, lambda weight, options=options: quantized_by(options, weight))
        for name, options in (
            ("int8", Int8Options()),
            ("fp8 (e4m3)", Fp8Options()),
            ("nf4, `scale_search: true`", Nf4Options(scale_search=True)),
            ("nf4", Nf4Options()),
            ("nf4, `double_quantization: false`", Nf4Options(double_quantization=False)),
            ("fp4, `scale_search: true`", Fp4Options(scale_search=True)),
            ("fp4", Fp4Options()),
        )
    ),
    ("whole numbers −7 … 7 (not a format here)", lambda rows, columns: rows * columns * 4.5 / 8, int4),
]


def table(weight: Tensor) -> str:
    lines = ["| format | bits per weight | Qwen3-4B, linear layers | RMSE / σ | SNR |", "|---|---|---|---|---|"]
    num_weights = sum(rows * columns for rows, columns in QWEN3_4B)
    for name, num_bytes, quantize in ROWS:
        total = sum(num_bytes(rows, columns) for rows, columns in QWEN3_4B)
        relative = error(quantize(weight), weight)
        decibels = -20 * torch.tensor(relative).log10()
        lines.append(
            f"| {name} | {total * 8 / num_weights:.3f} | {total / 1e9:.2f} GB | {relative:.4f} | {decibels:.1f} dB |"
        )
    return "\n".join(lines)


def test_the_table_of_formats_is_what_is_computed_here(weight: Tensor) -> None:
    found = table(weight)
    assert found in PAGE.read_text(encoding="utf-8"), f"put this into {PAGE.name}:\n\n{found}\n"


def test_the_table_of_optimisers_is_parameters_times_bytes() -> None:
    guide = (PAGE.parents[1] / "guides" / "quantization.md").read_text(encoding="utf-8")
    for rank in (8, 16, 64, 256):
        sizes = [rank * side for shape in QWEN3_4B for side in shape]
        full, kept = (moment_bytes(sizes, kind) / 1e9 for kind in ("adamw", "adamw_8bit"))
        row = f"| {rank} | {sum(sizes) / 1e6:.1f} M | {full:.3f} GB | {kept:.3f} GB | {full - kept:.3f} GB |"
        assert row in guide, row
