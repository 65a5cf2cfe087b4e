"""The run folder: stages, time, config, and folders that are not what they should be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from boltznce.errors import UserError
from boltznce.run_folder import RunFolder, peak_memory

CONFIG = OmegaConf.create({"seed": 1, "size": 4, "double": "${size}"})


def test_stages_are_booked_and_marked(tmp_path):
    run = RunFolder.create(tmp_path / "run", CONFIG, "aldp")
    assert not run.stage_done("flow")
    with run.stage("flow") as info:
        assert not run.stage_done("flow")
        time.sleep(0.05)
        info["samples"] = 7
    again = RunFolder.open(tmp_path / "run")
    assert again.stage_done("flow")
    assert not again.stage_done("ebm")
    record = again.stages["flow"]
    assert record["samples"] == 7
    assert 0.05 <= record["seconds"] < 5
    assert 0 <= record["cpu_seconds"] < 5
    assert 10 < record["peak_memory"] <= peak_memory()
    assert again.config == {"seed": 1, "size": 4, "double": 4}
    assert again.system == "aldp"


def test_data_elsewhere_are_needed_until_the_next_stage_is_done(tmp_path):
    run, data = RunFolder.create(tmp_path / "run", CONFIG, "aldp"), tmp_path / "data.npy"
    for name, path in (("data", data), ("flow", run.path / "flow.bin"), ("report", run.path / "report.md")):
        with run.stage(name):
            run.leave(path).write_bytes(b"whole")
    assert all(map(run.stage_done, run.stages))
    data.unlink()
    assert all(map(run.stage_done, run.stages)), "the flow has used them"
    (run.path / "flow.bin").unlink()
    assert [run.stage_done(name) for name in run.stages] == [False, False, True]


def test_failed_stage_keeps_its_time_and_is_not_done(tmp_path):
    run = RunFolder.create(tmp_path, CONFIG, "aldp")

    def fail() -> None:
        with run.stage("flow"):
            time.sleep(0.05)
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail()
    assert not run.stage_done("flow")
    assert run.stages["flow"]["seconds"] >= 0.1


def test_killed_stage_keeps_its_time(tmp_path):
    program = (
        "import time, boltznce.run_folder as r; r.HEARTBEAT = 0.05\n"
        f"with r.RunFolder({str(tmp_path)!r}).stage('flow'): print('in', flush=True); time.sleep(60)"
    )
    run = RunFolder.create(tmp_path, CONFIG, "aldp")
    paths = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    child = subprocess.Popen([sys.executable, "-c", program], env=paths, stdout=subprocess.PIPE)
    child.stdout.readline()
    time.sleep(0.5)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    booked = run.stages["flow"]["seconds"]
    assert 0.2 < booked < 10
    with run.stage("flow"):
        pass
    assert run.stages["flow"]["seconds"] >= booked
    assert run.stage_done("flow")


def test_mark_done_adds_to_what_is_recorded(tmp_path):
    run = RunFolder.create(tmp_path, CONFIG, "aldp")
    with run.stage("data"):
        pass
    seconds = run.stages["data"]["seconds"]
    run.mark_done("data", {"frames": 10})
    assert run.stages["data"]["frames"] == 10
    assert run.stages["data"]["seconds"] == seconds
    run.mark_done("report")
    assert list(run.stages) == ["data", "report"]


def test_going_on_in_a_folder_keeps_the_record_and_takes_what_changes_no_result(tmp_path):
    RunFolder.create(tmp_path, CONFIG, "aldp").mark_done("data")
    more = OmegaConf.create({"threads": 2, "flow": {"fit": {"checkpoint_every": 7}}})
    run = RunFolder.create(tmp_path, OmegaConf.merge(CONFIG, more), "aldp")
    assert run.stage_done("data")
    assert run.config.threads == 2


def test_other_settings_are_refused_where_there_are_results(tmp_path):
    """``seed=7 hydra.run.dir=<finished run>``; with nothing there yet, a mistake may be mended."""
    RunFolder.create(tmp_path, OmegaConf.create({"seed": 2}), "aldp")
    run = RunFolder.create(tmp_path, CONFIG, "aldp")
    assert run.config.seed == 1
    run.mark_done("flow")
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"other settings \(seed: 1, not 7; size: 4, not None.*resume="):
        RunFolder.create(tmp_path, OmegaConf.create({"seed": 7, "double": 4}), "aldp")
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_folder_of_another_system(tmp_path):
    RunFolder.create(tmp_path, CONFIG, "aldp")
    with pytest.raises(UserError, match="another system, 'aldp', not 'AK'"):
        RunFolder.create(tmp_path, CONFIG, "AK")
    assert RunFolder.open(tmp_path).config == CONFIG
    with pytest.raises(UserError, match="another system"):
        RunFolder.open(tmp_path).check_system("AK")


def test_folders_that_are_no_run(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.yaml and no run\.json"):
        RunFolder.open(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"it has no run\.json"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"stages": {}})])
def test_damaged_record(tmp_path, text):
    run = RunFolder.create(tmp_path, CONFIG, "aldp")
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        run.stage_done("flow")


@pytest.mark.parametrize(("format", "message"), [(None, "older version: train it anew"), (99, "has format 99.*update")])
def test_folders_of_other_versions(tmp_path, format, message):
    RunFolder.create(tmp_path, CONFIG, "aldp")
    record = json.loads((tmp_path / "run.json").read_text())
    assert record.pop("format") == 2
    (tmp_path / "run.json").write_text(json.dumps(record | ({"format": format} if format else {})))
    for open_folder in (lambda: RunFolder.open(tmp_path), lambda: RunFolder.create(tmp_path, CONFIG, "aldp")):
        with pytest.raises(UserError, match=message):
            open_folder()


def test_damaged_config(tmp_path):
    run = RunFolder.create(tmp_path, CONFIG, "aldp")
    (tmp_path / "config.yaml").write_bytes(b"seed: [1, \xff")
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        _ = run.config
