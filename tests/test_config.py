"""Configs: found by name, composed, and mistakes told in a sentence that lists what exists."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from boltznce import UserError, cli, config, load_system
from boltznce.settings import without_rule
from boltznce.systems.base import System


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small set of configs of its own, so that this test knows every name in it."""
    files = {
        "train.yaml": "defaults: [{method: one}, {budget: smoke}, _self_]\nseed: 0\n",
        "method/one.yaml": "rate: 1\n",
        "method/two.yaml": "rate: 2\n",
        "budget/smoke.yaml": "steps: 3\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(config, "config_dir", lambda: tmp_path)
    return tmp_path


def test_shipped_systems_are_listed():
    assert {"aldp", "aldp_amber96"} <= set(config.available("system"))
    assert config.available("no such group") == []


def test_unknown_system_lists_what_exists():
    with pytest.raises(UserError, match=r"nope.*aldp, aldp_amber96"):
        load_system("nope")


def test_every_shipped_system_loads():
    for name in config.available("system"):
        assert load_system(name).name == name


def test_overrides_and_paths(tmp_path):
    assert load_system("aldp", temperature=310).temperature == 310.0
    path = tmp_path / "mine.yaml"
    path.write_text((config.config_dir() / "system" / "aldp.yaml").read_text().replace("name: aldp", "name: mine"))
    assert load_system(path).name == load_system(str(path)).name == "mine"


def test_unknown_setting_lists_the_settings():
    with pytest.raises(UserError, match=r"colour.*forcefield, temperature"):
        load_system("aldp", colour="red")


def test_compose(folder):
    composed = config.compose("train", ["method=two", "seed=7"])
    assert composed == {"method": {"rate": 2}, "budget": {"steps": 3}, "seed": 7}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=three"], "Unknown method 'three': choose one of one, two"),
        (["budget=huge"], "Unknown budget 'huge': choose one of smoke"),
        (["sed=1"], "sed"),
        (["seed=[1"], r"seed=\[1"),
    ],
)
def test_mistakes_on_the_command_line(folder, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        config.compose("train", overrides)
    assert "\n" not in str(caught.value)


def test_unknown_config(folder):
    with pytest.raises(UserError, match="choose one of train"):
        config.compose("trian")


@pytest.mark.parametrize("budget", config.available("budget"))
@pytest.mark.parametrize(
    ("system", "kind", "methods"),
    [
        ("aldp", "molecule", ("boltznce", "tbg", "tabg", "forward_kl", "fab")),
        ("AK", "molecule", ("boltznce", "tbg", "tabg")),
        ("two_moons", "plane", ("boltznce", "tbg", "tabg", "forward_kl", "fab", "density")),
        ("dipeptides", "family", ("boltznce", "tbg")),
    ],
)
def test_every_size_composes_and_lacks_nothing(system, kind, methods, budget):
    for method in methods:
        composed = config.compose("train", [f"system={system}", f"method={method}", f"budget={budget}"])
        assert (composed.system.name, composed.kind, composed.budget) == (system, kind, budget)
        assert config.OmegaConf.missing_keys(composed) == set()
        assert without_rule(composed) == []
        assert config.locate(composed.method._target_, ModuleType).__name__ == f"boltznce.methods.{method}"


@pytest.mark.parametrize("name", config.available("experiment"))
def test_experiments_are_published_settings_unless_told_otherwise(name):
    composed = config.compose("train", [f"experiment={name}"])
    assert without_rule(composed) == []
    otherwise = {"boltznce/fig_toy": "cpu", "pretrained/dipeptides": "long"}
    assert composed.budget == otherwise.get(name, "paper")
    assert config.compose("train", [f"experiment={name}", "budget=smoke"]).budget == "smoke"


def test_a_system_may_have_sizes_of_its_own():
    ours, theirs = (
        config.compose("train", [f"system={name}", "method=tabg", "budget=long"]) for name in ("hexapeptide", "aldp")
    )
    assert (ours.annealing.objective, theirs.annealing.objective) == ("path_kl", "log_variance")
    assert ours.generator.model == theirs.generator.model


def test_reverse_kl_costs_as_many_energies_as_annealing():
    tables = [(f"experiment=tabg/table_{p}", b) for p in ("tetrapeptide", "hexapeptide") for b in ("cpu", "paper")]
    for word, budget in [("system=aldp", "cpu"), ("system=two_moons", "cpu"), ("system=two_moons", "paper"), *tables]:
        words, row = [word, f"budget={budget}"], "experiment/tabg" if "table" in word else "experiment"
        first = "experiment/tabg=aldp_amber96" if "table" in word else "method=tabg"
        tabg, baseline = (
            config.compose("train", [*words, w])
            for w in (first, f"{row}={'' if 'table' in word else 'tabg/'}reverse_kl")
        )
        ladder = tabg.annealing
        between = ladder.repeat_between * (ladder.n_steps - 1)
        stages = ladder.n_steps + ladder.repeat_first + between + ladder.repeat_last
        fresh = ladder.fit.steps * ladder.batch_size if ladder.objective != "forward_kl" else 0
        energies = tabg.hot.fit.steps * tabg.hot.batch_size + stages * (ladder.n_draws + fresh)
        assert baseline.hot.fit.steps == pytest.approx(energies / baseline.hot.batch_size, abs=1)
        assert (baseline.annealing.n_steps, baseline.hot.objective) == (0, "reverse_kl")
        assert baseline.hot.temperature == baseline.system.temperature


def test_a_method_that_is_not_for_a_system_is_told_in_a_sentence():
    message = (
        r"method=tabg has no size for system=dipeptides \(a family\) with budget=cpu: .*size/tabg has molecule/cpu"
    )
    with pytest.raises(UserError, match=message):
        config.compose("train", ["method=tabg", "system=dipeptides", "budget=cpu"])


def test_systems_of_the_user(tmp_path):
    for name in ("mine", "a=b, c"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "aldp.yaml"
        text = (config.config_dir() / "system" / "two_moons.yaml").read_text()
        path.write_text(text.replace("name: two_moons", "name: mine"))
        for word in (f"system={path}", f"system='{path}'"):
            composed = config.compose("train", [word])
            assert (composed.system.name, composed.kind) == ("mine", "plane")
        assert load_system(path).name == "mine"


@pytest.mark.parametrize("sequence", ["NAN", "INF", "AK", "ACE-NAN-NME"])
def test_sequences_that_read_as_numbers(sequence):
    assert config.compose("train", [f"system={sequence}"]).system.structure == sequence
    assert config.compose("finetune", [f"peptide={sequence}"]).peptide == sequence


@pytest.mark.parametrize("path", ["seed=1,threads=1", "it's", "données (2)", "a b", '"'])
def test_paths_are_taken_as_they_stand(path):
    assert config.compose("sample", [f"run={path}"]).run == path
    assert config.compose("sample", [f"run={config.quoted(path)}"]).run == path


def test_only_what_is_wanted_is_called():
    for target in ("subprocess.getoutput", "os.system", "boltznce.networks.mlp", "no.such.Thing", "Thing"):
        with pytest.raises(UserError, match=rf"_target_={target} "):
            config.build({"_target_": target, "command": "touch called"})
    with pytest.raises(UserError, match="is not a System"):
        config.build({"_target_": "boltznce.networks.mlp.MLPEnergy"}, System)
    with pytest.raises(UserError, match="module of a method"):
        config.locate("subprocess", ModuleType)


NETWORK = """
from torch import nn
class MyNetwork(nn.Module):
    def __init__(self, n_atoms, dim, width):
        super().__init__()
        self.layer, self.width = nn.Linear(n_atoms * dim, n_atoms * dim), width
    def forward(self, x, t, features=None):
        return self.layer(x.flatten(1)).view_as(x)
"""


def test_networks_and_methods_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(NETWORK)
    (tmp_path / "my_method.py").write_text("STAGES = {}\n")
    (tmp_path / "network").mkdir()
    (tmp_path / "network" / "mine.yaml").write_text("_target_: my_module.MyNetwork\nwidth: 64\n")
    monkeypatch.syspath_prepend(tmp_path)
    custom = ["network@flow.network=custom", "flow.network._target_=my_module.MyNetwork", "+flow.network.width=64"]
    named = ["network@flow.network=mine", f"hydra.searchpath=[{tmp_path}]"]
    as_url = ["network@flow.network=mine", f"hydra.searchpath=[file://{tmp_path}]"]
    for words in (custom, named, as_url):
        composed = config.compose("train", ["budget=smoke", *words, "method._target_=my_method"])
        network = config.build(composed.flow.network, nn.Module, {"n_atoms": 22, "dim": 3, "bonds": ()})
        assert network.width == 64
        assert config.locate(composed.method._target_, ModuleType).STAGES == {}


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("sample", [], "run= is missing"),
        ("finetune", ["run=."], "peptide= is missing"),
        ("train", ["-m", "system=aldp,dipeptides", "method=tabg"], "method=tabg has no size for system=dipeptides"),
        ("train", ["-m", "seed=1,2", "system=nope"], "Unknown system 'nope'"),
        ("train", ["-m", "network@flow.network=custom,gvp", "seed=1"], r"flow.network._target_= is missing"),
        ("train", ["system=gaussians8", "budget=smoke", "hydra.run.dir=file/x"], "file/x: Not a directory"),
        ("train", ["resume=seed=1,threads=1"], "There is no run folder seed=1,threads=1"),
    ],
)
def test_mistakes_end_in_a_sentence_and_status_2(tmp_path, monkeypatch, capfd, script, words, message):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [script, *words])
    with pytest.raises(SystemExit) as ended:
        cli.launch(script, lambda composed: pytest.fail("it started"))
    assert ended.value.code == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.strip().splitlines()[-1].startswith("Error: ")


def test_importing_all_names_loads_nothing_that_only_runs_need():
    code = (
        "import sys, boltznce; [getattr(boltznce, name) for name in boltznce.__all__];"
        "print({'lightning_fabric', 'wandb', 'matplotlib', 'deeptime', 'ot'} & set(sys.modules), file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stderr.strip() == "set()"
