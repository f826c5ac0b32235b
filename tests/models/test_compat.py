"""Work-arounds do what they say, and nothing else."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_importing_models_downloads_no_kernel_and_warns_of_none(tmp_path: Path) -> None:
    """Research's trap 9: with `kernels` installed, importing bitsandbytes fetches one from the hub."""
    (tmp_path / "kernels.py").write_text(
        "def get_kernel(*arguments, **options):\n    raise SystemExit('a kernel was asked for')\n"
    )
    script = "import affina.models, sys, kernels\nassert 'bitsandbytes' in sys.modules\nprint(kernels.__file__)"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == str(tmp_path / "kernels.py"), "the package itself stays importable"
    assert "gemm_4bit" not in ended.stderr
