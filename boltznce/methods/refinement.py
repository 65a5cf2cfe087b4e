"""Refinement: draws of a generator annealed from its likelihood to the target (see `boltznce.smc`).

In one leg, or by way of the system's proxy in two, so that a dear energy is asked for where it is nearly right already.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from boltznce.analysis.reweighting import WeightedSamples
from boltznce.checkpoint import parameters_digest
from boltznce.clock import clock_of
from boltznce.data.dataset import Dataset
from boltznce.errors import UserError
from boltznce.folders import Kind, discard
from boltznce.methods.drawing import Generator
from boltznce.methods.shift import shift_of
from boltznce.precision import ordinary_tensors
from boltznce.smc import HMC, Annealed, AnnealSettings, ValueAndGradient, anneal, systematic, with_gradient
from boltznce.systems.base import System
from boltznce.systems.isomers import allowed_conformers, excluded_conformers
from boltznce.units import GAS_CONSTANT

__all__ = ["FromProxy", "kernel_of", "refine", "refine_frames", "require_base", "settings_of"]

HYDROGEN_MASS = 4.0  # amu: the same density, in fewer steps
CHUNK = 1024  # walkers at a time: about what a cache holds of their networks' layers
WORKING_FILES = Kind("an unfinished refinement", names=r"annealing\.npz")


@dataclasses.dataclass(frozen=True)
class FromProxy(AnnealSettings):
    """How to anneal from a proxy to its system, by as few of the latter's gradients as will do.

    Attributes:
        n_walkers: that go on from the proxy, drawn by weight, as many in the state as in the rest.
        n_fit: energies of the system by which the proxy is brought nearer to it (see `shift_of`).
    """

    cess: float = 0.8
    first_cess: float = 0.8
    n_moves: int = 1
    final_moves: int = 1
    n_walkers: int = 2000
    n_fit: int = 4000


def settings_of(config: DictConfig) -> tuple[AnnealSettings, FromProxy]:
    """How a run refines, by its ``evaluation.refine``: from the base on, and from a proxy on to its system.

    The usual settings, where it has none.
    """
    given = OmegaConf.to_container(config.evaluation.get("refine") or OmegaConf.create(), resolve=True)
    from_proxy = given.pop("from_proxy", None) or {}
    given.pop("n_walkers", None)
    return AnnealSettings(**given), FromProxy(**from_proxy)


def require_base(generator: Generator, likelihood: str | None = None) -> None:
    """Raise UserError where draws cannot be refined: no gradient of the energy, or no density to begin with.

    The density is that of the generator's own ``likelihood``.
    """
    generator.system.require_gradient("refinement")
    if generator.base_log_prob is None:
        raise UserError(
            "Refinement begins with a likelihood that has a cheap gradient, an EBM's or that of a spline flow, and "
            "this run has none: choose a run of method=boltznce or tabg, or leave refine out."
        )
    if likelihood not in (None, generator.default_likelihood):
        raise UserError(
            f"Refinement begins with likelihood={generator.default_likelihood} of this run, not {likelihood}: leave "
            "one of likelihood and refine out."
        )


class Leg(NamedTuple):
    """From a base, known by ``name``, to a target, of all walkers or of ``n`` of them.

    ``n_asked`` energies of the target were asked for before.
    """

    name: str
    base: ValueAndGradient
    target: ValueAndGradient
    settings: AnnealSettings
    n: int | None = None
    n_asked: int = 0


@ordinary_tensors()
def refine(
    generator: Generator,
    draws: WeightedSamples,
    settings: tuple[AnnealSettings, FromProxy],
    *,
    seed: int,
    folder: Path | None = None,
    format: str = "npy",
) -> WeightedSamples:
    """Walkers at the target, one for each of the ``draws``, their ``ancestors``; log q of where they are is not known.

    From the generator's likelihood to the system; where it has a proxy, first to that, and some go on from there.
    States are that of the system and the rest; draws that are other isomers are left out, and what becomes one weighs
    nothing. ``meta["refinement"]`` has the steps of every leg, how many gradients of what they took, and the seconds
    (of the last call, if it was killed before).

    Args:
        settings: of the way from the base, and of that from a proxy.
        folder: where to save; a killed call goes on where it was, and a finished one is loaded.

    Raises UserError where draws cannot be refined, and for a folder of other samples.
    """
    require_base(generator)
    system, models = generator.system, generator.models(generator.default_likelihood)
    about = {
        "system": system.name,
        "likelihood": generator.default_likelihood,
        "seed": seed,
        "settings": [dataclasses.asdict(each) for each in settings[: 1 + (system.proxy is not None)]],
        "weights": parameters_digest(models),
        "draws": zlib.crc32(np.ascontiguousarray(draws.energy).tobytes()),
    }
    if folder is not None and (folder / "meta.yaml").exists():
        refined = WeightedSamples.load(folder)
        if any(refined.meta.get(key) != value for key, value in about.items()):
            raise UserError(f"{folder} holds other samples: choose another folder, or delete it.")
        return refined
    start = _own_isomers(system, draws.positions)
    positions, begun = torch.from_numpy(np.array(draws.positions[start])).to(generator.device), _clock(generator.device)
    base = with_gradient(generator.base_log_prob)
    if system.proxy is None:
        legs = [Leg("base", base, with_gradient(system.energy), settings[0])]
    else:
        low = np.argsort(draws.energy[start])[: len(start) // 2]  # the others clash, which takes xTB ages to tell
        near, onward = _from_proxy(system, positions[np.sort(low)], settings[1])
        legs = [Leg("base", base, near, settings[0]), onward]
    annealed, done = _along(system, legs, positions, seed=seed, folder=folder, about=repr(about))
    refined = WeightedSamples(
        annealed.positions,
        annealed.energy,
        np.full(len(annealed.energy), np.nan),
        annealed.log_weights,
        draws.topology,
        about | {"refinement": done | {"n_draws": len(start), "seconds": begun()}},
        start[annealed.ancestors],
    )
    if folder is not None:
        refined.save(folder, format)
        _forget(folder)
    return refined


@ordinary_tensors()
def refine_frames(system: System, frames: Dataset, settings: FromProxy, *, seed: int, folder: Path) -> Dataset:
    """Frames of a simulation of the system's proxy, annealed to the system: a dataset like that which they are of.

    They are drawn by weight, with repeats, from all walkers of the simulation as evenly as can be. ``window``,
    ``repeat`` and ``time`` remain those of the frame where a walker began, so that errors by walkers of the simulation
    count all of its relatives once. ``meta["refinement"]`` is as in `refine`.

    A killed call goes on where it was, and a finished one is loaded. Raises UserError for a system without a proxy, and
    for a folder of other frames.
    """
    if system.proxy is None:
        raise UserError(f"{system.name} has no proxy: frames of its own simulation need no refinement.")
    about = {"frames": frames.digest, "n": len(frames), "settings": dataclasses.asdict(settings), "seed": seed}
    if (folder / "meta.yaml").exists():
        refined = Dataset.load(folder)
        if refined.meta.get("refined") != about:
            raise UserError(f"{folder} holds other frames: choose another folder, or delete it.")
        return refined
    begun, simulated = _clock("cpu"), frames.meta.get("cpu_seconds", 0.0) * len(frames) / frames.meta["n_frames"]
    frames = frames.take(_own_isomers(system, frames.positions))
    frames = frames.take(np.lexsort((frames.time, frames.window, frames.repeat)))
    positions = torch.from_numpy(np.array(frames.positions))
    near, onward = _from_proxy(system, positions, settings)
    shifted = [near.shift(part) for part in positions.split(CHUNK)]
    log_weights = torch.from_numpy(np.array(frames.log_weights)) - torch.cat(shifted).double()
    annealed, done = _along(system, [onward], positions, log_weights, seed=seed, folder=folder, about=repr(about))
    order = np.argsort(frames.time[annealed.ancestors], kind="stable")
    began, seconds = annealed.ancestors[order], begun()
    meta = {key: value for key, value in frames.meta.items() if key not in ("digests", "n_frames", "format", "sha256")}
    meta |= {"system": system.identity, "refined": about, "refinement": done | {"seconds": seconds}}
    refined = Dataset.write(
        folder,
        annealed.positions[order],
        annealed.energy[order],
        log_weights=annealed.log_weights[order] - annealed.log_normalizer[0],  # of mean 1: of u, xTB's zero is far off
        **{name: getattr(frames, name)[began] for name in ("time", "window", "repeat")},
        topology=frames.topology,
        meta=meta | {"cpu_seconds": round(simulated + seconds, 2)},
    )
    _forget(folder)
    return refined


class Near:
    """u_proxy + g (n,) in kT and its gradient: the proxy, brought nearer to its system (see `shift_of`).

    ``n_asked``: energies of the system that g took.
    """

    def __init__(self, system: System, x: Tensor):
        self.shift, self.n_asked = shift_of(system, x), len(x) if system.bonds else 0
        self.value = with_gradient(lambda x: system.proxy.energy(x) + self.shift(x))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.value(x)

    def as_base(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log of the density, up to a constant."""
        return tuple(-part for part in self.value(x))


