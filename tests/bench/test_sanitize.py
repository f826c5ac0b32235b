"""Every Triton kernel has a case, cases are right, and what compute-sanitizer says is understood."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tests.kernels.interpreter import run_in_interpreter

ROOT = Path(__file__).parents[2]


def kernels() -> set[str]:
    """`module.kernel` of every Triton kernel that is launched; functions that kernels call are none."""
    found = set()
    for file in (ROOT / "src" / "affina" / "kernels" / "triton").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found.add(f"{file.stem}.{node.name}")
    return found


def test_every_kernel_is_launched_by_a_case() -> None:
    from kernel_cases import cases

    named = {kernel for case in cases(is_tiny=True) for kernel in case.kernels}
    assert named == kernels()


def test_the_cases_are_right_in_the_references() -> None:
    import kernel_cases

    kernel_cases.main(["--tiny"])


def test_the_cases_are_right_in_the_interpreted_kernels() -> None:
    run_in_interpreter("../bench/triton_kernel_cases.py")


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import kernel_cases

    dequantize = kernel_cases.four_bit.dequantize_into
    calls: list[int] = []

    def broken(quantized, out):  # type: ignore[no-untyped-def]
        calls.append(1)
        out = dequantize(quantized, out)
        return out * 1.001 if len(calls) == 1 else out

    monkeypatch.setattr(kernel_cases.four_bit, "dequantize_into", broken)
    with pytest.raises(SystemExit):
        kernel_cases.main(["--tiny", "--only", "four_bit"])
    assert "1 of 2 cases right" in capsys.readouterr().out


CLEAN = "========= COMPUTE-SANITIZER\n84 of 84 cases right\n========= ERROR SUMMARY: 0 errors\n"
DIRTY = (
    "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 2 bytes\n"
    "=========     at _forward_kernel+0x10\n========= ERROR SUMMARY: 3 errors\n"
)
RACES = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the documentation\n"


@pytest.mark.parametrize(
    ("status", "printed", "is_clean", "why"),
    [
        (0, CLEAN, True, None),
        (99, DIRTY, False, None),
        (0, RACES, True, None),
        (1, REFUSED, None, "no access to this device"),
        (None, "", None, "longer than it was given"),
        (127, "Segmentation fault", None, "without a summary"),
    ],
)
def test_a_tools_output_is_understood(
    status: int | None, printed: str, is_clean: bool | None, why: str | None, tmp_path: Path
) -> None:
    from sanitize import read_output

    found = read_output(status, printed, tmp_path / "none.json")
    assert found["is_clean"] is is_clean
    assert why is None or why in found["why"]
    if is_clean is False:
        assert any("Invalid __global__ read" in line for line in found["messages"])


def test_without_the_tool_the_cases_run_and_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sanitize

    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    output = tmp_path / "sanitizer.json"
    sanitize.main(["--tiny", "--only", "four_bit", "--output", str(output)])
    record = json.loads(output.read_text())
    assert record["results"]["num_right"] == record["results"]["num_cases"] == 2
    assert "not found" in record["why_no_tools"]
    assert "no tool ran" in capsys.readouterr().out


def test_the_tool_is_found_on_the_path_and_under_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sanitize

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert sanitize.find_sanitizer() == tool
    on_path = tmp_path / "compute-sanitizer"
    on_path.write_text("#!/bin/sh\n")
    on_path.chmod(0o755)
    assert sanitize.find_sanitizer() == on_path
