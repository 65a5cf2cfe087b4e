"""Many molecules, one model: a tiny run of BoltzNCE for dipeptides, its report, and a peptide that it never saw."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TINY, accept_everything, config_of, fake_data, finish
from omegaconf import OmegaConf

import boltznce as bz
from boltznce import UserError
from boltznce.checkpoint import load_weights
from boltznce.config import compose
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.methods import boltznce as boltznce_method
from boltznce.methods import tbg
from boltznce.methods.finetune import start_finetuning
from boltznce.methods.models import FlowGenerator, make, solver_settings
from boltznce.methods.workspace import Workspace, make_fabric
from boltznce.networks.gvp import GVPVectorField
from boltznce.run import RunFolder, train
from boltznce.systems.conformers import random_conformers

pytestmark = pytest.mark.usefixtures("few_conformers")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    fake_data(folder / "dipeptides-smoke", ["AG", "GA", "AA"])
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished tiny run."""
    return finish(tmp_path_factory.mktemp("run"), data)


def test_the_stages_leave_a_report_of_the_unseen_peptide(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["method"] == "boltznce"
    (name, row), *others = metrics["members"].items()
    assert (name, others) == ("AA", [])
    assert row["made"]["right_graph"] == 1.0  # by the fixture
    assert 0 <= row["made"]["kept"] <= 1
    samples = bz.WeightedSamples.load(run / "samples" / "weighted" / "AA")
    assert len(samples) == 40
    ess = row["ess"]["EBM weights"]["ess"]
    assert 0 < ess <= 1
    aa = bz.load_system("AA")
    energy = aa.energy(torch.from_numpy(np.array(samples.positions))).numpy()
    np.testing.assert_allclose(energy, samples.energy, rtol=1e-3)
    assert metrics["average"]["ess"] == pytest.approx(ess)
    report = (run / "report.md").read_text()
    assert "| AA |" in report
    for figure in ("AA_ramachandran", "AA_energy_histograms", "AA_profile", "AA_tica", "learning_curves"):
        assert (run / "figures" / f"{figure}.png").stat().st_size > 1000
        assert figure in report
    record = RunFolder.open(run).stages
    assert list(record) == ["data", "flow", "samples", "ebm", "evaluation", "report"]
    assert all(stage["finished"] for stage in record.values())
    assert record["flow"]["not_balanced"] == []


def test_a_peptide_that_the_run_never_saw(run, monkeypatch):
    """KS has residues of which the run saw none, and is nearly twice as large as what it saw."""
    accept_everything(monkeypatch)
    finished, system = bz.load_run(run), bz.load_system("KS")
    samples = finished.sample(2, "ebm", system="KS", batch_size=8)
    assert samples.positions.shape == (2, system.n_atoms, 3)
    assert samples.topology == system.topology
    assert np.isfinite(samples.log_prob).all()
    assert np.abs(samples.positions).max() < 3  # nm: nothing has run away
    again = finished.sample(2, "ebm", system=system, batch_size=8)
    np.testing.assert_array_equal(samples.positions, again.positions)
    # an exact likelihood is that of the rows that are kept
    generator = finished.generator("KS")
    batch = generator.draw(8, "exact", torch.Generator().manual_seed(0))
    assert batch.counts["drawn"] == 8
    assert batch.log_prob.isfinite().all()
    assert (system.chirality(batch.positions) == 1).all()
    torch.testing.assert_close(batch.energy, system.energy(batch.positions).double())
    solver = solver_settings(finished.config.flow.solver)
    x, log_q = generator.flow.sample(8, torch.Generator().manual_seed(0), solver=solver, likelihood="exact")
    kept = (system.chirality(x) > 0).all(dim=1)
    assert kept.any()
    torch.testing.assert_close(batch.positions, x[kept])
    torch.testing.assert_close(batch.log_prob, log_q[kept])
    with pytest.raises(UserError, match="many molecules: say which"):
        finished.sample(2)
    with pytest.raises(UserError, match="many molecules: say which"):
        finished.generator()
    with pytest.raises(UserError, match="another force field or temperature"):
        finished.sample(2, system=bz.load_system("KS", temperature=300.0))
    with pytest.raises(UserError, match="no amino acid"):
        finished.sample(2, system="KZ")


def test_a_run_of_one_system_draws_no_other(tmp_path):
    config = compose("train", ["system=gaussians8", "budget=smoke"])
    RunFolder.create(tmp_path, config, config.system.name)
    for ask in (bz.load_run(tmp_path).generator, lambda system: bz.load_run(tmp_path).sample(2, system=system)):
        with pytest.raises(UserError, match="is a run of gaussians8 alone, not of KS: leave system= out"):
            ask("KS")


def test_free_energies_of_one_peptide(run, monkeypatch, tmp_path):
    """``scripts/free_energy.py`` has to be told which; then it takes the samples of the report."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "free_energy.py"))["main"]
    words = [f"run={run}", f"output={tmp_path}", "n_bootstrap=20", "device=cpu"]
    with pytest.raises(UserError, match="say which one is meant, for example system=AA"):
        script(compose("free_energy", words))
    script(compose("free_energy", [*words, "system=AA"]))
    assert json.loads((tmp_path / "metrics.json").read_text())["ess"]["weights"]["n"] == 40
    with pytest.raises(UserError, match="holds no weighted samples"):
        script(compose("free_energy", [*words, "system=KS"]))


@pytest.mark.slow
def test_fine_tuning_to_one_peptide(run, monkeypatch):
    accept_everything(monkeypatch)
    split = {"train": 0.7, "validation": 0.1, "test": 0.2}
    steps = {"flow_steps": 3, "ebm_steps": 3, "lr": 1e-3, "simulation": {}, "split": split}
    words = {"finetune": steps, "samples": {"n_train": 16, "n_validation": 4}}
    folder = start_finetuning(run, "AA", OmegaConf.create(words))
    assert folder.path == run / "finetuned" / "AA"
    train(folder)
    trained = {name: record["steps"] for name, record in folder.stages.items() if "steps" in record}
    assert trained == {"flow": 3, "ebm": 3}
    metrics = json.loads((folder.path / "metrics.json").read_text())
    assert (metrics["system"], metrics["method"], "members" in metrics) == ("AA", "boltznce", False)
    finished = bz.load_run(folder.path)
    assert finished.generator().system.name == "AA"
    assert len(finished.sample(2, "ebm")) == 2
    # it began where its parent ended, and moved
    for name in ("flow", "ebm"):
        parent, child = (load_weights(path / "checkpoints" / f"{name}.safetensors")[0] for path in (run, folder.path))
        change = sum((child[key] - parent[key]).square().sum() for key in parent)
        assert 0 < change / sum(p.square().sum() for p in parent.values()) < 0.01
    with pytest.raises(UserError, match="only runs of many molecules"):
        start_finetuning(folder.path, "AA", OmegaConf.create(words))


def test_draws_are_held_against_the_bond_graph(run):
    """Broken conformers are dropped, and what is kept with its likelihood stays the row that it was."""
    generator = bz.load_run(run).generator("AA")
    system = generator.system
    x = random_conformers(system.positions, system.bonds, 64, torch.Generator().manual_seed(0))
    fine, kept_at_first, _ = generator.mend(x)
    assert len(fine) == int(kept_at_first.sum()) > 10  # the others clash
    broken = x.clone()
    broken[::2, 0] += 5.0
    mended, kept, counts = generator.mend(broken)
    assert not kept[::2].any()
    torch.testing.assert_close(kept[1::2], kept_at_first[1::2])
    torch.testing.assert_close(mended, x[kept])
    assert counts["right_graph"] == int(kept.sum())
    mirrored, kept, counts = generator.mend(-x)  # a flow that sees handedness makes no mirror images: none is mended
    assert len(mirrored) == counts["mirrored"] == int(kept.sum()) == 0


def test_reordering_needs_atoms_that_are_equal_to_the_network():
    """Two hydrogens exchanged: the same molecule for a network that sees classes, not for one that sees numbers."""
    system = bz.load_system("AA")
    names = [str(atom) for atom in system.topology.atoms]
    x = random_conformers(system.positions, system.bonds, 200, torch.Generator().manual_seed(0))
    order = torch.arange(system.n_atoms)
    a, b = names.index("ALA1-HB1"), names.index("ALA2-HB1")
    order[a], order[b] = b, a
    for encoding, expected in (("full", True), ("numbered", False)):
        flow = InterpolantFlow(torch.nn.Identity(), system.n_atoms)  # takes mirror images for molecules
        generator = FlowGenerator(OmegaConf.create(), bz.load_system("AA", encoding=encoding), flow)
        _, straight, _ = generator.mend(x)
        mended, kept, counts = generator.mend(-x[:, order])
        assert straight.any()
        assert kept.equal(straight & expected)
        assert counts["reordered"] == counts["mirrored"] == (int(straight.sum()) if expected else 0)
        if expected:
            torch.testing.assert_close(mended[:, [0, 4]], x[kept][:, [0, 4]])


@pytest.mark.slow
def test_tbg_has_exact_weights_and_no_ebm(data, tmp_path, monkeypatch):
    accept_everything(monkeypatch)
    words = [word for word in TINY if not word.startswith(("samples", "ebm", "evaluation.n_samples"))]
    words += [f"data_dir={data}", "flow.network.n_rounds=1", "evaluation.n_samples=4"]
    config = compose("train", ["system=dipeptides", "method=tbg", *words])
    train(RunFolder.create(tmp_path, config, config.system.name))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["members"]["AA"]["weighted"] == "exact"
    samples = bz.WeightedSamples.load(tmp_path / "samples" / "weighted" / "AA")
    assert (len(samples), samples.meta["likelihood"]) == (4, "exact")
    with pytest.raises(UserError, match="this run has none"):
        bz.load_run(tmp_path).sample(2, "ebm", system="AA")


@pytest.mark.parametrize("network", ["gvp", "egnn"])
def test_padded_batches_train_the_published_networks(data, tmp_path, network):
    sizes = {"gvp": ["n_layers=2", "n_scalars=8", "n_vectors=4"], "egnn": ["n_layers=2", "width=8"]}[network]
    config = compose(
        "train",
        [
            "system=dipeptides",
            "method=tbg",
            *[word for word in TINY if not word.startswith(("flow.network", "samples", "ebm"))],
            f"data_dir={data}",
            f"network@flow.network={network}",
            *(f"flow.network.{size}" for size in sizes),
            "flow.padded=true",
            "flow.max_padding=0.5",
            "flow.model.whiten=false",
            "flow.model.length_scale=0.1",
            "system.encoding=full",
        ],
    )
    work = workspace(config, tmp_path)
    record = tbg.STAGES["flow"](work)
    assert record["steps"] == 4
    assert np.isfinite(record["validation_loss"])


def workspace(config, folder):
    return Workspace(RunFolder.create(folder, config, config.system.name), config, make_fabric("cpu"))


def test_bad_settings_are_one_sentence(data):
    wrong = {
        "system.encoding=full": r"system\.encoding=numbered",
        "flow.padded=true": r"flow\.padded=false",
        "flow.scales=frames": r"flow\.scales=conformers",
    }
    for word, message in wrong.items():
        config = config_of(data, word)
        with pytest.raises(UserError, match=message):
            make(config, bz.config.build(config.system), "flow")


def test_published_settings_compose_at_full_size():
    boltznce, tbg = (compose("train", [f"experiment={name}/dipeptides"]) for name in ("boltznce", "tbg"))
    assert boltznce == compose("train", ["system=dipeptides", "method=boltznce", "budget=paper"])
    family = bz.config.build(boltznce.system)
    assert len(family.sequences["train"]) == 200
    flow, ebm = (make(boltznce, family, name).network for name in ("flow", "ebm"))
    assert isinstance(flow, GVPVectorField)
    assert (len(flow.layers), flow.embedding.out_features, flow.n_vectors) == (9, 128, 32)
    embedding = ebm.type_embedding
    assert (len(ebm.layers), embedding.embedding_dim, embedding.num_embeddings, ebm.n_types) == (10, 256, 76, 54)
    egnn = make(tbg, bz.config.build(tbg.system), "flow").network
    assert (len(egnn.layers), egnn.embedding.in_features, egnn.embedding.out_features) == (9, 77, 128)
    assert tbg.method.name == "tbg"
    assert tbg.flow.model.length_scale == pytest.approx(1 / 30)
    assert tbg.flow.model.coupling == "independent"


@pytest.mark.slow
def test_published_settings_take_real_steps(tmp_path):
    """Two steps of the flow and of the EBM at full size on batches of three peptides."""
    sequences = ["AG", "GA", "KS"]
    fake_data(tmp_path / "data", sequences)
    config = compose(
        "train",
        [
            "experiment=boltznce/dipeptides",
            "system.selection=smoke",
            "system.selections.smoke.test=[KS]",
            f"data.folder={tmp_path / 'data'}",
            "flow.batch_size=16",
            "ebm.batch_size=16",
            "flow.max_padding=0.5",
            "flow.n_train=200",
            "flow.n_validation=8",
            "flow.fit.steps=2",
            "ebm.fit.steps=2",
            "flow.solver={method: heun, steps: 2}",
            "samples.n_train=32",
            "samples.n_validation=8",
            "samples.batch_size=32",
            "compile=false",
        ],
    )
    work = workspace(config, tmp_path / "run")
    stages = boltznce_method.STAGES
    with pytest.MonkeyPatch.context() as patch:
        accept_everything(patch)
        for name in ("data", "flow", "samples", "ebm"):
            record = stages[name](work)
            if name in ("flow", "ebm"):
                assert record["steps"] == 2
                assert record["skipped_steps"] == 0
                assert np.isfinite(record["validation_loss"])
