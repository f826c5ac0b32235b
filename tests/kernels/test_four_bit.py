"""Our 4-bit codec writes and reads bitsandbytes' bytes."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.errors import ModelError
from affina.kernels import code_tables, double_quantization, four_bit
from affina.kernels.code_tables import FP4, NF4

SHAPES = [(64, 64), (1, 1), (3, 5), (7, 65), (129, 127), (256, 64 * 17), (640, 512)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EACH_TABLE = pytest.mark.parametrize("table", [NF4, FP4], ids=lambda table: table.name)


@pytest.fixture(scope="module")
def bnb():
    """bitsandbytes' functions; it is the oracle here, and nothing in affina needs it."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, the oracle of this format, is not installed")
    import bitsandbytes.functional as functional

    return functional


def weight_of(shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def test_the_numbers_of_nf4_are_quantiles_of_the_normal_distribution():
    # 3e-7: the published table was rounded through float32 quantiles.
    torch.testing.assert_close(code_tables.normal_float_numbers(), torch.tensor(NF4.numbers), rtol=0, atol=3e-7)


def test_tables_equal_those_of_bitsandbytes(bnb):
    for table in (NF4, FP4):
        expected = bnb.get_4bit_type(table.name, device="cpu")
        assert torch.equal(code_tables.numbers_on(table, torch.device("cpu")), expected)
    assert torch.equal(double_quantization.dynamic_map(torch.device("cpu")), bnb.create_dynamic_map())


@EACH_TABLE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_byte_equals_that_of_bitsandbytes(bnb, shape, double, dtype, table):
    weight = weight_of(shape, dtype)
    weight[0, 0] = 0  # FP4 has two zeros
    codes, state = bnb.quantize_4bit(weight, quant_type=table.name, blocksize=64, compress_statistics=double)
    ours = four_bit.quantize(weight, table, double_quantization=double).to_state()
    theirs = {"": codes} | state.as_dict(packed=True)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_scales_of_many_groups_are_stored_as_bitsandbytes_stores_them(bnb):
    generator = torch.Generator().manual_seed(1)
    scales = torch.rand(256 * 400 + 77, generator=generator) ** 4
    indices, groups, offset = double_quantization.quantize_scales(scales)
    expected, state = bnb.quantize_blockwise(scales - scales.mean(), blocksize=256)
    assert torch.equal(indices, expected)
    assert torch.equal(groups, state.absmax)
    assert offset == scales.mean()


@pytest.mark.parametrize("scales", [torch.full((300,), 0.5), torch.zeros(70)], ids=["equal", "zero"])
def test_scales_without_spread_survive(bnb, scales):
    indices, groups, offset = double_quantization.quantize_scales(scales)
    expected, _ = bnb.quantize_blockwise(scales - scales.mean(), blocksize=256)
    assert torch.equal(indices, expected)
    assert torch.equal(double_quantization.dequantize_scales(indices, groups, offset), scales)


@EACH_TABLE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (640, 512), (129, 126)], ids=str)
def test_dequantised_weights_equal_those_of_bitsandbytes(bnb, shape, dtype, table):
    weight = weight_of(shape, dtype)
    codes, state = bnb.quantize_4bit(weight, quant_type=table.name, blocksize=64, compress_statistics=True)
    expected = bnb.dequantize_4bit(codes, state)
    assert torch.equal(four_bit.quantize(weight, table).dequantize(), expected)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 200), double=st.booleans(), search=st.booleans(),
    table=st.sampled_from([NF4, FP4]),
)  # fmt: skip
def test_saving_and_loading_is_the_identity(rows, columns, double, search, table):
    tensor = four_bit.quantize(weight_of((rows, columns)), table, double_quantization=double, scale_search=search)
    loaded = four_bit.FourBitTensor.from_state(tensor.to_state())
    assert (loaded.shape, loaded.table) == ((rows, columns), table)
    assert torch.equal(loaded.dequantize(), tensor.dequantize())


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 200), table=st.sampled_from([NF4, FP4]))
def test_the_error_of_a_weight_is_at_most_half_the_widest_step(rows, columns, table):
    weight = weight_of((rows, columns))
    tensor = four_bit.quantize(weight, table, double_quantization=False)
    blocks = tensor.scales().repeat_interleave(64)[: weight.numel()].view_as(weight)
    widest = max(b - a for a, b in itertools.pairwise(sorted(table.numbers))) / 2
    assert bool(((tensor.dequantize() - weight).abs() <= widest * blocks * (1 + 1e-5)).all())


def test_error_and_size_on_normal_weights_are_the_published_ones():
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    tensor = four_bit.quantize(weight, NF4)
    error = (tensor.dequantize() - weight).square().mean().sqrt()
    assert abs(error - 0.0920) < 3e-4  # 16,384 blocks: the mean square error is known to 0.3%
    assert abs(tensor.num_bytes * 8 / weight.numel() - 4.127) < 1e-3


def test_the_numbers_of_fp4_are_those_of_its_bits():
    # An index and its number: sign, exponent that counts down, mantissa. Exact up to the division by 12.
    torch.testing.assert_close(code_tables.small_float_numbers(), torch.tensor(FP4.numbers), rtol=0, atol=0)
    assert [12 * FP4.numbers[index] for index in (0b000, 0b110, 0b111, 0b100, 0b010, 0b011)] == pytest.approx(
        [0, 2, 3, 4, 8, 12], rel=1e-6
    )


