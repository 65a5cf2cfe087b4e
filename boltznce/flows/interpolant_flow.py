"""A stochastic-interpolant flow: training losses, ODE and SDE sampling, exact and Hutchinson log-likelihood.

Source: BoltzNCE (arXiv 2507.00846), section 3; likelihood of a continuous flow: Chen et al. 2018 (arXiv 1806.07366).
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from boltznce.errors import UserError
from boltznce.flows.coupling import make_coupling
from boltznce.flows.divergence import Probes, exact_divergence, hutchinson_divergence
from boltznce.flows.interpolant import make_interpolant
from boltznce.flows.prior import GaussianPrior, masked_subspace_basis, subspace_basis
from boltznce.flows.solvers import SolverSettings, integrate, time_grid
from boltznce.molecules import Molecules

__all__ = ["LIKELIHOODS", "InterpolantFlow"]

LIKELIHOODS = ("none", "exact", "hutchinson")
OBJECTIVES = ("velocity", "endpoint")


class InterpolantFlow(nn.Module):
    """Flow whose velocity is ``network(x, t, features)`` in scaled units ``x / length_scale``.

    With ``centred`` (molecules) it lives on the mean-free subspace of dimension d = dim (n - 1): prior, noise, probes and velocities are
    projected on it; otherwise on the full space. ``log_prob`` is normalized there, per nm^d. ``objective="endpoint"`` reads the network's
    output as E[x_0 | x_t]; its velocity is singular at t = 0, so integration ends at ``t_min`` > 0, in sampling and likelihood.

    With ``whiten`` the flow runs in coordinates in which the data's covariance between atoms, ⟨x_i·x_j⟩ / dim, is one: the prior is the
    Gaussian of that covariance, in which bonded atoms start close together (as in harmonic diffusion, Jing et al. 2023, arXiv
    2304.02198). It commutes with rotations; the network still sees x / length_scale.

    One flow serves many molecules where every method is given the ``molecules`` that the rows are: each row then has the space,
    d = dim (N - 1), prior and density of its own N real atoms, positions are zero on padded ones, and the network is called as
    ``network(x, t, features, mask)``. ``n_atoms`` then has no meaning, and there is no whitening.
    """

    def __init__(
        self,
        network: nn.Module,
        n_atoms: int,
        dim: int = 3,
        *,
        features: Tensor | None = None,
        length_scale: float = 1.0,
        centred: bool = True,
        interpolant: str = "linear",
        coupling: str = "independent",
        objective: str = "velocity",
        endpoint_weight_max: float | None = None,
        time_power: float = 1.0,
        t_min: float = 0.0,
        whiten: bool = False,
        whiten_floor: float = 0.1,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise UserError(f"Unknown objective '{objective}': choose one of {', '.join(OBJECTIVES)}.")
        if objective == "endpoint" and not t_min > 0:
            raise UserError("objective=endpoint needs t_min > 0 (for example 0.001): its velocity is singular at t = 0.")
        self.network = network
        self.interpolant = make_interpolant(interpolant)
        self.couple = make_coupling(coupling)
        self.prior = GaussianPrior(n_atoms, dim, centred)
        self.objective = objective
        self.endpoint_weight_max = endpoint_weight_max
        self.length_scale = length_scale
        self.time_power = time_power
        self.t_min = t_min
        self.whiten, self.whiten_floor = whiten, whiten_floor
        self.register_buffer("features", features)
        # scaled = whitening @ (x / length_scale) per atom; the identity until `calibrate`
        self.register_buffer("whitening", torch.eye(n_atoms))
        self.register_buffer("unwhitening", torch.eye(n_atoms))
        self.register_buffer("log_volume", torch.zeros((), dtype=torch.float64))
        self.register_buffer("basis", subspace_basis(n_atoms, dim, centred).float(), persistent=False)

    @property
    def dimension(self) -> int:
        """d, the dimension of the space on which the density lives."""
        return self.prior.dimension

    # ---- velocity, score --------------------------------------------------------------------------------------------

    def velocity(self, x: Tensor, t: Tensor, molecules: Molecules | None = None) -> Tensor:
        """dx/dt at scaled positions ``x`` (batch, n, dim), times ``t`` (batch,), projected on the flow's space."""
        out = self._network(x, t, molecules)
        if self.objective == "endpoint":
            out = self.interpolant.velocity_from_endpoint(x, out, t)
        return self.prior.project(out, _mask(molecules))

    def _network(self, x: Tensor, t: Tensor, molecules: Molecules | None = None) -> Tensor:
        if molecules is not None:
            return self.network(x, t, molecules.features, molecules.mask)
        if not self.whiten:
            return self.network(x, t, self.features)
        # Whitened data have unit covariance: the best linear velocity is known, and the network adds what a score would, a covector
        path, time = self.interpolant, t.reshape(-1, 1, 1)
        a, b = path.alpha(time), path.sigma(time)
        linear = (a * path.d_alpha(time) + b * path.d_sigma(time)) / (a**2 + b**2)
        return linear * x + self.unwhitening @ self.network(self.unwhitening @ x, t, self.features)

    def _scale(self, positions: Tensor, molecules: Molecules | None = None) -> Tensor:
        if molecules is not None and self.whiten:
            raise UserError("A flow of many molecules has an isotropic prior: set flow.model.whiten=false.")
        x = self.prior.project(positions / self.length_scale, _mask(molecules))
        return self.whitening @ x if self.whiten else x

    def _unscale(self, x: Tensor) -> Tensor:
        return (self.unwhitening @ x if self.whiten else x) * self.length_scale

    def score(self, x: Tensor, t: Tensor, molecules: Molecules | None = None) -> Tensor:
        """∇ log p_t at scaled positions; singular at t = 0."""
        return self.interpolant.score_from_velocity(x, self.velocity(x, t, molecules), t)

    # ---- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, positions: Tensor, generator: torch.Generator | None = None) -> None:
        """Fit the whitening to data (batch, n, dim) in nm; let a network that scales its inputs (``calibrate``) measure interpolants."""
        if self.whiten:
            self._fit_whitening(positions)
        if hasattr(self.network, "calibrate"):
            x0 = self._scale(positions)
            x0, x1 = self.couple(x0, self.prior.noise_like(x0, generator))
            self.network.calibrate(lambda t: self._unscale(self.interpolant.mix(x0, x1, x0.new_full((len(x0),), t))) / self.length_scale)

    def _fit_whitening(self, positions: Tensor) -> None:
        x = self.prior.project(positions.double() / self.length_scale)
        values, vectors = torch.linalg.eigh(torch.einsum("bid,bjd->ij", x, x) / (len(x) * x.shape[-1]))
        if self.prior.centred:  # the first eigenvalue is that of a common translation, 0
            values[0] = 1.0
        values = values + self.whiten_floor**2
        self.whitening.copy_(vectors * values.rsqrt() @ vectors.T)
        self.unwhitening.copy_(vectors * values.sqrt() @ vectors.T)
        self.log_volume.fill_(0.5 * x.shape[-1] * values.log().sum().item())

    def loss(self, positions: Tensor, generator: torch.Generator | None = None, molecules: Molecules | None = None) -> Tensor:
        """Mean squared error a degree of freedom, of the velocity or of the endpoint, over a batch of data (batch, n, dim) in nm.

        Times are u ** time_power with u uniform. The endpoint's squared error is weighted with |α'σ - ασ'| / σ clipped to
        [0.005, endpoint_weight_max] as in the BoltzNCE authors' code, or, where no maximum is given, with its square: then
        the loss is that of velocity matching.
        """
        x0 = self._scale(positions, molecules)
        x1 = self.prior.noise_like(x0, generator, _mask(molecules))
        x0, x1 = self.couple(x0, x1) if molecules is None else self.couple(x0, x1, molecules.index)
        t = torch.rand(len(x0), generator=generator, dtype=x0.dtype, device=x0.device) ** self.time_power
        return self._errors(x0, x1, self.t_min + (1 - self.t_min) * t, molecules).mean()

    def _errors(self, x0: Tensor, x1: Tensor, t: Tensor, molecules: Molecules | None = None) -> Tensor:
        """The weighted squared error a degree of freedom (batch,) for pairs of scaled positions."""
        x = self.interpolant.mix(x0, x1, t)
        dimension = self.prior.dimensions(_mask(molecules))
        if self.objective == "velocity":
            return _squared_norm(self.velocity(x, t, molecules) - self.interpolant.velocity_target(x0, x1, t)) / dimension
        error = _squared_norm(self.prior.project(self._network(x, t, molecules), _mask(molecules)) - x0) / dimension
        weight = self.interpolant.endpoint_error_factor(t)
        weight = weight.square() if self.endpoint_weight_max is None else weight.clamp(0.005, self.endpoint_weight_max)
        return weight * error

    # ---- sampling ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        n_samples: int,
        generator: torch.Generator | None = None,
        *,
        solver: SolverSettings | None = None,
        likelihood: str = "none",
        n_probes: int = 1,
        batch_size: int = 1024,
        progress: bool = False,
        molecules: Molecules | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Positions (n, atoms, dim) in nm and their log-likelihood (n,), float64, integrated along the sampling path (None for "none").

        "exact" takes the trace of the Jacobian; "hutchinson" estimates it with ``n_probes`` Rademacher probes (see `log_prob`).
        ``molecules`` has ``n_samples`` rows.
        """
        self._check_likelihood(likelihood)
        _check_rows(molecules, n_samples)
        parts = []
        for rows in _batches(n_samples, batch_size, progress, "samples"):
            part = None if molecules is None else molecules[rows]
            size, like = rows.stop - rows.start, {"device": self.basis.device, "dtype": self.basis.dtype}
            x1 = self.prior.sample(size, generator, mask=_mask(part), **like)
            x0, integral = self._flow(x1, 1.0, self.t_min, solver, likelihood, n_probes, generator, part)
            # integrated from 1 to t_min, the divergence counts negatively: log q(x_0) = log p_1(x_1) + ∫_0^1 div v dt
            parts.append((self._unscale(x0), self._to_nm(self.prior.log_prob(x1, _mask(part)) - integral, part)))
        positions = torch.cat([x for x, _ in parts])
        return positions, None if likelihood == "none" else torch.cat([q for _, q in parts])

    @torch.no_grad()
    def sample_sde(
        self,
        n_samples: int,
        generator: torch.Generator | None = None,
        *,
        solver: SolverSettings | None = None,
        batch_size: int = 1024,
        molecules: Molecules | None = None,
    ) -> Tensor:
        """Positions (n, atoms, dim) in nm by Euler-Maruyama on dx = (v - ½ w s) dt + √w dW from t = 1 to 0 with w(t) = σ(t).

        w·s = -(α v - α' x) / (α σ' - α' σ) is finite at every t. The last step is taken without noise.
        """
        times = time_grid(solver or SolverSettings("heun", steps=200), 1.0, self.t_min)
        _check_rows(molecules, n_samples)
        parts = []
        for rows in _batches(n_samples, batch_size, False, "samples"):
            part = None if molecules is None else molecules[rows]
            size, like = rows.stop - rows.start, {"device": self.basis.device, "dtype": self.basis.dtype}
            x = self.prior.sample(size, generator, mask=_mask(part), **like)
            for k, (now, following) in enumerate(itertools.pairwise(times)):
                t = x.new_tensor(now).expand(len(x))
                v = self.velocity(x, t, part)
                drift = v + 0.5 * self.interpolant.noise_from_velocity(x, v, t)
                x = x + (following - now) * drift
                if k < len(times) - 2:
                    w = float(self.interpolant.sigma(torch.tensor(now)))
                    x = x + math.sqrt(w * (now - following)) * self.prior.noise_like(x, generator, _mask(part))
            parts.append(self._unscale(x))
        return torch.cat(parts)

    # ---- likelihood -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_prob(
        self,
        positions: Tensor,
        *,
        method: str = "exact",
        n_probes: int = 1,
        generator: torch.Generator | None = None,
        solver: SolverSettings | None = None,
        batch_size: int = 256,
        progress: bool = False,
        molecules: Molecules | None = None,
    ) -> Tensor:
        """log q (batch,), float64, of given positions (batch, n, dim) in nm: log p_1(x_1) + ∫_0^1 div v(x_t, t) dt.

        Normalized on the flow's space, per nm^d. "hutchinson" is unbiased for log q, so weights exp(-u - log q) built from it are biased.
        """
        self._check_likelihood(method)
        _check_rows(molecules, len(positions))
        parts = []
        for rows in _batches(len(positions), batch_size, progress, "likelihoods"):
            part = None if molecules is None else molecules[rows]
            x0 = self._scale(positions[rows].to(self.basis), part)
            x1, integral = self._flow(x0, self.t_min, 1.0, solver, method, n_probes, generator, part)
            parts.append(self._to_nm(self.prior.log_prob(x1, _mask(part)) + integral, part))
        return torch.cat(parts)

    def _flow(
        self,
        x: Tensor,
        t_start: float,
        t_end: float,
        solver: SolverSettings | None,
        likelihood: str,
        n_probes: int,
        generator: torch.Generator | None,
        molecules: Molecules | None = None,
    ) -> tuple[Tensor, Tensor]:
        solver = solver or SolverSettings()
        basis, gradients = self.basis, self._stiff_gradients
        if molecules is not None:
            # which only a likelihood needs
            basis = basis if likelihood == "none" else masked_subspace_basis(molecules.mask, x.shape[-1], self.prior.centred).to(basis)
            gradients = None
        # an adaptive solver needs a smooth right-hand side, so one probe for the whole path; on a fixed grid fresh ones average out
        probes = Probes(n_probes, basis, generator, gradients=gradients, fixed=solver.method == "dopri5")

        def field(x: Tensor, t: Tensor, divergence: bool) -> tuple[Tensor, Tensor | None]:
            times = t.expand(len(x))
            if not divergence:
                return self.velocity(x, times, molecules), None
            at_time: Callable[[Tensor], Tensor] = lambda y: self.velocity(y, times, molecules)  # noqa: E731
            if likelihood == "exact":
                return exact_divergence(at_time, x, basis)
            return hutchinson_divergence(at_time, x, probes(x))

        return integrate(field, x, t_start, t_end, solver, likelihood != "none")

    @property
    def _stiff_gradients(self) -> Callable[[Tensor], Tensor] | None:
        """The network's ``stiff_gradients`` in the flow's coordinates, where it has them."""
        of_network = getattr(self.network, "stiff_gradients", None)
        if of_network is None or not self.whiten:
            return of_network
        return lambda x: self.unwhitening @ of_network(self.unwhitening @ x)

    def _to_nm(self, log_prob: Tensor, molecules: Molecules | None = None) -> Tensor:
        return log_prob - self.prior.dimensions(_mask(molecules)) * math.log(self.length_scale) - self.log_volume

    @staticmethod
    def _check_likelihood(likelihood: str) -> None:
        if likelihood not in LIKELIHOODS:
            raise UserError(f"Unknown likelihood '{likelihood}': choose one of {', '.join(LIKELIHOODS)}.")


def _mask(molecules: Molecules | None) -> Tensor | None:
    return None if molecules is None else molecules.mask


def _check_rows(molecules: Molecules | None, n: int) -> None:
    if molecules is not None and len(molecules) != n:
        raise UserError(f"There are {n} conformers and {len(molecules)} rows of molecules: give one row for each.")


def _squared_norm(x: Tensor) -> Tensor:
    return x.square().sum(dim=(-2, -1))


def _batches(n: int, batch_size: int, progress: bool, unit: str):
    """Slices that make up ``n``, with a progress bar over elements."""
    with tqdm(total=n, unit=f" {unit}", disable=not progress) as bar:
        for start in range(0, n, batch_size):
            rows = slice(start, min(start + batch_size, n))
            yield rows
            bar.update(rows.stop - rows.start)
