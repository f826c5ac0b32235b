"""The layers of a config, from the bottom: preset, files that a file extends, the file itself, overrides.

Each layer is a tree of nodes with origins; a later layer replaces single values, and lists as a whole.
"""

from __future__ import annotations

import difflib
import os.path
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from affina.catalog.renamed_settings import current_name
from affina.config.fields import SCALAR_FIELDS, all_fields, takes_text
from affina.config.origins import Origin
from affina.config.schema import RunConfig
from affina.config.tree import Node, decode_yaml, parse_yaml
from affina.config.validate import expand_shorthands, show
from affina.errors import ConfigError, Location

PRESETS: tuple[str, ...] = ("laptop", "starter", "production", "premium")
"""By the memory that they need, least first."""

DEFAULT_PRESET = "laptop"
"""What a run without a file and without a preset is: the built-in model and data, on any machine."""

_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_STEP = re.compile(r"([A-Za-z_][\w\-]*)((?:\[\d+\])*)")


def preset_text(name: str) -> str:
    """The YAML text of a preset, comments and all. Raises ConfigError `unknown-preset`."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, 1, 0.6)
        raise ConfigError(
            "unknown-preset",
            f'there is no preset "{name}"',
            fix=f"did you mean {near[0]}?" if near else f"the presets are {', '.join(PRESETS)}",
        )
    return resources.files("affina.config").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")


def preset_layer(name: str) -> Node:
    """A preset as a tree."""
    tree, errors = parse_yaml(preset_text(name), f"{name}.yaml", Origin("preset", preset=name))
    assert tree is not None, f"preset {name} is empty"
    assert not errors, errors
    return expand_shorthands(tree)


def file_layers(path: Path, errors: list[ConfigError]) -> list[Node]:
    """The layers of a file, lowest first: what it extends, to the end of the chain, and the file itself.

    Errors that leave something to check are added to `errors`. Raises ConfigError for a file that cannot be read.
    """
    layers: list[Node] = []
    chain: list[Path] = []
    current: Path | None = path
    asked_by: Location | None = None
    while current is not None:
        identity = Path(os.path.realpath(current))
        if identity in chain:
            names = " -> ".join(file.name for file in (*chain, identity))
            errors.append(
                ConfigError(
                    "extends-cycle",
                    f"extends goes round in a circle: {names}",
                    fix="take `extends` out of one of these files",
                    where=asked_by,
                )
            )
            break
        chain.append(identity)
        tree = read_file(current, errors, asked_by)
        target = take_extends(tree, errors)
        layers.insert(0, expand_shorthands(tree))
        if target is None:
            break
        asked_by = target.origin.where
        current = _follow(target, current.parent, layers, errors)
    return layers


def mapping_layers(tree: Node, errors: list[ConfigError]) -> list[Node]:
    """The layers of a mapping that came through the Python API; `extends` is relative to the current folder."""
    target = take_extends(tree, errors)
    layers = [expand_shorthands(tree)]
    if target is not None:
        path = _follow(target, Path(), layers, errors)
        if path is not None:
            layers[:0] = file_layers(path, errors)
    return layers


def _follow(target: Node, folder: Path, layers: list[Node], errors: list[ConfigError]) -> Path | None:
    """The file that `extends` names; None when it is a preset, whose layer goes to the bottom, or an error."""
    name = str(target.value)
    if name in PRESETS:
        layers.insert(0, preset_layer(name))
        return None
    file = folder / Path(name).expanduser()
    if file.is_file():
        return file
    known = [*PRESETS, *(entry.name for entry in _configs_in(file.parent))]
    near = difflib.get_close_matches(Path(name).name, known, 1, 0.6)
    errors.append(
        ConfigError(
            "extends-unknown",
            f"extends is {show(name)}, which is neither a preset nor a file",
            why=f"the presets are {', '.join(PRESETS)}; files are looked for beside this one",
            fix=f"did you mean {near[0]}?" if near else "write a preset's name or the path of a YAML file",
            where=target.origin.where,
        )
    )
    return None


def take_extends(tree: Node, errors: list[ConfigError]) -> Node | None:
    """Remove `extends` from the top of a tree and return it."""
    assert isinstance(tree.value, dict)
    target = tree.value.pop("extends", None)
    if target is None or target.value is None:
        return None
    if isinstance(target.value, str) and target.value:
        return target
    errors.append(
        ConfigError(
            "wrong-type",
            f"extends is {show(target.plain())}; it takes the name of a preset or the path of one YAML file",
            fix=f"write one of {', '.join(PRESETS)}, or a path; files can extend each other in a chain",
            where=target.origin.where,
        )
    )
    return None


def read_file(path: Path, errors: list[ConfigError], asked_by: Location | None = None) -> Node:
    """One YAML file as a tree whose root is a mapping, shorthands not yet expanded.

    Raises ConfigError: `config-missing`, `config-unreadable`, `config-empty`, `config-not-mapping`, and those of
    `parse_yaml`.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise _missing_file(path, asked_by) from None
    except OSError as error:
        raise _unreadable_file(path, error, asked_by) from None
    tree, found = parse_yaml(decode_yaml(raw, path), path, Origin("user"))
    errors.extend(found)
    if tree is None:
        raise ConfigError(
            "config-empty",
            f"{path} holds no settings",
            fix=f"write at least `extends: {DEFAULT_PRESET}` and `data: your-file.jsonl`",
            where=Location(path),
        )
    if not isinstance(tree.value, dict):
        raise ConfigError(
            "config-not-mapping",
            f"{path} holds {'a list' if isinstance(tree.value, list) else show(tree.plain())} instead of sections",
            fix=f"begin with a section, such as `data: my.jsonl`; the sections are {', '.join(RunConfig.model_fields)}",
            where=tree.origin.where,
        )
    return tree


