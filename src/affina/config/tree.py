"""A YAML document as a tree of values that remember where they were written.

ruamel.yaml parses; the tree is built here, because every later message needs the line of a *value*, and because
duplicate keys, tags and odd keys are reported together instead of one at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode

from affina.config.origins import Origin
from affina.errors import ConfigError, Location

Scalar: TypeAlias = str | int | float | bool | None

MAX_NODES = 100_000
"""Of one document. Aliases of aliases grow exponentially; no config comes near."""

_TAG = "tag:yaml.org,2002:"
_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}


@dataclass(frozen=True, slots=True)
class Node:
    """A scalar, a list of nodes or a mapping to nodes, with its origin.

    The place of a mapping's entry is the line of its key. `written` is a scalar's text in the file (`001` is the
    number 1 to YAML), for messages. `former_path` is set when the file has the name that the setting had before.
    """

    value: Scalar | list[Node] | dict[str, Node]
    origin: Origin
    written: str | None = None
    former_path: str | None = None

    def plain(self) -> Any:
        """The value without origins, as Python scalars, lists and dictionaries."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


@dataclass(slots=True)
class _Builder:
    """Turns ruamel's nodes into ours, and collects what is wrong on the way."""

    yaml: YAML
    file: Path | str
    origin: Origin
    numbered: bool
    errors: list[ConfigError] = field(default_factory=list)
    open_nodes: list[YamlNode] = field(default_factory=list)
    num_nodes: int = 0

    def location(self, node: YamlNode) -> Location:
        return Location(self.file, node.start_mark.line + 1 if self.numbered else None)

    def refuse(self, node: YamlNode, code: str, what: str, *, why: str | None = None, fix: str) -> None:
        self.errors.append(ConfigError(code, what, why=why, fix=fix, where=self.location(node)))

    def build(self, node: YamlNode, where: Location) -> Node:
        origin = Origin(self.origin.kind, where, self.origin.preset)
        if any(node is parent for parent in self.open_nodes):
            self.refuse(
                node,
                "yaml-recursive",
                "an alias contains itself",
                fix="write the value out instead of using an anchor inside itself",
            )
            return Node(None, origin)
        self.num_nodes += 1
        if self.num_nodes > MAX_NODES:
            raise _too_large(self.file)
        self.open_nodes.append(node)
        try:
            if isinstance(node, MappingNode):
                return Node(self.build_mapping(node), origin)
            if isinstance(node, SequenceNode):
                return Node([self.build(item, self.location(item)) for item in node.value], origin)
            assert isinstance(node, ScalarNode)
            return Node(self.build_scalar(node), origin, str(node.value))
        finally:
            self.open_nodes.pop()

    def build_mapping(self, node: MappingNode) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        first_lines: dict[str, Location] = {}
        for key_node, value_node in node.value:
            where = self.location(key_node)
            if key_node.tag == f"{_TAG}merge":
                self.refuse(
                    key_node,
                    "yaml-merge-key",
                    "the merge key << is not read",
                    why="it is no longer part of YAML, and tools disagree on what it does",
                    fix="put the shared settings into a file of their own and write `extends: that-file.yaml`",
                )
                continue
            if not isinstance(key_node, ScalarNode) or key_node.tag != f"{_TAG}str":
                shown = str(key_node.value) if isinstance(key_node, ScalarNode) else "a list or mapping"
                self.refuse(
                    key_node,
                    "yaml-key",
                    f"{shown!r} is not a name" if isinstance(key_node, ScalarNode) else f"{shown} is used as a key",
                    fix="every key of a config is a word, such as `training`",
                )
                continue
            key = str(key_node.value)
            if key in entries:
                self.refuse(
                    key_node,
                    "duplicate-key",
                    f'"{key}" is written twice; the first is in line {first_lines[key].line}',
                    why="only one of them could count",
                    fix="keep one and merge what is under them",
                )
                continue
            first_lines[key] = where
            entries[key] = self.build(value_node, where)
        return entries

    def build_scalar(self, node: ScalarNode) -> Scalar:
        text = str(node.value)
        match str(node.tag).removeprefix(_TAG):
            case "null":
                return None
            case "bool":
                # `%YAML 1.1` documents, and explicit tags, know more spellings than true and false.
                return _BOOLEANS.get(text.lower(), False)
            case "int":
                try:
                    return int(self.yaml.constructor.construct_yaml_int(node))
                except ValueError:  # more digits than Python converts, or a sign alone
                    return text
            case "float":
                return float(self.yaml.constructor.construct_yaml_float(node))
            case "str" | "timestamp":
                return text
            case tag:
                self.refuse(
                    node,
                    "yaml-tag",
                    f'the YAML tag "{tag}" is not read',
                    why="a config holds plain values only, so that reading one never runs code",
                    fix="remove the tag and write the value itself",
                )
                return None


