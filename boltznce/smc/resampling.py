"""Systematic resampling of weighted walkers within groups, each of which carries its total weight on."""

import torch
from torch import Tensor

__all__ = ["resample_within", "systematic"]


def systematic(weights: Tensor, offset: float, n: int | None = None) -> Tensor:
    """Indices (n,) of which i occurs ⌊n W_i⌋ or ⌈n W_i⌉ times, n W_i on average over ``offset``, uniform in [0, 1).

    By default as many as weights; in increasing order, so that relatives stay neighbours (Douc, Cappé & Moulines 2005).

    >>> systematic(torch.tensor([0.5, 0.0, 0.25, 0.25]), 0.3)
    tensor([0, 0, 2, 3])
    """
    n = n or len(weights)
    places = (torch.arange(n, dtype=torch.float64, device=weights.device) + offset) / n
    edges = weights.double().cumsum(0)
    return torch.searchsorted(edges / edges[-1], places.clamp(max=1 - 2**-53), right=True)


def resample_within(
    log_weights: Tensor, groups: Tensor, generator: torch.Generator, below: float = 0.5
) -> tuple[Tensor, Tensor, int]:
    """Indices of the walkers that go on, their log weights (n,), and how many groups have been resampled.

    A group whose relative ESS is under ``below`` is resampled: it keeps its number of walkers and its total weight,
    which they share. So no group dies out for being rare, and expectations stay what they were. ``groups`` (n,) are
    numbers from zero on; the random numbers do not depend on which of them are resampled.

    >>> log_weights = torch.tensor([0.0, -9.0, 0.0, 0.0]).double()
    >>> resample_within(log_weights, torch.tensor([0, 0, 1, 1]), torch.Generator().manual_seed(0), below=0.6)
    (tensor([0, 0, 2, 3]), tensor([-0.6930, -0.6930,  0.0000,  0.0000], dtype=torch.float64), 1)
    """
    n_groups = int(groups.max()) + 1
    offsets = torch.rand(n_groups, generator=generator, device=log_weights.device, dtype=torch.float64)
    index, log_weights = torch.arange(len(groups), device=groups.device), log_weights.clone()
    n_resampled = 0
    for group in range(n_groups):
        members = (groups == group).nonzero().squeeze(1)
        total = log_weights[members].logsumexp(0) if len(members) else log_weights.new_tensor(-torch.inf)
        if not total.isfinite():
            continue
        weights = (log_weights[members] - total).exp()
        if 1 / weights.square().sum() < below * len(members):
            index[members] = members[systematic(weights, float(offsets[group]))]
            log_weights[members] = total - torch.tensor(float(len(members))).double().log()
            n_resampled += 1
    return index, log_weights, n_resampled
