"""What a piece of work costs: CPU time, whatever else the machine does meanwhile, or wall clock of a GPU."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["clock_of", "cpu_seconds", "stopwatch"]


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds so far: `cpu_seconds`, or wall clock where the device is a GPU (wait for it before reading)."""
    return cpu_seconds if torch.device(device).type == "cpu" else time.perf_counter


def stopwatch(device: torch.device | str) -> Callable[[], float]:
    """Seconds of `clock_of` from now on."""
    clock = clock_of(torch.device(device))
    begun = clock()
    return lambda: clock() - begun


def cpu_seconds() -> float:
    """CPU seconds of this process so far, all its threads together, and of its child processes.

    Those of children that still run, such as workers of an energy, are known on Linux alone.
    """
    times = os.times()
    return time.process_time() + times.children_user + times.children_system + _of_living_children()


def _of_living_children() -> float:
    seconds = 0.0
    for listed in Path("/proc/self/task").glob("*/children"):
        try:
            for child in listed.read_text(encoding="ascii").split():
                fields = (
                    Path(f"/proc/{child}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                )
                seconds += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # with its own children
        except OSError:  # it has just ended: a parent that waits for it has its time
            continue
    return seconds
