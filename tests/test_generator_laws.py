"""The laws that every generator obeys: inverse, log q along the draw, by ``log_prob`` and by autograd, and its norm."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from boltznce.flows.box import BoxCoordinates
from boltznce.flows.internal import InternalCoordinates
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.flows.prior import mean_free
from boltznce.flows.solvers import SolverSettings
from boltznce.flows.spline_flow import SplineFlow
from boltznce.networks.distance import DistanceVectorField
from boltznce.networks.egnn import EGNNVectorField
from boltznce.networks.fourier import FourierVectorField
from boltznce.networks.mlp import MLPVectorField

BONDS = [(0, 1), (1, 2), (1, 3), (3, 4)]
MOLECULE = torch.tensor(
    [[0.11, 0.0, 0.0], [0.0, 0.0, 0.0], [-0.04, 0.1, 0.0], [-0.05, -0.05, 0.1], [-0.15, -0.1, 0.12]]
)
FEATURES = nn.functional.one_hot(torch.arange(5), 5).float()
SOLVER = SolverSettings("rk4", steps=10, grid_power=1.5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(module: nn.Module, size: float) -> nn.Module:
    """Weights that are nowhere zero."""
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            parameter.add_(size * torch.randn(parameter.shape, generator=seeded(k)))
    return module


def seeded_module(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


@dataclass
class OfInterpolant:
    """An interpolant flow; its latent is a point of the prior."""

    network: Callable[[], nn.Module]
    n: int
    dim: int
    settings: dict
    size: float

    def flow(self) -> InterpolantFlow:
        network = shaken(seeded_module(self.network), self.size)
        flow = InterpolantFlow(network, self.n, self.dim, features=FEATURES, length_scale=0.2, **self.settings)
        data = MOLECULE + 0.02 * torch.randn(256, 5, 3, generator=seeded())
        if flow.needs_calibration:
            flow.calibrate(mean_free(data), seeded(1))
        return flow.double().eval()

    def draw(self, flow: InterpolantFlow, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, positions and log q."""
        z = flow.prior.sample(n, seeded(2), dtype=torch.float64)
        return z, *flow.sample(n, seeded(2), solver=SOLVER, likelihood="exact")

    def log_prob(self, flow: InterpolantFlow, x: Tensor) -> Tensor:
        return flow.log_prob(x, solver=SOLVER, batch_size=2000)

    def latent(self, flow: InterpolantFlow, x: Tensor) -> Tensor:
        return self._along(flow, flow._scale(x), flow.t_min, 1.0)

    def log_prob_by_autograd(self, flow: InterpolantFlow, z: Tensor) -> Tensor:
        """log p(z) less log|det| of the map from the prior's space to positions, both in an orthonormal basis."""
        d, basis = flow.dimension, flow.basis
        through = lambda z: flow._unscale(self._along(flow, z, 1.0, flow.t_min))  # noqa: E731
        log_det = []
        for point in z:
            _, columns = torch.func.jvp(through, (point.repeat(d, 1, 1),), (basis,))
            log_det.append(torch.linalg.slogdet(torch.einsum("aij,bij->ab", basis, columns)).logabsdet)
        return flow.prior.log_prob(z) - torch.stack(log_det)

    @staticmethod
    def _along(flow: InterpolantFlow, x: Tensor, begin: float, end: float) -> Tensor:
        return flow._flow(x, begin, end, SOLVER, "none", 1, None)[0]


@dataclass
class OfSpline:
    """A spline flow; its latent is a point of the unit cube. Positions count modulo rigid motion for a molecule."""

    coordinates: Callable[[], nn.Module]
    architecture: str

    def flow(self) -> SplineFlow:
        settings = {"n_pairs": 2, "width": 16, "depth": 2, "architecture": self.architecture}
        flow = seeded_module(lambda: SplineFlow(self.coordinates(), **settings))
        for coupling in flow.couplings:
            shaken(coupling.layers[-1], 0.3)
        return flow.double()

    def draw(self, flow: SplineFlow, n: int) -> tuple[Tensor, Tensor, Tensor]:
        return flow._draw(n, seeded(2)), *flow.sample(n, seeded(2))

    def log_prob(self, flow: SplineFlow, x: Tensor) -> Tensor:
        return flow.log_prob(x).detach()

    def latent(self, flow: SplineFlow, x: Tensor) -> Tensor:
        return flow._through(flow.coordinates.to_unit(x)[0], inverse=True)[0].detach()

    def log_prob_by_autograd(self, flow: SplineFlow, z: Tensor) -> Tensor:
        """log p(z) less log|det| of the map to positions, the six rigid motions of a molecule among its variables."""
        angles = torch.tensor([0.3, 1.1, -0.7], dtype=torch.float64)
        rigid = 0 if isinstance(flow.coordinates, BoxCoordinates) else 6

        def full(variables: Tensor) -> Tensor:
            y, _ = flow._through(variables[None, : flow.dimension])
            x = flow.coordinates.to_positions(y)[0][0]
            if rigid:
                x = (x - x[0]) @ euler(variables[-3:]).T + variables[-6:-3]
            return x.flatten()

        log_det = []
        for point in z:
            variables = torch.cat([point, torch.zeros(3, dtype=torch.float64), angles]) if rigid else point
            jacobian = torch.autograd.functional.jacobian(full, variables)
            log_det.append(torch.linalg.slogdet(jacobian).logabsdet - (angles[1].sin().log() if rigid else 0.0))
        return flow._log_prior(z) - torch.stack(log_det)


