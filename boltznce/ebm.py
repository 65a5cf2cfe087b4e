"""An energy-based model of a flow's density, trained by score matching and noise-contrastive estimation (BoltzNCE, arXiv 2507.00846).

Its likelihood costs one forward pass of a network, where the flow's own costs a Jacobian along the whole path.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from boltznce.errors import UserError
from boltznce.flows.interpolant import make_interpolant
from boltznce.flows.prior import GaussianPrior
from boltznce.molecules import Molecules

__all__ = ["OBJECTIVES", "EnergyBasedModel"]

OBJECTIVES = ("both", "nce", "score")


class EnergyBasedModel(nn.Module):
    """E_θ(x, t), the log-density of the interpolated samples at time t up to a constant; at t = 0 it is the likelihood of the samples.

    ``network(x, t, features) -> (batch,)`` works in scaled units ``x / length_scale``. ``log_prob`` lives on the same space as the flow
    (mean-free where ``centred``) and has an unknown additive constant: ``normalized`` is False. Given the ``molecules`` that the rows are,
    one network ``network(x, t, features, mask)`` serves many; the constant is then another for each molecule.
    """

    normalized = False

    def __init__(
        self,
        network: nn.Module,
        n_atoms: int,
        dim: int = 3,
        *,
        features: Tensor | None = None,
        length_scale: float = 1.0,
        centred: bool = True,
        interpolant: str = "trig",
        objective: str = "both",
        nce_weight: float = 1.0,
        nce_width: float = 0.025,
        n_negatives: int = 1,
        clip_negatives: bool = False,
        time_power: float = 1.0,
        t_read: float = 0.0,
    ) -> None:
        """``time_power`` p spreads training times as u^p, u uniform; the negatives' times are drawn around u, so that the density of times
        cancels in the classification. ``clip_negatives`` clips them to [0, 1] as the authors do, in place of reflecting them.
        """
        super().__init__()
        if objective not in OBJECTIVES:
            raise UserError(f"Unknown objective '{objective}': choose one of {', '.join(OBJECTIVES)}.")
        self.network = network
        self.interpolant = make_interpolant(interpolant)
        self.prior = GaussianPrior(n_atoms, dim, centred)
        self.objective = objective
        self.length_scale = length_scale
        self.nce_weight = nce_weight
        self.nce_width = nce_width
        self.n_negatives = n_negatives
        self.clip_negatives = clip_negatives
        self.time_power = time_power
        self.t_read = t_read
        self.register_buffer("features", features)
        # the constant between E(x, 0) and a normalized log-likelihood, learned by `regression_loss`
        self.log_constant = nn.Parameter(torch.zeros(()))

    def log_prob(self, positions: Tensor, t: float | None = None, molecules: Molecules | None = None) -> Tensor:
        """log q up to a constant (batch,), float64, of positions (batch, n, dim) in nm; ``t`` reads the density at another noise level."""
        x = self._scale(positions, molecules)
        time = torch.full((len(x),), self.t_read if t is None else t, dtype=x.dtype, device=x.device)
        return self._energy(x, time, molecules).double()

    @torch.no_grad()
    def log_prob_in_batches(self, positions: Tensor, batch_size: int = 2048, molecules: Molecules | None = None) -> Tensor:
        """`log_prob` without gradients, in batches of bounded memory."""
        if molecules is None:
            return torch.cat([self.log_prob(part) for part in positions.split(batch_size)])
        rows = [slice(start, start + batch_size) for start in range(0, len(positions), batch_size)]
        return torch.cat([self.log_prob(positions[row], molecules=molecules[row]) for row in rows])

    @torch.no_grad()
    def calibrate(self, positions: Tensor, generator: torch.Generator | None = None) -> None:
        """Let a network that scales its inputs (one with ``calibrate``) measure them on interpolants of samples (batch, n, dim) in nm."""
        if hasattr(self.network, "calibrate"):
            x0 = self._scale(positions)
            x1 = self.prior.noise_like(x0, generator)
            self.network.calibrate(lambda t: self.interpolant.mix(x0, x1, x0.new_full((len(x0),), t)))

    @torch.no_grad()
    def calibrate_constant(self, positions: Tensor, log_q: Tensor) -> None:
        """Start the constant of `regression_loss` where its mean error on these samples is zero."""
        self.log_constant.copy_((log_q - self.log_prob(positions)).median())

    def loss(self, positions: Tensor, generator: torch.Generator | None = None, molecules: Molecules | None = None) -> dict[str, Tensor]:
        """Score-matching and NCE losses on a batch of samples (batch, n, dim) in nm.

        ``score``: E ‖σ_t ∇E(x_t, t) + x_1‖² / d. ``nce``: cross-entropy of telling the true time among ``n_negatives`` others.
        """
        mask = None if molecules is None else molecules.mask
        x0 = self._scale(positions, molecules)
        x1 = self.prior.noise_like(x0, generator, mask)
        u = torch.rand(len(x0), generator=generator, dtype=x0.dtype, device=x0.device)
        t = u**self.time_power
        x = self.interpolant.mix(x0, x1, t)
        parts: dict[str, Tensor] = {}
        if self.objective in ("both", "score"):
            x.requires_grad_(True)
            energy = self._energy(x, t, molecules)
            (score,) = torch.autograd.grad(energy.sum(), x, create_graph=self.training)
            residual = self.interpolant.sigma(t).reshape(-1, 1, 1) * self.prior.project(score, mask) + x1
            squared = residual.square().sum(dim=(-2, -1))
            d = self.prior.dimensions(mask)
            parts["score"] = squared.mean() / d if molecules is None else (squared / d).mean()
        else:
            energy = self._energy(x, t, molecules)
        if self.objective in ("both", "nce"):
            parts["nce"] = self._nce(x, u, energy, generator, molecules)
        parts["loss"] = parts.get("score", 0.0) + self.nce_weight * parts.get("nce", 0.0)
        return parts

    def _nce(self, x: Tensor, u: Tensor, energy: Tensor, generator: torch.Generator | None, molecules: Molecules | None = None) -> Tensor:
        noise = torch.randn(self.n_negatives, len(u), generator=generator, dtype=u.dtype, device=u.device)
        other = u + self.nce_width * noise
        other = other.clamp(0, 1) if self.clip_negatives else _reflect(other)
        repeated = None if molecules is None else molecules.repeat(self.n_negatives)
        negative = self._energy(x.expand(self.n_negatives, *x.shape).flatten(0, 1), other.flatten() ** self.time_power, repeated).view_as(
            other
        )
        logits = torch.cat([energy.unsqueeze(0), negative])
        return -functional.log_softmax(logits, dim=0)[0].mean()

    def regression_loss(self, positions: Tensor, log_q: Tensor, huber: float = 20.0, free_constant: bool = False) -> Tensor:
        """Huber loss in kT² between E(x, 0) + c and (noisy, unbiased) log-likelihoods (batch,) of samples; c is learned.

        Where the noise is that of one Hutchinson probe its average is the log-likelihood itself: the regression takes the average.
        ``free_constant``: c is the best one for this batch, of one molecule, in place of a learned one.
        """
        difference = self.log_prob(positions).to(positions.dtype) - log_q.to(positions.dtype)
        difference = difference - _centre(difference.detach(), huber) if free_constant else difference + self.log_constant
        return functional.huber_loss(difference, torch.zeros_like(difference), delta=huber)

    def _energy(self, x: Tensor, t: Tensor, molecules: Molecules | None = None) -> Tensor:
        if molecules is None:
            return self.network(x, t, self.features)
        return self.network(x, t, molecules.features, molecules.mask)

    def _scale(self, positions: Tensor, molecules: Molecules | None = None) -> Tensor:
        return self.prior.project(positions / self.length_scale, None if molecules is None else molecules.mask)


def _centre(values: Tensor, width: float) -> Tensor:
    """Mean of values, those further than ``width`` from their median drawn in to it."""
    middle = values.median()
    return middle + (values - middle).clamp(-width, width).mean()


def _reflect(u: Tensor) -> Tensor:
    """Fold the real line onto [0, 1] at its ends."""
    return 1 - (1 - torch.remainder(u, 2)).abs()
