"""Workers: results in order, errors that arrive, and no process that outlives its parent."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from actor import actor, echo, failing

from boltznce.errors import UserError
from boltznce.systems.workers import WorkerPool

ROOT = Path(__file__).parents[1]
WITHIN = 30.0  # seconds on a busy machine


def alive(pid):
    """Whether a process runs; a zombie, of which only the exit code is left, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(pids):
    deadline = time.monotonic() + WITHIN
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.fixture
def pool():
    pool = WorkerPool(actor, 2)
    yield pool
    pool.close()


def test_results_come_in_the_order_of_the_batches(pool):
    doubled, pids, threads = zip(*pool.map([("double", n) for n in range(12)]), strict=True)
    assert list(doubled) == list(range(0, 24, 2))
    assert set(pids) == set(pool.pids)
    assert len(pool.pids) == 2
    assert os.getpid() not in pids
    assert set(threads) == {"1"}
    assert pool.map([]) == []


def test_workers_are_kept_between_calls_and_started_only_as_needed(pool):
    assert pool.pids == []
    pool.map([("sleep", 0)])
    first = pool.pids
    assert len(first) == 1
    pool.map([("sleep", 0)] * 3)
    assert pool.pids[:1] == first


def test_large_batches_both_ways():
    big = np.arange(3_000_000.0)
    (result,) = WorkerPool(echo, 1).map([big])
    np.testing.assert_array_equal(result, big)


@pytest.mark.parametrize(
    ("code", "task", "message"),
    [
        (-signal.SIGSEGV, ("signal", signal.SIGSEGV), r"SIGSEGV \(exit code -11\)"),
        (-signal.SIGKILL, ("signal", signal.SIGKILL), r"SIGKILL \(exit code -9\).*memory"),
        (7, ("exit", 7), r"exit code 7"),
    ],
)
def test_death_of_a_worker_is_an_error_at_once(pool, code, task, message):
    pool.map([("sleep", 0)] * 2)
    pids = pool.pids
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"Worker process \d+ .*{message}"):
        pool.map([("sleep", 60), task, ("sleep", 60)])
    assert time.monotonic() - start < WITHIN
    assert all_end(pids)
    assert pool.pids == []
    assert pool.map([("double", 2)])[0][0] == 4  # with new workers


def test_death_of_an_idle_worker_is_noticed(pool):
    pool.map([("sleep", 0)])
    os.kill(pool.pids[0], signal.SIGKILL)
    assert all_end(pool.pids)
    with pytest.raises(RuntimeError, match="SIGKILL"):
        pool.map([("sleep", 0)])


def test_exceptions_travel(pool):
    with pytest.raises(UserError, match="a mistake in the input") as caught:
        pool.map([("sleep", 0), ("raise", UserError("a mistake in the input"))])
    assert "in act" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Unpicklable: held by a lock"):
        pool.map([("raise unpicklable", "a lock")])
    with pytest.raises(Exception, match="pickle"):
        pool.map([("return unpicklable", 0)])
    with pytest.raises(UserError, match="no such method"):
        WorkerPool(failing, 1).map([1, 2])


def test_what_a_worker_prints_does_not_mix_with_results(pool, capfd):
    assert pool.map([("print", "noise")]) == [None]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "noise" in captured.err


def test_close_garbage_collection_and_pickling(pool):
    pool.map([("sleep", 0)] * 2)
    pids, copy = pool.pids, pickle.loads(pickle.dumps(pool))
    assert copy.pids == []
    assert copy.n_workers == 2
    pool.close()
    assert all_end(pids)
    copy.map([("sleep", 0)])
    pids = copy.pids
    del copy
    gc.collect()
    assert all_end(pids)


def test_a_fork_starts_its_own(pool):
    pool.map([("sleep", 0)])
    pids = pool.pids
    child = os.fork()
    if child == 0:
        result = 1
        try:
            (answer,) = pool.map([("double", 4)])
            result = 0 if answer[0] == 8 and answer[1] not in pids else 2
            pool.close()
        finally:
            os._exit(result)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(map(alive, pids))
    pool.map([("sleep", 0)])
    assert pool.pids == pids


def test_number_of_workers_is_checked():
    assert WorkerPool(actor).n_workers == len(os.sched_getaffinity(0))
    with pytest.raises(UserError, match="n_workers"):
        WorkerPool(actor, 0)


# A script without an `if __name__` guard. The stand-in for the package spares the seconds that its import takes.
PARENT = """
import os, sys, threading, time, types
package = types.ModuleType("boltznce")
package.__path__ = [os.path.join(sys.argv[1], "boltznce")]
sys.modules["boltznce"] = package
sys.path.insert(0, os.path.join(sys.argv[1], "tests"))
from actor import actor
from boltznce.systems.workers import WorkerPool

pool, other = WorkerPool(actor, 2), WorkerPool(actor, 1)
pool.map([("sleep", 0.1)] * 2)
other.map([("sleep", 0)])
starting = WorkerPool(actor, 1)
if sys.argv[2] == "fork" and os.fork() == 0:
    time.sleep(40)  # holds every socket of the parent
    os._exit(0)
threading.Thread(target=lambda: other.map([("spin", 60)]), daemon=True).start()
if sys.argv[2] != "exit":
    threading.Thread(target=lambda: starting.map([("sleep", 60)]), daemon=True).start()
    while not starting.pids:
        time.sleep(0.01)
print(*pool.pids, *other.pids, *starting.pids, flush=True)
if sys.argv[2] != "exit":
    pool.map([("sleep", 60)])  # the second worker idles
"""


@pytest.mark.parametrize("end", ["kill", "fork", "interrupt", "exit"])
def test_no_worker_outlives_its_parent(tmp_path, end):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(ROOT), end]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == (3 if end == "exit" else 4), parent.communicate()[1]
        if end == "interrupt":
            time.sleep(0.3)
            os.killpg(parent.pid, signal.SIGINT)  # as a terminal's Ctrl-C
        elif end != "exit":
            assert all(map(alive, pids))
            parent.send_signal(signal.SIGKILL)
        parent.wait(timeout=WITHIN)
        assert all_end(pids), [pid for pid in pids if alive(pid)]
        assert parent.returncode == {"exit": 0, "interrupt": -signal.SIGINT}.get(end, -signal.SIGKILL)
    finally:
        os.killpg(parent.pid, signal.SIGKILL) if end == "fork" or parent.poll() is None else None
        parent.communicate()
