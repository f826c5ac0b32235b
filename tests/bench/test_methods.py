"""The measurement of methods: what is done in which order, what is kept, and what is said of it."""

from __future__ import annotations

import json
import math
import xml.dom.minidom
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


def plan_of(tmp_path: Path, *options: str) -> Any:
    import methods

    arguments = methods.parse(["--results", str(tmp_path / "methods.json"), "--steps", "20", *options])
    return methods.Plan(methods.Store(arguments.results), arguments)


def result_of(job: Any, *, loss: float = 1.0, accuracy: float = 0.5) -> Any:
    """What a worker would return for a piece of work."""
    from workers import Outcome

    record = {**job.keys(), "method": "lora", "best_validation_loss": loss, "num_trainable": 10, "num_parameters": 100}
    record |= {"device": "a card", "versions": {"torch": "2"}, "date": "2026-01-01", "learning_rate": job.rate}
    if job.kind == "base":
        tasks = {task: {"accuracy": 0.0} for task in ("support", "ledger")}
        record |= {"num_skills": 8, "num_skills_right": 8, "tasks": tasks}
    if job.kind == "records":
        record |= {"accuracy": accuracy, "num_skills": 8, "num_skills_right": 4}
    if job.kind == "speed":
        record |= {"microseconds_per_token": 2.0, "peak_memory_bytes": 2**30}
    return Outcome(record, seconds=2.0)


def ready(plan: Any, running: Sequence[Any] = ()) -> list[str]:
    return [str(job) for job in plan.ready(running)]


def test_every_method_of_the_registry_is_a_variant_and_each_is_a_valid_config() -> None:
    import methods

    import affina
    from affina.catalog.methods import METHODS

    assert {variant.method for variant in methods.VARIANTS.values()} == set(METHODS)
    assert set(methods.CLAIM_VARIANTS) <= set(methods.VARIANTS)
    settings = methods.Settings(device="cpu", folder="")
    for variant in methods.VARIANTS.values():
        affina.check(methods.config_of("affina/nano", "support", variant, settings))


def test_a_sweep_goes_on_beyond_an_edge_and_ends_within() -> None:
    from methods import MAX_RATES, best_rate, rates_wanted

    assert rates_wanted(0.03, {}) == [0.01, 0.03, 0.09]
    assert rates_wanted(0.03, {0.03: 1.0}) == [0.01, 0.09]
    assert rates_wanted(0.03, {0.01: 2.0, 0.03: 1.0, 0.09: 2.0}) == []
    assert rates_wanted(0.03, {0.01: 1.0, 0.03: 2.0, 0.09: 3.0}) == [0.00333]
    assert rates_wanted(0.03, {0.01: 3.0, 0.03: 2.0, 0.09: 1.0}) == [0.27]
    five = {0.01: 5.0, 0.03: 4.0, 0.09: 3.0, 0.27: 2.0, 0.81: 1.0}
    assert len(five) == MAX_RATES
    assert rates_wanted(0.03, five) == []
    # 0.9 is the highest; all that failed asks for a lower one.
    assert rates_wanted(0.4, {0.133: 3.0, 0.4: 2.0, 0.9: 1.0}) == []
    assert rates_wanted(0.03, {0.01: math.inf, 0.03: math.inf, 0.09: math.inf}) == [0.00333]
    assert best_rate({0.01: math.inf}) is None


