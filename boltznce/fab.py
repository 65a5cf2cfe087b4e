"""Flow annealed importance sampling bootstrap, FAB (Midgley et al. 2023, arXiv 2208.01893), for α = 2.

A flow learns from points where p²/q is large, that is where it puts too little: its own draws, annealed from q to p²/q
by Hamiltonian moves. They are dear, and so kept, with their weights, in a buffer from which they are drawn many times.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from boltznce.smc import HMC, Path, Point

__all__ = ["ReplayBuffer", "alpha_divergence", "anneal_beyond"]


@torch.no_grad()
def anneal_beyond(
    path: Path, positions: Tensor, step_sizes: Sequence[float] | Tensor, *, kernel: HMC, n_moves: int, generator
) -> tuple[Point, Tensor, Tensor]:
    """Draws (n, ...) of q, the base of a path that goes ``beyond``, annealed to p²/q.

    Returns where they end, log weights (n,) and acceptances (k,).

    The path q^{1-β} (p²/q)^β, 0 ≤ β ≤ 1, is π_b = q^{1-b} p^b for b = 2β from 0 to 2: the one from q to p, and as far
    again beyond it. Between q and p²/q lie k evenly spaced densities, a step size for each, which ``n_moves``
    Hamiltonian moves leave invariant. By the weights, p = exp(-u) unnormalized, annealed importance sampling (Neal
    2001) has the mean of w over draws be ∫ p²/q.

    >>> from boltznce.smc import with_gradient
    >>> q = with_gradient(lambda x: -0.5 * (x**2).sum(-1) - 0.5 * math.log(2 * math.pi))
    >>> p = with_gradient(lambda x: 0.5 * (x**2).sum(-1) + 0.5 * math.log(2 * math.pi))
    >>> generator = torch.Generator().manual_seed(0)
    >>> _, log_weights, _ = anneal_beyond(Path(q, p, beyond=True), torch.randn(4, 1), [0.1], kernel=HMC(), n_moves=1,
    ...                                   generator=generator)
    >>> log_weights  # of a flow that is right
    tensor([0., 0., 0., 0.], dtype=torch.float64)
    """
    point = path.point(positions)
    log_weights = torch.zeros_like(point.u)
    acceptances, k = [], len(step_sizes)
    for j in range(k + 1):
        log_weights = log_weights + 2 / (k + 1) * (-point.u - point.log_base)
        if j == k:
            break
        of_moves = []
        for _ in range(n_moves):
            point, probability = kernel.move(path, point, 2 * (j + 1) / (k + 1), step_sizes[j], generator)
            of_moves.append(probability.mean())
        acceptances.append(torch.stack(of_moves).mean())
    return point, log_weights, torch.stack(acceptances) if k else log_weights.new_zeros(0)


def alpha_divergence(log_q: Tensor, log_q_then: Tensor, most: float = 10.0) -> Tensor:
    """The loss -mean(c log q) over points (n,) drawn from a buffer by weight; its gradient is that of ∫ p²/q.

    Weights are those of p²/q_then, of the flow that the points came from: c = q_then/q, at most ``most``, makes them
    those of p²/q. Up to a constant factor; points outside of the flow's domain, where log q is -inf, are left out.

    >>> log_q = torch.tensor([-1.0, -3.0])
    >>> alpha_divergence(log_q, log_q).item(), round(alpha_divergence(log_q, log_q + math.log(2.0)).item(), 6)
    (2.0, 4.0)
    """
    inside = log_q.isfinite() & log_q_then.isfinite()
    log_q, then = torch.where(inside, log_q, 0.0), torch.where(inside, log_q_then, 0.0)
    correction = torch.where(inside, (then - log_q).detach().exp().clamp(max=most), 0.0)
    return -(correction * log_q).mean()


class ReplayBuffer(nn.Module):
    """The latest points of annealed draws (size, d), drawn again by weight; weights follow the flow as it changes.

    Its buffers are all its state, for checkpoints. Where a point goes is the caller's to count: no count waits for the
    device.
    """

    points: Tensor
    log_weights: Tensor
    log_q: Tensor

    def __init__(self, size: int, dimension: int) -> None:
        super().__init__()
        self.register_buffer("points", torch.zeros(size, dimension))
        self.register_buffer("log_weights", torch.full((size,), -math.inf, dtype=torch.float64))
        self.register_buffer("log_q", torch.full((size,), -math.inf, dtype=torch.float64))

    def add(self, start: int, points: Tensor, log_weights: Tensor, log_q: Tensor) -> None:
        """Write points (n, d), log weights and log q (n,) from place ``start`` modulo the size on, over the oldest.

        What weighs nothing is drawn last, and then has a log q of -inf, as an empty place has.
        """
        index = (start + torch.arange(len(points), device=points.device)) % len(self.points)
        log_q = torch.where(log_weights.isfinite(), log_q, -math.inf)
        self.points[index] = points.to(self.points)
        self.log_weights[index], self.log_q[index] = log_weights.to(self.log_weights), log_q.to(self.log_q)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Places (n,) of different points, drawn one after another by weight (Gumbel's trick)."""
        uniform = torch.rand(
            len(self.log_weights), generator=generator, device=self.log_weights.device, dtype=torch.float64
        )
        return (self.log_weights - torch.log(-uniform.log())).topk(n).indices

    def update(self, index: Tensor, log_q: Tensor) -> None:
        """Give the points at ``index`` the weights of p²/q for today's log q (n,): w ← w q_then / q."""
        then = self.log_q[index]
        known = log_q.isfinite() & then.isfinite()
        self.log_weights[index] += torch.where(known, then - log_q, 0.0)
        self.log_q[index] = torch.where(known, log_q, then)
