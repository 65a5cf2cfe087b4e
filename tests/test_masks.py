"""A padded molecule gives the same answer as alone: loss, prior, energy-based model."""

import pytest
import torch

from boltznce.ebm import EnergyBasedModel
from boltznce.errors import UserError
from boltznce.flows.coupling import optimal_transport
from boltznce.flows.interpolant_flow import InterpolantFlow
from boltznce.flows.prior import GaussianPrior, mean_free
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


def test_embedding_of_one_hot_features_is_that_of_their_type(batch):
    molecules = batch[2]
    network = make(lambda: GraphormerEnergy(F, n_layers=1, width=8, ffn_width=8, n_heads=2, n_kernels=6))
    types = molecules.features.argmax(-1)
    torch.testing.assert_close(
        network.type_embedding(types)[molecules.mask],
        (molecules.features @ network.type_embedding.weight)[molecules.mask],
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": "endpoint", "t_min": 0.01},
        {"objective": "endpoint", "t_min": 0.01, "endpoint_weight_max": 2.0},
    ],
)
@pytest.mark.parametrize("name", FIELDS)
def test_loss_for_given_noise(name, settings, batch, features, generator):
    alone, x, molecules, t = batch
    network = make(FIELDS[name])
    flow = make_flow(network, **settings).on(molecules)
    x0, x1 = flow._scale(x), flow.prior.noise_like(x, generator)
    assert (x1[~molecules.mask] == 0).all()
    errors = flow._errors(x0, x1, t)
    for i, (k, single) in enumerate(zip(INDEX, flows_alone(network, features, **settings), strict=True)):
        noise = x1[i : i + 1, : SIZES[k]]
        torch.testing.assert_close(noise, mean_free(noise))
        torch.testing.assert_close(errors[i : i + 1], single._errors(single._scale(alone[i]), noise, t[i : i + 1]))
    assert flow.loss(x, generator).isfinite()


def test_prior_log_prob(features, generator):
    molecules = Molecules.stack(features, INDEX, N)
    prior = GaussianPrior(N, 3, True, molecules.mask)
    x = prior.sample(4, generator, dtype=torch.float64)
    log_p = prior.log_prob(x)
    for i, k in enumerate(INDEX):
        torch.testing.assert_close(
            log_p[i : i + 1], GaussianPrior(SIZES[k], 3, True).log_prob(x[i : i + 1, : SIZES[k]])
        )


def test_optimal_transport_only_within_a_molecule(generator):
    index = torch.tensor([0, 1, 0, 1, 1, 2])
    x0, x1 = (torch.randn(6, 4, 3, generator=generator) for _ in range(2))
    paired, same = optimal_transport(x0, x1, index)
    torch.testing.assert_close(same, x1)
    for k in range(3):
        expected, _ = optimal_transport(x0[index == k], x1[index == k])
        torch.testing.assert_close(paired[index == k], expected)


def test_energy_based_model(batch, features, generator, monkeypatch):
    alone, x, molecules, _ = batch
    network = make(lambda: GraphormerEnergy(F, n_layers=2, width=8, ffn_width=8, n_heads=2, n_kernels=6))
    ebm = EnergyBasedModel(network, N, 3, length_scale=0.5, n_negatives=3).double()
    log_q = ebm.on(molecules).log_prob(x)
    for i, k in enumerate(INDEX):
        single = EnergyBasedModel(network, SIZES[k], 3, features=features[k], length_scale=0.5).double()
        torch.testing.assert_close(log_q[i : i + 1], single.log_prob(alone[i]))
    # equal sizes, all atoms real: the losses are those without a mask, from the same noise
    same = Molecules.stack(features, [1] * 6)
    y = torch.randn(6, SIZES[1], 3, dtype=torch.float64, generator=generator)
    single = EnergyBasedModel(network, SIZES[1], 3, features=features[1], length_scale=0.5, n_negatives=3).double()
    masked, plain = (model.loss(y, torch.Generator().manual_seed(5)) for model in (ebm.on(same), single))
    torch.testing.assert_close(masked, plain)
    # and a row's padding does not change the loss of a batch of it
    noise = torch.randn(6, N, 3, dtype=torch.float64, generator=generator)
    monkeypatch.setattr(GaussianPrior, "noise_like", lambda prior, x, generator: prior.project(noise[:, : x.shape[1]]))
    models = [(n, ebm.on(Molecules.stack(features, [1] * 6, n))) for n in (SIZES[1], N)]
    torch.testing.assert_close(*(model.loss(pad(y, n), torch.Generator().manual_seed(5)) for n, model in models))


def test_bad_input_is_one_sentence(batch, features):
    _, x, molecules, _ = batch
    network = make(FIELDS["egnn"])
    with pytest.raises(UserError, match="whiten=false"):
        make_flow(network, whiten=True).on(molecules).loss(x)
    for call in (lambda flow: flow.log_prob(x), lambda flow: flow.sample(4)):
        with pytest.raises(UserError, match="one molecule at a time"):
            call(make_flow(network).on(molecules))
    with pytest.raises(UserError, match="raise n_atoms"):
        Molecules.stack(features, [0, 1], 5)
