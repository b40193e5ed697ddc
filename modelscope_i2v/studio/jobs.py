"""The queue of a page: one job at a time, one place for each page, and no more places than there are."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Callable, Iterator

from ..errors import I2VError
from .models import release_memory
from .watching import Watched

#: Seconds between two looks at a job.
_INTERVAL = 0.2


class NoPlaceError(I2VError):
    """A job that is refused: its page has one already, or all places are taken."""


@dataclass(frozen=True)
class Job:
    """A job in the queue, or running."""

    page: str
    progress: Watched
    future: Future

    def stop(self) -> None:
        """End the job, within a step if it runs, and at once if it waits."""
        self.progress.stop()
        self.future.cancel()


class Jobs:
    """Jobs in the order of their coming, each run by itself.

    Args:
        places: how many jobs may wait or run. A page has one place at most, so none waits for another's many.
    """

    def __init__(self, places: int):
        self._places = places
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="studio")
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def enter(self, page: str, work: Callable[[Watched], Any], videos: int = 1) -> Job:
        """Put work into the queue.

        Raises:
            NoPlaceError: if the page has a job already, or all places are taken.
        """
        with self._lock:
            if page in self._jobs:
                raise NoPlaceError("busy")
            if len(self._jobs) >= self._places:
                raise NoPlaceError("full")
            progress = Watched(videos)
            job = Job(page, progress, self._executor.submit(_run, work, progress))
            self._jobs[page] = job
        job.future.add_done_callback(lambda _: self._leave(job))
        return job

    def stop(self, page: str) -> None:
        """Stop a page's job, if it has one."""
        with self._lock:
            job = self._jobs.get(page)
        if job is not None:
            job.stop()

    def ahead(self, job: Job) -> int:
        """Return how many jobs come before one."""
        with self._lock:
            pages = list(self._jobs)
        return pages.index(job.page) if job.page in pages else 0

    def follow(self, job: Job) -> Iterator[int]:
        """Yield every moment, until the job is done, how many come before it.

        A caller that closes the iterator stops the job.
        """
        try:
            while not job.future.done():
                yield self.ahead(job)
                wait([job.future], _INTERVAL)
        finally:
            job.stop()

    def close(self) -> None:
        """Stop all jobs and end the thread."""
        for page in list(self._jobs):
            self.stop(page)
        self._executor.shutdown(wait=True)

    def _leave(self, job: Job) -> None:
        with self._lock:
            if self._jobs.get(job.page) is job:
                del self._jobs[job.page]


def _run(work: Callable[[Watched], Any], progress: Watched) -> Any:
    progress.now = "starting"
    try:
        return work(progress)
    finally:
        progress.estimate = None
        release_memory()
