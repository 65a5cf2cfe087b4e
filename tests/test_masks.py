"""A padded molecule gives the same answer as alone: networks, loss, divergence, likelihood, samples, energy-based model."""

import math

import pytest
import torch

from boltznce.ebm import EnergyBasedModel
from boltznce.errors import UserError
from boltznce.flows.coupling import optimal_transport
from boltznce.flows.divergence import Probes, exact_divergence
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.flows.prior import GaussianPrior, masked_subspace_basis, mean_free
from boltznce.flows.solvers import SolverSettings
from boltznce.molecules import Molecules, pad
from boltznce.networks.egnn import EGNNVectorField
from boltznce.networks.graphormer import GraphormerEnergy
from boltznce.networks.gvp import GVPVectorField

F, SIZES, N = 5, (4, 7, 5), 8  # no molecule fills its row
INDEX = (0, 1, 2, 1)
FIELDS = {
    "egnn": lambda: EGNNVectorField(F, n_layers=2, width=8),
    "gvp": lambda: GVPVectorField(F, n_layers=3, n_scalars=8, n_vectors=4),
}


def make(factory):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return factory().double()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def features(generator):
    types = [torch.randint(0, F, (n,), generator=generator) for n in SIZES]
    return [torch.nn.functional.one_hot(k, F).double() for k in types]


@pytest.fixture
def batch(features, generator):
    """Positions each alone (1, n_k, 3), the same padded (4, N, 3), their molecules, and times."""
    alone = [torch.randn(1, SIZES[k], 3, dtype=torch.float64, generator=generator) for k in INDEX]
    t = torch.rand(len(INDEX), dtype=torch.float64, generator=generator)
    return alone, torch.cat([pad(x, N) for x in alone]), Molecules.stack(features, INDEX, N), t


def make_flow(network, n_atoms=N, features=None, **settings):
    flow = InterpolantFlow(network, n_atoms, 3, features=features, length_scale=0.5, **settings).double()
    flow.basis = flow.basis.double()
    return flow


def flows_alone(network, features, **settings):
    return [make_flow(network, SIZES[k], features[k], **settings) for k in INDEX]


@pytest.mark.parametrize("name", FIELDS)
def test_velocity(name, batch, features):
    alone, x, molecules, t = batch
    network = make(FIELDS[name])
    junk = x + 3.0 * (~molecules.mask).unsqueeze(-1)  # whatever stands on padded atoms
    for given in (x, junk):
        v = network(given, t, molecules.features, molecules.mask)
        assert (v[~molecules.mask] == 0).all()
        for i, k in enumerate(INDEX):
            torch.testing.assert_close(v[i : i + 1, : SIZES[k]], network(alone[i], t[i : i + 1], features[k]))
    # a full mask changes nothing
    k = torch.ones(1, SIZES[1], dtype=torch.bool)
    torch.testing.assert_close(network(alone[1], t[1:2], features[1], k), network(alone[1], t[1:2], features[1]))


