"""What an adapter method other than plain LoRA holds in a training step of the reference engine, in bytes.

Counted on the steps of a CPU (tests/planning/test_method_memory.py compares every method with a real step); a kernel
that a GPU has besides may need a little more. n: bytes of an activation; o, i: outputs and inputs of a target.

    inputs        x of every target whose factor, norm or weight has a gradient            n Σ i, a shared one once
    outputs       what a factor on the output is multiplied with                           n Σ o
    whole layers  LoHa, LoKr, BOFT: the update [o, i], which autograd keeps                n Σ o i
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from affina.catalog.adapter_settings import AdapterSettings
from affina.catalog.methods import AdapterMethod
from affina.catalog.shapes import LinearShape, ModelShape


@dataclass(frozen=True, slots=True)
class MethodMemory:
    """What a method adds to a decoder without adapters.

    token, layer:     kept by one layer: for each token, and whatever the row is
    pair:             kept by one layer for each pair of tokens of a sample, where attention has a mask
    working_token, working: of the busiest layer's backward pass, beside what is usual
    copies:           16-bit copies of what it trains, per parameter, where the computation is in 16 bits
    num_layers:       that keep anything; None: all of them
    vocabulary:       gradients of the embedding that live beside all others
    virtual_tokens:   before every sample
    packs:            samples share a row
    trains_weights:   gradients as large as weights, which pile up while activations go
    passed_over:      of the first layer, up to which no gradient is needed: nothing there is trained or kept
    """

    token: int = 0
    layer: int = 0
    pair: int = 0
    working_token: int = 0
    working: int = 0
    copies: int = 2
    num_layers: int | None = None
    vocabulary: int = 0
    virtual_tokens: int = 0
    packs: bool = True
    trains_weights: bool = False
    passed_over: Literal["attention", "mlp"] | None = None


def method_memory(
    method: AdapterMethod, shape: ModelShape, settings: AdapterSettings, *, itemsize: int
) -> MethodMemory | None:
    """What the method holds; None: nothing but what LoRA does, which reference_memory counts by its ranks."""
    if method.fast_engine:
        return None
    n = itemsize
    return _OF_METHOD.get(method.name, _like_lora)(shape, settings, n)


def _like_lora(shape: ModelShape, settings: AdapterSettings, n: int, *, rank: int | None = None) -> MethodMemory:
    """LoRA's: the inputs of A, and x Aᵀ."""
    targets = shape.linears_named(settings.targets)
    width = rank if rank is not None else settings.rank
    token = n * (width * len(targets) + _shared_inputs(shape, targets))
    if settings.dropout:
        token += (n + 1) * sum(linear.in_features for linear in targets)
    return MethodMemory(token=token)


def _shared_inputs(shape: ModelShape, targets: tuple[LinearShape, ...]) -> int:
    """Inputs of the targets: q, k and v have one, gate and up another."""
    names = {linear.name for linear in targets}
    hidden = bool(names & {"q_proj", "k_proj", "v_proj"}) + bool(names & {"gate_proj", "up_proj"})
    down = shape.intermediate_size if "down_proj" in names else 0
    return hidden * shape.hidden_size + ("o_proj" in names) * shape.query_size + down


def _outputs(targets: tuple[LinearShape, ...]) -> int:
    return sum(linear.out_features for linear in targets)


def _inputs(targets: tuple[LinearShape, ...]) -> int:
    return sum(linear.in_features for linear in targets)


def _largest(targets: tuple[LinearShape, ...]) -> int:
    return max((linear.out_features * linear.in_features for linear in targets), default=0)


def _weights(targets: tuple[LinearShape, ...]) -> int:
    return sum(linear.out_features * linear.in_features for linear in targets)


def _low_rank_size(targets: tuple[LinearShape, ...], rank: int) -> int:
    return sum(rank * (linear.out_features + linear.in_features) for linear in targets)


