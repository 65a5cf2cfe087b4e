"""The EGNN vector field: a layer against the formula written atom by atom."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from boltznce.config import build
from boltznce.networks.egnn import EGNNVectorField

N_ATOMS, N_FEATURES = 6, 4


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def case(generator):
    """A small random network in float64, its steps made as large as those of a trained one."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = EGNNVectorField(N_FEATURES, n_layers=3, width=8).double()
        for layer in network.layers:
            torch.nn.init.normal_(layer.step[-1].weight)
    x = torch.randn(5, N_ATOMS, 3, dtype=torch.float64, generator=generator)
    t = torch.rand(5, dtype=torch.float64, generator=generator)
    features = torch.randn(N_ATOMS, N_FEATURES, dtype=torch.float64, generator=generator)
    return network, x, t, features


def test_a_layer_is_the_formula(case, generator):
    """Satorras et al., equations 3 to 6, with attention and normalized differences, by loops over atoms."""
    layer = case[0].layers[0]
    h = torch.randn(1, N_ATOMS, 8, dtype=torch.float64, generator=generator)
    x, start = case[1][:1], case[1][1:2]
    squared = (start.unsqueeze(2) - start.unsqueeze(1)).square().sum(-1, keepdim=True)
    new_h, new_x = layer(h, x, squared, 1 - torch.eye(N_ATOMS, dtype=torch.float64).unsqueeze(-1))
    weight = torch.cat([layer.target.weight, layer.source.weight, layer.distances.weight], dim=1)
    for i in range(N_ATOMS):
        moved, received = x[0, i].clone(), torch.zeros(8, dtype=torch.float64)
        for j in set(range(N_ATOMS)) - {i}:
            difference = x[0, i] - x[0, j]
            d2 = difference.square().sum()
            m = layer.message(weight @ torch.cat([h[0, i], h[0, j], d2[None], squared[0, i, j]]) + layer.target.bias)
            m = m * torch.sigmoid(layer.attention(m))
            moved = moved + difference / (d2.sqrt() + 1) * layer.longest_step * torch.tanh(layer.step(m))
            received = received + m
        torch.testing.assert_close(new_x[0, i], moved)
        torch.testing.assert_close(new_h[0, i], h[0, i] + layer.update(torch.cat([h[0, i], received])))


def test_the_config_builds_the_published_size():
    settings = OmegaConf.load(Path(__file__).parents[1] / "configs" / "network" / "egnn.yaml")
    network = build(settings, EGNNVectorField, {"n_features": 76, "n_atoms": 30})
    assert len(network.layers) == 9
    assert network.embedding.weight.shape == (128, 77)