def test_seeds_wait_for_their_own_sweep_alone_and_claims_come_first(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "--variants", "dora,lora", "--tasks", "ledger", "--seeds", "0,1")
    first = list(plan.ready(()))
    assert ready(plan)[:2] == ["base affina/nano", "sweep affina/nano lora ledger rate 0.00267"]
    sweeps = [job for job in first if job.kind == "sweep" and job.variant == "lora"]
    assert not [job for job in first if job.kind == "records"]
    assert {job.steps for job in sweeps} == {10}
    for job, loss in zip(sweeps, (2.0, 1.0, 2.0), strict=True):
        assert not [job for job in plan.ready(sweeps) if job.kind == "records"]
        plan.finish(job, result_of(job, loss=loss))
    expected = ["base affina/nano", "records affina/nano lora ledger seed 0", "records affina/nano lora ledger seed 1"]
    assert ready(plan)[:3] == expected
    assert all(name.startswith("sweep affina/nano dora") for name in ready(plan)[3:])
    run = next(job for job in plan.ready(()) if job.kind == "records")
    assert (run.rate, run.steps) == (0.008, 20)


def test_a_claim_is_measured_on_every_model_before_another_variant_is(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 768}))
    plan = plan_of(tmp_path, "--model", f"affina/nano,{folder}", "--variants", "lora,dora")
    assert [(Path(model).name, variant) for model, variant in plan.order] == [
        ("nano", "lora"), ("small", "lora"), ("nano", "dora"), ("small", "dora"),
    ]  # fmt: skip
    # Three times as wide: a third of the rate.
    assert plan.registered[str(folder), "lora"] == pytest.approx(plan.registered["affina/nano", "lora"] / 3)
    assert "base small" in ready(plan)


def test_a_later_call_goes_on_where_one_stopped(tmp_path: Path) -> None:
    options = ("--variants", "lora", "--tasks", "ledger", "--seeds", "0,1")
    plan = plan_of(tmp_path, *options)
    num = 0
    while (job := plan.choose((), math.inf)) is not None and num < 5:
        plan.finish(job, result_of(job, loss=abs(job.rate - 0.008)))
        num += 1
    assert ready(plan_of(tmp_path, *options)) == ready(plan) == ["records affina/nano lora ledger seed 1"]
    written = json.loads((tmp_path / "methods.json").read_text())
    assert written["environments"] == [{"device": "a card", "versions": {"torch": "2"}, "date": "2026-01-01"}]
    assert {record["environment"] for record in written["sweep"]} == {0}


def test_what_is_expected_to_end_too_late_is_not_begun(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "--variants", "lora", "--tasks", "ledger")
    base, sweep = list(plan.ready(()))[:2]
    plan.finish(base, result_of(base))
    plan.finish(sweep, result_of(sweep))
    assert plan.choose((), 2.3).kind == "sweep"  # it took 2 s
    assert plan.choose((), 2.1) is None


def test_a_rate_that_fails_is_recorded_and_the_sweep_goes_on(tmp_path: Path) -> None:
    from workers import Outcome

    plan = plan_of(tmp_path, "--variants", "lora", "--tasks", "ledger", "--seeds", "0")
    sweeps = [job for job in plan.ready(()) if job.kind == "sweep"]
    plan.finish(sweeps[2], Outcome(error="TrainingError: not finite\nTraceback"))
    for job, loss in zip(sweeps[:2], (2.0, 1.0), strict=True):
        plan.finish(job, result_of(job, loss=loss))
    assert ready(plan)[1:] == ["records affina/nano lora ledger seed 0"]
    (error,) = json.loads((tmp_path / "methods.json").read_text())["errors"]
    assert (error["kind"], error["variant"], error["learning_rate"]) == ("sweep", "lora", 0.024)


def test_speed_is_measured_for_what_was_trained(tmp_path: Path) -> None:
    from methods import SpeedPlan

    plan = plan_of(tmp_path, "--variants", "lora,dora", "--tasks", "ledger", "--seeds", "0")
    while (job := plan.choose((), math.inf)) is not None and job.variant != "dora":
        plan.finish(job, result_of(job, loss=abs(job.rate - 0.008)))
    alone = SpeedPlan(plan)
    (job,) = alone.jobs
    assert (job.variant, job.task, job.rate) == ("lora", "support", 0.008)
    assert alone.choose((), 1.0) == job
    alone.finish(job, result_of(job))
    assert alone.choose((), math.inf) is None


