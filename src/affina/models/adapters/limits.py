"""Sizes that a layer does not allow: told with the nearest that it does."""

from __future__ import annotations

from collections.abc import Mapping

from affina.catalog.adapter_settings import AdapterSettings
from affina.catalog.methods import AdapterMethod
from affina.errors import ModelError

_WITHOUT_LIMIT = ("vera", "lokr")
"""VeRA's factors are not trained and may be wider than a layer; LoKr takes a full factor where the rank is too
large."""


def check_sizes(method: AdapterMethod, settings: AdapterSettings, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a rank or a block that does not fit into a layer.

    shapes: (out, in) of the target layers by name

    Raises ModelError: rank-above-layer, block-size-unfit.
    """
    if not shapes:
        return
    if "rank" in method.fields and method.name not in _WITHOUT_LIMIT:
        _check_rank(method, settings, shapes)
    if "block_size" in method.fields:
        _check_blocks(settings, shapes)


def _check_rank(method: AdapterMethod, settings: AdapterSettings, shapes: Mapping[str, tuple[int, int]]) -> None:
    is_adaptive = "initial_rank" in method.fields
    rank = settings.initial_rank if is_adaptive else settings.rank
    largest = min(min(shape) for shape in shapes.values())
    if rank <= largest:
        return
    name, shape = next((name, shape) for name, shape in shapes.items() if min(shape) == largest)
    setting = "adapter.initial_rank" if is_adaptive else "adapter.rank"
    raise ModelError(
        "rank-above-layer",
        f"{setting} is {rank}; {name} is {shape[0]} × {shape[1]}",
        why=f"a weight of that size has rank {largest} at most: more parameters could express nothing more",
        fix=f"write `rank: {max(1, largest // 2)}` or less, leave {name.rpartition('.')[2]} out of adapter.targets, "
        "or write `adapter: full`",
    )


def _check_blocks(settings: AdapterSettings, shapes: Mapping[str, tuple[int, int]]) -> None:
    size = settings.block_size
    unfit = next((name for name, (_, columns) in shapes.items() if columns % size), None)
    if unfit is None:
        return
    inputs = {columns for _, columns in shapes.values()}
    fitting = [block for block in range(2, min(inputs) + 1) if all(columns % block == 0 for columns in inputs)]
    nearest = min(fitting, key=lambda block: abs(block - size), default=None)
    raise ModelError(
        "block-size-unfit",
        f"adapter.block_size is {size}; {unfit} has {shapes[unfit][1]} inputs, which do not divide into such blocks",
        fix=f"write `block_size: {nearest}`"
        if nearest
        else "choose targets whose inputs have a divisor in common, or `adapter: lora`",
    )
