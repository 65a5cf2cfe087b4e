"""Distance networks that many molecules share: each molecule's rows of weights are made from what its atoms are.

A network of `networks.distance` has rows of weights for every distance and signed volume of its one molecule. Here they
are linear functions of an embedding of the distance, made from the features of its two atoms and the number of bonds
between them (of the volume: from its four atoms), as hypernetworks make weights (Ha et al. 2017, arXiv 1609.09106).
Embeddings are made once a batch of one molecule; values are first multiplied by them, so that the rows themselves,
which are many more, never are made. What lies between, and the dependence on time, is shared.

``bind`` makes the network of one molecule. It shares all parameters and has only its `MolecularGeometry` to itself,
which wants calibrating on rough conformers of the molecule (`systems.conformers.random_conformers`), for which no
simulation is needed.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Self

import networkx
import torch
from torch import Tensor, nn

from boltznce.modules import copy_with
from boltznce.networks.distance import N_MODES, N_TIME, EnergyTrunk, Layer, VectorFieldTrunk
from boltznce.networks.geometry import MolecularGeometry, bonded_quadruples
from boltznce.networks.mlp import ResidualBlocks, ResidualMLP, TimeEmbedding, standardize

__all__ = ["SharedDistanceEnergy", "SharedDistanceVectorField", "bonds_between"]

FAR = 8  # so many bonds apart and more are one class
LARGEST = 3.0  # mean velocity beyond the best linear one, in prior spreads: a molecule never seen must not be led away


def bonds_between(bonds: Sequence[tuple[int, int]], n_atoms: int) -> Tensor:
    """Number of bonds on the shortest way between atoms, (n_atoms, n_atoms) int64, FAR at most."""
    graph = networkx.Graph(list(bonds))
    graph.add_nodes_from(range(n_atoms))
    between = torch.full((n_atoms, n_atoms), FAR)
    for a, reached in networkx.all_pairs_shortest_path_length(graph, cutoff=FAR):
        for b, n in reached.items():
            between[a, b] = n
    return between


class ValueEmbedding(nn.Module):
    """Embeddings (n_values, width) of distances, whatever the order of their atoms, and of signed volumes."""

    def __init__(self, n_features: int, width: int, chiral: bool) -> None:
        super().__init__()
        self.atoms = nn.Linear(n_features, width)
        self.separations = nn.Embedding(FAR + 1, width)
        self.of_pair = self._two_layers(3 * width, width)
        self.of_quadruple = self._two_layers(5 * width, width) if chiral else None

    @staticmethod
    def _two_layers(n_in: int, width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(n_in, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, features: Tensor, separations: Tensor, quadruples: Tensor) -> Tensor:
        """features (n, F), separations (n, n), quadruples (n_quadruples, 4) -> (n_pairs + n_quadruples, width)."""
        atoms = nn.functional.silu(self.atoms(features))
        i, j = torch.triu_indices(len(features), len(features), 1, device=features.device)
        pairs = torch.cat([atoms[i] + atoms[j], atoms[i] * atoms[j], self.separations(separations[i, j])], dim=-1)
        embedded = self.of_pair(pairs)
        if self.of_quadruple is None:
            return embedded
        # tells torsions, with ends three bonds apart (less in small rings), from a centre and its neighbour, one apart
        ends = self.separations(separations[quadruples[:, 0], quadruples[:, 3]])
        return torch.cat([embedded, self.of_quadruple(torch.cat([atoms[quadruples].flatten(1), ends], dim=-1))])


class _MadeRows(nn.Module):
    """A network whose rows follow from ``features`` (n, F) and bonds of the molecule that it is bound to.

    Args:
        n_features: width F of the atom features, which should tell all atoms of a molecule apart (encoding
        ``numbered``).
        embedding_width: of distances and volumes.
        chiral: tell a molecule from its mirror image by signed volumes.
    """

    features: Tensor
    separations: Tensor
    quadruples: Tensor
    make_weights: Callable[[Tensor], tuple[Tensor, ...]]

    def __init__(self, n_features: int, embedding_width: int, chiral: bool) -> None:
        super().__init__()
        self.chiral = chiral
        self.embedding = ValueEmbedding(n_features, embedding_width, chiral)
        for name in ("features", "separations", "quadruples"):
            self.register_buffer(name, None, persistent=False)
        self._kept: tuple[tuple[int, ...], tuple[Tensor, ...]] | None = None

    def bind(self, features: Tensor, bonds: Sequence[tuple[int, int]]) -> Self:
        """The network of one molecule: features (n, F) and pairs of bonded atoms."""
        quadruples = bonded_quadruples(bonds) if self.chiral else ()
        return copy_with(
            self,
            geometry=MolecularGeometry(len(features), quadruples, preconditioned=True),
            features=features,
            separations=bonds_between(bonds, len(features)),
            quadruples=torch.as_tensor(quadruples, dtype=torch.long).reshape(-1, 4),
        )

    def weights(self) -> tuple[Tensor, ...]:
        """The molecule's rows; kept between calls without gradients, as long as the parameters stay as they are."""
        versions = tuple(p._version for p in self.parameters())
        if not torch.is_grad_enabled() or not self.training:
            if self._kept is not None and self._kept[0] == versions:
                return self._kept[1]
            if not torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None:
                self._kept = versions, self._make()
                return self._kept[1]
        return self._make()

    def _make(self) -> tuple[Tensor, ...]:
        return self.make_weights(standardize(self.embedding(self.features, self.separations, self.quadruples)))


