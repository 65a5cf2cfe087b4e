"""From a proxy to its system, whose energy is dear: settings, the way, and frames of a simulation that take it."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from boltznce.clock import stopwatch
from boltznce.data.dataset import Dataset
from boltznce.errors import UserError
from boltznce.methods.legs import CHUNK, Leg, forget_working_folders, walk
from boltznce.methods.shift import shift_of
from boltznce.precision import ordinary_tensors
from boltznce.smc import AnnealSettings, with_gradient
from boltznce.systems.base import System
from boltznce.systems.isomers import own_isomers

__all__ = ["FromProxy", "Near", "from_proxy", "refine_frames"]


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
    begun, simulated = stopwatch("cpu"), frames.meta.get("cpu_seconds", 0.0) * len(frames) / frames.meta["n_frames"]
    frames = frames.take(own_isomers(system, frames.positions))
    frames = frames.take(np.lexsort((frames.time, frames.window, frames.repeat)))
    positions = torch.from_numpy(np.array(frames.positions))
    near, onward = from_proxy(system, positions, settings)
    shifted = [near.shift(part) for part in positions.split(CHUNK)]
    log_weights = torch.from_numpy(np.array(frames.log_weights)) - torch.cat(shifted).double()
    annealed, done = walk(system, [onward], positions, log_weights, seed=seed, folder=folder, about=repr(about))
    order = np.argsort(frames.time[annealed.ancestors], kind="stable")
    began, seconds = annealed.ancestors[order], begun()
    meta = frames.origin | {"system": system.identity, "refined": about, "refinement": done | {"seconds": seconds}}
    refined = Dataset.write(
        folder,
        annealed.positions[order],
        annealed.energy[order],
        log_weights=annealed.log_weights[order] - annealed.log_normalizer[0],  # of mean 1: of u, xTB's zero is far off
        **{name: getattr(frames, name)[began] for name in ("time", "window", "repeat")},
        topology=frames.topology,
        meta=meta | {"cpu_seconds": round(simulated + seconds, 2)},
    )
    forget_working_folders(folder)
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


def from_proxy(system: System, positions: Tensor, settings: FromProxy) -> tuple[Near, Leg]:
    """Where the way from the proxy begins, as some of the positions tell, and the way."""
    some = np.unique(np.linspace(0, len(positions) - 1, settings.n_fit).round().astype(int))
    near = Near(system, positions[some])
    return near, Leg("proxy", near.as_base, with_gradient(system.energy), settings, settings.n_walkers, near.n_asked)
