"""Runs a test module's kernels through Triton's interpreter, in a process of its own.

Triton decides when it is imported whether kernels are compiled or interpreted, so these tests cannot share a process
with others. A test module keeps its interpreter tests in a file `triton_<operation>.py` (which pytest does not collect
by itself) and calls `run_in_interpreter(that file)` from one collected test.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_in_interpreter(name: str) -> None:
    """Run tests/kernels/`name` with pytest under the interpreter; fail with its output."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "AFFINA_TRITON_ON_CPU": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    path = Path(__file__).parent / name
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts=", str(path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout
