"""Arguments and options that several verbs share, so that they are called and explained the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[
    Path | None,
    typer.Argument(metavar="RUN.YAML", help="The run's config. Without one: the preset laptop.", show_default=False),
]

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: training.learning_rate=1e-4. Repeatable."),
]

PresetOption = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", help="Begin with laptop, starter, production or premium."),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else.")]

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.", show_default=False)]
