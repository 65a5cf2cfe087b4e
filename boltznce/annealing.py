"""From high temperature to low without data: reverse KL where nothing is separated, then draw, weight, clip, resample, retrain.

For any generator with any log q, as TA-BG (arXiv 2501.19077) does it. Energies are reduced, u = U / kT.
"""

import itertools
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from boltznce.analysis.reweighting import WeightedSamples, WeightedSamplesWriter
from boltznce.errors import UserError
from boltznce.io import atomic_file, require_free_space

__all__ = [
    "BufferRecord",
    "fill_buffer",
    "forget_buffer",
    "forward_kl",
    "reverse_kl",
    "reverse_kl_along_paths",
    "soften",
    "temperature_ladder",
]

log = logging.getLogger(__name__)

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # n, generator -> positions (n, atoms, dim), log q (n,)
Energy = Callable[[Tensor], Tensor]  # positions -> u (n,)

ENERGY_CUT = 1e8
ENERGY_CAP = 1e20
COLLAPSED = 0.01  # relative ESS below which a stage is warned about


def temperature_ladder(hot: float, cold: float, n_steps: int, repeat_last: int = 1, repeat_first: int = 0) -> list[tuple[float, float]]:
    """(drawn at, weighted to) of each stage: ``n_steps`` of one ratio from hot to cold; at either end so many more at that temperature."""
    if not hot > cold > 0 or n_steps < 1 or repeat_first < 0 or repeat_last < 0:
        raise UserError(f"A temperature ladder goes down in one step or more: got {n_steps} from {hot} to {cold}.")
    between = [hot * (cold / hot) ** (k / n_steps) for k in range(1, n_steps)]
    return list(itertools.pairwise([hot] * (1 + repeat_first) + between + [cold] * (1 + repeat_last)))


def soften(u: Tensor, cut: float = ENERGY_CUT, cap: float = ENERGY_CAP) -> Tensor:
    """u up to ``cut``, log(u - cut + 1) + cut above it; what is above ``cap`` or not a number counts as ``cap``, without gradient."""
    u = u.nan_to_num(nan=cap, posinf=cap, neginf=-cap).clamp(max=cap)
    return torch.where(u > cut, torch.log((u - cut).clamp_min(0) + 1) + cut, u)


def reverse_kl(log_q: Tensor, u: Tensor, drop_highest: int = 0, cut: float = ENERGY_CUT) -> dict[str, Tensor]:
    """The loss E_q[log q + u] of draws (n,), their ``drop_highest`` highest energies left out, u softened above ``cut``; and its two parts.

    KL(q ‖ p) up to the constant log Z, if nothing is left out.
    """
    u = soften(u.double(), cut)
    if drop_highest:
        kept = u.detach().topk(len(u) - drop_highest, largest=False).indices
        log_q, u = log_q[kept], u[kept]
    return {"loss": (log_q + u).mean(), "log_q": log_q.mean().detach(), "energy": u.mean().detach()}


def reverse_kl_along_paths(
    x: Tensor, log_prob: Callable[[Tensor], Tensor], energy: Energy, clip: float, cut: float = ENERGY_CUT
) -> dict[str, Tensor]:
    """The loss of `reverse_kl`, whose gradient goes through the draws x (n, atoms, dim) alone (Roeder et al. 2017, arXiv 1703.09194).

    Left out is the derivative of log q at fixed x, which is zero on average and nearly all of a good generator's noise: Adam makes large
    steps of that noise in every direction that the loss hardly feels. A draw's pull on x, the gradient of log q + u, is shortened to
    ``clip`` times the batch's median; one that is not finite is left out.
    """
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        log_q, u = log_prob(leaf), soften(energy(leaf).double(), cut)
        (pull,) = torch.autograd.grad((log_q + u).sum(), leaf)
    size = pull.flatten(1).norm(dim=1)
    fine = size.isfinite() & log_q.isfinite()
    largest = clip * torch.where(fine, size, math.inf).median()
    shortened = torch.where(fine, torch.where(size > largest, largest / size, 1.0), 0.0)
    pull = torch.where(fine[:, None, None], pull, 0.0) * shortened[:, None, None].to(pull)
    log_q, u = torch.where(fine, log_q, 0.0).mean().detach(), torch.where(fine, u, 0.0).mean().detach()
    through = (x * pull).sum() / len(x)
    return {"loss": log_q + u + through - through.detach(), "log_q": log_q, "energy": u, "shortened": (shortened < 1).float().mean()}