class SharedDistanceVectorField(_MadeRows, VectorFieldTrunk):
    """`DistanceVectorField` for many molecules; arguments as there and of `_MadeRows`."""

    largest = LARGEST

    def __init__(
        self,
        n_features: int,
        width: int = 256,
        n_rounds: int = 4,
        n_blocks: int = 1,
        embedding_width: int = 128,
        chiral: bool = True,
    ) -> None:
        super().__init__(n_features, embedding_width, chiral)
        self.time = TimeEmbedding(N_TIME)
        self.inlets = nn.ModuleList(nn.Linear(embedding_width, width) for _ in range(n_rounds))
        self.blocks = nn.ModuleList(ResidualBlocks(width, N_TIME, n_blocks) for _ in range(n_rounds))
        self.outlets = nn.ModuleList(nn.Linear(width, embedding_width) for _ in range(n_rounds))
        self.shrink = nn.Linear(N_TIME, n_rounds)
        self.linear = nn.Linear(embedding_width, 2 * (N_TIME + 1) * n_rounds)
        # starts at zero, as the network of one molecule does
        for layer in (self.shrink, self.linear, *self.outlets):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def make_weights(self, embedded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The ways in and out (n_values, embedding_width), and what a and b are made of (n_values, ·)."""
        scale = len(embedded) ** -0.5
        # weights made by a layer: without 1 / width a step of Adam would change them width times as strongly as it
        # changes a layer's; and n_values pulls add up on 3 n_atoms coordinates
        made = 3 * len(self.features) / len(embedded) / embedded.shape[1]
        return scale * embedded, made * embedded, made * self.linear(embedded)

    def rows(self, time: Tensor) -> Iterable[tuple[Layer, Layer, Tensor, Tensor]]:
        into, out, linear = self.weights()
        a_and_b = _of_time(linear, time)
        inlets = [lambda z, layer=layer: layer(z @ into) for layer in self.inlets]
        outlets = [lambda h, layer=layer: layer(h) @ out.T for layer in self.outlets]
        return zip(inlets, outlets, a_and_b[::2], a_and_b[1::2], strict=True)


class SharedDistanceEnergy(_MadeRows, EnergyTrunk):
    """`DistanceEnergy` for many molecules; arguments as there and of `_MadeRows`."""

    def __init__(
        self, n_features: int, width: int = 384, n_blocks: int = 4, embedding_width: int = 128, chiral: bool = True
    ) -> None:
        super().__init__(n_features, embedding_width, chiral)
        self.time = TimeEmbedding(N_TIME)
        self.mlp = ResidualMLP(embedding_width, 1, N_TIME, width, n_blocks)
        self.squares = nn.Linear(embedding_width, width, bias=False)
        self.quadratic = nn.Linear(embedding_width, 2 * (N_TIME + 1))
        self.level = nn.Linear(N_TIME, embedding_width)
        self.along = nn.Linear(embedding_width, N_MODES, bias=False)
        self.modes = nn.Linear(N_TIME, N_MODES)
        for layer in (self.quadratic, self.level, self.modes):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def make_weights(self, embedded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The way in (n_values, embedding_width), what the well is made of (n_values, ·), the molecule's embedding."""
        made, scale = 1 / embedded.shape[1], len(embedded) ** -0.5
        return scale * embedded, made * self.quadratic(embedded), made * embedded.mean(0)

    def rows(self, time: Tensor) -> tuple[Layer, Layer, Tensor, Tensor, Tensor]:
        into, quadratic, molecule = self.weights()
        a, b = _of_time(quadratic, time)

        def inlet(z_and_squares: Tensor) -> Tensor:
            z, squares = z_and_squares.chunk(2, dim=-1)
            return self.mlp.inlet(z @ into) + self.squares(squares @ into)

        # modes begin soft
        return inlet, lambda z: 0.5 * self.along(z @ into), a, b, self.level(time) @ molecule


def _of_time(rows: Tensor, time: Tensor) -> list[Tensor]:
    """Linear functions (batch, n_values) of the time embedding with made rows (n_values, k (N_TIME + 1)): k of them."""
    extended = torch.cat([time, torch.ones_like(time[:, :1])], dim=-1)
    return [extended @ part.T for part in rows.split(N_TIME + 1, dim=-1)]
