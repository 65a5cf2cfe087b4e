"""The processes that work on several devices of this machine: started, watched, and ended together.

They are Python processes of their own, ``python -m boltznce.processes CALL PARENT``, with the environment that torchrun
gives to its own: what they do is no other than under torchrun or srun (see `boltznce.ranks`).
"""

import base64
import contextlib
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

from boltznce import ranks
from boltznce.errors import UserError
from boltznce.signals import Stopped, asked_to_stop, deferred, listening, stop
from boltznce.systems.workers import WORKERS, available_cores

__all__ = ["run"]

POLL_SECONDS = 0.2
GRACE_SECONDS = 20.0  # for the others to say what is wrong, when one has ended


def run(n: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call an importable function in ``n`` processes, with arguments that can be pickled, to its end.

    A signal to stop is handed on, and raised here when all have stopped; so is the UserError of the first process.
    Raises RuntimeError where one has ended otherwise.
    """
    if not WORKERS:
        raise UserError(f"devices={n} on Windows needs processes that torchrun has started: set devices=1.")
    call = base64.b64encode(pickle.dumps((function, arguments))).decode()
    ours, theirs = Pipe()
    with ours:
        with theirs:
            port = _free_port()
            started = [_start(call, rank, n, port, theirs) for rank in range(n)]
        try:
            with deferred():
                _wait(started)
            told = _told(ours)
        except KeyboardInterrupt:  # in a notebook
            _signal(started, 2)
            started[0].wait()
            raise
        finally:
            for process in started:
                process.kill()
            for process in started:
                process.wait()
    if isinstance(told, Stopped):
        stop(told.number)
    if told is not None:
        raise told


def _start(call: str, rank: int, n: int, port: int, pipe: Connection) -> subprocess.Popen:
    environment = {
        "OMP_NUM_THREADS": str(max(1, available_cores() // n)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # of warnings of DDP
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(map(os.path.abspath, sys.path))),
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "GROUP_RANK": "0"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    return subprocess.Popen(
        [sys.executable, "-m", "boltznce.processes", call, str(os.getpid())],
        stdin=pipe.fileno() if rank == 0 else subprocess.DEVNULL,
        env=environment,
        process_group=0,  # Ctrl-C reaches this process only, which hands it on
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(started: Sequence[subprocess.Popen]) -> None:
    """Until the first process has ended, or some time after another has ended as it should not."""
    handed_on, deadline = False, float("inf")
    while started[0].poll() is None and time.monotonic() < deadline:
        if not handed_on and (number := asked_to_stop()):
            handed_on = True
            _signal(started, number)
        if any(process.poll() for process in started[1:]):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(POLL_SECONDS)


def _signal(started: Sequence[subprocess.Popen], number: int) -> None:
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def _told(pipe: Connection) -> BaseException | None:
    try:
        return pickle.loads(pipe.recv_bytes()) if pipe.poll() else _nothing_told()
    except EOFError:
        return _nothing_told()


def _nothing_told() -> RuntimeError:
    return RuntimeError("A process of this run has ended before its time: what it says stands above.")


# ---- in each of them ------------------------------------------------------------------------------------------------


def _main(call: str, parent: str) -> None:
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    outcome: BaseException | None = None
    with listening():
        try:
            function, arguments = pickle.loads(base64.b64decode(call))
            function(*arguments)
        except (Stopped, UserError) as error:
            outcome = error
    if ranks.is_first():
        with Connection(os.dup(0)) as pipe:
            pipe.send_bytes(pickle.dumps(outcome))
    sys.stdout.flush()
    os._exit(0 if outcome is None else 1)  # what else there is to be torn down waits for the others


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    _main(*sys.argv[1:])
