"""Refinement: draws of a generator annealed from its likelihood to the target (see `boltznce.smc`).

In one leg, or by way of the system's proxy in two, so that a dear energy is asked for where it is nearly right already.
"""

import dataclasses
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from boltznce.analysis.reweighting import WeightedSamples
from boltznce.checkpoint import parameters_digest
from boltznce.clock import stopwatch
from boltznce.errors import UserError
from boltznce.methods.drawing import Generator
from boltznce.methods.legs import Leg, forget_working_folders, walk
from boltznce.methods.proxy import FromProxy, from_proxy
from boltznce.precision import ordinary_tensors
from boltznce.smc import AnnealSettings, with_gradient
from boltznce.systems.base import System
from boltznce.systems.isomers import own_isomers

__all__ = ["RefineSettings", "refine", "require_base", "settings_of"]


class RefineSettings(NamedTuple):
    """How to anneal from a generator's likelihood, and, of a system with a proxy, on from there."""

    from_base: AnnealSettings = AnnealSettings()
    from_proxy: FromProxy = FromProxy()


def settings_of(config: DictConfig) -> RefineSettings:
    """How a run refines, by its ``evaluation.refine``; the usual settings, where it has none."""
    given = OmegaConf.to_container(config.evaluation.get("refine") or OmegaConf.create(), resolve=True)
    onward = given.pop("from_proxy", None) or {}
    given.pop("n_walkers", None)
    return RefineSettings(AnnealSettings(**given), FromProxy(**onward))


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
    settings: RefineSettings,
    *,
    seed: int,
    n_walkers: int | None = None,
    folder: Path | None = None,
    format: str = "npy",
) -> WeightedSamples:
    """Walkers at the target that begin at ``draws``, their ``ancestors``; log q of where they are is not known.

    From the generator's likelihood to the system; where it has a proxy, first to that, and some go on from there.
    States are that of the system and the rest; draws that are other isomers are left out, and what becomes one weighs
    nothing. ``meta["refinement"]`` has the steps of every leg, how many gradients of what they took, and the seconds
    (of the last call, if it was killed before).

    Args:
        n_walkers: how many of the draws, as many in the state as in the rest, if there are; each stands for as many as
            there are of its side. None: all.
        folder: where to save; a killed call goes on where it was, and a finished one is loaded.

    Raises UserError where draws cannot be refined, and for a folder of other samples.
    """
    require_base(generator)
    system, models = generator.system, generator.models(generator.default_likelihood)
    about = {
        "system": system.name,
        "likelihood": generator.default_likelihood,
        "seed": seed,
        "n_walkers": n_walkers,
        "settings": [dataclasses.asdict(each) for each in settings[: 1 + (system.proxy is not None)]],
        "weights": parameters_digest(models),
        "draws": zlib.crc32(np.ascontiguousarray(draws.energy).tobytes()),
    }
    if folder is not None and (folder / "meta.yaml").exists():
        refined = WeightedSamples.load(folder)
        if any(refined.meta.get(key) != value for key, value in about.items()):
            raise UserError(f"{folder} holds other samples: choose another folder, or delete it.")
        return refined
    begun, (start, log_weights) = stopwatch(generator.device), _some(system, draws, n_walkers, seed)
    positions = torch.from_numpy(np.array(draws.positions[start])).to(generator.device)
    base = with_gradient(generator.base_log_prob)
    if system.proxy is None:
        legs = [Leg("base", base, with_gradient(system.energy), settings.from_base)]
    else:
        low = np.argsort(draws.energy[start])[: len(start) // 2]  # the others clash, which takes xTB ages to tell
        near, onward = from_proxy(system, positions[np.sort(low)], settings.from_proxy)
        legs = [Leg("base", base, near, settings.from_base), onward]
    annealed, done = walk(system, legs, positions, log_weights, seed=seed, folder=folder, about=repr(about))
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
        forget_working_folders(folder)
    return refined


def _some(system: System, draws: WeightedSamples, n: int | None, seed: int) -> tuple[np.ndarray, Tensor]:
    """Indices of draws of the system's own isomer, ``n`` of them, and log weights, by how many each stands for."""
    own = np.flatnonzero(own_isomers(system, draws.positions))
    if n is None or n >= len(own):
        return own, torch.zeros(len(own))
    if system.state is None:
        return own[:n], torch.zeros(n)
    inside = system.in_state(np.array(draws.positions[own]))
    sides, rng = [own[inside], own[~inside]], np.random.default_rng([seed, 0])
    of_state = min(len(sides[0]), max(n // 2, n - len(sides[1])))
    chosen = [rng.choice(side, k, replace=False) for side, k in zip(sides, (of_state, n - of_state), strict=True)]
    weights = [
        np.full(len(some), np.log(len(side) / len(some))) for some, side in zip(chosen, sides, strict=True) if len(some)
    ]
    order = np.argsort(index := np.concatenate(chosen))
    return index[order], torch.from_numpy(np.concatenate(weights)[order])
