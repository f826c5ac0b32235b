"""docs/reference/config.md, written from the schema, so that it cannot lag behind."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from affina.config.fields import SCALAR_FIELDS, describe, kind_of
from affina.config.layers import PRESETS, preset_text
from affina.config.schema import (
    ColumnsConfig,
    DistillationConfig,
    PreferenceConfig,
    RunConfig,
    Section,
    SourceConfig,
)

_INTRODUCTION = """\
# The config: `run.yaml`

*Written by `affina config-schema --markdown`; a test keeps it up to date.*

A run is one YAML file. Every section and every setting may be left out. Unknown keys are errors.

```yaml
extends: production          # a preset, or another YAML file; this file changes single values
model: Qwen/Qwen3-4B         # short for `model: {path: Qwen/Qwen3-4B}`
data: conversations.jsonl    # short for `data: {train: [{path: conversations.jsonl}]}`
training:
  epochs: 2
```

- `affina check run.yaml` shows every value and where it comes from: you, a preset, derived (and why), or the default.
- `--set training.learning_rate=1e-4` overrides one value; the value is read as YAML. `data.train[0].weight` names a
  setting of a source.
- What a run reads (`model.path`, the sources' `path`) is looked for beside the YAML file first, in the current folder
  second; what is not there and has the form `owner/name` is a hub id. What a run writes (`output.directory`,
  `data.cache_directory`) is relative to where the command runs.
- A value in a file wins over the file or preset that it extends; `--set` wins over all. Lists are replaced as a whole.
- `affina config-schema > affina.schema.json` writes a JSON Schema; the line
  `# yaml-language-server: $schema=affina.schema.json` at the top of a file makes editors complete and check it.
"""


def config_reference() -> str:
    """The whole page in Markdown."""
    parts = [_INTRODUCTION]
    for name, field in RunConfig.model_fields.items():
        section = kind_of(field).section
        assert section is not None
        parts.append(_section_text(name, section))
        if name == "data":
            parts.append(_section_text("data.train[] and data.validation[]", SourceConfig))
            parts.append(_section_text("data.train[].columns", ColumnsConfig))
        if name == "training":
            parts.append(_section_text("training.preference", PreferenceConfig))
            parts.append(_section_text("training.distillation", DistillationConfig))
    parts.append(_presets_text())
    return "\n".join(parts)


def _section_text(name: str, section: type[Section]) -> str:
    lines = [f"## `{name}`", ""]
    if section.__doc__:
        lines += [section.__doc__.strip(), ""]
    if name in SCALAR_FIELDS:
        field = SCALAR_FIELDS[name]
        lines += [f"`{name}: value` is short for `{name}: {{{field}: value}}`.", ""]
    lines += ["| setting | takes | default | |", "|---|---|---|---|"]
    lines += _rows(section)
    return "\n".join(lines) + "\n"


def _rows(section: type[Section]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = kind_of(field)
        if kind.section is not None:
            takes = "a section, below"
        elif kind.items is not None:
            takes = "a path, a source, or a list of them"
        else:
            takes = describe(field)
        yield f"| `{name}` | {takes} | {_default(field)} | {(field.description or '').replace('|', '/')} |"


def _default(field: FieldInfo) -> str:
    value = field.default
    if kind_of(field).section is not None:
        return ""
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, tuple):
        items = [item.path if isinstance(item, SourceConfig) else str(item) for item in value]
        return f"`{', '.join(items)}`" if items else "empty"
    match value:
        case None:
            return "not set"
        case bool():
            return f"`{str(value).lower()}`"
        case float():
            return f"`{value:g}`"
    return f"`{value}`"


def _presets_text() -> str:
    lines = [
        "## Presets",
        "",
        "`extends: NAME` in a file, or `--preset NAME`. `laptop` is what a run without a file is.",
    ]
    for name in PRESETS:
        lines += ["", f"### `{name}`", "", "```yaml", preset_text(name).rstrip(), "```"]
    return "\n".join(lines) + "\n"
