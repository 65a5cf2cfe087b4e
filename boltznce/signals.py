"""Signals that ask a command to stop: it keeps what is done, says how to go on, and exits with 128 + the signal.

Only commands listen (`listening`); in a notebook Ctrl-C is a KeyboardInterrupt, and nothing here has a say.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

__all__ = ["Stopped", "asked_to_stop", "deferred", "ignore", "listening", "stop", "stop_if_asked"]

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # batch systems send SIGTERM or SIGUSR1; Windows lacks two of them
_asked: int | None = None  # the first signal that came
_deferring = 0


class Stopped(KeyboardInterrupt):
    """A signal has asked to stop; like Ctrl-C it is no Exception, so that nothing handles it on the way."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.how_to_go_on = "run the same command again"

    def __reduce__(self) -> tuple:
        return Stopped, (self.number,)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Inside, a signal raises `Stopped` in the main thread, at once or where `deferred` ends; a second Ctrl-C kills.

    Signals that are ignored (as nohup does) stay so; the handlers of before are put back at the end.
    """
    global _asked
    _asked, before = None, {}
    if threading.current_thread() is threading.main_thread():
        for number in _numbers():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal interrupts nothing: the block asks for itself (`asked_to_stop`)."""
    global _deferring
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1


def asked_to_stop() -> int:
    """The signal that has come; 0 for none."""
    return _asked or 0


def stop_if_asked() -> None:
    """Raise `Stopped` if a signal has come that could not interrupt."""
    if _asked is not None:
        stop(_asked)


def stop(number: int) -> NoReturn:
    """Raise `Stopped`, as if the signal had come here."""
    raise Stopped(number)


def ignore() -> None:
    """For worker processes, which get the signals of their group too: the parent ends them, and they end with it."""
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


def _handle(number: int, frame: object) -> None:
    global _asked
    if _asked is not None:
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    _asked = number
    if not _deferring:
        raise Stopped(number)
