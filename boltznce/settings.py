"""What every setting must be: one table from its name to a rule, for configs and for what Python callers pass.

A setting goes by the last part of its name, which means the same in every section, or where it does not by its last two
(``fit.steps``, ``solver.steps``). Sections of classes that are not the library's own (``_target_``) are left alone.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from boltznce.errors import UserError

__all__ = ["check", "leaves", "require", "require_keywords", "rule_of", "without_rule"]


class Rule(NamedTuple):
    """``must`` ends the sentence "… must be"; ``names``: all there are, where it is a choice of them."""

    must: str
    fits: Callable[[Any], bool]
    names: tuple[str, ...] = ()

    def __or__(self, other: "Rule") -> "Rule":
        return Rule(f"{self.must} or {other.must}", lambda value: self.fits(value) or other.fits(value))


def _whole(least: int, most: float = math.inf) -> Rule:
    must = f"a whole number, {least} or more" if math.isinf(most) else f"a whole number from {least} to {most}"
    return Rule(must, lambda value: _is(value, Integral) and least <= value <= most)


def _number(must: str, fits: Callable[[float], bool]) -> Rule:
    return Rule(must, lambda value: _is(value, Real) and math.isfinite(value) and fits(value))


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _one_of(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda value: value in names, names)


def _list_of(rule: Rule, what: str, most: float = math.inf) -> Rule:
    def fits(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) <= most and all(map(rule.fits, value))

    return Rule(f"a list of {what}", fits)


def _is_interval(value: Any, infinite: bool = False) -> bool:
    """Two numbers; `boltznce.states` says which intervals are states."""
    ends = isinstance(value, list | tuple) and len(value) == 2 and all(_is(end, Real) for end in value)
    return ends and (infinite or (all(map(math.isfinite, value)) and value[0] < value[1]))


def _is_list(value: Any, length: int | None = None) -> bool:
    return isinstance(value, list | tuple) and len(value) == (length or len(value)) > 0


def _is_atom(value: Any) -> bool:
    """Its number, from 0 on, or the number of its residue and its name in it."""
    named = _is_list(value, 2) and _is(value[0], Integral) and TEXT.fits(value[1])
    return named or (_is(value, Integral) and value >= 0)


def _atoms(number: int) -> Rule:
    must = f"a list of {number} different atoms, each a number from 0 on, or a residue's number and a name, as [1, CA]"
    return Rule(must, lambda value: _is_list(value, number) and all(map(_is_atom, value)) and not _repeats(value))


def _repeats(value: Any) -> bool:
    return len({str(each) for each in value}) < len(value)


def _is_function(value: Any) -> bool:
    """Python's own, or its path in a config."""
    return callable(value) or (isinstance(value, Mapping) and TEXT.fits(value.get("_target_")))


