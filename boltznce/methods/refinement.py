"""Refinement: draws of a generator annealed from its likelihood to the target (see `boltznce.smc`)."""

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from boltznce.analysis.reweighting import WeightedSamples
from boltznce.checkpoint import parameters_digest
from boltznce.clock import clock_of
from boltznce.errors import UserError
from boltznce.folders import Kind, discard
from boltznce.methods.drawing import Generator
from boltznce.precision import ordinary_tensors
from boltznce.smc import HMC, AnnealSettings, anneal, with_gradient
from boltznce.systems.base import System
from boltznce.systems.isomers import allowed_conformers, excluded_conformers
from boltznce.units import GAS_CONSTANT

__all__ = ["kernel_of", "refine", "require_base", "settings_of"]

HYDROGEN_MASS = 4.0  # amu: the same density, in fewer steps
CHUNK = 1024  # walkers at a time: about what a cache holds of their networks' layers
WORKING_FILES = Kind("an unfinished refinement", names=r"annealing\.npz")


def settings_of(config: DictConfig) -> AnnealSettings:
    """How a run refines: by its ``evaluation.refine``; the usual settings, where it has none."""
    settings = OmegaConf.to_container(config.evaluation.get("refine") or OmegaConf.create(), resolve=True)
    return AnnealSettings(**{key: value for key, value in settings.items() if key != "n_walkers"})


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


@ordinary_tensors()
def refine(
    generator: Generator,
    draws: WeightedSamples,
    settings: AnnealSettings,
    *,
    seed: int,
    folder: Path | None = None,
    format: str = "npy",
) -> WeightedSamples:
    """Walkers at the target, one for each of the ``draws``, their ``ancestors``; log q of where they are is not known.

    States are that of the system and the rest; draws that are other isomers are left out, and what becomes one weighs
    nothing. ``meta["refinement"]`` has the steps, how many gradients of base and energy they took, and the seconds (of
    the last call, if it was killed before). With a ``folder`` they are saved there, a killed call goes on where it was,
    and a finished one is loaded. Raises UserError where draws cannot be refined, and for a folder of other samples.
    """
    require_base(generator)
    system, models = generator.system, generator.models(generator.default_likelihood)
    about = {
        "system": system.name,
        "likelihood": generator.default_likelihood,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "weights": parameters_digest(models),
        "draws": zlib.crc32(np.ascontiguousarray(draws.energy).tobytes()),
    }
    if folder is not None and (folder / "meta.yaml").exists():
        refined = WeightedSamples.load(folder)
        if any(refined.meta.get(key) != value for key, value in about.items()):
            raise UserError(f"{folder} holds other samples: choose another folder, or delete it.")
        return refined
    working = None if folder is None else folder.absolute().with_name(f".{folder.name}.annealing")
    clock = clock_of(generator.device)
    begun, start = clock(), _own_isomers(system, draws.positions)
    annealed = anneal(
        torch.from_numpy(np.array(draws.positions[start])).to(generator.device),
        with_gradient(generator.base_log_prob),
        with_gradient(system.energy),
        kernel=kernel_of(system),
        settings=settings,
        labels=_labels(system),
        seed=seed,
        folder=working,
        about=repr(about),
        chunk=CHUNK,
    )
    done = {"steps": [step._asdict() for step in annealed.history], "gradients": dataclasses.asdict(annealed.counts)}
    turned = np.ones(len(start), dtype=bool)
    turned[_own_isomers(system, annealed.positions)] = False
    refined = WeightedSamples(
        annealed.positions,
        annealed.energy,
        np.full(len(start), np.nan),
        np.where(turned, -np.inf, annealed.log_weights),
        draws.topology,
        about | {"refinement": done | {"seconds": clock() - begun}},
        start[annealed.ancestors],
    )
    if folder is not None:
        refined.save(folder, format)
        discard(working, WORKING_FILES)
    return refined


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
