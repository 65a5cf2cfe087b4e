"""What a simulation is to be: its settings, checked, as the jobs of its repeats."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import openmm
import torch

from boltznce.compiling import wants_compiling
from boltznce.data.engine import SAMPLERS, Job
from boltznce.data.fourier_bias import number_of_groups
from boltznce.data.plane import axis_of
from boltznce.data.walkers import ENGINES
from boltznce.errors import UserError
from boltznce.settings import require

__all__ = ["biases_of", "choose_engine", "force_evaluations", "jobs_of"]

DURATIONS = {"metadynamics": 100.0}  # ps, where none is given
DURATION = 2000.0  # of other methods
MIN_ATOMS_AT_A_TIME = 400  # from which compiled torch is faster on a CPU, see `choose_engine`
OPTIONS = {
    "umbrella": ("n_windows", "kappa", "exchange_interval"),
    "replica_exchange": ("n_replicas", "max_temperature", "exchange_interval"),
    "langevin": (),
    "metadynamics": (
        *("n_walkers", "bias_duration", "hill_interval", "hill_height", "hill_width", "bias_factor", "n_terms"),
        "start_temperature",
    ),
}


def jobs_of(
    system,
    method: str = "auto",
    *,
    duration: float | None = None,
    n_repeats: int = 2,
    seed: int = 0,
    engine: str = "auto",
    compile: str | bool | None = None,
    dihedral: str | None = None,
    frame_interval: float = 1.0,
    equilibration: float = 50.0,
    segment_length: float = 20.0,
    timestep: float = 0.002,
    friction: float = 1.0,
    hydrogen_mass: float | None = 4.0,
    platform: str = "auto",
    n_windows: int = 24,
    kappa: float = 60.0,
    exchange_interval: float = 0.5,
    n_replicas: int = 6,
    max_temperature: float = 800.0,
    n_ladders: int = 1,
    n_walkers: int | None = None,
    bias_along: Sequence[str] | Sequence[Sequence[str]] | None = None,
    bias_duration: float = 120.0,
    hill_interval: float = 0.1,
    hill_height: float = 7.5,
    hill_width: float = 0.25,
    bias_factor: float = 16.0,
    n_terms: int = 12,
    start_temperature: float = 600.0,
) -> list[Job]:
    """The jobs of a simulation, one for each repeat, its settings checked; nothing is written.

    Of a system with a proxy it is the proxy that is simulated.

    Args:
        method: ``metadynamics`` (many walkers under one bias), ``umbrella`` (windows along ``dihedral``, MBAR),
            ``replica_exchange`` (in temperature), ``langevin``, or ``auto``: metadynamics of a molecule with one φ
            whose torch energy can be compiled here, umbrella of others.
        duration: ps per walker, after ``equilibration`` ps (and ``bias_duration``); raise it to extend an unfinished
            run. Default 2000, of metadynamics 100.
        n_repeats: independent repeats.
        engine: ``openmm``, one walker after another; ``torch``, all in one batch; or ``auto``, see `choose_engine`.
        compile: whether ``engine=torch`` is compiled; default as ``system.compile`` says, and of metadynamics where
            there is a compiler.
        dihedral: name in ``system.dihedrals``; default that of ``system.state``, else the first.
        frame_interval, segment_length: ps between frames, and between saves that a killed run goes on from.
        timestep, friction, hydrogen_mass: ps, 1/ps, amu. Heavy hydrogens allow 2 fs and change no configuration.
        platform: an OpenMM platform, or ``auto``: Reference for small molecules, else OpenMM's fastest.
        n_windows, kappa, exchange_interval: umbrella: windows on the circle, kJ/mol/rad², ps.
        n_replicas, max_temperature, exchange_interval: replica exchange: geometric ladder up to max_temperature in K.
        n_ladders: replica exchange: independent ladders of each repeat.
        n_walkers: trajectories of each repeat; Langevin 1, metadynamics 256, with several biases 128 a group.
        bias_along: metadynamics: one or two names in ``system.dihedrals``, or a list of such pairs for a bias each and
            bias exchange every ``exchange_interval``; default every φ, each with the ψ beside it.
        bias_duration, hill_interval: metadynamics: ps a walker in which the bias is built, and between hills.
        hill_height, hill_width, bias_factor: metadynamics: kT, of all walkers' hills of a round together; rad; see
            `boltznce.data.metadynamics.MetadynamicsSampler`.
        n_terms: metadynamics: of the bias's Fourier series, a coordinate.
        start_temperature: metadynamics: K during the equilibration; at 800 one peptide bond in 500 turns in 50 ps.

    Raises UserError for settings that do not fit, and for a system whose energy is not a force field's.
    """
    given = dict(locals())  # before there are others
    system = system.cheap
    require("simulation", **{key: value for key, value in given.items() if key not in ("system", "compile")})
    if system.exact and method != "metadynamics":
        raise UserError(
            f"There is nothing to simulate in {system.name}: a training draws its data exactly. To see how well "
            "metadynamics does, set sampling=metadynamics."
        )
    compile = system.compile if compile is None else compile
    if method == "auto":
        method = "metadynamics" if _one_phi(system) and wants_compiling("true") else "umbrella"
    if method == "metadynamics":
        compile = True if str(compile) == "auto" else compile
        if engine == "openmm" or system.energy_backend != "torch":
            raise UserError("Metadynamics moves all walkers by the torch energy: set engine=torch, or other sampling.")
        engine = "torch"
    else:
        at_a_time = {"umbrella": n_windows, "replica_exchange": n_replicas * n_ladders}.get(method, n_walkers or 1)
        engine = choose_engine(engine, system, at_a_time, compile)
    duration = DURATIONS.get(method, DURATION) if duration is None else duration
    jobs = [
        Job(
            method=method,
            temperature=system.temperature,
            seed=seed,
            repeat=repeat,
            duration=duration,
            frame_interval=frame_interval,
            segment_length=min(segment_length, duration),
            equilibration=equilibration,
            timestep=timestep,
            friction=friction,
            hydrogen_mass=hydrogen_mass,
            platform=platform,
            dihedral=None if system.exact else _dihedral_atoms(system, dihedral, required=method == "umbrella"),
            options={key: given[key] for key in OPTIONS[method]} | _more_options(system, method, given),
            engine=engine,
            compile=compile,
        )
        for repeat in range(n_repeats)
    ]
    _check(jobs)
    return jobs


def _more_options(system, method: str, given: dict[str, Any]) -> dict[str, Any]:
    """Options that depend on the system, or that older datasets have not."""
    if method == "replica_exchange":
        return {"n_ladders": given["n_ladders"]} if given["n_ladders"] != 1 else {}
    if method == "langevin":
        return {"n_walkers": given["n_walkers"]} if given["n_walkers"] not in (None, 1) else {}
    if method == "umbrella":
        return {}
    biases = biases_of(system, given["dihedral"], given["bias_along"])
    if len({len(one) for one in biases}) > 1:
        raise UserError(f"Every bias of bias_along={biases} must have as many coordinates: one, or two.")
    n_groups = number_of_groups(len(biases))
    n_walkers = given["n_walkers"] or (256 if n_groups == 1 else 128 * n_groups)
    if n_walkers % n_groups:
        raise UserError(f"n_walkers={n_walkers} must be a multiple of {n_groups}: the biases, and a group without.")
    options = {"bias_along": biases, **_axes(system, biases), "n_walkers": n_walkers}
    if system.exact:
        options["start_temperature"] = system.temperature
    return options | ({"exchange_interval": given["exchange_interval"]} if n_groups > 1 else {})


def choose_engine(engine: str, system, n_walkers: int = 1, compile: str | bool | None = None) -> str:
    """The engine that ``engine`` means for a system: ``auto`` is the faster one, torch where there is a GPU.

    On a CPU torch is faster only where it is compiled (``compile``, or ``system.compile``) and has work enough at a
    time. µs a step and walker on one core, OpenMM and compiled torch: alanine dipeptide, 24 walkers, 35 and 17; 6
    walkers, 35 and 54; hexapeptide, 8 walkers, 247 and 141. Compiling takes about 20 seconds; without it torch takes
    154, 462 and 705 µs. A `CustomGBForce` (implicit/obc1.xml and the like) OpenMM interprets: dipeptide AG, 8 walkers,
    3059 µs, and torch 919 (not compiled) or 90; 32 walkers, 35; compiling takes a minute.

    Raises UserError for an unknown engine, and for torch where the system's energy is not the torch energy.
    """
    if engine not in (*ENGINES, "auto"):
        raise UserError(f"Unknown engine '{engine}': choose one of {', '.join(ENGINES)}, auto.")
    has_torch = system.energy_backend == "torch"
    if engine == "torch" and not has_torch:
        raise UserError(f"{system.name} has energy_backend={system.energy_backend}, not torch: set engine=openmm.")
    if engine == "auto":
        if not has_torch:
            return "openmm"
        interpreted = any(isinstance(force, openmm.CustomGBForce) for force in system.openmm_system().getForces())
        compiled = (
            wants_compiling(system.compile if compile is None else compile)
            and n_walkers * system.n_atoms >= MIN_ATOMS_AT_A_TIME
        )
        return "torch" if torch.cuda.is_available() or interpreted or compiled else "openmm"
    return engine


def force_evaluations(meta: dict) -> int:
    """How often the simulation in a dataset's ``meta`` has computed forces; 0 where nothing was simulated here."""
    settings = meta.get("settings") or {}
    if settings.get("method") not in SAMPLERS or "ps_per_walker" not in meta:
        return 0
    options = settings["options"]
    n_walkers = next((options[key] for key in ("n_windows", "n_replicas", "n_walkers") if key in options), 1)
    ps = meta["ps_per_walker"] + options.get("bias_duration", 0.0) + settings["equilibration"]
    steps = ps / settings["timestep"]
    return settings["n_repeats"] * n_walkers * options.get("n_ladders", 1) * round(steps)


