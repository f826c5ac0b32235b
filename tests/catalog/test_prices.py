"""Prices carry their date and source; a file with bad rows says which and why, all at once."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from affina.catalog.gpus import gpus
from affina.catalog.prices import KINDS, load_prices, shipped_price
from affina.errors import AffinaErrors, ConfigError

HEADER = "provider,gpu,kind,usd_per_hour,date,source\n"


def test_every_shipped_price_has_a_card_a_date_and_a_source() -> None:
    for price in load_prices():
        assert price.gpu in gpus()
        assert price.kind in KINDS
        assert price.usd_per_hour >= 0
        assert date.fromisoformat(price.date) <= date.today()
        assert len(price.source) > 10
        # None was read off the provider's own page.
        assert "(secondary" in price.source


def test_no_shipped_price_is_another_one_times_a_factor() -> None:
    by_source: dict[tuple[str, str], dict[str, set[str]]] = {}
    for price in load_prices():
        by_source.setdefault((price.provider, price.source), {}).setdefault(price.gpu, set()).add(price.kind)
    assert all(kinds != set(KINDS) for cards in by_source.values() for kinds in cards.values())


@pytest.mark.parametrize("missing", ["source", "date"])
def test_a_shipped_row_without_source_or_date_is_a_mistake(missing: str) -> None:
    row = {**load_prices()[0].to_dict(), missing: ""}
    with pytest.raises(ValueError, match=f"the price has no {missing}"):
        shipped_price(row)


def test_a_csv_file_replaces_the_shipped_prices(tmp_path: Path) -> None:
    file = tmp_path / "prices.csv"
    file.write_text(HEADER + "mine,NVIDIA L4,on-demand,0.5,2026-11-01,my contract\n")
    (price,) = load_prices(file)
    assert (price.provider, price.gpu, price.usd_per_hour, price.date) == ("mine", "l4", 0.5, "2026-11-01")


def test_a_json_file_works_too(tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    row = {"provider": "mine", "gpu": "t4", "kind": "spot", "usd_per_hour": 0.1, "date": "2026-11-01"}
    file.write_text(json.dumps({"prices": [row]}))
    assert load_prices(file)[0].gpu == "t4"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,t4,spot,,2026-01-01,x", "the price has no usd_per_hour"),
        ("a,t5,spot,1,2026-01-01,x", 'there is no card "t5" in the catalog'),
        ("a,t4,monthly,1,2026-01-01,x", 'kind is "monthly"'),
        ("a,t4,spot,cheap,2026-01-01,x", "usd_per_hour is 'cheap'"),
        ("a,t4,spot,-1,2026-01-01,x", "usd_per_hour is '-1'"),
        ("a,t4,spot,nan,2026-01-01,x", "usd_per_hour is 'nan'"),
        ("a,t4,spot,1,last week,x", 'date is "last week"'),
        ("a,t4,spot,1,2026-01-01,x,y", "a price has no field more columns than the header"),
    ],
)
def test_a_bad_row_is_told_with_its_line_and_what_is_wrong(tmp_path: Path, row: str, message: str) -> None:
    file = tmp_path / "prices.csv"
    file.write_text(HEADER + "a,t4,spot,1,2026-01-01,x\n" + row + "\n")
    with pytest.raises(AffinaErrors) as error:
        load_prices(file)
    assert f"error[price-row]: {message}" in str(error.value)
    assert f"({file}:3)" in str(error.value)


def test_all_bad_rows_come_together(tmp_path: Path) -> None:
    file = tmp_path / "prices.csv"
    file.write_text(HEADER + "a,t5,spot,1,2026-01-01,x\na,t4,daily,1,2026-01-01,x\n")
    with pytest.raises(AffinaErrors) as error:
        load_prices(file)
    assert len(error.value.errors) == 2


@pytest.mark.parametrize("text", ["", "not a header\n1,2\n"])
def test_a_csv_without_a_header_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prices.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"error\[prices-unreadable\].*cannot be read"):
        load_prices(file)


@pytest.mark.parametrize("text", ["{", '{"rows": []}', '"text"'])
def test_json_that_holds_no_prices_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prices.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="prices-unreadable"):
        load_prices(file)


def test_rows_of_json_that_are_no_mappings_are_told(tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    file.write_text('{"prices": [3]}')
    with pytest.raises(AffinaErrors, match="a price is a mapping, not 3"):
        load_prices(file)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prices-unreadable"):
        load_prices(tmp_path / "none.csv")
