"""A quantised layer that shows its dense weight, for adapter layers that look at it.

PEFT's DoRA, BOFT, LoHa and LoKr read `base_layer.weight`. Of a layer with packed codes they would get bytes: a crash
where the shape matters, and silently wrong numbers where it does not. Under a view the layer computes as before, and
`weight` is what the codes stand for: expanded anew at each look, or, for methods that only ask for its shape and
device, one zero seen [out, in] times.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from affina.models.weights.quantized import QuantizedLinear


def show_dense_weight(layer: nn.Module, *, shape_only: bool) -> None:
    """From now on `layer.weight` is dense, [out, in]; layers that are not quantised stay as they are.

    shape_only: its values are all zero, and it has no memory
    """
    if isinstance(layer, QuantizedLinear) and not isinstance(layer, _DenseView):
        layer.__class__ = _view_of(type(layer), shape_only)  # type: ignore[arg-type]


class _DenseView:
    """Mixed in before the class of a quantised layer."""


@cache
def _view_of(kind: type[QuantizedLinear], shape_only: bool) -> type[QuantizedLinear]:
    def dense(layer: QuantizedLinear) -> Tensor:
        if shape_only:
            zero = torch.zeros((), dtype=layer.source_dtype, device=layer.codes.device)
            return nn.Parameter(zero.expand(layer.out_features, layer.in_features), requires_grad=False)
        weight = layer.dense_weight(layer.source_dtype) if layer.keeps_dense_weight else layer.dequantize()
        return nn.Parameter(weight, requires_grad=False)

    return type(kind.__name__, (_DenseView, kind), {"weight": property(dense), "__doc__": kind.__doc__})
