"""A list of work that several processes share: what is ready is begun, what ends is told, one error is one."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

import records

IDLE_SECONDS = 2.0
"""How often a process without work looks whether the time that is left has changed what it may begin."""
Job = TypeVar("Job", bound=Hashable)
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Schedule(Protocol[Job]):
    """What there is to do. All of it is called in the process that called `share_work`, one call at a time."""

    def choose(self, running: Sequence[Job], seconds_left: float) -> Job | None:
        """The next piece of work that can be begun now and is expected to end in time."""

    def finish(self, job: Job, outcome: Outcome) -> None:
        """Takes what became of it. `choose` must not give the same piece again."""


@dataclass(frozen=True)
class Outcome:
    """value: what the work returned; error: what it raised, or how its process died, None when it ended well"""

    value: Any = None
    error: str | None = None
    seconds: float = 0.0


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: Any = None
    began: float = 0.0


def share_work(
    schedule: Schedule[Job], work: Callable[[Job], Any], *, num_workers: int, deadline: records.Deadline
) -> None:
    """Does what `schedule` gives, in processes of one thread each, until nothing is left or the time is up.

    work: can be pickled. What still runs at the deadline is ended without a word: a later call does it anew.
    """
    workers: list[_Worker] = []
    for name in ONE_THREAD:
        os.environ[name] = "1"
    try:
        while deadline.left > 0:
            idle = [worker for worker in workers if worker.job is None]
            running = [worker.job for worker in workers if worker.job is not None]
            while (idle or len(workers) < num_workers) and (job := schedule.choose(running, deadline.left)) is not None:
                if not idle:
                    idle = [_start(work)]
                    workers += idle
                worker = idle.pop()
                worker.job, worker.began = job, time.monotonic()
                with suppress(BrokenPipeError):  # a dead process is noticed where its answer is read
                    worker.pipe.send(job)
                running.append(job)
            busy = {worker.pipe: worker for worker in workers if worker.job is not None}
            if not busy:
                return
            for pipe in wait(list(busy), timeout=max(0.0, min(IDLE_SECONDS, deadline.left))):
                worker = busy[pipe]  # type: ignore[index]
                outcome = _answer(worker)
                if outcome is None:
                    workers.remove(worker)
                    worker.process.join()
                    status = worker.process.exitcode
                    outcome = Outcome(error=f"its process ended with status {status}", seconds=_age(worker))
                job, worker.job = worker.job, None
                schedule.finish(job, outcome)
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()


def _start(work: Callable[[Any], Any]) -> _Worker:
    # A forked child could not use CUDA once its parent has.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work))
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _age(worker: _Worker) -> float:
    return time.monotonic() - worker.began


def _answer(worker: _Worker) -> Outcome | None:
    """What it sent, None when it is dead."""
    try:
        value, error = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        return None
    return Outcome(value, error, _age(worker))


def _serve(pipe: Connection, work: Callable[[Any], Any]) -> None:
    with suppress(EOFError):
        while True:
            job = pipe.recv()
            try:
                answer = work(job), None
            except Exception as error:  # noqa: BLE001 - the others are still worth their time
                answer = None, f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"
            pipe.send(answer)
