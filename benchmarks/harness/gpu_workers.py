"""Tasks in processes of their own: a task that kills its process, or spoils its GPU context, takes no other with it."""

import contextlib
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """A task that is over."""

    task: Any
    died: str  # how its process ended before its time; empty if it did not


class _Worker:
    def __init__(self, run: Callable[[Any], bool]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(run, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Any = None

    def give(self, task: Any) -> None:
        self.task = task
        self.pipe.send(task)

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.pipe.close()


def _serve(run: Callable[[Any], bool], pipe: Connection) -> None:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            healthy = run(pipe.recv())
            pipe.send(healthy)
            if not healthy:
                return


def run_tasks(run: Callable[[Any], bool], tasks: Iterable[Any], processes: int, deadline: float) -> Iterator[Ended]:
    """Run the tasks in so many processes until time.monotonic() is `deadline`; yields each that ended.

    `run` says whether its process can take another task. What runs at the deadline is stopped, and is not yielded.
    0 processes: one after the other, in this one.
    """
    waiting = iter(tasks)
    if processes == 0:
        for task in waiting:
            if time.monotonic() > deadline:
                return
            run(task)
            yield Ended(task, "")
        return
    workers: list[_Worker] = []
    try:
        while True:
            idle = [worker for worker in workers if worker.task is None]
            while (idle or len(workers) < processes) and (task := next(waiting, None)) is not None:
                if idle:
                    worker = idle.pop()
                else:
                    workers.append(worker := _Worker(run))
                worker.give(task)
            busy = {worker.pipe: worker for worker in workers if worker.task is not None}
            if not busy:
                return
            remaining = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
            ready = wait(list(busy), timeout=remaining)
            if not ready:
                return  # the time is over
            for pipe in ready:
                worker = busy[pipe]  # type: ignore[index]
                task, died, healthy = worker.task, "", False
                worker.task = None
                try:
                    healthy = worker.pipe.recv()
                except (EOFError, ConnectionResetError):  # the latter if it had not read its task yet
                    worker.process.join()
                    died = f"its process ended with code {worker.process.exitcode}"
                if not healthy:
                    workers.remove(worker)
                    worker.end()
                yield Ended(task, died)
    finally:
        for worker in workers:
            worker.end()
