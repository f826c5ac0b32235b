"""How many parameters each method trains, from the sizes of the layers: arithmetic that a test compares with the real
count.

Letters: R rank, D hidden size, L layers, o and i outputs and inputs of a linear layer, v virtual tokens, m bottleneck,
h width of an encoder, G·K key-value heads times their size.
"""

from __future__ import annotations

from affina.catalog.adapter_settings import AdapterSettings
from affina.catalog.shapes import LinearShape, ModelShape


def _targeted(shape: ModelShape, settings: AdapterSettings) -> tuple[LinearShape, ...]:
    """Of one layer; a decoder's layers are equal."""
    return shape.linears_named(settings.targets)


def low_rank(shape: ModelShape, settings: AdapterSettings) -> int:
    """LoRA: Σ R (o + i)."""
    return shape.num_layers * sum(
        settings.rank * (linear.out_features + linear.in_features) for linear in _targeted(shape, settings)
    )


def twice_low_rank(shape: ModelShape, settings: AdapterSettings) -> int:
    """LoHa: two pairs of factors, Σ 2 R (o + i)."""
    return 2 * low_rank(shape, settings)


def dora(shape: ModelShape, settings: AdapterSettings) -> int:
    """LoRA and one magnitude for each output: Σ R (o + i) + o."""
    magnitudes = sum(linear.out_features for linear in _targeted(shape, settings))
    return low_rank(shape, settings) + shape.num_layers * magnitudes


def adalora(shape: ModelShape, settings: AdapterSettings) -> int:
    """P Λ Q at the initial rank: Σ R₀ (o + i + 1)."""
    return _triplets(shape, settings, settings.initial_rank)


def adalora_file(shape: ModelShape, settings: AdapterSettings) -> int:
    """What is left at the end of the budget, if it is shared out evenly: Σ R (o + i + 1)."""
    return _triplets(shape, settings, settings.rank)


def _triplets(shape: ModelShape, settings: AdapterSettings, rank: int) -> int:
    per_layer = sum(linear.out_features + linear.in_features + 1 for linear in _targeted(shape, settings))
    return shape.num_layers * rank * per_layer


def lokr(shape: ModelShape, settings: AdapterSettings) -> int:
    """A Kronecker product of a full factor and a low-rank one, or two full ones where those are smaller."""
    total = 0
    for linear in _targeted(shape, settings):
        small_out, large_out = _factors(linear.out_features, settings.kronecker_factor)
        small_in, large_in = _factors(linear.in_features, settings.kronecker_factor)
        total += small_out * small_in
        is_low_rank = settings.rank < max(large_out, large_in) / 2
        total += settings.rank * (large_out + large_in) if is_low_rank else large_out * large_in
    return shape.num_layers * total


