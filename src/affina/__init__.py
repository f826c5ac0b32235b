"""affina: fine-tune language models on the hardware you have, and trust the result."""

from affina.api import (
    TrainResult,
    check,
    compare_runs,
    evaluate,
    inspect_data,
    list_runs,
    merge,
    methods,
    open_chat,
    plan,
    prepare,
    quantize,
    recommend,
    train,
)
from affina.config.schema import RunConfig
from affina.errors import AffinaError, AffinaErrors

__version__ = "0.1.0"

__all__ = [
    "AffinaError",
    "AffinaErrors",
    "RunConfig",
    "TrainResult",
    "__version__",
    "check",
    "compare_runs",
    "evaluate",
    "inspect_data",
    "list_runs",
    "merge",
    "methods",
    "open_chat",
    "plan",
    "prepare",
    "quantize",
    "recommend",
    "train",
]
