"""Runs that ship with the package: they draw what the run did that they are made of, and are only read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from families import accept_everything, fake_data, finish
from omegaconf import OmegaConf
from safetensors.torch import load_file

import boltznce as bz
from boltznce import UserError, cli, pretrained
from boltznce.commands import finetune, free_energy, sample
from boltznce.config import compose
from boltznce.methods.drawing import Generator
from boltznce.methods.finetune import start_report
from boltznce.methods.workspace import Workspace, make_fabric
from boltznce.pretrained import export as exporting
from boltznce.pretrained.export import export
from boltznce.run import RunFolder, train
from boltznce.systems.reference import REFERENCE_FOLDER, load_reference

SHIPPED = pretrained.FOLDER
MOST_BYTES = 16 * 2**20


pytestmark = pytest.mark.usefixtures("few_conformers")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder of a finished tiny run of two dipeptides."""
    data = tmp_path_factory.mktemp("machine")
    fake_data(data / "dipeptides-smoke", ["AG", "GA", "AA"])
    return finish(tmp_path_factory.mktemp("run"), data)


@pytest.fixture(scope="module")
def package(original, tmp_path_factory):
    """A folder in place of the package's, with the run exported as it is and in half precision."""
    folder = tmp_path_factory.mktemp("package")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "FOLDER", folder)
        export(original, "dipeptides", figures="| KS | 1.00 |")
        export(original, "halves", half=True)
        yield folder