def _dora(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    """The results of base and adapter; W + s B A and what its norms are taken of, in float32."""
    targets, like = shape.linears_named(settings.targets), _like_lora(shape, settings, n)
    return MethodMemory(token=like.token + 2 * n * _outputs(targets), working=24 * _largest(targets))


def _twice(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    """PiSSA, OLoRA: the initial factors are copied to 16 bits too."""
    targets, like = shape.linears_named(settings.targets), _like_lora(shape, settings, n)
    return MethodMemory(token=like.token, layer=2 * _low_rank_size(targets, settings.rank) if n == 2 else 0)


def _adalora(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    """In 16 bits its results before they are scaled, too."""
    like = _like_lora(shape, settings, n, rank=settings.initial_rank)
    results = n * _outputs(shape.linears_named(settings.targets)) if n == 2 else 0
    working = n * (shape.intermediate_size + shape.hidden_size) + results
    return MethodMemory(token=like.token + results, working_token=working)


def _update(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    """LoHa, LoKr."""
    targets = shape.linears_named(settings.targets)
    inputs = _inputs(targets) if n == 2 else _shared_inputs(shape, targets)
    return MethodMemory(token=n * inputs, layer=n * _weights(targets), working=16 * _largest(targets), copies=0)


def _ia3(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    targets = shape.linears_named(settings.targets)
    inner = sum(linear.in_features for linear in targets if linear.block == "mlp")
    outputs = sum(linear.out_features for linear in targets if linear.block != "mlp")
    working = n * shape.hidden_size + (2 * n * shape.intermediate_size if n == 2 else 0)
    return MethodMemory(token=n * outputs + (2 * n if n == 2 else n) * inner, working_token=working)


def _vera(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    """Slices of the shared matrices are copied to 16 bits in every layer."""
    targets = shape.linears_named(settings.targets)
    return MethodMemory(
        token=n * (_outputs(targets) + settings.rank * len(targets)),
        layer=2 * _low_rank_size(targets, settings.rank) if n == 2 else 0,
        working_token=n * (2 * shape.intermediate_size + 3 * shape.hidden_size + settings.rank)
        if n == 2
        else n * shape.hidden_size,
    )


def _oft(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    """Rotated inputs, and the series of products of which each block's rotation is made, in float32."""
    targets = shape.linears_named(settings.targets)
    inputs = _inputs(targets) if n == 2 else _shared_inputs(shape, targets)
    return MethodMemory(
        token=n * inputs,
        layer=(14 if n == 2 else 17) * _inputs(targets) * settings.block_size,
        working_token=4 * n * (shape.intermediate_size + shape.hidden_size) if n == 2 else 0,
    )


def _boft(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    """Dense rotations [i, i] in float32, and the rotated weight."""
    targets = shape.linears_named(settings.targets)
    squares = [linear.in_features**2 for linear in targets]
    return MethodMemory(
        token=n * (_outputs(targets) + _shared_inputs(shape, targets)),
        layer=5 * sum(squares) + n * _weights(targets),
        working=8 * max(squares, default=0),
    )


def _miss(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    """Sums of R shards of every input."""
    targets = shape.linears_named(settings.targets)
    return MethodMemory(
        token=n * settings.rank * len(targets),
        working_token=n * (3 * shape.hidden_size + (shape.intermediate_size if n == 2 else 0)),
    )


def _bottleneck(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    targets = shape.linears_named(settings.targets)
    lowest: Literal["attention", "mlp"] = "mlp" if settings.method == "pfeiffer" else "attention"
    token = n * (_outputs(targets) + settings.bottleneck_size * len(targets))
    return MethodMemory(token=token, passed_over=lowest, working_token=3 * n * shape.hidden_size)


def _norms(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    return MethodMemory(token=n * 3 * shape.hidden_size, working_token=(5 if n == 2 else 3) * n * shape.hidden_size)


def _virtual(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    """Each sample in a row of its own, behind the virtual tokens."""
    return MethodMemory(
        virtual_tokens=settings.num_virtual_tokens, packs=False, working_token=3 * n * shape.hidden_size
    )


def _prefix(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    """Keys and values with the prefix before them, and a mask in every layer."""
    return MethodMemory(
        token=n * (2 * shape.key_value_size + shape.query_size),
        pair=n,
        packs=False,
    )


def _trained(shape: ModelShape, settings: AdapterSettings, n: int) -> MethodMemory:
    """Full, freeze: inputs of every linear layer, and of every norm once more in float32."""
    everything = shape.linears
    qk_norms = shape.query_size + shape.key_value_size if shape.has_qk_norm else 0
    token = n * _shared_inputs(shape, everything) + 4 * (2 * shape.hidden_size + qk_norms)
    is_full = settings.method == "full"
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return MethodMemory(
        token=token,
        working_token=n * (4 * inner + (9 if is_full else 4) * hidden) if n == 2 else 3 * n * inner,
        working=(4 + n) * _largest(everything),
        num_layers=None if is_full else min(settings.num_layers, shape.num_layers),
        vocabulary=4 * shape.embedding_parameters if is_full else 0,
        trains_weights=True,
    )


_OF_METHOD = {
    "dora": _dora,
    "pissa": _twice,
    "olora": _twice,
    "adalora": _adalora,
    "loha": _update,
    "lokr": _update,
    "ia3": _ia3,
    "vera": _vera,
    "oft": _oft,
    "boft": _boft,
    "miss": _miss,
    "layernorm": _norms,
    "prefix": _prefix,
    "ptuning": _virtual,
    "prompt": _virtual,
    "houlsby": _bottleneck,
    "pfeiffer": _bottleneck,
    "full": _trained,
    "freeze": _trained,
}
