"""Jobs in parallel processes: results in the order of the jobs, failures as errors; and processes that end with another one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from paligemma_vla.errors import VLAError, WorkerError

Job = TypeVar("Job")
Result = TypeVar("Result")
POLL_SECONDS = 2.0
JOBS_AHEAD = 4  # jobs per worker that may be finished but not fetched yet; bounds memory


class WorkerPool:
    """Processes that live until the pool is closed, so imports, simulators and models are paid for once.

    Workers are spawned, not forked: graphics contexts and thread pools do not survive a fork. `workers=0` runs the jobs in
    this process, one after the other, for debugging. prepare(*arguments) runs once in each worker before its first job; it
    should only note what the jobs need, since an error there looks like a crash.
    """

    def __init__(self, workers: int, prepare: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()) -> None:
        if workers < 0:
            raise WorkerError(f"workers: got {workers}, expected 0 (this process) or more")
        self.workers = workers
        self._executor: ProcessPoolExecutor | None = None
        if workers:
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(workers, context, _start, (prepare, arguments))
        elif prepare is not None:
            prepare(*arguments)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def map(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Yield `function(job)` for each job, in order. Raises what the function raised, naming the job unless it is a
        `VLAError`; a worker that died (killed, out of memory) raises `WorkerError`."""
        if self._executor is None:
            yield from (function(job) for job in jobs)
            return
        waiting: deque[tuple[Job, Future[Result]]] = deque()
        iterator = iter(jobs)
        try:
            while True:
                while len(waiting) < self.workers * JOBS_AHEAD and (job := next(iterator, None)) is not None:
                    waiting.append((job, self._executor.submit(function, job)))
                if not waiting:
                    return
                job, future = waiting.popleft()
                try:
                    yield future.result()
                except (VLAError, BrokenProcessPool, GeneratorExit):
                    raise
                except Exception as error:  # of any kind
                    error.add_note(f"in a worker process, on {job}")
                    raise
        except BrokenProcessPool as error:
            raise WorkerError(
                "a worker process died without an error message; if the machine ran out of memory, use fewer --workers"
            ) from error
        finally:
            for _, future in waiting:
                future.cancel()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


def _start(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """First call in a worker. A parent that is killed cannot stop its workers, which would wait for jobs forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    end_with(parent.pid)
    if prepare is not None:
        prepare(*arguments)


def end_with(process: int) -> None:
    """End this process within seconds of the end of another one on this machine."""

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(process, 0)
                time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