def run(variant: str, seed: int, accuracy: float, *, task: str = "ledger", right: int = 100) -> dict[str, Any]:
    record = {"model": "affina/nano", "variant": variant, "task": task, "seed": seed, "steps": 200}
    record |= {"accuracy": accuracy, "num_skills": 200, "num_skills_right": right, "learning_rate": 0.01}
    method = variant.partition("-")[0]
    return record | {"method": method, "num_trainable": 1000 * len(variant), "num_parameters": 1_000_000}


def content_of(*runs: dict[str, Any]) -> dict[str, Any]:
    tasks = {"ledger": {"accuracy": 0.0}}
    base = {"model": "affina/nano", "num_skills": 200, "num_skills_right": 200, "tasks": tasks}
    speed = {"model": "affina/nano", "variant": "lora", "microseconds_per_token": 12.34, "peak_memory_bytes": 2**30}
    environment = {"device": "a card", "versions": {"torch": "2"}, "date": "2026-01-01"}
    return {"environments": [environment], "base": [base], "records": list(runs), "speed": [speed], "errors": []}


def test_an_interval_is_students_over_seeds() -> None:
    from methods_report import estimate

    value = estimate([0.8, 0.9, 1.0])
    # t(97.5%, 2 degrees) = 4.303; s = 0.1.
    assert value is not None
    assert value.mean == pytest.approx(0.9)
    assert value.half == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert value.text() == "90.0 ± 24.8"
    assert estimate([]) is None
    alone = estimate([0.5])
    assert alone is not None
    assert alone.text() == "50.0"


def test_a_comparison_is_paired_by_seed() -> None:
    from methods_report import groups, paired

    runs = [run("lora", seed, 0.5 + 0.1 * seed) for seed in range(3)]
    runs += [run("lora-qv", seed, 0.4 + 0.1 * seed) for seed in (2, 1, 0, 3)]
    found = groups(content_of(*runs))
    ratio, difference = paired(found["affina/nano", "lora", "ledger"], found["affina/nano", "lora-qv", "ledger"])
    assert difference is not None
    assert (difference.num, difference.mean) == (3, pytest.approx(0.1))
    assert difference.half == pytest.approx(0.0, abs=1e-12)  # the spread between seeds is in neither
    assert ratio is not None
    assert ratio.mean == pytest.approx((5 / 4 + 6 / 5 + 7 / 6) / 3)
    nothing = groups(content_of(run("lora", 0, 0.5), run("full", 0, 0.0)))
    assert paired(nothing["affina/nano", "lora", "ledger"], nothing["affina/nano", "full", "ledger"])[0] is None


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ((0.985, 0.986, 0.987), "yes"),
        ((1.0, 1.001, 1.002), "**no**"),
        ((0.9, 0.901, 0.902), "**no**"),
        ((0.9, 1.0, 1.1), "cannot tell"),
        ((0.99,), "one seed: cannot tell"),
        ((), "not measured"),
    ],
)
def test_a_claim_holds_when_the_whole_interval_is_within_it(ratios: tuple[float, ...], words: str) -> None:
    from methods_report import CLAIMS, estimate, verdict

    assert verdict(CLAIMS[0], estimate(ratios)) == words


def test_equal_is_not_better() -> None:
    from methods_report import CLAIMS, estimate, verdict

    (better,) = (claim for claim in CLAIMS if "beats" in claim.text)
    assert verdict(better, estimate([1.0, 1.0, 1.0])) == "**no**"


