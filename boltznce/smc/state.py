"""The state from which an annealing goes on, in memory and on disk."""

import dataclasses
import zlib
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from boltznce.errors import UserError
from boltznce.io import atomic_file
from boltznce.records import read_archive
from boltznce.settings import require
from boltznce.smc.hmc import HMC
from boltznce.smc.path import Counts, Point

__all__ = ["AnnealSettings", "State", "Step", "Store", "fingerprint"]


@dataclasses.dataclass(frozen=True)
class AnnealSettings:
    """How to anneal. Raises UserError for numbers that make no sense.

    Attributes:
        cess: conditional ESS of a step in β.
        first_cess: that of the first, which reweights the draws without a move before: an EBM is a base that should not
            be moved in.
        resample_below: relative ESS of a state's walkers under which they are resampled.
        n_moves: Hamiltonian moves at every β; ``final_moves`` more at β = 1.
        step_size: of the leapfrog, in ps for molecules; a first guess.
        acceptance: to which the step size is adapted.
        max_steps: in β; none is shorter than one over it, whatever its conditional ESS.
        n_populations: independent ones, of every so-manieth walker, which share nothing but β and the step size.
    """

    cess: float = 0.95
    first_cess: float = 0.5
    resample_below: float = 0.5
    n_moves: int = 3
    final_moves: int = 5
    step_size: float = 0.001
    acceptance: float = 0.85
    max_steps: int = 500
    n_populations: int = 1

    def __post_init__(self) -> None:
        require("smc", **dataclasses.asdict(self))


class Step(NamedTuple):
    """What happened on the way to one β: conditional ESS of the step, relative ESS of the weights after it, how many
    groups were resampled, mean acceptance and step size of the moves, distinct ancestors left, weighted mean of u.
    """

    beta: float
    cess: float
    ess: float
    resampled: int
    acceptance: float
    step_size: float
    ancestors: int
    mean_u: float


@dataclasses.dataclass
class State:
    """All from which an annealing goes on."""

    point: Point
    log_weights: Tensor
    ancestors: Tensor
    step_size: float
    counts: Counts
    history: tuple[Step, ...] = ()

    @property
    def beta(self) -> float:
        return self.history[-1].beta if self.history else 0.0


@dataclasses.dataclass(frozen=True)
class Store:
    """A `State` on disk, of the call with this ``fingerprint``."""

    path: FilePath
    fingerprint: int

    def save(self, state: State) -> None:
        arrays: dict[str, Any] = {
            field.name: getattr(state.point, field.name).cpu().numpy() for field in dataclasses.fields(Point)
        }
        arrays |= {"log_weights": state.log_weights.cpu().numpy(), "ancestors": state.ancestors.cpu().numpy()}
        counts = np.array([state.counts.base, state.counts.target])
        kept: dict[str, Any] = {"step_size": state.step_size, "counts": counts, "history": np.array(state.history)}
        with atomic_file(self.path) as temporary, open(temporary, "wb") as handle:
            np.savez(handle, fingerprint=self.fingerprint, **arrays, **kept)

    def load(self, positions: Tensor) -> State | None:
        """What was saved last; None before anything. Raises UserError for what is damaged, or of another call."""
        if not self.path.exists():
            return None
        remedy = f"delete {self.path}, and the annealing starts anew"
        n, whole = len(positions), tuple(positions.shape)
        shapes = {"positions": whole, "log_base": (n,), "u": (n,), "base_gradient": whole, "u_gradient": whole}
        rest = {"log_weights": (n,), "ancestors": (n,), "step_size": (), "counts": (2,)}
        if int(read_archive(self.path, remedy, {"fingerprint": ()})["fingerprint"]) != self.fingerprint:
            raise UserError(
                f"{self.path} is of an annealing with other walkers or settings: restore these, or {remedy}."
            )
        found = read_archive(self.path, remedy, shapes | rest | {"history": (None, len(Step._fields))})
        tensors = {name: torch.from_numpy(array).to(positions.device) for name, array in found.items()}
        kept = [_step(row) for row in found["history"].tolist()]
        return State(
            Point(*(tensors[name] for name in shapes)),
            tensors["log_weights"],
            tensors["ancestors"],
            float(found["step_size"]),
            Counts(*found["counts"].tolist()),
            tuple(kept),
        )


def _step(row: list[float]) -> Step:
    """A row of numbers as what it was."""
    step = Step._make(row)
    return step._replace(resampled=int(step.resampled), ancestors=int(step.ancestors))


def fingerprint(
    positions: Tensor, log_weights: Tensor, kernel: HMC, settings: AnnealSettings, seed: int, about: str
) -> int:
    """A number that another start, kernel or setting would change, and what is said ``about`` densities and labels."""
    masses = torch.as_tensor(kernel.masses, dtype=torch.float64).cpu().numpy()
    said = repr((about, seed, settings, kernel.kT, kernel.n_leapfrog, kernel.centred, masses.shape)).encode()
    crc = 0
    for part in (said, masses.tobytes(), positions.cpu().numpy().tobytes(), log_weights.cpu().numpy().tobytes()):
        crc = zlib.crc32(part, crc)
    return crc
