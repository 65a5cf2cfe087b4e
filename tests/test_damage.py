"""Every file that something later reads, damaged in every way: told in one sentence, or without effect.

*Without effect* is measured: after the damage the run is finished and drawn from, and weights, samples and metrics are
those of the undamaged one to the bit, times left out. Files that may be damaged without a word are those that nothing
is computed from: the report's text and figures, checkpoints of a training that has ended, a simulation's progress bar
and log, the digits of a loss in a training's log, from which a curve is drawn and nothing else. Where the sentence says
what to delete, that is done, and the run must then end as the undamaged one.
"""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

import boltznce as bz
from boltznce.analysis import plotting
from boltznce.analysis.reweighting import WeightedSamples, WeightedSamplesWriter
from boltznce.checkpoint import load_weights, save_weights
from boltznce.data.dataset import Dataset
from boltznce.data.engine import Job, run_job
from boltznce.errors import UserError
from boltznce.records import read_archive, read_json, read_yaml, sealed
from boltznce.run import RunFolder, train

MUTATIONS = ("deleted", "emptied", "halved", "bit", "late bit", "garbage", "text", "type")
PLANE = ["system=gaussians8", "budget=smoke", "threads=1", "data.n_samples=500"]
PLANE += ["flow.fit={steps: 4, checkpoint_every: 2}", "flow.n_train=200", "flow.n_validation=50"]
PLANE += ["samples={n_train: 60, n_validation: 60, batch_size: 30}", "flow.solver.steps=2"]
PLANE += ["ebm.fit={steps: 4, checkpoint_every: 2}", "ebm.batch_size=32", "flow.batch_size=32"]
PLANE += ["evaluation={n_samples: 60, n_exact: 10, n_correction: 10, batch_size: 30, n_bootstrap: 5, n_torus: 20}"]
PLANE += ["evaluation.n_reference=60"]
LADDER = ["system=double_well", "method=tabg", "budget=smoke", "threads=1", "generator.model.n_pairs=1"]
LADDER += ["hot.fit={steps: 4, checkpoint_every: 2}", "hot.batch_size=32", "annealing.n_steps=2"]
LADDER += ["annealing={fit: {steps: 4, checkpoint_every: 2}, n_draws: 60, n_buffer: 60, batch_size: 32}"]
LADDER += ["annealing.draw_batch_size=30"]
LADDER += ["evaluation={n_samples: 60, n_ladder: 30, n_reference: 60, n_bootstrap: 5, n_torus: 20}"]


