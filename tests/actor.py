"""What runs in the workers of test_workers.py; apart from it, as a worker imports the file that its factory is from."""

import os
import time

from boltznce.errors import UserError


class Unpicklable(Exception):
    def __init__(self, holder):
        super().__init__(f"held by {holder}")
        self.handle = open(os.devnull)  # noqa: SIM115


def actor():
    """A function that does as it is told."""

    def act(task):
        what, value = task
        match what:
            case "double":
                time.sleep(0.05 * (value % 3))  # so that they end in another order
                return 2 * value, os.getpid(), os.environ["OMP_NUM_THREADS"]
            case "sleep":
                time.sleep(value)
            case "spin":
                end = time.monotonic() + value
                while time.monotonic() < end:
                    pass
            case "print":
                print(value, flush=True)
            case "raise":
                raise value
            case "raise unpicklable":
                raise Unpicklable(value)
            case "return unpicklable":
                return lambda: value
            case "signal":
                os.kill(os.getpid(), value)
            case "exit":
                os._exit(value)

    return act


def echo():
    return lambda batch: batch


def failing():
    raise UserError("no such method")
