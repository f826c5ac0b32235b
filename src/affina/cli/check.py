"""`affina check`: validate a config and show every value with its origin."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table
from rich.text import Text

from affina.catalog.methods import method_named
from affina.cli import render
from affina.cli.options import ConfigArgument, JsonOption, PresetOption, SetOption
from affina.config import Origin, ResolvedConfig, load_config
from affina.config.resolved import leaves

_STYLES = {"user": "bold", "override": "bold", "preset": "cyan", "derived": "green", "default": "dim"}


def check_command(
    config: ConfigArgument = None,
    overrides: SetOption = None,
    preset: PresetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Validate a config and show every value with its origin. Loads and downloads nothing.

    Origins: you (the file), you with --set, a preset, derived (and why), or affina's default.
    """
    resolved = load_config(config, overrides or (), preset)
    if as_json:
        render.print_json({"ok": True, **resolved.to_dict()})
        return
    console = render.stdout()
    print_resolved(resolved, console)
    if resolved.warnings:
        console.print()
        render.print_notes(resolved.warnings, console)
    console.print("\nok", style="green")


def print_resolved(resolved: ResolvedConfig, console: Console) -> None:
    """Every value with its origin, section by section."""
    rows = [(path, value) for path, value in leaves(resolved.config) if not _is_silent(path, value, resolved)]
    shown = [_show_path(value) if path.endswith(".path") else _show(value) for path, value in rows]
    # One width for all sections, so that the columns stand below each other.
    key_width = max(len(_key(path)) for path, _ in rows)
    value_width = min(max(map(len, shown)), max(20, (console.width - key_width) // 2 - 4))
    section = ""
    table = render.table()
    for (path, _), text in zip(rows, shown, strict=True):
        if path.split(".")[0] != section:
            _print_section(section, table, console)
            section, table = path.split(".")[0], render.table()
            table.add_column(width=key_width, no_wrap=True)
            table.add_column(width=value_width, overflow="fold")
            table.add_column(overflow="fold")
            table.show_header = False
        origin = resolved.origins[path]
        style = _STYLES[origin.kind]
        table.add_row(Text(_key(path), style=style), Text(text, style=style), Text(_describe(origin), style=style))
    _print_section(section, table, console)


def _print_section(section: str, table: Table, console: Console) -> None:
    if section:
        console.print(section, style="bold underline" if console.is_terminal else None)
        console.print(table)


def _key(path: str) -> str:
    return "  " + path.split(".", 1)[1]


def _is_silent(path: str, value: object, resolved: ResolvedConfig) -> bool:
    """A setting of a source that nobody has set, or of another adapter method: there are many."""
    section, _, name = path.partition(".")
    if section == "adapter" and name != "method" and not resolved.origins[path].is_explicit:
        return name not in method_named(resolved.config.adapter.method).fields
    return "[" in path and value is None and resolved.origins[path].kind == "default"


def _show_path(value: object) -> str:
    """Files in or below the current folder without its name, which is the same for all of them."""
    text = _show(value)
    folder = f"{os.getcwd()}{os.sep}"
    return text.removeprefix(folder)


def _show(value: object) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "true" if value else "false"
        case float():
            return f"{value:g}"
        case tuple():
            return ", ".join(map(str, value)) if value else "–"
        case str():
            return value.replace("\n", "⏎")
    return str(value)


def _describe(origin: Origin) -> str:
    """`you (run.yaml:3)`, `preset starter`, `derived: why`."""
    place = f" ({origin.where})" if origin.kind == "user" and origin.where is not None else ""
    reason = f": {origin.reason}" if origin.reason else ""
    return f"{origin.label}{place}{reason}"
