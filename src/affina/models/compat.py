"""Work-arounds for upstream behaviour: what, which versions, when to delete. Nothing else in affina knows of them."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT 0.21 reads `model.is_gradient_checkpointing`, which transformers ≥ 5.20 deprecates with a FutureWarning
    that the user can do nothing about. Delete when the oldest supported PEFT reads `is_activation_checkpointing`.
    """
    with warnings.catch_warnings():
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