def euler(angles: Tensor) -> Tensor:
    """Rz(α) Ry(β) Rz(γ), of Haar measure sin β."""

    def turn(angle: Tensor, i: int, j: int) -> Tensor:
        generator = torch.zeros(3, 3, dtype=torch.float64)
        generator[i, j], generator[j, i] = -1.0, 1.0
        return torch.linalg.matrix_exp(angle * generator)

    return turn(angles[0], 0, 1) @ turn(angles[1], 2, 0) @ turn(angles[2], 0, 1)


def box() -> BoxCoordinates:
    return BoxCoordinates(1, [-2, -1], [2, 3])


def internal() -> InternalCoordinates:
    return InternalCoordinates(MOLECULE, BONDS)


def distances() -> DistanceVectorField:
    return DistanceVectorField(5, 16, 2, 1, BONDS, chiral=True)


def egnn() -> EGNNVectorField:
    return EGNNVectorField(5, n_layers=2, width=8)


ENDPOINT = {"objective": "endpoint", "t_min": 0.3}
WHITENED = {"whiten": True, "interpolant": "trig"}
PLANE = {
    "mlp in the plane": OfInterpolant(lambda: MLPVectorField(1, 2, 16, 2), 1, 2, {"centred": False}, 0.1),
    "spline in a box": OfSpline(box, "random"),
}
MOLECULES = {
    "molecule": OfInterpolant(egnn, 5, 3, {}, 0.1),
    "whitened": OfInterpolant(distances, 5, 3, WHITENED, 0.03),
    "endpoint": OfInterpolant(egnn, 5, 3, ENDPOINT, 0.1),
    "spline, random": OfSpline(internal, "random"),
    "spline, hierarchical": OfSpline(internal, "hierarchical"),
}
FOURIER = OfInterpolant(lambda: FourierVectorField(16, 2, 2), 1, 2, {"centred": False}, 0.1)
ALL = PLANE | {"fourier in the plane": FOURIER} | MOLECULES


@pytest.mark.parametrize("name", ALL)
def test_a_draw_goes_back_and_has_the_same_log_q_all_ways(name):
    case = ALL[name]
    flow = case.flow()
    z, x, log_q = case.draw(flow, 4)
    assert log_q.dtype == torch.float64
    assert log_q.isfinite().all()
    torch.testing.assert_close(case.log_prob(flow, x), log_q, atol=2e-5, rtol=0)
    back = case.latent(flow, x) - z
    if isinstance(case, OfSpline):  # some coordinates are on a circle
        back = back - back.round()
    assert back.abs().max() < 2e-5
    torch.testing.assert_close(case.log_prob_by_autograd(flow, z[:2]), log_q[:2], atol=5e-5, rtol=0)
    # the network has a part in the map, without which the laws are easy to obey
    prior = flow.prior.log_prob(z) if isinstance(case, OfInterpolant) else flow._log_prior(z)
    assert (log_q - prior).std() > 0.03


@pytest.mark.parametrize("name", PLANE)
def test_density_in_the_plane_is_normalized_on_a_grid(name):
    case = PLANE[name]
    flow = case.flow()
    low, high = case.draw(flow, 200)[1].flatten(0, 1).aminmax(dim=0)
    width, n = 2 * (high - low), 40 if isinstance(case, OfInterpolant) else 300
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.25
    grid = low + width * torch.cartesian_prod(middle, middle)
    density = case.log_prob(flow, grid.unsqueeze(1)).exp()
    assert (density.mean() * width.prod()).item() == pytest.approx(1, abs=2e-3)
