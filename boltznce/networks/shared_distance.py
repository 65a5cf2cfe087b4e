"""Distance networks that many molecules share: each molecule's first and last layers are made from what its atoms are.

A network of `networks.distance` has a row of weights for every distance and signed volume of its one molecule. Here these rows are
functions of an embedding of the distance, made from the features of its two atoms and the number of bonds between them (of the volume:
from its four atoms), as hypernetworks make weights (Ha et al. 2017, arXiv 1609.09106). They are computed once a batch of one molecule,
so that a conformer costs what it costs the network of one molecule. What lies between, and the dependence on time, is shared.

``bind`` makes the network of one molecule. It shares all parameters and has only its `MolecularGeometry` to itself, which wants
calibrating on rough conformers of the molecule (`systems.conformers.random_conformers`), for which no simulation is needed.
"""

from collections.abc import Callable, Sequence

import networkx
import torch
from torch import Tensor, nn

from boltznce.networks.distance import N_TIME, MolecularGeometry, bonded_quadruples, rounds, soft_clip
from boltznce.networks.mlp import ResidualBlocks, TimeEmbedding, standardize

__all__ = ["SharedDistanceEnergy", "SharedDistanceVectorField", "bonds_between"]

FAR = 8  # so many bonds apart and more are one class
LARGEST = 3.0  # mean velocity beyond the best linear one, in units of the prior's spread: a molecule never seen must not be led away


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
    """Embeddings (n_values, width) of a molecule's distances, which do not depend on the order of their atoms, and signed volumes."""

    def __init__(self, n_features: int, width: int, chiral: bool) -> None:
        super().__init__()
        self.atoms = nn.Linear(n_features, width)
        self.separations = nn.Embedding(FAR + 1, width)
        self.of_pair = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.of_quadruple = nn.Sequential(nn.Linear(5 * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()) if chiral else None

    def forward(self, features: Tensor, separations: Tensor, quadruples: Tensor) -> Tensor:
        """features (n, F), separations (n, n), quadruples (n_quadruples, 4) -> (n_pairs + n_quadruples, width)."""
        atoms = nn.functional.silu(self.atoms(features))
        i, j = torch.triu_indices(len(features), len(features), 1, device=features.device)
        pairs = torch.cat([atoms[i] + atoms[j], atoms[i] * atoms[j], self.separations(separations[i, j])], dim=-1)
        embedded = self.of_pair(pairs)
        if self.of_quadruple is None:
            return embedded
        # tells torsions, whose ends are three bonds apart (less in small rings), from a centre with its neighbours, one bond apart
        ends = self.separations(separations[quadruples[:, 0], quadruples[:, 3]])
        return torch.cat([embedded, self.of_quadruple(torch.cat([atoms[quadruples].flatten(1), ends], dim=-1))])


class _Bound(nn.Module):
    """The network of one molecule; ``weights()`` are remade whenever a parameter has changed."""

    def __init__(self, shared: nn.Module, features: Tensor, bonds: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        quadruples = bonded_quadruples(bonds) if shared.chiral else ()
        self.shared = shared
        self.geometry = MolecularGeometry(len(features), quadruples, preconditioned=True)
        self.register_buffer("features", features, persistent=False)
        self.register_buffer("separations", bonds_between(bonds, len(features)), persistent=False)
        self.register_buffer("quadruples", torch.as_tensor(quadruples, dtype=torch.long).reshape(-1, 4), persistent=False)
        self._kept: tuple[tuple[int, ...], tuple[Tensor, ...]] | None = None

    def calibrate(self, positions_at: Callable[[float], Tensor]) -> None:
        """See `MolecularGeometry.calibrate`."""
        self.geometry.calibrate(positions_at)

    @property
    def parity_equivariant(self) -> bool:
        """Whether v(-x) = -v(x), so that the flow makes molecules and mirror images alike."""
        return not self.shared.chiral

    def weights(self) -> tuple[Tensor, ...]:
        """This molecule's rows of weights; kept between calls without gradients, for as long as the parameters stay as they are."""
        versions = tuple(p._version for p in self.shared.parameters())
        if not torch.is_grad_enabled() or not self.shared.training:
            if self._kept is not None and self._kept[0] == versions:
                return self._kept[1]
            if not torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None:
                self._kept = versions, self._make()
                return self._kept[1]
        return self._make()

    def _make(self) -> tuple[Tensor, ...]:
        embedded = standardize(self.shared.embedding(self.features, self.separations, self.quadruples))
        return self.shared.make_weights(embedded, len(self.features))


class SharedDistanceVectorField(nn.Module):
    """`DistanceVectorField` for many molecules.

    Args:
        n_features: width F of the atom features, which should tell all atoms of a molecule apart (encoding ``numbered``).
        width, n_rounds, n_blocks: as of `DistanceVectorField`.
        embedding_width: of distances and volumes.
        chiral: tell a molecule from its mirror image by signed volumes.
    """

    def __init__(
        self, n_features: int, width: int = 256, n_rounds: int = 4, n_blocks: int = 1, embedding_width: int = 128, chiral: bool = True
    ) -> None:
        super().__init__()
        self.chiral, self.width, self.n_rounds = chiral, width, n_rounds
        self.embedding = ValueEmbedding(n_features, embedding_width, chiral)
        self.time = TimeEmbedding(N_TIME)
        self.blocks = nn.ModuleList(ResidualBlocks(width, N_TIME, n_blocks) for _ in range(n_rounds))
        self.shrink = nn.Linear(N_TIME, n_rounds)
        self.into = nn.Linear(embedding_width, width * n_rounds)
        self.out = nn.Linear(embedding_width, width * n_rounds)
        self.linear = nn.Linear(embedding_width, 2 * (N_TIME + 1) * n_rounds)
        # starts at zero, as the network of one molecule does
        for layer in (self.shrink, self.out, self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def bind(self, features: Tensor, bonds: Sequence[tuple[int, int]]) -> "BoundVectorField":
        """The vector field of one molecule: features (n, F) and pairs of bonded atoms."""
        return BoundVectorField(self, features, bonds)

    def make_weights(self, embedded: Tensor, n_atoms: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (n_values, ·) of weights from embeddings (n_values, embedding_width)."""
        scale = len(embedded) ** -0.5
        # weights made by a layer: without 1 / width a step of Adam would change them width times as strongly as it changes a layer's;
        # and n_values pulls add up on 3 n_atoms coordinates
        made = 3 * n_atoms / len(embedded) / embedded.shape[1]
        return scale * self.into(embedded), made * self.out(embedded), made * self.linear(embedded)


class BoundVectorField(_Bound):
    """The vector field of one molecule, (batch, n, 3); see `SharedDistanceVectorField`."""

    def stiff_gradients(self, x: Tensor) -> Tensor:
        """See `MolecularGeometry.stiff_gradients`."""
        return self.geometry.stiff_gradients(x)

    def forward(self, x: Tensor, t: Tensor, features: Tensor | None = None) -> Tensor:
        shared = self.shared
        into, out, linear = self.weights()
        time = shared.time(t)
        inlets = [lambda z, w=w: z @ w for w in into.split(shared.width, dim=-1)]
        outlets = [lambda h, w=w: h @ w.T for w in out.split(shared.width, dim=-1)]
        extended = torch.cat([time, torch.ones_like(time[:, :1])], dim=-1)
        coefficients = [
            torch.cat([extended @ part.T for part in of_round.split(N_TIME + 1, dim=-1)], dim=-1)
            for of_round in linear.split(2 * (N_TIME + 1), dim=-1)
        ]
        return rounds(self.geometry, x, t, time, shared.shrink(time), inlets, shared.blocks, outlets, coefficients, LARGEST)


class SharedDistanceEnergy(nn.Module):
    """`DistanceEnergy` for many molecules; arguments as of `SharedDistanceVectorField`."""

    def __init__(self, n_features: int, width: int = 384, n_blocks: int = 4, embedding_width: int = 128, chiral: bool = True) -> None:
        super().__init__()
        self.chiral = chiral
        self.embedding = ValueEmbedding(n_features, embedding_width, chiral)
        self.time = TimeEmbedding(N_TIME)
        self.into = nn.Linear(embedding_width, width)
        self.blocks = ResidualBlocks(width, N_TIME, n_blocks)
        self.outlet = nn.Sequential(nn.SiLU(), nn.Linear(width, 1))
        self.quadratic = nn.Linear(embedding_width, 2 * (N_TIME + 1))
        self.level = nn.Linear(N_TIME, embedding_width)
        for layer in (self.quadratic, self.level):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.outlet[1].weight.mul_(0.1)
            self.outlet[1].bias.zero_()

    def bind(self, features: Tensor, bonds: Sequence[tuple[int, int]]) -> "BoundEnergy":
        """The energy of one molecule: features (n, F) and pairs of bonded atoms."""
        return BoundEnergy(self, features, bonds)

    def make_weights(self, embedded: Tensor, n_atoms: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (n_values, ·) of weights from embeddings (n_values, embedding_width), and the molecule's own embedding."""
        made = 1 / embedded.shape[1]
        return len(embedded) ** -0.5 * self.into(embedded), made * self.quadratic(embedded), made * embedded.mean(dim=0)


class BoundEnergy(_Bound):
    """Log-likelihood up to a constant (batch,) of one molecule; see `SharedDistanceEnergy`."""

    def forward(self, x: Tensor, t: Tensor, features: Tensor | None = None) -> Tensor:
        shared = self.shared
        into, quadratic, molecule = self.weights()
        mean, spread, _ = self.geometry.statistics(t)
        z = soft_clip((self.geometry.values(x)[0] - mean) / spread, 10.0)
        time = shared.time(t)
        extended = torch.cat([time, torch.ones_like(time[:, :1])], dim=-1)
        slope, stiffness = (extended @ part.T for part in quadratic.split(N_TIME + 1, dim=-1))
        # the standardized coordinates over-count the 3n - 6 degrees of freedom
        stiffness = stiffness + 3 * len(self.features) / self.geometry.n_values
        hidden = shared.outlet(shared.blocks(z @ into, time)).squeeze(-1)
        return (slope * z - 0.5 * stiffness * z.square()).sum(-1) + hidden + shared.level(time) @ molecule
