"""Every error code is documented, and tested somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def raised_codes() -> dict[str, str]:
    """Code → place, of every `…Error("code", …)` in the package."""
    codes: dict[str, str] = {}
    for file in sorted((ROOT / "src" / "affina").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            value = node.args[0].value
            if name.endswith("Error") and isinstance(value, str) and CODE.fullmatch(value):
                codes.setdefault(value, f"{file.relative_to(ROOT)}:{node.lineno}")
    return codes


CODES = raised_codes()


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_error_code_is_documented(code: str) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("errors*.md"))
    assert f"`{code}`" in pages, f"{CODES[code]} raises {code}: add a row to docs/reference"


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_error_code_is_tested(code: str) -> None:
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    assert re.search(rf"(?<![a-z-]){code}(?![a-z-])", tests), f"no test mentions {code}, raised at {CODES[code]}"
