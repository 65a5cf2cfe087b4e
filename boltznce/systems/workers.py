"""Worker processes that compute batches in parallel, cannot be waited for in vain and never outlive their parent."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Any

from boltznce.errors import UserError

__all__ = ["WORKERS", "WorkerPool", "available_cores"]

WORKER = Path(__file__).with_name("worker.py")
WORKERS = os.name == "posix"  # whether there are any: Windows hands no socket to a process
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
POLL_SECONDS = 1.0


class WorkerPool:
    """Processes that each hold one ``factory()`` and apply it to batches.

    They are Python processes of their own (neither a fork nor an import of the user's script), started when first
    needed, with one thread each. They end with ``close``, with the pool's garbage collection and with this process,
    SIGKILL included. Pickling drops them; a forked child starts its own. Threads take turns. Windows has none
    (`WORKERS`).

    Args:
        factory: picklable, importable without torch where start-up time matters; called once in every worker, it gives
            a function.
        n_workers: processes at most; default one a core that this process may use.
    """

    def __init__(self, factory: Callable[[], Callable[[Any], Any]], n_workers: int | None = None):
        if n_workers is not None and n_workers < 1:
            raise UserError(f"n_workers must be 1 or more, or null for one a core, not {n_workers}.")
        self.factory = factory
        self._requested = n_workers
        self._own()

    @property
    def n_workers(self) -> int:
        return self._requested or available_cores()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers started so far."""
        return [worker.process.pid for worker in self._workers]

    def map(self, batches: Iterable[Any]) -> list[Any]:
        """The function of every batch, in the order of the batches; batches and results are pickled.

        An exception in a worker is raised here with its own type and message (a RuntimeError with both where it cannot
        be pickled); RuntimeError if a worker dies. After either, and after Ctrl-C, all workers are ended, and the next
        call starts new ones.
        """
        if self._pid != os.getpid():
            self._own()  # in a fork: the workers belong to the parent
        with self._lock:
            try:
                return self._map(batches)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the workers, also in the middle of a computation; ``map`` starts new ones."""
        _end(self._workers, self._pid)

    def _map(self, batches: Iterable[Any]) -> list[Any]:
        waiting = deque(enumerate(batches))
        results = [None] * len(waiting)
        idle = list(self._workers)
        busy: dict[Any, tuple[_Worker, int]] = {}
        while waiting or busy:
            while waiting and (idle or len(self._workers) < self.n_workers):
                if not idle:
                    idle.append(self._start())
                index, batch = waiting.popleft()
                worker = idle.pop()
                worker.send(batch)
                busy[worker.connection] = worker, index
            for connection in wait(list(busy), timeout=POLL_SECONDS):
                worker, index = busy.pop(connection)
                results[index] = worker.receive()
                idle.append(worker)
            for worker, _ in busy.values():
                worker.check()
        return results

    def _start(self) -> "_Worker":
        worker = _Worker()
        self._workers.append(worker)
        worker.send(self.factory)
        return worker

    def _own(self) -> None:
        """Begin without workers, as the property of this process."""
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._workers: list[_Worker] = []
        weakref.finalize(self, _end, self._workers, self._pid)  # runs at interpreter exit too

    def __reduce__(self) -> tuple:
        return WorkerPool, (self.factory, self._requested)


class _Worker:
    """One process and the socket to it, whose other end nobody inherits, so that death of either side is an EOF."""

    def __init__(self):
        self.connection, theirs = Pipe()
        package = str(WORKER.parents[2])
        path = os.pathsep.join(dict.fromkeys([*map(os.path.abspath, sys.path), package]))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-X", "faulthandler", str(WORKER), str(os.getpid())],
                stdin=theirs.fileno(),
                env={**os.environ, **ONE_THREAD, "PYTHONPATH": path},
                process_group=0,  # Ctrl-C reaches the parent only, which then ends the workers
            )

    def send(self, message: Any) -> None:
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        try:
            self.connection.send_bytes(data)
        except OSError:
            raise self._death() from None

    def receive(self) -> Any:
        try:
            data = self.connection.recv_bytes()
        except (EOFError, OSError):
            raise self._death() from None
        succeeded, value = pickle.loads(data)
        if not succeeded:
            raise value
        return value

    def check(self) -> None:
        """Raise RuntimeError if the process has died without an answer, even where its socket has been forked."""
        if self.process.poll() is not None and not self.connection.poll():
            raise self._death()

    def _death(self) -> RuntimeError:
        try:
            code = self.process.wait(timeout=10)  # the socket closes just before the process can be reaped
        except subprocess.TimeoutExpired:
            return RuntimeError(f"Worker process {self.process.pid} no longer answers.")
        how = f"was ended by {_signal_name(-code)}" if code < 0 else "ended"
        memory = "; out of memory is the usual cause" if code == -getattr(signal, "SIGKILL", 9) else ""
        return RuntimeError(f"Worker process {self.process.pid} {how} (exit code {code}) before it was done{memory}.")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _end(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:
        return
    ended = list(workers)
    workers.clear()
    for worker in ended:
        worker.process.kill()
    for worker in ended:
        worker.process.wait()
        worker.connection.close()