def mutate(path: Path, how: str, seed: int = 0) -> None:
    rng, data = np.random.default_rng([seed, *map(ord, path.name)]), path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "halved":
        path.write_bytes(data[: len(data) // 2])
    elif how.endswith("bit"):
        changed, first = bytearray(data), len(data) - 8 if how == "late bit" else 0
        place = int(rng.integers(max(0, first), len(data)))
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
    elif how == "garbage":
        path.write_bytes(rng.bytes(len(data)))
    elif how == "text":
        path.write_text("Sorry, this page was not found.\n")
    else:
        _other_type(path)


def _other_type(path: Path) -> None:
    match path.suffix:
        case ".json":
            path.write_text("[1, 2]")
        case ".yaml":
            path.write_text("3\n")
        case ".npy":
            np.save(path, np.arange(6, dtype=np.int16).reshape(2, 3))
        case ".npz":
            np.savez(path, other=np.zeros(3))
        case ".safetensors":
            save_file({"other": next(iter(load_file(path).values()))}, path)
        case ".csv":
            path.write_text("one,two\n1,2\n")
        case _:
            path.write_bytes(path.read_bytes() * 2)


class Place:
    """A folder that is put back as it was before each damage; it stays the same folder."""

    def __init__(self, folder: Path):
        self.folder, self.whole = folder, folder.with_name(f"{folder.name} whole")
        shutil.rmtree(self.whole, ignore_errors=True)  # that of another test
        shutil.copytree(folder, self.whole)

    def restore(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.whole, self.folder, dirs_exist_ok=True)

    def files(self, *patterns: str) -> list[str]:
        found = {path.relative_to(self.whole).as_posix() for pattern in patterns for path in self.whole.glob(pattern)}
        return sorted(found)


def to_delete(message: str) -> Path | None:
    """What a sentence says to delete."""
    message = message.replace("delete its sha256", "")  # of a change that is meant
    if named := re.search(r"delete (/\S+?),", message):
        return Path(named[1])
    path = re.search(r"(/\S+) is (?:damaged|missing)", message)
    if path is None or "delete" not in message:
        return None
    upper = re.search(r"delete (its folder|the folder|this checkpoint)", message)
    return Path(path[1]).parent if upper else Path(path[1])


def check(place: Place, names: list[str], use, tried: list[tuple[str, str, str]], resume=None) -> None:
    """Damage each of the files in each way, and use the folder; ``use`` returns what must not change.

    ``resume`` is the use of a folder from which something has been deleted, as the sentence said.
    """
    place.restore()
    right, resume = use(), resume or use
    for name in names:
        for how in MUTATIONS:
            place.restore()
            mutate(place.folder / name, how)
            outcome = _outcome(use, right)
            if outcome.startswith("told: "):
                assert "\n" not in outcome, outcome
                gone = to_delete(outcome)
                if gone is not None:
                    shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
                    again = _outcome(resume, right)
                    outcome = f"{outcome} -> {again}" if again != "as before" else f"told, mended: {outcome[6:]}"
            note(tried, name, how, outcome)


def note(tried: list[tuple[str, str, str]], *row: str) -> None:
    tried.append(row)
    if table := os.environ.get("DAMAGE_TABLE"):  # to look at
        with open(table, "a") as handle:
            print(*row, sep=" | ", file=handle)


def _outcome(use, right) -> str:
    try:
        found = use()
    except UserError as error:
        return f"told: {error}"
    except Exception as error:
        return f"TRACEBACK {type(error).__name__}: {error}"
    return "as before" if same(found, right) else "SILENTLY USED"


def same(a, b) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return a == b or (a != a and b != b)


def look_and_finish(folder: Path) -> dict:
    """The same, of a finished run that is drawn from first."""
    run = bz.load_run(folder)
    _ = run.metrics, run.sample(3)
    return finish(folder)


def finish(folder: Path) -> dict:
    """Finish a run; all that came of it but for times."""
    train(RunFolder.open(folder))
    run = bz.load_run(folder)
    weights = {path.stem: read_weights(path) for path in (folder / "checkpoints").glob("*.safetensors")}
    metrics = {key: value for key, value in run.metrics.items() if key not in ("timing", "md", "average")}
    sample, weighted = run.sample(5, seed=3), WeightedSamples.load(folder / "samples" / "weighted")
    drawn = {"drawn": sample.positions, "log_weights": sample.log_weights, "weighted": weighted.positions}
    return json.loads(json.dumps({"metrics": metrics})) | drawn | weights


def read_weights(path: Path) -> dict:
    return {name: tensor.numpy() for name, tensor in load_file(path).items()}


def verdict(tried: list[tuple[str, str, str]], least: int) -> None:
    print(f"{len(tried)} mutations, {sum(each[2] != 'as before' for each in tried)} of them told")
    bad = [each for each in tried if "TRACEBACK" in each[2] or "SILENTLY" in each[2] or "->" in each[2]]
    assert not bad, "\n".join(" | ".join(each) for each in bad)
    assert len(tried) >= least
    assert any(each[2] != "as before" for each in tried)


@pytest.fixture
def no_figures(monkeypatch):
    for name in plotting.__all__:
        if name.startswith("plot_"):
            monkeypatch.setattr(plotting, name, lambda *_, **__: Figure())
    monkeypatch.setattr(plotting, "_plot_surfaces", lambda *_, **__: (Figure(),))
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).write_bytes(b"a figure"))


@pytest.fixture(scope="module")
def plane_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plane")
    bz.train_run(folder / "run", *PLANE, f"data.folder={folder / 'run' / 'data'}")
    return folder / "run"


def unfinish(folder: Path, *stages: str) -> None:
    """As if the run had been killed before these stages ended."""
    record = read_json(folder / "run.json", "")
    for stage in stages:
        del record["stages"][stage]
    (folder / "run.json").write_text(json.dumps(sealed(record)))


@pytest.mark.slow
def test_files_of_a_finished_run_and_its_data(plane_run, tmp_path, no_figures):
    place, tried = Place(plane_run), []
    names = ["config.yaml", "run.json", "metrics.json", "report.md", "flow.csv"]
    names += ["checkpoints/flow.safetensors", "checkpoints/ebm.safetensors", "checkpoints/flow/step_0000004/state.pt"]
    names += ["samples/weighted/meta.yaml", "samples/weighted/positions.npy", "samples/train/energy.npy"]
    names += ["samples/exact_uniform/meta.yaml", "samples/exact_uniform/subset.npy", "samples/exact_frames/subset.npy"]
    names += ["data/meta.yaml", "data/energies.npy"]
    check(place, names, lambda: look_and_finish(plane_run), tried, lambda: finish(plane_run))
    place.restore()
    verdict(tried, least=120)


