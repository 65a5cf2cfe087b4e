"""Settings that make no sense, each told in one sentence that names it before any work; and sensible ones, taken.

The long lists are `slow`: each composes a config and goes through what the scripts do before their first stage.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

import boltznce as bz
from boltznce import UserError, settings
from boltznce.analysis.reweighting import WeightedSamples
from boltznce.config import build, compose
from boltznce.data.simulate import plan, simulate
from boltznce.ebm import OBJECTIVES
from boltznce.flows.coupling import COUPLINGS
from boltznce.flows.interpolant import INTERPOLANTS
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.flows.solvers import SolverSettings
from boltznce.flows.spline_flow import ACTIVATIONS, ARCHITECTURES
from boltznce.methods.free_energy import write_free_energy
from boltznce.methods.preflight import preflight
from boltznce.networks.mlp import MLPVectorField
from boltznce.systems.encodings import ENCODINGS
from boltznce.training import FitSettings

SCRIPTS = Path(__file__).parents[1] / "scripts"

MOLECULE, PLANE = "system=aldp budget=smoke", "system=gaussians8 budget=smoke"
ENERGY, TWO_WELLS = "system=aldp method=tabg budget=smoke", "system=double_well budget=smoke"
FAMILY, DENSITY = "system=dipeptides budget=smoke", "system=checkerboard method=density budget=smoke"

# of train.py: what it is said beside -> settings, each of them wrong; the message names the last part of the key
WRONG = {
    PLANE: [
        *("seed=-1", "seed=1.5", "seed=one", "seed=null", "threads=0", "threads=-2", "threads=1.5", "device=gpux"),
        *("device=5", "device=cuda:x", "precision=31", "precision=32", "compile=maybe", "data_dir=''"),
        *("flow.fit.steps=-1", "flow.fit.steps=1.5", "flow.fit.steps=ten", "flow.fit.steps=null", "flow.fit.steps=1e3"),
        *("flow.fit.lr=0", "flow.fit.lr=-1e-3", "flow.fit.lr=nan", "flow.fit.lr=inf", "flow.fit.lr=null"),
        *("flow.fit.schedule=linear", "flow.fit.schedule=null", "flow.fit.warmup_steps=-1", "flow.fit.grad_clip=-1"),
        *("flow.fit.grad_clip=0", "flow.fit.ema_decay=1", "flow.fit.ema_decay=1.5", "flow.fit.ema_decay=-0.1"),
        *("+flow.fit.ema_every=0", "flow.fit.validate_every=-1", "flow.fit.checkpoint_every=-5"),
        *("+flow.fit.early_stopping_patience=0", "+flow.fit.weight_decay=-1", "+flow.fit.min_lr=-1"),
        *("+flow.fit.plateau_factor=2", "+flow.fit.keep_checkpoints=0", "+flow.fit.patience=3", "flow.fit=null"),
        *("flow.fit=5", "flow=null", "flow.batch_size=0", "flow.batch_size=-4", "flow.batch_size=2.5"),
        *("flow.batch_size=null", "flow.n_train=0", "flow.n_validation=0", "flow.n_train=null"),
        *("flow.solver.method=euler", "flow.solver.steps=-1", "flow.solver.steps=0", "flow.solver.steps=2.5"),
        *("flow.solver.grid_power=0", "+flow.solver.rtol=0", "+flow.solver.atol=-1", "+flow.solver.order=3"),
        *("flow.solver=heun", "flow.model.length_scale=0", "flow.model.interpolant=cubic", "flow.model.coupling=best"),
        *("flow.model.objective=noise", "flow.model.time_power=0", "flow.model.time_power=-1", "flow.model.whiten=1"),
        *("flow.model.whiten_floor=0", "+flow.model.t_min=1", "+flow.model.sigma=0.1", "flow.scales=mean"),
        *("flow.padded=null", "flow.molecules_per_step=0", "flow.max_padding=1", "flow.max_padding=-0.1"),
        *("flow.start=5", "flow.start=nowhere.safetensors", "flow.published_weights=nowhere.pt", "+flow.n_trian=5"),
        *("flow.network.width=0", "flow.network.width=-8", "flow.network.n_layers=0", "flow.network.n_octaves=1.5"),
        *("flow.network.fading=0", "+flow.network.depth=0", "+flow.network.dropout=0.1", "flow.network=null"),
        *("flow.network._target_=os.system", "flow.network._target_=boltznce.networks.none.Such"),
        *("flow.network._target_=null", "flow.balance.c=-1", "flow.balance=5", "+flow.balance={c: auto, weight: 3}"),
        *("data.n_samples=0", "data.n_samples=null", "data.split={train: 0.5, validation: 0.1, test: 0.1}"),
        *("data.split={train: 1.0, validation: 0.1, test: -0.1}", "+data.split.gap=0.5", "data.split.valid=0.1"),
        *("data.split=null", "data.folder=null", "data.split=0.8", "samples.n_train=0", "samples.n_validation=0"),
        *("samples.likelihood=ebm", "samples.likelihood=guess", "samples.n_probes=0", "samples.batch_size=0"),
        *("samples=null", "ebm.model.objective=all", "ebm.model.nce_weight=-1", "ebm.model.nce_width=0"),
        "ebm.model.contrast_weight=-1",
        *("ebm.model.n_negatives=0", "ebm.model.time_power=0", "ebm.model.t_read=2", "ebm.model.t_read=-0.1"),
        *("ebm.regression_weight=-1", "ebm.fit.steps=-3", "ebm.batch_size=0", "ebm.network.n_layers=0"),
        *(
            "evaluation.n_samples=0",
            "evaluation.n_samples=-5",
            "evaluation.n_exact=-1",
            "evaluation.n_correction=1.5",
            "evaluation.n_frames=-1",
            "evaluation.frames=mine",
            "evaluation.frames=refined evaluation.refine=null",
        ),
        *("evaluation.n_reference=0", "evaluation.batch_size=0", "evaluation.exact_batch_size=0", "evaluation=null"),
        *("evaluation.n_bootstrap=1", "evaluation.n_bootstrap=0", "evaluation.n_torus=0", "evaluation.tica_lag=-2"),
        *("system.temperature=0", "system.temperature=-1", "system.temperature=hot", "system.std=0"),
        *("system.length_scale=0", "system.box=[[1,-1],[0,1]]", "system.box=5", "system.weights=[1,-1]"),
        *("system.radius=-1", "system.state=[angle,[0,90]]", "system.state=[angle,[2,1]]", "system.state=[x,[1,0]]"),
        *("system.state=[z,[0,inf]]", "system.state=angle", "system.state=[angle]", "system.state=[angle,[0,null]]"),
        *("system.state=[[x,[0,1]],[z,[0,1]]]", "system.state=[{distance:[0,1]},[0,1]]", "system.state=[]"),
        *(
            "logger.kind=tensorboard",
            "+logger.mode=sometimes",
            "method._target_=os.path",
            "method=null",
            "budget=null",
            "system=5",
        ),
        # names of other sections, which nothing would read
        *("+lr=0.1", "+flow.lr=0.1", "++flow.steps=5", "+data.n_bins=3", "+ebm.duration=3", "+samples.width=4"),
        *("+evaluation.batch_sizes=[1]", "+method.seed=3", "+flow.model.temperature=300", "+flow.network.lr=1"),
        *("+system.lr=1", "+data.split.lr=0.1", "+flow.solver.lr=1", "+flow.balance.width=1", "+flow.fit.width=3"),
        *("+logger.seed=3", "+logger.folder=x"),
    ],
    MOLECULE: [
        *("system.state=[phi,[0,115]]", "system.state=[phi,[-180,0]]", "system.state=[phi,[2.0,0.0]]"),
        *("system.state=[phi,[100,102]]", "system.state=[chi,[0,2]]", "system.state=[phi,[nan,1]]"),
        *("system.state=[[phi,[0,2]],[psi,[0,115]]]", "system.state=[{distance:[0,0]},[0,1]]"),
        *("system.state=[{distance:[0,22]},[0,1]]", "system.state=[{linear:[[0.5,phi]]},[0,1]]"),
        *("system.state={_target_:nowhere.function}", "system.state=[chi1,[0,2]]"),
        *(
            "system.temperature=0",
            "system.nonbonded_method=PME",
            "system.cutoff_nm=1.0",
            "system.energy_backend=gromacs",
            "+system.implicit_solvent=PB",
        ),
        *("system.compile=perhaps", "system.forcefield=[none.xml]", "system.forcefield=amber99sbildn.xml"),
        *("system.structure=nowhere.pdb", "+system.n_workers=0", "+system.colour=red", "+system.encoding=atoms"),
        *("data.simulation.method=metropolis", "data.simulation.duration=0", "data.simulation.duration=-5"),
        *("data.simulation.n_repeats=0", "data.simulation.n_repeats=1.5", "data.simulation.engine=gromacs"),
        *("data.simulation.frame_interval=0", "data.simulation.frame_interval=0.3", "data.simulation.n_windows=5"),
        *("data.simulation.equilibration=-1", "data.simulation.segment_length=0", "data.simulation.kappa=0"),
        *("+data.simulation.timestep=0", "+data.simulation.timestep=0.5", "+data.simulation.hydrogen_mass=0"),
        *("+data.simulation.hydrogen_mass=-4", "+data.simulation.friction=0", "+data.simulation.platform=TPU"),
        *("+data.simulation.platform=HIP", "+data.simulation.dihedral=chi", "+data.simulation.n_walkers=0"),
        *(
            "+data.simulation.pressure=1",
            "+data.simulation.lr=1",
            "+data.simulation.n_processes=-1",
            "data.simulation=null",
        ),
        *("data.simulation=umbrella", "flow.balance.c=lots", "flow.balance.kappa=0", "flow.balance.mu=60"),
        *("+flow.balance.nu=1", "ebm.padded=true", "samples.likelihood=none", "flow.network.chiral=perhaps"),
        *("network@flow.network=graphormer", "network@ebm.network=gvp"),
        *(
            "flow.model.coupling=null",
            "flow.published_weights=x.pt",
            "flow.fit.schedule=plateau flow.fit.validate_every=0",
        ),
    ],
    "system=aldp budget=paper": ["ebm.network.n_heads=7", "ebm.network.n_types=0", "flow.network.cutoff=0"],
    ENERGY: [
        *("hot.temperature=0", "hot.temperature=200", "hot.objective=forward_kl", "annealing.objective=reverse_kl"),
        *("hot.batch_size=0", "hot.drop_highest=-1", "hot.drop_highest=100000", "hot.energy_cut=0", "hot.deviation=0"),
        *("hot.covering=-1", "hot.fit.steps=0", "hot.fit.schedule=plateau", "annealing.n_steps=-1"),
        *("annealing.n_steps=0", "annealing.repeat_first=-1", "annealing.repeat_last=0.5", "annealing.n_draws=0"),
        *("annealing.n_buffer=0", "annealing.clip=1", "annealing.clip=-0.1", "annealing.draw_batch_size=0"),
        *("annealing.last_lr=0", "annealing.fit.steps=0", "generator.model.n_pairs=0", "generator.model.n_bins=1"),
        *("generator.model.width=0", "generator.model.depth=0", "generator.model.activation=tanh"),
        *("generator.model.architecture=deep", "generator.model.prior_std=0", "generator.coordinates.fix_methyls=2"),
        *("generator.coordinates.temperature=0", "+generator.model.dropout=1", "+generator.coordinates.foo=1"),
        *(
            "+generator.width=3",
            "+generator.model.lr=1",
            "+generator.coordinates.lr=1",
            "+annealing.width=3",
            "+hot.lr=1",
        ),
        *("evaluation.n_ladder=0", "evaluation.clip=1.5", "data.split={train: 2, validation: 1, test: 0}"),
    ],
    "system=gaussians40 method=tabg budget=smoke": ["generator.box=null", "generator.box=[[1,0],[0,1]]"],
    TWO_WELLS: ["flow.balance={c: auto, kappa: 10.0, mu: null}", "system.barrier=-5", "system.stiffness=0"],
    FAMILY: [
        "ebm.model.contrast_weight=0.1",
        *("flow.scales=frames", "ebm.scales=frames", "system.selection=huge", "system.encoding=none"),
        *("data.simulation.n_replicas=1", "data.simulation.max_temperature=200", "system.n_places=0"),
        *(
            "system.selections.smoke.train=[]",
            "system.selections.smoke.test=[]",
            "system.selections.smoke.train=[AX]",
            "system.selections.smoke.train=AG",
        ),
        *("flow.padded=true", "flow.model.whiten=yes", "+data.simulation.test={foo: 1}", "data.simulation.n_ladders=0"),
    ],
    DENSITY: [
        *("evaluation.grid=1", "evaluation.grid=0", "ebm.n_validation=0", "ebm.batch_size=0", "system.cell=0"),
        *("system.cell=0.3", "ebm.fit.grad_clip=-1", "ebm.fit.steps=1.5", "ebm.padded=maybe", "ebm.network.width=1.5"),
    ],
}
OTHER_WRONG = {
    "simulate": [
        *("duration=0", "duration=long", "n_repeats=0", "n_processes=-1", "n_processes=0", "engine=none", "seed=-1"),
        *("sampling=metropolis", "+settings.timestep=0.5", "+settings.hydrogen_mass=0", "+settings.n_windows=7"),
        *(
            "+settings.kappa=-1",
            "+settings.foo=1",
            "+settings.hill_interval=0.03",
            "+settings.bias_factor=1",
            "+settings.bias_along=[phi,psi,omega1]",
            "reference=maybe",
            "settings=5",
        ),
        *("system.state=[phi,[0,115]]", "duration=2.5 +settings.segment_length=1"),
        *("+lr=1", "+settings.lr=1"),
    ],
    "sample": [
        *("n_samples=0", "n_samples=-1", "n_samples=1.5", "n_samples=1e4", "likelihood=guess", "n_probes=0", "seed=-1"),
        *("batch_size=0", "batch_size=-3", "format=pdb", "device=none", "n_samples=many", "+lr=1"),
    ],
    "free_energy": [
        *("n_bins=0", "n_bins=1.5", "n_bootstrap=1", "n_bootstrap=-1", "seed=x", "state=5", "state=[0]", "state=[0,x]"),
        *("state=[0,115]", "state=[2,0]", "coordinate=[phi]", "coordinate=chi", "+width=3"),
        *("coordinate={distance:[0]}", "coordinate={length:[0,1]}", "coordinate={distance:[0,22]}", "versus=5"),
        *("coordinate=phi state=[[0,1],[0,1]]", "versus=[0,115]", "coordinate=[phi,psi] state=[0,1]"),
    ],
    "import": [
        *("stride=0", "stride=1.5", "temperature=0", "temperature=-300", "temperature=hot", "length_unit=inch"),
        *("length_unit=0", "files=[]", "files=[1]", "key=[x]", "key=3", "+lr=1"),
    ],
    "finetune": [
        *("settings.finetune.ebm_steps=-1", "settings.finetune.flow_steps=1.5", "settings.finetune.lr=0"),
        *("settings.samples.n_train=0", "settings=null", "settings.finetune.split.train=2"),
    ],
    "benchmark": [
        "what=speed",
        "min_seconds=0",
        "threads=0",
        "energy.batch_sizes=[0]",
        "energy.dtype=int8",
        "energy=5",
        "likelihood=5",
        "likelihood.n=0",
        "likelihood.n_probes=[0]",
        "likelihood.solvers=[heun]",
        "likelihood.solvers.dopri5.method=euler",
        "likelihood.finest.steps=0",
        "free_energy=5",
        "free_energy.n_walkers=0",
        "free_energy.simulations.metadynamics.method=anneal",
        "free_energy.simulations.metadynamics.n_repeats=0",
        "run=5",
        "trust=maybe",
    ],
}
SENSIBLE = {
    PLANE: [
        *("flow.fit.grad_clip=null", "seed=0", "threads=1", "flow.balance=null", "evaluation.n_exact=0", "device=cpu"),
        *("flow.fit.ema_decay=null", "flow.fit.ema_decay=0", "flow.fit.warmup_steps=0", "flow.fit.validate_every=0"),
        *("flow.fit.steps=0", "ebm.fit.steps=0", "evaluation.n_reference=1000", "flow.fit.lr=1", "compile=false"),
        *("flow.molecules_per_step=null", "ebm.regression_weight=0", "+data.split.gap=0.005", "system.state=null"),
        *("flow.solver.method=dopri5", "flow.model.time_power=1", "precision=64-true"),
        *("flow.balance={c: auto, kappa: 10.0, mu: null}", "flow.balance={c: 0, kappa: 1, mu: -3}"),
        *("network@flow.network=mlp", "network@ebm.network=mlp_energy", "+flow.fit.early_stopping_patience=3"),
        *(
            "system.state=[angle,[3.0,4.0]]",
            "system.state=[x,[0,1]]",
            "system.state=[[x,[0,1]],[y,[-0.5,0.5]]]",
            "system.state=[{linear:[[1,x],[0.5,y]]},[-0.5,0.5]]",
            "system.state=[x,[-inf,0]]",
            "ebm.model.t_read=0.001",
            "system.temperature=2",
        ),
    ],
    MOLECULE: [
        *("system.state=null", "system.state=[psi,[2.0,4.0]]", "+data.simulation.hydrogen_mass=null"),
        *("system.state=[{distance:[[1,C],[3,N]]},[0.2,0.35]]", "system.state=[{angle:[0,4,6]},[0.5,1.5]]"),
        "system.state=[[phi,[0,2]],[psi,[-2,0.8]]]",
        *("+data.simulation.timestep=0.0005", "data.simulation.method=langevin", "flow.balance.mu=-1.0"),
        *("data.simulation.equilibration=0", "system.temperature=310", "+system.cutoff_nm=null"),
        *(
            "flow.network.chiral=false",
            "flow.scales=conformers ebm.model.contrast_weight=0",
            "system.energy_backend=openmm",
            "flow.model.whiten=false",
        ),
    ],
    ENERGY: ["annealing.clip=0", "hot.drop_highest=0", "generator.model.prior_std=null", "data.folder=null"],
}


def told(script: str, words: str, given: Path, folder: Path) -> None:
    """What a script does with its settings before its first work."""
    overrides = _split(words)
    if script == "train":
        if not any(word.startswith(("data_dir=", "data.folder=")) for word in overrides):
            overrides.append(f"data_dir={folder}")
        preflight(compose("train", overrides))
    elif script == "simulate":
        config = compose("simulate", [f"data_dir={folder}", *overrides])
        chosen = {key: config[key] for key in ("duration", "n_repeats", "engine", "seed")}
        plan(
            build(config.system), folder / "data", config.sampling, **chosen, **OmegaConf.to_container(config.settings)
        )
    elif script == "free_energy":
        config = compose("free_energy", [f"run={given}", *overrides])
        plain = OmegaConf.to_container(config)
        own = {key: plain[key] for key in ("coordinate", "state", "versus", "n_bins", "n_bootstrap", "seed")}
        write_free_energy(bz.load_system("aldp"), folder, folder, **own)
    else:
        more = {"finetune": [f"run={given}", "peptide=KS"], "sample": [f"run={given}"]}.get(script, [])
        more += ["files=x.xtc", "temperature=300"] if script == "import" else []
        compose(script, [*more, *overrides])


def _split(words: str) -> list[str]:
    """Overrides of a line: a blank inside of {…} ends none."""
    found, depth = [""], 0
    for letter in words:
        depth += (letter == "{") - (letter == "}")
        if letter == " " and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found


def name_of(words: str) -> str:
    key = words.split("=", 1)[0].lstrip("+").removeprefix("network@")
    return key.rpartition(".")[2]


# ---- fast -----------------------------------------------------------------------------------------------------------


def test_every_shipped_setting_has_a_rule():
    """Of train.py: see test_config, which composes them all."""
    for script, words in (
        *((script, "run=x") for script in ("sample", "free_energy")),
        ("finetune", "run=x peptide=KS"),
        ("benchmark", ""),
        ("simulate", "system=aldp"),
        ("import", "system=aldp files=x.xtc temperature=300"),
    ):
        assert settings.without_rule(compose(script, words.split()), script) == []


@pytest.mark.parametrize(
    ("name", "told"), [("+lr=1", "'lr'"), ("++flow.lr=1", "'flow.lr'"), ("+flow.fit=3", "flow.fit")]
)
def test_a_plus_adds_nothing_that_nobody_reads(name, told):
    with pytest.raises(UserError, match=told):
        compose("train", [*PLANE.split(), name])


def test_a_plus_adds_keywords_choices_and_what_a_method_of_the_users_reads():
    words = [*PLANE.split(), "++flow.batch_size=7", "+flow.fit.weight_decay=0.1", "+network@ebm.second=mlp"]
    config = compose("train", words)
    assert (config.flow.batch_size, config.flow.fit.weight_decay, "second" in config.ebm) == (7, 0.1, True)
    assert compose("train", [*PLANE.split(), "method._target_=mine", "+flow.mine=3"]).flow.mine == 3


def test_names_are_those_of_the_library():
    for setting, names in {
        "coupling": COUPLINGS,
        "interpolant": INTERPOLANTS,
        "ebm.model.objective": OBJECTIVES,
        "architecture": ARCHITECTURES,
        "activation": ACTIVATIONS,
        "encoding": ENCODINGS,
    }.items():
        assert all(settings.rule_of(setting).fits(name) for name in names)
        assert not settings.rule_of(setting).fits("another")


@pytest.mark.parametrize(
    ("path", "value", "fits"),
    [
        *(("flow.fit.grad_clip", value, True) for value in (1, 2.5, None, np.float32(2))),
        *(("flow.fit.grad_clip", value, False) for value in (0, -1, np.nan, True, "1")),
        *(("n_probes", value, type(value) is int and value == 3) for value in (3, 0, 3.0, True, np.nan, "3")),
        *(("flow.model.whiten", value, value is False) for value in (False, 0, "false", None)),
        *(("flow.balance.c", value, value != "most") for value in ("auto", 0, 150.0, "most")),
        ("flow.fit.steps", np.int64(0), True),
        ("flow.solver.steps", 0, False),
        ("evaluation", None, False),
        ("flow.balance", None, True),
    ],
)
def test_rules(path, value, fits):
    if fits:
        settings.check({path: value})
    else:
        with pytest.raises(UserError, match=path.rpartition(".")[2]):
            settings.check({path: value})


def test_settings_of_classes_of_the_user_are_her_own():
    settings.check({"flow": {"network": {"_target_": "my_module.MyNetwork", "width": [64, 64], "cutoff": None}}})
    with pytest.raises(UserError, match="width"):
        settings.check({"flow": {"network": {"_target_": "boltznce.networks.mlp.MLPVectorField", "width": [64, 64]}}})


FLOW = InterpolantFlow(MLPVectorField(width=8, n_blocks=1), n_atoms=1, dim=2, centred=False)
ANGLES = np.linspace(-3, 3, 100)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: bz.free_energy_difference(ANGLES, n_bootstrap=1), "n_bootstrap=1"),
        (lambda: bz.free_energy_difference(ANGLES, state=None), "state=null"),
        (lambda: bz.free_energy_difference(np.degrees(ANGLES)), "radians"),
        (lambda: bz.free_energy_difference(ANGLES, state=(0, 115)), "radians"),
        (lambda: bz.free_energy_profile(np.degrees(ANGLES)), "radians"),
        (lambda: bz.free_energy_profile(ANGLES, n_bins=0), "n_bins=0"),
        (lambda: bz.load_system("two_moons", state=["angle", [0, 90]]), "in degrees would be"),
        (lambda: bz.load_system("two_moons", box=[[1, 0], [0, 1]]), "box"),
        (lambda: bz.load_system("two_moons").sample(-1), "n=-1"),
        (lambda: bz.load_system("two_moons").at_temperature(0), "temperature=0"),
        (lambda: simulate(None, Path("nowhere"), duration=1.0, n_processes=-1), "n_processes=-1"),
        (lambda: FLOW.sample(4, n_probes=0, likelihood="hutchinson"), "n_probes=0"),
        (lambda: FLOW.sample(4, batch_size=0), "batch_size=0"),
        (lambda: FLOW.sample(-4), "n_samples=-4"),
        (lambda: SolverSettings(steps=-1), "steps=-1"),
        (lambda: FitSettings(steps=10, grad_clip=-1), "grad_clip=-1"),
        (
            lambda: WeightedSamples(np.zeros((3, 1, 2)), [0, 0, 0], [0, 0, 0]).resample(0, np.random.default_rng()),
            "n=0",
        ),
    ],
)
def test_python_callers_are_told_too(call, name):
    with pytest.raises(UserError, match=name):
        call()


def test_no_state():
    for name in ("aldp", "two_moons", "double_well"):
        assert bz.load_system(name, state=None).state is None
    assert bz.load_system("double_well", state=None).mode_weights is None
    assert bz.load_system("double_well", state=None).reference() is None


def test_half_lines_are_no_angles():
    assert bz.free_energy_difference(np.degrees(ANGLES), state=(0, np.inf)).value == 0


def test_a_mistake_is_told_before_the_folder_is_made(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").touch()
    for more, message in (
        ("network@flow.network=mlp_energy", "choose a vector field"),
        (f"data.folder={tmp_path / 'data'}", "no meta.yaml"),
    ):
        with pytest.raises(UserError, match=message):
            bz.train_run(tmp_path / "run", *TWO_WELLS.split(), f"data_dir={tmp_path / 'new'}", more)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# ---- slow -----------------------------------------------------------------------------------------------------------

# What the sentence says of settings that it names in other words, or of two that do not go together
EXPLAINED = {
    "system.weights=[1,-1]": "a positive weight",
    "system.forcefield=[none.xml]": "The force field none.xml",
    "annealing.n_steps=0": "A temperature ladder goes down",
    "system.state=[chi,[0,2]]": "no dihedral 'chi'",
    "system.selections.smoke.train=[AX]": "X in 'AX'",
    "coordinate={distance:[0,22]}": "aldp has no atom 22",
    "coordinate=chi": "no dihedral 'chi'",
    "system.state=[z,[0,inf]]": "no coordinate 'z'",
    "system.state=[[x,[0,1]],[z,[0,1]]]": "no coordinate 'z'",
    "system.state=[{distance:[0,1]},[0,1]]": "has no atoms for a distance",
    "system.state=[{distance:[0,22]},[0,1]]": "aldp has no atom 22",
    "system.state=[{linear:[[0.5,phi]]},[0,1]]": "give whole factors",
    "system.state=[chi1,[0,2]]": "no dihedral 'chi1'",
    "versus=[0,115]": "degrees",
}

ALL_WRONG = [("train", words, each) for words, several in WRONG.items() for each in several]
ALL_WRONG += [(script, "", each) for script, several in OTHER_WRONG.items() for each in several]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "words", "wrong"), ALL_WRONG)
def test_wrong_settings(script, words, wrong, tmp_path):
    with pytest.raises(UserError) as caught:
        told(script, f"{words} {wrong}".strip(), tmp_path, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert name_of(wrong) in message or wrong in EXPLAINED, f"does not name it: {message}"
    assert EXPLAINED.get(wrong, "") in message


@pytest.mark.slow
@pytest.mark.parametrize(("words", "right"), [(words, each) for words, several in SENSIBLE.items() for each in several])
def test_sensible_settings(words, right, tmp_path):
    told("train", f"{words} {right}", tmp_path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("train.py system=aldp system.state=[phi,[0,115]]", "degrees"),
        ("train.py system=gaussians8 flow.fit.grad_clip=-1", "flow.fit.grad_clip=-1"),
        ("train.py -m system=gaussians8 flow.fit.steps=10,-1", "flow.fit.steps=-1"),
        ("train.py system=gaussians8 network@flow.network=mlp_energy", "vector field"),
        ("train.py experiment=nope", "tabg/aldp"),
        ("train.py ~flow.fit.steps", "flow.fit.steps"),
        ("train.py data_dir=afile", "afile is a file"),
        ("simulate.py n_processes=-1", "n_processes=-1"),
        ("simulate.py +settings.timestep=0.5", "timestep=0.5"),
        ("import.py files=x.dcd", "temperature= is missing"),
        ("sample.py n_probes=0 run=.", "n_probes=0"),
        ("free_energy.py n_bootstrap=1 run=.", "n_bootstrap=1"),
        ("finetune.py run=.", "peptide= is missing"),
        ("benchmark.py what=speed", "choose one of energy, network, spline"),
    ],
)
def test_commands(command, name, tmp_path):
    (tmp_path / "afile").touch()
    script, *words = command.split()
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert name in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().count("\n") == 0


FEW = {
    "density": "ebm.fit.steps=3 ebm.n_validation=64 ebm.batch_size=32 evaluation.grid=30",
    "tabg": "hot.fit.steps=2 annealing.n_steps=1 annealing.fit.steps=2 annealing.n_draws=200 evaluation.n_ladder=100",
    "forward_kl": "flow.fit.steps=4 flow.fit.warmup_steps=1 flow.n_train=500 flow.n_validation=100 data.n_samples=1000",
    "fab": "fab.fit.steps=3 fab.min_batches=1",
    "tbg": "flow.fit.steps=3 flow.n_train=500 flow.n_validation=64 data.n_samples=1000 flow.solver.steps=4",
}
FEW["boltznce"] = FEW["tbg"] + " samples.n_train=200 samples.n_validation=64 ebm.fit.steps=3"
EVALUATION = "evaluation.n_samples=200 evaluation.n_torus=50 evaluation.n_bootstrap=20 evaluation.n_reference=200"


@pytest.mark.slow
@pytest.mark.parametrize("method", FEW)
def test_no_state_is_a_run_without_a_free_energy(method, tmp_path):
    words = f"system=double_well system.state=null method={method} budget=smoke threads=1 {FEW[method]}"
    words += "" if method == "density" else f" {EVALUATION}"
    run = bz.train_run(tmp_path / "run", *words.split(), f"data_dir={tmp_path}")
    assert "free_energy" not in run.metrics
    assert (run.path / "report.md").exists()
    if method != "density":
        assert run.metrics["ess"]
        assert len(run.sample(10)) == 10