def _check(jobs: list[Job]) -> None:
    """Raise UserError for settings that cannot be run as they stand."""
    job = jobs[0]
    pairs = [
        ("duration", job.duration, "segment_length", job.segment_length),
        ("segment_length", job.segment_length, "frame_interval", job.frame_interval),
        ("frame_interval", job.frame_interval, "timestep", job.timestep),
    ]
    if step := job.options.get("exchange_interval"):
        pairs += [
            ("frame_interval", job.frame_interval, "exchange_interval", step),
            ("exchange_interval", step, "timestep", job.timestep),
        ]
    if step := job.options.get("hill_interval"):
        pairs += [
            ("bias_duration", job.options["bias_duration"], "segment_length", job.segment_length),
            ("segment_length", job.segment_length, "hill_interval", step),
            ("hill_interval", step, "timestep", job.timestep),
        ]
    for whole, a, part, b in pairs:
        if not b > 0 or round(a / b) < 1 or abs(a / b - round(a / b)) > 1e-6:
            raise UserError(f"{whole}={a} must be a multiple of {part}={b} (ps).")
    if job.options.get("max_temperature", math.inf) <= job.temperature:
        hottest = job.options["max_temperature"]
        raise UserError(f"max_temperature={hottest} must be above the system's {job.temperature} K.")
    if job.platform != "auto" and job.platform not in (names := _platforms()):
        raise UserError(f"There is no platform {job.platform!r}: choose auto or one of {', '.join(names)}.")


