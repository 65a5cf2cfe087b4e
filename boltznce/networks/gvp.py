"""Vector field of geometric vector perceptrons (Jing et al. 2021, arXiv:2009.01411) on all directed pairs of atoms.

Atoms carry scalar channels (batch, n, s) and vector channels (batch, n, 3, v); tensors over pairs are (batch, source,
target, ...). Whatever a message takes from its source atom is linear up to the activation, so it is computed once an
atom and then spread over the pairs.
"""

import torch
from torch import Tensor, nn

__all__ = ["GVPVectorField"]

NORM_FLOOR = 1e-8  # squared norms are clamped here: |0| has a finite value and the gradient zero
NORM_EPS = 1e-5  # beside the variances and mean squares that normalization divides by
DISTANCE_EPS = 1e-8  # added to a distance before it divides


def clamp_squared(squared: Tensor) -> Tensor:
    """The norm that belongs to a squared norm, at least 1e-4."""
    return squared.clamp(min=NORM_FLOOR).sqrt()


def norm(v: Tensor, dim: int = -2) -> Tensor:
    """Clamped length of vectors (..., 3, v) along ``dim``."""
    return clamp_squared(v.square().sum(dim))


def normalize_vectors(v: Tensor) -> Tensor:
    """Vectors (..., 3, v) over the root mean square of their lengths."""
    mean_square = v.square().sum(-2, keepdim=True).clamp(min=NORM_FLOOR).mean(-1, keepdim=True)
    return v / ((mean_square + NORM_EPS).sqrt() + NORM_EPS)