def _from_proxy(system: System, positions: Tensor, settings: FromProxy) -> tuple[Near, Leg]:
    """Where the way from the proxy begins, as some of the positions tell, and the way."""
    some = np.unique(np.linspace(0, len(positions) - 1, settings.n_fit).round().astype(int))
    near = Near(system, positions[some])
    return near, Leg("proxy", near.as_base, with_gradient(system.energy), settings, settings.n_walkers, near.n_asked)


def _along(
    system: System,
    legs: Sequence[Leg],
    positions: Tensor,
    log_weights: Tensor | None = None,
    *,
    seed: int,
    folder: Path | None,
    about: str,
) -> tuple[Annealed, dict[str, Any]]:
    """Walkers at the end of the last leg, their ancestors and weights carried on from leg to leg; and what was done."""
    log_weights = torch.zeros(len(positions)) if log_weights is None else log_weights
    ancestors, steps, gradients, labels = np.arange(len(positions)), [], {}, _labels(system)
    for k, leg in enumerate(legs):
        if leg.n is not None:
            sides = torch.zeros(len(positions)) if labels is None else labels(positions)
            index, log_weights = _evenly(sides.cpu().bool(), log_weights, leg.n, np.random.default_rng([seed, k]))
            positions, ancestors = positions[index.to(positions.device)], ancestors[index.numpy()]
        known, relatives = np.unique(ancestors, return_inverse=True)
        annealed = anneal(
            positions,
            leg.base,
            leg.target,
            kernel=kernel_of(system),
            settings=leg.settings,
            log_weights=log_weights,
            ancestors=torch.from_numpy(relatives),
            labels=labels,
            seed=seed + k,
            folder=None if folder is None else _working(folder, k),
            about=about,
            chunk=CHUNK,
        )
        turned = np.ones(len(positions), dtype=bool)
        turned[_own_isomers(system, annealed.positions)] = False
        positions, ancestors = torch.from_numpy(annealed.positions).to(positions.device), known[annealed.ancestors]
        log_weights = torch.from_numpy(np.where(turned, -np.inf, annealed.log_weights))
        steps += [{"leg": leg.name} | step._asdict() for step in annealed.history]
        to = legs[k + 1].name if k + 1 < len(legs) else "system"
        for what, asked in ((leg.name, annealed.counts.base), (to, annealed.counts.target + leg.n_asked)):
            gradients[what] = gradients.get(what, 0) + asked
    annealed = dataclasses.replace(annealed, log_weights=log_weights.numpy(), ancestors=ancestors)
    return annealed, {"steps": steps, "gradients": gradients}