@pytest.mark.slow
def test_files_of_a_run_killed_in_a_training(plane_run, no_figures):
    whole = Place(plane_run)
    unfinish(plane_run, "ebm", "evaluation", "report")
    for path in (
        "samples/weighted",
        "samples/exact_uniform",
        "samples/exact_weights",
        "samples/exact_frames",
        "checkpoints/ebm/step_0000004",
    ):
        shutil.rmtree(plane_run / path)
    for path in ("checkpoints/ebm.safetensors", "metrics.json", "report.md"):
        (plane_run / path).unlink()
    shutil.rmtree(whole.whole)
    place, tried = Place(plane_run), []
    names = place.files("checkpoints/*.*", "checkpoints/ebm/*/*")
    names += ["run.json", "ebm.csv", "samples/train/meta.yaml", "samples/train/positions.npy"]
    check(place, names, lambda: finish(plane_run), tried)
    verdict(tried, least=60)


@pytest.mark.slow
def test_files_of_a_run_killed_on_its_way_down_the_ladder(tmp_path, no_figures, monkeypatch):
    appended, append = [], WeightedSamplesWriter.append

    def killed(self, *arrays, **more):
        append(self, *arrays, **more)
        appended.append(self.folder.name)
        if appended.count("01") == 1 and self.folder.name == "01":
            raise KeyboardInterrupt

    monkeypatch.setattr(WeightedSamplesWriter, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        bz.train_run(tmp_path / "run", *LADDER)
    monkeypatch.setattr(WeightedSamplesWriter, "append", append)
    place, tried = Place(tmp_path / "run"), []
    names = place.files("run.json", "checkpoints/*.*", "annealing/*.json", "annealing/.01.partial/*")
    assert len(names) == 9
    check(place, names, lambda: finish(tmp_path / "run"), tried)
    verdict(tried, least=72)


@pytest.mark.slow
def test_files_of_an_unfinished_simulation(tmp_path):
    system, folder = bz.load_system("aldp"), tmp_path / "job"

    class Killed(Exception):
        pass

    job = Job("langevin", 300.0, 1, 0, 2.0, 0.1, 0.5, 0.1, 0.002, 1.0, 4.0, "Reference", options={})

    def use() -> dict:
        job.save(folder, system.openmm_system(), np.asarray(system.positions, dtype=np.float64))
        run_job(folder)
        return {"frames": np.fromfile(folder / "frames.bin", dtype=np.uint8)}

    left = iter(range(12))

    def alive() -> None:
        if next(left, None) is None:
            raise Killed

    job.save(folder, system.openmm_system(), np.asarray(system.positions, dtype=np.float64))
    with pytest.raises(Killed):
        run_job(folder, alive)
    place, tried = Place(folder), []
    names = place.files("job.json", "system.xml", "start.npy", "state.npz", "frames.bin", "progress")
    assert len(names) == 6
    check(place, names, use, tried)
    verdict(tried, least=48)


def draws() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(30, 4, 3)).astype("f4"), rng.normal(size=30), rng.normal(size=30)


@pytest.mark.slow
def test_files_of_samples_and_datasets(tmp_path):
    tried, topology = [], bz.load_system("aldp").topology.subset(range(4))
    WeightedSamples(*draws(), topology=topology, meta={"likelihood": "exact", "counts": {"drawn": 40}}).save(
        tmp_path / "samples", format="dcd"
    )
    meta = {"system": {"name": "x"}, "settings": {"temperature": 300.0}}
    Dataset.write(tmp_path / "data", draws()[0], draws()[1], topology="END\n", meta=meta)
    for name, load in (("samples", WeightedSamples.load), ("data", Dataset.load)):
        place = Place(tmp_path / name)

        def use(load=load, folder=place.folder) -> dict:
            found = load(folder)
            arrays = {key: np.asarray(value) for key, value in vars(found).items() if isinstance(value, np.ndarray)}
            return arrays | {"meta": dict(found.meta), "topology": str(found.topology)}

        place.restore()
        right = use()
        for file in place.files("*"):
            for how in MUTATIONS:
                place.restore()
                mutate(place.folder / file, how)
                note(tried, f"{name}/{file}", how, _outcome(use, right))
    verdict(tried, least=112)


