"""How a linear layer keeps its frozen weight. One file per format, all behind `WeightFormat`."""

from affina.models.weights.base import WeightFormat, linear_layers
from affina.models.weights.dense import DENSE
from affina.models.weights.nf4 import NF4, Nf4Linear, Nf4Options, cache_dequantized, quantize_linears

FORMATS: tuple[WeightFormat, ...] = (NF4, DENSE)
"""All formats, the more special ones first: a format claims a layer with `owns`."""


def format_of(layer: object) -> WeightFormat | None:
    """The weight format of a linear layer, None for any other object."""
    return next((weight_format for weight_format in FORMATS if weight_format.owns(layer)), None)


__all__ = [
    "DENSE",
    "FORMATS",
    "NF4",
    "Nf4Linear",
    "Nf4Options",
    "WeightFormat",
    "cache_dequantized",
    "format_of",
    "linear_layers",
    "quantize_linears",
]
