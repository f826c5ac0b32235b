"""What the documentation shows works: Python blocks run, YAML blocks are valid configs, commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from affina.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
VERB = re.compile(r"^\s*\$?\s*affina ([a-z][a-z-]*)", re.MULTILINE)
# In a page, ```python no-run marks a fragment that needs a GPU or a large model.
NO_RUN = "no-run"


def blocks(language: str) -> list[object]:
    found = []
    for page in PAGES:
        for number, match in enumerate(FENCE.finditer(page.read_text(encoding="utf-8"))):
            if match[1] == language and NO_RUN not in match[2]:
                found.append(pytest.param(match[3], id=f"{page.relative_to(ROOT)}-{number}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, f"{code}\n{ended.stderr}"


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_are_valid_configs(text: str, tmp_path: Path) -> None:
    for name in re.findall(r"[\w./-]+\.jsonl", text):  # the data of an example stands beside it
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    file = tmp_path / "run.yaml"
    file.write_text(text)
    load_config(file)


def test_every_command_in_the_documentation_exists() -> None:
    from affina.cli.main import VERBS

    for page in PAGES:
        for match in FENCE.finditer(page.read_text(encoding="utf-8")):
            if match[1] in ("bash", "console", "sh"):
                for verb in VERB.findall(match[3]):
                    assert verb in VERBS, f"{page.name}: affina {verb}"
