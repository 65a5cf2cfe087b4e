"""The laws that every network obeys: symmetries, masks, gradients, independence of the batch."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import boltznce.networks
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.molecules import pad
from boltznce.networks.distance import DistanceEnergy, DistanceVectorField
from boltznce.networks.egnn import EGNNVectorField
from boltznce.networks.fourier import FourierEnergy, FourierVectorField
from boltznce.networks.graphormer import GraphormerEnergy
from boltznce.networks.gvp import GVPVectorField
from boltznce.networks.mlp import MLPEnergy, MLPVectorField
from boltznce.networks.shared_distance import SharedDistanceEnergy, SharedDistanceVectorField

N, F = 6, 7
BONDS = [(0, 1), (1, 2), (1, 3), (1, 4), (4, 5)]
FEATURES = nn.functional.one_hot(torch.tensor([0, 1, 2, 3, 4, 5]), F).double()
FEW = {"n_layers": 2, "width": 8, "ffn_width": 8, "n_heads": 2, "n_kernels": 6}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shape(n: int) -> tuple[int, int]:
    """Of the plane's one particle, or of a molecule."""
    return (1, 2) if n == 1 else (n, 3)


@dataclass
class Case:
    """A network, and what it is on: a molecule of N atoms with symmetries, or a particle in the plane without."""

    make: Callable[[], nn.Module]
    n: int = N
    masks: bool = False
    confines: bool = False
    tolerance: float = 1e-8

    def network(self) -> nn.Module:
        """In float64, nothing zero: outputs that start at zero would satisfy every law; bound and calibrated."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            network = self.make()
        with torch.no_grad():
            for k, parameter in enumerate(network.parameters()):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=seeded(k)))
        if isinstance(network, SharedDistanceVectorField | SharedDistanceEnergy):
            network = network.bind(FEATURES, BONDS)
        network = network.double()
        if hasattr(network, "calibrate"):
            x0, x1 = (torch.randn(256, *shape(self.n), generator=seeded(k)).double() for k in (5, 6))
            network.calibrate(lambda t: (1 - t) * x0 + t * x1)
        return network

    def inputs(
        self, batch: int = 4, n: int | None = None, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Positions, times and features."""
        generator = seeded(seed)
        x = 1.5 * torch.randn(batch, *shape(n or self.n), generator=generator, dtype=torch.float64)
        return x, torch.rand(batch, generator=generator, dtype=torch.float64), FEATURES[: n or self.n]


FIELDS = {
    "distance": Case(lambda: DistanceVectorField(N, 16, 2, 1, BONDS)),
    "distance, chiral": Case(lambda: DistanceVectorField(N, 16, 2, 1, BONDS, chiral=True)),
    "shared distance": Case(lambda: SharedDistanceVectorField(F, 16, 2, 1, 12, chiral=False)),
    "shared distance, chiral": Case(lambda: SharedDistanceVectorField(F, 16, 2, 1, 12)),
    "egnn": Case(lambda: EGNNVectorField(F, n_layers=3, width=8), masks=True),
    "gvp": Case(lambda: GVPVectorField(F, n_layers=3, n_scalars=8, n_vectors=4), masks=True),
    "mlp": Case(lambda: MLPVectorField(1, 2, 16, 2), 1),
    "fourier": Case(lambda: FourierVectorField(16, 2, 3), 1),
}
ENERGIES = {
    "distance energy": Case(lambda: DistanceEnergy(N, 16, 2, BONDS), confines=True),
    "distance energy, chiral": Case(lambda: DistanceEnergy(N, 16, 2, BONDS, chiral=True), confines=True),
    "shared distance energy": Case(lambda: SharedDistanceEnergy(F, 16, 2, 12, chiral=False), confines=True),
    "shared distance energy, chiral": Case(lambda: SharedDistanceEnergy(F, 16, 2, 12), confines=True),
    # its distances carry a constant 1e-5 in each component
    "graphormer": Case(lambda: GraphormerEnergy(F, **FEW), masks=True, tolerance=1e-3),
    "graphormer, types": Case(lambda: GraphormerEnergy(F, **FEW, n_types=3), masks=True, tolerance=1e-3),
    "mlp energy": Case(lambda: MLPEnergy(1, 2, 16, 2), 1, confines=True),
    "fourier energy": Case(lambda: FourierEnergy(16, 2, 3), 1, confines=True),
}
ALL = FIELDS | ENERGIES


def of(condition: Callable[[Case], bool] = lambda case: True):
    return pytest.mark.parametrize("name", [name for name, case in ALL.items() if condition(case)])