def _factors(dimension: int, factor: int | None) -> tuple[int, int]:
    """Two numbers whose product is `dimension`, the smaller first: `factor` and the rest, or as equal as possible."""
    if factor is not None and dimension % factor == 0:
        pair = (factor, dimension // factor)
        return min(pair), max(pair)
    limit = factor if factor is not None else dimension
    divisors = (small for small in range(int(dimension**0.5), 0, -1) if dimension % small == 0 and small <= limit)
    small = next(divisors)
    return small, dimension // small


def vera(shape: ModelShape, settings: AdapterSettings) -> int:
    """Two vectors a layer; the shared random matrices are not trained: Σ o + R."""
    return shape.num_layers * sum(linear.out_features + settings.rank for linear in _targeted(shape, settings))


def vera_file(shape: ModelShape, settings: AdapterSettings) -> int:
    """The vectors, and the shared matrices once: R (max i + max o)."""
    linears = _targeted(shape, settings)
    widest = max(linear.in_features for linear in linears) + max(linear.out_features for linear in linears)
    return vera(shape, settings) + settings.rank * widest


def ia3(shape: ModelShape, settings: AdapterSettings) -> int:
    """One factor for each output of keys and values, one for each input of the MLP's output projection."""
    return shape.num_layers * sum(
        linear.in_features if linear.block == "mlp" else linear.out_features for linear in _targeted(shape, settings)
    )


def oft(shape: ModelShape, settings: AdapterSettings) -> int:
    """i / b blocks of skew-symmetric b × b matrices: Σ i (b − 1) / 2."""
    total = 0
    for linear in _targeted(shape, settings):
        size = nearest_divisor(linear.in_features, settings.block_size)
        total += linear.in_features // size * (size * (size - 1) // 2)
    return shape.num_layers * total


def nearest_divisor(dimension: int, size: int) -> int:
    """The divisor of `dimension` that is nearest to `size`, the smaller of two."""
    divisors = (divisor for divisor in range(1, dimension + 1) if dimension % divisor == 0)
    return min(divisors, key=lambda divisor: (abs(divisor - size), divisor))


def boft(shape: ModelShape, settings: AdapterSettings) -> int:
    """i / b full b × b matrices and a scale for each output: Σ i b + o."""
    return shape.num_layers * sum(
        linear.in_features * settings.block_size + linear.out_features for linear in _targeted(shape, settings)
    )


def boft_permutations(shape: ModelShape, settings: AdapterSettings) -> int:
    """PEFT holds the permutation of the butterfly as a dense float32 matrix for each layer: Σ i²."""
    return shape.num_layers * sum(linear.in_features**2 for linear in _targeted(shape, settings))


def miss(shape: ModelShape, settings: AdapterSettings) -> int:
    """One matrix a layer: Σ R o."""
    return shape.num_layers * sum(settings.rank * linear.out_features for linear in _targeted(shape, settings))


def layer_norms(shape: ModelShape, settings: AdapterSettings) -> int:
    """The norms of the residual stream: D (2 L + 1)."""
    return shape.hidden_size * (2 * shape.num_layers + 1)


def prefix(shape: ModelShape, settings: AdapterSettings) -> int:
    """Keys and values of v tokens in every layer: 2 v L G K; through an encoder of width h, its two layers too."""
    keys, stacked = _prefix_sizes(shape)
    width = settings.encoder_hidden_size
    if width is None:
        return settings.num_virtual_tokens * stacked
    return settings.num_virtual_tokens * keys + (keys + 1) * width + (width + 1) * stacked


def prefix_file(shape: ModelShape, settings: AdapterSettings) -> int:
    """Keys and values alone: the encoder is not needed after training."""
    return settings.num_virtual_tokens * _prefix_sizes(shape)[1]


def _prefix_sizes(shape: ModelShape) -> tuple[int, int]:
    keys = shape.key_value_size
    return keys, 2 * shape.num_layers * keys


def prompt(shape: ModelShape, settings: AdapterSettings) -> int:
    """v embeddings: v D."""
    return settings.num_virtual_tokens * shape.hidden_size


def p_tuning(shape: ModelShape, settings: AdapterSettings) -> int:
    """v embeddings and an MLP of three layers over them: v D + (D + 1) h + (h + 1) h + (h + 1) D."""
    width = settings.encoder_hidden_size or 0
    encoder = (shape.hidden_size + 1) * width + (width + 1) * width + (width + 1) * shape.hidden_size
    return prompt(shape, settings) + encoder


def bottleneck(shape: ModelShape, settings: AdapterSettings) -> int:
    """Down to m and up again after each target, with biases: Σ 2 o m + m + o."""
    size = settings.bottleneck_size
    return shape.num_layers * sum(
        2 * linear.out_features * size + size + linear.out_features for linear in _targeted(shape, settings)
    )


def all_weights(shape: ModelShape, settings: AdapterSettings) -> int:
    """Every parameter of the model."""
    return shape.num_parameters


def last_layers(shape: ModelShape, settings: AdapterSettings) -> int:
    """The last n decoder layers."""
    return min(settings.num_layers, shape.num_layers) * shape.num_layer_parameters