@pytest.mark.parametrize("n_types", [None, 3])
def test_graphormer_energy_and_score(n_types, batch, features):
    alone, x, molecules, t = batch
    network = make(lambda: GraphormerEnergy(F, n_layers=2, width=8, ffn_width=8, n_heads=2, n_kernels=6, n_types=n_types))
    x = x.requires_grad_()
    energy = network(x, t, molecules.features, molecules.mask)
    (score,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    assert (score[~molecules.mask] == 0).all()
    for i, k in enumerate(INDEX):
        y = alone[i].requires_grad_()
        expected = network(y, t[i : i + 1], features[k])
        torch.testing.assert_close(energy[i : i + 1], expected)
        torch.testing.assert_close(score[i : i + 1, : SIZES[k]], torch.autograd.grad(expected.sum(), y)[0])
    score.square().sum().backward()  # second derivatives are finite
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_embedding_of_one_hot_features_is_that_of_their_type(batch):
    molecules = batch[2]
    network = make(lambda: GraphormerEnergy(F, n_layers=1, width=8, ffn_width=8, n_heads=2, n_kernels=6))
    types = molecules.features.argmax(-1)
    torch.testing.assert_close(
        network.type_embedding(types)[molecules.mask], (molecules.features @ network.type_embedding.weight)[molecules.mask]
    )


@pytest.mark.parametrize(
    "settings", [{}, {"objective": "endpoint", "t_min": 0.01}, {"objective": "endpoint", "t_min": 0.01, "endpoint_weight_max": 2.0}]
)
@pytest.mark.parametrize("name", FIELDS)
def test_loss_for_given_noise(name, settings, batch, features, generator):
    alone, x, molecules, t = batch
    network = make(FIELDS[name])
    flow = make_flow(network, **settings)
    x0, x1 = flow._scale(x, molecules), flow.prior.noise_like(x, generator, molecules.mask)
    assert (x1[~molecules.mask] == 0).all()
    errors = flow._errors(x0, x1, t, molecules)
    for i, (k, single) in enumerate(zip(INDEX, flows_alone(network, features, **settings), strict=True)):
        noise = x1[i : i + 1, : SIZES[k]]
        torch.testing.assert_close(noise, mean_free(noise))
        torch.testing.assert_close(errors[i : i + 1], single._errors(single._scale(alone[i]), noise, t[i : i + 1]))
    assert flow.loss(x, generator, molecules).isfinite()


@pytest.mark.parametrize("name", FIELDS)
def test_exact_divergence(name, batch, features):
    alone, x, molecules, t = batch
    network = make(FIELDS[name])
    flow = make_flow(network)
    basis = masked_subspace_basis(molecules.mask, 3, True)
    v, divergence = exact_divergence(lambda y: flow.velocity(y, t, molecules), flow._scale(x, molecules), basis)
    for i, (k, single) in enumerate(zip(INDEX, flows_alone(network, features), strict=True)):
        field = lambda y, i=i, single=single: single.velocity(y, t[i : i + 1])  # noqa: E731
        expected_v, expected = exact_divergence(field, single._scale(alone[i]), single.basis)
        torch.testing.assert_close(v[i : i + 1, : SIZES[k]], expected_v)
        torch.testing.assert_close(divergence[i : i + 1], expected)


@pytest.mark.parametrize("name", FIELDS)
def test_log_prob(name, batch, features):
    alone, x, molecules, _ = batch
    network = make(FIELDS[name])
    solver = SolverSettings("rk4", steps=4)
    log_q = make_flow(network).log_prob(x, solver=solver, molecules=molecules, batch_size=3)
    for i, single in enumerate(flows_alone(network, features)):
        torch.testing.assert_close(log_q[i : i + 1], single.log_prob(alone[i], solver=solver))


@pytest.mark.parametrize("likelihood", ["exact", "hutchinson"])
def test_sampling_integrates_the_density_of_each_molecule(likelihood, features, generator):
    class Shrink(torch.nn.Module):
        """v = x, linear: from the standard normal at t = 1 to N(0, e^-2) at t = 0, and the trace is d whatever the probes."""

        def forward(self, x, t, features, mask):
            return x

    molecules = Molecules.stack(features, INDEX * 500, N)
    flow = make_flow(Shrink())
    x, log_q = flow.sample(2000, generator, solver=SolverSettings("rk4", steps=20), likelihood=likelihood, molecules=molecules)
    s, d = 0.5 * math.exp(-1), 3 * (molecules.n_atoms - 1)
    torch.testing.assert_close(
        log_q, -0.5 * (x / s).square().sum((-2, -1)) - d * math.log(s * math.sqrt(2 * math.pi)), rtol=1e-5, atol=1e-4
    )
    assert (x[~molecules.mask] == 0).all()
    assert x.sum(1).abs().max() < 1e-6
    # 2000 rows of at least 9 degrees of freedom: the standard error of a variance is at most 1%
    assert (x.square().sum() / d.sum() / s**2).item() == pytest.approx(1, abs=0.04)
    noisy = flow.sample_sde(4, generator, solver=SolverSettings("heun", steps=5), molecules=molecules[:4])
    assert (noisy[~molecules.mask[:4]] == 0).all()


def test_probes_have_unit_covariance_on_each_molecules_space(features):
    molecules = Molecules.stack(features, INDEX, N)
    basis = masked_subspace_basis(molecules.mask, 3, True)
    probes = Probes(4000, basis, torch.Generator().manual_seed(0))(torch.zeros(4, N, 3, dtype=torch.float64)).flatten(2)
    covariance = torch.einsum("mbi,mbj->bij", probes, probes) / 4000
    for i, mask in enumerate(molecules.mask):
        rows = basis[:, i].flatten(1)
        projector = rows.T @ rows
        assert projector.trace().item() == pytest.approx(3 * (mask.sum().item() - 1))
        torch.testing.assert_close(covariance[i], projector, atol=0.1, rtol=0)  # 6 standard errors
    assert (probes.view(4000, 4, N, 3)[:, ~molecules.mask] == 0).all()


def test_prior_log_prob(features, generator):
    molecules = Molecules.stack(features, INDEX, N)
    x = GaussianPrior(N, 3, True).sample(4, generator, mask=molecules.mask, dtype=torch.float64)
    log_p = GaussianPrior(N, 3, True).log_prob(x, molecules.mask)
    for i, k in enumerate(INDEX):
        torch.testing.assert_close(log_p[i : i + 1], GaussianPrior(SIZES[k], 3, True).log_prob(x[i : i + 1, : SIZES[k]]))


def test_optimal_transport_only_within_a_molecule(generator):
    index = torch.tensor([0, 1, 0, 1, 1, 2])
    x0, x1 = (torch.randn(6, 4, 3, generator=generator) for _ in range(2))
    paired, same = optimal_transport(x0, x1, index)
    torch.testing.assert_close(same, x1)
    for k in range(3):
        expected, _ = optimal_transport(x0[index == k], x1[index == k])
        torch.testing.assert_close(paired[index == k], expected)


def test_energy_based_model(batch, features, generator):
    alone, x, molecules, _ = batch
    network = make(lambda: GraphormerEnergy(F, n_layers=2, width=8, ffn_width=8, n_heads=2, n_kernels=6))
    ebm = EnergyBasedModel(network, N, 3, length_scale=0.5, n_negatives=3).double()
    log_q = ebm.log_prob(x, molecules=molecules)
    torch.testing.assert_close(ebm.log_prob_in_batches(x, 3, molecules), log_q)
    for i, k in enumerate(INDEX):
        single = EnergyBasedModel(network, SIZES[k], 3, features=features[k], length_scale=0.5).double()
        torch.testing.assert_close(log_q[i : i + 1], single.log_prob(alone[i]))
    # equal sizes, all atoms real: the losses are those without a mask, from the same noise
    same = Molecules.stack(features, [1] * 6)
    y = torch.randn(6, SIZES[1], 3, dtype=torch.float64, generator=generator)
    single = EnergyBasedModel(network, SIZES[1], 3, features=features[1], length_scale=0.5, n_negatives=3).double()
    masked, plain = (model.loss(y, torch.Generator().manual_seed(5), *rest) for model, rest in ((ebm, (same,)), (single, ())))
    torch.testing.assert_close(masked, plain)
    # and a row's padding does not change the loss of a batch of it
    noise = torch.randn(6, N, 3, dtype=torch.float64, generator=generator)
    ebm.prior.noise_like = lambda x, generator, mask=None: ebm.prior.project(noise[:, : x.shape[1]], mask)
    losses = [ebm.loss(pad(y, n), torch.Generator().manual_seed(5), Molecules.stack(features, [1] * 6, n)) for n in (SIZES[1], N)]
    torch.testing.assert_close(*losses)


def test_bad_input_is_one_sentence(batch, features):
    _, x, molecules, _ = batch
    network = make(FIELDS["egnn"])
    with pytest.raises(UserError, match="whiten=false"):
        make_flow(network, whiten=True).loss(x, None, molecules)
    with pytest.raises(UserError, match="one row for each"):
        make_flow(network).log_prob(x[:2], molecules=molecules)
    with pytest.raises(UserError, match="raise n_atoms"):
        Molecules.stack(features, [0, 1], 5)
