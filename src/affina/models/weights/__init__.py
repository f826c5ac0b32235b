"""How a linear layer keeps its frozen weight. One file per format, all behind `WeightFormat`."""

from affina.models.weights.base import WeightFormat, linear_layers
from affina.models.weights.dense import DENSE
from affina.models.weights.four_bit import FP4, NF4, FourBitLinear, Fp4Linear, Fp4Options, Nf4Linear, Nf4Options
from affina.models.weights.fp8 import FP8, Fp8Linear, Fp8Options
from affina.models.weights.int8 import INT8, Int8Linear, Int8Options
from affina.models.weights.quantized import (
    QuantizedLinear,
    WeightFormatOptions,
    cache_dequantized,
    expand_linears,
    quantize_linears,
    quantized_layers,
)
from affina.models.weights.vocabulary import (
    Int8Embedding,
    Int8Head,
    Vocabulary,
    fingerprint_rows,
    place_embedding,
    place_head,
    quantize_vocabulary,
    vocabulary_of,
)

FORMATS: tuple[WeightFormat, ...] = (NF4, FP4, FP8, INT8, DENSE)
"""All formats, the more special ones first: a format claims a layer with `owns`."""


def format_of(layer: object) -> WeightFormat | None:
    """The weight format of a linear layer, None for any other object."""
    return next((weight_format for weight_format in FORMATS if weight_format.owns(layer)), None)


__all__ = [
    "DENSE",
    "FORMATS",
    "FP4",
    "FP8",
    "INT8",
    "NF4",
    "FourBitLinear",
    "Fp4Linear",
    "Fp4Options",
    "Fp8Linear",
    "Fp8Options",
    "Int8Embedding",
    "Int8Head",
    "Int8Linear",
    "Int8Options",
    "Nf4Linear",
    "Nf4Options",
    "QuantizedLinear",
    "Vocabulary",
    "WeightFormat",
    "WeightFormatOptions",
    "cache_dequantized",
    "expand_linears",
    "fingerprint_rows",
    "format_of",
    "linear_layers",
    "place_embedding",
    "place_head",
    "quantize_linears",
    "quantize_vocabulary",
    "quantized_layers",
    "vocabulary_of",
]
