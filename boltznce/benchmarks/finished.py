"""A finished run, opened to be measured."""

import dataclasses

import torch

from boltznce.analysis.reweighting import WeightedSamples
from boltznce.command_line import command_line
from boltznce.errors import UserError
from boltznce.methods.drawing import Generator
from boltznce.methods.refinement import RefineSettings, refine, settings_of
from boltznce.run import Run, load_run
from boltznce.systems.base import System
from boltznce.systems.isomers import allowed_conformers, excluded_conformers, require_some_left

__all__ = ["measured_refinement", "of_own_isomer", "open_finished"]


def open_finished(run: str | None, what: str, device: str | torch.device, trust: bool = False) -> Run:
    """The run in a folder. Raises UserError where there is none, and for one that is not finished or of many molecules.

    Args:
        what: the name of the benchmark, for messages.
    """
    if run is None:
        raise UserError(f"what={what} measures a finished run: set run= to its folder.")
    found = load_run(run, str(device), trust)
    if found.system.is_family:
        raise UserError(f"what={what} measures a run of one molecule, and {run} is of many: choose another run.")
    if not found.folder.stage_done("evaluation"):
        finish = command_line("train", f"resume={run}")
        raise UserError(f"The run in {run} has no weighted draws yet: finish it with {finish}.")
    return found


def of_own_isomer(system: System, samples: WeightedSamples) -> WeightedSamples:
    """The samples that are the isomer that the system's structure is. Raises UserError where none is."""
    excluded = excluded_conformers(system, samples.positions)
    require_some_left(system, excluded, len(samples), "samples", "choose a run that was trained longer")
    return samples[allowed_conformers(excluded, len(samples))]


def measured_refinement(
    generator: Generator, draws: WeightedSamples, seed: int, n_walkers: int | None = None
) -> tuple[WeightedSamples, float]:
    """The draws, or some (see `refine`), refined as their run refines, and the seconds (`boltznce.clock`) that it took.

    What a first call compiles is not counted: a refinement in one step is made before.
    """
    settings = settings_of(generator.config)
    first = RefineSettings(*(dataclasses.replace(each, max_steps=1, n_moves=1, final_moves=0) for each in settings))
    refine(generator, draws, first, seed=seed, n_walkers=n_walkers)
    refined = refine(generator, draws, settings, seed=seed, n_walkers=n_walkers)
    return refined, refined.meta["refinement"]["seconds"]