def _evenly(inside: Tensor, log_weights: Tensor, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Indices (n,) of walkers drawn by weight, half of them on either side, which carries its weight on; log weights.

    Of neighbours, such as relatives, as evenly as can be.
    """
    sides = [side.nonzero().squeeze(1) for side in (inside, ~inside)]
    sides = [side for side in sides if len(side) and log_weights[side].max() > -torch.inf]
    if not sides:
        raise UserError("No walker at the proxy weighs anything: look at the draws, and take more.")
    chosen, each = [], max(1, n // len(sides))
    for side in sides:
        total = log_weights[side].logsumexp(0)
        index = systematic((log_weights[side] - total).exp(), rng.random(), each)
        chosen.append((side[index], torch.full((each,), float(total) - np.log(each), dtype=torch.float64)))
    return tuple(torch.cat(part) for part in zip(*chosen, strict=True))


def _clock(device: torch.device | str) -> Callable[[], float]:
    """Seconds from now on."""
    clock = clock_of(torch.device(device))
    begun = clock()
    return lambda: clock() - begun


def _working(folder: Path, k: int) -> Path:
    """Where the unfinished k-th leg of what is to be saved in ``folder`` lives."""
    return folder.absolute().with_name(f".{folder.name}.annealing{k or ''}")


def _forget(folder: Path) -> None:
    for k in range(2):
        discard(_working(folder, k), WORKING_FILES)


def kernel_of(system: System) -> HMC:
    """Hamiltonian moves of a molecule in nm, ps, amu and kJ/mol, without its centre; of a point, without units."""
    if system.topology is None:
        return HMC(centred=system.translation_invariant)
    heavy = [HYDROGEN_MASS if atom.element.symbol == "H" else atom.element.mass for atom in system.topology.atoms]
    return HMC(torch.tensor(heavy)[:, None], GAS_CONSTANT * system.temperature, centred=True)


def _own_isomers(system: System, positions: np.ndarray) -> np.ndarray:
    return np.flatnonzero(allowed_conformers(excluded_conformers(system, positions), len(positions)))


def _labels(system: System) -> Callable[[Tensor], Tensor] | None:
    if system.state is None:
        return None

    def inside(x: Tensor) -> Tensor:
        return system.state.contains(system.coordinate(x, system.state.coordinate))

    return inside