def _is_coordinate(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return TEXT.fits(value) or callable(value)
    if "_target_" in value:
        return all(key in FUNCTION and FUNCTION[key].fits(each) for key, each in value.items())
    return len(value) == 1 and all(key in GEOMETRY and GEOMETRY[key].fits(each) for key, each in value.items())


def _is_term(value: Any) -> bool:
    return _is_list(value, 2) and NUMBER.fits(value[0]) and _is_coordinate(value[1])


def _is_side(value: Any) -> bool:
    return _is_list(value, 2) and _is_coordinate(value[0]) and _is_interval(value[1], True)


def _is_state(value: Any) -> bool:
    value = getattr(value, "sides", value)  # of a `boltznce.states.State`
    return _is_function(value) or _is_side(value) or (_is_list(value) and all(map(_is_side, value)))


COUNT, WHOLE = _whole(1), _whole(0)
POSITIVE = _number("a positive number", lambda value: value > 0)
NOT_NEGATIVE = _number("a number, 0 or more", lambda value: value >= 0)
NUMBER = _number("a number", lambda value: True)
SHARE = _number("a share, from 0 up to but not 1", lambda value: 0 <= value < 1)
PART = _number("a part, from 0 to 1", lambda value: 0 <= value <= 1)
INSIDE = _number("a number between 0 and 1", lambda value: 0 < value < 1)
BOOLEAN = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a name", lambda value: isinstance(value, str) and value.strip() != "")
PATH = Rule("a path (in quotes, if it reads as something else)", TEXT.fits)
NULL = Rule("null", lambda value: value is None)
AUTO = Rule("auto", lambda value: value == "auto")
COMPILE = Rule("auto, true or false", lambda value: isinstance(value, bool) or value in ("auto", "true", "false"))
TEXTS = _list_of(TEXT, "names")
PATHS = Rule(
    "a path, or a list of paths",
    lambda value: PATH.fits(value) or (isinstance(value, list | tuple) and bool(value) and all(map(PATH.fits, value))),
)
BOX = Rule(
    "[[x low, x high], [y low, y high]]",
    lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_interval, value)),
)
INTERVAL = Rule("an interval in radians, as [0.0, 2.0]", lambda value: _is_interval(value, True))
INTERVALS = Rule(
    "an interval of the coordinate, as [0.0, 2.0], or a list of one for each coordinate",
    lambda value: _is_interval(value, True) or (_is_list(value) and all(_is_interval(each, True) for each in value)),
)
COORDINATE = Rule(
    "a coordinate: a name such as phi or chi1_2, {distance: [0, 5]}, {angle: ...}, {dihedral: ...}, "
    "{linear: [[1.0, ...], ...]}, or {_target_: my_module.my_function}",
    _is_coordinate,
)
COORDINATES = Rule("a list of two", lambda value: _is_list(value, 2) and all(map(_is_coordinate, value)))
STATE = Rule(
    "a coordinate and its interval, as [phi, [0.0, 2.0]], a list of such pairs, or {_target_: my_module.my_function}",
    _is_state,
)
GEOMETRY = {
    "distance": _atoms(2),
    "angle": _atoms(3),
    "dihedral": _atoms(4),
    "linear": Rule(
        "a list of [factor, coordinate]",
        lambda value: (
            _is_list(value)
            and all(_is_list(part, 2) and NUMBER.fits(part[0]) and _is_coordinate(part[1]) for part in value)
        ),
    ),
}
FUNCTION = {"_target_": TEXT, "periodic": BOOLEAN, "unit": Rule("a unit, as nm", lambda value: isinstance(value, str))}
SECTION = Rule("a section, with the settings that --cfg job prints", lambda value: isinstance(value, Mapping))
DEVICE = Rule(
    "auto, cpu, cuda, cuda:1 (a number) or mps",
    lambda value: (
        isinstance(value, str)
        and value.partition(":")[0] in ("auto", "cpu", "cuda", "gpu", "mps", "tpu")
        and (":" not in value or value.partition(":")[2].isdigit())
    ),
)
PAIR = _list_of(TEXT, "one or two names of dihedrals", 2)
SAMPLING = _one_of("auto", "metadynamics", "umbrella", "replica_exchange", "langevin")
SOLVER = _one_of("dopri5", "heun", "rk4")
LONGEST_TIMESTEP = 0.05  # ps: the stiffest bonds swing in less

# in which all is known
SECTIONS = ("flow", "ebm", "data", "samples", "evaluation", "generator", "hot", "annealing", "fab")

