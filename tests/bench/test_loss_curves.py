"""Loss curves on a toy model: pairing, judgement, the record and the drawing."""

from __future__ import annotations

import json
import xml.dom.minidom
from pathlib import Path

import pytest


def test_a_short_run_is_recorded_judged_and_drawn(tmp_path: Path) -> None:
    import loss_curves

    output = tmp_path / "curves.json"
    variants = "reference-bf16,fast-bf16,fast-nf4"
    arguments = ["--tiny", "--steps", "3", "--base-steps", "2", "--seeds", "2", "--variants", variants]
    loss_curves.main([*arguments, "--output", str(output)])
    record = json.loads(output.read_text())
    curves = loss_curves.curves_of(record["runs"])
    assert {name: sorted(seeds) for name, seeds in curves.items()} == {key: [0, 1] for key in variants.split(",")}
    # The same start and the same rows: the engines agree in float32 at every step, seeds do not.
    for seed in (0, 1):
        assert curves["fast-bf16"][seed] == pytest.approx(curves["reference-bf16"][seed], rel=1e-4)
    assert curves["reference-bf16"][0][0] != pytest.approx(curves["reference-bf16"][1][0], rel=1e-4)
    verdict = record["verdicts"]["fast-bf16"]
    assert verdict["test"]["is_equivalent"]
    assert verdict["is_within_spread"]
    drawing = output.with_suffix(".svg").read_text()
    xml.dom.minidom.parseString(drawing)
    assert all(name in drawing for name in variants.split(","))
    assert "data-chart" not in drawing


def test_a_shifted_curve_is_different_and_outside_of_the_spread() -> None:
    from loss_curves import judge

    reference = {seed: [3.0 + 0.01 * seed] * 60 for seed in range(5)}
    shifted = {seed: [loss + 0.2 for loss in losses] for seed, losses in reference.items()}
    found = judge({"reference-bf16": reference, "fast-fp8": shifted})["fast-fp8"]
    assert not found["test"]["is_equivalent"]
    assert found["test"]["mean"] == pytest.approx(0.2)
    assert found["share_of_steps_within_spread"] == 0.0
    assert not found["is_within_spread"]


def test_variants_are_run_seed_by_seed_and_the_costly_ones_last() -> None:
    from loss_curves import order_of

    order = order_of(["reference-fp32", "reference-bf16", "fast-bf16"], 2)
    assert order[:4] == [("reference-bf16", 0), ("fast-bf16", 0), ("reference-bf16", 1), ("fast-bf16", 1)]
    assert order[4:] == [("reference-fp32", 0), ("reference-fp32", 1)]


def test_a_variant_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import loss_curves

    make = loss_curves.make_trainee

    def failing(variant: loss_curves.Variant, *rest: object) -> loss_curves.Trainee:
        if variant.is_fast:
            raise RuntimeError("no kernel for this card")
        return make(variant, *rest)

    monkeypatch.setattr(loss_curves, "make_trainee", failing)
    output = tmp_path / "curves.json"
    arguments = ["--tiny", "--steps", "1", "--base-steps", "1", "--seeds", "2"]
    loss_curves.main([*arguments, "--variants", "fast-bf16,reference-bf16", "--output", str(output)])
    runs = json.loads(output.read_text())["runs"]
    assert [run.get("error") for run in runs if run["variant"] == "fast-bf16"] == [
        "RuntimeError: no kernel for this card"
    ]
    assert len([run for run in runs if "losses" in run]) == 2
    assert "no kernel for this card" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data FOLDER is needed"),
        (["--tiny", "--variants", "fast-fp4"], "unknown variants: fast-fp4"),
        (["--data", "/nowhere"], "not there: /nowhere/gsm8k.jsonl.gz"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_computed(arguments: list[str], message: str) -> None:
    import loss_curves

    with pytest.raises(SystemExit, match=message):
        loss_curves.main(arguments)


def test_the_carried_folder_has_the_first_records_and_the_tokenizer(tmp_path: Path) -> None:
    import gzip

    from carry_real_data import SOURCES, main

    data = tmp_path / "data"
    for name in SOURCES.values():
        (data / name).parent.mkdir(parents=True)
        (data / name).write_bytes(gzip.compress(b"".join(b'{"n": %d}\n' % n for n in range(9))))
    (data / "qwen3_tokenizer/hf").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"not there: .*tokenizer\.json"):
        main([str(data), str(tmp_path / "out")])
    (data / "qwen3_tokenizer/hf/tokenizer.json").write_text("{}")
    main([str(data), str(tmp_path / "out"), "--records", "2"])
    assert gzip.decompress((tmp_path / "out/dolly.jsonl.gz").read_bytes()) == b'{"n": 0}\n{"n": 1}\n'
    assert (tmp_path / "out/tokenizer/tokenizer.json").exists()
