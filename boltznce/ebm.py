"""An energy-based model of a flow's density, trained by score matching and contrast of times (arXiv 2507.00846).

Its likelihood costs one forward pass of a network, where the flow's own costs a Jacobian along the whole path.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from boltznce import ranks
from boltznce.errors import UserError
from boltznce.flows.context import ContextModel
from boltznce.smc import HMC, Path, with_gradient

__all__ = ["OBJECTIVES", "EnergyBasedModel"]

OBJECTIVES = ("both", "nce", "score")
N_WALKERS = 64
RESTARTS = 0.02  # share of the walkers that begin anew in a step: they live fifty moves on average
FIRST_STEP = 0.01  # of the walkers' leapfrog, in length scales
ACCEPTANCE = 0.85  # to which that step is adapted


class EnergyBasedModel(ContextModel):
    """E_θ(x, t), log-density of samples interpolated to time t, up to a constant; at t = 0 that of the samples.

    ``network(x, t, features) -> (batch,)`` works in scaled units ``x / length_scale``, see `ContextModel`. ``log_prob``
    lives on the same space as the flow (mean-free where ``centred``) and has an unknown additive constant:
    ``normalized`` is False. One network may serve many molecules; the constant is then another for each of them.

    >>> import torch
    >>> from boltznce.networks.mlp import MLPEnergy
    >>> ebm = EnergyBasedModel(MLPEnergy(width=8, n_blocks=1), n_atoms=1, dim=2, centred=False)
    >>> samples = torch.randn(64, 1, 2, generator=torch.Generator().manual_seed(0))
    >>> sorted(ebm.loss(samples, torch.Generator().manual_seed(1)))
    ['loss', 'nce', 'score']
    >>> ebm.log_prob(samples).shape
    torch.Size([64])
    """

    normalized = False
    walkers: Tensor
    walkers_step: Tensor

    def __init__(
        self,
        network: nn.Module,
        n_atoms: int,
        dim: int = 3,
        *,
        features: Tensor | None = None,
        mask: Tensor | None = None,
        length_scale: float = 1.0,
        centred: bool = True,
        interpolant: str = "trig",
        objective: str = "both",
        nce_weight: float = 1.0,
        nce_width: float = 0.025,
        n_negatives: int = 1,
        contrast_weight: float = 0.0,
        clip_negatives: bool = False,
        time_power: float = 1.0,
        t_read: float = 0.0,
    ) -> None:
        """``time_power`` p spreads training times as u^p, u uniform. u and those of the negatives are draws about a
        common centre, of variance ``nce_width``² / 2 each: only then are the true time and several others exchangeable,
        and the density of times cancels in the classification. ``clip_negatives`` clips them to [0, 1], as the authors
        do, and does not reflect. With a ``contrast_weight`` training also has walkers, see `contrast`.
        """
        scales: dict[str, Any] = {"length_scale": length_scale, "centred": centred, "interpolant": interpolant}
        super().__init__(network, n_atoms, dim, features=features, mask=mask, **scales)
        if objective not in OBJECTIVES:
            raise UserError(f"Unknown objective '{objective}': choose one of {', '.join(OBJECTIVES)}.")
        self.objective = objective
        self.nce_weight = nce_weight
        self.nce_width = nce_width
        self.n_negatives = n_negatives
        self.contrast_weight = contrast_weight
        self.clip_negatives = clip_negatives
        self.time_power = time_power
        self.t_read = t_read
        if contrast_weight:  # saved with the weights: an interrupted training goes on with its walkers
            self.register_buffer("walkers", torch.full((N_WALKERS, n_atoms, dim), torch.nan))
            self.register_buffer("walkers_step", torch.tensor(FIRST_STEP * length_scale))

    def log_prob(self, positions: Tensor, t: float | None = None) -> Tensor:
        """log q up to a constant (batch,), float64, of positions (batch, n, dim) in nm; at ``t`` of noised ones."""
        x = self._scale(positions)
        return self._call(x, x.new_full((len(x),), self.t_read if t is None else t)).double()

    @torch.no_grad()
    def log_prob_in_batches(self, positions: Tensor, batch_size: int = 2048) -> Tensor:
        """`log_prob` without gradients, in batches of bounded memory."""
        return torch.cat([self.log_prob(part) for part in positions.split(batch_size)])

    @torch.no_grad()
    def calibrate(self, positions: Tensor, generator: torch.Generator | None = None) -> None:
        """Let a network that scales its inputs measure them on interpolants of samples (batch, n, dim) in nm."""
        if self._measure is not None:
            x0 = self._scale(positions)
            x1 = self.prior.noise_like(x0, generator)
            self._measure(lambda t: self.interpolant.mix(x0, x1, x0.new_full((len(x0),), t)))

    def loss(self, positions: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Score-matching and NCE losses on a batch of samples (batch, n, dim) in nm, in training also the `contrast`.

        ``score``: E ‖σ_t ∇E(x_t, t) + x_1‖² / d. ``nce``: cross-entropy of telling the true time among ``n_negatives``
        others.
        """
        x0 = self._scale(positions)
        x1 = self.prior.noise_like(x0, generator)
        u = torch.rand(len(x0), generator=generator, dtype=x0.dtype, device=x0.device)
        t, n, here = u**self.time_power, len(u), ranks.part(len(u))
        x = self.interpolant.mix(x0[here], x1[here], t[here]).requires_grad_(self.objective != "nce")
        model = self.rows(here)
        energy = model._call(x, t[here])
        parts: dict[str, Any] = {}
        if self.objective != "nce":
            (score,) = torch.autograd.grad(energy.sum(), x, create_graph=self.training)
            residual = self.interpolant.sigma(t[here]).reshape(-1, 1, 1) * model.prior.project(score) + x1[here]
            errors = residual.square().sum(dim=(-2, -1)) / model.prior.dimensions
            parts["score"] = ranks.mean_of_all(errors, n)
        if self.objective != "score":
            others = self._other_times(u, generator)[:, here]
            parts["nce"] = ranks.mean_of_all(model._nce(x, energy, others), n)
        parts["loss"] = parts.get("score", 0.0) + self.nce_weight * parts.get("nce", 0.0)
        if self.contrast_weight and self.training:
            parts["contrast"] = self.contrast(positions, generator)
            parts["loss"] = parts["loss"] + self.contrast_weight * parts["contrast"]
        return parts

    def _other_times(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        """u of the ``n_negatives`` times (n_negatives, batch) to be told from that of the samples (batch,)."""
        noise = torch.randn(1 + self.n_negatives, len(u), generator=generator, dtype=u.dtype, device=u.device)
        other = u + self.nce_width / math.sqrt(2.0) * (noise[0] + noise[1:])
        return other.clamp(0, 1) if self.clip_negatives else _reflect(other)

    def _nce(self, x: Tensor, energy: Tensor, others: Tensor) -> Tensor:
        """Cross-entropy (batch,) of telling the samples' own time, at which they have ``energy``, from ``others``."""
        logits = torch.stack([energy, *(self._call(x, time**self.time_power) for time in others)])
        return -functional.log_softmax(logits, dim=0)[0]

    def contrast(self, positions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean E(x, 0) of walkers in exp E minus that of samples (batch, n, dim) in nm, after one move of the former.

        Its gradient is that of the samples' negative log-likelihood, the walkers being draws of the model (persistent
        contrastive divergence, Tieleman 2008): it lowers E where walkers stay and samples are not, which no loss on
        samples alone can see. Some walkers begin anew from samples at each step (Du & Mordatch 2019, arXiv 1903.08689).
        """
        again = torch.rand(N_WALKERS, generator=generator, device=positions.device) < RESTARTS
        again = again | ~self.walkers.flatten(1).isfinite().all(1)
        fresh = positions[torch.arange(N_WALKERS, device=positions.device) % len(positions)]
        walkers = torch.where(again.reshape(-1, 1, 1), fresh, self.walkers)
        path, kernel = Path(with_gradient(self.log_prob), _nothing), HMC(centred=self.prior.centred)
        moved, accepted = kernel.move(path, path.point(walkers), 0.0, self.walkers_step, generator)
        self.walkers.copy_(moved.positions)
        self.walkers_step.mul_((accepted.mean() - ACCEPTANCE).exp())
        of_walkers, of_samples = self.log_prob(torch.cat([moved.positions, fresh])).split(N_WALKERS)
        return (of_walkers.mean() - of_samples.mean()).to(positions.dtype)

    def regression_loss(self, positions: Tensor, log_q: Tensor, huber: float = 20.0) -> Tensor:
        """Huber loss in kT² between E(x, 0) + c and (noisy, unbiased) log-likelihoods (batch,) of samples, c the
        batch's best.

        Where the noise is that of one Hutchinson probe its average is the log-likelihood itself: the regression takes
        the average.
        """
        difference = self.log_prob(positions).to(positions.dtype) - log_q.to(positions.dtype)
        difference = difference - _centre(difference.detach(), huber)
        return functional.huber_loss(difference, torch.zeros_like(difference), delta=huber)


def _centre(values: Tensor, width: float) -> Tensor:
    """Mean of values, those further than ``width`` from their median drawn in to it."""
    middle = values.median()
    return middle + (values - middle).clamp(-width, width).mean()


def _reflect(u: Tensor) -> Tensor:
    """Fold the real line onto [0, 1] at its ends."""
    return 1 - (1 - torch.remainder(u, 2)).abs()


def _nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    """The target of walkers that stay in their base."""
    return x.new_zeros(len(x), dtype=torch.float64), torch.zeros_like(x)
