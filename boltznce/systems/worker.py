"""A worker process of ``workers.WorkerPool``: ``python worker.py PARENT_PID``, its standard input a socket.

The first message is a pickled factory, called once; every later one a pickled argument of what it made, answered by
(True, result) or (False, exception). The process ends with its parent, however that ends.

Run as a file, not with ``-m``: importing ``boltznce`` brings torch, seconds and hundreds of MB.
"""

import os
import pickle
import queue
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

POLL_SECONDS = 1.0


def main(parent: int) -> None:
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    connection = Connection(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a library prints must not mix with what the parent prints
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, messages), daemon=True).start()

    # Submodules import as ever, but without running boltznce/__init__.py.
    package = types.ModuleType("boltznce")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["boltznce"] = package
    from boltznce.signals import ignore

    ignore()
    function = _made_by(messages.get())
    while True:
        connection.send_bytes(_answer(function, messages.get()))


def _end_with_parent(parent: int) -> None:
    """For a parent that has gone while a fork of it still holds the socket."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(0)


def _receive(connection: Connection, messages: "queue.SimpleQueue[bytes]") -> None:
    """Read ahead in a thread of its own, so that the end of the parent is noticed during a computation too."""
    try:
        while True:
            messages.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


def _made_by(message: bytes) -> Callable[[Any], Any]:
    """What the factory makes; if that fails, a function that raises the reason at every call."""
    try:
        return pickle.loads(message)()
    except Exception as error:
        reason = error

    def function(_: Any) -> Any:
        raise reason

    return function


def _answer(function: Callable[[Any], Any], message: bytes) -> bytes:
    try:
        return pickle.dumps((True, function(pickle.loads(message))), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return pickle.dumps((False, _portable(error)), pickle.HIGHEST_PROTOCOL)


def _portable(error: Exception) -> Exception:
    """The exception with the worker's traceback as a note; a RuntimeError with its text if not picklable."""
    note = "Raised in a worker process:\n" + "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(note)
    return copy


if __name__ == "__main__":
    main(int(sys.argv[1]))
