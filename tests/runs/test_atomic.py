"""Nothing is ever half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from affina.runs import atomic
from affina.runs.checksums import find_damage, write_checksums


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "run.json"
    atomic.write_text(target, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target], "the temporary file must be gone"


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "step-00000001"

    def fail_half_way() -> None:
        with atomic.new_directory(target) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    with atomic.new_directory(target) as folder:
        (folder / "whole").write_text("x")
        assert not target.exists()
    assert (target / "whole").read_text() == "x"


def test_a_directory_replaces_an_older_one(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic.new_directory(tmp_path / "adapter") as folder:
            (folder / content).write_text(content)
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a POSIX signal")
def test_a_killed_process_leaves_only_a_leftover_that_is_cleared(tmp_path: Path) -> None:
    script = (
        "import os, sys, signal\nfrom pathlib import Path\nfrom affina.runs import atomic\n"
        "with atomic.new_directory(Path(sys.argv[1]) / 'step-00000001') as folder:\n"
        "    (folder / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(atomic.TEMPORARY_PREFIX)
    atomic.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "a.bin").write_bytes(b"other"), "the checksum of a.bin is wrong"),
        (lambda folder: os.remove(folder / "sub" / "b.bin"), "sub/b.bin is missing"),
        (lambda folder: os.remove(folder / "checksums.json"), "checksums.json is missing"),
        (lambda folder: (folder / "checksums.json").write_text("{"), "checksums.json cannot be read"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, harm, words: str) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"a" * 3000)
    (tmp_path / "sub" / "b.bin").write_bytes(b"b")
    write_checksums(tmp_path)
    assert find_damage(tmp_path) is None
    harm(tmp_path)
    assert find_damage(tmp_path) == words
