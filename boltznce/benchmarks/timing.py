"""How long a call takes, with its spread."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from boltznce.clock import clock_of

__all__ = ["Timing", "time_call", "time_once"]

T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quartiles over ``repeats`` calls, after one that does not count, by the wall clock.

    And their mean in ``work``: CPU time of all threads and processes, whatever else the machine does, by which things
    are compared; wall clock where there is a GPU.
    """

    median: float
    low: float
    high: float
    work: float
    repeats: int

    def per(self, n: int) -> dict[str, float]:
        """Microseconds for each of ``n`` things done in a call."""
        seconds = {"median": self.median, "low": self.low, "high": self.high, "work": self.work}
        return {name: 1e6 * value / n for name, value in seconds.items()} | {"repeats": self.repeats}


def time_call(call: Callable[[], object], min_seconds: float = 1.0, min_repeats: int = 3) -> Timing:
    """Repeat ``call`` for at least ``min_seconds`` and ``min_repeats`` times; the first call does not count."""
    call()
    _synchronize()
    seconds, clock = [], clock_of("cuda" if torch.cuda.is_available() else "cpu")
    begun, before = time.perf_counter(), clock()
    while len(seconds) < min_repeats or time.perf_counter() - begun < min_seconds:
        start = time.perf_counter()
        call()
        _synchronize()
        seconds.append(time.perf_counter() - start)
    work = (clock() - before) / len(seconds)
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return Timing(float(median), float(low), float(high), work, len(seconds))


def time_once(call: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of a call and its seconds (see `boltznce.clock`): of what takes long and was warmed up before."""
    clock = clock_of(device)
    _synchronize()
    begun = clock()
    result = call()
    _synchronize()
    return result, clock() - begun


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
