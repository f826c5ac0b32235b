"""A YAML 1.1 reader, by which the YAML that affina writes is judged: what older tools will see."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML


def read_1_1(text: str) -> Any:
    """Parse with YAML 1.1's rules, in which yes, on, 1:2 and 010 are not what they seem and 1e5 is a text."""
    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    return yaml.load(text)
