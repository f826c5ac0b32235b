"""Work-arounds for upstream behaviour: what, which versions, when to delete. Nothing else in affina knows of them."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT 0.21 reads `model.is_gradient_checkpointing`, which transformers ≥ 5.20 deprecates with a FutureWarning
    that the user can do nothing about. Delete when the oldest supported PEFT reads `is_activation_checkpointing`.

    It also warns of parameters that a file does not have, which fitting.py refuses; that the ranks which AdaLoRA has
    left are no pattern of LoRA's; that BOFT's CUDA extension is not there, which one butterfly factor does not need;
    that a norm is "unsupported" to LayerNorm tuning, which copies the module whatever it is. Delete when it does not.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys.*", category=UserWarning)
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match.*")
        warnings.filterwarnings("ignore", message="Failed to load the CUDA extension.*", category=UserWarning)
        warnings.filterwarnings("ignore", message="Setting boft_n_butterfly_factor to 1.*", category=UserWarning)
        warnings.filterwarnings("ignore", message="Unsupported layer type .*orm.*encountered.*", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


@contextmanager
def quiet_loading() -> Iterator[None]:
    """transformers 5 draws a bar for loading and one for writing weights on stderr, over affina's own live view, and
    has no argument to leave it out. Delete when `from_pretrained` takes one.
    """
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def enable_recomputation(model: PreTrainedModel) -> None:
    """Activations are recomputed in the backward pass, layer by layer.

    Non-reentrant: frozen inputs, hooks and autocast work. transformers ≥ 5.20 renames `gradient_checkpointing_enable`
    to `activation_checkpointing_enable`; delete the older branch when the oldest supported version has the new name.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def import_bitsandbytes_offline() -> None:
    """Import bitsandbytes, if it is installed, without its download: PEFT imports it in any case.

    While it is imported, bitsandbytes 0.50 asks the hub for a kernel on CPUs with AVX512-BF16 and the package
    `kernels`, and warns on every start where that package is absent. Nothing of affina's needs the kernel. Delete when
    importing bitsandbytes reaches for no network.
    """
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    absent = object()
    before = sys.modules.get("kernels", absent)
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `from kernels import …` an ImportError
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        logger.setLevel(level)
        if before is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before  # type: ignore[assignment]


def register_peft_tuner(name: str, config: type[Any], tuner: type[Any], prefix: str) -> None:
    """Make a tuner of affina's own known to PEFT under `name`.

    PEFT 0.21's public `register_peft_method` takes names of its own enumeration only (its issue #244 asks for
    bottleneck adapters since 2023), so the entry goes into the mappings that it fills. Delete when it takes other
    names.
    """
    from peft import mapping

    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = prefix


def adapter_prefixes() -> tuple[str, ...]:
    """How the names of PEFT's own modules and parameters inside a layer begin: `lora_`, `hada_`, `ia3_`, …"""
    from peft import mapping

    return tuple(sorted({prefix for prefix in mapping.PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix}))


_OTHER_PARTS = ("prompt_encoder", "modules_to_save", "ranknum", "vera_", "pvera_")
"""What PEFT's mapping of prefixes leaves out: encoders, a head, AdaLoRA's ranks, VeRA's shared matrices."""


def is_adapter_name(name: str) -> bool:
    """Whether a parameter, buffer or module of that dotted name belongs to an adapter and not to the base."""
    beginnings = (*_OTHER_PARTS, *adapter_prefixes())
    return any(part.startswith(beginnings) for part in name.split("."))


def name_in_base(name: str) -> str:
    """What a parameter, buffer or module of the base that PEFT may have wrapped was called before."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))
