"""Jobs in worker processes, one torch thread each: they wait for one another and fail alone."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from fmft_fast.errors import FmftError, InputError


@dataclass(frozen=True)
class Job:
    """Work for one process.

    Attributes:
        name: unique; stands in messages.
        work: called in a worker; it, its arguments and what it returns are pickled.
        arguments: of `work`.
        needs: names of the jobs that have to end well before.
    """

    name: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """A job that has ended, what went wrong if something did, and else what its work returned."""

    job: Job
    error: str | None = None
    value: Any = None


def run_jobs(
    jobs: Sequence[Job], workers: int, *, tick: Callable[[], object] | None = None
) -> Generator[Ended, None, None]:
    """Keep `workers` processes at work and give each job as it ends.

    Where the caller stops taking results, by an exception such as Ctrl-C or by closing the
    generator, the workers get SIGTERM, on which a training run saves itself.

    Args:
        jobs: a job stands behind those that it needs.
        workers: processes; 0 works in this one, for a debugger.
        tick: called about once a second.

    Raises:
        InputError: names are not unique, a job needs one that does not stand before it, or there
            are fewer than 0 workers.

    Example:
        >>> jobs = [Job("a", len, (3,)), Job("b", len, ([],), needs=("a",)), Job("c", len, ([],))]
        >>> for ended in run_jobs(jobs, 0):
        ...     print(ended.job.name, ended.error and ended.error.partition(":")[0], ended.value)
        a TypeError None
        b it needs a, which failed None
        c None 0
    """
    if workers < 0:
        raise InputError(f"expected at least 0 workers, got {workers}")
    _check_names(jobs)
    return _run_here(jobs) if workers == 0 else _run_apart(jobs, workers, tick)


def _check_names(jobs: Sequence[Job]) -> None:
    known: set[str] = set()
    for job in jobs:
        if job.name in known:
            raise InputError(f"two jobs are called {job.name!r}; give them different names")
        for name in job.needs:
            if name not in known:
                raise InputError(f"{job.name} needs {name}, which does not stand before it")
        known.add(job.name)


def _run_here(jobs: Sequence[Job]) -> Generator[Ended, None, None]:
    failed: set[str] = set()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in jobs:
            missing = _missing(job, failed)
            ended = Ended(job, missing) if missing else Ended(job, *_attempt(job))
            if ended.error is not None:
                failed.add(job.name)
            yield ended
    finally:
        torch.set_num_threads(threads)


def _run_apart(
    jobs: Sequence[Job], workers: int, tick: Callable[[], object] | None
) -> Generator[Ended, None, None]:
    waiting, unfinished, failed = list(jobs), {job.name for job in jobs}, set[str]()
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    try:
        while waiting or busy:
            for job in [job for job in waiting if _missing(job, failed)]:
                waiting.remove(job)
                failed.add(job.name)
                yield Ended(job, _missing(job, failed))
            ready = [job for job in waiting if not unfinished.intersection(job.needs)]
            for job in ready[: workers - len(busy)]:
                waiting.remove(job)
                busy.append(idle.pop() if idle else _Worker())
                busy[-1].begin(job)
            wait([worker.pipe for worker in busy], timeout=1.0)
            if tick is not None:
                tick()
            for worker in [worker for worker in busy if worker.pipe.poll()]:
                busy.remove(worker)
                ended = worker.end()
                if worker.process.is_alive():
                    idle.append(worker)
                (failed.add if ended.error is not None else unfinished.discard)(ended.job.name)
                yield ended
    finally:
        for worker in idle:
            worker.pipe.close()  # at whose end a worker leaves
        for worker in busy:
            worker.process.terminate()
        for worker in (*idle, *busy):
            worker.process.join()


def _missing(job: Job, failed: set[str]) -> str | None:
    """Say which job that this one needs has failed."""
    return next((f"it needs {name}, which failed" for name in job.needs if name in failed), None)


class _Worker:
    """One process and the pipe by which it gets jobs and says how they ended."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.job: Job | None = None

    def begin(self, job: Job) -> None:
        self.job = job
        self.pipe.send(job)

    def end(self) -> Ended:
        assert self.job is not None
        try:
            return Ended(self.job, *self.pipe.recv())
        except EOFError:
            self.process.join()
            return Ended(self.job, f"its process ended with exit code {self.process.exitcode}")


def _serve(pipe: Connection) -> None:
    """Do one job after another until the parent ends, or SIGTERM comes."""
    # In a group of its own a Ctrl-C reaches the parent only, which passes it on once.
    os.setpgrp()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            error, value = _attempt(job)
            try:
                pipe.send((error, value))
            except (TypeError, AttributeError, pickle.PicklingError) as refusal:
                pipe.send((f"what its work returned cannot be pickled: {refusal}", None))
        except KeyboardInterrupt:
            sys.exit(130)


def _attempt(job: Job) -> tuple[str | None, Any]:
    """Do a job; give what went wrong if something did, and what the work returned."""
    try:
        return None, job.work(*job.arguments)
    except FmftError as error:
        return str(error), None
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})", None
