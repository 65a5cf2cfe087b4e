"""CPU time is that of the work, in this process or another, and not that of waiting."""

import subprocess
import sys
import time

import pytest
import torch

from boltznce.clock import clock_of, cpu_seconds

BUSY = "import time\nwhile time.process_time() < 0.4: pass\n"


def test_waiting_costs_nothing():
    begun = cpu_seconds()
    time.sleep(0.3)
    assert cpu_seconds() - begun < 0.1
    assert clock_of("cpu") is cpu_seconds
    assert clock_of(torch.device("cuda:1")) is time.perf_counter


def test_children_are_counted():
    begun = cpu_seconds()
    subprocess.run([sys.executable, "-c", BUSY], check=True)
    assert 0.3 < cpu_seconds() - begun < 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="the time of a running process is read from /proc")
def test_children_that_still_run_are_counted():
    begun = cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", f"{BUSY}print(flush=True)\ninput()"], stdin=-1, stdout=-1) as child:
        child.stdout.readline()
        assert 0.3 < cpu_seconds() - begun < 1.0
        child.communicate(b"\n")
    assert 0.3 < cpu_seconds() - begun < 1.0
