"""Work beside each other: threads, bounded, that no fork shares."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: requests in flight for one storage
MAX_REQUESTS = 32
#: jobs that wait for a thread, before whoever starts another one waits too
MAX_WAITING = 256
#: bytes that the jobs started have in their hands; a larger value goes alone
MAX_BYTES = 64 * 2**20


class PerProcess(Generic[T]):
    """Something that threads share and a forked process does not.

    :param make: makes it, on the first use in a process
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[int, T] = {}
        # Another thread may hold a lock while this process forks.
        self._locks: dict[int, threading.Lock] = {}

    def get(self) -> T:
        pid = os.getpid()
        if pid not in self._made:
            with self._locks.setdefault(pid, threading.Lock()):
                if pid not in self._made:
                    self._made[pid] = self._make()
        return self._made[pid]


class Engine:
    """Threads that make requests, and how much they may have in their hands.

    A job must not wait for another one: all threads might.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._executor = ThreadPoolExecutor(
            MAX_REQUESTS, "s3storage", lambda: setattr(self._local, "is_job", True)
        )
        self._room = threading.Condition()
        self._jobs = 0
        self._bytes = 0

    def start(self, size: int, function: Callable[..., T], *args: Any) -> Future[T]:
        """Call a function in the background, once there is room.

        :param size: bytes that the job keeps in memory
        """
        with self._room:
            self._room.wait_for(lambda: self._has_room(size))
            self._jobs += 1
            self._bytes += size
        try:
            job = self._executor.submit(function, *args)
        except BaseException:
            self._leave(size)
            raise
        job.add_done_callback(lambda _: self._leave(size))
        return job

    def start_at_once(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Call a function in the background; whoever asks bounds what it takes."""
        return self._executor.submit(function, *args)

    def map(self, function: Callable[[Any], T], items: Iterable) -> list[T]:
        """Call a function for each item; the results, in order.

        When one fails, its error is raised after all have stopped. In a job, which
        must not wait for others, the calls are made one after the other.
        """
        if getattr(self._local, "is_job", False):
            return [function(item) for item in items]
        results: list[T] = []
        jobs: deque[Future[T]] = deque()
        try:
            for item in items:
                if len(jobs) == MAX_REQUESTS:
                    results.append(jobs.popleft().result())
                jobs.append(self._executor.submit(function, item))
            results.extend(job.result() for job in jobs)
        finally:
            self.stop(jobs)
        return results

    def stop(self, jobs: Iterable[Future]) -> None:
        """Cancel the jobs that have not begun, wait for those that have."""
        wait([job for job in jobs if not job.cancel()])

    def _has_room(self, size: int) -> bool:
        if self._jobs >= MAX_REQUESTS + MAX_WAITING:
            return False
        return not self._bytes or self._bytes + size <= MAX_BYTES

    def _leave(self, size: int) -> None:
        with self._room:
            self._jobs -= 1
            self._bytes -= size
            self._room.notify_all()