def _configs_in(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.suffix in _CONFIG_SUFFIXES)
    except OSError:
        return []


def _missing_file(path: Path, asked_by: Location | None) -> ConfigError:
    names = [entry.name for entry in _configs_in(path.parent)]
    near = difflib.get_close_matches(path.name, names, 1, 0.5)
    if str(path) in PRESETS:
        fix = f"{path} is a preset: write --preset {path}"
    elif near:
        fix = f"did you mean {path.parent / near[0]}?"
    elif names:
        fix = f"this folder has {', '.join(names[:5])}"
    else:
        fix = f"begin with a file that holds `extends: {DEFAULT_PRESET}` and `data: your-file.jsonl`"
    return ConfigError("config-missing", f"there is no file {path}", fix=fix, where=asked_by)


def _unreadable_file(path: Path, error: OSError, asked_by: Location | None) -> ConfigError:
    if path.is_dir():
        inside = path / "config.yaml"
        fix = f"write {inside}" if inside.is_file() else "write the path of a YAML file"
        return ConfigError("config-unreadable", f"{path} is a folder", fix=fix, where=asked_by)
    return ConfigError(
        "config-unreadable",
        f"{path} cannot be read",
        why=(error.strerror or type(error).__name__).lower(),
        fix="check the file's permissions",
        where=asked_by,
    )


def merge(lower: Node, upper: Node) -> Node:
    """Two layers as one: mappings are merged key by key, everything else is replaced by the upper layer."""
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict):
        return upper
    merged = dict(lower.value)
    for key, node in upper.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return Node(merged, upper.origin)


def without_foreign_validation(tree: Node) -> Node:
    """The tree without a preset's validation set when the training data is the user's: they do not belong together."""
    assert isinstance(tree.value, dict)
    data = tree.value.get("data")
    if data is None or not isinstance(data.value, dict):
        return tree
    train, validation = data.value.get("train"), data.value.get("validation")
    if train is None or validation is None or train.origin.kind == "preset" or validation.origin.kind != "preset":
        return tree
    kept = {name: node for name, node in data.value.items() if name != "validation"}
    return Node({**tree.value, "data": Node(kept, data.origin)}, tree.origin)


