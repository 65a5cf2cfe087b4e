"""From high temperature to low without data: reverse KL while hot, then draw, weight, clip, resample, retrain.

For any generator with any log q, as TA-BG (arXiv 2501.19077) does it. In place of resampling and maximum likelihood a
stage can be trained on its generator's own draws, by the log-variance divergence (arXiv 2010.10436) or by path
gradients (arXiv 2403.15881). Energies are reduced, u = U / kT.
"""

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from boltznce.analysis.reweighting import WeightedSamples, WeightedSamplesWriter, guard
from boltznce.analysis.samples_io import SAMPLES
from boltznce.errors import UserError
from boltznce.folders import discard

__all__ = [
    "BufferRecord",
    "fill_buffer",
    "forget_buffer",
    "forward_kl",
    "log_variance",
    "path_kl",
    "reverse_kl",
    "soften",
    "temperature_ladder",
]

log = logging.getLogger(__name__)

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # n, generator -> positions (n, atoms, dim), log q (n,)
Energy = Callable[[Tensor], Tensor]  # positions -> u (n,)

ENERGY_CUT = 1e8
ENERGY_CAP = 1e20
COLLAPSED = 0.01  # relative ESS below which a stage is warned about


def temperature_ladder(
    hot: float, cold: float, n_steps: int, repeat_last: int = 1, repeat_first: int = 0, repeat_between: int = 0
) -> list[tuple[float, float]]:
    """(drawn at, weighted to) of each stage: ``n_steps`` of one ratio from hot to cold.

    So many more stages stay at the first temperature, at the last, and at each one between. No steps, no stages: then
    hot must be cold. Raises UserError for a ladder that does not go down.

    >>> temperature_ladder(1200.0, 300.0, 2)
    [(1200.0, 600.0), (600.0, 300.0), (300.0, 300.0)]
    """
    if n_steps == 0 and hot == cold:
        return []
    if not hot > cold > 0 or n_steps < 1 or min(repeat_first, repeat_between, repeat_last) < 0:
        raise UserError(f"A temperature ladder goes down in one step or more: got {n_steps} from {hot} to {cold}.")
    between = [hot * (cold / hot) ** (k / n_steps) for k in range(1, n_steps) for _ in range(1 + repeat_between)]
    return list(itertools.pairwise([hot] * (1 + repeat_first) + between + [cold] * (1 + repeat_last)))


def soften(u: Tensor, cut: float = ENERGY_CUT, cap: float = ENERGY_CAP) -> Tensor:
    """u up to ``cut``, log(u - cut + 1) + cut above it; above ``cap`` or not a number: ``cap``, no gradient."""
    u = u.nan_to_num(nan=cap, posinf=cap, neginf=-cap).clamp(max=cap)
    return torch.where(u > cut, torch.log((u - cut).clamp_min(0) + 1) + cut, u)


def reverse_kl(log_q: Tensor, u: Tensor, drop_highest: int = 0, cut: float = ENERGY_CUT) -> dict[str, Tensor]:
    """The loss E_q[log q + u] of draws (n,), and its two parts: KL(q ‖ p) up to log Z.

    ``drop_highest`` of the highest energies are left out, u is softened above ``cut``.

    >>> parts = reverse_kl(torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([3.0, 2.0, 1e9]), drop_highest=1)
    >>> {name: float(value) for name, value in parts.items()}
    {'loss': 1.0, 'log_q': -1.5, 'energy': 2.5}
    """
    u = soften(u.double(), cut)
    if drop_highest:
        kept = u.detach().topk(len(u) - drop_highest, largest=False).indices
        log_q, u = log_q[kept], u[kept]
    return {"loss": (log_q + u).mean(), "log_q": log_q.mean().detach(), "energy": u.mean().detach()}


def forward_kl(log_q: Tensor) -> dict[str, Tensor]:
    """The loss -E[log q] over data inside the generator's domain, and the share outside, where log q is -inf."""
    inside = log_q.isfinite()
    return {"loss": -torch.where(inside, log_q, 0.0).sum() / inside.sum(), "outside": 1 - inside.float().mean()}


