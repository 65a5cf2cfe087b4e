"""Kills at random moments of every script: nothing is lost, nothing left over, and the result is that of no kill.

``KILLS=20 pytest -m slow tests/test_kills.py`` for fewer of them.
"""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from forks import BOLTZNCE, METADYNAMICS, SIMULATION, TABG, leftovers
from safetensors.torch import load_file

KILLS = int(os.environ.get("KILLS", "100"))
AFTER = [("sample", ["run=run", "n_samples=300", "batch_size=50"]), ("free_energy", ["run=run", "n_bootstrap=20"])]
CHAINS = {  # what is done one after another, and its share of the kills
    "tabg": ([("train", [*TABG, "hydra.run.dir=run"]), *AFTER], 0.45),
    "boltznce": ([("train", [*BOLTZNCE, "hydra.run.dir=run"]), *AFTER], 0.45),
    "simulation": ([("simulate", SIMULATION)], 0.05),
    "metadynamics": ([("simulate", METADYNAMICS)], 0.05),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CHAINS)
def test_kills_lose_nothing(forks, tmp_path, name):
    chain, share = CHAINS[name]
    whole, rng, left = tmp_path / "whole", random.Random(name), round(share * KILLS)
    whole.mkdir()
    seconds = []
    for script, arguments in chain:
        begun = time.monotonic()
        child = forks.run(script, *arguments, cwd=whole)
        assert child.status == 0, child.output[-2000:]
        seconds.append(time.monotonic() - begun)
    rounds = 0
    while left:
        rounds += 1
        folder = tmp_path / f"killed_{rounds}"
        folder.mkdir()
        for (script, arguments), length in zip(chain, seconds, strict=True):
            for _ in range(8):  # kills of one command
                child = forks.start(script, *_resumed(folder, script, arguments), cwd=folder)
                deadline = time.monotonic() + rng.uniform(0.0, length)
                while time.monotonic() < deadline and child.poll() is None:
                    time.sleep(0.01)
                if left and child.poll() is None:
                    child.kill()
                    left -= 1
                if child.wait() != -signal.SIGKILL:
                    break
            else:
                child = forks.run(script, *_resumed(folder, script, arguments), cwd=folder)
            held = script == "sample" and "holds samples already" in child.output  # killed after its end
            assert child.status == 0 or held, child.output[-2000:]
        assert leftovers(folder) == []
        assert _differences(folder, whole) == []
        shutil.rmtree(folder)


def _resumed(folder, script, arguments):
    begun = script == "train" and (folder / "run" / "config.yaml").exists()
    return ["resume=run"] if begun else arguments


def _differences(folder, whole):
    """Names of results that are not the same to the bit."""
    paths = [path for path in whole.rglob("*") if path.suffix in (".safetensors", ".npy") and "step_" not in str(path)]
    assert paths
    names = [path.relative_to(whole) for path in paths]
    return [str(name) for name in names if not (folder / name).exists() or not _same(folder / name, whole / name)]


def _same(one, other):
    if one.suffix == ".npy":
        return np.array_equal(np.load(one), np.load(other), equal_nan=True)
    one, other = load_file(one), load_file(other)
    return all((one[key] == other[key]).all() for key in other)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_a_signal_in_each_stage_is_gone_on_from_there(forks, tmp_path, number, status):
    child = forks.run("train", *BOLTZNCE, "hydra.run.dir=run", cwd=(whole := _made(tmp_path / "whole")))
    assert child.status == 0, child.output[-2000:]
    stages = list(json.loads((whole / "run" / "run.json").read_text())["stages"])
    folder, stopped = _made(tmp_path / "stopped"), []
    for stage in stages:
        child = forks.start("train", *_resumed(folder, "train", [*BOLTZNCE, "hydra.run.dir=run"]), cwd=folder)
        log = folder / "run" / f"{stage}.csv"
        while child.poll() is None and not (_begun(folder, stage) and (stage not in ("flow", "ebm") or _rows(log) > 3)):
            time.sleep(0.002)
        child.kill(getattr(signal, number))
        assert child.wait() in (status, 0), child.output[-2000:]  # 0: the stage was the last, and at its end
        if child.status:
            stopped.append(stage)
            assert len(child.told) == 1, child.output[-2000:]
            assert "resume=" in child.told[0]
            if stage in ("flow", "ebm") and not (folder / "run" / "checkpoints" / f"{stage}.safetensors").exists():
                newest = max(path.name for path in (folder / "run" / "checkpoints" / stage).iterdir())
                assert int(newest.removeprefix("step_")) == _rows(log)
    assert {"flow", "ebm"} <= set(stopped)
    child = forks.run("train", "resume=run", cwd=folder)
    assert child.status == 0, child.output[-2000:]
    assert leftovers(folder) == []
    assert _differences(folder, whole) == []


def _made(folder):
    folder.mkdir()
    return folder


def _begun(folder, stage):
    path = folder / "run" / "run.json"
    return path.exists() and stage in json.loads(path.read_text())["stages"]


def _rows(log):
    """Steps in a log of every step."""
    return max(0, log.read_text().count("\n") - 1) if log.exists() else 0
