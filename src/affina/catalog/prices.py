"""Dated prices of rented cards: assets/cards/prices.json, or a file of the user's own."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from affina.catalog.gpus import find_gpu, gpus
from affina.errors import AffinaErrors, ConfigError, Location

KINDS = ("on-demand", "spot")
_FIELDS = ("provider", "gpu", "kind", "usd_per_hour", "date", "source")
_REQUIRED = _FIELDS[:5]


@dataclass(frozen=True, slots=True)
class Price:
    """What one card costs per hour at one provider, as quoted on `date` (ISO) by `source`."""

    provider: str
    gpu: str
    kind: str
    usd_per_hour: float
    date: str
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def load_prices(path: Path | str | None = None) -> tuple[Price, ...]:
    """The prices of `path` (.json with `prices`, or .csv with a header), or those that ship with affina.

    Raises ConfigError `prices-unreadable`, and AffinaErrors with one `price-row` for every row that is wrong.
    """
    if path is None:
        text = files("affina.catalog").joinpath("assets", "cards", "prices.json").read_text(encoding="utf-8")
        return tuple(shipped_price(row) for row in json.loads(text)["prices"])
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
        rows = _csv_rows(text) if file.suffix.lower() == ".csv" else _json_rows(text)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(
            "prices-unreadable",
            f"the prices in {file} cannot be read",
            why=str(error),
            fix='a .csv with the header provider,gpu,kind,usd_per_hour,date,source, or JSON: {"prices": [{…}]}',
            where=Location(file),
        ) from error
    prices, errors = [], []
    for line, row in rows:
        wrong = _mistake(row)
        if wrong is None:
            card = find_gpu(str(row["gpu"]))
            assert card is not None
            provider, kind, day, source = (str(row.get(name) or "") for name in ("provider", "kind", "date", "source"))
            prices.append(Price(provider, card.name, kind, float(row["usd_per_hour"]), day, source))
        else:
            errors.append(ConfigError("price-row", wrong[0], fix=wrong[1], where=Location(file, line)))
    if errors:
        raise AffinaErrors(list(errors))
    return tuple(prices)


def shipped_price(row: Mapping[str, Any]) -> Price:
    """A row of assets/cards/prices.json. Raises ValueError for a mistake, such as one without source or date."""
    wrong = _mistake(row, required=_FIELDS)
    if wrong is not None:
        raise ValueError(wrong[0])
    return Price(**row)


def _mistake(row: Any, required: Sequence[str] = _REQUIRED) -> tuple[str, str] | None:
    """What is wrong with a row, and how to fix it."""
    if not isinstance(row, Mapping):
        return f"a price is a mapping, not {row!r}", f"write {', '.join(required)}"
    if missing := [name for name in required if row.get(name) in (None, "")]:
        return f"the price has no {', '.join(missing)}", f"every price has {', '.join(required)}"
    if unknown := [str(name) for name in row if name not in _FIELDS]:
        return f"a price has no field {', '.join(unknown)}", f"the fields are {', '.join(_FIELDS)}"
    if find_gpu(str(row["gpu"])) is None:
        return f'there is no card "{row["gpu"]}" in the catalog', f"it has {', '.join(gpus())}"
    if row["kind"] not in KINDS:
        return f'kind is "{row["kind"]}"', f"write {' or '.join(KINDS)}"
    try:
        cost = float(row["usd_per_hour"])
    except (TypeError, ValueError):
        cost = float("nan")
    if isinstance(row["usd_per_hour"], bool) or not 0 <= cost < 10_000:
        return f"usd_per_hour is {row['usd_per_hour']!r}", "write US dollars of one hour of one card, 0 or more"
    try:
        date.fromisoformat(str(row["date"]))
    except ValueError:
        return f'date is "{row["date"]}"', "write the day of the quote: 2026-11-24"
    return None


def _json_rows(text: str) -> Sequence[tuple[int | None, Any]]:
    content = json.loads(text)
    rows = content.get("prices") if isinstance(content, Mapping) else content
    if not isinstance(rows, list):
        raise ValueError("it has no list of prices")
    return [(_line_of(text, index), row) for index, row in enumerate(rows)]


def _line_of(text: str, index: int) -> int | None:
    """The line where the row begins, for a file with one brace to a row."""
    start = text.find("[") + 1
    for _ in range(index + 1):
        start = text.find("{", start) + 1
        if start == 0:
            return None
    return text.count("\n", 0, start) + 1


def _csv_rows(text: str) -> Sequence[tuple[int | None, Any]]:
    reader = csv.DictReader(io.StringIO(text))
    if not reader.fieldnames or "gpu" not in reader.fieldnames:
        raise ValueError("its first line is no header with the column gpu")
    rows: list[tuple[int | None, Any]] = []
    for row in reader:
        if row.pop(None, None) is not None:
            row["more columns than the header"] = "x"
        rows.append((reader.line_num, row))
    return rows
