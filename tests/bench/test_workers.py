"""Processes that share a list of work: order, errors, deaths, the deadline."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any


class Queue:
    """A schedule of numbers, each of which depends on nothing."""

    def __init__(self, jobs: Sequence[str]) -> None:
        self.jobs = list(jobs)
        self.outcomes: dict[str, Any] = {}
        self.most_running = 0

    def choose(self, running: Sequence[str], seconds_left: float) -> str | None:
        self.most_running = max(self.most_running, len(running))
        return next((job for job in self.jobs if job not in self.outcomes and job not in running), None)

    def finish(self, job: str, outcome: Any) -> None:
        self.outcomes[job] = outcome


def work(job: str) -> dict[str, Any]:
    """In a process of its own."""
    if job == "raise":
        raise ValueError("no such thing")
    if job == "die":
        os._exit(7)
    if job == "sleep":
        time.sleep(600)
    return {"job": job, "process": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}


def test_one_error_and_one_death_cost_only_their_own_piece_of_work() -> None:
    import records
    from workers import share_work

    queue = Queue(["a", "raise", "die", "b", "c"])
    share_work(queue, work, num_workers=2, deadline=records.Deadline(60))
    assert set(queue.outcomes) == {"a", "raise", "die", "b", "c"}
    assert queue.outcomes["raise"].error.startswith("ValueError: no such thing\n")
    assert queue.outcomes["die"].error == "its process ended with status 7"
    ended = [queue.outcomes[job].value for job in ("a", "b", "c")]
    assert all(value["threads"] == "1" and value["process"] != os.getpid() for value in ended)
    assert queue.most_running == 1  # with two running nobody asks


def test_work_that_runs_at_the_deadline_is_ended_and_not_told() -> None:
    import records
    from workers import share_work

    queue = Queue(["a", "sleep"])
    began = time.monotonic()
    share_work(queue, work, num_workers=2, deadline=records.Deadline(8))
    assert time.monotonic() - began < 30
    assert set(queue.outcomes) == {"a"}
