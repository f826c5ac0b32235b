"""The public door is small and pinned."""

from __future__ import annotations

import subprocess
import sys

import affina


def test_the_exported_names_are_these() -> None:
    assert sorted(affina.__all__) == [
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
    assert all(hasattr(affina, name) for name in affina.__all__)


def test_importing_affina_and_checking_a_config_needs_no_torch() -> None:
    script = (
        "import sys, affina\naffina.check({'extends': 'production', 'data': {'train': 'affina/support'}})\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
