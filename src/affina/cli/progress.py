"""A spinner that says how far a long stage is, for the verbs that evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def stage_progress(console: Console, first: str) -> Iterator[Callable[[str, int, int], None]]:
    """A callable (stage, done, total) whose last call is shown on one line; nothing but stages on a plain stream."""
    if not console.is_terminal:
        told: set[str] = set()

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in told:
                told.add(stage)
                console.print(f"{stage}: {total:,} records", soft_wrap=True)

        yield tell
        return
    status = console.status(first)
    status.start()

    def show(stage: str, done: int, total: int) -> None:
        status.update(f"{stage}  {done:,}/{total:,}")

    try:
        yield show
    finally:
        status.stop()
