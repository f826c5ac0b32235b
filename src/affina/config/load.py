"""From a YAML file, a preset, overrides or a mapping to a complete config, or to every error that is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from affina.catalog.renamed_settings import current_name
from affina.config.derive import derive, explain, with_value
from affina.config.layers import (
    DEFAULT_PRESET,
    apply_overrides,
    file_layers,
    mapping_layers,
    merge,
    preset_layer,
    read_file,
    without_foreign_validation,
)
from affina.config.notes import collect_notes, renamed_notes
from affina.config.origins import Origin
from affina.config.paths import resolve_paths
from affina.config.resolved import ResolvedConfig, leaves
from affina.config.rules import Settings, check_rules
from affina.config.schema import RunConfig
from affina.config.tree import Node, tree_from_mapping
from affina.config.validate import expand_shorthands, validate
from affina.errors import AffinaErrors, ConfigError


def load_config(
    path: Path | str | None = None,
    overrides: Sequence[str] = (),
    preset: str | None = None,
    *,
    with_rules: bool = True,
) -> ResolvedConfig:
    """The complete config of a run.

    path:      a YAML file; None for a preset alone
    overrides: `section.key=value`, values in YAML; they win over the file
    preset:    goes below the file; without a file and a preset, `laptop` is taken
    with_rules: False: values are checked one by one only, for a config that is compared and not run

    Raises ConfigError when the file cannot be read or parsed, AffinaErrors with everything else that is wrong.
    """
    errors: list[ConfigError] = []
    layers = file_layers(Path(path), errors) if path is not None else []
    bottom = preset or (DEFAULT_PRESET if path is None else None)
    return _resolve(layers, overrides, bottom, errors, with_rules=with_rules)


def load_mapping(
    mapping: Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    preset: str | None = None,
    *,
    with_rules: bool = True,
) -> ResolvedConfig:
    """The complete config from a Python mapping of the YAML's form, or from a RunConfig built in Python.

    Of a RunConfig only the fields that were set count as the user's; the others remain open to presets and derivation.
    `with_rules` and what is raised are those of `load_config`.
    """
    values = mapping.model_dump(exclude_unset=True) if isinstance(mapping, RunConfig) else mapping
    errors: list[ConfigError] = []
    layers = mapping_layers(tree_from_mapping(values, Origin("user")), errors)
    return _resolve(layers, overrides, preset, errors, with_rules=with_rules)


def load_stored_config(
    path: Path | str, origins: Mapping[str, Mapping[str, Any]] | None = None, overrides: Sequence[str] = ()
) -> ResolvedConfig:
    """The config that a run has stored: complete, so nothing is derived, looked up or checked against this machine.

    path:      what `to_yaml` wrote
    origins:   what `origins_to_dict` gave, if it was kept; else each value's origin is its line
    overrides: `section.key=value`, put on top; each is checked by itself, as is the rest

    A run stays readable after its data has moved or an optional package is gone. Raises ConfigError or AffinaErrors
    for a file that is damaged or was written by another version.
    """
    errors: list[ConfigError] = []
    checked = validate(apply_overrides(expand_shorthands(read_file(Path(path), errors)), overrides, errors))
    resolve_paths(checked, only="override")
    _raise_all([*errors, *checked.errors])
    config = RunConfig.model_validate(checked.values)
    if origins is None:
        return ResolvedConfig(config, _complete_origins(config, checked.origins))
    stored = {current_name(name): Origin.from_dict(fields) for name, fields in origins.items()}
    put_on_top = {name: origin for name, origin in checked.origins.items() if origin.kind == "override"}
    return ResolvedConfig(config, {**stored, **put_on_top})


def _resolve(
    layers: list[Node], overrides: Sequence[str], preset: str | None, errors: list[ConfigError], *, with_rules: bool
) -> ResolvedConfig:
    if preset is not None:
        layers = [_bottom(preset, layers), *layers]
    tree = reduce(merge, layers, Node({}, Origin("user")))
    tree = without_foreign_validation(apply_overrides(tree, overrides, errors))
    checked = validate(tree)
    resolve_paths(checked)
    errors.extend(checked.errors)
    config = RunConfig.model_validate(checked.values)
    origins = dict(checked.origins)
    for derived in derive(config, origins):
        config = with_value(config, derived.path, derived.value)
        origins[derived.path] = Origin("derived", reason=derived.reason)
    settings = Settings(config, origins)
    if with_rules:
        errors.extend(check_rules(settings, checked.invalid))
    _raise_all(errors)
    return ResolvedConfig(
        config, _complete_origins(config, origins), (*renamed_notes(checked.renamed), *collect_notes(settings))
    )


def _bottom(preset: str, layers: list[Node]) -> Node:
    """The preset's layer, unless the file has chosen a preset itself."""
    lowest = layers[0].origin if layers else None
    if lowest is not None and lowest.kind == "preset" and lowest.preset != preset:
        raise ConfigError(
            "preset-twice",
            f"--preset is {preset}, and the file extends {lowest.preset}",
            why="two presets would be mixed value by value",
            fix="leave --preset out, or remove extends from the file",
        )
    return preset_layer(preset)


def _complete_origins(config: RunConfig, origins: dict[str, Origin]) -> dict[str, Origin]:
    """One origin for every leaf of the config, in the order of the schema, with what there is to say about it."""
    reasons = explain(config)
    complete: dict[str, Origin] = {}
    for path, _ in leaves(config):
        origin = origins.get(path, Origin("default"))
        reason = reasons.get(path)
        complete[path] = origin.with_reason(reason) if reason is not None and origin.reason is None else origin
    return complete


def _raise_all(errors: Sequence[ConfigError]) -> None:
    if errors:
        raise AffinaErrors([*sorted(errors, key=_place)])


def _place(error: ConfigError) -> tuple[str, int]:
    if error.where is None:
        return ("", 0)
    return (str(error.where.path), error.where.line or 0)
