"""The examples of docs/own_parts.md, run as they stand at a small size; and parts of one's own that do not fit."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import boltznce
import boltznce as bz
from boltznce.config import compose
from boltznce.data.dataset import Dataset
from boltznce.logger import read_log
from boltznce.methods.preflight import preflight
from boltznce.methods.stages import make_data, train_flow
from boltznce.methods.workspace import Workspace, make_fabric
from boltznce.run import start_folder

PAGE = Path(__file__).parents[1] / "docs" / "own_parts.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
COMMANDS = [shlex.split(text.replace("boltznce train ", "")) for kind, text in BLOCKS if kind == "bash"]
ALDP = Path(boltznce.__file__).parent / "systems" / "structures" / "aldp.pdb"
FEW = ["budget=smoke", "threads=1", "device=cpu", "flow.n_train=500", "flow.n_validation=32", "flow.batch_size=64"]
FEW += ["flow.fit={steps: 60, validate_every: 60, ema_decay: null}", "+flow.fit.log_every=5", "flow.solver.steps=4"]
FEW += ["evaluation={n_samples: 32, n_bootstrap: 5, n_torus: 10}"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder that has the files of the page, and that Python imports from."""
    for kind, text in BLOCKS:
        if kind in ("python", "yaml"):
            (tmp_path / text.partition("\n")[0].removeprefix("# ")).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def command(name):
    (words,) = (words for words in COMMANDS if any(name in word for word in words))
    return words


def losses(path):
    return [float(row["train/loss"]) for row in read_log(path / "flow.csv")]


def test_all_examples_are_here():
    assert len(COMMANDS) == 4
    assert [len(text.splitlines()) <= 60 for kind, text in BLOCKS if kind == "python"] == [True, True, True, False]


def test_a_network_trains(folder):
    system = bz.load_system("aldp")  # whose frames here are its structure, shaken: nothing is simulated
    shaken = system.positions + 0.003 * torch.randn(600, 22, 3, generator=torch.Generator().manual_seed(0))
    np.save("frames.npy", shaken.numpy())
    Dataset.from_trajectory("data/shaken", ALDP, "frames.npy", system, temperature=300.0)
    words = [*command("pair_field"), *FEW, "data.folder=data/shaken", "flow.balance=null"]
    run = start_folder(folder / "run", compose("train", words))
    work = Workspace(run, run.config, make_fabric("cpu"))
    for name, stage in (("data", make_data), ("flow", train_flow)):
        with run.stage(name) as info:
            info.update(stage(work))
    first, *_, last = losses(run.path)
    assert last < 0.9 * first
    x, log_q = work.models.of(work.system).flow.sample(2, torch.Generator().manual_seed(0), likelihood="hutchinson")
    assert torch.isfinite(x).all()
    assert torch.isfinite(log_q).all()


def test_a_network_keeps_symmetries(folder):
    from pair_field import PairField

    torch.manual_seed(0)
    field, x, t = PairField(n_features=4, width=8).double(), torch.randn(3, 5, 3).double(), torch.rand(3).double()
    features = torch.eye(4)[[0, 1, 2, 3, 3]].double()
    turn = torch.linalg.qr(torch.randn(3, 3).double())[0]
    v = field(x, t, features)
    torch.testing.assert_close(field(x @ turn, t, features), v @ turn)
    order = [0, 1, 2, 4, 3]
    torch.testing.assert_close(field(x[:, order], t, features), v[:, order])


def test_a_system_is_known_exactly_and_trained_on(folder):
    system = bz.load_system("ring.yaml", trust=True)
    x = system.sample(20_000, torch.Generator().manual_seed(0))
    inside = float(system.in_state(x).double().mean())
    assert system.reference()["delta_f"]["value"] == pytest.approx(-torch.logit(torch.tensor(inside)).item(), abs=0.06)
    run = bz.train_run(folder / "run", *command("ring.yaml"), "method=tbg", *FEW)
    assert run.metrics["free_energy"]["reference"]["value"] == pytest.approx(system.reference()["delta_f"]["value"])
    with pytest.raises(bz.UserError, match=r"names ring.Ring.*trust=true"):
        bz.load_system("ring.yaml")


def test_a_coupling_pairs_and_trains(folder):
    from sliced import Sliced

    x0, x1 = torch.randn(2, 50, 1, 2, generator=torch.Generator().manual_seed(0))
    paired, same = Sliced()(x0, x1)
    assert same is x1
    assert sorted(paired[:, 0, 0].tolist()) == sorted(x0[:, 0, 0].tolist())
    assert (paired - x1).square().sum() < (x0 - x1).square().sum()
    run = bz.train_run(folder / "run", *command("sliced"), "method=tbg", *FEW)
    assert losses(folder / "run")[-1] < losses(folder / "run")[0]
    assert "Sliced coupling" in run.metrics["settings"]["flow"]
    with pytest.raises(bz.UserError, match=r"names sliced\.Sliced.*boltznce\.register"):
        _ = bz.load_run(folder / "run").config


def test_a_method_is_run_to_its_report(folder):
    run = bz.train_run(folder / "run", *command("one_gaussian"), *FEW)
    assert run.metrics["method"] == "one_gaussian"
    assert 0 < run.metrics["ess"]["exact weights"]["ess"] < 1
    samples = run.sample(100)
    assert samples.positions.shape == (100, 1, 2)
    assert (samples.log_prob == samples.log_prob).all()


WRONG = """
from torch import nn
from boltznce.flows.coupling import Coupling
class Half(Coupling):
    def __call__(self, x0, x1, index=None):
        return x0[:1], x1
def plain(x0, x1, index=None):
    return x0, x1
"""


@pytest.mark.parametrize(
    ("coupling", "message"),
    [
        (
            "{_target_: wrong.Half}",
            r"flow\.model\.coupling gives \[\(1, 1, 2\), \(2, 1, 2\)\] for two sets",
        ),
        ("{_target_: wrong.plain}", "_target_=wrong.plain is not a Coupling"),
        ("{_target_: wrong.Half, width: 3}", "Half cannot be built: got an unexpected keyword argument 'width'"),
        ("{_target_: wrong.None}", "_target_=wrong.None cannot be imported"),
        ("sorted", "Unknown flow.model.coupling=sorted: choose one of independent, ot, kabsch, ot_kabsch"),
    ],
)
def test_couplings_that_do_not_fit_are_told(folder, coupling, message):
    (folder / "wrong.py").write_text(WRONG)
    with pytest.raises(bz.UserError, match=message):
        preflight(compose("train", ["system=gaussians8", "budget=smoke", f"flow.model.coupling={coupling}"]))