def decode_yaml(raw: bytes, file: Path | str) -> str:
    """The text of a YAML file, which has to be UTF-8 (a byte-order mark is allowed).

    Raises ConfigError `yaml-encoding` with the line of the first bad byte.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            "yaml-encoding",
            f"byte 0x{raw[error.start]:02x} is not UTF-8",
            fix="save the file with the encoding UTF-8",
            where=Location(file, line),
        ) from None


def parse_yaml(
    text: str, file: Path | str, origin: Origin, *, numbered: bool = True
) -> tuple[Node | None, list[ConfigError]]:
    """The tree of one YAML document, None when it is empty, and every error that does not stop the parser.

    file:     what locations name
    origin:   kind and preset that each node gets
    numbered: whether locations carry line numbers (an override has none)

    Raises ConfigError for the errors that stop the parser: tabs, syntax, control characters, a second document.
    """
    yaml = YAML(typ="safe", pure=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReusedAnchorWarning)  # legal: the later anchor counts from there on
            root = yaml.compose(text)
        if root is None:
            return None, []
        builder = _Builder(yaml, file, origin, numbered)
        tree = builder.build(root, builder.location(root))
    except MarkedYAMLError as error:
        raise _syntax_error(error, text, file, numbered) from None
    except RecursionError:
        raise _too_large(file) from None
    except YAMLError as error:
        raise ConfigError(
            "yaml-encoding",
            "a control character is in the file",
            why=str(error).strip().splitlines()[0],
            fix="delete the character; editors that show invisible characters find it",
            where=Location(file, _line_of(text, error) if numbered else None),
        ) from None
    return tree, builder.errors


def _line_of(text: str, error: YAMLError) -> int | None:
    position = getattr(error, "position", None)
    return text.count("\n", 0, position) + 1 if isinstance(position, int) else None


def _too_large(file: Path | str) -> ConfigError:
    return ConfigError(
        "yaml-too-large",
        "the file is nested too deeply, or its aliases unfold to too much",
        why=f"a config holds at most {MAX_NODES:,} values",
        fix="check that this is the right file",
        where=Location(file),
    )


def _syntax_error(error: MarkedYAMLError, text: str, file: Path | str, numbered: bool) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    index = mark.line if mark is not None else 0
    lines = text.splitlines()
    # A parser that waits for a closing bracket or quote notices at the end of the file; the cause is where it began.
    if error.context_mark is not None and index >= len(lines):
        index = error.context_mark.line
    where = Location(file, index + 1 if numbered else None)
    problem = (error.problem or "").strip()
    shown = lines[index].strip() if index < len(lines) else ""
    if "'\\t'" in problem:
        tabs = [number for number, line in enumerate(lines, 1) if "\t" in line]
        others = f" (tabs are in lines {', '.join(map(str, tabs[:10]))})" if len(tabs) > 1 else ""
        return ConfigError(
            "yaml-tab",
            f"a tab is used where YAML wants spaces{others}",
            fix="replace each tab by two spaces",
            where=where,
        )
    if "another document" in problem:
        return ConfigError(
            "yaml-documents",
            "a second document begins with `---`",
            fix="keep one run per file; share settings between files with `extends`",
            where=where,
        )
    return ConfigError(
        "yaml-syntax",
        f"this is not valid YAML: {shown}" if shown else "this is not valid YAML",
        why=" ".join(part for part in ((error.context or "").strip(), problem) if part) or None,
        fix=_syntax_fix(problem, error.context or "", shown),
        where=where,
    )


def _syntax_fix(problem: str, context: str, line: str) -> str:
    if "mapping values are not allowed" in problem:
        if line.count(": ") > 1 or line.count(":") > 1:
            return "put the text after the first colon in quotes"
        return "indent this line like its neighbours; a key with a value on its line cannot have keys below it"
    if "flow sequence" in context or "flow mapping" in context:
        return "close the bracket or brace"
    if "quoted scalar" in context:
        return "close the quotes, and write a backslash inside double quotes twice"
    if "cannot start any token" in problem:
        return "put the value in quotes"
    if "alias" in problem:
        return "put a text that begins with * in quotes"
    return "check the indentation and the quotes of this line and of the one before"


def tree_from_mapping(mapping: Mapping[str, Any], origin: Origin) -> Node:
    """The tree of a Python mapping: `pathlib` paths become text, tuples become lists.

    Raises ConfigError `wrong-type` for keys that are not text.
    """
    return _from_value(mapping, origin, "")


def _from_value(value: Any, origin: Origin, path: str) -> Node:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError("yaml-key", f"{key!r} is not a name", fix="every key of a config is a text")
        return Node({key: _from_value(child, origin, f"{path}.{key}") for key, child in value.items()}, origin)
    if isinstance(value, Path):
        return Node(str(value), origin)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return Node([_from_value(child, origin, path) for child in value], origin)
    if value is None or isinstance(value, bool):
        return Node(value, origin)
    for kind in (str, int, float):
        if isinstance(value, kind):
            return Node(kind(value), origin)  # a subclass, such as numpy's float64 or an enum, prints differently
    raise ConfigError(
        "wrong-type",
        f"{path.lstrip('.') or 'the config'} is a {type(value).__name__}",
        why="a config holds text, numbers, booleans, lists and mappings",
        fix="convert the value, for example with int(), float(), str() or list()",
    )
