"""`affina plan`: what a person sees, what a program gets, and how fast."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import affina
from affina.catalog.methods import METHODS
from affina.catalog.model_files import find_config
from affina.catalog.shapes import read_shape
from affina.cli.main import run


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFFINA_CACHE", str(tmp_path / "cache"))


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_card_is_shown_with_every_part_of_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--preset", "starter", "--gpu", "t4")
    assert code == 0
    for text in ("4,022,468,096 parameters", "33,030,144 trained", "base weights", "optimiser", "activations kept",
                 "CUDA context", "total", "fits", "Colab free", "132.2 MB"):  # fmt: skip
        assert text in out, text


def test_all_cards_are_a_table_with_dated_prices(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--preset", "production", "--gpu", "all")
    assert code == 0
    for text in ("rtx3060", "b200", "fits (fast)", "fits (reference)", "RunPod", "2026-"):
        assert text in out, text


def test_a_run_that_fits_nowhere_ends_with_1_and_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--preset", "premium", "--gpu", "rtx3060")
    assert code == 1
    assert "does not fit" in out
    assert "it fits with" in out
    assert "training.micro_batch_size" in out


def test_what_stays_free_is_never_negative_and_the_batch_of_replies_is_the_one_that_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = plan(capsys, "--preset", "premium", "--gpu", "h100", "--set", "engine.memory=12")
    assert code == 0
    assert "H100 80 GB SXM, 12.76 GiB" in out
    assert "generating replies 11.03 (1 at once instead of 16)" in out
    assert "fits     0.1 GiB stay free" in out
    code, out, _ = plan(capsys, "--preset", "production", "--gpu", "rtx3060")
    assert "stay free while replies are generated" in out


def test_a_card_that_is_too_small_says_for_what(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--set", "data.max_length=32768", "--set", "training.micro_batch_size=1", "--gpu", "rtx3060"]
    arguments += ["--set", "engine.memory=8", "--set", "training.optimizer=adamw_8bit"]
    code, out, _ = plan(capsys, "--preset", "production", *arguments)
    assert code == 1
    assert "GiB are needed while replies are generated" in out
    assert "evaluation.max_generations: 0" in out


def test_a_fit_prints_the_settings_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--preset", "premium", "--fit", "16")
    assert code == 0
    assert "within 16 GiB" in out
    assert "layers keep" in out
    assert "fits  " in out


def test_a_fit_of_a_run_on_a_cpu_stays_there_and_tells_the_run_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--preset", "laptop", "--fit", "0.15")
    assert code == 0
    assert "CPU, 0.15 GiB" in out
    assert "affina train … --set engine.memory=0.15 --set evaluation.batch_size=1\n" in out
    assert "MiB stay free" in out
    code, out, _ = plan(capsys, "--preset", "production", "--gpu", "rtx4090", "--fit", "10")
    assert code == 0
    assert "GeForce RTX 4090, 10.00 GiB of it" in out


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["premium", "--set", "engine.memory=2"], "--may-quantize allows other weight formats"),
        (["premium", "--set", "engine.memory=2", "--may-quantize"], "take a larger card or a smaller model"),
        (["production", "--set", "engine.memory=2"], "take a larger card or a smaller model"),
    ],
    ids=["dense", "allowed already", "four bits already"],
)
def test_advice_is_only_what_may_help(capsys: pytest.CaptureFixture[str], arguments: list[str], advice: str) -> None:
    code, out, _ = plan(capsys, "--gpu", "rtx3060", "--preset", *arguments)
    assert code == 1
    assert f"no setting makes it fit: {advice}" in out or f"no setting makes it fit; {advice}" in out
    for line in ("time  ", "energy  ", "cost  "):  # of a run that cannot be
        assert line not in out


def test_the_lowest_memory_says_what_is_not_on_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = plan(capsys, "--preset", "production", "--gpu", "rtx3060", "--set", "engine.memory=lowest")
    assert "embedding, which is the head too, int8" in out
    assert "66,060,288 parameters in main memory, one layer of them here" in out


def test_a_small_model_is_shown_in_mebibytes(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = plan(capsys, "--preset", "laptop")
    assert "MiB" in out
    assert " 0.00 " not in out


def test_json_has_the_same_numbers_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--preset", "production", "--gpu", "h100", "--json")
    assert code == 0
    values: dict[str, Any] = json.loads(out)
    (card,) = values["cards"]
    assert card["memory"]["total_bytes"] == sum(part["num_bytes"] for part in card["memory"]["components"])
    assert values["model"]["num_parameters"] == 4_022_468_096
    assert card["fits"] is True


def test_prices_of_ones_own_are_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("provider,gpu,kind,usd_per_hour,date\nmy cluster,h100,on-demand,9.99,2026-11-20\n")
    _, out, _ = plan(capsys, "--preset", "production", "--gpu", "h100", "--prices", str(file))
    assert "my cluster, on-demand, 9.99/h on 2026-11-20\n" in out
    file.write_text("provider,gpu,kind,usd_per_hour,date,source\nmine,h100,spot,9.99,2026-11-20,the contract\n")
    _, out, _ = plan(capsys, "--preset", "production", "--gpu", "h100", "--prices", str(file))
    assert "mine, spot, 9.99/h on 2026-11-20, the contract\n" in out


def test_the_trace_is_shown_beside_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--preset", "laptop", "--trace")
    assert code == 0
    assert "trace" in out
    assert "operations; of a dense base: quantising to nf4 looks at weights, and a trace has none" in out
    _, out, _ = plan(capsys, "--preset", "laptop", "--trace", "--set", "quantization=none")
    assert "dense base" not in out


def test_counted_data_gives_exact_steps(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan(capsys, "--preset", "laptop", "--tokenize", "--json")
    assert code == 0
    values = json.loads(out)
    assert values["data"]["is_exact"] is True
    assert values["data"]["num_steps"] == 207  # as the quickstart trains
    assert values["notes"] == []


def test_a_stream_cannot_be_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    file_config = tmp_path / "run.yaml"
    file_config.write_text(
        f"model: affina/nano\ndata: {{train: {file}, streaming: true}}\ntraining: {{max_steps: 3, device: cpu}}\n"
    )
    code, _, err = plan(capsys, str(file_config), "--tokenize")
    assert code == 1
    assert "error[plan-of-stream]" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "production", "--gpu", "rtx4080"], "did you mean rtx4090"),
        (["--preset", "production", "--fit", "2"], "error[nothing-fits]"),
        (["--recommend", "--gpu", "t4"], "--recommend needs --gpu, --model and --data"),
        (["--model", "x"], "--model and --data belong to --recommend"),
        (["--preset", "production", "--gpu", "t4", "--prices", "none.csv"], "error[prices-unreadable]"),
        (["--preset", "production", "--set", "data.max_length=99999", "--gpu", "t4"], "131,072 with YaRN"),
        (
            ["--preset", "production", "--set", "adapter=hra", "--set", "quantization=none", "--gpu", "h100"],
            "plan-unsupported",
        ),
        (["--fit", "-3"], "error[usage]"),
        (["--preset", "premium", "--fit", "12", "--gpu", "l4,a4000"], "for one card, and 2 are named: l4, a4000"),
        (["--preset", "laptop", "--fit", "12", "--gpu", "cpu,t4"], "a fit is for one card, and 2 are named: cpu, t4"),
        (["--preset", "production", "--fit", "1", "--gpu", "cpu"], "give it more memory, or take a smaller model"),
    ],
)
def test_mistakes_are_told_with_a_way_out(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, _, err = plan(capsys, *arguments)
    assert code in (1, 2)
    assert message in err
    assert "fix:" in err


def test_a_model_without_a_config_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = plan(capsys, "--set", f"model.path={tmp_path}", "--gpu", "t4")
    assert code == 1
    assert "has no config.json" in err


def test_a_plan_takes_less_than_a_second_and_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom affina.cli.main import run\n"
        "code = run(['plan', '--preset', 'premium', '--gpu', 'h200', '--json'])\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'bitsandbytes'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, (code, heavy)"
    )
    seconds = []
    for _ in range(3):
        started = time.process_time_ns()
        before = _children_seconds()
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
        seconds.append(_children_seconds() - before)
        assert time.process_time_ns() >= started
    # Of the processor, not of the clock: other programs run on the machine.
    assert min(seconds) < 1.0, seconds


def _children_seconds() -> float:
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_planned_with_its_own_parameters(capsys: pytest.CaptureFixture[str], method: str) -> None:
    format = "nf4" if method == "loftq" else "none"
    code, out, _ = plan(
        capsys, "--preset", "production", "--gpu", "b200", "--json", "--set", f"adapter={method}",
        "--set", f"quantization={format}",
    )  # fmt: skip
    values = json.loads(out)
    config = affina.check(preset="production", overrides=[f"adapter={method}", f"quantization={format}"]).config
    given = {name: getattr(config.adapter, name) for name in METHODS[method].fields}
    settings = METHODS[method].settings(**{name: value for name, value in given.items() if value is not None})
    shape = read_shape(find_config("Qwen/Qwen3-4B")[0])
    assert code == 0
    assert values["num_trainable"] == METHODS[method].num_parameters(shape, settings)
    assert values["adapter_bytes"] == pytest.approx(4 * METHODS[method].num_file_parameters(shape, settings), rel=1e-3)
    (card,) = values["cards"]
    parts = {part["name"]: part["num_bytes"] for part in card["memory"]["components"]}
    assert parts["optimiser"] == pytest.approx(8 * values["num_trainable"], rel=1e-3)
    is_noted = any("compared with steps on a CPU" in note for note in values["notes"])
    assert is_noted is not METHODS[method].fast_engine


def test_a_table_of_cards_has_the_price_at_every_provider_with_its_date(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "p.csv"
    file.write_text(
        "provider,gpu,kind,usd_per_hour,date\n"
        "north,h100,on-demand,360,2026-11-20\nnorth,h200,on-demand,720,2026-11-22\nsouth,h200,spot,36,2026-11-01\n"
    )
    _, out, _ = plan(capsys, "--preset", "production", "--gpu", "h100,h200", "--prices", str(file))
    values = json.loads(
        plan(capsys, "--preset", "production", "--gpu", "h100,h200", "--prices", str(file), "--json")[1]
    )
    hours = [card["seconds"] / 3600 for card in values["cards"]]
    (north,) = [line.split() for line in out.splitlines() if line.startswith("north, on-demand")]
    assert north == [
        "north,",
        "on-demand",
        f"{360 * hours[0]:.2f}",
        f"{720 * hours[1]:.2f}",
        *["2026-11-20", "to", "2026-11-22"],
    ]
    (south,) = [line.split() for line in out.splitlines() if line.startswith("south, spot")]
    assert south == ["south,", "spot", f"{36 * hours[1]:.2f}", "2026-11-01"]


def test_the_command_line_prints_the_very_object_of_the_api(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = plan(capsys, "--preset", "production", "--gpu", "h100,l4", "--json")
    assert json.loads(out) == affina.plan(preset="production", gpus=["h100", "l4"]).to_dict()
