"""Two processes on one folder: one does the work, the other takes what is there or says in one sentence why not."""

import os
import time

import numpy as np
import pytest
from forks import BOLTZNCE, METADYNAMICS, SIMULATION, TABG, leftovers

import boltznce as bz
from boltznce.data.dataset import Dataset
from boltznce.errors import UserError
from boltznce.folders import hold

PAIRS = int(os.environ.get("PAIRS", "10"))
FAST = [*TABG, "evaluation.n_samples=100"]


@pytest.fixture(scope="module")
def finished(forks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    child = forks.run("train", *TABG, "hydra.run.dir=run", cwd=folder)
    assert child.status == 0, child.output[-2000:]
    return folder / "run"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["run", "samples", "dataset", "free_energy", "simulation"])
def test_pairs(forks, finished, tmp_path, kind):
    for k in range(PAIRS):
        folder = tmp_path / str(k)
        folder.mkdir()
        commands = {
            "run": ["train", *FAST, "hydra.run.dir=run"],
            "samples": ["sample", f"run={finished}", "n_samples=20000", "batch_size=500", "output=samples"],
            "dataset": ["train", *BOLTZNCE, "data.n_samples=200000", "flow.fit.steps=1"],
            "free_energy": ["free_energy", f"run={finished}", "output=fe", "n_bootstrap=500"],
            "simulation": ["simulate", *(SIMULATION if k % 5 == 0 else METADYNAMICS)],
        }
        first, second = commands[kind], list(commands[kind])
        if kind == "dataset":
            first, second = [*first, "hydra.run.dir=one"], [*second, "hydra.run.dir=two"]
        pair = [forks.start(*first, cwd=folder)]
        time.sleep(0.0 if k % 2 else 0.3)
        pair.append(forks.start(*second, cwd=folder))
        for child in pair:
            child.wait()
        outputs = [child.output[-1500:] for child in pair]
        assert 0 in [child.status for child in pair], outputs
        for child in pair:
            assert child.status == 0 or (child.status == 2 and len(child.told) == 1), outputs
            if child.status:
                assert str(folder / {"run": "run", "samples": "samples", "free_energy": "fe"}.get(kind, "")) in (
                    child.told[0].replace(" samples holds", f" {folder / 'samples'} holds")
                )
        assert kind not in ("dataset", "simulation") or [child.status for child in pair] == [0, 0], outputs
        assert leftovers(folder) == []
        _check(kind, folder)


def _check(kind, folder):
    """The result is whole; digests are checked by what loads it."""
    if kind == "run":
        assert "free_energy" in bz.load_run(folder / "run").metrics
    elif kind == "samples":
        samples = bz.WeightedSamples.load(folder / "samples")
        assert len(samples) == 20000
        assert np.abs(samples.positions).max(axis=(1, 2)).min() > 0
    elif kind == "free_energy":
        assert (folder / "fe" / "report.md").stat().st_size > 100
    else:
        data = Dataset.load(next((folder / "data").glob("*/meta.yaml")).parent)
        assert np.abs(data.positions).max(axis=(1, 2)).min() > 0


def test_one_sentence_for_the_second_and_none_after_a_kill(tmp_path):
    program = (
        f"import sys, time; sys.path.insert(0, {os.getcwd()!r}); from boltznce.folders import hold\n"
        f"lock = hold({str(tmp_path / 'run')!r}); print('held', flush=True); time.sleep(60)"
    )
    import subprocess
    import sys

    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"Another process works in {tmp_path / 'run'}"):
        hold(tmp_path / "run")
    other.kill()
    other.wait()
    held = hold(tmp_path / "run")
    hold(tmp_path / "run").release()  # this process may again, as in a notebook
    assert (tmp_path / "run" / ".lock").exists()
    held.release()
    assert not (tmp_path / "run" / ".lock").exists()