def forward_kl(log_q: Tensor) -> dict[str, Tensor]:
    """The loss -E[log q] over the data inside the generator's domain, and the share of them outside, where log q is -inf."""
    inside = log_q.isfinite()
    return {"loss": -torch.where(inside, log_q, 0.0).sum() / inside.sum(), "outside": 1 - inside.float().mean()}


@dataclass(frozen=True)
class BufferRecord:
    """How well draws at one temperature covered the next: ESS (relative) as it is and with the top weights clipped, Pareto-k."""

    drawn_at: float
    weighted_to: float
    n_draws: int
    energy_evaluations: int
    ess: float
    ess_clipped: float
    pareto_k: float
    not_finite: int  # draws of no finite energy or log q, which weigh nothing


def fill_buffer(
    draw: Draw,
    energy: Energy,
    folder: Path,
    *,
    temperatures: tuple[float, float],
    n_draws: int,
    n_buffer: int,
    clip: float,
    batch_size: int,
    generator_of: Callable[[int], torch.Generator],
    rng: np.random.Generator,
) -> tuple[np.ndarray, BufferRecord]:
    """Draw, weight by exp(-u - log q) at the next temperature, clip the top share ``clip`` of the weights, resample with replacement.

    Returns positions (n_buffer, atoms, dim), memory-mapped from ``folder``, and the record. Draws are on disk batch by batch (batch k takes
    its random numbers from ``generator_of(k)``): a killed call goes on where it was, a finished one is loaded.

    Warns if the effective sample size has collapsed, with what to do.
    """
    folder = Path(folder)
    drawn = _draw_weighted(draw, energy, folder.with_name(f"{folder.name}-draws"), n_draws, batch_size, generator_of)
    clipped = drawn.clip(clip)
    record = BufferRecord(
        *temperatures,
        n_draws=len(drawn),
        energy_evaluations=len(drawn),
        ess=drawn.ess,
        ess_clipped=clipped.ess,
        pareto_k=drawn.pareto_k,
        not_finite=int(np.isinf(drawn.log_weights).sum()),
    )
    if record.ess_clipped < COLLAPSED:
        log.warning(
            "From %.4g to %.4g the effective sample size collapsed to %.2g%%: the buffer holds few different samples. "
            "Use more steps (annealing.n_steps), train each longer (annealing.fit.steps), or draw more (annealing.n_draws).",
            *temperatures,
            100 * record.ess_clipped,
        )
    path = folder / "positions.npy"
    if not path.exists():
        require_free_space(folder, 4 * n_buffer * int(np.prod(drawn.positions.shape[1:])))
        positions = clipped.resample(n_buffer, rng).positions
        with atomic_file(path) as temporary, open(temporary, "wb") as handle:
            np.save(handle, positions)
    return np.load(path, mmap_mode="r"), record


def forget_buffer(folder: Path) -> None:
    """Delete what `fill_buffer` left on disk."""
    for path in (Path(folder), Path(folder).with_name(f"{Path(folder).name}-draws")):
        shutil.rmtree(path, ignore_errors=True)


@torch.no_grad()
def _draw_weighted(
    draw: Draw, energy: Energy, folder: Path, n: int, batch_size: int, generator_of: Callable[[int], torch.Generator]
) -> WeightedSamples:
    """``n`` draws with energies, log q and weights, in ``folder``. What is not finite gets the weight zero."""
    if not (folder / "meta.yaml").exists():
        writer = WeightedSamplesWriter(folder, meta={"n": n, "batch_size": batch_size})
        with tqdm(total=n, initial=writer.n_written, desc=folder.name, unit="sample", mininterval=5.0, leave=False) as bar:
            while writer.n_written < n:
                start = writer.n_written
                x, log_q = draw(min(batch_size, n - start), generator_of(start // batch_size))
                u = energy(x).double()
                fine = u.isfinite() & log_q.isfinite()
                u, log_q = torch.where(fine, u, math.inf), torch.where(fine, log_q.double(), 0.0)
                writer.append(*(a.cpu().numpy() for a in (x, u, log_q, -u - log_q)))
                bar.update(len(u))
        writer.finish()
    return WeightedSamples.load(folder, verify=False)