# ---- a few of them, quickly -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["emptied", "halved", "bit", "deleted"])
@pytest.mark.parametrize("name", ["positions.npy", "log_weights.npy", "progress.json"])
def test_unfinished_samples_are_not_filled_up_with_zeros(tmp_path, name, how):
    writer = WeightedSamplesWriter(tmp_path / "out", meta={"seed": 1})
    writer.append(*draws())
    partial = tmp_path / ".out.partial"
    mutate(partial / name, how, seed=1)
    if (name, how) == ("progress.json", "deleted"):
        assert WeightedSamplesWriter(tmp_path / "out", meta={"seed": 1}).n_written == 0
        return
    with pytest.raises(UserError, match=rf"{name} is damaged.*delete {partial}"):
        WeightedSamplesWriter(tmp_path / "out", meta={"seed": 1})


def test_a_stage_whose_result_is_missing_is_not_done(tmp_path):
    """Made anew and the same, nothing else is touched; made anew and another, what was made of it is set aside."""
    run = RunFolder.create(tmp_path / "run", bz.config.OmegaConf.create({"seed": 1}), "x")

    def stage(name: str, content: str) -> None:
        with run.stage(name):
            run.leave(run.path / f"{name}.json").write_text(content)

    for name in ("flow", "ebm", "report"):
        stage(name, "[1]")
    assert all(run.stage_done(name) for name in ("flow", "ebm", "report"))
    (run.path / "flow.json").unlink()
    assert not run.stage_done("flow")
    stage("flow", "[1]")
    assert list(run.stages) == ["flow", "ebm", "report"]
    assert run.stage_done("ebm")
    (run.path / "ebm.json").write_text("[7]")
    with pytest.raises(UserError, match=r"ebm\.json is damaged .*delete it and resume"):
        run.check_left("ebm")
    (run.path / "flow.json").unlink()
    stage("flow", "[2]")
    assert list(run.stages) == ["flow"]
    assert (run.path / "aside-1" / "ebm.json").read_text() == "[7]"
    assert not (run.path / "ebm.json").exists()


RECORD = {"name": "aldp", "n": 20, "seconds": 3.25, "stages": {"flow": {"finished": None, "steps": [1, 2]}}}


def _write_archive(path: Path) -> None:
    np.savez(path, x=np.arange(6.0).reshape(2, 3), n=7)


@pytest.mark.parametrize(
    ("name", "write", "read"),
    [
        ("a.json", lambda path: path.write_text(json.dumps(sealed(RECORD))), lambda path: read_json(path, "x")),
        ("a.yaml", lambda path: path.write_text(yaml.safe_dump(sealed(RECORD))), lambda path: read_yaml(path, "x")),
        (
            "a.safetensors",
            lambda path: save_weights(path, {"w": torch.arange(6.0), "b": torch.tensor(2)}, {"steps": 3}),
            lambda path: {"metadata": load_weights(path)[1]} | {k: v.numpy() for k, v in load_weights(path)[0].items()},
        ),
        ("a.npz", _write_archive, lambda path: read_archive(path, "x", {"x": (None, 3), "n": ()})),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_bit_of_a_record_changes_unseen(tmp_path, name, write, read):
    """What is read is what was written, or nothing; a seal whose own name is hit is a name that nobody asks for."""
    path = tmp_path / name
    write(path)
    whole, right, told = path.read_bytes(), read(path), 0
    for bit in range(0, 8 * len(whole), 7):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found = read(path)
        except UserError:
            told += 1
        else:
            assert same({key: found.get(key) for key in right}, right), (bit, found)
    assert told > len(whole) / 2


def test_meta_of_samples_is_sealed_and_may_be_edited(tmp_path):
    WeightedSamples(*draws(), topology=None, meta={"likelihood": "ebm"}).save(tmp_path / "out")
    path = tmp_path / "out" / "meta.yaml"
    path.write_text(path.read_text().replace("likelihood: ebm", "likelihood: exact"))
    with pytest.raises(UserError, match=r"meta\.yaml is damaged .*delete its sha256"):
        WeightedSamples.load(tmp_path / "out")
    contents = yaml.safe_load(path.read_text())
    contents.pop("sha256")
    path.write_text(yaml.safe_dump(contents))
    assert WeightedSamples.load(tmp_path / "out").meta["likelihood"] == "exact"
