"""Sequential Monte Carlo from a base density to a target: walkers that are reweighted, resampled and moved, β by β."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path as FilePath

import torch
from torch import Tensor
from tqdm.auto import tqdm

from boltznce.analysis.weights import effective_sample_size
from boltznce.errors import UserError
from boltznce.folders import only_process
from boltznce.settings import require
from boltznce.smc.hmc import HMC, adapted
from boltznce.smc.path import Path, Point, ValueAndGradient, next_beta
from boltznce.smc.resampling import resample_within
from boltznce.smc.result import Annealed
from boltznce.smc.state import AnnealSettings, State, Step, Store, fingerprint
from boltznce.training import step_generator

__all__ = ["anneal"]

PILOTS = 256  # walkers that look for the first step size, and are forgotten
PILOT_MOVES = 20  # at most
CLOSE = 0.1  # of an acceptance to the wanted one

Labels = Callable[[Tensor], Tensor]  # positions (n, ...) -> whole numbers from zero on, or a mask (n,)


@torch.no_grad()
def anneal(
    positions: Tensor,
    base: ValueAndGradient,
    target: ValueAndGradient,
    *,
    kernel: HMC = HMC(),  # noqa: B008
    settings: AnnealSettings = AnnealSettings(),  # noqa: B008
    log_weights: Tensor | None = None,
    ancestors: Tensor | None = None,
    labels: Labels | None = None,
    seed: int = 0,
    folder: FilePath | str | None = None,
    about: str = "",
    chunk: int | None = None,
) -> Annealed:
    """Bring ``positions`` (n, ...), draws of the base, to the target along log π_β = (1-β) log q̃ - β u.

    At each step log w += (β' - β) (-u - log q̃) at the current places (Neal 2001), β' by the conditional ESS; states
    whose weights have degenerated are resampled, each within itself and its population; then Hamiltonian moves leave
    π_β' invariant (Del Moral, Doucet & Jasra 2006; Dai, Heng, Jacob & Whiteley 2022). The weights are right for any
    such moves if the base is what the walkers were drawn from (else see
    `corrected_by_ancestors`).

    Args:
        positions: on the device where all is to be computed; float32 is enough, weights are float64.
        base: x -> log q̃ (n,) up to a constant, and its gradient; `with_gradient` makes it of a differentiable function.
        target: x -> u (n,) in kT and its gradient.
        kernel: masses, units, length of the trajectories.
        log_weights: (n,) of the start, log q̃ - log q where log q is known and not q̃; else zeros.
        ancestors: (n,) of the start, whole numbers below n, where another annealing led there; else 0 to n-1.
        labels: the states, which keep their walkers and total weights when they are resampled; None: one state.
        seed: step k takes random numbers that depend on (seed, k) alone.
        folder: keeps the state after every β: a killed call, made again, goes on to the same result, on a CPU to the
            bit.
        about: what base, target and labels are, for a call that goes on: one with another text is refused.
        chunk: most walkers that densities are asked for at a time; None: all.

    Raises UserError where no walker has a weight, and for a folder of another annealing.
    """
    require(seed=seed)
    require("smc", chunk=chunk)
    n = len(positions)
    if positions.dim() < 2 or n < 2 * settings.n_populations:
        raise UserError(
            f"Annealing needs positions (n, ...) of at least two walkers in each of {settings.n_populations} "
            f"populations: got {tuple(positions.shape)}."
        )
    log_weights = torch.zeros(n) if log_weights is None else torch.as_tensor(log_weights)
    if log_weights.shape != (n,) or not (log_weights < math.inf).all():  # NaN is not either
        raise UserError(f"Annealing needs a log weight of each of {n} walkers, none of them NaN or +inf.")
    log_weights = log_weights.to(positions.device, torch.float64)
    ancestors = torch.arange(n) if ancestors is None else torch.as_tensor(ancestors)
    if ancestors.shape != (n,) or not ((ancestors >= 0) & (ancestors < n)).all():
        raise UserError(f"Annealing needs an ancestor of each of {n} walkers, a whole number below {n}.")
    run = _Run(Path(base, target, chunk), kernel, settings, labels, seed)

    def begun() -> State:
        first = ancestors.to(positions.device, torch.long)
        return State(run.path.point(positions.detach()), log_weights, first, settings.step_size, run.path.counts)

    if folder is None:
        return _result(run.to_the_end(begun()), settings)
    with only_process(folder):
        mark = fingerprint(positions, log_weights, kernel, settings, seed, about)
        store = Store(FilePath(folder) / "annealing.npz", mark)
        return _result(run.to_the_end(store.load(positions) or begun(), store.save), settings)


@dataclasses.dataclass(frozen=True)
class _Run:
    path: Path
    kernel: HMC
    settings: AnnealSettings
    labels: Labels | None
    seed: int

    def to_the_end(self, state: State, save: Callable[[State], None] = lambda state: None) -> State:
        self.path.counts = state.counts
        shown = {"bar_format": "{l_bar}{bar}| β {n:.3f} [{elapsed}{postfix}]", "mininterval": 5.0, "leave": False}
        with tqdm(total=1.0, initial=state.beta, desc="annealing", **shown) as bar:
            while state.beta < 1:
                state = self.step(state)
                save(state)
                bar.set_postfix(acceptance=f"{state.history[-1].acceptance:.2f}", refresh=False)
                bar.update(state.beta - bar.n)
        return state

    def step(self, state: State) -> State:
        """Reweight to the next β, resample, move."""
        settings, point, log_weights, k = self.settings, state.point, state.log_weights, len(state.history)
        generator = step_generator(self.seed, "annealing", k, point.u.device)
        states = self._states(point.positions)
        _require_weight(log_weights, point)
        least = settings.cess if k else settings.first_cess
        beta, cess = next_beta(point, log_weights, state.beta, least, states, 1.0 / settings.max_steps)
        log_weights = log_weights + (beta - state.beta) * (-point.u - point.log_base)
        _require_weight(log_weights, point)
        ess = effective_sample_size(log_weights.cpu().numpy())

        groups = states * settings.n_populations + state.ancestors % settings.n_populations
        index, log_weights, resampled = resample_within(log_weights, groups, generator, settings.resample_below)
        point, ancestors = point[index], state.ancestors[index]

        alive = log_weights.isfinite()
        step_size = state.step_size if k else self._first_step_size(point[alive], beta)
        n_moves, acceptance = settings.n_moves + (settings.final_moves if beta == 1 else 0), 0.0
        for _ in range(n_moves):
            point, probability = self.kernel.move(self.path, point, beta, step_size, generator)
            acceptance += float(probability[alive].mean()) / n_moves

        weights = torch.softmax(log_weights, 0)
        mean_u = float(weights[alive] @ point.u[alive])
        left = len(ancestors[alive].unique())
        done = Step(beta, cess, ess, resampled, acceptance, step_size, left, mean_u)
        step_size = adapted(step_size, acceptance, settings.acceptance)
        return State(point, log_weights, ancestors, step_size, self.path.counts, (*state.history, done))

    def _states(self, positions: Tensor) -> Tensor:
        if self.labels is None:
            return torch.zeros(len(positions), dtype=torch.long, device=positions.device)
        return torch.as_tensor(self.labels(positions)).to(positions.device, torch.long)

    def _first_step_size(self, point: Point, beta: float) -> float:
        """That of the wanted acceptance, by moves of copies of some walkers, which are forgotten."""
        generator = step_generator(self.seed, "annealing", "pilots", point.u.device)
        point, step_size = point[:: max(1, len(point) // PILOTS)], self.settings.step_size
        for _ in range(PILOT_MOVES):
            point, probability = self.kernel.move(self.path, point, beta, step_size, generator)
            off = float(probability.mean()) - self.settings.acceptance
            if abs(off) < CLOSE:
                break
            step_size = adapted(step_size, 2 * off, 0.0)
        return step_size


def _require_weight(log_weights: Tensor, point: Point) -> None:
    if not (log_weights.isfinite() & point.u.isfinite()).any():
        raise UserError(
            f"None of {len(point)} walkers has a finite weight, log q̃ and energy: look at the draws, and take more."
        )


def _result(state: State, settings: AnnealSettings) -> Annealed:
    arrays = (state.point.positions, state.point.u, state.log_weights, state.ancestors)
    positions, u, log_weights, ancestors = (each.cpu().numpy() for each in arrays)
    return Annealed(
        positions, u, log_weights, ancestors, state.history, state.counts, n_populations=settings.n_populations
    )
