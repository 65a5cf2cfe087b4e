"""The GVP vector field: the authors' network on its published weights, and the symmetries on a small random one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from boltznce.errors import UserError
from boltznce.networks.gvp import GVPVectorField
from boltznce.networks.published import load_published_vector_field

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
WEIGHTS = REFERENCE / "boltznce_aldp_vector_field.pt"
needs_reference = pytest.mark.skipif(not WEIGHTS.is_file(), reason="the authors' weights are not here")

N_ATOMS, N_FEATURES = 7, 4


def divergence(network, x, t, features):
    """Exact trace of the Jacobian (batch,) by forward-mode derivatives along all coordinates."""
    basis = torch.eye(x[0].numel(), dtype=x.dtype).view(-1, *x.shape[1:])

    def along(direction):
        jv = torch.func.jvp(lambda x: network(x, t, features), (x,), (direction.expand_as(x),))[1]
        return (jv * direction).sum((-1, -2))

    return torch.func.vmap(along)(basis).sum(0)


def random_rotation(generator):
    q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))
    return q * torch.linalg.det(q)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def case(generator):
    """A small random network in float64 with positions, times and features."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = GVPVectorField(N_FEATURES, n_layers=3, n_scalars=8, n_vectors=4).double()
    x = 2 * torch.randn(5, N_ATOMS, 3, dtype=torch.float64, generator=generator)
    t = torch.rand(5, dtype=torch.float64, generator=generator)
    features = torch.randn(N_ATOMS, N_FEATURES, dtype=torch.float64, generator=generator)
    return network, x, t, features


@pytest.fixture(scope="module")
def golden():
    return {name: torch.as_tensor(array) for name, array in np.load(REFERENCE / "gvp_golden.npz").items()}


@needs_reference
def test_velocity_is_the_authors(golden):
    network = load_published_vector_field(WEIGHTS)
    with torch.no_grad():
        v = network(golden["x"], golden["t"][:, 0], golden["features"])
    torch.testing.assert_close(v, golden["velocity"], rtol=0, atol=1e-4)


@needs_reference
def test_divergence_is_the_authors(golden):
    network = load_published_vector_field(WEIGHTS).requires_grad_(False)
    some = slice(None, None, 4)  # of 64, at times from 0.01 to 0.98
    pieces = zip(golden["x_div"][some].split(4), golden["t_div"][some, 0].split(4), strict=True)
    values = torch.cat([divergence(network, x, t, golden["features"]) for x, t in pieces])
    torch.testing.assert_close(values, golden["divergence"][some], rtol=1e-5, atol=1e-3)


def test_rotation_mirror_and_translation(case, generator):
    network, x, t, features = case
    v = network(x, t, features)
    rotation = random_rotation(generator)
    torch.testing.assert_close(network(x @ rotation.T, t, features), v @ rotation.T)
    torch.testing.assert_close(network(-x, t, features), -v)
    torch.testing.assert_close(network(x + torch.tensor([3.0, -2.0, 1.0]), t, features), v)


def test_atoms_permute_together_with_their_features(case, generator):
    network, x, t, features = case
    v = network(x, t, features)
    order = torch.randperm(N_ATOMS, generator=generator)
    torch.testing.assert_close(network(x[:, order], t, features[order]), v[:, order])
    assert not torch.allclose(network(x[:, order], t, features), v[:, order], atol=1e-3)


def test_time_and_distant_atoms_matter(case):
    network, x, t, features = case
    v = network(x, t, features)
    assert not torch.allclose(network(x, 1 - t, features), v, atol=1e-4)
    moved = x.clone()
    moved[:, 0, 0] += 0.5
    assert ((network(moved, t, features) - v).abs().amax(-1) > 1e-8).all()


def test_gradients_reach_every_parameter(case):
    network, x, t, features = case
    network(x, t, features).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_divergence_is_the_trace_of_the_jacobian(case):
    network, x, t, features = case
    x, t = x[:2], t[:2]
    traces = []
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda y, i=i: network(y[None], t[i : i + 1], features)[0], x[i])
        traces.append(jacobian.reshape(3 * N_ATOMS, 3 * N_ATOMS).trace())
    torch.testing.assert_close(divergence(network, x, t, features), torch.stack(traces))


def test_second_derivatives(case):
    network, x, t, features = case
    assert torch.autograd.gradgradcheck(
        lambda y: network(y, t[:1], features).square().sum(), x[:1].requires_grad_(), atol=1e-4
    )


@needs_reference
def test_published_file_that_does_not_fit(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(UserError, match="no weights file"):
        load_published_vector_field(path)
    path.write_bytes(WEIGHTS.read_bytes()[:10_000])
    with pytest.raises(UserError, match="not a readable"):
        load_published_vector_field(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="state dict"):
        load_published_vector_field(path)

    state = torch.load(WEIGHTS, map_location="cpu", weights_only=True)
    name = "convs.1.node_update.0.Wh"
    extra, reshaped = {"convs.0.extra.weight": torch.zeros(2)}, {name: torch.zeros(3, 3)}
    for broken in (state | extra, state | reshaped, {"weight": torch.zeros(2)}):
        torch.save(broken, path)
        with pytest.raises(UserError, match="does not hold the weights"):
            load_published_vector_field(path)
    del state[name]
    torch.save(state, path)
    with pytest.raises(UserError, match="does not hold the weights"):
        load_published_vector_field(path)


@needs_reference
def test_published_weights_draw_sound_molecules():
    """Through config, flow and our atom order: bond lengths of the draws are those of alanine dipeptide."""
    from boltznce.config import compose, load_system
    from boltznce.flows.solvers import SolverSettings
    from boltznce.methods.models import make

    config = compose("train", ["budget=paper", f"flow.published_weights={WEIGHTS}"])
    system = load_system("aldp")
    flow = make(config, system, "flow").eval().of(system)
    x, _ = flow.sample(16, torch.Generator().manual_seed(0), solver=SolverSettings("heun", steps=20))
    first, second = torch.tensor(system.bonds).T
    lengths = (x[:, first] - x[:, second]).norm(dim=-1)
    expected = (system.positions[first] - system.positions[second]).norm(dim=-1)
    assert (lengths / expected - 1).abs().median() < 0.03
    handed = (system.chirality(x) > 0).float().mean()
    assert 0.1 < handed < 0.9  # an O(3)-equivariant flow makes both mirror images