class ScalarNorm(nn.Module):
    """Layer normalization in plain operations: the fused one has no forward-mode derivative when compiled."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
        return centred * scale * self.weight + self.bias


class Swish(nn.Module):
    """x · sigmoid(βx) with one learned β."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class Perceptron(nn.Module):
    """One geometric vector perceptron: scalars see lengths of mixed vectors, the new scalars are to gate vectors."""

    def __init__(self, scalars_in: int, vectors_in: int, scalars_out: int, vectors_out: int, activation: nn.Module):
        super().__init__()
        hidden = max(vectors_in, vectors_out)
        self.hidden = nn.Linear(vectors_in, hidden, bias=False)
        self.vectors = nn.Linear(hidden, vectors_out, bias=False)
        self.scalars = nn.Linear(scalars_in + hidden, scalars_out)
        self.gate = nn.Linear(scalars_out, vectors_out)
        self.activation = activation

    def forward(self, h: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """New scalars (..., s), gates (..., v) before their activation and ungated vectors (..., 3, v)."""
        hidden = self.hidden(v)
        h = self.activation(self.scalars(torch.cat([h, norm(hidden)], dim=-1)))
        return h, self.gate(h), self.vectors(hidden)


class Message(Perceptron):
    """Sum over all sources j != i of a perceptron of (h_j, kernels(d_ij)) and (unit vector from i to j, v_j)."""

    activation: Swish

    def __init__(self, n_scalars: int, n_vectors: int, n_kernels: int):
        super().__init__(n_scalars + n_kernels, n_vectors + 1, n_scalars, n_vectors, Swish())
        self.n_scalars = n_scalars

    def forward(  # type: ignore[override]
        self, h: Tensor, v: Tensor, unit: Tensor, kernels: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scalars (batch, n, s), vectors (batch, n, 3, v) that atoms receive from real ones, see ``mask`` (batch, n).

        The hidden vectors of a pair are H_j + w u_ij, of squared length |H_j|² + w² + 2w u_ij · H_j. The swish is
        written as silu(βx) / β: β then scales small matrices, and a single fused operation is left on the tensor over
        pairs.
        """
        w, from_source = self.hidden.weight[:, 0], self.hidden.weight[:, 1:]
        hidden = nn.functional.linear(v, from_source)
        squared = (hidden.square().sum(-2) + w.square()).unsqueeze(2) + unit @ (2 * w * hidden)

        beta = self.activation.beta
        source_weight, pair_weight = (beta * self.scalars.weight).tensor_split([self.n_scalars], dim=1)
        of_source = nn.functional.linear(h, source_weight, beta * self.scalars.bias).unsqueeze(2)
        of_pair = nn.functional.linear(torch.cat([kernels, clamp_squared(squared)], dim=-1), pair_weight)
        messages = nn.functional.silu(of_source + of_pair)

        others = 1 - torch.eye(h.shape[1], dtype=h.dtype, device=h.device).unsqueeze(-1)
        if mask is not None:
            real = mask.to(h).reshape(*mask.shape, 1, 1)
            messages, others = messages * real, others * real
        gates = torch.sigmoid(nn.functional.linear(messages, self.gate.weight / beta, self.gate.bias)) * others
        along_pair = torch.einsum("bjic,bjid->bidc", gates, unit) * (self.vectors.weight @ w)
        from_self = messages.diagonal(dim1=1, dim2=2).mT
        vectors = torch.einsum("bjic,bjdc->bidc", gates, self.vectors(hidden)) + along_pair
        return (messages.sum(1) - from_self) / beta, vectors


class Layer(nn.Module):
    """Messages, a node update, and (``moves``) a step of the positions that the next layer measures distances on."""

    def __init__(self, n_scalars: int, n_vectors: int, n_kernels: int, message_scale: float, moves: bool):
        super().__init__()
        self.message_scale = message_scale
        self.message = Message(n_scalars, n_vectors, n_kernels)
        self.message_norm = ScalarNorm(n_scalars)
        self.update = Perceptron(n_scalars, n_vectors, n_scalars, n_vectors, Swish())
        self.update_norm = ScalarNorm(n_scalars)
        self.step = Perceptron(n_scalars, n_vectors, n_scalars, 1, nn.SiLU()) if moves else None

    def forward(
        self, h: Tensor, v: Tensor, unit: Tensor, kernels: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """New scalars, vectors, and the step (batch, n, 3) as a fraction of the longest one."""
        received_h, received_v = self.message(h, v, unit, kernels, mask)
        h = self.message_norm(h + received_h / self.message_scale)
        v = normalize_vectors(v + received_v / self.message_scale)

        new_h, gates, new_v = self.update(h, v)
        h = h + new_h
        v = v + torch.sigmoid(gates).unsqueeze(-2) * new_v
        step = None
        if self.step is not None:
            _, gate, direction = self.step(h, v)
            step = torch.tanh(gate) * unit_vector(direction)
        return self.update_norm(h), normalize_vectors(v), step


def unit_vector(v: Tensor) -> Tensor:
    """Directions (..., 3) of vectors with one channel (..., 3, 1)."""
    return (v / norm(v).unsqueeze(-2)).squeeze(-1)


class GVPVectorField(nn.Module):
    """The vector field of BoltzNCE: O(3)-equivariant, translation-invariant, equivariant to permutations of atoms.

    Lengths are Å (the flow's scaled units). Mirror images are mapped to mirror images: there are no cross products.

    Args:
        n_features: width F of the atom features.
        n_layers, n_scalars, n_vectors: depth and channels.
        n_kernels, cutoff: Gaussian radial functions, centred evenly on [0, cutoff], of width cutoff / n_kernels.
        message_scale: summed messages are divided by this.
        longest_step: bound of a layer's change of each position.
    """

    centres: Tensor

    def __init__(
        self,
        n_features: int,
        n_layers: int,
        n_scalars: int,
        n_vectors: int,
        n_kernels: int = 16,
        cutoff: float = 20.0,
        message_scale: float = 10.0,
        longest_step: float = 10.0,
    ):
        super().__init__()
        self.n_vectors = n_vectors
        self.longest_step = longest_step
        self.kernel_width = cutoff / n_kernels
        self.register_buffer("centres", torch.linspace(0, cutoff, n_kernels), persistent=False)
        self.embedding = nn.Linear(n_features + 1, n_scalars)
        # the head does not see the positions, so the last layer has no reason to move them
        sizes = (n_scalars, n_vectors, n_kernels, message_scale)
        self.layers = nn.ModuleList(Layer(*sizes, moves=i < n_layers - 1) for i in range(n_layers))
        self.head = Perceptron(n_scalars, n_vectors, n_scalars, 1, nn.SiLU())

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors from target to source and radial functions, (batch, source, target, 3 and n_kernels)."""
        difference = x.unsqueeze(2) - x.unsqueeze(1)
        distance = norm(difference, dim=-1).unsqueeze(-1) + DISTANCE_EPS
        return difference / distance, torch.exp(-((distance - self.centres) / self.kernel_width).square())

    def forward(self, x: Tensor, t: Tensor, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Velocity (batch, n, 3) at positions x (batch, n, 3) and times t (batch,). It is not mean-free.

        features: (n, F), or (batch, n, F) for unlike molecules; mask: (batch, n), true for the real atoms.
        """
        batch, n, _ = x.shape
        inputs = torch.cat([features.to(x).expand(batch, n, -1), t.reshape(batch, 1, 1).expand(batch, n, 1)], dim=-1)
        h = nn.functional.silu(self.embedding(inputs))
        v = x.new_zeros(batch, n, 3, self.n_vectors)
        for layer in self.layers:
            h, v, step = layer(h, v, *self.pairs(x), mask)
            if step is not None:
                x = x + self.longest_step * step
        _, length, direction = self.head(h, v)
        velocity = length * unit_vector(direction)
        return velocity if mask is None else velocity * mask.to(x).unsqueeze(-1)