RULES: dict[str, Rule] = {
    # ---- a run
    "seed": _whole(0, 2**63 - 1),
    "mask_seed": _whole(0, 2**63 - 1),
    "device": DEVICE,
    "precision": _one_of("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"),
    "devices": COUNT,
    "num_nodes": COUNT,
    "strategy": _one_of("auto", "ddp"),
    "minimize": TEXT | NULL,
    "compile": COMPILE,
    "threads": COUNT | NULL,
    "data_dir": PATH,
    "resume": PATH | NULL,
    "trust": BOOLEAN,
    "budget": TEXT,
    "kind": _one_of("molecule", "plane", "family"),
    "logger.kind": _one_of("csv", "wandb", "tensorboard"),
    "figures.also": _list_of(_one_of("pdf", "svg"), "pdf, svg"),
    "figures.style": PATH | NULL,
    "project": TEXT,
    "mode": _one_of("online", "offline", "disabled") | NULL,
    "name": TEXT,
    "_target_": TEXT,
    # ---- systems
    "structure": PATH,
    "forcefield": _list_of(TEXT, "force-field files"),
    "temperature": POSITIVE,
    "nonbonded_method": _one_of("NoCutoff", "CutoffNonPeriodic"),
    "cutoff_nm": POSITIVE | NULL,
    "implicit_solvent": _one_of("HCT", "OBC1", "OBC2", "GBn", "GBn2") | NULL,
    "system.state": STATE | NULL,
    "encoding": _one_of("elements", "backbone", "full", "numbered") | NULL,
    "n_places": COUNT,
    "energy_backend": _one_of("torch", "openmm", "xtb"),
    "n_workers": COUNT | NULL,
    "selection": TEXT,
    "selections.*.train": TEXTS,
    "selections.*.validation": TEXTS,
    "selections.*.test": TEXTS,
    "never_trained": TEXTS,
    "box": BOX,
    "generator.box": BOX | NULL,
    "length_scale": POSITIVE,
    "std": POSITIVE,
    "radius": POSITIVE,
    "half_width": POSITIVE,
    "cell": POSITIVE,
    "barrier": POSITIVE,
    "stiffness": POSITIVE,
    "tilt": NUMBER,
    "n_modes": COUNT,
    "weights": _list_of(NUMBER, "numbers") | NULL,
    # ---- data
    "folder": PATH | NULL,
    "accept": _one_of("same", "any"),
    "packed": PATH | NULL,
    "packed.file": PATH | NULL,
    "packed.n_frames": COUNT,
    "split": SECTION | NULL,
    "split.train": PART,
    "split.validation": PART,
    "split.test": PART,
    "gap": SHARE,
    "data.simulation": SECTION | NULL,
    "sampling": SAMPLING,
    "simulation.method": SAMPLING,
    "simulations.*.method": SAMPLING,
    "duration": POSITIVE | NULL,
    "n_repeats": COUNT,
    "n_processes": COUNT | NULL,
    "engine": _one_of("openmm", "torch", "auto"),
    "dihedral": TEXT | NULL,
    "frame_interval": POSITIVE,
    "equilibration": NOT_NEGATIVE,
    "segment_length": POSITIVE,
    "timestep": _number(f"a positive number of ps, at most {LONGEST_TIMESTEP}", lambda dt: 0 < dt <= LONGEST_TIMESTEP),
    "friction": POSITIVE,
    "hydrogen_mass": _number("a number of amu, 1 or more", lambda value: value >= 1) | NULL,
    "platform": TEXT,
    "n_windows": Rule(
        "an even whole number, 4 or more", lambda value: _is(value, Integral) and value >= 4 and value % 2 == 0
    ),
    "kappa": POSITIVE,
    "exchange_interval": POSITIVE,
    "n_replicas": _whole(2),
    "max_temperature": POSITIVE,
    "n_ladders": COUNT,
    "n_walkers": COUNT | NULL,
    "bias_along": PAIR | _list_of(PAIR, "such lists") | NULL,
    "bias_duration": POSITIVE,
    "hill_interval": POSITIVE,
    "hill_height": POSITIVE,
    "hill_width": POSITIVE,
    "bias_factor": _number("a number above 1", lambda value: value > 1),
    "n_terms": COUNT,
    "start_temperature": POSITIVE,
    "reference": BOOLEAN,
    # ---- trajectories made elsewhere
    "files": PATHS,
    "topology": PATH | NULL,
    "stride": COUNT,
    "import.weights": PATH | NULL,
    "bias": PATH | NULL,
    "import.energies": PATH | NULL,
    "key": TEXT | NULL,
    "length_unit": Rule("nm, angstrom or a positive number of nm", lambda value: value in ("nm", "angstrom"))
    | POSITIVE,
    # ---- networks and models
    "width": COUNT,
    "ffn_width": COUNT,
    "embedding_width": COUNT,
    "depth": COUNT,
    "n_layers": COUNT,
    "n_blocks": COUNT,
    "n_rounds": COUNT,
    "n_octaves": COUNT,
    "n_heads": COUNT,
    "n_kernels": COUNT,
    "n_scalars": COUNT,
    "n_vectors": COUNT,
    "n_types": COUNT | NULL,
    "attention": BOOLEAN,
    "chiral": BOOLEAN,
    "fading": POSITIVE,
    "cutoff": POSITIVE,
    "message_scale": POSITIVE,
    "longest_step": POSITIVE,
    "coordinate_range": POSITIVE,
    "scales": _one_of("frames", "conformers"),
    "interpolant": _one_of("linear", "trig"),
    "coupling": _one_of("independent", "ot", "kabsch", "ot_kabsch"),
    "flow.model.objective": _one_of("velocity", "endpoint"),
    "ebm.model.objective": _one_of("both", "nce", "score"),
    "endpoint_weight_max": POSITIVE | NULL,
    "time_power": POSITIVE,
    "t_min": SHARE,
    "whiten": BOOLEAN,
    "whiten_floor": POSITIVE,
    "nce_weight": NOT_NEGATIVE,
    "nce_width": POSITIVE,
    "n_negatives": COUNT,
    "contrast_weight": NOT_NEGATIVE,
    "clip_negatives": BOOLEAN,
    "t_read": SHARE,
    "regression_weight": NOT_NEGATIVE,
    "start": PATH | NULL,
    "published_weights": PATH | NULL,
    "padded": BOOLEAN,
    "molecules_per_step": COUNT | NULL,
    "rows_per_molecule": COUNT,
    "max_padding": SHARE,
    "n_train": COUNT,
    "n_validation": COUNT,
    "batch_size": COUNT,
    "balance": SECTION | NULL,
    "balance.c": NOT_NEGATIVE | AUTO,
    "balance.kappa": POSITIVE | NULL,
    "balance.mu": _number("an angle in radians, from -2π to 2π", lambda value: abs(value) <= 2 * math.pi) | NULL,
    **dict.fromkeys(("solver.method", "solvers.*.method", "finest.method", "hutchinson.method"), SOLVER),
    "solver.steps": COUNT,
    "rtol": POSITIVE,
    "atol": POSITIVE,
    "grid_power": POSITIVE,
    # ---- spline flows and the ladder of temperatures
    "fix_chirality": BOOLEAN,
    "fix_methyls": BOOLEAN,
    "architecture": _one_of("random", "hierarchical"),
    "activation": _one_of("relu", "silu"),
    "n_pairs": COUNT,
    "n_bins": _whole(2),
    "prior_std": POSITIVE | NULL,
    "hot.objective": _one_of("reverse_kl", "log_variance", "path_kl"),
    "annealing.objective": _one_of("forward_kl", "log_variance", "path_kl"),
    "drop_highest": WHOLE,
    "energy_cut": POSITIVE,
    "deviation": POSITIVE,
    "covering": NOT_NEGATIVE,
    "n_steps": WHOLE,
    "repeat_first": WHOLE,
    "repeat_between": WHOLE,
    "repeat_last": WHOLE,
    "n_intermediate": WHOLE,
    "n_updates": COUNT,
    "min_batches": COUNT,
    "max_batches": COUNT,
    "max_adjustment": POSITIVE,
    "n_draws": COUNT,
    "n_buffer": COUNT,
    "last_lr": POSITIVE | NULL,
    "clip": SHARE,
    "draw_batch_size": COUNT,
    # ---- training
    "fit.steps": WHOLE,
    "steps": COUNT,
    "lr": POSITIVE,
    "schedule": _one_of("constant", "cosine", "plateau"),
    "warmup_steps": WHOLE,
    "min_lr": NOT_NEGATIVE,
    "plateau_factor": INSIDE,
    "plateau_patience": WHOLE,
    "weight_decay": NOT_NEGATIVE,
    "grad_clip": POSITIVE | NULL,
    "ema_decay": SHARE | NULL,
    "ema_every": COUNT,
    "log_every": WHOLE,
    "validate_every": WHOLE,
    "early_stopping_patience": COUNT | NULL,
    "checkpoint_every": WHOLE,
    "keep_checkpoints": COUNT,
    "flow_steps": WHOLE,
    "ebm_steps": WHOLE,
    # ---- samples, evaluation, free energies
    "run": PATH,
    "parent": SECTION | NULL,
    "parent.trained_on": TEXTS,
    "parent.notes": _list_of(TEXT, "sentences"),
    "parent.costs": SECTION,
    "costs.cpu_seconds": NUMBER,
    "costs.seconds": NUMBER,
    "sample.report": COMPILE,
    "output": PATH | NULL,
    "free_energy.samples": PATH | NULL,
    "peptide": TEXT,
    "n": COUNT,
    "n_samples": COUNT,
    "likelihood": _one_of("auto", "ebm", "exact", "hutchinson", "none"),
    "samples.likelihood": _one_of("hutchinson", "exact", "none"),
    "n_probes": COUNT,
    "sample.batch_size": COUNT | NULL,
    "format": _one_of("npy", "dcd", "xtc"),
    "coordinate": COORDINATE,
    "free_energy.coordinate": COORDINATE | COORDINATES | NULL,
    **{f"coordinate.{name}": rule for name, rule in GEOMETRY.items()},
    "state": INTERVAL,
    "free_energy.state": INTERVALS | STATE | NULL,
    "free_energy.versus": INTERVALS | STATE | NULL,
    "n_bootstrap": _whole(2),
    "confidence": INSIDE,
    "n_exact": WHOLE,
    "n_correction": WHOLE,
    "n_frames": WHOLE,
    "frames": _one_of("data", "refined"),
    "n_ladder": COUNT,
    "n_reference": COUNT | NULL,
    "n_torus": COUNT,
    "exact_batch_size": COUNT,
    "divergence_every": COUNT,
    "tica_lag": COUNT | NULL,
    "grid": _whole(2),
    # ---- refinement
    "cess": INSIDE,
    "first_cess": INSIDE,
    "resample_below": PART,
    "n_moves": COUNT,
    "final_moves": WHOLE,
    "n_leapfrog": COUNT,
    "step_size": POSITIVE,
    "acceptance": INSIDE,
    "max_steps": COUNT,
    "refine.n_walkers": COUNT,
    "evaluation.refine": SECTION | NULL,
    "from_proxy": SECTION | NULL,
    "n_fit": _whole(2),
    "sample.refine": BOOLEAN,
    "n_populations": COUNT,
    "smc.chunk": COUNT | NULL,
    # ---- benchmarks
    "what": _one_of("energy", "network", "spline", "likelihood", "free_energy"),
    "benchmark.run": PATH | NULL,
    "min_seconds": POSITIVE,
    "likelihood.n_probes": _list_of(COUNT, "whole numbers, 1 or more"),
    "likelihood.n_walkers": COUNT,
    "free_energy.n_walkers": COUNT,
    "batch_sizes": _list_of(COUNT, "whole numbers, 1 or more"),
    "dtype": _one_of("float32", "float64"),
    "backends": _list_of(_one_of("torch", "torch, compiled", "openmm"), "torch; torch, compiled; openmm"),
    "systems": TEXTS,
    "modes": _list_of(_one_of("eager", "compiled"), "eager, compiled"),
    "system": TEXT,
    "train.objective": TEXT,
    "train.training_data": TEXT,
} | dict.fromkeys(
    (
        *(*SECTIONS, "method", "logger", "figures"),
        *("network", "model", "fit", "solver", "coordinates", "simulation", "selections", "settings", "finetune"),
        *("finetune.split", "energy", "spline", "molecules", "family", "networks", "flows", "benchmark.likelihood"),
        *("benchmark.free_energy", "solvers", "finest", "hutchinson", "simulations"),
    ),
    SECTION,
)