def test_the_order_of_a_table_is_that_of_its_numbers():
    for table in (NF4, FP4):
        assert [table.numbers[index] for index in table.order] == sorted(table.numbers)
        assert sorted(table.order) == list(range(16))


def test_a_damaged_state_is_refused():
    state = four_bit.quantize(weight_of((8, 64)), FP4).to_state()
    for content in (b"{", b"{}", b'{"dtype": "float99"}', b"[]"):
        state[FP4.state_key] = torch.tensor(list(content), dtype=torch.uint8)
        with pytest.raises(ModelError) as caught:
            four_bit.FourBitTensor.from_state(state, "x.weight")
        assert caught.value.code == "quantized-weights-unreadable"
        assert "the state of x.weight cannot be read" in caught.value.what
        assert caught.value.fix == "download it again"


def test_scale_search_lowers_the_error_in_the_same_format(bnb):
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    tensor = four_bit.quantize(weight, NF4, scale_search=True)
    error = (tensor.dequantize() - weight).square().mean().sqrt()
    assert error < 0.0861  # against 0.0920 without
    state = tensor.to_state()
    read = bnb.QuantState.from_dict({k: v for k, v in state.items() if k}, device=torch.device("cpu"))
    assert torch.equal(bnb.dequantize_4bit(tensor.codes, read), tensor.dequantize())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize(("shape", "room"), [((9, 128), 128), ((9, 128), 200), ((5, 33), 33), ((5, 33), 40)], ids=str)
def test_a_weight_is_written_into_rows_that_may_be_apart(shape, room, double, dtype):
    tensor = four_bit.quantize(weight_of(shape, dtype), NF4, double_quantization=double)
    memory = torch.full((shape[0], room), 7.0, dtype=dtype)
    out = memory[:, : shape[1]]
    assert four_bit.dequantize_into(tensor, out) is out
    assert torch.equal(out, tensor.dequantize())
    assert torch.equal(memory[:, shape[1] :], torch.full((shape[0], room - shape[1]), 7.0, dtype=dtype))


def test_memory_that_does_not_fit_the_weight_is_refused():
    with pytest.raises(AssertionError, match="does not fill"):
        four_bit.dequantize_into(four_bit.quantize(weight_of((8, 64)), NF4), torch.empty(8, 63))


def test_the_state_says_what_the_weight_was():
    state = four_bit.quantize(weight_of((8, 64), torch.bfloat16), NF4).to_state()
    fields = json.loads(bytes(state[NF4.state_key].tolist()))
    assert list(fields) == [
        "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset",
    ]  # fmt: skip
    assert (fields["dtype"], fields["shape"]) == ("bfloat16", [8, 64])


def test_codes_stored_under_another_type_are_read():
    tensor = four_bit.quantize(weight_of((8, 64)), NF4)
    state = tensor.to_state()
    state[""] = state[""].reshape(-1).view(torch.bfloat16).unsqueeze(1)
    assert torch.equal(four_bit.FourBitTensor.from_state(state).dequantize(), tensor.dequantize())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = weight_of((8, 64))
    weight[3, 5] = bad
    with pytest.raises(ModelError, match="weights-not-finite") as caught:
        four_bit.quantize(weight, NF4)
    assert "NaN or infinity" in caught.value.what


def test_a_missing_state_is_refused():
    with pytest.raises(
        ModelError, match=r"quantized-weights-unreadable\]: x\.weight(.|\n)*bitsandbytes 0\.43 or later"
    ):
        four_bit.FourBitTensor.from_state({"": torch.zeros(4, 1, dtype=torch.uint8)}, "x.weight")


def test_another_table_is_refused():
    state = four_bit.quantize(weight_of((8, 64)), NF4).to_state()
    state["quant_map"] = state["quant_map"].flip(0)
    with pytest.raises(
        ModelError,
        match=r"quantized-weights-unreadable\]: x\.weight uses its own quant_map(.|\n)*quantise the original",
    ):
        four_bit.FourBitTensor.from_state(state, "x.weight")


def test_scales_in_groups_of_another_size_are_refused():
    state = four_bit.quantize(weight_of((8, 64)), NF4).to_state()
    fields = json.loads(bytes(state[NF4.state_key].tolist())) | {"nested_blocksize": 128}
    state[NF4.state_key] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
    with pytest.raises(ModelError) as caught:
        four_bit.FourBitTensor.from_state(state, "x.weight")
    assert caught.value.code == "quantized-weights-unreadable"
    assert caught.value.what == "x.weight groups its scales by 128; affina reads groups of 256"
    assert "quantise the original checkpoint again" in caught.value.fix


def test_tensors_of_the_wrong_size_are_refused():
    state = four_bit.quantize(weight_of((8, 64)), NF4).to_state()
    state["absmax"] = state["absmax"][:-1]
    with pytest.raises(
        ModelError, match=r"quantized-weights-unreadable(.|\n)*the checkpoint is damaged(.|\n)*download it again"
    ):
        four_bit.FourBitTensor.from_state(state, "x.weight")
