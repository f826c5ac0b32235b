"""Records are whole or as they were, and a child that takes too long is gone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    import records

    file = tmp_path / "new" / "figures.json"
    records.write(file, {"n": 1})
    with pytest.raises(TypeError):
        records.write(file, {"n": object()})
    assert json.loads(file.read_text()) == records.read(file) == {"n": 1}
    assert records.read(tmp_path / "none.json") is None


def test_a_child_is_run_to_its_end_with_its_output() -> None:
    import records

    command = [sys.executable, "-c", "import os, sys; print(os.environ['FIGURE']); sys.exit(3)"]
    assert records.run(command, timeout=60, environment={"FIGURE": "7"}) == (3, "7\n")


def test_a_child_that_takes_too_long_is_ended_with_its_own_children(tmp_path: Path) -> None:
    import records

    mark = tmp_path / "mark"
    grandchild = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    started = time.monotonic()
    status, _ = records.run([sys.executable, "-c", child], timeout=1.0)
    assert status is None
    assert time.monotonic() - started < 3
    time.sleep(max(0.0, 3.5 - (time.monotonic() - started)))
    assert not mark.exists()


def test_what_is_to_be_done_meanwhile_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    import records

    monkeypatch.setattr(records, "POLL_SECONDS", 0.05)
    seen: list[int] = []
    records.run([sys.executable, "-c", "import time; time.sleep(0.4)"], timeout=60, meanwhile=lambda: seen.append(1))
    assert seen


def test_what_ends_a_benchmark_ends_what_it_runs(tmp_path: Path) -> None:
    mark, begun = tmp_path / "mark", tmp_path / "begun"
    child = f"import time; open({str(begun)!r}, 'w'); time.sleep(3); open({str(mark)!r}, 'w')"
    parent = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r}); import records; "
        f"records.run([sys.executable, '-c', {child!r}], timeout=60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    while not begun.exists():
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    time.sleep(3.5)
    assert not mark.exists()