@pytest.fixture
def here(package, tmp_path, monkeypatch):
    """An empty working directory; what a tiny flow makes passes for the molecule."""
    accept_everything(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(command, *words):
    """What the command, called in this process, raises as a UserError; the empty text if nothing."""
    try:
        command.main(compose(command.__name__.rpartition(".")[2], ["run=pretrained/dipeptides", *words]))
    except UserError as error:
        return str(error)
    return ""


def listing(folder):
    """Every path below, its size, and when it was changed."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


# ---- a run, exported ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peptide", ["AA", "KS"])
def test_it_draws_what_the_original_draws(original, here, peptide):
    settings = {"system": peptide, "seed": 3, "batch_size": 8}
    ours, theirs = (run.sample(4, **settings) for run in (bz.load_pretrained("dipeptides"), bz.load_run(original)))
    for name in ("positions", "energy", "log_prob", "log_weights"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    again = bz.load_run("pretrained/dipeptides").sample(4, **settings)
    np.testing.assert_array_equal(ours.positions, again.positions)


def test_half_precision_is_as_near_as_its_digits(original, here, package):
    """Weights within half a unit of the last of 11 binary digits, and log-likelihoods so near too."""
    for name in ("flow", "ebm"):
        full, half = (load_file(run / "checkpoints" / f"{name}.safetensors") for run in (original, package / "halves"))
        for key, weight in full.items():
            assert half[key].dtype == torch.float16
            assert ((half[key].float() - weight).abs() <= 2**-11 * weight.abs() + 2**-25).all(), key
    run = bz.load_pretrained("halves")
    ours, theirs = (each.generator("AA") for each in (run, bz.load_run(original)))
    assert {weight.dtype for weight in [*ours.flow.parameters(), *ours.ebm.parameters()]} == {torch.float32}
    x = ours.draw(16, "none", torch.Generator().manual_seed(0)).positions
    for log_prob in (lambda generator: generator.ebm.log_prob(x).detach(), lambda generator: generator.log_prob(x[:4])):
        there = log_prob(theirs)
        assert 0 < (log_prob(ours) - there).abs().max() < 2**-11 * there.abs().max()


def test_nothing_of_the_machine_is_in_it(original, package):
    data = str(bz.load_run(original).config.data.folder)
    for path in (path for path in package.rglob("*") if path.is_file() and path.suffix != ".safetensors"):
        text = path.read_text()
        assert str(original) not in text, path
        assert data not in text, path
    config = bz.load_pretrained("dipeptides").config
    assert (config.data.folder, config.data_dir, config.threads) == ("data/dipeptides-smoke", "data", None)
    assert (config.flow.start, config.device) == (None, "auto")


def test_its_card_has_the_facts(package):
    card = (package / "dipeptides" / "README.md").read_text()
    for fact in ("trained on | AG GA", "4 steps of 16", "310 K", "replica exchange", "hours |", "float32", "KS | 1.00"):
        assert fact in card
    assert f"boltznce {bz.__version__}" in card
    assert "float16" in (package / "halves" / "README.md").read_text()
    assert bz.load_pretrained("dipeptides").metrics["members"].keys() == {"AA"}


def test_what_cannot_be_exported(original, package, tmp_path, monkeypatch):
    begun, measured = tmp_path / "begun", tmp_path / "measured"
    for folder in (begun, measured):
        shutil.copytree(original, folder)
    (begun / "metrics.json").unlink()
    config = OmegaConf.load(measured / "config.yaml")
    config.pop("sha256")
    OmegaConf.save(OmegaConf.merge(config, {"flow": {"scales": "frames"}}), measured / "config.yaml")
    for run, name, half, message in (
        (original, "dipeptides", False, "is there already: choose another name"),
        (original, "../outside", False, "without slashes"),
        (begun, "new", False, "has no report yet: finish the run with"),
        (measured, "new", True, r"flow\.scales=frames .*half=False"),
    ):
        with pytest.raises(UserError, match=message):
            export(run, name, half=half)
    monkeypatch.setattr(exporting, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="may ship: set half=True"):
        export(original, "new")
    assert sorted(path.name for path in package.iterdir()) == ["dipeptides", "halves"]


# ---- what ships is read ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_report_on_a_peptide_outside_of_the_lists(here, package, capsys):
    """``sample run=pretrained/dipeptides system=KS refine=true``: nothing is trained or simulated."""
    before = listing(package)
    words = ["system=KS", "n_samples=24", "refine=true", "seed=5", "device=cpu", "batch_size=32"]
    assert told(sample, *words) == ""
    output = Path("outputs/pretrained/dipeptides/samples/KS/auto-24-seed5")
    printed = capsys.readouterr().out
    assert f"Report: {output / 'report.md'}" in printed
    assert f"samples in {output / 'samples' / 'refined'}: ESS" in printed
    metrics = json.loads((output / "metrics.json").read_text())
    reference = load_reference(REFERENCE_FOLDER / "KS.json")["delta_f"]
    assert metrics["free_energy"]["reference"]["value"] == reference["value"]
    assert {"ebm", "refined", "two_sided", "unweighted"} <= set(metrics["free_energy"])
    assert metrics["settings"]["trained on"] == "AG GA"
    assert metrics["counts"]["molecules trained on"] == 2
    assert (metrics["settings"]["data"], metrics["settings"]["seed"]) == ("none", "5")
    for residue in "KS":
        assert f"No peptide that the model was trained on has the residue {residue}." in metrics["notes"]
    draws = bz.WeightedSamples.load(output / "samples" / "weighted")
    assert len(draws) == 24
    assert {path.name for path in here.iterdir()} == {"outputs"}
    assert listing(package) == before
    # once more: what is done stays
    written = (output / "samples" / "refined" / "positions.npy").stat().st_mtime_ns
    assert told(sample, *words) == ""
    assert (output / "samples" / "refined" / "positions.npy").stat().st_mtime_ns == written
    alone = bz.load_run(output)
    assert alone.system.name == "KS"
    x = torch.from_numpy(np.array(draws.positions[:4]))
    shipped = bz.load_pretrained("dipeptides").generator("KS")
    assert alone.generator().ebm.log_prob(x).equal(shipped.ebm.log_prob(x))


def test_samples_alone_and_their_free_energy(here, package):
    before, output = listing(package), Path("outputs/pretrained/dipeptides")
    assert told(sample, "system=KS", "n_samples=6", "batch_size=8", "device=cpu") == ""
    drawn = output / "samples" / "KS" / "auto-6-seed0"
    own = bz.load_pretrained("dipeptides").sample(6, system="KS", batch_size=8)
    np.testing.assert_array_equal(bz.WeightedSamples.load(drawn).positions, own.positions)
    message = told(free_energy, "system=KS")
    assert "ships without samples" in message
    assert "sample run=pretrained/dipeptides system=KS refine=true" in message
    assert told(free_energy, "system=KS", f"samples={drawn}", "n_bootstrap=20") == ""
    assert (output / "free_energy" / "KS" / "report.md").is_file()
    assert listing(package) == before


def test_fine_tuning_of_it_begins_elsewhere(here, package, monkeypatch):
    before = listing(package)
    monkeypatch.setattr(finetune, "train", lambda folder: folder.path)
    assert told(finetune, "peptide=KS") == ""
    child = bz.load_run("outputs/pretrained/dipeptides/finetuned/KS")
    assert child.config.flow.fit.steps == 0
    assert child.config.ebm.fit.steps == 500
    assert child.config.data.folder == str(here / "data" / "dipeptides-smoke" / "KS")
    assert Path(child.config.ebm.start).is_relative_to(here)  # a copy: the package may go
    assert listing(package) == before


@pytest.mark.slow
def test_data_that_are_there_are_compared_with(original, here):
    run, words = bz.load_run(original), ["n_samples=16", "report=true", "batch_size=16", "device=cpu"]
    sample.main(compose("sample", [f"run={original}", "system=AA", f"output={here / 'AA'}", *words]))
    metrics = bz.load_run(here / "AA").metrics
    assert metrics["settings"]["data"].startswith(f"{run.config.data.folder}/AA: replica exchange")
    assert "E-W2 (kT)" in metrics["distances"]
    assert "refined" not in metrics["free_energy"]
    assert "No molecule that was tested was trained on or looked at before the evaluation." in metrics["notes"]


def test_a_report_knows_what_was_trained_on(original, here):
    run = bz.load_run(original)
    for peptide, steps, expected in (("AG", 0, ["AG", "GA"]), ("AA", 0, ["AG", "GA"]), ("AA", 3, ["AG", "GA", "AA"])):
        child = start_report(run.folder, run.generator(peptide), here / f"{peptide}{steps}", n=8, refine=True)
        child.mark_done("ebm", {"steps": steps})
        assert Workspace(child, child.config, make_fabric("cpu")).trained_on == expected


def test_it_is_not_resumed_and_not_overwritten(package):
    before = listing(package)
    for words in (["resume=pretrained/dipeptides"], [f"resume={package / 'dipeptides'}"]):
        with pytest.raises(UserError, match=r"pretrained/dipeptides ships with .*finetune run=pretrained/dipeptides"):
            cli._prepared("train", words)
    with pytest.raises(UserError, match="nothing is written"):
        cli._prepared("train", [f"hydra.run.dir={package / 'dipeptides'}"])
    folder = RunFolder.open(Path("pretrained/dipeptides"))
    config = folder.config
    for write in (lambda: train(folder), lambda: RunFolder.create(folder.path, config, "dipeptides")):
        with pytest.raises(UserError, match="nothing is written"):
            write()
    assert listing(package) == before


def test_reports_that_cannot_be_made(here):
    one = RunFolder.create(here / "one", compose("train", ["system=gaussians8", "budget=smoke"]), "gaussians8")
    generator = Generator()
    generator.system = bz.load_system("gaussians8")
    with pytest.raises(UserError, match="is a run of gaussians8 alone: only runs of many molecules"):
        start_report(one, generator, here / "report", n=8, refine=False)
    assert "likelihood=ebm weighs, not exact: set report=false" in told(
        sample, "system=KS", "report=true", "likelihood=exact", "device=cpu"
    )
    assert "many molecules: say which one is meant" in told(sample, "refine=true", "device=cpu")
    assert not (here / "outputs").exists()


def test_unknown_names_are_told(tmp_path, package, monkeypatch):
    with pytest.raises(UserError, match=r"^There is no pretrained model nothing; there are: dipeptides, halves\.$"):
        bz.load_run("pretrained/nothing")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    for load in (lambda: bz.load_pretrained("dipeptides"), lambda: bz.load_run("pretrained/dipeptides")):
        with pytest.raises(UserError, match=r"^There is no pretrained model dipeptides; there are: none\.$"):
            load()


def test_a_run_in_the_working_directory_goes_first(original, here):
    assert pretrained.located("pretrained/dipeptides") == pretrained.FOLDER / "dipeptides"
    (here / "pretrained" / "dipeptides").mkdir(parents=True)  # no run: one may have called a folder so
    assert pretrained.located("pretrained/dipeptides") == pretrained.FOLDER / "dipeptides"
    shutil.copytree(original, here / "pretrained" / "dipeptides", dirs_exist_ok=True)
    run = bz.load_run("pretrained/dipeptides")
    assert run.path == Path("pretrained/dipeptides") == run.folder.outputs
    assert bz.load_pretrained("dipeptides").path == pretrained.FOLDER / "dipeptides"


def test_what_ships_shows_by_its_name(package):
    assert repr(bz.load_pretrained("halves")).startswith("Run(pretrained/halves, boltznce of dipeptides, smoke: data,")


# ---- those of this version ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.parent.name for path in SHIPPED.glob("*/run.json")))
def test_each_that_ships_is_small_and_draws(name):
    files = [path for path in (SHIPPED / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    assert {"config.yaml", "run.json", "metrics.json", "README.md"} <= {path.name for path in files}
    run = bz.Run(SHIPPED / name)
    member = run.system.members("test")[0]
    assert np.isfinite(run.sample(4, system=member, batch_size=8).log_weights).all()