def check(config: DictConfig | Mapping[str, Any], script: str = "train") -> None:
    """Raise UserError for the first setting of a composed config that is not what `RULES` says; missing ones pass.

    Of a setting at the top its last two parts are ``script`` and its name.

    >>> check({"flow": {"fit": {"grad_clip": -1}}})
    Traceback (most recent call last):
    boltznce.errors.UserError: flow.fit.grad_clip=-1 must be a positive number or null.
    """
    given: Any = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    ours = str(given.get("method", {}).get("_target_", "boltznce.")).startswith("boltznce.")
    for path, value in _ours(given):
        rule = rule_of(path if "." in path else f"{script}.{path}")
        if rule is not None:
            _hold(rule, path, value)
        elif ours and path.partition(".")[0] in SECTIONS and ".network." not in path:
            raise UserError(f"There is no setting {path}: check its spelling, --cfg job prints every one there is.")


def without_rule(config: DictConfig, script: str = "train") -> list[str]:
    """Names of the settings of a composed config that `check` lets be anything."""
    contents: Any = OmegaConf.to_container(config)
    names = [path if "." in path else f"{script}.{path}" for path, _ in _ours(contents)]
    return [name for name in names if rule_of(name) is None]


def require(section: str = "", /, **values: Any) -> None:
    """Raise UserError for the first of ``values`` that is not what a setting of its name (of ``section``) must be.

    >>> require(n_probes=0)
    Traceback (most recent call last):
    boltznce.errors.UserError: n_probes=0 must be a whole number, 1 or more.
    """
    for name, value in values.items():
        rule = rule_of(f"{section}.{name}" if section else name)
        if rule is not None:
            _hold(rule, name, value)