def log_variance(log_q: Tensor, u: Tensor, clip: float = 3.0, covering: float = 0.0) -> dict[str, Tensor]:
    """The loss whose gradient makes d = log p - log q the same for all points (n,), wherever these come from.

    Its gradient is -mean(φ ∇ log q), with φ(d) = d + ``covering`` (exp(d) - 1) less its mean, d counted from the median
    and cut at ±``clip``: for ``covering=0`` half that of the log-variance divergence (Richter et al. 2020, arXiv
    2010.10436), with Huber's cut against points of extreme energy. What q has too little of counts more the larger
    ``covering``. It needs no derivative of the energy, and no weights, and it is free of noise where q is right:
    reverse KL's is as rough as the energy, forward KL's never ends.

    Points outside the generator's domain, where log q is -inf, are left out. Also returned: the variance of the cut d.
    """
    inside = log_q.isfinite()
    share = inside.double() / inside.sum()
    log_q = torch.where(inside, log_q, 0.0)
    d = -u.double() - log_q.detach()
    d = (d - torch.where(inside, d, math.nan).nanmedian()).clamp(-clip, clip)
    pull = share * (d + covering * torch.expm1(d))
    pull = pull - share * pull.sum()
    variance = (share * d.square()).sum() - (share * d).sum().square()
    return {"loss": -(pull * log_q).sum(), "variance": variance, "outside": 1 - inside.float().mean()}


def path_kl(
    log_q: Tensor, u: Tensor, clip: float = 3.0, covering: float = 0.0, cut: float = ENERGY_CUT
) -> dict[str, Tensor]:
    """The loss whose gradient is that of KL(q ‖ p) + ``covering`` KL(p ‖ q), over 1 + ``covering``, for own draws (n,).

    log q and u must be differentiable along the path of the draws alone (`SplineFlow.sample_with_path_log_prob`). On
    such a path, with d = log p - log q, the gradient of any divergence E_q[f(exp d)] is -E_q[h ∇_x d · ∂x/∂weights]
    with h(w) = w² f''(w): 1 for the reverse KL and w for the forward KL, which needs no data therefore. Every draw's
    part vanishes where q is right, and a draw tells of its error in all directions, where to `log_variance` it tells
    one number.

    The weights w = exp(d) are relative to the median and cut at exp(``clip``); u is softened above ``cut``. Also
    returned: the variance of d, cut at ±``clip``.
    """
    u = soften(u.double(), cut)
    d = (-u - log_q).detach()
    d = d - d.median()
    pull = (1 + covering * d.clamp(max=clip).exp()) / (1 + covering)
    return {"loss": (pull * (log_q + u)).mean(), "variance": d.clamp(-clip, clip).var(correction=0)}


@dataclass(frozen=True)
class BufferRecord:
    """How well draws at one temperature covered the next: relative ESS, as it is and with top weights clipped."""

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
    clip: float,
    batch_size: int,
    generator_of: Callable[[int], torch.Generator],
) -> tuple[WeightedSamples, BufferRecord]:
    """Draw, weight by exp(-u - log q) at the next temperature, clip the top share ``clip`` of the weights.

    Returns the ``n_draws`` draws with their clipped weights, and the record; warns if the effective sample size has
    collapsed. Draws are on disk in ``folder``, batch by batch (batch k takes its random numbers from
    ``generator_of(k)``): a killed call goes on where it was, a finished one is loaded.
    """
    folder = Path(folder)
    drawn = _draw_weighted(draw, energy, folder, n_draws, batch_size, generator_of)
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
            "Take more steps (annealing.n_steps), train longer (annealing.fit.steps) or draw more (annealing.n_draws).",
            *(*temperatures, 100 * record.ess_clipped),
        )
    return clipped, record


def forget_buffer(folder: Path) -> None:
    """Delete what `fill_buffer` left on disk."""
    discard(folder, SAMPLES)


@torch.no_grad()
def _draw_weighted(
    draw: Draw, energy: Energy, folder: Path, n: int, batch_size: int, generator_of: Callable[[int], torch.Generator]
) -> WeightedSamples:
    """``n`` draws with energies, log q and weights, in ``folder``. What is not finite gets the weight zero."""
    if not (folder / "meta.yaml").exists():
        writer = WeightedSamplesWriter(folder, meta={"n": n, "batch_size": batch_size})
        with tqdm(total=n, initial=writer.n_written, desc=folder.name, mininterval=5.0, leave=False) as bar:
            while writer.n_written < n:
                start = writer.n_written
                x, log_q = draw(min(batch_size, n - start), generator_of(start // batch_size))
                u, log_q, _ = guard(energy(x), log_q)
                positions, energies, log_probs = (a.cpu().numpy() for a in (x, u, log_q))
                writer.append(positions, energies, log_probs)
                bar.update(len(u))
        writer.finish()
    return WeightedSamples.load(folder)
