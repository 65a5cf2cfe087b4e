"""A stochastic-interpolant flow: training losses, sampling along its ODE, exact and Hutchinson log-likelihood.

Source: BoltzNCE (arXiv 2507.00846); likelihood of a continuous flow: Chen et al. 2018 (arXiv 1806.07366).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from boltznce import ranks
from boltznce.errors import UserError
from boltznce.flows.context import ContextModel
from boltznce.flows.coupling import Coupling, make_coupling
from boltznce.flows.divergence import Probes, exact_divergence, hutchinson_divergence
from boltznce.flows.prior import subspace_basis
from boltznce.flows.solvers import SolverSettings, integrate
from boltznce.flows.whitening import Whitening
from boltznce.settings import require

__all__ = ["LIKELIHOODS", "InterpolantFlow"]

LIKELIHOODS = ("none", "exact", "hutchinson")
OBJECTIVES = ("velocity", "endpoint")


class InterpolantFlow(ContextModel):
    """Flow whose velocity is ``network(x, t, features)`` in scaled units ``x / length_scale``; see `ContextModel`.

    With ``centred`` (molecules) it lives on the mean-free subspace of dimension d = dim (n - 1): prior, noise, probes
    and velocities are projected on it; otherwise on the full space. ``log_prob`` is normalized there, per nm^d.
    ``objective="endpoint"`` reads the network's output as E[x_0 | x_t]; its velocity is singular at t = 0, so
    integration ends at ``t_min`` > 0, in sampling and likelihood.

    With ``whiten`` the flow runs in coordinates in which the data's covariance between atoms, ⟨x_i·x_j⟩ / dim, is one:
    the prior is the Gaussian of that covariance, in which bonded atoms start close together (as in harmonic diffusion,
    Jing et al. 2023, arXiv 2304.02198). It commutes with rotations; the network still sees x / length_scale.

    On a padded batch of unlike molecules, ``flow.on(molecules)``, it has its ``loss`` and no samples.

    >>> import torch
    >>> from boltznce.networks.mlp import MLPVectorField
    >>> flow = InterpolantFlow(MLPVectorField(width=8, n_blocks=1), n_atoms=1, dim=2, centred=False)
    >>> data = torch.randn(256, 1, 2, generator=torch.Generator().manual_seed(0))
    >>> flow.loss(data, torch.Generator().manual_seed(1)).backward()
    >>> fast = SolverSettings("rk4", steps=8)
    >>> x, log_q = flow.sample(100, torch.Generator().manual_seed(2), solver=fast, likelihood="exact")
    >>> x.shape, log_q.shape
    (torch.Size([100, 1, 2]), torch.Size([100]))
    >>> torch.allclose(flow.log_prob(x, solver=fast), log_q, atol=1e-3)
    True
    """

    basis: Tensor

    def __init__(
        self,
        network: nn.Module,
        n_atoms: int,
        dim: int = 3,
        *,
        features: Tensor | None = None,
        mask: Tensor | None = None,
        groups: Tensor | None = None,
        length_scale: float = 1.0,
        centred: bool = True,
        interpolant: str = "linear",
        coupling: str | Coupling = "independent",
        objective: str = "velocity",
        endpoint_weight_max: float | None = None,
        time_power: float = 1.0,
        t_min: float = 0.0,
        whiten: bool = False,
        whiten_floor: float = 0.1,
    ) -> None:
        scales: dict[str, Any] = {"length_scale": length_scale, "centred": centred, "interpolant": interpolant}
        super().__init__(network, n_atoms, dim, features=features, mask=mask, groups=groups, **scales)
        if objective not in OBJECTIVES:
            raise UserError(f"Unknown objective '{objective}': choose one of {', '.join(OBJECTIVES)}.")
        if objective == "endpoint" and not t_min > 0:
            raise UserError(
                "objective=endpoint needs t_min > 0 (for example 0.001): at t = 0 its velocity is singular."
            )
        self.couple = make_coupling(coupling)
        self.objective = objective
        self.endpoint_weight_max = endpoint_weight_max
        self.time_power = time_power
        self.t_min = t_min
        self.whitening = Whitening(n_atoms, whiten_floor) if whiten else None
        self.register_buffer("basis", subspace_basis(n_atoms, dim, centred).float(), persistent=False)

    @property
    def dimension(self) -> int:
        """d, the dimension of the space on which the density lives."""
        return int(self.prior.dimensions)

    # ---- what its network can do ------------------------------------------------------------------------------------

    @property
    def parity_equivariant(self) -> bool:
        """Whether v(-x) = -v(x), so that the flow makes molecules and mirror images alike."""
        return getattr(self.network, "parity_equivariant", True)

    @property
    def tells_atoms_apart(self) -> bool:
        """Whether the network treats equal atoms as unequal, so that relabelling them changes the density."""
        return getattr(self.network, "tells_atoms_apart", False)

    @property
    def needs_calibration(self) -> bool:
        """Whether ``calibrate`` has anything to measure."""
        return self.whitening is not None or self._measure is not None

    @property
    def _stiff_gradients(self) -> Callable[[Tensor], Tensor] | None:
        """The network's ``stiff_gradients``, see `Probes`, in the flow's coordinates, where it has them."""
        of_network, whitening = getattr(self.network, "stiff_gradients", None), self.whitening
        if of_network is None or whitening is None:
            return of_network
        return lambda x: whitening.inverse @ of_network(whitening.inverse @ x)

    # ---- velocity ---------------------------------------------------------------------------------------------------

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt at scaled positions ``x`` (batch, n, dim), times ``t`` (batch,), projected on the flow's space."""
        out = self._output(x, t)
        if self.objective == "endpoint":
            out = self.interpolant.velocity_from_endpoint(x, out, t)
        return self.prior.project(out)

    def _output(self, x: Tensor, t: Tensor) -> Tensor:
        if self.whitening is None:
            return self._call(x, t)
        # of whitened data the best linear velocity is known; the network adds a covector, as a score is one
        path, time = self.interpolant, t.reshape(-1, 1, 1)
        a, b = path.alpha(time), path.sigma(time)
        linear = (a * path.d_alpha(time) + b * path.d_sigma(time)) / (a**2 + b**2)
        return linear * x + self.whitening.inverse @ self._call(self.whitening.inverse @ x, t)

    def _scale(self, positions: Tensor) -> Tensor:
        x = super()._scale(positions)
        if self.whitening is None:
            return x
        if self.prior.mask is not None:
            raise UserError("A flow of many molecules has an isotropic prior: set flow.model.whiten=false.")
        return self.whitening.matrix @ x

    def _unscale(self, x: Tensor) -> Tensor:
        return (x if self.whitening is None else self.whitening.inverse @ x) * self.length_scale

    # ---- training ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, positions: Tensor, generator: torch.Generator | None = None) -> None:
        """Fit the whitening to data (batch, n, dim) in nm; let a network that scales its inputs measure them."""
        if self.whitening is not None:
            self.whitening.fit(super()._scale(positions.double()), self.prior.centred)
        if self._measure is not None:
            x0 = self._scale(positions)
            x0, x1 = self.couple(x0, self.prior.noise_like(x0, generator))
            mix = self.interpolant.mix
            self._measure(lambda t: self._unscale(mix(x0, x1, x0.new_full((len(x0),), t))) / self.length_scale)

    def loss(self, positions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error a degree of freedom, of velocity or endpoint, over a batch of data (batch, n, dim) in nm.

        Times are u ** time_power with u uniform. The endpoint's squared error is weighted with |α'σ - ασ'| / σ clipped
        to [0.005, endpoint_weight_max] as in the BoltzNCE authors' code, or, where no maximum is given, with its
        square: then the loss is that of velocity matching.
        """
        x0 = self._scale(positions)
        x0, x1 = self.couple(x0, self.prior.noise_like(x0, generator), self.groups)
        t = torch.rand(len(x0), generator=generator, dtype=x0.dtype, device=x0.device) ** self.time_power
        t, here = self.t_min + (1 - self.t_min) * t, ranks.part(len(t))
        return ranks.mean_of_all(self.rows(here)._errors(x0[here], x1[here], t[here]), len(t))

    def _errors(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """The weighted squared error a degree of freedom (batch,) for pairs of scaled positions."""
        x = self.interpolant.mix(x0, x1, t)
        if self.objective == "velocity":
            return self._mean_square(self.velocity(x, t) - self.interpolant.velocity_target(x0, x1, t))
        weight = self.interpolant.endpoint_error_factor(t)
        weight = weight.square() if self.endpoint_weight_max is None else weight.clamp(0.005, self.endpoint_weight_max)
        return weight * self._mean_square(self.prior.project(self._output(x, t)) - x0)

    def _mean_square(self, x: Tensor) -> Tensor:
        return x.square().sum(dim=(-2, -1)) / self.prior.dimensions

    # ---- sampling and likelihood ------------------------------------------------------------------------------------

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
    ) -> tuple[Tensor, Tensor | None]:
        """Positions (n, atoms, dim) in nm and log q (n,), float64, integrated along the sampling path (None for
        "none").

        "exact" takes the trace of the Jacobian; "hutchinson" estimates it with ``n_probes`` random probes (see
        `log_prob`).
        """
        parts = []
        require(n_samples=n_samples)
        for rows in self._batches(n_samples, batch_size, likelihood, progress):
            size, device, dtype = rows.stop - rows.start, self.basis.device, self.basis.dtype
            x1 = self.prior.sample(size, generator, device=device, dtype=dtype)
            x0, integral = self._flow(x1, 1.0, self.t_min, solver, likelihood, n_probes, generator)
            # integrated from 1 to t_min, the divergence counts negatively: log q(x_0) = log p_1(x_1) + ∫_0^1 div v dt
            parts.append((self._unscale(x0), self._per_nm(self.prior.log_prob(x1) - integral)))
        positions = torch.cat([x for x, _ in parts])
        return positions, None if likelihood == "none" else torch.cat([q for _, q in parts])

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
    ) -> Tensor:
        """log q (batch,), float64, of given positions (batch, n, dim) in nm: log p_1(x_1) + ∫_0^1 div v(x_t, t) dt.

        Normalized on the flow's space, per nm^d. "hutchinson" is unbiased for log q, so weights exp(-u - log q) built
        from it are biased.
        """
        parts = []
        for rows in self._batches(len(positions), batch_size, method, progress):
            x0 = self._scale(positions[rows].to(self.basis))
            x1, integral = self._flow(x0, self.t_min, 1.0, solver, method, n_probes, generator)
            parts.append(self._per_nm(self.prior.log_prob(x1) + integral))
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
    ) -> tuple[Tensor, Tensor]:
        """``x`` carried from one time to another, and ∫ div v dt (zero for "none")."""
        solver = solver or SolverSettings()
        # an adaptive solver needs a smooth right-hand side: the same probes all along; elsewhere fresh ones average out
        fixed = solver.method == "dopri5"
        probes = Probes(n_probes, self.basis, generator, gradients=self._stiff_gradients, fixed=fixed)

        def field(x: Tensor, t: Tensor, divergence: bool) -> tuple[Tensor, Tensor | None]:
            times = t.expand(len(x))
            if not divergence:
                return self.velocity(x, times), None
            at_time: Callable[[Tensor], Tensor] = lambda y: self.velocity(y, times)  # noqa: E731
            if likelihood == "exact":
                return exact_divergence(at_time, x, self.basis)
            return hutchinson_divergence(at_time, x, probes(x))

        return integrate(field, x, t_start, t_end, solver, likelihood != "none")

    def _per_nm(self, log_prob: Tensor) -> Tensor:
        log_prob = log_prob - self.dimension * math.log(self.length_scale)
        return log_prob if self.whitening is None else log_prob - self.whitening.log_volume

    def _batches(self, n: int, batch_size: int, likelihood: str, progress: bool) -> Iterator[slice]:
        """Slices that make up ``n``, with a progress bar over elements."""
        require(batch_size=batch_size)
        if likelihood not in LIKELIHOODS:
            raise UserError(f"Unknown likelihood '{likelihood}': choose one of {', '.join(LIKELIHOODS)}.")
        if self.prior.mask is not None:
            raise UserError("A padded batch has a loss only: draw and weigh one molecule at a time.")
        with tqdm(total=n, disable=not progress) as bar:
            for start in range(0, n, batch_size):
                stop = min(start + batch_size, n)
                yield slice(start, stop)
                bar.update(stop - start)