def require_keywords(call: Callable, given: Iterable[str], what: str) -> None:
    """Raise UserError where ``call`` has no keyword of one of these names: settings of ``what`` that do not exist."""
    parameters = inspect.signature(call).parameters
    known = {name: each for name, each in parameters.items() if each.kind is not each.POSITIONAL_ONLY}
    if unknown := [name for name in given if name not in known]:
        names = ", ".join(name for name, each in known.items() if each.kind is not each.VAR_KEYWORD)
        raise UserError(f"There is no setting {unknown[0]} of {what}: choose of {names}.")


def rule_of(path: str) -> Rule | None:
    """The rule of a setting by its dotted name: that of its last three parts (``*``: any), two, or one."""
    parts = path.split(".")
    several = [".".join(parts[-3:]), ".".join([*parts[-3:-2], "*", parts[-1]])] if len(parts) > 2 else []
    for name in (*several, ".".join(parts[-2:]), parts[-1]):
        if name in RULES:
            return RULES[name]
    return None


def leaves(
    node: Mapping[str, Any], path: str = "", enter: Callable[[Mapping[str, Any]], bool] = bool
) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting; lists, and sections that are empty or not to ``enter``, as one value.

    >>> dict(leaves({"seed": 0, "fit": {"steps": 3}, "split": {}}))
    {'seed': 0, 'fit.steps': 3, 'split': {}}
    """
    for key, value in node.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping) and value and enter(value):
            yield from leaves(value, name, enter)
        else:
            yield name, value


def _ours(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The `leaves` of a config, without those that are missing (???) or belong to a class of the user's."""
    own = leaves(config, enter=lambda node: str(node.get("_target_", "boltznce.")).startswith(("boltznce.", "???")))
    return ((name, value) for name, value in own if value != "???" and not isinstance(value, Mapping))


def _hold(rule: Rule, name: str, value: Any) -> None:
    if rule.fits(value):
        return
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
    if rule.names:
        raise UserError(f"Unknown {name}={shown}: choose one of {rule.must.removeprefix('one of ')}.")
    if isinstance(value, float) and value.is_integer() and rule.fits(round(value)):
        raise UserError(f"{name}={shown} must be {rule.must}, without a point or an exponent: write {round(value)}.")
    raise UserError(f"{name}={shown} must be {rule.must}.")
