"""A proxy brought near to its system by a few of the latter's energies: its force field, in effect, fitted anew."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from boltznce.data.fourier_bias import Axis, FourierBias
from boltznce.data.jobs import biases_of
from boltznce.errors import UserError
from boltznce.systems.base import System

__all__ = ["shift_of"]

N_TERMS = 3  # of the Fourier series, an angle
RIDGE = 1.0  # of coefficients of terms whose standard deviation is one
OUTLIERS = 0.01  # of the differences on either side, which are cut: of positions that clash


def shift_of(system: System, x: Tensor) -> Callable[[Tensor], Tensor]:
    """By how many kT the energy of a system is above its proxy's, as far as terms like a force field's can tell.

    A function g of positions (n, n_atoms, 3), differentiable, up to a constant: a ridge regression of the difference at
    given positions ``x`` on a Fourier series in every φ and the ψ beside it, on lengths of bonds and cosines of angles
    and their squares, and on one over the distance of all other pairs of atoms. Zero for a system without bonds. No
    weight hangs on it: exp(-u_proxy - g) is but a better place to start from, above all along torsions, which hardly
    turn while walkers go from there to the system. Raises UserError where the system has no energy at any of ``x``.
    """
    if not system.bonds:
        return lambda x: x.new_zeros(len(x))
    terms, x = _terms(system), x.double()
    off = system.energy(x) - system.proxy.energy(x)
    x, off = x[off.isfinite()], off[off.isfinite()]
    if len(off) < 2:
        raise UserError(f"{system.name} has no energy where its proxy was drawn, or simulated: train the flow longer.")
    low, middle, high = off.quantile(torch.tensor([OUTLIERS, 0.5, 1 - OUTLIERS]).to(off))
    values = terms(x)
    mean, spread = values.mean(0), values.std(0).clamp(min=1e-9)
    values = (values - mean) / spread
    normal = values.T @ values + RIDGE * torch.eye(values.shape[1]).to(values)
    slopes = torch.linalg.solve(normal, values.T @ (off.clamp(low, high) - middle)) / spread
    return lambda x: (terms(x) - mean.to(x)) @ slopes.to(x)


def _terms(system: System) -> Callable[[Tensor], Tensor]:
    """x (n, n_atoms, 3) -> values (n, terms)."""
    bonded = [set() for _ in range(system.n_atoms)]
    for i, j in system.bonds:
        bonded[i].add(j)
        bonded[j].add(i)
    angles = [(i, k, j) for k, near in enumerate(bonded) for i, j in itertools.combinations(sorted(near), 2)]
    near = {frozenset(bond) for bond in system.bonds} | {frozenset((i, j)) for i, _, j in angles}
    far = [pair for pair in itertools.combinations(range(system.n_atoms), 2) if frozenset(pair) not in near]
    torsions = (
        [[Axis(system.dihedrals[name]) for name in pair] for pair in biases_of(system)] if system.dihedrals else []
    )
    series = [FourierBias(pair, N_TERMS, 1.0, 1.0) for pair in torsions]

    def along(x: Tensor, i: tuple[int, ...], j: tuple[int, ...]) -> Tensor:
        return x[:, list(i)] - x[:, list(j)]

    def terms(x: Tensor) -> Tensor:
        lengths = along(x, *zip(*system.bonds, strict=True)).norm(dim=-1)
        first, corner, last = zip(*angles, strict=True)
        cosines = torch.cosine_similarity(along(x, first, corner), along(x, last, corner), dim=-1)
        inverse = 1 / along(x, *zip(*far, strict=True)).norm(dim=-1) if far else x[:, :0, 0]
        of_torsions = [each.functions(each.coordinates(x)).to(x) for each in series]
        return torch.cat([lengths, lengths.square(), cosines, cosines.square(), inverse, *of_torsions], dim=1)

    return terms