def transformed(name: str, output: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """What the output should be where positions are multiplied by ``matrix`` (3, 3)."""
    return output if name in ENERGIES else output @ matrix


def test_the_table_has_every_network():
    found = set()
    for module in pkgutil.iter_modules(boltznce.networks.__path__):
        names = getattr(importlib.import_module(f"boltznce.networks.{module.name}"), "__all__", ())
        found |= {name for name in names if name.endswith(("VectorField", "Energy"))}
    assert found == {type(case.network()).__name__ for case in ALL.values()}


@of()
def test_shape_time_and_independence_of_the_batch(name):
    network, (x, t, features) = ALL[name].network(), ALL[name].inputs()
    output = network(x, t, features)
    assert output.shape == (x.shape if name in FIELDS else (len(x),))
    assert output.std() > 1e-2
    for k in range(len(x)):
        torch.testing.assert_close(network(x[k : k + 1], t[k : k + 1], features), output[k : k + 1])
    assert ((network(x, 1 - t, features) - output).flatten(1 - output.dim()).abs() > 1e-6).any(-1).all()


@of(lambda case: case.n > 1)
def test_rigid_motions(name):
    case = ALL[name]
    network, (x, t, features) = case.network(), case.inputs()
    output = network(x, t, features)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=seeded(3), dtype=torch.float64))
    q = q * torch.det(q)
    moved = network(x @ q + torch.tensor([3.0, -2.0, 1.0]), t, features)
    torch.testing.assert_close(moved, transformed(name, output, q), atol=case.tolerance, rtol=1e-7)


@of(lambda case: case.n > 1)
def test_mirror_images_are_told_apart_as_the_flow_is_told(name):
    case = ALL[name]
    network, (x, t, features) = case.network(), case.inputs()
    expected = transformed(name, network(x, t, features), -torch.eye(3, dtype=torch.float64))
    difference = (network(-x, t, features) - expected).abs().max()
    if InterpolantFlow(network, case.n).parity_equivariant:
        assert difference < case.tolerance
        assert "chiral" not in name
    else:
        assert difference > 1e-3


@of(lambda case: case.n > 1)
def test_every_atom_sees_the_others(name):
    """Also far ones: what an atom's move changes is not confined to its neighbours."""
    network, (x, t, features) = ALL[name].network(), ALL[name].inputs()
    output = network(x, t, features)
    moved = x + torch.eye(N, dtype=torch.float64)[0, :, None] * torch.tensor([0.5, 0.0, 0.0])
    assert (
        ((network(moved, t, features) - output).abs().reshape(len(x), -1, 3 if name in FIELDS else 1) > 1e-8)
        .any(-1)
        .all()
    )


@of(lambda case: case.n > 1)
def test_atoms_permute_together_with_their_features(name):
    network, (x, t, features) = ALL[name].network(), ALL[name].inputs()
    output = network(x, t, features)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    expected = output if name in ENERGIES else output[:, order]
    if not InterpolantFlow(network, N).tells_atoms_apart:
        torch.testing.assert_close(network(x[:, order], t, features[order]), expected)
    assert not torch.allclose(network(x[:, order], t, features), expected, atol=1e-3)


@of(lambda case: case.masks)
def test_padding_changes_nothing(name):
    """Molecules of 4, 6 and 5 atoms in rows of 8 give what they give alone, whatever stands on padded atoms."""
    case, sizes = ALL[name], (4, 6, 5)
    network = case.network()
    alone = [case.inputs(1, n, seed) for seed, n in enumerate(sizes)]
    mask = torch.arange(8) < torch.tensor(sizes).unsqueeze(-1)
    t, features = torch.cat([t for _, t, _ in alone]), torch.stack([pad(f, 8) for _, _, f in alone])
    for junk in (0.0, 3.0):
        x = (torch.cat([pad(x, 8) for x, _, _ in alone]) + junk * ~mask.unsqueeze(-1)).requires_grad_()
        output = network(x, t, features, mask)
        (pull,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        assert (pull[~mask] == 0).all()
        pull.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
        for k, (y, time, own) in enumerate(alone):
            y.requires_grad_()
            expected = network(y, time, own)
            torch.testing.assert_close(output[k : k + 1, : sizes[k]] if name in FIELDS else output[k : k + 1], expected)
            (expected_pull,) = torch.autograd.grad(expected.square().sum(), y)
            torch.testing.assert_close(pull[k : k + 1, : sizes[k]], expected_pull)
        if name in FIELDS:
            assert (output[~mask] == 0).all()
    full = torch.ones(1, sizes[1], dtype=torch.bool)
    torch.testing.assert_close(network(*alone[1], full), network(*alone[1]))


@of()
def test_finite_gradients_reach_every_parameter(name):
    """Through the output, and for energies also through their score, as score matching needs."""
    network, (x, t, features) = ALL[name].network(), ALL[name].inputs()
    x.requires_grad_()
    output = network(x, t, features)
    loss = output.square().sum()
    if name in ENERGIES:
        (score,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        assert score.abs().max() > 1e-3
        loss = loss + score.square().sum()
    loss.backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@of(lambda case: case.confines)
def test_far_from_all_data_an_energy_falls_as_a_parabola(name):
    """So that its density can be normalized, and moved in; ten times as far out a hundred times as low, or lower."""
    network, (x, t, features) = ALL[name].network(), ALL[name].inputs()
    near, far, farther = (network(scale * x, t, features) for scale in (1e1, 1e3, 1e4))
    assert (far < near).all()
    assert (farther / far > 90).all()
    assert (far < -1e3).all()
