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
from boltznce.analysis.weights import normalized_weights
from boltznce.checkpoint import parameters_digest
from boltznce.clock import clock_of
from boltznce.data.dataset import Dataset
from boltznce.errors import UserError
from boltznce.folders import Kind, discard
from boltznce.methods.drawing import Generator
from boltznce.precision import ordinary_tensors
from boltznce.smc import HMC, Annealed, AnnealSettings, ValueAndGradient, anneal, systematic, with_gradient
from boltznce.systems.base import System
from boltznce.systems.isomers import allowed_conformers, excluded_conformers
from boltznce.units import GAS_CONSTANT

__all__ = ["FROM_PROXY", "kernel_of", "refine", "refine_frames", "require_base", "settings_of"]

HYDROGEN_MASS = 4.0  # amu: the same density, in fewer steps
FROM_PROXY = AnnealSettings(cess=0.8, first_cess=0.8, n_moves=1, final_moves=1)  # the fewest gradients that do
CHUNK = 1024  # walkers at a time: about what a cache holds of their networks' layers
WORKING_FILES = Kind("an unfinished refinement", names=r"annealing\.npz")


def settings_of(config: DictConfig) -> tuple[AnnealSettings, AnnealSettings]:
    """How a run refines, by its ``evaluation.refine``: from the base on, and from a proxy on to its system.

    The usual settings, where it has none.
    """
    given = OmegaConf.to_container(config.evaluation.get("refine") or OmegaConf.create(), resolve=True)
    from_proxy = given.pop("from_proxy", None) or {}
    given.pop("n_walkers", None)
    return AnnealSettings(**given), dataclasses.replace(FROM_PROXY, **from_proxy)


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
    """From a base, known by ``name``, to a ``system``."""

    name: str
    base: ValueAndGradient
    system: System
    settings: AnnealSettings


@ordinary_tensors()
def refine(
    generator: Generator,
    draws: WeightedSamples,
    settings: Sequence[AnnealSettings],
    *,
    seed: int,
    folder: Path | None = None,
    format: str = "npy",
) -> WeightedSamples:
    """Walkers at the target, one for each of the ``draws``, their ``ancestors``; log q of where they are is not known.

    From the generator's likelihood to the system; where it has a proxy, first there and then, on the same terms, from
    it to the system. States are that of the system and the rest; draws that are other isomers are left out, and what
    becomes one weighs nothing. ``meta["refinement"]`` has the steps of every leg, how many gradients of what they took,
    and the seconds (of the last call, if it was killed before).

    Args:
        settings: of each leg (see `settings_of`); what there is no leg for is not looked at.
        folder: where to save; a killed call goes on where it was, and a finished one is loaded.

    Raises UserError where draws cannot be refined, and for a folder of other samples.
    """
    require_base(generator)
    system, models = generator.system, generator.models(generator.default_likelihood)
    legs = [Leg("base", with_gradient(generator.base_log_prob), system.cheap, settings[0])]
    if system.proxy is not None:
        legs.append(Leg("proxy", _as_base(system.proxy), system, settings[1]))
    about = {
        "system": system.name,
        "seed": seed,
        "settings": [dataclasses.asdict(leg.settings) for leg in legs],
        "weights": parameters_digest(models),
        "draws": zlib.crc32(np.ascontiguousarray(draws.energy).tobytes()),
    }
    if folder is not None and (folder / "meta.yaml").exists():
        refined = WeightedSamples.load(folder)
        if any(refined.meta.get(key) != value for key, value in about.items()):
            raise UserError(f"{folder} holds other samples: choose another folder, or delete it.")
        return refined
    start = _own_isomers(system, draws.positions)
    positions = torch.from_numpy(np.array(draws.positions[start])).to(generator.device)
    annealed, done = _along(legs, positions, seed=seed, folder=folder, about=repr(about))
    refined = WeightedSamples(
        annealed.positions,
        annealed.energy,
        np.full(len(start), np.nan),
        annealed.log_weights,
        draws.topology,
        about | {"refinement": done},
        start[annealed.ancestors],
    )
    if folder is not None:
        refined.save(folder, format)
        _forget(folder)
    return refined