def _platforms() -> list[str]:
    return [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


def _dihedral_atoms(system, name: str | None, required: bool) -> tuple[int, int, int, int] | None:
    name = name or next(iter(_state_dihedrals(system)), None)
    if name is None and not required:
        return None
    a, b, c, d = _atoms_of(system, name or next(iter(system.dihedrals), None))
    return a, b, c, d


def _state_dihedrals(system) -> list[str]:
    """Names of the dihedrals that the state is of."""
    names = [name for name, _ in system.state.sides if isinstance(name, str)] if system.state else []
    return names if system.exact else [name for name in names if system.coordinate_of(name).atoms]


def _one_phi(system) -> bool:
    """Whether a bias on φ and ψ is all that a molecule needs, and its energy can move many walkers at once."""
    phis, psis = _backbone(system)
    is_state = set(_state_dihedrals(system)) <= {*phis, *psis}
    return len(phis) == 1 and is_state and system.energy_backend == "torch"


def _backbone(system) -> tuple[list[str], list[str]]:
    """Names of every φ and of every ψ."""
    phis, psis = ([name for name in system.dihedrals if name.startswith(kind)] for kind in ("phi", "psi"))
    return phis, psis


def biases_of(system, dihedral: str | None = None, given: Sequence | None = None) -> list[list[str]]:
    """Names of the coordinates of each bias: every φ with the ψ at its Cα; or ``dihedral`` alone.

    Where the state is of other dihedrals, of one or two of these.
    """
    if given:
        return [list(given)] if isinstance(given[0], str) else [list(each) for each in given]
    if dihedral is not None:
        return [[dihedral]]
    if system.exact:
        return [(_state_dihedrals(system) or ["x"])[:2]]
    (phis, psis), own = _backbone(system), _state_dihedrals(system)

    def beside(phi: str) -> list[str]:
        axis = set(_atoms_of(system, phi)[1:3])
        return sorted(psis, key=lambda psi: not axis & set(system.dihedrals[psi][1:3]))[:1]

    pairs = [[phi, *beside(phi)] for phi in phis]
    if not set(own) <= set(itertools.chain(*pairs)):
        return [own[:2]]
    first: Any = next(iter(system.dihedrals), None)
    return pairs or [[first]]


def _axes(system, bias_along: Sequence[Sequence[str]]) -> dict[str, list]:
    """What `boltznce.data.fourier_bias.Axis` makes the coordinates of."""
    if not system.exact:
        return {"coordinates": [[_atoms_of(system, name) for name in one] for one in bias_along]}
    axes = [[axis_of(system, name) for name in one] for one in bias_along]
    return {"coordinates": [[a for a, _ in one] for one in axes], "limits": [[ends for _, ends in one] for one in axes]}


def _atoms_of(system, name: str | None) -> list[int]:
    if name is None or not (atoms := system.coordinate_of(name).atoms):
        choices = ", ".join(system.dihedrals) or "none here"
        raise UserError(
            f"A bias needs a dihedral: set dihedral (or bias_along) to one of {choices}, or sampling to langevin or "
            "replica_exchange."
        )
    return [int(atom) for atom in atoms]