def apply_overrides(tree: Node, overrides: Sequence[str], errors: list[ConfigError]) -> Node:
    """The tree with each `section.key=value` put in place, in order; the last of two wins."""
    for text in overrides:
        where = Location(f"--set {text}")
        try:
            path, node = _parse_override(text, where)
            tree = _put(tree, path, node, text, where)
        except ConfigError as error:
            errors.append(error)
    return expand_shorthands(tree)


def _parse_override(text: str, where: Location) -> tuple[list[str | int], Node]:
    origin = Origin("override", where)
    name, equals, raw = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(
            "override-syntax",
            f'the override "{text}" is not of the form section.key=value',
            fix="write for example --set training.learning_rate=1e-4",
            where=where,
        )
    path: list[str | int] = []
    now = current_name(name)
    former_path = name if now != name else None
    for step in now.split("."):
        match = _STEP.fullmatch(step)
        if match is None:
            raise ConfigError(
                "override-syntax",
                f'"{name}" is not the path of a setting',
                fix="write section.key, or data.train[0].key for a source",
                where=where,
            )
        path.append(match[1])
        path.extend(int(index) for index in re.findall(r"\d+", match[2]))
    return path, replace(_override_value(_schema_path(path), raw, origin, where), former_path=former_path)


def _schema_path(path: Sequence[str | int]) -> str:
    joined = ""
    for step in path:
        joined += "[]" if isinstance(step, int) else f".{step}" if joined else step
    if joined in SCALAR_FIELDS:
        joined = f"{joined}.{SCALAR_FIELDS[joined]}"
    return joined


def _override_value(schema_path: str, raw: str, origin: Origin, where: Location) -> Node:
    """The value parsed as YAML; where any text is valid, a YAML number or mapping is the text itself."""
    schema_field = all_fields().get(schema_path)
    is_text = schema_field is not None and takes_text(schema_field)
    try:
        tree, errors = parse_yaml(raw, str(where.path), origin, numbered=False)
    except ConfigError as error:
        if is_text:
            return Node(raw, origin)
        raise ConfigError(error.code, error.what, why=error.why, fix=error.fix, where=where) from None
    if errors:
        raise errors[0]
    if tree is None:
        return Node(None, origin)
    if is_text and tree.value is not None and not isinstance(tree.value, str):
        return Node(raw, origin)
    return tree


def _put(tree: Node, path: list[str | int], node: Node, text: str, where: Location) -> Node:
    """A copy of the tree in which `path` holds `node`."""
    if path == ["extends"]:
        raise ConfigError(
            "override-extends",
            "extends cannot be overridden",
            why="it decides what the overrides are put on",
            fix="use --preset, or write extends into the file",
            where=where,
        )
    if len(path) == 1 and path[0] in RunConfig.model_fields:
        # `--set engine=fast`, `--set data=my.jsonl`: the shorthands of the file, merged like a layer of their own.
        return merge(tree, expand_shorthands(Node({str(path[0]): node}, node.origin)))
    return _replace(tree, path, 0, node, where)


def _replace(tree: Node, path: list[str | int], depth: int, node: Node, where: Location) -> Node:
    if depth == len(path):
        return node
    step = path[depth]
    if isinstance(step, int):
        items = list(tree.value) if isinstance(tree.value, list) else []
        if step >= len(items):
            name = _dotted(path[:depth])
            count = f"{len(items)} source{'' if len(items) == 1 else 's'}"
            raise ConfigError(
                "override-index",
                f"{name}[{step}] does not exist: {name} has {count}",
                fix=f"use an index up to {len(items) - 1}" if items else f"set {name} itself",
                where=where,
            )
        items[step] = _replace(items[step], path, depth + 1, node, where)
        return Node(list(items), tree.origin)
    entries = dict(tree.value) if isinstance(tree.value, dict) else {}
    child = entries.get(step, Node({}, node.origin))
    entries[step] = _replace(child, path, depth + 1, node, where)
    return Node(entries, tree.origin)


def _dotted(path: Sequence[str | int]) -> str:
    joined = ""
    for step in path:
        joined += f"[{step}]" if isinstance(step, int) else f".{step}" if joined else str(step)
    return joined