@ordinary_tensors()
def refine_frames(
    system: System, frames: Dataset, n: int, settings: AnnealSettings, *, seed: int, folder: Path
) -> Dataset:
    """Some frames of a simulation of the system's proxy, annealed to the system: a dataset like that which they are of.

    ``n // 2`` frames of the state and as many of the rest, drawn by weight, with repeats, from all walkers of the
    simulation as evenly as can be. ``window``, ``repeat`` and ``time`` remain those of the frame where a walker began,
    so that errors by walkers of the simulation count all of its relatives once. ``meta["refinement"]`` is as in
    `refine`.

    A killed call goes on where it was, and a finished one is loaded. Raises UserError for a system without a proxy or a
    state, for a state that no frame is in, and for a folder of other frames.
    """
    if system.proxy is None or system.state is None:
        raise UserError(f"{system.name} has no proxy or no state: frames of its own simulation need no refinement.")
    about = {"frames": frames.digest, "settings": dataclasses.asdict(settings), "n": n, "seed": seed}
    if (folder / "meta.yaml").exists():
        refined = Dataset.load(folder)
        if refined.meta.get("refined") != about:
            raise UserError(f"{folder} holds other frames: choose another folder, or delete it.")
        return refined
    simulated = frames.meta.get("cpu_seconds", 0.0) * len(frames) / frames.meta["n_frames"]
    frames = frames.take(_own_isomers(system, frames.positions))
    index, log_weights = _evenly(system, frames, n, np.random.default_rng(seed))
    leg = Leg("proxy", _as_base(system.proxy), system, settings)
    positions, log_weights = torch.from_numpy(np.array(frames.positions[index])), torch.from_numpy(log_weights)
    annealed, done = _along([leg], positions, log_weights, seed=seed, folder=folder, about=repr(about))
    began = index[annealed.ancestors]
    order = np.argsort(frames.time[began], kind="stable")
    began = began[order]
    meta = {**frames.meta, "system": system.identity, "refined": about, "refinement": done}
    meta = {key: value for key, value in meta.items() if key not in ("digests", "n_frames", "format", "sha256")}
    refined = Dataset.write(
        folder,
        annealed.positions[order],
        annealed.energy[order],
        log_weights=annealed.log_weights[order],
        **{name: getattr(frames, name)[began] for name in ("time", "window", "repeat")},
        topology=frames.topology,
        meta=meta | {"cpu_seconds": round(simulated + done["seconds"], 2)},
    )
    _forget(folder)
    return refined


def _along(
    legs: Sequence[Leg],
    positions: Tensor,
    log_weights: Tensor | None = None,
    *,
    seed: int,
    folder: Path | None,
    about: str,
) -> tuple[Annealed, dict[str, Any]]:
    """Walkers at the end of the last leg, their ancestors and weights carried on from leg to leg; and what was done."""
    clock, ancestors, steps, gradients = clock_of(positions.device), None, [], {}
    begun = clock()
    for k, leg in enumerate(legs):
        annealed = anneal(
            positions,
            leg.base,
            with_gradient(leg.system.energy),
            kernel=kernel_of(leg.system),
            settings=leg.settings,
            log_weights=log_weights,
            ancestors=ancestors,
            labels=_labels(leg.system),
            seed=seed + k,
            folder=None if folder is None else _working(folder, k),
            about=about,
            chunk=CHUNK,
        )
        turned = np.ones(len(positions), dtype=bool)
        turned[_own_isomers(leg.system, annealed.positions)] = False
        annealed = dataclasses.replace(annealed, log_weights=np.where(turned, -np.inf, annealed.log_weights))
        positions = torch.from_numpy(annealed.positions).to(positions.device)
        log_weights, ancestors = torch.from_numpy(annealed.log_weights), torch.from_numpy(annealed.ancestors)
        steps += [{"leg": leg.name} | step._asdict() for step in annealed.history]
        to = legs[k + 1].name if k + 1 < len(legs) else "system"
        for what, asked in ((leg.name, annealed.counts.base), (to, annealed.counts.target)):
            gradients[what] = gradients.get(what, 0) + asked
    return annealed, {"steps": steps, "gradients": gradients, "seconds": clock() - begun}


def _as_base(proxy: System) -> ValueAndGradient:
    energy = with_gradient(proxy.energy)
    return lambda x: tuple(-part for part in energy(x))


def _evenly(system: System, frames: Dataset, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices and log weights of ``n // 2`` frames of either side, systematically, walker by walker."""
    values = system.coordinate(np.asarray(frames.positions), system.state.coordinate)
    inside, weights = system.state.contains(values), normalized_weights(frames.log_weights)
    order, chosen, log_weights = np.lexsort((frames.time, frames.window, frames.repeat)), [], []
    for side in (order[inside[order]], order[~inside[order]]):
        if not (total := weights[side].sum()) > 0:
            raise UserError(f"No frame of {system.name} is on one side of {system.state.in_words()}: simulate longer.")
        chosen.append(side[systematic(torch.from_numpy(weights[side]), rng.random(), n // 2).numpy()])
        log_weights.append(np.full(n // 2, np.log(total / (n // 2))))
    return np.concatenate(chosen), np.concatenate(log_weights)


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
