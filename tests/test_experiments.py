"""Every file of configs/experiment, and each member of its sweep: composes, is accepted, takes its first steps."""

import functools
import itertools
import json

import hydra
import pytest
import torch
from omegaconf import OmegaConf

import boltznce as bz
from boltznce import config
from boltznce.methods.preflight import preflight
from boltznce.run_folder import RunFolder
from boltznce.settings import without_rule

NAMES = config.available("experiment")
PLANE = ("boltznce/fig_toy", "tabg/gaussians40")  # of which a run takes seconds
SHORT = {"duration": 12.0, "equilibration": 1.0, "segment_length": 2.0, "n_windows": 12, "n_repeats": 1}
FEW = {  # steps and draws, of the sections that a run has
    "data": {"simulation": SHORT},
    "flow": {"n_train": 400, "n_validation": 32, "fit": {"steps": 2}, "solver": {"steps": 4}},
    "samples": {"n_train": 64, "n_validation": 32},
    "ebm": {"fit": {"steps": 2}},
    "hot": {"fit": {"steps": 2}},
    "annealing": {"n_draws": 200, "fit": {"steps": 2}},
    "fab": {"min_batches": 1, "max_batches": 2, "fit": {"steps": 4}},
    "evaluation": {
        "n_samples": 16,
        "n_bootstrap": 5,
        "n_torus": 10,
        "n_ladder": 50,
        "n_reference": 100,
        "refine": None,
        "frames": "data",
    },
}


@functools.cache
def swept(name):
    """Overrides of the members of an experiment's sweep, without its seeds; of a single run one without any."""
    with hydra.initialize_config_dir(version_base=None, config_dir=str(config.config_dir())):
        composed = hydra.compose("train", [f"experiment={name}"], return_hydra_config=True)
    params = OmegaConf.to_container(composed.hydra.sweeper, resolve=False).get("params") or {}
    each = [[f"{key}={value}" for value in str(values).split(",")] for key, values in params.items() if key != "seed"]
    return list(itertools.product(*each))


def members(fast, budgets=("smoke", "long")):
    """All of them whose smallest budget is one of ``budgets``; those that ``fast`` does not choose are slow."""
    return pytest.mark.parametrize(
        ("name", "words"),
        [
            pytest.param(name, words, marks=() if fast(name, words) else pytest.mark.slow, id=" ".join((name, *words)))
            for name in NAMES
            for words in swept(name)
            if smallest(name) in budgets
        ],
    )


def smallest(name):
    """The pretrained model's simulations are of one size, which smoke's do not fit."""
    return "long" if name.startswith("pretrained/") else "smoke"


def is_last(name, words):
    return words == swept(name)[-1]


def composed(name, words, budget):
    return config.compose("train", [f"experiment={name}", *words, f"budget={budget}", "device=cpu", "threads=1"])


@members(fast=is_last)
def test_is_accepted_before_it_begins(name, words, tmp_path):
    whole = composed(name, words, smallest(name))
    whole.data_dir = str(tmp_path)
    preflight(whole)


@pytest.mark.slow
@members(fast=is_last, budgets=("smoke",))
@pytest.mark.parametrize("budget", ["cpu", "long", "paper"])
def test_is_accepted_at_every_budget(name, words, budget, tmp_path):
    whole = composed(name, words, budget)
    whole.data_dir = str(tmp_path)
    assert (whole.budget, without_rule(whole), OmegaConf.missing_keys(whole)) == (budget, [], set())
    preflight(whole)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Members of one system share their data."""
    return tmp_path_factory.mktemp("data")


def few(name, words):
    """Overrides that leave a member of an experiment two steps and few draws."""
    whole, found = composed(name, words, "smoke"), []
    for key, value in leaves_of(FEW):
        above, _, last = key.rpartition(".")
        if last in (OmegaConf.select(whole, above) or ()):
            found.append(f"{key}={json.dumps(value)}")
    return found


def leaves_of(node, above=""):
    for key, value in node.items():
        path = f"{above}{key}"
        if isinstance(value, dict):
            yield from leaves_of(value, f"{path}.")
        else:
            yield path, value


@members(fast=lambda name, words: name in PLANE and is_last(name, words), budgets=("smoke",))
@pytest.mark.timeout(900)
def test_takes_its_first_steps(name, words, data_dir, tmp_path):
    threads = torch.get_num_threads()
    given = [f"experiment={name}", *words, "budget=smoke", "threads=1", "device=cpu", f"data_dir={data_dir}"]
    try:
        bz.train_run(tmp_path, *given, *few(name, words))
    except bz.UserError as error:  # so new a flow draws no molecules
        if "train the flow longer" not in str(error):
            raise
    torch.set_num_threads(threads)
    trained = [stage for stage in RunFolder.open(tmp_path, trust=True).stages.values() if "steps" in stage]
    assert trained
    assert all(stage["finished"] for stage in trained)
    assert name not in PLANE or (tmp_path / "report.md").exists()
