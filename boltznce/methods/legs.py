"""Ways of walkers: annealed along one leg after another, weights and ancestors carried on, killed and gone on with."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from boltznce.errors import UserError
from boltznce.folders import Kind, discard
from boltznce.smc import HMC, Annealed, AnnealSettings, ValueAndGradient, anneal, systematic
from boltznce.systems.base import System
from boltznce.systems.isomers import own_isomers
from boltznce.units import GAS_CONSTANT

__all__ = ["CHUNK", "Leg", "forget_working_folders", "kernel_of", "walk"]

HYDROGEN_MASS = 4.0  # amu: the same density, in fewer steps
CHUNK = 1024  # walkers at a time: about what a cache holds of their networks' layers
WORKING_FILES = Kind("an unfinished refinement", names=r"annealing\.npz")


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


def walk(
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
    ancestors, steps, gradients = np.arange(len(positions)), [], {}
    labels = None if system.state is None else system.in_state
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
            folder=None if folder is None else working_folder(folder, k),
            about=about,
            chunk=CHUNK,
        )
        positions, ancestors = torch.from_numpy(annealed.positions).to(positions.device), known[annealed.ancestors]
        log_weights = torch.from_numpy(np.where(own_isomers(system, annealed.positions), annealed.log_weights, -np.inf))
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


def working_folder(folder: Path, k: int) -> Path:
    """Where the unfinished k-th leg of what is to be saved in ``folder`` lives."""
    return folder.absolute().with_name(f".{folder.name}.annealing{k or ''}")


def forget_working_folders(folder: Path) -> None:
    """Delete what unfinished legs have left, once all is saved in ``folder``."""
    for k in range(2):
        discard(working_folder(folder, k), WORKING_FILES)


def kernel_of(system: System) -> HMC:
    """Hamiltonian moves of a molecule in nm, ps, amu and kJ/mol, without its centre; of a point, without units."""
    if system.topology is None:
        return HMC(centred=system.translation_invariant)
    heavy = [HYDROGEN_MASS if atom.element.symbol == "H" else atom.element.mass for atom in system.topology.atoms]
    return HMC(torch.tensor(heavy)[:, None], GAS_CONSTANT * system.temperature, centred=True)