def test_tables_show_means_intervals_and_what_is_missing(tmp_path: Path) -> None:
    from results_table import method_claims, methods

    runs = [run("lora", seed, 0.9, right=100 + seed) for seed in range(3)] + [run("full", 0, 0.8)]
    content = content_of(*runs)
    content["errors"] = [{"kind": "records", "model": "affina/nano", "variant": "boft", "task": "ledger",
                          "error": "OutOfMemoryError: too large\nTraceback"}]  # fmt: skip
    (tmp_path / "methods.json").write_text(json.dumps(content))
    table = methods(tmp_path)
    assert "| `lora` | 4,000 | 0.4 | 90.0 ± 0.0 | 50.5 ± 1.2 | 12.3 | 1.000 | 0.01 | 3 |" in table
    assert "| `full` | 4,000 | 0.4 | 80.0 | 50.0 |  |  | 0.01 | 1 |" in table
    assert "| the base | 0 | 0 | 0.0 | 100 |" in table
    assert "- `boft` on ledger (affina/nano) failed: OutOfMemoryError: too large\n" in table
    assert table.endswith("a card; torch 2; 2026-01-01.\n")
    claims = method_claims(tmp_path)
    first = "| `lora` 90.0 ± 0.0 | `full` 80.0 | 112.5 | +10.0 | one seed: cannot tell |"
    assert f"| LoRA keeps 98–99.5% of full fine-tuning | affina/nano, ledger {first}" in claims
    assert "| `ia3` not measured | `full` 80.0 |  |  | not measured |" in claims


def test_a_ratio_to_nothing_is_said_to_be_none() -> None:
    from methods_report import claims_table

    table = claims_table(content_of(run("lora", 0, 0.5), run("full", 0, 0.0)))
    assert "| `lora` 50.0 | `full` 0.0 |  | +50.0 | no ratio to 0% |" in table


def test_figures_name_every_variant_once_in_each_panel(tmp_path: Path) -> None:
    from methods import VARIANTS
    from methods_report import draw

    runs = [
        {**run(name, seed, 0.9 + 0.001 * seed, task=task, right=150), "method": variant.method}
        for name, variant in VARIANTS.items()
        for task in ("support", "ledger")
        for seed in range(3)
    ]
    parameters, forgetting = draw(content_of(*runs), tmp_path)
    for path in (parameters, forgetting):
        drawing = path.read_text(encoding="utf-8")
        xml.dom.minidom.parseString(drawing)
        assert all(drawing.count(f">{name}</text>") == 2 for name in VARIANTS)
        assert "prefers-color-scheme: dark" in drawing
    assert draw(content_of(), tmp_path) == []


def test_a_page_elsewhere_finds_the_figures(tmp_path: Path) -> None:
    from results_table import figures_folder, rendered

    results = tmp_path / "bench" / "results"
    (results).mkdir(parents=True)
    (results / "methods.json").write_text(json.dumps(content_of(run("lora", 0, 0.9))))
    (results / "methods_skills.svg").write_text("<svg/>")
    folder = figures_folder(tmp_path / "docs" / "guides" / "page.md", results)
    assert folder == "../../bench/results"
    page = rendered("<!-- table: methods -->\n<!-- end: methods -->\n", results, folder=folder)
    assert "](../../bench/results/methods_skills.svg)" in page
    assert "methods_parameters.svg" not in page


def test_a_call_measures_a_method_from_its_sweep_to_its_speed(tmp_path: Path) -> None:
    import methods

    output = tmp_path / "methods.json"
    options = ["--variants", "ia3", "--tasks", "ledger", "--seeds", "0", "--steps", "2", "--max-generations", "2"]
    methods.main([*options, "--every-skill-item", "56", "--results", str(output), "--speed-seconds", "30"])
    content = json.loads(output.read_text())
    assert content["errors"] == []
    assert content["base"][0]["num_skills_right"] == content["base"][0]["num_skills"] == 4
    (record,) = content["records"]
    assert (record["num_replies"], record["num_skills"], record["steps"]) == (2, 4, 2)
    losses = {sweep["learning_rate"]: sweep["best_validation_loss"] for sweep in content["sweep"]}
    assert record["learning_rate"] == min(losses, key=lambda rate: losses[rate])
    assert content["speed"][0]["microseconds_per_token"] > 0
