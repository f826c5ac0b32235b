"""`affina config-schema`: the config's JSON Schema, and its reference page."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from affina.cli import render
from affina.cli.options import JsonOption
from affina.config.json_schema import config_json_schema
from affina.config.reference import config_reference


def config_schema_command(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the reference page of the config instead, in Markdown.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the JSON Schema of run.yaml (draft 2020-12), with which editors complete and check it.

    Save it and begin a file with: # yaml-language-server: $schema=affina.schema.json
    """
    if not markdown:
        render.print_json(config_json_schema())
    elif as_json:
        render.print_json({"markdown": config_reference()})
    else:
        sys.stdout.write(config_reference())
