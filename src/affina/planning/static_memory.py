"""What lies on the device throughout a run: weights, adapter, the room to expand weights, the optimiser's state."""

from __future__ import annotations

from functools import lru_cache

from affina.catalog.decoder import DecoderSpec
from affina.catalog.formats import weight_bytes
from affina.catalog.fused_choice import OPTIMIZER_BYTES
from affina.catalog.fused_memory import allocated
from affina.planning.setup import StepSetup


def static_bytes(setup: StepSetup) -> dict[str, int]:
    """Weights and adapter by component, as both engines hold them."""
    return _static_bytes(_StaticKey(setup))


class _StaticKey:
    """The part of a setup that weights depend on; plans of one run differ in the rest."""

    def __init__(self, setup: StepSetup) -> None:
        self.setup = setup
        self._values = (
            setup.shape,
            setup.adapter,
            setup.precision,
            setup.format,
            setup.double_quantization,
            setup.skipped,
            setup.gpu,
            setup.engine,
            setup.is_lowest,
            setup.optimizer,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StaticKey) and self._values == other._values

    def __hash__(self) -> int:
        return hash(self._values)


@lru_cache(maxsize=64)
def _static_bytes(key: _StaticKey) -> dict[str, int]:
    setup = key.setup
    shape, n = setup.shape, setup.itemsize
    linears = sum(
        weight_bytes(
            format, linear.out_features, linear.in_features, itemsize=n, double_quantization=setup.double_quantization
        )
        * linear.count
        for linear, format, _ in setup.linears
    )
    embedding = (shape.embedding_parameters + shape.head_parameters) * n
    if setup.is_lowest:  # a byte a number, and a float32 scale for each entry
        embedding = shape.vocabulary_size * (shape.hidden_size + 4) * (1 if shape.ties else 2)
    parts = {
        "linear": linears,
        "embedding": embedding,
        "other": shape.other_parameters * n,
        "adapter": (setup.num_trainable + setup.num_frozen) * 4,
        "expansion": 0,
    }
    if setup.trains_weights:  # float32 values in the place of the base's
        share = setup.num_trainable - setup.shape.num_parameters
        parts |= {"linear": 0, "embedding": 0, "other": 0} if not share else _without_last_layers(setup, parts)
    if isinstance(setup.fused, DecoderSpec):
        parts["adapter"] = allocated(setup.flat_parameters, 4) + (allocated(setup.flat_parameters, n) if n == 2 else 0)
        parts["expansion"] = _room_for_low_rank(setup) if setup.products == "dense" else _workspace(setup)
        if adapter_on_host(setup):
            # One layer's gradients in float32, its matrices as they arrive, and two places for them in 16 bits.
            parts["adapter"] = setup.flat_parameters // shape.num_layers * (8 + 2 * n)
    return parts


def _without_last_layers(setup: StepSetup, parts: dict[str, int]) -> dict[str, int]:
    """Weights that stay frozen below the trained layers."""
    layers = min(setup.adapter.settings.num_layers, setup.shape.num_layers)
    others = setup.shape.num_layer_parameters - sum(linear.num_weights for linear in setup.shape.linears)
    return {
        "linear": parts["linear"] * (setup.shape.num_layers - layers) // setup.shape.num_layers,
        "other": parts["other"] - layers * others * setup.itemsize,
    }


def adapter_on_host(setup: StepSetup) -> bool:
    """Whether the adapter, its gradients and the optimiser's state are in main memory."""
    return setup.is_lowest and _has_flat_state(setup) and setup.gpu is not None


def _has_flat_state(setup: StepSetup) -> bool:
    return isinstance(setup.fused, DecoderSpec) and setup.optimizer == "adamw" and not setup.has_two_rates


def _room_for_low_rank(setup: StepSetup) -> int:
    """Rows below dense weights where the adapter's share of the input gradient is written."""
    if setup.itemsize == 4:
        return _workspace(setup)  # W + s B A, merged once per use
    ranks, shape = setup.ranks, setup.shape
    per_layer = (ranks.qkv + ranks.gate_up) * shape.hidden_size + ranks.output * shape.query_size
    return (per_layer + ranks.down * shape.intermediate_size) * setup.itemsize * shape.num_layers


def _workspace(setup: StepSetup) -> int:
    """One expanded weight at a time, as large as the largest group with a common input."""
    if setup.products == "fp8":
        return 0
    shape, ranks = setup.shape, setup.ranks
    if setup.is_lowest:  # one weight at a time
        rank = setup.adapter.rank if setup.itemsize == 2 else 0
        largest = max((linear.out_features + rank) * linear.in_features for linear in shape.linears)
        return allocated(largest, setup.itemsize)
    extra = (lambda rank: rank) if setup.itemsize == 2 else (lambda rank: 0)
    sizes = (
        (shape.query_size + 2 * shape.key_value_size + extra(ranks.qkv)) * shape.hidden_size,
        (shape.hidden_size + extra(ranks.output)) * shape.query_size,
        (2 * shape.intermediate_size + extra(ranks.gate_up)) * shape.hidden_size,
        (shape.hidden_size + extra(ranks.down)) * shape.intermediate_size,
    )
    return allocated(max(sizes), setup.itemsize)


def optimizer_bytes(setup: StepSetup) -> int:
    """Of the optimiser's state."""
    if adapter_on_host(setup):
        return 0
    num_values = setup.flat_parameters if _has_flat_state(setup) else setup.num_trainable
    return int(OPTIMIZER_BYTES[setup.optimizer] * num_values)
