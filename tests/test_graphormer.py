"""The Graphormer energy: the authors' network on random weights, and its derivatives."""

from pathlib import Path

import numpy as np
import pytest
import torch

from boltznce.networks.graphormer import GraphormerEnergy

GOLDEN = Path(__file__).parents[2] / "shared" / "reference" / "graphormer_golden.npz"
N_ATOMS, N_TYPES = 6, 3

# the authors' name of a module -> ours; {i} is the number of a layer
MODULES = {
    "atom_encoder": "type_embedding",
    "time_encoder.layer1": "time_embedding.0",
    "time_encoder.layer2": "time_embedding.2",
    "edge_proj": "kernels_to_node",
    "bias_proj.layer1": "kernels_to_bias.0",
    "bias_proj.layer2": "kernels_to_bias.2",
    "final_ln": "final_norm",
    "energy_proj.layer1": "head.0",
    "energy_proj.layer2": "head.2",
    "layers.{i}.self_attn.in_proj": "layers.{i}.qkv",
    "layers.{i}.self_attn.out_proj": "layers.{i}.out",
    "layers.{i}.self_attn_layer_norm": "layers.{i}.attention_norm",
    "layers.{i}.final_layer_norm": "layers.{i}.ffn_norm",
    "layers.{i}.fc1": "layers.{i}.ffn.0",
    "layers.{i}.fc2": "layers.{i}.ffn.2",
}


def authors_network(weights):
    """Our network with their weights; their type 0 is padding, and their layers' own bias maps have no effect."""
    n_layers = 2
    names = {key.format(i=i): value.format(i=i) for key, value in MODULES.items() for i in range(n_layers)}
    state = {
        f"{ours}.{kind}": weights[f"{name}.{kind}"]
        for name, ours in names.items()
        for kind in ("weight", "bias")
        if f"{name}.{kind}" in weights
    }
    state["type_embedding.weight"] = state["type_embedding.weight"][1:]
    state["kernels.means"], state["kernels.widths"] = weights["gbf.means.weight"][0], weights["gbf.stds.weight"][0]
    for name, ours in (("mul", "scale"), ("bias", "shift")):
        state[f"kernels.{ours}"] = weights[f"gbf.{name}.weight"].view(22, 22)[1:, 1:].flatten()
    network = GraphormerEnergy(n_features=21, n_layers=n_layers, width=32, ffn_width=48, n_heads=4, n_kernels=10)
    network.load_state_dict(state)
    return network


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the authors' energies are not here")
def test_energy_and_score_are_the_authors():
    golden = {name: torch.as_tensor(array) for name, array in np.load(GOLDEN).items()}
    network = authors_network(
        {name.removeprefix("w/"): array for name, array in golden.items() if name.startswith("w/")}
    )
    x = golden["x"].requires_grad_()
    energy = network(x, golden["t"][:, 0], torch.nn.functional.one_hot(golden["atom_types"], 21))
    (score,) = torch.autograd.grad(energy.sum(), x)
    torch.testing.assert_close(energy, golden["energy"][:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(score, golden["score"], rtol=0, atol=1e-5)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def case(generator):
    """A small random network in float64, with pair tables unlike for every ordered pair of types."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = GraphormerEnergy(N_TYPES, n_layers=2, width=16, ffn_width=24, n_heads=4, n_kernels=8).double()
        torch.nn.init.uniform_(network.kernels.scale, 0.5, 1.5)
        torch.nn.init.uniform_(network.kernels.shift, -0.5, 0.5)
    x = 2 * torch.randn(5, N_ATOMS, 3, dtype=torch.float64, generator=generator)
    t = torch.rand(5, dtype=torch.float64, generator=generator)
    features = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), N_TYPES).double()
    return network, x, t, features


def test_derivatives(case):
    network, x, t, features = case
    x = x[:2].requires_grad_()
    assert torch.autograd.gradcheck(lambda y: network(y, t[:2], features), x)
    assert torch.autograd.gradgradcheck(lambda y: network(y, t[:2], features), x, atol=1e-4)
